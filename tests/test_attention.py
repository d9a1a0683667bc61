"""The contract: one test body over every registered attention, in every direction, with every option.

Nothing here names an attention. What one is asked follows from what it declares: its rung, `has_weights`, its
directions and its options. An attention without weights may gate values by queries, so its values are as wide
as its heads; a mixer takes hidden states in place of q, k and v.
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from hhbench.attention import (
    ATTENTIONS,
    Attention,
    AttentionSpec,
    MixerShape,
    SequenceMixer,
    build_attention,
    check_inputs,
    repeat_heads,
    token_positions,
    visible_keys,
)
from hhbench.errors import HHBenchError, UsageError

B, N, D, E = 3, 7, 4, 3

# Values to try for the options whose type does not say which there are. Give your option one here.
EXAMPLES: dict[str, list[Any]] = {
    "feature_dim": [3],
    "num_features": [3],
    "project_to": [3],
    "redraw_interval": [0],
    "temperature": [2.0],
    "window": [5],
    "d_state": [6],
    "emb_dim": [5],
    "filter_width": [8],
    "frequency": [2.0],
    "shift": [0.1],
}


class Case(NamedTuple):
    name: str
    causal: bool
    options: dict[str, Any]
    num_heads: int = 4
    num_kv_heads: int = 2

    @property
    def id(self) -> str:
        direction = "causal" if self.causal else "bidirectional"
        options = "".join(f"-{name}={value}" for name, value in self.options.items())
        return f"{self.name}{options}-{direction}-{self.num_heads}x{self.num_kv_heads}"

    @property
    def spec(self) -> AttentionSpec:
        return ATTENTIONS.get(self.name)

    @property
    def shape(self) -> MixerShape:
        return MixerShape(
            dim=16,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=D,
            scale=0.7,
            max_len=256,
            causal=self.causal,
        )

    def build(self, dtype: torch.dtype = torch.float64) -> Attention | SequenceMixer:
        """The module in evaluation mode, moved off its initial weights: an identity hides too much."""
        module = self.spec.build(self.shape, **self.options).to(dtype).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module

    def inputs(self, batch: int = B, length: int = N, dtype: torch.dtype = torch.float64) -> list[Tensor]:
        """q, k and v, or hidden states for a mixer."""
        if self.is_mixer:
            return [torch.randn(batch, length, self.shape.dim, dtype=dtype)]
        heads, width = self.num_kv_heads, E if self.has_weights else D
        return [
            torch.randn(batch, self.num_heads, length, D, dtype=dtype),
            torch.randn(batch, heads, length, D, dtype=dtype),
            torch.randn(batch, heads, length, width, dtype=dtype),
        ]

    @property
    def is_mixer(self) -> bool:
        return self.spec.rung == "SequenceMixer"

    @property
    def has_weights(self) -> bool:
        return not self.is_mixer and getattr(self.spec.part, "has_weights", True)


def variants(spec: AttentionSpec) -> Iterator[dict[str, Any]]:
    """The defaults, then each option alone at each of its other values."""
    yield {}
    hints = typing.get_type_hints(spec.part.__init__)
    for option, default in spec.options.items():
        if isinstance(default, bool):
            values: list[Any] = [not default]
        elif typing.get_origin(hints.get(option)) is typing.Literal:
            values = [value for value in typing.get_args(hints[option]) if value != default]
        else:
            values = EXAMPLES.get(option, [])
        yield from ({option: value} for value in values)


def cases() -> Iterator[Case]:
    for name in ATTENTIONS.names():
        spec = ATTENTIONS.get(name)
        for direction in sorted(spec.directions):
            causal = direction == "causal"
            for options in variants(spec):
                yield Case(name, causal, options)
            yield Case(name, causal, {}, num_heads=2)


CASES = list(cases())


def each(cases: list[Case]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("case", cases, ids=lambda case: case.id)


every_case = each(CASES)
every_causal_case = each([case for case in CASES if case.causal])
every_bidirectional_case = each([case for case in CASES if not case.causal])
every_case_without_weights = each([case for case in CASES if not (case.has_weights or case.is_mixer)])


def no_mixer(case: Case) -> None:
    if case.is_mixer:
        pytest.skip("a mixer takes hidden states, not queries and keys")


def needs_weights(case: Case) -> None:
    if not case.has_weights:
        pytest.skip("it declares that it has no weights")


def tokens(x: Tensor) -> int:
    """The dimension that counts tokens: 1 of hidden states, 2 of heads."""
    return x.ndim - 2


def take(x: Tensor, start: int, stop: int) -> Tensor:
    return x.narrow(tokens(x), start, stop - start)


def masked(x: Tensor, key_mask: Tensor) -> Tensor:
    """The tokens that a mask picks, of a batch of one."""
    return x.index_select(tokens(x), key_mask[0].nonzero().squeeze(1))


def grads(output: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((output * cotangent).sum(), inputs, allow_unused=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_every_option_has_a_value_to_try(name):
    spec = ATTENTIONS.get(name)
    tried = {option for options in variants(spec) for option in options}
    assert tried == spec.options.keys(), "give the option an example in EXAMPLES"


@every_case
def test_output_has_the_shape_and_dtype_of_its_inputs(case):
    inputs = case.inputs()
    out = case.build()(*inputs)
    expected = inputs[0].shape if case.is_mixer else (*inputs[0].shape[:3], inputs[2].shape[3])
    assert out.shape == expected
    assert out.dtype == torch.float64


@every_case
@pytest.mark.parametrize("with_mask", [False, True], ids=["all", "masked"])
def test_weights_are_a_mean_of_values_and_forward_takes_it(case, with_mask):
    no_mixer(case)
    needs_weights(case)
    module, (q, k, v) = case.build(), case.inputs()
    key_mask = torch.rand(B, N) < 0.6 if with_mask else torch.ones(B, N, dtype=torch.bool)
    key_mask[0] = True
    mask = key_mask if with_mask else None
    weights = module.weights(q, k, key_mask=mask)
    assert weights.shape == (B, case.num_heads, N, N)
    visible = key_mask[:, None, None, :].expand(weights.shape)
    visible = visible.tril() if case.causal else visible
    assert (weights >= 0).all()
    assert (weights[~visible] == 0).all()
    torch.testing.assert_close(weights.sum(-1), visible.any(-1).double(), atol=1e-12, rtol=0)
    out = weights @ repeat_heads(v, case.num_heads)
    torch.testing.assert_close(module(q, k, v, key_mask=mask), out, atol=1e-10, rtol=0)


@every_case_without_weights
def test_an_attention_without_weights_says_so(case):
    q, k, _ = case.inputs()
    with pytest.raises(HHBenchError, match="no attention weights"):
        case.build().weights(q, k)


@every_causal_case
def test_a_causal_output_has_no_gradient_from_the_future(case):
    module, inputs = case.build(), [x.requires_grad_() for x in case.inputs(batch=2)]
    out = module(*inputs)
    for i in range(N):
        here = take(out, i, i + 1)
        for g in torch.autograd.grad((here * torch.randn_like(here)).sum(), inputs, retain_graph=True):
            limit = 1e-12 * g.abs().max() if case.is_mixer else 0  # an FFT rounds every token with every other
            assert (take(g, i + 1, N).abs() <= limit).all()
            assert i == 0 or (g != 0).any()  # one key has weight 1 whatever q and k are


@every_causal_case
@pytest.mark.parametrize("length", [N, 140], ids=["short", "longer than a chunk"])
def test_a_causal_output_does_not_change_with_a_later_token(case, length):
    module, inputs = case.build(), case.inputs(batch=1, length=length)
    changed = [x.clone() for x in inputs]
    for x in changed:
        take(x, length - 1, length).mul_(50)
    with torch.no_grad():
        before, after = module(*inputs), module(*changed)
    torch.testing.assert_close(take(after, 0, length - 1), take(before, 0, length - 1), atol=1e-12, rtol=0)
    assert not torch.equal(after, before)


@every_bidirectional_case
def test_a_bidirectional_output_sees_the_future(case):
    module, inputs = case.build(), [x.requires_grad_() for x in case.inputs(length=4)]
    first = take(module(*inputs), 0, 1)
    g = grads(first, inputs, torch.randn_like(first))[-1]
    assert (take(g, 3, 4) != 0).any()


@every_case
@pytest.mark.parametrize("garbage", ["random", "1e30", "inf", "nan"])
@pytest.mark.parametrize("left,right", [(3, 0), (0, 2), (2, 3)], ids=["left", "right", "both sides"])
def test_padding_changes_nothing(case, left, right, garbage):
    module, parts = case.build(), [x.requires_grad_() for x in case.inputs(batch=1)]
    parameters = [p for p in module.parameters() if p.requires_grad]
    key_mask = torch.zeros(1, left + N + right, dtype=torch.bool)
    key_mask[:, left : left + N] = True

    def pad(x: Tensor, size: int) -> Tensor:
        shape = [*x.shape]
        shape[tokens(x)] = size
        noise = torch.randn(shape, dtype=x.dtype)
        return noise if garbage == "random" else noise.sign() * float(garbage)

    alone = module(*parts)
    padded = module(*(torch.cat([pad(x, left), x, pad(x, right)], tokens(x)) for x in parts), key_mask=key_mask)
    assert padded.isfinite().all()
    torch.testing.assert_close(take(padded, left, left + N), alone, atol=1e-10, rtol=0)
    cotangent = torch.randn_like(alone)
    expected = grads(alone, parts + parameters, cotangent)
    found = grads(take(padded, left, left + N), parts + parameters, cotangent)
    torch.testing.assert_close(found, expected, atol=1e-10, rtol=1e-10)


@every_case
def test_rows_of_a_batch_don_t_meet(case):
    """A row alone gives what it gives in a batch of rows of other lengths."""
    module, inputs = case.build(), case.inputs()
    key_mask = torch.arange(N) < torch.tensor([[N], [3], [1]])
    for mask in (None, key_mask):
        batch = module(*inputs, key_mask=mask)
        for b in range(B):
            one = module(*(x[b : b + 1] for x in inputs), key_mask=None if mask is None else mask[b : b + 1])
            torch.testing.assert_close(one, batch[b : b + 1], atol=1e-12, rtol=0)


@every_case
def test_a_query_with_no_key_gets_zero_and_finite_gradients(case):
    module, inputs = case.build(), [x.requires_grad_() for x in case.inputs()]
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[1] = False
    key_mask[2, :4] = False
    out = module(*inputs, key_mask=key_mask)
    everything = inputs + [p for p in module.parameters() if p.requires_grad]
    assert out.isfinite().all()
    assert all(g.isfinite().all() for g in grads(out, everything, torch.randn_like(out)))
    if case.is_mixer:
        return
    blind = torch.zeros(B, N, dtype=torch.bool)
    blind[1] = True
    blind[2, :4] = case.causal
    assert (out.transpose(1, 2)[blind] == 0).all()
    assert (out.transpose(1, 2)[~blind] != 0).any()
    if case.has_weights:
        weights = module.weights(*inputs[:2], key_mask=key_mask)
        assert (weights.transpose(1, 2)[blind] == 0).all()


@every_case
def test_every_parameter_gets_a_gradient(case):
    module, inputs = case.build(), case.inputs(length=140)  # longer than a window, beyond which some parameters act
    out = module(*inputs)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        pytest.skip("it has no parameters")
    found = torch.autograd.grad((out * torch.randn_like(out)).sum(), list(parameters.values()))
    for name, g in zip(parameters, found, strict=True):
        assert g.isfinite().all(), name
        assert (g != 0).any(), name


@every_case
def test_bfloat16_autocast_is_finite_and_near_float32(case):
    """Within 3 % of the largest output: bfloat16 keeps 8 bits."""
    module, inputs = case.build(torch.float32), case.inputs(length=64, dtype=torch.float32)
    with torch.no_grad():
        exact = module(*inputs)
        with torch.autocast("cpu", torch.bfloat16):
            cast = module(*inputs).float()
            half = module(*(x.bfloat16() for x in inputs)).float()
    for out in (cast, half):
        assert out.isfinite().all()
        assert (out - exact).abs().max() <= 0.03 * exact.abs().max()


@every_case
@pytest.mark.parametrize("num_queries", [1, 3])
def test_the_last_queries_alone_give_the_tail(case, num_queries):
    """Tokens being decoded: fewer queries than keys, with and without padding."""
    no_mixer(case)
    module, (q, k, v) = case.build(), case.inputs()
    tail = q[:, :, N - num_queries :]
    for mask in (None, torch.arange(N) >= torch.tensor([[0], [2], [N - 1]])):
        expected = module(q, k, v, key_mask=mask)[:, :, N - num_queries :]
        torch.testing.assert_close(module(tail, k, v, key_mask=mask), expected, atol=1e-10, rtol=0)
        if case.has_weights:
            expected = module.weights(q, k, key_mask=mask)[:, :, N - num_queries :]
            torch.testing.assert_close(module.weights(tail, k, key_mask=mask), expected, atol=1e-10, rtol=0)


@every_case
def test_counted_positions_are_the_default(case):
    no_mixer(case)
    module, inputs = case.build(), case.inputs()
    key_mask = torch.arange(N) >= torch.tensor([[0], [2], [5]])
    positions = (key_mask.long().cumsum(-1) - 1).clamp_min(0)
    given = module(*inputs, key_mask=key_mask, positions=positions)
    torch.testing.assert_close(module(*inputs, key_mask=key_mask), given, atol=0, rtol=0)


BAD_INPUTS: dict[str, Callable[[list[Tensor]], list[Tensor]]] = {
    "heads of q": lambda x: [x[0][:, 1:], x[1], x[2]],
    "heads of k": lambda x: [x[0], x[1].repeat(1, 3, 1, 1), x[2]],
    "heads of v": lambda x: [x[0], x[1], x[2].repeat(1, 3, 1, 1)],
    "width of q": lambda x: [x[0][..., 1:], x[1], x[2]],
    "width of k": lambda x: [x[0], x[1][..., 1:], x[2]],
    "batch of k": lambda x: [x[0], x[1][1:], x[2][1:]],
    "tokens of v": lambda x: [x[0], x[1], x[2][:, :, 1:]],
    "more queries than keys": lambda x: [x[0], x[1][:, :, 1:], x[2][:, :, 1:]],
    "dimensions of q": lambda x: [x[0][0], x[1], x[2]],
    "dimensions of k": lambda x: [x[0], x[1][:, 0], x[2]],
    "dimensions of v": lambda x: [x[0], x[1], x[2][:, 0]],
}


@every_case
@pytest.mark.parametrize("mistake", BAD_INPUTS)
def test_inputs_that_don_t_fit_are_refused(case, mistake):
    no_mixer(case)
    with pytest.raises(UsageError, match=r"must be|queries for"):
        case.build()(*BAD_INPUTS[mistake](case.inputs()))


@every_case
@pytest.mark.parametrize(
    "mask",
    [torch.ones(B, N), torch.ones(B, N, dtype=torch.long)]
    + [torch.ones(*shape, dtype=torch.bool) for shape in ((B, N - 1), (1, N), (B, 1, 1, N), (N,))],
    ids=["float", "int", "short", "batch of one", "4-D", "1-D"],
)
def test_a_key_mask_that_doesn_t_fit_is_refused(case, mask):
    module, inputs = case.build(), case.inputs()
    with pytest.raises(UsageError, match="key_mask must be bool"):
        module(*inputs, key_mask=mask)
    if case.has_weights:
        with pytest.raises(UsageError, match="key_mask must be bool"):
            module.weights(*inputs[:2], key_mask=mask)


@every_case
def test_a_state_dict_carries_everything(case):
    one, other, inputs = case.build(), case.build(), case.inputs()
    other.load_state_dict(one.state_dict(), strict=True)
    assert torch.equal(other(*inputs), one(*inputs))


@every_case
def test_evaluation_is_repeatable(case):
    module, inputs = case.build(), case.inputs()
    assert torch.equal(module(*inputs), module(*inputs))


@every_case
def test_it_keeps_its_shape_and_says_what_decoding_keeps(case):
    module = case.build()
    assert module.shape == case.shape
    if case.is_mixer:
        return
    held = module.state_bytes(10)
    assert held is None or (case.causal and held > 0)
    if held is not None:
        assert module.state_bytes(10, batch_size=3) == 3 * held
        assert module.state_bytes(20) in (held, 2 * held)


# --- specs ---


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_a_spec_describes_itself(name):
    spec = ATTENTIONS.get(name)
    assert spec.name == name
    assert spec.paper and spec.cost and spec.part.__doc__
    assert spec.directions and spec.directions <= {"causal", "bidirectional"}
    assert spec.convertible == (spec.rung != "SequenceMixer")
    assert spec.label({}) == spec.label(spec.options) == name
    for options in variants(spec):
        for option, value in options.items():
            assert spec.label(options) == f"{name}[{option}={value}]"


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_an_unknown_option_is_answered_with_the_nearest(name, make_shape):
    spec = ATTENTIONS.get(name)
    shape = make_shape(causal="causal" in spec.directions)
    for option in spec.options:
        with pytest.raises(UsageError, match=f"no option of {name} named '{option}x'. Did you mean '{option}'"):
            spec.build(shape, **{f"{option}x": 1})
    with pytest.raises(UsageError, match=f"no option of {name} named 'nonsense'"):
        spec.build(shape, nonsense=1)


@pytest.mark.parametrize("name", ATTENTIONS.names())
def test_a_direction_that_isn_t_served_is_refused(name, make_shape):
    spec = ATTENTIONS.get(name)
    for served, other in (("causal", "bidirectional"), ("bidirectional", "causal")):
        narrow = dataclasses.replace(spec, directions=frozenset({served}))
        with pytest.raises(UsageError, match=f"{name} has no {other} form; it is {served}"):
            narrow.build(make_shape(causal=other == "causal"))


def test_build_attention_is_the_spec_s_build(make_shape):
    name = ATTENTIONS.names()[0]
    shape = make_shape()
    built, expected = build_attention(name, shape), ATTENTIONS.get(name).build(shape)
    assert type(built) is type(expected)
    with pytest.raises(UsageError, match="no attention named"):
        build_attention("no-such-attention", shape)


# --- shapes, masks and positions ---


@pytest.mark.parametrize("field", ["dim", "num_heads", "num_kv_heads", "head_dim", "max_len"])
def test_a_shape_has_no_zero_width(field, make_shape):
    with pytest.raises(UsageError, match=f"{field} must be at least 1"):
        dataclasses.replace(make_shape(), **{field: 0})


def test_query_heads_share_key_heads_evenly(make_shape):
    with pytest.raises(UsageError, match="4 query heads can't share 3"):
        make_shape(num_heads=4, num_kv_heads=3)
    heads = torch.arange(2.0).view(1, 2, 1, 1)
    assert repeat_heads(heads, 4).flatten().tolist() == [0, 0, 1, 1]


def test_positions_count_attended_tokens():
    cpu = torch.device("cpu")
    assert token_positions(None, batch_size=2, length=3, device=cpu).tolist() == [[0, 1, 2], [0, 1, 2]]
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 0, 1]], dtype=torch.bool)
    found = token_positions(mask, batch_size=3, length=4, device=cpu)
    assert found[mask].tolist() == [0, 1, 0, 1, 0, 1]


def test_visible_keys_are_past_and_attended():
    cpu = torch.device("cpu")
    mask = torch.tensor([[False, True, True]])

    def see(mask: Tensor | None, causal: bool, num_queries: int) -> list | None:
        found = visible_keys(mask, causal=causal, num_queries=num_queries, num_keys=3, device=cpu)
        return None if found is None else found.expand(1, 1, num_queries, 3)[0, 0].int().tolist()

    assert see(None, False, 3) is None
    assert see(None, True, 1) is None  # the last token sees all
    assert see(None, True, 2) == [[1, 1, 0], [1, 1, 1]]
    assert see(mask, False, 2) == [[0, 1, 1], [0, 1, 1]]
    assert see(mask, True, 3) == [[0, 0, 0], [0, 1, 0], [0, 1, 1]]


def test_check_inputs_takes_values_of_any_width(make_shape):
    q = torch.zeros(1, 2, 3, 4)
    check_inputs(make_shape(), q, q, torch.zeros(1, 2, 3, 9), None)
    check_inputs(make_shape(), q[:, :, 2:], q, None, torch.ones(1, 3, dtype=torch.bool))


def test_the_base_classes_promise_nothing_they_can_t_hold(make_shape):
    class Passing(Attention):
        def forward(self, q, k, v, *, key_mask=None, positions=None):
            return v

    module = Passing(make_shape())
    assert isinstance(module, nn.Module)
    assert module.state_bytes(10) is None
    with pytest.raises(HHBenchError, match="Passing has no attention weights"):
        module.weights(torch.zeros(1), torch.zeros(1))
