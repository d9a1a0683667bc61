"""AFT: attention-free Transformer; each channel averages values by its own softmax over keys."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm, pad

from hhbench.attention import (
    Attention,
    MixerShape,
    check_inputs,
    register_attention,
    repeat_heads,
    sum_dtype,
    token_positions,
    visible_keys,
    zero_padding,
)
from hhbench.errors import UsageError
from hhbench.kernels import ran
from hhbench.linear_sum import finite
from hhbench.state import DecodingState
from hhbench.window import num_pairs

RANK = 128  # of AFT-full's biases, the paper's
BLOCK = 64  # of queries that share a span of keys in the bidirectional AFT-conv


@dataclass(frozen=True)
class AFTState(DecodingState):
    """What AFT-simple and AFT-conv remember of any number of tokens, per key-value head and channel.

    Attributes:
        log_max: the largest key that has left the window, [B, G, D].
        sums: sums of exp(k) v and exp(k) over such keys, divided by exp(log_max), [B, G, 2, D].
        keys: the window's last keys, padded ones -inf, [B, G, window - 1, D]; none for AFT-simple.
        values: their values.
    """

    log_max: Tensor
    sums: Tensor
    keys: Tensor
    values: Tensor


@dataclass(frozen=True)
class _Gains:
    """exp(w), each query's up to a factor of its own.

    Attributes:
        own: of a token on itself, broadcastable to [B, H, N].
        outside: of pairs out of the window, broadcastable to [B, H].
        near: (half) -> for each pair of neighbouring blocks of `half` tokens, of the last keys of the left one on the
            first queries of the right one, [B or 1, H or 1, blocks or 1, rows, keys]; all other pairs are out of the
            window. (0) -> of the keys before the first query, likewise.
    """

    own: Tensor
    outside: Tensor
    near: Callable[[int], Tensor | None]


@register_attention(paper="Zhai et al. 2021, eq. 2 and 6", cost="N D (w + log N)", recipe="no-transfer")
class AFT(Attention):
    """y_i = sigmoid(q_i) * sum_j exp(k_j + w_ij) v_j / sum_j exp(k_j + w_ij), each channel for itself.

    "simple": w = 0. O(N D log N), and O(N D) where tokens see the future too.
    "conv": w_ij is a learned function of i - j and the head where |i - j| < window, and 0 elsewhere. i - j counts
        padded tokens too. As in the paper each head's kernel is standardised, times a gain, plus a bias, both zero to
        begin with: it starts as "simple". The paper gives all channels of a head one key; ours have the keys that the
        layer's projection makes, one for each. O(N D (window + log N)).
    "full": w_ij = a_i.b_j, a learned pair of vectors of 128 numbers for each position below max_len, the same for all
        heads, small to begin with. It can't forget a key: each later token weighs it anew. O(N^2 D).

    The paper computes "conv" as a sum over all keys plus a convolution with exp(w) - 1. Where w is negative that takes
    away again what it added; here the window and what lies outside are summed apart. Each query's sums are divided
    by exp of the largest key among exactly those that it sees: none drowns an earlier output. This holds while the w
    of one query differ by less than 80 (in float64, 700).

    Public code differs: fast-transformers multiplies keys by w where they are to be added, and its causal simple form
    divides a key by the sum up to that key, not up to the query, so that its weights don't sum to 1.

    Args:
        variant: "simple", "conv" or "full".
        window: of "conv", in tokens, the query's own among them; 32 by default.
    """

    has_weights = False

    def __init__(
        self,
        shape: MixerShape,
        *,
        variant: Literal["simple", "conv", "full"] = "conv",
        window: int | None = None,
    ) -> None:
        super().__init__(shape)
        if variant not in ("simple", "conv", "full"):
            raise UsageError(f"aft's variant is simple, conv or full, not {variant!r}")
        if window is not None and (variant != "conv" or window < 1):
            raise UsageError(f"window must be at least 1 and is of variant conv only, not {window} of {variant}")
        self.variant = variant
        self.has_state = variant != "full"
        self.window = (32 if window is None else window) if variant == "conv" else 1
        if variant == "conv":
            lags = self.window if shape.causal else 2 * self.window - 1
            self.kernel = nn.Parameter(torch.randn(shape.num_heads, lags))
            self.gain = nn.Parameter(torch.zeros(shape.num_heads, 1))
            self.bias = nn.Parameter(torch.zeros(shape.num_heads, 1))
        elif variant == "full":
            self.of_queries = nn.Parameter(torch.randn(shape.max_len, RANK) * 0.01)
            self.of_keys = nn.Parameter(torch.randn(shape.max_len, RANK) * 0.01)

    def forward(  # type: ignore[override]  # a state goes in and comes out on request
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: AFTState | None = None,
        return_state: bool = False,
    ) -> Tensor | tuple[Tensor, AFTState]:
        """The output [B, H, N, D], and the state after the last token if asked for; see `Attention.forward`."""
        self._check(q, k, v, key_mask, positions)
        stateful = state is not None or return_state
        if stateful and not (self.shape.causal and self.has_state):
            raise UsageError(f"{self.shape.direction} aft of variant {self.variant} has no state of constant size")
        with torch.autocast(q.device.type, enabled=False):
            gate, keys, values = self._prepared(q, k, v, key_mask)
            if stateful:
                state = state or self._empty_state(keys)
                keys, values = torch.cat([state.keys, keys], 2), torch.cat([state.values, values], 2)
            H, N = self.shape.num_heads, q.shape[2]
            every = repeat_heads(keys, H), repeat_heads(values, H)
            if self.shape.causal:
                means = self._causal(*every, self._gains(N, keys, key_mask, positions), N, state)
            else:
                means = self._bidirectional(*every, N, key_mask, positions)
            out = (gate * means).to(q.dtype)
            if state is None or not return_state:
                return out
            return out, self._after(state, keys, values)

    def channel_weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """The weights [B, H, N, M, D] of each channel. They sum to 1 over keys, or to 0 with no key to attend to."""
        self._check(q, k, k, key_mask, positions)
        with torch.autocast(q.device.type, enabled=False):
            _, keys, _ = self._prepared(q, k, k, key_mask)
            N, M = q.shape[2], k.shape[2]
            if self.variant == "full":
                w = self._position_biases(N, keys, key_mask, positions)
            else:
                i, j = (torch.arange(n, device=k.device) for n in (N, M))
                w = self._biases(i[:, None] + (M - N) - j, keys.dtype)[None]
            logits = repeat_heads(keys, self.shape.num_heads)[:, :, None] + w[..., None]
            visible = visible_keys(key_mask, causal=self.shape.causal, num_queries=N, num_keys=M, device=k.device)
            if visible is None:
                return logits.softmax(3)
            blind = ~visible.any(-1, keepdim=True)[..., None]
            logits = logits.masked_fill(~visible[..., None], -torch.inf).masked_fill(blind, 0.0)
            return logits.softmax(3).masked_fill(blind, 0.0)

    def quadratic(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        self._check(q, k, v, key_mask, positions)
        weights = self.channel_weights(q, k, key_mask=key_mask, positions=positions)
        gate, _, values = self._prepared(q, k, v, key_mask)
        means = torch.einsum("bhnmd,bhmd->bhnd", weights, repeat_heads(values, self.shape.num_heads))
        return (gate * means).to(q.dtype)

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant for "simple" and "conv"; for "full" the key-value cache. Float32."""
        if not self.shape.causal:
            return None
        kept = 3 + 2 * (self.window - 1) if self.has_state else 2 * num_tokens
        return batch_size * self.shape.num_kv_heads * self.shape.head_dim * kept * 4

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """Of each channel, the two sums over tokens (simple), over the window's pairs too (conv) or over all pairs
        (full, with the products of positions, which all sequences share).
        """
        H, D, causal = self.shape.num_heads, self.shape.head_dim, self.shape.causal
        if self.variant == "full":
            pairs = num_pairs(num_queries, num_keys, causal=causal)
            return pairs * (2 * RANK + batch_size * 4 * H * D)
        tokens = num_queries if causal else num_keys
        pairs = num_pairs(num_queries, num_keys, causal=causal, window=self.window) if self.variant == "conv" else 0
        return batch_size * H * D * (3 * tokens + 4 * pairs)

    # --- inputs and biases ---

    def _check(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, positions: Tensor | None) -> None:
        check_inputs(self.shape, q, k, v, key_mask, positions)
        if v.shape[3] != q.shape[3]:
            raise UsageError(f"aft gates values by queries: v must be {q.shape[3]} wide like q, not {v.shape[3]}")

    def _prepared(self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """sigmoid(q), keys with padded ones at -inf, and values, in the dtype of the sums."""
        dtype = sum_dtype(q)
        q, k, v = (zero_padding(x.to(dtype), key_mask) for x in (q, k, v))
        return q.sigmoid(), k if key_mask is None else k.masked_fill(~key_mask[:, None, :, None], -torch.inf), v

    def _biases(self, lags: Tensor, dtype: torch.dtype) -> Tensor:
        """w [H or 1, *] at these differences i - j, for simple and conv."""
        if self.variant == "simple":
            return torch.zeros(1, *lags.shape, dtype=dtype, device=lags.device)
        kernel = self.kernel.to(dtype)
        w = self.gain.to(dtype) * layer_norm(kernel, kernel.shape[1:]) + self.bias.to(dtype)
        first = 0 if self.shape.causal else 1 - self.window
        at = w[:, (lags - first).clamp(0, w.shape[1] - 1)]
        return at.masked_fill(lags.abs() >= self.window, 0.0)

    def _position_biases(
        self, num_queries: int, keys: Tensor, key_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """w [B or 1, 1, N, M] at the tokens' positions, for full."""
        B, M, max_len = keys.shape[0], keys.shape[2], self.shape.max_len
        given = positions is not None
        if positions is None:
            rows = 1 if key_mask is None else B
            positions = token_positions(key_mask, batch_size=rows, length=M, device=keys.device)
        if key_mask is not None:
            positions = positions.masked_fill(~key_mask, 0)
        if (given or max_len < M) and int(positions.amax()) >= max_len:
            raise UsageError(
                f"aft of variant full has biases for positions below {max_len}, not {int(positions.amax())}"
            )
        of_queries = self.of_queries.to(keys.dtype)[positions[:, M - num_queries :]]
        return (of_queries @ self.of_keys.to(keys.dtype)[positions].mT)[:, None]

    def _position_gains(
        self, num_queries: int, keys: Tensor, key_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """exp(w), divided by each query's largest, and 0 where it may not see; [B or 1, 1, N, M]."""
        w = self._position_biases(num_queries, keys, key_mask, positions)
        visible = visible_keys(
            key_mask, causal=self.shape.causal, num_queries=num_queries, num_keys=keys.shape[2], device=keys.device
        )
        w = w if visible is None else w.masked_fill(~visible, -torch.inf)
        return (w - finite(w.amax(-1, keepdim=True).detach())).exp()

    # --- sums ---

    def _gains(self, num_queries: int, keys: Tensor, key_mask: Tensor | None, positions: Tensor | None) -> _Gains:
        """Of the causal form."""
        N, extra, one = num_queries, keys.shape[2] - num_queries, keys.new_ones(1, 1)
        if self.variant == "full":
            gains = self._position_gains(N, keys, key_mask, positions)
            size = _power_of_two(N)
            among = pad(gains[..., extra:], (0, size - N, 0, size - N))

            def of_positions(half: int) -> Tensor:
                if not half:
                    return pad(gains[..., :extra], (0, 0, 0, size - N))[:, :, None]
                blocks = among.view(*among.shape[:2], -1, 2 * half, size // half // 2, 2 * half)
                pairs: Tensor = blocks.diagonal(dim1=2, dim2=4).movedim(-1, 2)
                return pairs[..., half:, :half]

            return _Gains(among.diagonal(dim1=-2, dim2=-1), one, of_positions)
        reach = self.window - 1
        row, column = (torch.arange(reach, device=keys.device) for _ in range(2))
        w = self._biases(reach + row[:, None] - column, keys.dtype)
        own = self._biases(torch.zeros(1, dtype=torch.int64, device=keys.device), keys.dtype)
        top = torch.cat([w.flatten(1), own], 1).amax(1).clamp_min(0).detach()
        band = (w - top[:, None, None]).exp()[None, :, None]

        def of_lags(half: int) -> Tensor | None:
            rows, columns = min(half or _power_of_two(N), reach), min(half or extra, reach)
            return band[..., :rows, reach - columns :] if reach else None

        return _Gains((own - top[:, None]).exp()[None], (-top).exp()[None], of_lags)

    def _causal(self, k: Tensor, v: Tensor, gains: _Gains, num_queries: int, state: AFTState | None) -> Tensor:
        """The means of the last N tokens of k and v [B, H, M, D], by halves: what the keys of a left half give to the
        queries of the right half, who see them all, is a product of matrices; then within both halves.

        Every query's sums are divided by exp of the largest key that it sees, `top`.
        """
        ran("halves")
        H, extra, size = k.shape[1], k.shape[2] - num_queries, _power_of_two(num_queries)
        top = k.detach().cummax(2).values[:, :, extra:]
        if state is not None:
            log_max, state_sums = repeat_heads(state.log_max, H), repeat_heads(state.sums, H)
            top = torch.maximum(top, log_max[:, :, None])
        missing = (0, 0, 0, size - num_queries)
        top = pad(finite(top), missing, value=torch.inf)  # the queries that fill up to a power of two get zeros
        own_k, own_v = pad(k[:, :, extra:], missing, value=-torch.inf), pad(v[:, :, extra:], missing)
        sums = _terms(own_k, own_v, top) * gains.own[..., None, None]
        if state is not None:
            old = state_sums * gains.outside[..., None, None]
            sums = sums + old[:, :, None] * (log_max[:, :, None] - top).exp().unsqueeze(-2)
        if extra:
            keys, values = k[:, :, None, :extra], v[:, :, None, :extra]
            sums = sums + _given(keys, values, top[:, :, None], gains.near(0), gains.outside).squeeze(2)
        half = 1
        while half < size:
            tops, keys, values = (x.view(*x.shape[:2], -1, 2 * half, x.shape[3]) for x in (top, own_k, own_v))
            keys, values = keys[:, :, :, :half], values[:, :, :, :half]
            given = _given(keys, values, tops[:, :, :, half:], gains.near(half), gains.outside)
            sums = _AddToRight.apply(sums, given)
            half *= 2
        return _divide(sums[:, :, :num_queries])

    def _bidirectional(
        self, k: Tensor, v: Tensor, num_queries: int, key_mask: Tensor | None, positions: Tensor | None
    ) -> Tensor:
        """The means of the last N tokens. All queries see all keys, so one maximum serves them."""
        M = k.shape[2]
        terms = _terms(k, v, finite(k.amax(2, keepdim=True).detach()))
        if self.variant == "simple":
            return _divide(terms.sum(2, keepdim=True))
        if self.variant == "full":
            gains = self._position_gains(num_queries, k, key_mask, positions)
            return _divide(torch.einsum("bhnm,bhmcd->bhncd", gains, terms))
        reach, blocks = self.window - 1, -(-M // BLOCK)
        span = torch.arange(BLOCK + 2 * reach, device=k.device)
        w = self._biases(span[:BLOCK, None] + reach - span, k.dtype)
        top = w.amax((1, 2)).clamp_min(0).detach()
        padded = pad(terms.flatten(3), (0, 0, reach, reach + blocks * BLOCK - M))
        spans = padded.unfold(2, BLOCK + 2 * reach, BLOCK)
        sums = torch.einsum("hrs,bhncs->bhnrc", (w - top[:, None, None]).exp(), spans)
        sums = sums.view(*sums.shape[:4], 2, -1)
        start = torch.arange(blocks, device=k.device) * BLOCK - reach
        before = pad(terms.cumsum(2), (0, 0, 0, 0, 1, 0))[:, :, start.clamp_min(0)]
        after = pad(terms.flip(2).cumsum(2).flip(2), (0, 0, 0, 0, 0, 1))
        after = after[:, :, (start + BLOCK + 2 * reach).clamp_max(M)]
        sums = sums + ((before + after) * (-top).exp()[:, None, None, None])[:, :, :, None]
        return _divide(sums.flatten(2, 3)[:, :, M - num_queries : M])

    # --- state ---

    def _empty_state(self, keys: Tensor) -> AFTState:
        B, G, _, D = keys.shape
        return AFTState(
            keys.new_full((B, G, D), -torch.inf),
            keys.new_zeros(B, G, 2, D),
            keys.new_full((B, G, self.window - 1, D), -torch.inf),
            keys.new_zeros(B, G, self.window - 1, D),
        )

    def _after(self, state: AFTState, keys: Tensor, values: Tensor) -> AFTState:
        """The state after these tokens, the window's among them."""
        leaving = keys.shape[2] - (self.window - 1)
        gone = keys[:, :, :leaving]
        log_max = torch.maximum(state.log_max, gone.amax(2)).detach()
        top = finite(log_max)
        kept = state.sums * (state.log_max - top).exp().unsqueeze(-2)
        sums = kept + _terms(gone, values[:, :, :leaving], top[:, :, None]).sum(2)
        return AFTState(log_max, sums, keys[:, :, leaving:], values[:, :, leaving:])


class _AddToRight(torch.autograd.Function):
    """sums [B, H, N, 2, D] plus what the right half of each pair of blocks is given, [B, H, n, half, 2, D], in place.

    Torch's own gradient of an addition into a view copies all of the sums.
    """

    @staticmethod
    def forward(ctx: Any, sums: Tensor, given: Tensor) -> Tensor:
        ctx.half = given.shape[3]
        _AddToRight._right(sums, ctx.half).add_(given)
        ctx.mark_dirty(sums)
        return sums

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, _AddToRight._right(grad.contiguous(), ctx.half)

    @staticmethod
    def _right(sums: Tensor, half: int) -> Tensor:
        return sums.view(*sums.shape[:2], -1, 2 * half, *sums.shape[3:])[:, :, :, half:]


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _terms(k: Tensor, v: Tensor, top: Tensor) -> Tensor:
    """exp(k - top) v and exp(k - top), [..., 2, D]."""
    e = (k - top).exp()
    return torch.stack([e * v, e], dim=-2)


def _divide(sums: Tensor) -> Tensor:
    """[..., 2, D] -> [..., D]; zero, with zero gradients, where a query has no key to attend to."""
    numerator, denominator = sums.unbind(-2)
    return numerator / denominator.masked_fill(denominator == 0, 1.0)


def _given(k: Tensor, v: Tensor, top: Tensor, near: Tensor | None, outside: Tensor) -> Tensor:
    """What blocks of keys [B, H, n, L, D] give to rows of queries that see them all, [B, H, n, R, 2, D], divided by
    exp(top) [B, H, n, R, D]. `near` and `outside` are those of `_Gains`.
    """
    own_top = k.amax(3, keepdim=True).detach()
    terms = _terms(k, v, finite(own_top))
    outside = outside[..., None, None, None, None]
    if near is None:
        sums = terms.sum(3, keepdim=True) * outside
    else:
        rows, split = near.shape[-2], k.shape[3] - near.shape[-1]
        far, close = terms[:, :, :, :split], terms[:, :, :, split:]
        sums = torch.einsum("bhnrl,bhnlcd->bhnrcd", near, close)
        rest = (close.sum(3, keepdim=True) * outside).expand(-1, -1, -1, top.shape[3] - rows, -1, -1)
        sums = torch.cat([sums, rest], 3) + far.sum(3, keepdim=True) * outside
    return sums * (own_top - top).exp().unsqueeze(-2)
