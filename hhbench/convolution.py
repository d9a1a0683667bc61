"""Long convolutions along a sequence, by FFT and by direct sums, and the packing that keeps padded tokens out of them.

    y_i = sum_{j <= i} past_{i - j} x_j + sum_{j > i} future_{j - i - 1} x_j

`past` begins at lag 0, `future` at the next token: lag 0 counts once. Causal ones have no `future`.
"""

import math
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.attention import sum_dtype
from hhbench.kernels import ran

REMEMBERED = 2**26  # bytes of a spectrum that is kept, at most


def fast_size(length: int) -> int:
    """The smallest even size of at least a length that is a power of two by 1, 3, 5, 9 or 15: FFTs are fast there."""
    return min(odd << max(1, (-(-length // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def convolve(x: Tensor, past: Tensor, future: Tensor | None = None) -> Tensor:
    """The convolution by FFT: x [B, C, N], kernels [C, M] of any lengths, the sum [B, C, N] in `sum_dtype`.

    Wherever the circle of the FFT closes lie zeros, so that the ends don't meet. Each output is exact to the rounding
    of the whole sequence: a causal one differs by that much when a later token does.
    """
    with torch.autocast(x.device.type, enabled=False):
        ran("fft")
        dtype, N = sum_dtype(x), x.shape[-1]
        kernel = past[:, :N].to(dtype)
        size = fast_size(N + kernel.shape[-1] - 1)
        if future is not None:
            future = future[:, : N - 1].to(dtype)
            size = fast_size(N + max(kernel.shape[-1] - 1, future.shape[-1]))
            kernel = _circle(kernel, future, size)
        out: Tensor = _Convolution.apply(x.to(dtype), kernel, size)
        return out


def _circle(past: Tensor, future: Tensor | None, size: int) -> Tensor:
    """Both kernels on the circle of an FFT: the future's lies before lag 0, read backwards."""
    if future is None:
        return past
    gap = size - past.shape[-1] - future.shape[-1]
    return torch.cat([pad(past, (0, gap)), future.flip(-1)], dim=-1)


class _Convolution(torch.autograd.Function):
    """x [B, C, N], kernel [C, M] -> [B, C, N]. All FFTs are real: torch's own gradient of one is complex."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, size: int) -> Tensor:
        of_x, of_kernel = torch.fft.rfft(x, n=size), torch.fft.rfft(kernel, n=size)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(of_x, of_kernel)
            ctx.size, ctx.lengths = size, (x.shape[-1], kernel.shape[-1])
            product = of_x * of_kernel
        else:
            product = of_x.mul_(of_kernel)
        out: Tensor = torch.fft.irfft(product, n=size)
        return out[..., : x.shape[-1]]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        of_x, of_kernel = ctx.saved_tensors
        length, lags = ctx.lengths
        of_grad, of_inputs, of_lags = torch.fft.rfft(grad, n=ctx.size), None, None
        if ctx.needs_input_grad[1]:
            of_lags = torch.fft.irfft((of_x.conj() * of_grad).sum(0), n=ctx.size)[..., :lags]
        if ctx.needs_input_grad[0]:
            of_inputs = torch.fft.irfft(of_grad.mul_(of_kernel.conj()), n=ctx.size)[..., :length]
        return of_inputs, of_lags, None


class KernelModule(Protocol):
    """A module whose parameters make a kernel."""

    training: bool

    @property
    def longest(self) -> int | None:
        """Lags that the kernel has at most; None = any number."""

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """The first lags, [C, length], or fewer where there are no more."""

    def parameters(self) -> Iterator[Tensor]: ...


class Convolution:
    """`convolve` with kernels that modules make. In evaluation mode and without gradients it remembers their spectrum.

    It is made anew when a parameter changed in place or was replaced, and for another length, type or device; nearby
    lengths share one, as decoding without a state needs. A change through `.data` is not seen: torch doesn't count it.
    Neither a copy nor a state dict has it.
    """

    def __init__(self) -> None:
        self._kept: tuple[Any, list[Tensor], Tensor] | None = None

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(self), ()

    def __call__(
        self, x: Tensor, past: KernelModule, future: KernelModule | None = None, *, directly: bool = False
    ) -> Tensor:
        """x [B, C, N] -> [B, C, N] in `sum_dtype`; by `convolve_directly` if asked to."""
        dtype, N = sum_dtype(x), x.shape[-1]
        parameters = [*past.parameters(), *(future.parameters() if future is not None else ())]
        with torch.autocast(x.device.type, enabled=False):
            watched = not any(p.is_inference() for p in parameters)  # torch counts no changes of those
            if directly or past.training or torch.is_grad_enabled() or not watched:
                self._kept = None
                form = convolve_directly if directly else convolve
                return form(x, past.kernel(N, dtype), None if future is None else future.kernel(N, dtype))
            ran("fft")
            size = fast_size(N + (N if past.longest is None else min(N, past.longest)))
            key = (size, dtype, x.device, [(p.data_ptr(), p._version) for p in parameters])
            if self._kept is not None and self._kept[0] == key:
                spectrum = self._kept[2]
            else:
                # As many lags as serve all lengths of this size: no output of theirs sees the circle close.
                lags = size // 2 if past.longest is None else min(size // 2, past.longest)
                later = None if future is None else future.kernel(lags, dtype)
                spectrum = torch.fft.rfft(_circle(past.kernel(lags, dtype), later, size), n=size)
                small = spectrum.numel() * spectrum.element_size() <= REMEMBERED
                # With the parameters' memory, so that no other's address can be taken for it.
                self._kept = (key, [p.detach() for p in parameters], spectrum) if small else None
            out: Tensor = torch.fft.irfft(torch.fft.rfft(x.to(dtype), n=size).mul_(spectrum), n=size)
            return out[..., :N]


def convolution_flops(length: int, longest: int | None, *, causal: bool, batch_size: int = 1) -> int:
    """FLOPs of one channel: by sums over pairs, or by FFT where that is less.

    A real FFT of n numbers takes 5/2 n log2 n; here are three for the kernel and the first sequence, two for each
    other, and 3 n for each product of spectra. Kernels of both directions share one FFT.
    """
    reach = length if longest is None else min(longest, length)
    pairs = reach * length - reach * (reach - 1) // 2
    pairs = pairs if causal else 2 * pairs - reach
    size = fast_size(length + reach)
    fft = round(2.5 * size * math.log2(size))
    return min(2 * pairs * batch_size, fft + batch_size * (2 * fft + 3 * size))


def convolve_directly(x: Tensor, past: Tensor, future: Tensor | None = None) -> Tensor:
    """The same by sums over all pairs of tokens: O(C N^2) memory, and the truth for `convolve`."""
    with torch.autocast(x.device.type, enabled=False):
        dtype, N = sum_dtype(x), x.shape[-1]
        future = past.new_zeros(past.shape[0], 0) if future is None else future
        past, future = past[:, :N].to(dtype), future[:, : N - 1].to(dtype)
        kernel = torch.cat(
            [pad(future.flip(-1), (N - 1 - future.shape[-1], 0)), pad(past, (0, N - past.shape[-1]))], dim=-1
        )
        tokens = torch.arange(N, device=x.device)
        by_pair = kernel[:, tokens[:, None] - tokens + N - 1]
        return torch.einsum("cij,bcj->bci", by_pair, x.to(dtype))


class Packing:
    """Each row's attended tokens, moved together to its front: lags count attended tokens, as positions do.

    Whatever lies at padded tokens reaches nothing, wherever they lie.

    Args:
        key_mask: bool [B, N], True = attend; None = all.

    Attributes:
        mask: bool [B, N], where packed tokens are; None = everywhere.
    """

    def __init__(self, key_mask: Tensor | None) -> None:
        self._key_mask, self.mask = key_mask, None
        if key_mask is not None:
            self._order = key_mask.int().argsort(dim=-1, descending=True, stable=True)
            self.mask = key_mask.gather(1, self._order)

    def lengths(self, x: Tensor) -> Tensor:
        """Attended tokens of each row, int64 [B], of x [B, N, C]."""
        if self.mask is None:
            return torch.full((x.shape[0],), x.shape[1], device=x.device)
        return self.mask.sum(-1)

    def pack(self, x: Tensor) -> Tensor:
        """x [B, N, C] with attended tokens first and zeros after them."""
        if self._key_mask is None:
            return x
        return x.masked_fill(~self._key_mask[..., None], 0.0).gather(1, self._order[..., None].expand_as(x))

    def zero(self, x: Tensor) -> Tensor:
        """Packed x [B, N, C] with zeros after its attended tokens, where a bias may have put something."""
        return x if self.mask is None else x.masked_fill(~self.mask[..., None], 0.0)

    def unpack(self, x: Tensor) -> Tensor:
        """Packed x [B, N, C] with every token back where it was, and zeros at padded ones."""
        if self.mask is None:
            return x
        return self.zero(x).gather(1, self._order.argsort(dim=-1)[..., None].expand_as(x))
