"""AFT: the definition by loops, its three variants in each other's terms, and keys of any size."""

import math

import pytest
import torch

from hhbench.attention import build_attention
from hhbench.errors import UsageError

VARIANTS = [{"variant": "simple"}, {"variant": "conv"}, {"variant": "conv", "window": 3}, {"variant": "full"}]
every_variant = pytest.mark.parametrize("options", VARIANTS, ids=["simple", "conv", "conv of 3", "full"])
every_direction = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def build(shape, **options):
    """In float64, with biases that matter."""
    module = build_attention("aft", shape, **options).double()
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.5 * torch.randn_like(parameter))
    return module


def inputs(length, heads=2, kv_heads=2, batch=2, dtype=torch.float64):
    return [torch.randn(batch, h, length, 4, dtype=dtype) for h in (heads, kv_heads, kv_heads)]


def by_loops(q, k, v, w, causal, key_mask=None):
    """Equation 2, one number at a time; w(h, i, j)."""
    B, H, N, D = q.shape
    out = torch.zeros_like(q)
    for b in range(B):
        for h in range(H):
            for i in range(N):
                seen = [j for j in range(i + 1 if causal else N) if key_mask is None or key_mask[b, j]]
                for d in range(D):
                    e = [math.exp(k[b, h, j, d] + w(h, i, j)) for j in seen]
                    total = sum(x * v[b, h, j, d] for x, j in zip(e, seen, strict=True))
                    out[b, h, i, d] = total / sum(e) / (1 + math.exp(-q[b, h, i, d])) if seen else 0.0
    return out


