"""cosFormer: its kernel by hand and by definition, a period that stays, and an end to the positions."""

import math

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

CosFormer = ATTENTIONS.get("cosformer").part


def alive(x: torch.Tensor) -> torch.Tensor:
    """x with one positive coordinate in all rows, so that no two of them are orthogonal after the ReLU."""
    return torch.cat([x[..., :1].abs() + 0.1, x[..., 1:]], dim=-1)


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_kernel_falls_as_a_quarter_of_a_cosine(direction, make_shape):
    shape = make_shape(causal=direction == "causal", max_len=9)
    q, k = alive(torch.randn(2, 1, 2, 6, 4, dtype=torch.float64))
    kernel = torch.zeros(1, 2, 6, 6, dtype=torch.float64)
    for i in range(6):
        for j in range(i + 1 if shape.causal else 6):
            dot = (q[:, :, i].relu() * k[:, :, j].relu()).sum(-1)
            kernel[:, :, i, j] = dot * math.cos(math.pi * (i - j) / (2 * 9))
    weights = build_attention("cosformer", shape).weights(q, k)
    torch.testing.assert_close(weights, kernel / kernel.sum(-1, keepdim=True), atol=1e-10, rtol=0)


def test_weights_by_hand(make_shape):
    """Equal tokens, as many as M = 3: cosines 1, sqrt(3)/2 and 1/2. The original gives the same at this length."""
    shape = make_shape(num_heads=1, head_dim=1, max_len=3, causal=False)
    one = torch.ones(1, 1, 3, 1, dtype=torch.float64)
    root = 3**0.5 / 2
    kernel = torch.tensor([[1, root, 0.5], [root, 1, root], [0.5, root, 1]], dtype=torch.float64)
    found = build_attention("cosformer", shape).weights(one, one)
    torch.testing.assert_close(found[0, 0], kernel / kernel.sum(-1, keepdim=True), atol=1e-10, rtol=0)


def test_earlier_outputs_stay_as_a_sequence_grows(make_shape):
    """With M at the current length, as in the original, these would differ by 0.1."""
    module = build_attention("cosformer", make_shape(max_len=50))
    q, k, v = torch.randn(3, 1, 2, 50, 4, dtype=torch.float64)
    whole, part = module(q, k, v), module(*(x[:, :, :25] for x in (q, k, v)))
    torch.testing.assert_close(part, whole[:, :, :25], atol=1e-12, rtol=0)
    other_period = build_attention("cosformer", make_shape(max_len=25))(*(x[:, :, :25] for x in (q, k, v)))
    assert (other_period - part).abs().max() > 0.01


def test_only_distance_matters(make_shape):
    module = build_attention("cosformer", make_shape(max_len=50))
    q, k = alive(torch.randn(2, 1, 2, 6, 4, dtype=torch.float64))
    positions = torch.arange(6)[None]
    shifted = module.weights(q, k, positions=positions + 44)
    torch.testing.assert_close(shifted, module.weights(q, k, positions=positions), atol=1e-9, rtol=0)
    spread = module.weights(q, k, positions=positions * 9)
    assert (spread - shifted).abs().max() > 0.01


def test_no_feature_is_negative_up_to_the_last_position(make_shape):
    """cos(pi / 2) is -4e-8 in float32: counting from 1, the original's last token has negative weights."""
    x = torch.ones(1, 2, 512, 4)
    features = CosFormer(make_shape(max_len=512)).map_queries(x, positions=torch.arange(512)[None])
    assert features.shape[-1] == 8
    assert (features >= 0).all()
    assert (features[:, :, -1, 4:] > 0.003).all()


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_a_sequence_past_the_period_is_refused(direction, make_shape):
    module = build_attention("cosformer", make_shape(max_len=8, causal=direction == "causal"))
    x = torch.randn(2, 2, 9, 4)
    assert module(*[x[:, :, :8]] * 3).isfinite().all()
    with pytest.raises(UsageError, match=r"^cosformer is built for 8 tokens and can't weigh token 9: [^\n]*$"):
        module(x, x, x)
    with pytest.raises(UsageError, match="can't weigh token 9"):
        module.weights(x, x)
    fits = torch.ones(2, 9, dtype=torch.bool)
    fits[:, 0] = False
    assert module(x, x, x, key_mask=fits).isfinite().all()


def test_a_decoding_step_past_the_period_is_refused(make_shape):
    module = build_attention("cosformer", make_shape(max_len=8))
    x = torch.randn(1, 2, 9, 4)
    _, state = module(*[x[:, :, :7]] * 3, return_state=True)
    _, state = module(*[x[:, :, 7:8]] * 3, state=state, return_state=True)
    with pytest.raises(UsageError, match="can't weigh token 9"):
        module(*[x[:, :, 8:]] * 3, state=state)


def test_positions_of_padding_don_t_count(make_shape):
    module = build_attention("cosformer", make_shape(max_len=8))
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    key_mask = torch.tensor([[False, True, True, True, True, True]])
    positions = torch.tensor([[10**6, 0, 1, 2, 3, 4]])
    found = module(q, k, v, key_mask=key_mask, positions=positions)
    assert torch.equal(found[:, :, 1:], module(q, k, v, key_mask=key_mask)[:, :, 1:])
    assert found.isfinite().all()
