"""Long convolutions along a sequence, by FFT and by direct sums, and the packing that keeps padded tokens out of them.

    y_i = sum_{j <= i} past_{i - j} x_j + sum_{j > i} future_{j - i - 1} x_j

`past` begins at lag 0, `future` at the next token: lag 0 counts once. Causal ones have no `future`.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.attention import sum_dtype


def fast_size(length: int) -> int:
    """The smallest even size of at least a length that is a power of two by 1, 3, 5, 9 or 15: FFTs are fast there."""
    return min(odd << max(1, (-(-length // odd) - 1).bit_length()) for odd in (1, 3, 5, 9, 15))


def convolve(x: Tensor, past: Tensor, future: Tensor | None = None) -> Tensor:
    """The convolution by FFT: x [B, C, N], kernels [C, M] of any lengths, the sum [B, C, N] in `sum_dtype`.

    Wherever the circle of the FFT closes lie zeros, so that the ends don't meet. Each output is exact to the rounding
    of the whole sequence: a causal one differs by that much when a later token does.
    """
    with torch.autocast(x.device.type, enabled=False):
        dtype, N = sum_dtype(x), x.shape[-1]
        kernel = past[:, :N].to(dtype)
        size = fast_size(N + kernel.shape[-1] - 1)
        if future is not None:
            future = future[:, : N - 1].to(dtype)
            size = fast_size(N + max(kernel.shape[-1] - 1, future.shape[-1]))
            gap = size - kernel.shape[-1] - future.shape[-1]
            kernel = torch.cat([pad(kernel, (0, gap)), future.flip(-1)], dim=-1)
        spectrum = torch.fft.rfft(x.to(dtype), n=size) * torch.fft.rfft(kernel, n=size)
        out: Tensor = torch.fft.irfft(spectrum, n=size)
        return out[..., :N]


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
