"""Softmax within a window: torch's attention under a band, whatever is padded, however long it is."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers.masking_utils import sliding_window_causal_mask_function

from hhbench.attention import build_attention
from hhbench.errors import UsageError

directions = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def draw(N, *, batch=2, heads=(4, 2), E=3, dtype=torch.float64, grad=False):
    sizes = ((heads[0], 4), (heads[1], 4), (heads[1], E))
    return [torch.randn(batch, h, N, width, dtype=dtype, requires_grad=grad) for h, width in sizes]


def band(N, window, causal):
    distance = torch.arange(N)[:, None] - torch.arange(N)
    return (distance >= 0) & (distance < window) if causal else distance.abs() < window


@directions
@pytest.mark.parametrize("window,N", [(1, 9), (3, 9), (9, 9), (3, 200), (70, 200), (70, 400), (500, 300)])
def test_it_is_torch_s_attention_under_a_band(window, N, causal, make_shape):
    """Outputs and gradients, by all pairs and by blocks."""
    module = build_attention(
        "softmax-window", make_shape(num_heads=4, num_kv_heads=2, scale=0.3, causal=causal), window=window
    )
    inputs = draw(N, grad=True)
    out = module(*inputs)
    expected = scaled_dot_product_attention(*inputs, attn_mask=band(N, window, causal), scale=0.3, enable_gqa=True)
    cotangent = torch.randn_like(out)
    torch.testing.assert_close(out, expected, atol=1e-12, rtol=0)
    found, true = (torch.autograd.grad((o * cotangent).sum(), inputs) for o in (out, expected))
    torch.testing.assert_close(found, true, atol=1e-12, rtol=0)
    torch.testing.assert_close(module.quadratic(*inputs), expected, atol=1e-12, rtol=0)


@directions
@pytest.mark.parametrize("window,N", [(3, 20), (3, 300), (70, 300)])
def test_padding_moves_no_window(window, N, causal, make_shape):
    """A row with holes and padding is the row of its attended tokens; what lies at the others reaches nothing."""
    module = build_attention("softmax-window", make_shape(num_heads=4, num_kv_heads=2, causal=causal), window=window)
    inputs = draw(N, batch=1, grad=True)
    key_mask = torch.rand(1, 2 * N) < 0.5
    key_mask[0, :3] = key_mask[0, -3:] = False
    attended = key_mask[0].nonzero().squeeze(1)[:N]
    key_mask = torch.zeros_like(key_mask).index_fill(1, attended, True)
    alone = module(*(x[:, :, : len(attended)] for x in inputs))
    for garbage in (1e30, torch.inf, torch.nan):
        padded = [
            torch.full((1, x.shape[1], 2 * N, x.shape[3]), garbage, dtype=x.dtype).index_copy(
                2, attended, x[:, :, : len(attended)]
            )
            for x in inputs
        ]
        out = module(*padded, key_mask=key_mask)
        assert out.isfinite().all()
        torch.testing.assert_close(out[:, :, attended], alone, atol=1e-12, rtol=0)
        found, true = (torch.autograd.grad(o.sum(), inputs, retain_graph=True) for o in (out[:, :, attended], alone))
        torch.testing.assert_close(found, true, atol=1e-12, rtol=0)


@directions
@pytest.mark.parametrize("window", [9, 100])
def test_a_window_of_all_tokens_is_softmax(window, causal, make_shape):
    shape, inputs = make_shape(num_heads=4, num_kv_heads=2, causal=causal), draw(9)
    key_mask = torch.rand(2, 9) < 0.7
    one, other = build_attention("softmax-window", shape, window=window), build_attention("softmax", shape)
    for mask in (None, key_mask):
        torch.testing.assert_close(one(*inputs, key_mask=mask), other(*inputs, key_mask=mask), atol=1e-12, rtol=0)
        found, expected = (m.weights(*inputs[:2], key_mask=mask) for m in (one, other))
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


def test_a_causal_window_is_mistral_s(make_shape):
    """w tokens, the query's own among them."""
    tokens = torch.arange(8)
    expected = sliding_window_causal_mask_function(3)(None, None, tokens[:, None], tokens)
    q, k, _ = draw(8)
    weights = build_attention("softmax-window", make_shape(num_heads=4, num_kv_heads=2), window=3).weights(q, k)
    assert torch.equal(weights[0, 0] > 0, expected)
    assert expected[7].sum() == 3


def test_a_bidirectional_window_is_longformer_s_of_twice_less_one(make_shape):
    """Longformer sees half its window on either side: for w = 3, its 4 is 2 tokens, the query and 2 tokens."""
    q, k, _ = draw(9)
    shape = make_shape(num_heads=4, num_kv_heads=2, causal=False)
    seen = build_attention("softmax-window", shape, window=3).weights(q, k)[0, 0, 4] > 0
    assert seen.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


