"""Linear attention: one sum in three forms.

    output_i = sum_j phi(q_i).phi(k_j) v_j / sum_j phi(q_i).phi(k_j)        j <= i if causal, attended keys only

(Katharopoulos et al. 2020.) The quadratic form writes the weights out and is the truth. The chunked form
carries the two sums from chunk to chunk, in O(N) time and memory. The recurrent form takes one token at a time. All
three agree to rounding, outputs and gradients.

Two things are decided here and nowhere else:

Precision. Features, sums and normaliser are float32 for inputs of 32 bits or fewer, float64 for float64, under
autocast too: a running sum in bfloat16 stops growing at 256 equal terms.

Scale. Features are floored at `FLOOR`, and the keys of exponential maps come with a log scale: the sums carry the
running maximum of the log scales of the keys seen so far and are rescaled as it grows. It never looks at a later or
a padded key, and it cancels in the quotient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hhbench.attention import (
    Attention,
    FeatureMap,
    MixerShape,
    check_inputs,
    repeat_heads,
    shape_for_keys,
    token_positions,
    zero_padding,
)
from hhbench.errors import UsageError, unknown_name

FLOOR = 1e-12
CHUNK = 128
FORMS = ("auto", "quadratic", "chunked", "recurrent")


@dataclass(frozen=True)
class LinearState:
    """What a causal linear attention remembers of any number of tokens. G is H unless a state serves a group of heads.

    Attributes:
        values: sum of phi(k) v^T, [B, G, F, E].
        keys: sum of phi(k), [B, G, F].
        log_max: the running maximum of the keys' log scales, [B, G]; both sums are divided by its exponential.
        num_attended: attended tokens so far, int64 [B]; the next one's position.
    """

    values: Tensor
    keys: Tensor
    log_max: Tensor
    num_attended: Tensor

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.values, self.keys, self.log_max, self.num_attended))


@dataclass(frozen=True)
class _Keys:
    """Mapped keys with padded ones already zero. Features [..., N, F], values [..., N, E], log_scale [..., N]."""

    features: Tensor
    values: Tensor
    log_scale: Tensor | None

    def __getitem__(self, tokens: slice) -> "_Keys":
        scale = None if self.log_scale is None else self.log_scale[..., tokens]
        return _Keys(self.features[..., tokens, :], self.values[..., tokens, :], scale)


@dataclass(frozen=True)
class _Sums:
    """The two running sums, divided by exp(log_max)."""

    values: Tensor  # [..., F, E]
    keys: Tensor  # [..., F]
    log_max: Tensor  # [...]

    def add(self, keys: _Keys) -> "_Sums":
        """The sums after these keys."""
        if keys.log_scale is None:
            return _Sums(self.values + keys.features.mT @ keys.values, self.keys + keys.features.sum(-2), self.log_max)
        log_max = torch.maximum(self.log_max, keys.log_scale.amax(-1)).detach()
        kept = (self.log_max - _finite(log_max)).exp()
        features = keys.features * (keys.log_scale - _finite(log_max)[..., None]).exp()[..., None]
        return _Sums(
            self.values * kept[..., None, None] + features.mT @ keys.values,
            self.keys * kept[..., None] + features.sum(-2),
            log_max,
        )


def _finite(log_max: Tensor) -> Tensor:
    """0 where no key was seen yet, so that exp(-inf - log_max) is 0 and not NaN."""
    return log_max.masked_fill(log_max == -torch.inf, 0.0)


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; zero, with zero gradients, where a query has no key to attend to."""
    return numerator / denominator.masked_fill(denominator == 0, 1.0)[..., None]


def _running_max(keys: _Keys, start: Tensor) -> Tensor:
    assert keys.log_scale is not None
    return torch.maximum(start[..., None], keys.log_scale.cummax(-1).values).detach()


def _relative_scale(log_scale: Tensor, top: Tensor) -> Tensor:
    """exp(log_scale_j - top_i), [..., N, M].

    Keys that a causal query must not see may lie above its maximum: theirs is kept finite, at 1. Not by a clamp, whose
    gradient at its bound, where the largest key lies, is 0 in some versions of torch and 1 in others.
    """
    relative = log_scale[..., None, :] - top[..., None]
    return relative.masked_fill(relative > 0, 0.0).exp()


def quadratic_scores(queries: Tensor, keys: _Keys, *, causal: bool) -> Tensor:
    """phi(q_i).phi(k_j) for every pair that may meet, [..., N, M], each row up to a factor; the other pairs are 0."""
    num_queries, num_keys = queries.shape[-2], keys.features.shape[-2]
    scores = queries @ keys.features.mT
    if keys.log_scale is not None:
        if causal:
            top = keys.log_scale.cummax(-1).values[..., num_keys - num_queries :].detach()
        else:
            top = keys.log_scale.amax(-1, keepdim=True).detach().expand(*keys.log_scale.shape[:-1], num_queries)
        scores = scores * _relative_scale(keys.log_scale, _finite(top))
    return scores.tril(num_keys - num_queries) if causal else scores


