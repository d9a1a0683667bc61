"""H3: two state space models, a shift and a diagonal one, between products of queries, keys and values."""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import conv1d, pad

from hhbench.attention import (
    MixerShape,
    OptimizerSettings,
    SequenceMixer,
    check_hidden_states,
    refuse_state_unless_causal,
    register_attention,
    sum_dtype,
)
from hhbench.convolution import Convolution, Packing, convolution_flops
from hhbench.errors import UsageError
from hhbench.state import DecodingState

SLOW = OptimizerSettings(max_lr=1e-3)
DT_MIN, DT_MAX = 1e-3, 0.1


class ShiftSSM(nn.Module):
    """s_i = shift(s_{i-1}) + B k_i; out_i = C . s_i: the kernel is K_l = sum_j B_j C_{j + l}, and zero from d_state on.

    B begins at e_1, so that K is C, which begins as the weights of a depthwise convolution do.
    """

    optimizer_settings = {"B": SLOW}

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        self.B = nn.Parameter(torch.eye(1, d_state).repeat(dim, 1))
        self.C = nn.Parameter(torch.empty(dim, d_state).uniform_(-(d_state**-0.5), d_state**-0.5))

    @property
    def longest(self) -> int:
        """d_state: the kernel is zero beyond."""
        return self.C.shape[1]

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """K, [C, length], or [C, d_state] if that is shorter."""
        dim, d_state = self.C.shape
        later = pad(self.C.to(dtype), (0, d_state - 1))
        return conv1d(later[None], self.B.to(dtype)[:, None], groups=dim)[0, :, :length]


