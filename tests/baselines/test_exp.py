"""The elementwise exponential: its kernel, its temperature, and a stabiliser that sees no later key."""

import pytest
import torch

from hhbench.attention import build_attention
from hhbench.errors import UsageError


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.3])
def test_the_kernel_is_a_sum_of_exponentials(temperature, direction, make_shape):
    shape = make_shape(causal=direction == "causal")
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64)
    kernel = (temperature * (q[:, :, :, None] + k[:, :, None])).exp().sum(-1)
    kernel = kernel.tril() if shape.causal else kernel
    weights = build_attention("exp", shape, temperature=temperature).weights(q, k)
    torch.testing.assert_close(weights, kernel / kernel.sum(-1, keepdim=True), atol=1e-12, rtol=0)


@pytest.mark.parametrize("form", ["quadratic", "chunked", "recurrent"])
@pytest.mark.parametrize("length", [20, 140], ids=["short", "longer than a chunk"])
def test_a_later_key_changes_no_earlier_output_in_float32(length, form, make_shape):
    """Bit for bit: a maximum over all keys would cancel in exact arithmetic, but not here."""
    module = build_attention("exp", make_shape(), temperature=2.0)
    q, k, v = torch.randn(3, 1, 2, length, 4)
    grown = k.clone()
    grown[:, :, -1] *= 50
    before, after = module(q, k, v, form=form), module(q, grown, v, form=form)
    assert torch.equal(after[:, :, :-1], before[:, :, :-1])
    assert not torch.equal(after[:, :, -1], before[:, :, -1])


def test_large_exponents_don_t_overflow(make_shape):
    """exp(2 * 200) is beyond float32; the key with the largest exponent takes all the weight."""
    module = build_attention("exp", make_shape(num_heads=1, causal=False), temperature=2.0)
    q, k, v = torch.full((1, 1, 3, 4), 150.0), torch.zeros(1, 1, 3, 4), torch.randn(1, 1, 3, 4)
    k[:, :, 1] = 200
    torch.testing.assert_close(module(q, k, v), v[:, :, 1:2].expand_as(v))


@pytest.mark.parametrize("value", [0, -1.0, float("inf"), float("nan")])
def test_a_temperature_is_positive_and_finite(value, make_shape):
    with pytest.raises(UsageError, match=r"^temperature must be positive and finite, not"):
        build_attention("exp", make_shape(), temperature=value)


@pytest.mark.parametrize("value", ["hot", None, True])
def test_a_temperature_is_a_number(value, make_shape):
    with pytest.raises(UsageError, match=r"^temperature must be a number, not"):
        build_attention("exp", make_shape(), temperature=value)