def kernel(module):
    """The paper's: standardised, times a gain, plus a bias."""
    w = module.kernel
    w = (w - w.mean(1, keepdim=True)) / (w.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    return (module.gain * w + module.bias).tolist()


# --- the definition ---


@every_direction
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_conv_by_loops(causal, masked, make_shape):
    """A kernel over the 3 latest lags, or over the 5 around."""
    module = build(make_shape(causal=causal), window=3)
    q, k, v = inputs(9)
    key_mask = torch.rand(2, 9) < 0.6 if masked else None
    table, first = kernel(module), 0 if causal else -2

    def w(h, i, j):
        return table[h][i - j - first] if abs(i - j) < 3 else 0.0

    expected = by_loops(q, k, v, w, causal, key_mask)
    found = module(q, k, v, key_mask=key_mask)
    if masked:
        attended = key_mask[:, None, :, None].expand_as(found)
        found, expected = found[attended], expected[attended]
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


@every_direction
def test_full_by_loops(causal, make_shape):
    module = build(make_shape(causal=causal), variant="full")
    q, k, v = inputs(9)
    w = (module.of_queries @ module.of_keys.T).tolist()
    expected = by_loops(q, k, v, lambda h, i, j: w[i][j], causal)
    torch.testing.assert_close(module(q, k, v), expected, atol=1e-12, rtol=0)


@every_direction
def test_simple_is_a_softmax_over_keys_for_each_channel(causal, make_shape):
    q, k, v = inputs(9)
    found = build(make_shape(causal=causal), variant="simple")(q, k, v)
    for i in range(9):
        seen = slice(0, i + 1 if causal else 9)
        mean = (k[:, :, seen].softmax(2) * v[:, :, seen]).sum(2)
        torch.testing.assert_close(found[:, :, i], q[:, :, i].sigmoid() * mean, atol=1e-12, rtol=0)


def test_an_output_by_hand(make_shape):
    """Keys 0 and log 3 weigh 1/4 and 3/4 of values 4 and 8; a query of 0 halves their mean of 7."""
    shape = make_shape(num_heads=1, head_dim=1)
    q, k = torch.zeros(1, 1, 2, 1), torch.tensor([0.0, math.log(3)]).view(1, 1, 2, 1)
    v = torch.tensor([4.0, 8.0]).view(1, 1, 2, 1)
    for variant in ("simple", "conv"):
        found = build_attention("aft", shape, variant=variant)(q, k, v)
        torch.testing.assert_close(found.flatten(), torch.tensor([2.0, 3.5]))


@every_variant
@every_direction
@pytest.mark.parametrize("length", [1, 8, 150])
def test_forward_is_the_quadratic_form(options, causal, length, make_shape):
    """Outputs and gradients, with shared key heads and holes in the mask."""
    module = build(make_shape(num_heads=4, num_kv_heads=2, causal=causal), **options)
    tensors = [x.requires_grad_() for x in inputs(length, heads=4)]
    everything = tensors + list(module.parameters())
    for key_mask in (None, torch.rand(2, length) < 0.6):
        found = module(*tensors, key_mask=key_mask)
        expected = module.quadratic(*tensors, key_mask=key_mask)
        torch.testing.assert_close(found, expected, atol=1e-10, rtol=0)
        cotangent = torch.randn_like(found)
        grads = [
            torch.autograd.grad((out * cotangent).sum(), everything, allow_unused=True, materialize_grads=True)
            for out in (found, expected)
        ]
        torch.testing.assert_close(*grads, atol=1e-10, rtol=1e-10)


@every_variant
@every_direction
def test_channel_weights_are_a_mean(options, causal, make_shape):
    module = build(make_shape(num_heads=4, num_kv_heads=2, causal=causal), **options)
    q, k, _ = inputs(9, heads=4)
    key_mask = torch.ones(2, 9, dtype=torch.bool)
    key_mask[1, :4] = False
    weights = module.channel_weights(q, k, key_mask=key_mask)
    assert weights.shape == (2, 4, 9, 9, 4)
    assert (weights >= 0).all()
    assert (weights[1, :, :, :4] == 0).all()
    visible = key_mask[:, None, :].expand(2, 9, 9)
    visible = visible.tril() if causal else visible
    sums = visible.any(-1).double()[:, None, :, None].expand(2, 4, 9, 4)
    torch.testing.assert_close(weights.sum(3), sums, atol=1e-12, rtol=0)
    tail = module.channel_weights(q[:, :, 7:], k, key_mask=key_mask)
    torch.testing.assert_close(tail, weights[:, :, 7:], atol=1e-12, rtol=0)


# --- the variants in each other's terms ---


@every_variant
@every_direction
def test_conv_begins_as_simple_and_full_near_it(options, causal, make_shape):
    shape = make_shape(causal=causal)
    module = build_attention("aft", shape, **options).double()
    q, k, v = inputs(40)
    bound = 0.05 if options["variant"] == "full" else 1e-12
    simple = build_attention("aft", shape, variant="simple")(q, k, v)
    torch.testing.assert_close(module(q, k, v), simple, atol=bound, rtol=0)


@every_direction
@pytest.mark.parametrize("window", [1, 4, 100])
def test_conv_is_full_with_a_local_relative_bias(causal, window, make_shape):
    shape = make_shape(num_heads=1, max_len=64, causal=causal)
    conv, full = build(shape, window=window), build(shape, variant="full")
    table, first = kernel(conv)[0], 0 if causal else 1 - window
    with torch.no_grad():  # the vectors of queries hold w, those of keys pick its column
        full.of_keys.copy_(torch.eye(64, 128))
        full.of_queries.zero_()
        for i in range(64):
            for j in range(i + 1 if causal else 64):
                full.of_queries[i, j] = table[i - j - first] if abs(i - j) < window else 0.0
    q, k, v = inputs(64, heads=1, kv_heads=1)
    torch.testing.assert_close(conv(q, k, v), full(q, k, v), atol=1e-12, rtol=0)
    moved = conv(q, k, v) - build_attention("aft", shape, variant="simple")(q, k, v)
    assert moved.abs().max() > 0.01


def test_biases_are_added_to_keys_not_multiplied(make_shape):
    """Where keys are zero, a product would leave all weights alike."""
    module = build(make_shape(num_heads=1), variant="full")
    q, k, _ = inputs(6, heads=1, kv_heads=1)
    weights = module.channel_weights(q, torch.zeros_like(k))
    w = (module.of_queries[:6] @ module.of_keys[:6].T).masked_fill(~torch.ones(6, 6).bool().tril(), -torch.inf)
    expected = w.softmax(-1)[None, None, ..., None].expand(2, 1, 6, 6, 4)
    torch.testing.assert_close(weights, expected, atol=1e-12, rtol=0)


def test_the_window_ends_where_it_should(make_shape):
    """A kernel of 3 lags tells keys 0, 1 and 2 tokens away from the rest, which are all alike."""
    module = build(make_shape(num_heads=1), window=3)
    weights = module.channel_weights(*(torch.zeros(1, 1, 8, 4, dtype=torch.float64) for _ in range(2)))[0, 0, 7, :, 0]
    far = weights[:5]
    torch.testing.assert_close(far, far[:1].expand(5), atol=1e-12, rtol=0)
    expected = torch.tensor(kernel(module)[0], dtype=torch.float64).flip(0)
    torch.testing.assert_close((weights[5:] / far[0]).log(), expected, atol=1e-10, rtol=0)


@every_direction
def test_the_number_of_parameters(causal, make_shape):
    shape = make_shape(num_heads=4, head_dim=8, max_len=512, causal=causal)

    def count(**options):
        return sum(p.numel() for p in build_attention("aft", shape, **options).parameters())

    assert count(variant="simple") == 0
    assert count() == 4 * ((32 if causal else 63) + 2)
    assert count(window=5) == 4 * ((5 if causal else 9) + 2)
    assert count(variant="full") == 2 * 512 * 128


# --- keys of any size ---


@every_variant
def test_a_large_last_key_changes_nothing_before_it_in_float32(options, make_shape):
    module = build(make_shape(), **options).float()
    q, k, v = inputs(140, dtype=torch.float32)
    larger = k.clone()
    larger[:, :, -1] = 1000
    before, after = module(q, k, v), module(q, larger, v)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])
    assert not torch.equal(after[:, :, -1], before[:, :, -1])