def test_weights_by_hand(make_shape):
    """Scores log 1, log 2, log 3 and a window of 2."""
    shape = make_shape(num_heads=1, head_dim=1, scale=1.0)
    q, k = torch.ones(1, 1, 3, 1), torch.tensor([1.0, 2.0, 3.0]).log().view(1, 1, 3, 1)
    found = build_attention("softmax-window", shape, window=2).weights(q, k)[0, 0]
    torch.testing.assert_close(found, torch.tensor([[1, 0, 0], [1 / 3, 2 / 3, 0], [0, 0.4, 0.6]]))


@pytest.mark.parametrize("N", [6, 200])
def test_dropout_is_of_training_only(N, make_shape):
    """Of weights: kept ones count 1 / (1 - p)-fold, so ones do not stay ones but for their mean."""
    module = build_attention("softmax-window", make_shape(dropout=0.5), window=4)
    q, k, _ = draw(N, heads=(2, 2))
    ones = torch.ones(2, 2, N, 3, dtype=torch.float64)
    out = module(q, k, ones)
    assert (out != 1).any() and (out[:, :, 0] % 2 == 0).all()
    assert out.mean() == pytest.approx(1, abs=0.25)
    torch.testing.assert_close(module.eval()(q, k, ones), ones)


@pytest.mark.parametrize("num_queries", [1, 30, 200])
@directions
def test_the_last_queries_of_many_keys(num_queries, causal, make_shape):
    """Tokens being decoded, by blocks and by all pairs."""
    module = build_attention("softmax-window", make_shape(num_heads=4, num_kv_heads=2, causal=causal), window=5)
    q, k, v = draw(300)
    for mask in (None, torch.rand(2, 300) < 0.5):
        expected = module(q, k, v, key_mask=mask)[:, :, -num_queries:]
        found = module(q[:, :, -num_queries:], k, v, key_mask=mask)
        torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


PIECES = {"one by one": [1] * 12, "pieces": [2, 5, 1, 4], "a prompt, then one by one": [8, 1, 1, 1, 1]}


@pytest.mark.parametrize("pieces", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("window", [1, 3, 20])
def test_a_prompt_in_pieces_is_the_whole(window, pieces, make_shape):
    """Across the moment when tokens leave the window, with a row padded on the left and one with holes."""
    module = build_attention("softmax-window", make_shape(num_heads=4, num_kv_heads=2), window=window)
    inputs = draw(12, batch=3, E=4)
    key_mask = torch.ones(3, 12, dtype=torch.bool)
    key_mask[1, :5] = key_mask[2, [0, 3, 4, 8, 11]] = False
    for mask in (None, key_mask):
        whole, last = module(*inputs, key_mask=mask, return_state=True)
        state, outputs, start = None, [], 0
        for parts in zip(*(x.split(pieces, 2) for x in inputs), strict=True):
            stop = start + parts[0].shape[2]
            part_mask = None if mask is None else mask[:, start:stop]
            out, state = module(*parts, key_mask=part_mask, state=state, return_state=True)
            outputs.append(out)
            start = stop
        torch.testing.assert_close(torch.cat(outputs, 2), whole, atol=1e-12, rtol=0)
        for name in ("ring_keys", "ring_values", "num_attended"):
            torch.testing.assert_close(getattr(state, name), getattr(last, name), atol=0, rtol=0)
        attended = torch.full((3,), 12) if mask is None else mask.sum(-1)
        assert torch.equal(state.num_attended, attended)


def test_a_state_is_the_ring_and_keeps_its_size(make_shape):
    module = build_attention("softmax-window", make_shape(num_heads=4, num_kv_heads=2), window=4)
    state = None
    for n in range(1, 8):
        q, k, v = draw(1, batch=3, E=4, dtype=torch.float32)
        _, state = module(q, k, v, state=state, return_state=True)
        assert state.nbytes == module.state_bytes(n, batch_size=3) == 3 * (4 * 2 * (4 + 4) * 4 + 8)
        assert torch.equal(state.ring_keys[:, :, -1:], k) and torch.equal(state.ring_values[:, :, -1:], v)
    rows = torch.tensor([2, 0])
    assert torch.equal(state.select(rows).ring_keys, state.ring_keys[rows])


def test_a_bidirectional_attention_has_no_state(make_shape):
    module = build_attention("softmax-window", make_shape(causal=False))
    x = torch.randn(1, 2, 5, 4)
    with pytest.raises(UsageError, match="bidirectional attention has no state"):
        module(x, x, x, return_state=True)
    assert module.state_bytes(10) is None


@directions
def test_65536_tokens_hold_no_square(causal, make_shape):
    """16 GiB would be one square of float32. The last queries are those of the last tokens alone."""
    module = build_attention("softmax-window", make_shape(num_heads=1, head_dim=32, causal=causal))
    q, k, v = torch.randn(3, 1, 1, 65_536, 32)
    out = module(q, k, v)[:, :, -256:]
    expected = module(*(x[:, :, -319:].double() for x in (q, k, v)))[:, :, -256:]
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=0)


def test_an_empty_window_is_refused(make_shape):
    with pytest.raises(UsageError, match="window must be at least 1, not 0"):
        build_attention("softmax-window", make_shape(), window=0)