def quadratic(queries: Tensor, keys: _Keys, *, causal: bool) -> Tensor:
    """The sum with its weights written out: O(N M) memory, and the truth for the other forms."""
    scores = quadratic_scores(queries, keys, causal=causal)
    return _divide(scores @ keys.values, scores.sum(-1))


def chunked(queries: Tensor, keys: _Keys, sums: _Sums | None, *, chunk_size: int = CHUNK) -> Tensor:
    """The causal sum, quadratic within a chunk and by running sums across chunks: O(N) time and memory."""
    outputs = []
    num_tokens = queries.shape[-2]
    for start in range(0, num_tokens, chunk_size):
        tokens = slice(start, start + chunk_size)
        q, chunk = queries[..., tokens, :], keys[tokens]
        scores = q @ chunk.features.mT
        if chunk.log_scale is not None:
            before = (
                sums.log_max if sums is not None else chunk.log_scale.new_full(chunk.log_scale.shape[:-1], -torch.inf)
            )
            top = _finite(_running_max(chunk, before))
            scores = scores * _relative_scale(chunk.log_scale, top)
            q = q * (before[..., None] - top).exp()[..., None]
        scores = scores.tril()
        numerator, denominator = scores @ chunk.values, scores.sum(-1)
        if sums is not None:
            numerator = numerator + q @ sums.values
            denominator = denominator + (q @ sums.keys[..., None]).squeeze(-1)
        outputs.append(_divide(numerator, denominator))
        if start + chunk_size < num_tokens:
            sums = (sums or _empty_sums(chunk)).add(chunk)
    return torch.cat(outputs, dim=-2) if len(outputs) > 1 else outputs[0]


def recurrent(queries: Tensor, keys: _Keys, sums: _Sums | None) -> tuple[Tensor, _Sums]:
    """The causal sum one token at a time, as decoding does it, and the sums after the last token."""
    sums = sums or _empty_sums(keys)
    outputs = []
    for i in range(queries.shape[-2]):
        token = slice(i, i + 1)
        sums = sums.add(keys[token])
        q = queries[..., token, :]
        outputs.append(_divide(q @ sums.values, (q @ sums.keys[..., None]).squeeze(-1)))
    return torch.cat(outputs, dim=-2), sums


def bidirectional(queries: Tensor, keys: _Keys) -> Tensor:
    """The sum over all attended keys, by two matrix products: O(N F E)."""
    sums = _empty_sums(keys).add(keys)
    return _divide(queries @ sums.values, (queries @ sums.keys[..., None]).squeeze(-1))


def _empty_sums(keys: _Keys) -> _Sums:
    lead, F, E = keys.features.shape[:-2], keys.features.shape[-1], keys.values.shape[-1]
    return _Sums(
        keys.features.new_zeros(*lead, F, E),
        keys.features.new_zeros(*lead, F),
        keys.features.new_full(lead, -torch.inf if keys.log_scale is not None else 0.0),
    )


