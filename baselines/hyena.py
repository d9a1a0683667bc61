"""Hyena: a long convolution whose filter a small network writes, between two gates."""

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, linear

from hhbench.attention import (
    MixerShape,
    OptimizerSettings,
    SequenceMixer,
    check_hidden_states,
    register_attention,
    sum_dtype,
)
from hhbench.convolution import Convolution, Packing, convolution_flops
from hhbench.errors import UsageError

INNER_LAYERS = 2
BLOCK = 64  # lags come in blocks: other sizes of matrices round otherwise, and each sine makes that 14 times more
SLOWEST, FASTEST = math.log(0.01) / 1.5, math.log(0.01) / 0.3  # a channel's window falls to 1 % at 1.5 or 0.3 max_len


class ImplicitFilter(nn.Module):
    """h(i) = MLP(features of i) * (exp(-t_i |delta_c|) + shift), for the lags i = 0, 1, ... that are asked for.

    Features are t_i = i / (max_len - 1) and the real and imaginary parts of exp(-2 pi f i / max_len) for
    (emb_dim - 1) / 2 bands f from 1e-4 up. Layers are joined by sin(freq * x), with one learned freq for them all; the
    last layer has no bias. Nothing here is as long as max_len.
    """

    optimizer_settings = dict.fromkeys(
        ("weight_in", "bias_in", "weight_inner", "bias_inner", "weight_out", "freq"), OptimizerSettings(max_lr=1e-3)
    )

    def __init__(
        self, dim: int, max_len: int, *, emb_dim: int, filter_width: int, frequency: float, shift: float
    ) -> None:
        super().__init__()
        self.max_len, self.emb_dim, self.shift = max_len, emb_dim, shift

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            """As torch.nn.Linear begins."""
            return nn.Parameter(torch.empty(shape).uniform_(-(fan_in**-0.5), fan_in**-0.5))

        self.weight_in = uniform(filter_width, emb_dim, fan_in=emb_dim)
        self.bias_in = uniform(filter_width, fan_in=emb_dim)
        self.weight_inner = uniform(INNER_LAYERS, filter_width, filter_width, fan_in=filter_width)
        self.bias_inner = uniform(INNER_LAYERS, filter_width, fan_in=filter_width)
        self.weight_out = uniform(dim, filter_width, fan_in=filter_width)
        self.freq = nn.Parameter(torch.full((filter_width,), float(frequency)))

    @property
    def longest(self) -> int:
        return self.max_len

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """The filter of each channel, [C, length]."""
        lags = torch.arange(-(-length // BLOCK) * BLOCK, dtype=dtype, device=self.freq.device)
        t = lags[:, None] / max(self.max_len - 1, 1)
        freq = self.freq.to(dtype)
        h = linear(self._features(lags, t), self.weight_in.to(dtype), self.bias_in.to(dtype))
        for weight, bias in zip(self.weight_inner.to(dtype), self.bias_inner.to(dtype), strict=True):
            h = linear((freq * h).sin(), weight, bias)
        h = linear((freq * h).sin(), self.weight_out.to(dtype))
        delta = torch.linspace(SLOWEST, FASTEST, h.shape[1], dtype=dtype, device=h.device)
        return (h * ((-t * delta.abs()).exp() + self.shift))[:length].T

    def _features(self, lags: Tensor, t: Tensor) -> Tensor:
        bands = (self.emb_dim - 1) // 2
        f = torch.linspace(1e-4, bands - 1, bands, dtype=lags.dtype, device=lags.device)
        angle = 2 * math.pi / self.max_len * lags[:, None] * f
        return torch.cat([t, angle.cos(), -angle.sin()], dim=-1)


@register_attention(paper="Poli et al. 2023, definition 3.1, order 2", cost="N log N C", recipe="replacement")
class Hyena(SequenceMixer):
    """(x0, x1, v) = short_conv(W u); y = x0 * (h conv (x1 * v) + b * x1 * v); out = W' y.

    short_conv is depthwise and three tokens wide. h is an `ImplicitFilter` over the host's max_len tokens; a longer
    sequence is refused. Bidirectional: short_conv sees one token on each side, and the tokens to come have a filter
    of their own with the same window. There is no finite state: decoding needs every earlier token.

    Defaults are those of the language models in the authors' code (safari). Most runs there also learn the features of
    positions, as many as max_len; here they are fixed, as in its runs at 131,072 tokens. Bidirectional copies have
    bugs that this one hasn't: safari's reversed kernel counts lag 0 twice; Monarch Mixer leaves short_conv causal and
    forgets the optimizer settings of the second filter.

    Args:
        emb_dim: features of a position, odd: t, and a cosine and a sine of each band.
        filter_width: of the hidden layers that write the filter.
        frequency: what freq begins at.
        shift: what the window falls to, so that no lag is lost.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        emb_dim: int = 33,
        filter_width: int = 64,
        frequency: float = 14.0,
        shift: float = 0.0,
    ) -> None:
        super().__init__(shape)
        if emb_dim < 3 or emb_dim % 2 == 0:
            raise UsageError(f"hyena's emb_dim is odd and at least 3, not {emb_dim}")
        if filter_width < 1:
            raise UsageError(f"hyena's filter_width is at least 1, not {filter_width}")
        C = shape.dim

        def make_filter() -> ImplicitFilter:
            return ImplicitFilter(
                C, shape.max_len, emb_dim=emb_dim, filter_width=filter_width, frequency=frequency, shift=shift
            )

        self.in_proj = nn.Linear(C, 3 * C)
        self.short_conv = nn.Conv1d(3 * C, 3 * C, 3, groups=3 * C)
        self.filter = make_filter()
        self.future_filter = None if shape.causal else make_filter()
        self.bias = nn.Parameter(torch.randn(C))
        self.out_proj = nn.Linear(C, C)
        self._long = Convolution()

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return self._mix(x, key_mask)

    def quadratic(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return self._mix(x, key_mask, directly=True)

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """Projections and convolutions of all tokens: decoding computes everything again. What writes the filters is
        not counted: they are remembered at evaluation.
        """
        del num_queries
        C, causal = self.shape.dim, self.shape.causal
        projected = 2 * 4 * C * C * batch_size * num_keys
        short = 2 * 3 * 3 * C * batch_size * num_keys
        return projected + short + C * convolution_flops(num_keys, None, causal=causal, batch_size=batch_size)

    def _mix(self, x: Tensor, key_mask: Tensor | None, *, directly: bool = False) -> Tensor:
        check_hidden_states(self.shape, x, key_mask)
        N, dtype = x.shape[1], sum_dtype(x)
        max_len = self.shape.max_len
        if max_len < N:
            raise UsageError(f"hyena's filter reaches over {max_len} tokens, not {N}")
        packing = Packing(key_mask)
        # W's bias and short_conv's make something of padded tokens, and each convolution would spread it.
        u = packing.zero(self.in_proj(packing.pack(x)))
        with torch.autocast(x.device.type, enabled=False):
            u = packing.zero(self._short(u.to(dtype).mT).mT).mT
            gate_out, gate_in, v = u.chunk(3, dim=1)
            v = gate_in * v
            y = self._long(v, self.filter, self.future_filter, directly=directly) + self.bias.to(dtype)[:, None] * v
            y = (gate_out * y).mT
        out: Tensor = self.out_proj(y.to(x.dtype))
        return packing.unpack(out.to(x.dtype))

    def _short(self, u: Tensor) -> Tensor:
        conv = self.short_conv
        assert conv.bias is not None
        weight, bias = conv.weight.to(u.dtype), conv.bias.to(u.dtype)
        padding = 2 if self.shape.causal else 1
        return conv1d(u, weight, bias, padding=padding, groups=conv.groups)[..., : u.shape[-1]]
