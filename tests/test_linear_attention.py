"""One sum in three forms, equal to each other and to the definition; gradients and O(N) memory too.

All of it once as a CPU sums, and once as an accelerator does, on this CPU in blocks of 512 tokens.
"""

import math

import pytest
import torch
import torch.utils.checkpoint
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from hhbench import chunkwise, linear_attention
from hhbench.attention import FeatureMap, MixerShape, build_attention
from hhbench.blockwise import Size
from hhbench.errors import UsageError
from hhbench.kernels import kernels
from hhbench.linear_attention import LinearAttention
from hhbench.linear_sum import CHUNK, FLOOR, LinearState, chunked
from hhbench.profile.correctness import distance


@pytest.fixture(autouse=True, scope="module", params=["CPU", "accelerator"])
def at_once(request: pytest.FixtureRequest):
    """Whether all chunks of a block are summed at once."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "accelerator":
            patch.setattr(linear_attention, "wants_large_products", lambda _: True)
            patch.setattr(linear_attention, "has_tensor_cores", lambda _: True)
            patch.setattr(linear_attention, "LARGE", Size(512, 4 * 512 * 32))
        yield request.param == "accelerator"


# --- maps that exercise what the sum does with them ---


class Relu(FeatureMap):
    """No parameters; whole rows may be zero."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Plain(FeatureMap):
    """Positive features of a learned projection, keys of scale 1."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.feature_dim = 5
        self.weight = nn.Parameter(torch.randn(shape.num_heads, shape.head_dim, 5))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.softplus(x @ self.weight.to(x.dtype))


class Scaled(Plain):
    """The same features, of keys with a learned log scale that gets a gradient too."""

    steepness = 4.0

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.direction = nn.Parameter(torch.randn(shape.num_heads, shape.head_dim, 1))

    def log_scale(self, k: Tensor) -> Tensor:
        return self.steepness * (k @ self.direction.to(k.dtype)).squeeze(-1)

    def map_keys(self, k, *, positions, key_mask):
        return self(k), self.log_scale(k)


class Multiplied(Scaled):
    """`Scaled` with the scale multiplied into the features, as the definition has it."""

    def map_keys(self, k, *, positions, key_mask):
        return self(k) * self.log_scale(k).exp()[..., None], None


class Exponential(FeatureMap):
    """exp(x), the largest feature of a key taken out as its log scale."""

    def map_queries(self, q, *, positions):
        return (q - q.amax(-1, keepdim=True)).exp()

    def map_keys(self, k, *, positions, key_mask):
        top = k.amax(-1)
        return (k - top[..., None]).exp(), top


class Positioned(Plain):
    """Features that depend on where the token stands."""

    def map_queries(self, q, *, positions):
        return self(q + 0.1 * positions[:, None, :, None].sin())

    def map_keys(self, k, *, positions, key_mask):
        return self(k + 0.1 * positions[:, None, :, None].sin()), None


class Growing(FeatureMap):
    """Ones, with log scales that the first feature of a key dictates."""

    def map_queries(self, q, *, positions):
        return torch.ones_like(q)

    def map_keys(self, k, *, positions, key_mask):
        return torch.ones_like(k), k[..., 0]


def definition(module: LinearAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
    """The sum as the first line of the module states it: true features, one pair at a time, no maximum."""
    group = module.shape.num_heads // module.shape.num_kv_heads
    B, M = k.shape[0], k.shape[2]
    positions = torch.arange(M).expand(B, M) if key_mask is None else (key_mask.cumsum(-1) - 1).clamp_min(0)
    if not module.share_kv_heads:
        k = k.repeat_interleave(group, 1)
    features, log_scale = module.key_map.map_keys(k, positions=positions, key_mask=key_mask)
    queries = module.query_map.map_queries(q, positions=positions[:, M - q.shape[2] :])
    scale = 1 if log_scale is None else (log_scale - log_scale.amax(-1, keepdim=True)).exp()[..., None]
    features = features.clamp_min(FLOOR) * scale
    if module.share_kv_heads:
        features = features.repeat_interleave(group, 1)
    pairs = torch.einsum("bhnf,bhmf->bhnm", queries.clamp_min(FLOOR), features)
    if module.shape.causal:
        pairs = pairs.tril(M - q.shape[2])
    if key_mask is not None:
        pairs = pairs * key_mask[:, None, None, :]
    total = pairs.sum(-1, keepdim=True)
    return pairs @ v.repeat_interleave(group, 1) / total.where(total > 0, 1.0)


# --- three forms ---

LENGTHS = st.one_of(st.integers(1, 300), st.sampled_from([1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1]))
MASKS = ["none", "random", "left", "right", "one row masked"]


def mask_of(kind: str, B: int, N: int) -> Tensor | None:
    if kind == "none":
        return None
    pad = torch.randint(0, N + 1, (B, 1))
    if kind == "left":
        return torch.arange(N) >= pad
    if kind == "right":
        return torch.arange(N) < N - pad
    key_mask = torch.rand(B, N) < 0.7
    if kind == "one row masked":
        key_mask[0] = False
    return key_mask


class Setting:
    """A module, inputs and a mask, drawn from a seed."""

    def __init__(self, make_map, seed: int, *, B, G, group, N, D, E, mask="none", causal=True, **options) -> None:
        torch.manual_seed(seed)
        H = G * group
        shape = MixerShape(dim=H * D, num_heads=H, num_kv_heads=G, head_dim=D, scale=1.0, max_len=512, causal=causal)
        self.module = LinearAttention(shape, make_map, **options).double()
        self.inputs = [
            torch.randn(B, heads, N, width, dtype=torch.float64, requires_grad=True)
            for heads, width in ((H, D), (G, D), (G, E))
        ]
        self.key_mask = mask_of(mask, B, N)
        self.cotangent = torch.randn(B, H, N, E, dtype=torch.float64)
        self.leaves = self.inputs + list(self.module.parameters())

    def grads(self, out: Tensor) -> list[Tensor]:
        """Of inputs and parameters. A query map doesn't use what is for keys only: zeros."""
        found = torch.autograd.grad((out * self.cotangent).sum(), self.leaves, retain_graph=True, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(self.leaves, found, strict=True)]

    def assert_equal(self, out: Tensor, expected: Tensor) -> None:
        """Outputs and gradients at attended tokens."""
        if self.key_mask is not None:
            padded = ~self.key_mask[:, None, :, None]
            out, expected = out.masked_fill(padded, 0.0), expected.masked_fill(padded, 0.0)
        torch.testing.assert_close(out, expected, atol=1e-10, rtol=1e-10)
        torch.testing.assert_close(self.grads(out), self.grads(expected), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("make_map", [Plain, Scaled, Positioned])
@given(
    seed=st.integers(0, 10**6),
    B=st.integers(1, 3),
    G=st.integers(1, 2),
    group=st.integers(1, 2),
    N=LENGTHS,
    D=st.integers(1, 4),
    E=st.integers(1, 5),
    mask=st.sampled_from(MASKS),
)
@example(seed=0, B=2, G=1, group=2, N=CHUNK, D=3, E=2, mask="none")
@example(seed=0, B=2, G=1, group=2, N=CHUNK + 1, D=3, E=2, mask="left")
@example(seed=1, B=2, G=2, group=2, N=300, D=3, E=2, mask="one row masked")
@settings(max_examples=25)
def test_three_forms_are_the_definition(make_map, share_kv_heads, seed, B, G, group, N, D, E, mask):
    drawn = Setting(make_map, seed, B=B, G=G, group=group, N=N, D=D, E=E, mask=mask, share_kv_heads=share_kv_heads)
    expected = definition(drawn.module, *drawn.inputs, drawn.key_mask)
    for form in ("quadratic", "chunked", "recurrent"):
        out = drawn.module(*drawn.inputs, key_mask=drawn.key_mask, form=form)
        drawn.assert_equal(out, expected)
    weights = drawn.module.weights(*drawn.inputs[:2], key_mask=drawn.key_mask)
    v = drawn.inputs[2].repeat_interleave(group, 1)
    torch.testing.assert_close(weights @ v, out, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("make_map", [Plain, Scaled])
@given(seed=st.integers(0, 10**6), N=LENGTHS, mask=st.sampled_from(MASKS), size=st.sampled_from([1, 16, CHUNK]))
@settings(max_examples=15)
def test_the_chunks_of_plain_operations_are_those_of_blocks(make_map, share_kv_heads, seed, N, mask, size):
    drawn = Setting(make_map, seed, B=2, G=2, group=2, N=N, D=3, E=2, mask=mask, share_kv_heads=share_kv_heads)
    module, (q, k, v) = drawn.module, drawn.inputs
    positions = module._positions(k, drawn.key_mask, None)
    queries, keys = module._mapped(q, k, v, drawn.key_mask, positions)
    out = chunked(queries, keys, None, chunk_size=size).reshape(2, 4, N, 2)
    drawn.assert_equal(out, module(q, k, v, key_mask=drawn.key_mask))


@pytest.mark.parametrize("make_map", [Plain, Scaled])
@given(seed=st.integers(0, 10**6), N=st.integers(1, 200), mask=st.sampled_from(MASKS))
@settings(max_examples=15)
def test_both_bidirectional_forms_are_the_definition(make_map, seed, N, mask):
    drawn = Setting(make_map, seed, B=2, G=2, group=2, N=N, D=3, E=2, mask=mask, causal=False)
    expected = definition(drawn.module, *drawn.inputs, drawn.key_mask)
    for form in ("auto", "quadratic", "chunked"):
        drawn.assert_equal(drawn.module(*drawn.inputs, key_mask=drawn.key_mask, form=form), expected)


class Unstated(Plain):
    """It makes 5 features, and says nothing of it."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.feature_dim = shape.head_dim


@pytest.mark.parametrize("causal", [True, False])
def test_a_map_that_states_another_width_is_summed_all_the_same(causal):
    for make_map in (Unstated, Plain):  # nor does it leave anything behind for the next
        drawn = Setting(make_map, 0, B=2, G=1, group=2, N=300, D=3, E=2, causal=causal)
        drawn.assert_equal(drawn.module(*drawn.inputs), drawn.module(*drawn.inputs, form="quadratic"))


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_short_sequences_take_all_pairs_and_longer_ones_do_not(causal):
    chunks, _ = Setting(Scaled, 0, B=1, G=1, group=2, N=1, D=3, E=2).module._order(torch.zeros(1))
    most = chunks.by_pairs if causal else chunks.by_pairs_bidirectional
    for N in {max(2, most), most + 1}:
        drawn = Setting(Scaled, 0, B=2, G=1, group=2, N=N, D=3, E=2, causal=causal)
        with kernels() as ran:
            drawn.module(*drawn.inputs)
        assert ("quadratic" in ran) == (most >= N)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("N", [9, 32, 33, 96, 97, 300])
def test_an_output_is_the_same_with_and_without_gradients(N, causal):
    drawn = Setting(Scaled, 0, B=2, G=1, group=2, N=N, D=3, E=2, causal=causal)
    with torch.no_grad():
        out = drawn.module(*drawn.inputs)
    assert torch.equal(out, drawn.module(*drawn.inputs))


class Dropped(Plain):
    """Features that are dropped at random while training."""

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), 0.5, self.training)


@pytest.mark.parametrize("causal", [True, False])
def test_a_map_that_draws_random_numbers_gets_the_gradient_of_its_draw(causal):
    drawn = Setting(Dropped, 0, B=2, G=1, group=2, N=300, D=3, E=2, causal=causal)
    out = drawn.module(*drawn.inputs)
    # The output is linear in v: its product with the gradient is the output's with the cotangent, by the same features.
    torch.testing.assert_close((drawn.grads(out)[2] * drawn.inputs[2]).sum(), (out * drawn.cotangent).sum())
    assert not torch.equal(out, drawn.module(*drawn.inputs)), "nothing was drawn"


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_inputs_that_need_no_gradient_get_none(wanted):
    drawn = Setting(Relu, 0, B=2, G=1, group=2, N=300, D=3, E=2)
    leaves = [x.detach().requires_grad_(i in wanted) for i, x in enumerate(drawn.inputs)]
    (drawn.module(*leaves) * drawn.cotangent).sum().backward()
    expected = drawn.grads(drawn.module(*drawn.inputs, form="quadratic"))
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is not None) == (i in wanted)
        if leaf.grad is not None:
            torch.testing.assert_close(leaf.grad, expected[i], atol=1e-10, rtol=1e-10)


def test_what_inference_mode_left_behind_trains():
    drawn = Setting(Plain, 0, B=2, G=1, group=2, N=300, D=3, E=2)
    with torch.inference_mode():
        seen = drawn.module(*drawn.inputs)
    out = drawn.module(*drawn.inputs)
    assert torch.equal(seen, out)
    drawn.assert_equal(out, drawn.module(*drawn.inputs, form="quadratic"))


@given(seed=st.integers(0, 10**6), N=LENGTHS, mask=st.sampled_from(MASKS), tie_qk=st.booleans())
@settings(max_examples=20)
def test_a_log_scale_is_a_factor_of_the_feature(seed, N, mask, tie_qk):
    size = {"B": 2, "G": 1, "group": 2, "N": N, "D": 3, "E": 2, "mask": mask, "tie_qk": tie_qk}
    scaled, multiplied = Setting(Scaled, seed, **size), Setting(Multiplied, seed, **size)
    for form in ("quadratic", "chunked"):
        out = scaled.module(*scaled.inputs, key_mask=scaled.key_mask, form=form)
        expected = multiplied.module(*multiplied.inputs, key_mask=multiplied.key_mask, form="quadratic")
        torch.testing.assert_close(out, expected, atol=1e-9, rtol=1e-9)
        torch.testing.assert_close(scaled.grads(out), multiplied.grads(expected), atol=1e-8, rtol=1e-8)


# --- states: prompts in pieces, and decoding ---


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("make_map", [Scaled, Positioned])
@given(
    seed=st.integers(0, 10**6),
    pieces=st.lists(st.one_of(st.integers(1, 20), st.integers(100, 150)), min_size=1, max_size=4),
    mask=st.sampled_from(MASKS),
    form=st.sampled_from(["auto", "quadratic", "chunked", "recurrent"]),
)
@settings(max_examples=12)
def test_a_prompt_in_pieces_is_the_whole(make_map, share_kv_heads, seed, pieces, mask, form):
    drawn = Setting(
        make_map,
        seed,
        B=2,
        G=2,
        group=2,
        N=sum(pieces),
        D=3,
        E=2,
        mask=mask,
        share_kv_heads=share_kv_heads,
    )
    whole, last = drawn.module(*drawn.inputs, key_mask=drawn.key_mask, return_state=True)
    state, outputs = None, []
    for parts in zip(*(x.split(pieces, 2) for x in drawn.inputs), strict=True):
        start = sum(o.shape[2] for o in outputs)
        key_mask = None if drawn.key_mask is None else drawn.key_mask[:, start : start + parts[0].shape[2]]
        out, state = drawn.module(*parts, key_mask=key_mask, state=state, return_state=True, form=form)
        outputs.append(out)
    drawn.assert_equal(torch.cat(outputs, 2), whole)
    for name in ("values", "keys", "log_max", "num_attended"):
        torch.testing.assert_close(getattr(state, name), getattr(last, name), atol=1e-10, rtol=1e-10)
    attended = torch.full((2,), sum(pieces)) if drawn.key_mask is None else drawn.key_mask.sum(-1)
    assert torch.equal(state.num_attended, attended)


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("B", [1, 2])
@pytest.mark.parametrize("make_map", [Relu, Plain, Scaled, Positioned])
def test_a_token_after_a_state_is_any_token(make_map, B, share_kv_heads):
    """What decodes one token, outputs and gradients, against what takes tokens of any number, masked ones too."""
    drawn = Setting(make_map, 0, B=B, G=2, group=2, N=9, D=3, E=2, share_kv_heads=share_kv_heads)
    attended = torch.ones(B, 1, dtype=torch.bool)
    fast, slow, found, expected = None, None, [], []
    for i in range(9):
        token = [x[:, :, i : i + 1] for x in drawn.inputs]
        out, fast = drawn.module(*token, state=fast, return_state=True)
        found.append(out)
        out, slow = drawn.module(*token, key_mask=attended, state=slow, return_state=True)
        expected.append(out)
    drawn.assert_equal(torch.cat(found, 2), torch.cat(expected, 2))
    for name in ("values", "keys", "log_max", "num_attended"):
        torch.testing.assert_close(getattr(fast, name), getattr(slow, name))
    last = [x[:, :, 8:] for x in drawn.inputs]
    assert torch.equal(drawn.module(*last, state=slow), drawn.module(*last, state=slow, return_state=True)[0])


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("make_map", [Relu, Plain, Scaled])
def test_a_state_is_a_value(make_map, share_kv_heads, make_shape):
    """Who keeps a state may go on from it again, whatever became of it since: beam search, a prompt that is shared."""
    shape = make_shape(num_heads=4, num_kv_heads=2)
    module = LinearAttention(shape, make_map, share_kv_heads=share_kv_heads).eval()
    prompt, token, other = (
        [torch.randn(2, 4, n, 4), torch.randn(2, 2, n, 4), torch.randn(2, 2, n, 3)] for n in (5, 1, 1)
    )
    with torch.inference_mode():
        _, state = module(*prompt, return_state=True)
        before = [x.clone() for x in (state.values, state.keys, state.log_max, state.num_attended)]
        first, after = module(*token, state=state, return_state=True)
        module(*other, state=after, return_state=True)
        again, after_again = module(*token, state=state, return_state=True)
    for x, y in zip((state.values, state.keys, state.log_max, state.num_attended), before, strict=True):
        assert torch.equal(x, y)
    assert torch.equal(first, again)
    assert torch.equal(after.values, after_again.values) and torch.equal(after.keys, after_again.keys)


def test_a_token_without_keys_for_it_gets_zeros(make_shape):
    class Blind(FeatureMap):
        signed = True

        def forward(self, x: Tensor) -> Tensor:
            return x * 0

    module = LinearAttention(make_shape(), Blind)
    x = torch.randn(1, 2, 4, 4)
    _, state = module(x, x, x, return_state=True)
    assert (module(*(x[:, :, :1],) * 3, state=state) == 0).all()


@pytest.mark.parametrize("make_map", [Scaled, Positioned])
def test_fewer_queries_than_keys_continue_a_state(make_map):
    """A piece whose first keys have no queries: what a cache of tokens hands over."""
    drawn = Setting(make_map, 0, B=2, G=1, group=2, N=20, D=3, E=2)
    q, k, v = drawn.inputs
    whole = drawn.module(q, k, v)
    _, state = drawn.module(q[:, :, :8], k[:, :, :8], v[:, :, :8], return_state=True)
    for form in ("auto", "quadratic", "chunked", "recurrent"):
        out, _ = drawn.module(q[:, :, 15:], k[:, :, 8:], v[:, :, 8:], state=state, return_state=True, form=form)
        torch.testing.assert_close(out, whole[:, :, 15:], atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("share_kv_heads", [False, True], ids=["", "shared"])
@pytest.mark.parametrize("make_map", [Plain, Exponential])
def test_a_state_keeps_its_size_and_says_it(make_map, share_kv_heads, make_shape):
    module = LinearAttention(make_shape(num_heads=4, num_kv_heads=2), make_map, share_kv_heads=share_kv_heads).eval()
    state = None
    for n in range(1, 2 * CHUNK, 17):
        q, k = torch.randn(3, 4, 17, 4), torch.randn(3, 2, 17, 4)
        _, state = module(q, k, k, state=state, return_state=True)
        assert state.nbytes == module.state_bytes(n, batch_size=3) == module.state_bytes(1, batch_size=3)
    assert state.values.shape[1] == (2 if share_kv_heads else 4)


@pytest.mark.parametrize("make_map", [Plain, Exponential])
@pytest.mark.parametrize(
    "dtype,sums",
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_sums_are_float32_or_wider(make_map, dtype, sums, make_shape):
    module = LinearAttention(make_shape(), make_map)
    x = torch.randn(1, 2, 5, 4, dtype=dtype)
    for autocast in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            out, state = module(x, x, x, return_state=True)
            _, state = module(x[:, :, :1], x[:, :, :1], x[:, :, :1], state=state, return_state=True)
        assert out.dtype == dtype
        assert (state.values.dtype, state.keys.dtype, state.log_max.dtype) == (sums, sums, sums)


def test_a_running_sum_of_bfloat16_inputs_keeps_growing(make_shape):
    """In bfloat16, 256 + 1 is 256."""
    module = LinearAttention(make_shape(num_heads=1, head_dim=1), Relu)
    x = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    state: LinearState | None = None
    for _ in range(300):
        _, state = module(x, x, x, state=state, return_state=True)
    assert state.keys.item() == state.values.item() == 300


def test_a_bidirectional_attention_has_no_state(make_shape):
    module = LinearAttention(make_shape(causal=False), Plain)
    causal = LinearAttention(make_shape(), Plain)
    x = torch.randn(1, 2, 5, 4)
    _, state = causal(x, x, x, return_state=True)
    for keywords in ({"return_state": True}, {"state": state}):
        with pytest.raises(UsageError, match="bidirectional attention has no state"):
            module(x, x, x, **keywords)
    with pytest.raises(UsageError, match="no recurrent form"):
        module(x, x, x, form="recurrent")
    assert module.state_bytes(10) is None


def test_an_unknown_form_is_answered_with_the_nearest(make_shape):
    x = torch.randn(1, 2, 5, 4)
    for causal in (True, False):
        with pytest.raises(UsageError, match="no form named 'chunk'"):
            LinearAttention(make_shape(causal=causal), Plain)(x, x, x, form="chunk")


# --- scales that float32 can't hold ---


@pytest.mark.parametrize("length", [100, 2048])
def test_single_precision_is_near_the_definition(length, make_shape):
    torch.manual_seed(length)
    attention = build_attention("hedgehog", make_shape(num_heads=2, head_dim=64, max_len=length))
    inputs = [torch.randn(1, 2, length, 64, requires_grad=True) for _ in range(3)]
    exact = build_attention("hedgehog", attention.shape).double()
    exact.load_state_dict(attention.state_dict())
    doubles = [x.detach().double().requires_grad_() for x in inputs]
    out, truth = attention(*inputs), exact.quadratic(*doubles)
    direction = torch.randn_like(truth)
    grads = torch.autograd.grad(out, (*inputs, *attention.parameters()), direction.float())
    true = torch.autograd.grad(truth, (*doubles, *exact.parameters()), direction)
    assert distance(out, truth) <= 3e-7
    assert max(distance(found, right) for found, right in zip(grads, true, strict=True)) <= 1.5e-6


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize("size", [1, 50])
def test_big_exponential_keys_agree_with_float64(form, size, make_shape):
    """exp(50 x) overflows float32 at x = 1.8. Only the rounding of 50 x, about 1e-5, is lost."""
    module = LinearAttention(make_shape(head_dim=8), Exponential)
    q, k, v = torch.randn(3, 2, 2, 200, 8)
    out = module(q, size * k, v, form=form)
    assert out.isfinite().all()
    expected = module(q.double(), size * k.double(), v.double(), form="quadratic")
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize("step", [40.0, -40.0, 0.01], ids=["growing", "shrinking", "slowly"])
def test_the_running_maximum_follows_the_scales(form, step, make_shape):
    """Log scales that run over thousands: each query weighs its past by softmax of the scales."""
    N = 300
    module = LinearAttention(make_shape(num_heads=1), Growing)
    k = torch.zeros(1, 1, N, 4)
    k[..., 0] = step * torch.arange(N)
    v = torch.randn(1, 1, N, 3)
    out, state = module(k, k, v, return_state=True, form=form)
    hidden = torch.ones(N, N, dtype=torch.bool).triu(1)
    weights = k[0, 0, :, 0].double().expand(N, N).masked_fill(hidden, -math.inf).softmax(-1)
    torch.testing.assert_close(out[0, 0].double(), weights @ v[0, 0].double(), atol=1e-5, rtol=0)
    assert state.log_max.item() == k[..., 0].max()


@pytest.mark.parametrize("padding", [0.0, 1e4])
def test_a_padded_key_s_scale_is_never_looked_at(padding, make_shape):
    """Whatever it is, it would push the attended keys, all of scale exp(-1000), below float32."""
    module = LinearAttention(make_shape(num_heads=1), Growing)
    k, v = torch.full((1, 1, 6, 4), -1000.0), torch.randn(1, 1, 6, 3)
    k[:, :, ::2] = padding
    key_mask = torch.arange(6)[None] % 2 == 1
    for form in ("quadratic", "chunked", "recurrent"):
        out, state = module(k, k, v, key_mask=key_mask, return_state=True, form=form)
        torch.testing.assert_close(out[0, 0, 5], v[0, 0, 1::2].mean(0))
        assert state.log_max.item() == -1000


# --- memory ---


def saved_bytes(module: LinearAttention, N: int, form: str) -> int:
    """What the backward pass keeps: the bytes of all distinct storages that autograd saved."""
    storages = {}

    def pack(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
        return x

    q, k, v = (torch.randn(1, 1, N, 8, requires_grad=True) for _ in range(3))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        out = module(q, k, v, form=form)
    assert out.requires_grad  # the graph lives here, so that no storage was freed and counted twice
    return sum(storages.values())


FORMS = ("auto", "chunked", "quadratic")


@pytest.mark.parametrize("make_map", [Plain, Scaled, Exponential])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_memory_is_linear_but_for_the_quadratic_form(make_map, causal, make_shape):
    module = LinearAttention(make_shape(num_heads=1, head_dim=8, causal=causal), make_map)
    growth = {form: saved_bytes(module, 2048, form) / saved_bytes(module, 1024, form) for form in FORMS}
    assert growth["auto"] <= 2.2
    assert growth["chunked"] <= 2.2
    assert growth["quadratic"] >= 3.5


# --- the floor ---


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
def test_dead_features_attend_evenly(form, make_shape):
    module = LinearAttention(make_shape(), Relu).eval()
    dead, v = -torch.rand(2, 2, 150, 4), torch.randn(2, 2, 150, 3)
    out = module(dead, dead, v, form=form)
    mean = v.cumsum(2) / torch.arange(1, 151)[:, None]
    torch.testing.assert_close(out, mean, atol=1e-5, rtol=0)
    assert module.floored_rows == 2 * dead.shape[:3].numel()


def test_one_dead_query_attends_evenly_over_equal_keys(make_shape):
    module = LinearAttention(make_shape(causal=False), Relu)
    q, v = torch.rand(1, 2, 5, 4), torch.randn(1, 2, 5, 3)
    q[:, :, 2] = -1
    weights = module.weights(q, torch.ones(1, 2, 5, 4))
    torch.testing.assert_close(weights, torch.full_like(weights, 0.2))
    assert module(q, q, v).isfinite().all()


def test_floored_rows_are_the_planted_ones(make_shape):
    module = LinearAttention(make_shape(num_heads=4, num_kv_heads=2), Relu)
    q, k = 0.1 + torch.rand(2, 4, 9, 4), 0.1 + torch.rand(2, 2, 9, 4)
    q[0, 1, 3] = q[1, 2, 8] = q[0, 0, 0] = -1  # three queries, the last one padded
    k[0, 0, 5] = k[1, 1, 1] = k[0, 1, 0] = -1  # three keys, the last one padded, each seen by two query heads
    q[0, 3, 4, 1:] = k[0, 1, 4, 1:] = -1  # one feature left: not floored
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[0, 0] = False
    module(q, k, k, key_mask=key_mask)
    assert module.floored_rows == 0, "counted in evaluation mode only"
    module.eval()(q, k, k, key_mask=key_mask)
    assert module.floored_rows == 2 + 2 * 2
    module(q, k, k)
    assert module.floored_rows == (2 + 2 * 2) + (3 + 3 * 2)
    module.floored_rows.zero_()
    _, state = module(q[:, :, :3], k[:, :, :3], k[:, :, :3], return_state=True)
    assert module.floored_rows == 1 + (1 + 1) * 2
    module(q[:, :, 3:4], k[:, :, 3:4], k[:, :, 3:4], state=state)  # a token that is decoded isn't counted
    assert module.floored_rows == 1 + (1 + 1) * 2
    module.floored_rows.zero_()
    module(q[:, :, 8:], k, k, key_mask=key_mask)
    assert module.floored_rows == 1 + 2 * 2
    assert "floored_rows" not in module.state_dict()


def test_floored_rows_of_a_shared_key_map_count_once(make_shape):
    module = LinearAttention(make_shape(num_heads=4, num_kv_heads=2), Relu, share_kv_heads=True).eval()
    q, k = 0.1 + torch.rand(1, 4, 5, 4), 0.1 + torch.rand(1, 2, 5, 4)
    k[0, 1, 2] = -1
    module(q, k, k)
    assert module.floored_rows == 1


# --- the pair of maps ---


def test_tied_maps_are_one_and_a_shared_one_has_a_map_per_group(make_shape):
    grouped = make_shape(num_heads=4, num_kv_heads=2)
    tied = LinearAttention(grouped, Plain, tie_qk=True)
    assert tied.query_map is tied.key_map
    shared = LinearAttention(grouped, Plain, share_kv_heads=True)
    assert (shared.query_map.weight.shape[0], shared.key_map.weight.shape[0]) == (4, 2)
    with pytest.raises(UsageError, match="tie_qk needs a key map per query head"):
        LinearAttention(grouped, Plain, tie_qk=True, share_kv_heads=True)
    # With as many key heads as query heads there is nothing to share, and the two options don't meet.
    LinearAttention(make_shape(), Plain, tie_qk=True, share_kv_heads=True)


@pytest.mark.parametrize("name", ["hedgehog", "exp"])
def test_torch_compile_takes_a_form_that_it_can_follow(make_shape, name):
    attention = build_attention(name, make_shape(num_heads=2, head_dim=8, max_len=512))
    q, k, v = (torch.randn(1, 2, 200, 8, requires_grad=True) for _ in range(3))
    compiled = torch.compile(attention, backend="eager")
    torch.testing.assert_close(compiled(q, k, v), attention(q, k, v))
    found, expected = (torch.autograd.grad(f(q, k, v).square().sum(), (q, k, v)) for f in (compiled, attention))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "rounded"), [("hedgehog", True), ("exp", True), ("elu", True), ("taylor", False)])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_tensor_cores_get_bfloat16_of_maps_that_do_not_cancel(name, rounded, causal, dtype, at_once, make_shape):
    torch.manual_seed(0)
    attention = build_attention(name, make_shape(dim=32, num_heads=2, head_dim=16, causal=causal, max_len=700))
    inputs = [torch.randn(2, 2, 700, 16).to(dtype).requires_grad_() for _ in range(3)]
    cotangent = torch.randn(2, 2, 700, 16).to(dtype)
    with kernels() as ran:
        out = attention(*inputs)
    found = [out, *torch.autograd.grad(out, inputs, cotangent)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth = attention.double()(*exact, form="quadratic")
    expected = [truth, *torch.autograd.grad(truth, exact, cotangent.double())]
    rounded = rounded and dtype == torch.bfloat16
    kernel = ("chunks at once, bfloat16" if rounded else "chunks at once") if at_once else "blocks"
    assert list(ran) == [kernel if causal else f"{kernel}, bidirectional"]
    for x, y in zip(found, expected, strict=True):
        assert distance(x, y) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 0.015}[dtype]


def test_what_sums_of_16_bits_lose_is_given_back(at_once, make_shape):
    """Late in a sequence they give nearly all of an output, which is to be as exact as its own 16 bits allow."""
    torch.manual_seed(0)
    attention = build_attention("hedgehog", make_shape(dim=64, num_heads=1, head_dim=64, causal=True, max_len=4096))
    inputs = [torch.randn(1, 1, 4096, 64).bfloat16() for _ in range(3)]
    with torch.inference_mode():
        out = attention(*inputs)[..., -512:, :]
        truth = attention.double()(*(x.double() for x in inputs), form="quadratic")[..., -512:, :]
    nearest = distance(truth.bfloat16(), truth)
    assert distance(out, truth) < (1.35 * nearest if at_once else 1.01 * nearest)


@pytest.mark.parametrize("name", ["elu", "hedgehog", "exp"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_late_gradients_of_bfloat16_are_no_rounding_noise(name, causal, make_shape):
    """What a late query receives is a small difference of large numbers, the larger the further values are from 0."""
    torch.manual_seed(0)
    attention = build_attention(name, make_shape(dim=16, num_heads=1, head_dim=16, causal=causal, max_len=2048))
    q, k, v, cotangent = torch.randn(4, 1, 1, 2048, 16).bfloat16()
    inputs = [x.requires_grad_() for x in (q, k, v + 3)]
    found = torch.autograd.grad(attention(*inputs), inputs, cotangent)
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = torch.autograd.grad(attention.double()(*exact, form="quadratic"), exact, cotangent.double())
    for x, y in zip(found, expected, strict=True):
        late, true = x[..., -256:, :].double(), y[..., -256:, :]
        assert (late - true).norm() < 0.01 * true.norm()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
def test_a_backward_pass_under_autocast_is_that_without(causal, make_shape):
    attention = build_attention("hedgehog", make_shape(causal=causal, max_len=300))
    inputs = [torch.randn(2, 2, 300, 4, requires_grad=True) for _ in range(3)]
    leaves = [*inputs, *attention.parameters()]
    expected = torch.autograd.grad(attention(*inputs).square().sum(), leaves)
    out = attention(*inputs)
    with torch.autocast("cpu", torch.bfloat16):
        found = torch.autograd.grad(out.square().sum(), leaves)
    assert all(map(torch.equal, found, expected))


def test_finding_out_that_a_map_draws_draws_nothing():
    """As a run that goes on from a checkpoint finds it out again."""
    drawn = Setting(Dropped, 0, B=2, G=1, group=2, N=300, D=3, E=2)
    after = []
    for _ in range(2):
        torch.manual_seed(0)
        with kernels() as ran:
            out = drawn.module(*drawn.inputs)
        assert list(ran) == ["chunks"]
        after.append((out, torch.get_rng_state()))
    assert all(map(torch.equal, *after))


@pytest.mark.parametrize("make_map", [Plain, Dropped])
def test_a_checkpointed_pass_takes_the_same_way_again(make_map):
    drawn = Setting(make_map, 0, B=2, G=1, group=2, N=300, D=3, E=2)
    out = torch.utils.checkpoint.checkpoint(drawn.module, *drawn.inputs, use_reentrant=False)
    found = drawn.grads(out)
    torch.testing.assert_close((found[2] * drawn.inputs[2]).sum(), (out * drawn.cotangent).sum())


@given(
    lead=st.lists(st.integers(1, 3), min_size=1, max_size=2),
    n=st.integers(1, 20),
    inner=st.integers(1, 20),
    m=st.integers(1, 20),
)
@settings(max_examples=30)
def test_operands_of_16_bits_reach_the_tensor_cores_in_whole_16_bytes(lead, n, inner, m):
    """CUDA's product, imitated: what it is given, and that what comes back is the product."""

    def product(a: Tensor, b: Tensor) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16 and a.ndim == b.ndim == 3
        assert a.shape[2] % 8 == b.shape[2] % 8 == 0
        return a.float() @ b.float()

    a, b = torch.randn(*lead, n, inner).bfloat16(), torch.randn(*lead, m, inner).bfloat16().mT
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunkwise, "_gives_float32", lambda _: True)
        patch.setattr(chunkwise, "_bmm", product)
        found = chunkwise._float32_product(a, b)
    torch.testing.assert_close(found, a.float() @ b.float())
