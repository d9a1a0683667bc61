"""Hedgehog beyond a sliding window, softmax within it: LoLCATs' hybrid."""

import copy
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from hhbench.attention import (
    Attention,
    MixerShape,
    check_inputs,
    refuse_state_unless_causal,
    register_attention,
    repeat_heads,
    sum_dtype,
    zero_padding,
)
from hhbench.baselines.hedgehog import Hedgehog
from hhbench.errors import UsageError, unknown_name
from hhbench.kernels import ran
from hhbench.linear_sum import FORMS, divide
from hhbench.window import (
    Blocks,
    WindowState,
    after_ring,
    check_window,
    distances,
    far,
    last_attended,
    near,
    num_pairs,
)

GATE = 0.1  # g to begin with: LoLCATs' released configurations start its logit at -2.1972
DENSE = 2.5  # with at most so many slabs' keys, all pairs at once are faster


@dataclass(frozen=True)
class HybridState(WindowState):
    """The last w attended tokens, and the linear sum over those before them.

    Attributes:
        sums: sum of phi(k) [v, 1]^T over the tokens that left the ring, [B, H, F, E + 1].
    """

    sums: Tensor


@register_attention(paper="Zhang et al. 2024b (LoLCATs, arXiv 2410.10254), eq. 7", cost="N (w D + F E)")
class HedgehogWindow(Attention):
    """weights_ij = a_ij / sum_j a_ij, with one sum over both kinds of keys:

        a_ij = g exp(scale q_i.k_j - c_i)    where |i - j| < w (causal: i - w < j <= i)
        a_ij = phi_q(q_i).phi_k(k_j)         where a key lies further off (causal: j <= i - w)

    c_i is the maximum of scale q_i.k_j over exactly the keys of the first line, so exp never overflows. It does not
    cancel, for the second line lacks it: it is part of the function and of its gradient. phi is Hedgehog's softmax map,
    its features at or above FLOOR. g = sigmoid(gate_logit), one for each head, begins at 0.1.

    i and j count attended tokens, whatever `positions` are (but see `weights`). Bidirectional, which LoLCATs has not,
    the far keys are those before the window and those after it. No weights are dropped out.

    LoLCATs' linear_window_attention_sw has the same causal window (w tokens, the query's own among them) and the same
    gradient through c_i. Where it differs:

    - Its released maps begin at a Kaiming draw and are half as wide; ours begin at the identity, as Hedgehog's do.
    - It knows no padding: a padded key is a key.
    - In pieces, a sequence is another function there. Keys of an earlier piece are far, however near they lie, and the
      sums that it decodes from lack the last w keys of every piece but the last. Here the pieces are the whole.

    LoLCATs' own results are of its "terraced" window, w + 1 to 2 w tokens in blocks, which this is not.

    Args:
        window: w.
        feature_dim: the width of each half of phi; the head width by default.
    """

    has_state = True
    ordered_by_positions = True

    def __init__(self, shape: MixerShape, *, window: int = 64, feature_dim: int | None = None) -> None:
        super().__init__(shape)
        self.window = check_window(window)
        self.query_map = Hedgehog(shape, feature_dim=feature_dim)
        self.key_map = copy.deepcopy(self.query_map)  # alike to begin with, as in LinearAttention
        self.gate_logit = nn.Parameter(torch.full((shape.num_heads,), math.log(GATE / (1 - GATE))))

    def forward(  # type: ignore[override]  # a state goes in and comes out on request
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: HybridState | None = None,
        return_state: bool = False,
        form: str = "auto",
    ) -> Tensor | tuple[Tensor, HybridState]:
        """See `LinearAttention.forward`: the same forms, the same use of a state."""
        check_inputs(self.shape, q, k, v, key_mask, positions)
        if form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if state is not None or return_state:
            refuse_state_unless_causal(self.shape)
        if form == "recurrent" and not self.shape.causal:
            raise UsageError("a bidirectional attention has no recurrent form")
        dtype = q.dtype
        with torch.autocast(q.device.type, enabled=False):
            q, k, v = _prepared(key_mask, q, k, v)
            if form == "recurrent" or (form == "auto" and state is not None and q.shape[2] == 1):
                earlier = k.shape[2] - q.shape[2]
                past, new = (slice(0, earlier), slice(earlier, None))
                mask = (None, None) if key_mask is None else (key_mask[:, past], key_mask[:, new])
                state = self._after(state, k[:, :, past], v[:, :, past], mask[0])
                out, state = self._one_by_one(q, k[:, :, new], v[:, :, new], mask[1], state)
                return (out.to(dtype), state) if return_state else out.to(dtype)
            keys, values, mask_of_all = (k, v, key_mask) if state is None else state.before(k, v, key_mask)
            sums = None if state is None else state.sums
            out = self._at_once(q, keys, values, mask_of_all, sums, form).to(dtype)
            return (out, self._after(state, k, v, key_mask)) if return_state else out

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        """See `Attention.weights`. Bidirectional, `positions` say where tokens stand that come in another order."""
        check_inputs(self.shape, q, k, None, key_mask, positions)
        with torch.autocast(q.device.type, enabled=False):
            q, k = _prepared(key_mask, q, k)
            k = repeat_heads(k, self.shape.num_heads)
            fq, fk = self._features(self.query_map, q), self._features(self.key_map, k)
            scores = self._all_scores(q, fq, k, fk, key_mask, None if self.shape.causal else positions)
            return divide(scores, scores.sum(-1))

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant in the number of tokens, in float32: keys and values of w tokens, the F (E + 1) sums of each head,
        and one counter a sequence.
        """
        del num_tokens
        if not self.shape.causal:
            return None
        ring = self.window * self.shape.num_kv_heads * self.shape.head_dim * 2
        sums = self.shape.num_heads * int(self.key_map.feature_dim) * (self.shape.head_dim + 1)
        return batch_size * ((ring + sums) * 4 + 8)

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """Softmax's pairs within the window; beyond it the maps, and pairs or sums, whichever is less."""
        H, E, causal, F = self.shape.num_heads, self.shape.head_dim, self.shape.causal, int(self.key_map.feature_dim)
        pairs = num_pairs(num_queries, num_keys, causal=causal, window=self.window)
        total = 2 * H * pairs * (self.shape.head_dim + E + 1)
        if beyond := num_pairs(num_queries, num_keys, causal=causal) - pairs:
            new = num_queries if causal else num_keys  # of the keys: as many leave the window
            by_sums = 2 * H * F * (E + 1) * (new + num_queries)
            total += self.query_map.flops(num_queries) + self.key_map.flops(new)
            total += min(2 * H * beyond * (F + E + 1), by_sums)
        return batch_size * total

    def _features(self, feature_map: Hedgehog, x: Tensor) -> Tensor:
        positions = torch.zeros(x.shape[0], x.shape[2], dtype=torch.int64, device=x.device)  # the map needs none
        features: Tensor = feature_map.map_queries(x, positions=positions)
        return features

    def _near_scores(self, q: Tensor, k: Tensor, visible: Tensor) -> Tensor:
        """g exp(scale q.k - c), 0 where not visible. q [B, H, ..., N, D], k [B, H, ..., M, D]."""
        scores = (q @ k.mT * self.shape.scale).masked_fill(~visible, -torch.inf)
        top = scores.amax(-1, keepdim=True)
        top = top.masked_fill(top == -torch.inf, 0.0)  # nothing visible: exp(-inf - 0) is 0
        gate = self.gate_logit.to(q.dtype).sigmoid().view(-1, *[1] * (q.ndim - 2))
        return gate * (scores - top).exp()

    def _scores(
        self, q: Tensor, fq: Tensor, k: Tensor, fk: Tensor, distance: Tensor, attended: Tensor | None
    ) -> Tensor:
        """a for queries and keys at these distances, which broadcast."""
        visible = [f(distance, self.window, causal=self.shape.causal) for f in (near, far)]
        if attended is not None:
            visible = [v & attended for v in visible]
        # All tokens may be near. The far part is computed even so: a parameter without a gradient stops DDP.
        return self._near_scores(q, k, visible[0]) + (fq @ fk.mT).masked_fill(~visible[1], 0.0)

    def _all_scores(
        self,
        q: Tensor,
        fq: Tensor,
        k: Tensor,
        fk: Tensor,
        key_mask: Tensor | None,
        positions: Tensor | None = None,
    ) -> Tensor:
        distance, attended = distances(
            key_mask,
            causal=self.shape.causal,
            num_queries=q.shape[2],
            num_keys=k.shape[2],
            device=q.device,
            positions=positions,
        )
        return self._scores(q, fq, k, fk, distance[:, None], None if attended is None else attended[:, None])

    def _at_once(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, sums: Tensor | None, form: str
    ) -> Tensor:
        """The quadratic or the chunked form. `sums` are those of tokens before the keys."""
        H, causal, num_queries, num_keys = self.shape.num_heads, self.shape.causal, q.shape[2], k.shape[2]
        k, v = repeat_heads(k, H), _with_one(repeat_heads(v, H))
        fq, fk = self._features(self.query_map, q), self._features(self.key_map, k)
        length = Blocks.slab_length(self.window, causal=causal, num_queries=num_queries, num_keys=num_keys)
        if form == "quadratic" or (form == "auto" and num_keys <= DENSE * length):
            ran("dense")
            out = self._all_scores(q, fq, k, fk, key_mask) @ v
            return _quotient(out if sums is None else out + fq @ sums)
        ran("blocks")
        blocks = Blocks.of(
            key_mask, self.window, causal=causal, num_queries=num_queries, num_keys=num_keys, device=q.device
        )
        old = slice(0, num_keys - num_queries)
        first = fk[:, :, old].masked_fill(~blocks.before[:, None, old, None], 0.0).mT @ v[:, :, old]
        first = first if sums is None else first + sums
        q, fq, k, v, fk = blocks.queries(q), blocks.queries(fq), blocks.keys(k), blocks.keys(v), blocks.keys(fk)
        inside = blocks.inside[:, None, :, None]
        out = self._scores(q, fq, k, fk, blocks.distance[:, None], inside) @ v
        fk = fk.masked_fill(~blocks.inside[:, None, ..., None], 0.0)
        out = out + fq @ self._sums_before(blocks, fk, v, first)
        if not causal:
            out = out + fq @ self._sums_after(blocks, fk, v)
        return _quotient(blocks.join(out))

    @staticmethod
    def _sums_before(blocks: Blocks, fk: Tensor, v: Tensor, first: Tensor) -> Tensor:
        """Sums over the keys before each slab, [B, H, n, F, E + 1]. A slab's first keys are not in the next one."""
        step = blocks.step[:, None, :, None, None]
        leaving = torch.arange(blocks.size, device=fk.device)[:, None] < step
        fk, v = fk[:, :, :-1, : blocks.size], v[:, :, :-1, : blocks.size]
        sums = fk.masked_fill(~leaving, 0.0).mT @ v
        return torch.cat([first[:, :, None], sums], 2).cumsum(2)

    @staticmethod
    def _sums_after(blocks: Blocks, fk: Tensor, v: Tensor) -> Tensor:
        """Sums over the keys after each slab. A slab's last keys are not in the one before it; after the last are none.

        A sum of its own, not the total without the rest: where few keys are left, the difference would be rounding.
        """
        step = blocks.step[:, None, :, None, None]
        entering = torch.arange(blocks.size, 0, -1, device=fk.device)[:, None] <= step
        fk, v = fk[:, :, 1:, -blocks.size :], v[:, :, 1:, -blocks.size :]
        sums = fk.masked_fill(~entering, 0.0).mT @ v
        return pad(sums, (0, 0, 0, 0, 0, 1)).flip(2).cumsum(2).flip(2)

    def _after(self, state: HybridState | None, k: Tensor, v: Tensor, key_mask: Tensor | None) -> HybridState:
        """The state after these keys: those that no longer fit the ring go to the sums."""
        k, v, key_mask, num_attended = after_ring(state, k, v, key_mask)
        w, H = self.window, self.shape.num_heads
        old = slice(0, max(k.shape[2] - w, 0))  # the last w are in the ring whatever is padded
        fk = self._features(self.key_map, repeat_heads(k[:, :, old], H))
        if key_mask is not None:
            gone = key_mask & (key_mask.sum(-1, keepdim=True) - key_mask.cumsum(-1) >= w)
            fk = fk.masked_fill(~gone[:, None, old, None], 0.0)
        sums = fk.mT @ _with_one(repeat_heads(v[:, :, old], H))
        if state is not None:
            sums = state.sums + sums
        return HybridState(last_attended(k, key_mask, w), last_attended(v, key_mask, w), num_attended, sums)

    def _one_by_one(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, state: HybridState
    ) -> tuple[Tensor, HybridState]:
        """The recurrent form. One token's cost is O(w D + F E): the key that leaves the ring is the only one mapped."""
        ran("recurrent")
        H, fq, outputs = self.shape.num_heads, self._features(self.query_map, q), []
        for i in range(q.shape[2]):
            token = slice(i, i + 1)
            state = self._after(state, k[:, :, token], v[:, :, token], None if key_mask is None else key_mask[:, token])
            ring_keys, ring_values = repeat_heads(state.ring_keys, H), repeat_heads(state.ring_values, H)
            scores = self._near_scores(q[:, :, token], ring_keys, state.filled[:, None, None])
            outputs.append(_quotient(scores @ _with_one(ring_values) + fq[:, :, token] @ state.sums))
        return torch.cat(outputs, 2), state


def _prepared(key_mask: Tensor | None, *tensors: Tensor) -> list[Tensor]:
    """In float32 for 32 bits or fewer and float64 for float64, with zeros at padded tokens."""
    dtype = sum_dtype(tensors[0])
    return [zero_padding(x.to(dtype), key_mask) for x in tensors]


def _with_one(v: Tensor) -> Tensor:
    """[v, 1], so that one sum holds numerator and normaliser."""
    return pad(v, (0, 1), value=1.0)


def _quotient(out: Tensor) -> Tensor:
    return divide(out[..., :-1], out[..., -1])