class LinearAttention(Attention):
    """Attention through a pair of feature maps. The maps are the attention's own; the sum is this module's.

    Args:
        shape: where it sits.
        make_map: makes a feature map for a shape.
        tie_qk: one map for queries and keys.
        share_kv_heads: with grouped queries, one key map and one state per key-value head. By default keys are
            repeated before the map, so that every query head has its own.

    Attributes:
        floored_rows: query and key rows whose features all lay at or below FLOOR, counted in evaluation mode: such
            a query attends evenly, such a key is hardly seen.
    """

    floored_rows: Tensor

    def __init__(
        self,
        shape: MixerShape,
        make_map: Callable[[MixerShape], FeatureMap],
        *,
        tie_qk: bool = False,
        share_kv_heads: bool = False,
    ) -> None:
        super().__init__(shape)
        self.share_kv_heads = share_kv_heads and shape.num_kv_heads < shape.num_heads
        if tie_qk and self.share_kv_heads:
            raise UsageError("tie_qk needs a key map per query head; share_kv_heads has one per key-value head")
        self.query_map = make_map(shape)
        self.key_map = self.query_map if tie_qk else make_map(shape_for_keys(shape) if self.share_kv_heads else shape)
        self.register_buffer("floored_rows", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(  # type: ignore[override]  # a state goes in and comes out on request
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
        state: LinearState | None = None,
        return_state: bool = False,
        form: str = "auto",
    ) -> Tensor | tuple[Tensor, LinearState]:
        """The output [B, H, N, E], and the state after the last token if asked for.

        Args:
            state: what a causal attention remembers of earlier tokens; q, k and v then continue them.
            return_state: return (output, state).
            form: "quadratic", "chunked" or "recurrent"; "auto" takes the cheapest for the shape.
            For the others see `Attention.forward`.
        """
        check_inputs(self.shape, q, k, v, key_mask)
        if form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if (state is not None or return_state) and not self.shape.causal:
            raise UsageError("a bidirectional attention has no state: later tokens change earlier outputs")
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, attended = self._mapped(q, k, v, key_mask, positions, state)
            sums = self._sums(state)
            extra = k.shape[2] - q.shape[2]
            if extra and self.shape.causal:  # keys before the first query: a cache holds tokens that came earlier
                sums = (sums or _empty_sums(keys)).add(keys[slice(0, extra)])
                keys = keys[slice(extra, None)]
            if not self.shape.causal:
                out = self._bidirectional(queries, keys, form)
            elif form == "quadratic" and sums is None:
                out = quadratic(queries, keys, causal=True)
            elif form == "recurrent" or (form == "auto" and q.shape[2] == 1):
                out, sums = recurrent(queries, keys, sums)
                keys = keys[slice(0, 0)]
            else:
                out = chunked(queries, keys, sums, chunk_size=q.shape[2] if form == "quadratic" else CHUNK)
            out = out.reshape(*q.shape[:3], v.shape[3]).to(q.dtype)
            if not return_state:
                return out
            sums = sums or _empty_sums(keys)
            return out, self._state(sums.add(keys) if keys.features.shape[-2] else sums, attended)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        check_inputs(self.shape, q, k, None, key_mask)
        with torch.autocast(q.device.type, enabled=False):
            queries, keys, _ = self._mapped(q, k, k, key_mask, positions, None)
            scores = quadratic_scores(queries, keys, causal=self.shape.causal)
            return _divide(scores, scores.sum(-1)).reshape(*q.shape[:3], k.shape[2])

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant in the number of tokens: (F E + F + 1) float32 for each state, and one counter a sequence."""
        del num_tokens
        if not self.shape.causal:
            return None
        heads = self.shape.num_kv_heads if self.share_kv_heads else self.shape.num_heads
        F, E = self.key_map.feature_dim, self.shape.head_dim
        return batch_size * (heads * (F * E + F + 1) * 4 + 8)

    def _bidirectional(self, queries: Tensor, keys: _Keys, form: str) -> Tensor:
        N, M = queries.shape[-2], keys.features.shape[-2]
        F, E = keys.features.shape[-1], keys.values.shape[-1]
        if form == "recurrent":
            raise UsageError("a bidirectional attention has no recurrent form")
        if form == "quadratic" or (form == "auto" and N * M * (F + E) <= (N + M) * F * E):
            return quadratic(queries, keys, causal=False)
        return bidirectional(queries, keys)

    def _mapped(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        positions: Tensor | None,
        state: LinearState | None,
    ) -> tuple[Tensor, _Keys, Tensor]:
        """Mapped queries, mapped keys, and the number of attended tokens [B] so far."""
        B, num_keys = k.shape[0], k.shape[2]
        attended = torch.full((B,), num_keys, device=k.device) if key_mask is None else key_mask.sum(-1)
        if positions is None:
            positions = token_positions(key_mask, batch_size=B, length=num_keys, device=k.device)
            if state is not None:
                positions = positions + state.num_attended[:, None]
        if state is not None:
            attended = attended + state.num_attended
        dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = (zero_padding(x.to(dtype), key_mask) for x in (q, k, v))
        if not self.share_kv_heads:
            k, v = repeat_heads(k, self.shape.num_heads), repeat_heads(v, self.shape.num_heads)
        queries = self.query_map.map_queries(q, positions=positions[:, num_keys - q.shape[2] :])
        features, log_scale = self.key_map.map_keys(k, positions=positions, key_mask=key_mask)
        if not self.training:
            self._count_floored(queries, features, key_mask)
        queries, features = queries.clamp_min(FLOOR), features.clamp_min(FLOOR)
        if key_mask is not None:
            padded = ~key_mask[:, None, :]
            features = features.masked_fill(padded[..., None], 0.0)
            log_scale = None if log_scale is None else log_scale.masked_fill(padded, -torch.inf)
        if self.share_kv_heads:  # heads of a group become a dimension over which keys broadcast
            queries = queries.reshape(B, self.shape.num_kv_heads, -1, *queries.shape[2:])
            features, v = features.unsqueeze(2), v.unsqueeze(2)
            log_scale = None if log_scale is None else log_scale.unsqueeze(2)
        return queries, _Keys(features, v, log_scale), attended

    @torch.no_grad()
    def _count_floored(self, queries: Tensor, features: Tensor, key_mask: Tensor | None) -> None:
        for rows in (queries, features):
            dead = rows.amax(-1) <= FLOOR
            if key_mask is not None:
                dead = dead & key_mask[:, None, -dead.shape[2] :]
            self.floored_rows += dead.sum()

    def _sums(self, state: LinearState | None) -> _Sums | None:
        if state is None:
            return None
        grouped = self.share_kv_heads
        values, keys, log_max = state.values, state.keys, state.log_max
        return (
            _Sums(values.unsqueeze(2), keys.unsqueeze(2), log_max.unsqueeze(2))
            if grouped
            else _Sums(values, keys, log_max)
        )

    def _state(self, sums: _Sums, attended: Tensor) -> LinearState:
        if self.share_kv_heads:
            sums = _Sums(sums.values.squeeze(2), sums.keys.squeeze(2), sums.log_max.squeeze(2))
        return LinearState(sums.values, sums.keys, sums.log_max, attended)