@every_variant
@every_direction
def test_float32_takes_keys_that_reach_far_beyond_exp_s_range(options, causal, make_shape):
    """Keys of up to 600, against float64. A maximum over a block of keys would leave queries with 0 / 0."""
    module = build(make_shape(causal=causal), **options)
    q, k, v = inputs(150)
    tensors = [x.requires_grad_() for x in (q, k * 150, v)]
    truth, cotangent = module.quadratic(*tensors), torch.randn(q.shape, dtype=torch.float64)
    single = [x.detach().float().requires_grad_() for x in tensors]
    found = module.float()(*single)
    torch.testing.assert_close(found.double(), truth, atol=1e-5 * truth.abs().max().item(), rtol=0)
    expected = torch.autograd.grad((truth * cotangent).sum(), tensors)
    for g, e in zip(torch.autograd.grad((found * cotangent.float()).sum(), single), expected, strict=True):
        torch.testing.assert_close(g.double(), e, atol=2e-4 * e.abs().max().item(), rtol=0)


@every_direction
def test_a_window_that_weighs_nothing_cancels_nothing(causal, make_shape):
    """w = -30 for the largest key: a sum over all keys less what the window takes back would be all rounding."""
    module = build(make_shape(causal=causal), window=2).float()
    with torch.no_grad():
        module.gain.zero_()
        module.bias.fill_(-30)
    q, k, v = inputs(20, dtype=torch.float32)
    k[:, :, 10] = 20
    truth = module.double().quadratic(q.double(), k.double(), v.double())
    torch.testing.assert_close(module.float()(q, k, v), truth.float(), atol=1e-5, rtol=0)


@every_direction
@pytest.mark.parametrize("variant", ["simple", "conv"])
def test_half_precision_holds_over_65_536_tokens(causal, variant, make_shape):
    """On the last 64 queries, against the definition in float64."""
    module = build(make_shape(num_heads=1, max_len=65_536, causal=causal), variant=variant)
    q, k, v = inputs(65_536, heads=1, kv_heads=1, batch=1, dtype=torch.bfloat16)
    v = v + 1  # a mean that isn't zero
    with torch.no_grad():
        truth = module.quadratic(q[:, :, -64:].double(), k.double(), v.double())
        found = module.float()(q, k, v)[:, :, -64:].double()
    assert (found - truth).abs().max() <= 3e-3 * truth.abs().max()


# --- positions, state, refusals ---


