"""Long convolutions against plain loops, and padding that reaches nothing."""

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn

from hhbench.convolution import Convolution, Packing, convolution_flops, convolve, convolve_directly, fast_size
from hhbench.kernels import kernels

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


@pytest.mark.parametrize("learned", [0, 1, 2])
def test_each_input_has_its_gradient_alone(learned):
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 3, 11), (3, 11), (3, 10))]
    inputs[learned].requires_grad_()
    weight = torch.randn(2, 3, 11, dtype=torch.float64)
    found, expected = (
        torch.autograd.grad((form(*inputs) * weight).sum(), inputs[learned]) for form in (convolve, convolve_directly)
    )
    torch.testing.assert_close(found, expected, atol=1e-12, rtol=0)


# --- kernels that modules make ---


class Ramp(nn.Module):
    """K_l = weight / (1 + l), and how often it was made."""

    def __init__(self, longest: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 1, dtype=torch.float64))
        self.longest, self.made = longest, 0

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        self.made += 1
        length = length if self.longest is None else min(length, self.longest)
        return self.weight.to(dtype) / torch.arange(1, length + 1, dtype=dtype)


@pytest.mark.parametrize("two_sided", [False, True], ids=["causal", "two-sided"])
@pytest.mark.parametrize("longest", [None, 5, 40])
def test_remembered_kernels_give_what_made_ones_do(longest, two_sided):
    past, future = Ramp(longest).eval(), Ramp(longest).eval() if two_sided else None
    convolution = Convolution()
    for length in (1, 2, 7, 30, 31, 33, 40, 7):
        x = torch.randn(2, 3, length, dtype=torch.float64)
        expected = convolution(x, past, future, directly=True)
        with torch.no_grad():
            for _ in range(2):
                torch.testing.assert_close(convolution(x, past, future), expected, atol=1e-12, rtol=0)
        torch.testing.assert_close(convolution(x, past, future), expected, atol=1e-12, rtol=0)


@torch.no_grad()
def test_kernels_are_made_once_until_something_changes():
    ramp, convolution = Ramp().eval(), Convolution()
    x = torch.randn(2, 3, 30, dtype=torch.float64)

    def made(x: Tensor = x) -> int:
        before = ramp.made
        found = convolution(x, ramp)
        again = ramp.made - before
        tolerance = 1e-12 if x.dtype == torch.float64 else 1e-4
        torch.testing.assert_close(
            found, convolve_directly(x, ramp.kernel(x.shape[2], x.dtype)), atol=tolerance, rtol=0
        )
        return again

    assert [made(), made()] == [1, 0]
    assert [made(x[..., :length]) for length in (29, 28)] == [0, 0]  # one size of FFT
    assert [made(x.float()), made(x), made()] == [1, 1, 0]
    optimizer = torch.optim.SGD(ramp.parameters(), lr=1.0)
    ramp.weight.grad = torch.ones_like(ramp.weight)
    optimizer.step()
    assert [made(), made()] == [1, 0]
    ramp.load_state_dict(Ramp().state_dict())
    assert [made(), made()] == [1, 0]
    for _ in range(3):
        ramp.load_state_dict(Ramp().state_dict(), assign=True)
        assert made() == 1
    ramp.float()
    ramp.double()
    assert [made(), made()] == [1, 0]


def test_nothing_is_remembered_in_training_with_gradients_or_in_a_copy():
    ramp, convolution, x = Ramp(), Convolution(), torch.randn(2, 3, 30, dtype=torch.float64)

    def made(convolution: Convolution = convolution) -> int:
        before = ramp.made
        convolution(x, ramp)
        return ramp.made - before

    assert [made(), made()] == [1, 1]
    assert convolution(x, ramp).requires_grad
    with torch.no_grad():
        assert [made(), made()] == [1, 1]
        ramp.eval()
        assert [made(), made()] == [1, 0]
        assert [made(copy.deepcopy(convolution)), made(pickle.loads(pickle.dumps(convolution)))] == [1, 1]
    assert convolution(x, ramp).requires_grad
    with torch.no_grad():
        assert made() == 1


def test_a_long_spectrum_is_not_kept(monkeypatch):
    ramp, convolution, x = Ramp().eval(), Convolution(), torch.randn(2, 3, 32, dtype=torch.float64)
    monkeypatch.setattr("hhbench.convolution.REMEMBERED", 3 * 33 * 16 - 1)
    with torch.no_grad():
        for times in (1, 2):
            convolution(x, ramp)
            assert ramp.made == times


def test_which_form_ran_is_said():
    ramp, x = Ramp().eval(), torch.randn(2, 3, 8, dtype=torch.float64)
    with kernels() as seen:
        Convolution()(x, ramp, directly=True)
        assert seen == {}
        Convolution()(x, ramp)
        with torch.no_grad():
            Convolution()(x, ramp)
    assert seen == {"fft": 2}


def test_flops_are_of_pairs_where_there_are_few_and_of_ffts_where_there_are_many():
    assert convolution_flops(8, None, causal=True) == 8 * 9
    assert convolution_flops(8, None, causal=False) == 2 * 64
    assert convolution_flops(8, 3, causal=True) == 2 * (1 + 2 + 6 * 3)
    assert convolution_flops(8, 3, causal=False) == 2 * (1 + 2 + 6 * 3 + 5 * 3 + 2 + 1)
    assert convolution_flops(8, 8, causal=True, batch_size=5) == 5 * 8 * 9
    long = convolution_flops(4096, None, causal=True, batch_size=2)
    assert long == 5 * 2.5 * 8192 * 13 + 2 * 3 * 8192


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