class DiagonalSSM(nn.Module):
    """s_i = dA s_{i-1} + dB x_i; out_i = 2 Re(C . s_i), complex, d_state / 2 numbers for as many conjugate pairs.

    Bilinear: dA = (1 + dt A / 2) / (1 - dt A / 2), dB = dt B / (1 - dt A / 2). S4D-Lin: A_n begins at -1/2 + i pi n
    and B at 1; C is complex normal and dt uniform in its logarithm. The kernel is K_l = 2 Re sum_n C_n dA_n^l dB_n.
    """

    optimizer_settings = dict.fromkeys(("log_dt", "log_A_real", "A_imag", "B"), SLOW)
    longest = None

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        pairs = d_state // 2
        self.log_dt = nn.Parameter(torch.empty(dim).uniform_(math.log(DT_MIN), math.log(DT_MAX)))
        self.log_A_real = nn.Parameter(torch.full((dim, pairs), math.log(0.5)))
        self.A_imag = nn.Parameter(math.pi * torch.arange(pairs).float().repeat(dim, 1))
        self.B = nn.Parameter(torch.tensor([1.0, 0.0]).repeat(dim, pairs, 1))
        self.C = nn.Parameter(torch.randn(dim, pairs, 2) * 0.5**0.5)

    def discrete(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """dA, dB and C, complex [C, d_state / 2]."""
        dt = self.log_dt.to(dtype).exp()[:, None]
        half = torch.complex(-self.log_A_real.to(dtype).exp(), self.A_imag.to(dtype)) * dt / 2
        B, C = (torch.view_as_complex(p.to(dtype).contiguous()) for p in (self.B, self.C))
        return (1 + half) / (1 - half), dt * B / (1 - half), C

    def kernel(self, length: int, dtype: torch.dtype) -> Tensor:
        """K, [C, length]."""
        dA, dB, C = self.discrete(dtype)
        return _sum_of_powers(C * dB, dA, length)

    def after(self, state: Tensor, length: int) -> Tensor:
        """What a state [B, C, d_state / 2, 2] adds to the outputs of the tokens that follow it, [B, C, length]."""
        dA, _, C = self.discrete(state.dtype)
        return _sum_of_powers(C * dA * torch.view_as_complex(state), dA, length)

    def advance(self, state: Tensor | None, x: Tensor, lengths: Tensor) -> Tensor:
        """The state [B, C, d_state / 2, 2] after the first `lengths` [B] of the inputs x [B, C, N]."""
        dA, dB, _ = self.discrete(x.dtype)
        age = lengths[:, None] - 1 - torch.arange(x.shape[-1], device=x.device)  # of the input to meet dA^0, dA^1, ...
        latest = x.gather(-1, age.clamp_min(0)[:, None].expand_as(x)).masked_fill(age[:, None] < 0, 0.0)
        coarse, fine = _power_factors(dA, x.shape[-1] + 1)
        step, blocks = fine.shape[-1], coarse.shape[-1]
        latest = pad(latest, (0, step * blocks - x.shape[-1])).reshape(*x.shape[:2], blocks, step)
        inner = torch.complex(latest @ fine.real.mT, latest @ fine.imag.mT)
        new = dB * (inner * coarse.mT).sum(-2)
        if state is not None:
            kept = fine[..., lengths % step] * coarse[..., lengths // step]
            new = new + kept.movedim(-1, 0) * torch.view_as_complex(state)
        return torch.view_as_real(new)


def _powers(base: Tensor, count: int) -> Tensor:
    """base^0 ... base^(count - 1) in a last dimension of its own, by doubling: no logarithm, and 0^0 is 1."""
    powers = torch.ones_like(base)[..., None]
    square = base[..., None]
    while powers.shape[-1] < count:
        powers = torch.cat([powers, powers * square], dim=-1)
        square = square * square
    return powers[..., :count]


def _power_factors(base: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """coarse_r = base^(r T) and fine_t = base^t, T near the root of count: their products are the first powers of base.

    So that sums over n of powers of base_n are matrix products, and nothing is as large as n times count.
    """
    step = math.isqrt(count - 1) + 1
    fine = _powers(base, step)
    return _powers(fine[..., -1] * base, -(-count // step)), fine


def _sum_of_powers(weight: Tensor, base: Tensor, count: int) -> Tensor:
    """2 Re sum_n weight_n base_n^l for l < count: weight [..., C, n], base [C, n] -> [..., C, count]."""
    coarse, fine = _power_factors(base, count)
    coarse = (weight[..., None] * coarse).mT
    total = coarse.real @ fine.real - coarse.imag @ fine.imag
    return 2 * total.flatten(-2)[..., :count]


@dataclass(frozen=True)
class H3State(DecodingState):
    """What H3 remembers of any number of tokens.

    Attributes:
        keys: the last d_state keys, oldest first, [B, C, d_state].
        diagonal: the diagonal model's state, real and imaginary parts, [B, C, d_state / 2, 2].
    """

    keys: Tensor
    diagonal: Tensor


@register_attention(paper="Fu et al. 2022, section 3.1", cost="N log N C", recipe="replacement")
class H3(SequenceMixer):
    """y = q * (diag(k' * v) + D (k' * v)), k' = shift(k) + D_shift k; out = W' y; q, k and v projected, head width 1.

    See `ShiftSSM` and `DiagonalSSM`, both with models of their own for each channel. Bidirectional: both have a second
    kernel for the tokens to come, which begins at the next one, so that lag 0 counts once; the authors' long
    convolutions with a reversed kernel count it twice.

    Their B, A and dt learn at 1e-3 at most and don't decay, as in the authors' code.

    A causal one decodes from a state of constant size. Padded tokens leave it as it is.

    Args:
        d_state: the keys that the shift looks at, and twice the conjugate pairs of the diagonal; even.
    """

    has_state = True

    def __init__(self, shape: MixerShape, *, d_state: int = 64) -> None:
        super().__init__(shape)
        if d_state < 2 or d_state % 2:
            raise UsageError(f"h3's d_state is even and at least 2, not {d_state}")
        C = shape.dim
        self.d_state = d_state
        self.in_proj = nn.Linear(C, 3 * C)
        self.shift = ShiftSSM(C, d_state)
        self.diagonal = DiagonalSSM(C, d_state)
        self.future_shift = None if shape.causal else ShiftSSM(C, d_state)
        self.future_diagonal = None if shape.causal else DiagonalSSM(C, d_state)
        self.D_shift = nn.Parameter(torch.randn(C))
        self.D = nn.Parameter(torch.randn(C))
        self.out_proj = nn.Linear(C, C)
        self._shifted, self._spread = Convolution(), Convolution()

    def forward(  # type: ignore[override]  # a state goes in and comes out on request
        self,
        x: Tensor,
        *,
        key_mask: Tensor | None = None,
        state: H3State | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, H3State]:
        """[B, N, C] -> [B, N, C], and the state after the last token if asked for; see `Attention.has_state`."""
        if state is not None or return_state:
            refuse_state_unless_causal(self.shape, "h3")
        out, advance = self._mix(x, key_mask, state)
        return (out, advance()) if return_state else out

    def quadratic(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        return self._mix(x, key_mask, directly=True)[0]

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant in the number of tokens: 2 d_state float32 for each channel."""
        del num_tokens
        return batch_size * self.shape.dim * 2 * self.d_state * 4 if self.shape.causal else None

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """Projections, and both models as convolutions or, where that is less, token by token. What makes the kernels
        is not counted: it is remembered at evaluation.
        """
        C, d, causal, new = self.shape.dim, self.d_state, self.shape.causal, num_queries
        projections = 2 * 4 * C * C * batch_size * new
        by_token = 9 * d * C * batch_size * new  # the shift's sum, and a complex product and sum for each pair
        if causal and num_queries < num_keys:
            return projections + by_token
        spread = [convolution_flops(num_keys, n, causal=causal, batch_size=batch_size) for n in (d, None)]
        return projections + (min(C * sum(spread), by_token) if causal else C * sum(spread))

    def _mix(
        self, x: Tensor, key_mask: Tensor | None, state: H3State | None = None, *, directly: bool = False
    ) -> tuple[Tensor, Callable[[], H3State]]:
        """The output, and what computes the state after it."""
        check_hidden_states(self.shape, x, key_mask)
        N, dtype = x.shape[1], sum_dtype(x)
        packing = Packing(key_mask)
        # The projection's bias makes something of padded tokens, and the convolutions would spread it.
        projected = packing.zero(self.in_proj(packing.pack(x)))
        with torch.autocast(x.device.type, enabled=False):
            q, k, v = projected.to(dtype).mT.chunk(3, dim=1)
            keys = k if state is None else torch.cat([state.keys, k], dim=-1)
            shifted = self._shifted(keys, self.shift, self.future_shift, directly=directly)[..., -N:]
            kv = (shifted + self.D_shift.to(dtype)[:, None] * k) * v
            y = self._spread(kv, self.diagonal, self.future_diagonal, directly=directly)
            y = y + self.D.to(dtype)[:, None] * kv
            if state is not None:
                y = y + self.diagonal.after(state.diagonal, N)
            y = (q * y).mT

        def advance() -> H3State:
            with torch.autocast(x.device.type, enabled=False):
                lengths = packing.lengths(x)
                seen = k.new_zeros(*k.shape[:2], self.d_state) if state is None else state.keys
                seen = torch.cat([seen, k], dim=-1)
                last = lengths[:, None] + torch.arange(self.d_state, device=x.device)
                last_keys = seen.gather(-1, last[:, None].expand(-1, seen.shape[1], -1))
                diagonal = self.diagonal.advance(None if state is None else state.diagonal, kv, lengths)
                return H3State(last_keys, diagonal)

        out: Tensor = self.out_proj(y.to(x.dtype))
        return packing.unpack(out.to(x.dtype)), advance