def test_full_s_positions_count_attended_tokens(make_shape):
    module = build(make_shape(max_len=5), variant="full")
    q, k, v = inputs(9)
    key_mask = torch.arange(9) >= torch.tensor([[4], [6]])
    out = module(q, k, v, key_mask=key_mask)
    torch.testing.assert_close(out[:1, :, 4:], module(q[:1, :, 4:], k[:1, :, 4:], v[:1, :, 4:]), atol=1e-12, rtol=0)
    shifted = module(q[:, :, :3], k[:, :, :3], v[:, :, :3], positions=torch.tensor([[2, 3, 4]] * 2))
    w = module.of_queries[2:5] @ module.of_keys[2:5].T
    expected = by_loops(q[:, :, :3], k[:, :, :3], v[:, :, :3], lambda h, i, j: w[i, j].item(), True)
    torch.testing.assert_close(shifted, expected, atol=1e-12, rtol=0)


def test_full_has_no_positions_beyond_max_len(make_shape):
    module = build(make_shape(max_len=5), variant="full")
    with pytest.raises(UsageError, match="positions below 5, not 5"):
        module(*inputs(6))
    with pytest.raises(UsageError, match="positions below 5, not 7"):
        module(*inputs(2), positions=torch.tensor([[6, 7]] * 2))
    for options in VARIANTS[:3]:
        assert build(make_shape(max_len=5), **options)(*inputs(6)).isfinite().all()


@pytest.mark.parametrize("options", [*VARIANTS[:3], {"window": 1}, {"window": 200}])
@pytest.mark.parametrize("pieces", [[40] + [1] * 20, [7, 33, 1, 19]], ids=["tokens", "pieces"])
def test_decoding_from_a_state_is_the_full_forward(options, pieces, make_shape):
    module = build(make_shape(num_heads=4, num_kv_heads=2), **options)
    assert module.has_state
    q, k, v = inputs(60, heads=4)
    for key_mask in (None, torch.arange(60) >= torch.tensor([[0], [9]]), torch.rand(2, 60) < 0.6):
        expected = module(q, k, v, key_mask=key_mask)
        state, outputs, start = None, [], 0
        for length in pieces:
            at = slice(start, start + length)
            out, state = module(
                *(x[:, :, at] for x in (q, k, v)),
                key_mask=None if key_mask is None else key_mask[:, at],
                state=state,
                return_state=True,
            )
            outputs.append(out)
            start += length
        torch.testing.assert_close(torch.cat(outputs, 2), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("options", VARIANTS[:3])
def test_a_state_keeps_sums_and_the_window(options, make_shape):
    """Two sums and a maximum for each channel of a key-value head, and the window's other keys and values."""
    module = build_attention("aft", make_shape(num_heads=4, num_kv_heads=2), **options)
    kept = {"simple": 0, "conv": options.get("window", 32) - 1}[options["variant"]]
    for length in (1, 50):
        _, state = module(*inputs(length, heads=4, dtype=torch.float32), return_state=True)
        assert state.nbytes == module.state_bytes(length, batch_size=2) == 2 * 2 * 4 * (3 + 2 * kept) * 4


def test_full_keeps_every_key_and_value(make_shape):
    module = build_attention("aft", make_shape(num_heads=4, num_kv_heads=2), variant="full")
    assert not module.has_state
    assert module.state_bytes(10) == 10 * 2 * (4 + 4) * 4
    with pytest.raises(UsageError, match="causal aft of variant full has no state"):
        module(*inputs(3, heads=4), return_state=True)
    module = build_attention("aft", make_shape(causal=False))
    assert module.state_bytes(10) is None
    with pytest.raises(UsageError, match="bidirectional aft of variant conv has no state"):
        module(*inputs(3), return_state=True)


def test_values_are_as_wide_as_queries(make_shape):
    q, k, v = inputs(3)
    module = build(make_shape())
    for call in (module, module.quadratic):
        with pytest.raises(UsageError, match="v must be 4 wide like q, not 3"):
            call(q, k, v[..., :3])


@pytest.mark.parametrize(
    "options,message",
    [
        ({"variant": "local"}, "variant is simple, conv or full, not 'local'"),
        ({"window": 0}, "window must be at least 1"),
        ({"variant": "full", "window": 4}, "of variant conv only, not 4 of full"),
        ({"variant": "simple", "window": 4}, "of variant conv only, not 4 of simple"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message, make_shape):
    with pytest.raises(UsageError, match=message):
        build_attention("aft", make_shape(), **options)
