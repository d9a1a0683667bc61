"""Long convolutions against plain loops, and padding that reaches nothing."""

import pytest
import torch
from torch import Tensor

from hhbench.convolution import Packing, convolve, convolve_directly, fast_size

both_forms = pytest.mark.parametrize("form", [convolve, convolve_directly], ids=["FFT", "direct"])


def by_loops(x: Tensor, past: Tensor, future: Tensor | None) -> Tensor:
    N = x.shape[-1]
    out = torch.zeros_like(x)
    for i in range(N):
        for j in range(N):
            lag = i - j
            if 0 <= lag < past.shape[1]:
                out[:, :, i] += past[:, lag] * x[:, :, j]
            elif lag < 0 and future is not None and -lag - 1 < future.shape[1]:
                out[:, :, i] += future[:, -lag - 1] * x[:, :, j]
    return out


@both_forms
@pytest.mark.parametrize("length", [1, 2, 7, 16, 33])
@pytest.mark.parametrize(
    "past,future", [(1, None), (5, None), (33, None), (40, None), (5, 3), (3, 5), (40, 40), (1, 1)]
)
def test_it_is_the_sum_over_pairs_for_kernels_of_any_length(form, length, past, future):
    x = torch.randn(2, 3, length, dtype=torch.float64)
    kernel = torch.randn(3, past, dtype=torch.float64)
    other = None if future is None else torch.randn(3, future, dtype=torch.float64)
    torch.testing.assert_close(form(x, kernel, other), by_loops(x, kernel, other), atol=1e-12, rtol=0)


@both_forms
def test_lag_0_counts_once_and_the_ends_don_t_meet(form):
    """An impulse gives the kernels themselves: the future's, read backwards, then the past's."""
    x = torch.zeros(1, 1, 9)
    x[..., 4] = 1
    past, future = torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0, 5.0]])
    expected = torch.tensor([0.0, 0.0, 5.0, 4.0, 1.0, 2.0, 3.0, 0.0, 0.0])
    torch.testing.assert_close(form(x, past, future).flatten(), expected, atol=1e-6, rtol=0)
    for end in (0, 8):
        x = torch.zeros(1, 1, 9)
        x[..., end] = 1
        found = form(x, past.expand(1, 3), future).flatten().abs() > 1e-6
        assert found.nonzero().flatten().tolist() == ([0, 1, 2] if end == 0 else [6, 7, 8])


@both_forms
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_sums_have_32_bits_or_the_64_of_their_input_under_autocast_too(form, dtype):
    x, past, future = torch.randn(2, 3, 50).to(dtype), torch.randn(3, 50).to(dtype), torch.randn(3, 49).to(dtype)
    exact = convolve_directly(x.double(), past.double(), future.double())
    with torch.autocast("cpu", torch.bfloat16):
        out = form(x, past, future)
    assert out.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(out.double(), exact, atol=1e-12 if dtype == torch.float64 else 2e-5, rtol=0)


def test_gradients_of_both_forms_agree():
    x, past, future = (torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 11), (3, 11), (3, 10)))
    inputs = [t.requires_grad_() for t in (x, past, future)]
    weight = torch.randn(2, 3, 11, dtype=torch.float64)
    found = [torch.autograd.grad((form(*inputs) * weight).sum(), inputs) for form in (convolve, convolve_directly)]
    torch.testing.assert_close(found[0], found[1], atol=1e-12, rtol=0)


def test_fast_sizes_are_even_smooth_and_near():
    assert [fast_size(n) for n in (1, 2, 3, 5, 17, 64, 65, 1023, 131_071)] == [2, 2, 4, 6, 18, 64, 72, 1024, 131_072]
    for length in range(1, 3000):
        size = fast_size(length)
        assert size % 2 == 0
        assert length <= size <= max(2, 1.25 * length + 1)
        for factor in (2, 3, 5):
            while size % factor == 0:
                size //= factor
        assert size == 1


MASK = torch.tensor([[0, 1, 1, 0, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]], dtype=torch.bool)


def test_attended_tokens_move_to_the_front_and_back():
    x = torch.arange(1.0, 6).repeat(4, 1)[..., None]
    garbage = x.masked_fill(~MASK[..., None], torch.nan)
    packing = Packing(MASK)
    packed = packing.pack(garbage)
    assert packed.squeeze(-1).tolist() == [[2, 3, 5, 0, 0], [1, 2, 0, 0, 0], [0] * 5, [1, 2, 3, 4, 5]]
    assert packing.lengths(x).tolist() == [3, 2, 0, 5]
    assert torch.equal(packing.zero(packed + 1), (packed + 1) * (packed > 0))
    assert torch.equal(packing.unpack(packed), x * MASK[..., None])
    assert torch.equal(packing.unpack(packed + 1), (x + 1) * MASK[..., None])


def test_without_a_mask_nothing_moves():
    x, packing = torch.randn(2, 5, 3), Packing(None)
    assert packing.pack(x) is packing.zero(x) is packing.unpack(x) is x
    assert packing.lengths(x).tolist() == [5, 5]


def test_garbage_at_padded_tokens_has_no_gradient():
    x = torch.full((4, 5, 2), torch.inf).masked_fill(MASK[..., None], 1.0).requires_grad_()
    packing = Packing(MASK)
    (grad,) = torch.autograd.grad(packing.unpack(packing.pack(x).square()).sum(), x)
    assert torch.equal(grad, 2.0 * MASK[..., None].expand_as(x))
