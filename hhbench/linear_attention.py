"""Linear attention as a module: feature maps, and around the sum groups of heads, padding, positions and state.

It picks the form: of `hhbench.linear_sum`, of `hhbench.blockwise`, of `hhbench.flash_linear`, or what a feature map
computes on its own.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable

import torch
from torch import Tensor, nn

from hhbench import blockwise, flash_linear
from hhbench.blockwise import CACHED, LARGE, Job, Size
from hhbench.chunkwise import AtOnce, Chunks, OneByOne
from hhbench.contracts import (
    Attention,
    FeatureMap,
    MixerShape,
    check_inputs,
    refuse_state_unless_causal,
    repeat_heads,
    sum_dtype,
    token_positions,
    without_autocast,
    zero_padding,
)
from hhbench.errors import UsageError, unknown_name
from hhbench.kernels import ran
from hhbench.linear_sum import (
    CHUNK,
    FLOOR,
    FORMS,
    Keys,
    LinearState,
    Sums,
    bidirectional,
    chunked,
    divide,
    empty_sums,
    quadratic,
    quadratic_scores,
    recurrent,
    step,
)
from hhbench.window import num_pairs


class LinearAttention(Attention):
    """Attention through a pair of feature maps. The maps are the attention's own; the sum is hhbench's.

    Features, sums and normaliser are float32 for inputs of 32 bits or fewer and float64 for float64, under autocast
    too: a running sum in bfloat16 stops growing at 256 equal terms. What is multiplied is rounded to bfloat16, and
    added up in float32, where inputs are bfloat16 and the device multiplies it faster: an accelerator, and a CPU's AMX
    where `hhbench.native` was asked for.

    Args:
        shape: where it sits.
        make_map: makes a feature map for a shape.
        tie_qk: one map for queries and keys.
        share_kv_heads: with grouped queries, one key map and one state per key-value head. By default keys are
            repeated before the map, so that every query head has its own.

    Attributes:
        floored_rows: query and key rows whose features all lay at or below FLOOR, counted in evaluation mode, but
            for tokens that are decoded without a mask: such a query attends evenly, such a key is hardly seen.
    """

    has_state = True
    ordered_by_positions = True
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
        self.query_map = make_map(shape)
        if tie_qk and self.share_kv_heads and not self.query_map.tied:
            raise UsageError("tie_qk needs a key map per query head; share_kv_heads has one per key-value head")
        if tie_qk or self.query_map.tied:
            self.key_map = self.query_map
        elif self.share_kv_heads:
            self.key_map = make_map(shape_for_keys(shape))
        else:  # a random map starts alike for both: two draws would know nothing of q.k
            self.key_map = copy.deepcopy(self.query_map)
        self.register_buffer("floored_rows", torch.zeros((), dtype=torch.int64), persistent=False)
        # What maps don't state, found out when it first matters:
        self._draws: bool | None = None  # random numbers, while training
        self._scales_keys: bool | None = None  # log scales

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
        check_inputs(self.shape, q, k, v, key_mask, positions)
        if form not in FORMS:
            raise unknown_name("form", form, FORMS)
        if state is not None or return_state:
            refuse_state_unless_causal(self.shape)
        with without_autocast(q.device):
            if (
                state is not None
                and key_mask is None
                and q.shape[2] == k.shape[2] == 1
                and form in ("auto", "recurrent")
            ):
                out, state = self._step(q, k, v, positions, state)
                return (out, state) if return_state else out
            if form == "auto" and state is None and not return_state and 1 < q.shape[2] == k.shape[2]:
                whole = self.query_map.fused(self.key_map, q, k, v, causal=self.shape.causal, key_mask=key_mask)
                if whole is not None:
                    return whole
            attended = self._attended(k, key_mask, state) if return_state else None
            if positions is None:
                positions = self._positions(k, key_mask, state)
            sums = self._sums(state)
            extra = k.shape[2] - q.shape[2] if self.shape.causal else 0
            if extra:  # keys before the first query: a cache holds tokens that came earlier
                old, new = slice(0, extra), slice(extra, None)
                mask = None if key_mask is None else key_mask[:, old]
                sums = self._after(sums, self._mapped_keys(k[:, :, old], v[:, :, old], mask, positions[:, old]))
                k, v, positions = k[:, :, new], v[:, :, new], positions[:, new]
                key_mask = None if key_mask is None else key_mask[:, new]
            out, sums = self._sum(q, k, v, key_mask, positions, sums, form, need_sums=return_state)
            if not return_state:
                return out
            assert sums is not None and attended is not None
            return out, LinearState(sums.values, sums.keys, sums.log_max, attended)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        check_inputs(self.shape, q, k, None, key_mask, positions)
        with without_autocast(q.device):
            if positions is None:
                positions = self._positions(k, key_mask, None)
            queries, keys = self._mapped(q, k, k, key_mask, positions)
            scores = quadratic_scores(queries, keys, causal=self.shape.causal)
            return divide(scores, scores.sum(-1)).reshape(*q.shape[:3], k.shape[2])

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        """Constant in the number of tokens: (F E + F + 1) float32 for each state, and one counter a sequence."""
        del num_tokens
        if not self.shape.causal:
            return None
        heads = self.shape.num_kv_heads if self.share_kv_heads else self.shape.num_heads
        F, E = self.key_map.feature_dim, self.shape.head_dim
        return batch_size * (heads * (F * E + F + 1) * 4 + 8)

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int:
        """The maps, and then the pairs of tokens one by one or the sums F (E + 1), whichever is less."""
        H, E, causal = self.shape.num_heads, self.shape.head_dim, self.shape.causal
        F, state_heads = self.key_map.feature_dim, self.shape.num_kv_heads if self.share_kv_heads else H
        new = num_queries if causal else num_keys  # of the keys
        by_pairs = 2 * H * num_pairs(num_queries, num_keys, causal=causal) * (F + E + 1)
        by_sums = 2 * F * (E + 1) * (state_heads * new + H * num_queries)
        return batch_size * (self.query_map.flops(num_queries) + self.key_map.flops(new) + min(by_pairs, by_sums))

    def map_queries(
        self, q: Tensor, *, positions: Tensor, key_mask: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """Features [B, H, N, F] as the sum takes them: in its type, at or above the floor. See `blockwise.Maps`."""
        q = zero_padding(q.to(sum_dtype(q)), key_mask)
        if out is not None and self.query_map.map_into(q, out):
            return out
        return self._floored(self.query_map.map_queries(q, positions=positions), key_mask, out)

    def map_keys(
        self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Features [B, H, N, F] and log scales [B, H, N] of keys likewise; padded ones 0 and -inf."""
        if not self.share_kv_heads:
            return self._map_keys(k, positions, key_mask, out)
        features, log_scale = self._map_keys(k, positions, key_mask)
        group = self.shape.num_heads // self.shape.num_kv_heads
        return (
            features.repeat_interleave(group, 1),
            None if log_scale is None else log_scale.repeat_interleave(group, 1),
        )

    def map_values(self, v: Tensor, *, key_mask: Tensor | None) -> Tensor:
        """Values [B, H, N, E] in the type of the sum, padded ones 0."""
        return repeat_heads(zero_padding(v.to(sum_dtype(v)), key_mask), self.shape.num_heads)

    def _map_keys(
        self, k: Tensor, positions: Tensor, key_mask: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Of every head that has a key map: [B, G, N, F] where they share it."""
        k = zero_padding(k.to(sum_dtype(k)), key_mask)
        if not self.share_kv_heads:
            k = repeat_heads(k, self.shape.num_heads)
        if out is not None and self.key_map.map_into(k, out):
            features, log_scale = out, None
        else:
            features, log_scale = self.key_map.map_keys(k, positions=positions, key_mask=key_mask)
            features = self._floored(features, key_mask, out)
        if key_mask is None:
            return features, log_scale
        padded = ~key_mask[:, None, :]
        features = (features.masked_fill_ if features is out else features.masked_fill)(padded[..., None], 0.0)
        return features, None if log_scale is None else log_scale.masked_fill(padded, -torch.inf)

    def _floored(self, features: Tensor, key_mask: Tensor | None, out: Tensor | None) -> Tensor:
        if self.query_map.signed or self.query_map.floored:
            return features
        if not self.training:
            self._count_floored(features, key_mask)
        return torch.clamp_min(features, FLOOR, out=out if out is not None and out.shape == features.shape else None)

    def _step(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor | None, state: LinearState
    ) -> tuple[Tensor, LinearState]:
        """The output for one attended token and the state after it, in as few operations as it takes.

        Their number is the time of decoding: so little is computed in each.
        """
        query_map, key_map, dtype, wide = self.query_map, self.key_map, q.dtype, sum_dtype(q)
        if self.training:
            query_map.begin_pass()
        found = query_map.fused_step(key_map, q, k, v, state)
        if found is None:
            ran("recurrent")
            if positions is None:
                positions = state.num_attended[:, None]
            if not dtype == k.dtype == v.dtype == wide:
                q, k, v = q.to(wide), k.to(wide), v.to(wide)
            if k.shape[1] != state.keys.shape[1]:
                k, v = repeat_heads(k, q.shape[1]), repeat_heads(v, q.shape[1])
            queries, features, log_scale = query_map.map_token(key_map, q, k, positions=positions)
            if not query_map.signed and not query_map.floored:  # and not counted: that takes longer than the rest
                both = torch.cat([queries, features], dim=1).clamp_min(FLOOR)
                queries, features = both.split_with_sizes([queries.shape[1], features.shape[1]], dim=1)
            sums = Sums(state.values, state.keys, state.log_max)
            found = step(queries, Keys(features, v, log_scale), sums, may_be_blind=query_map.signed)
        out, sums = found
        after = LinearState(sums.values, sums.keys, sums.log_max, state.num_attended + 1)
        return out if out.dtype == dtype else out.to(dtype), after

    def _sum(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        positions: Tensor,
        sums: Sums | None,
        form: str,
        *,
        need_sums: bool,
    ) -> tuple[Tensor, Sums | None]:
        """The output in the type of q, and the sums after the last token."""
        N, causal = q.shape[2], self.shape.causal
        if form == "recurrent" and not causal:
            raise UsageError("a bidirectional attention has no recurrent form")
        if self.training:
            self.query_map.begin_pass()
        by_token = form == "recurrent" or (form == "auto" and causal and N == 1)
        chunks, size = self._order(q)
        most = chunks.by_pairs if causal else chunks.by_pairs_bidirectional
        if form == "auto" and not by_token and sums is None and k.shape[2] <= most:
            form = "quadratic"
        by_blocks = not by_token and form != "quadratic" and q.device.type != "meta"
        by_blocks = by_blocks and not torch.compiler.is_compiling()  # which can't follow buffers that outlive a call
        # A map that draws random numbers would draw others when it is run again for its gradient.
        if by_blocks and not (self.training and self._map_draws(q, k)):
            job = Job(
                maps=self,
                num_heads=self.shape.num_heads,
                feature_dim=self.key_map.feature_dim,
                positions=positions,
                key_mask=key_mask,
                dtype=sum_dtype(q),
                signed=self.query_map.signed,
                holders=[m for own in (self.query_map, self.key_map) for m in own.modules() if m._buffers],
                size=size,
                chunks=chunks,
            )
            learned = [p for p in self.parameters() if p.requires_grad] if torch.is_grad_enabled() else []
            if form == "auto" and causal and self._by_flash_linear(q, k, v):
                return self._flash_linear(job, q, k, v, sums, need_sums=need_sums)
            return self._blockwise(job, q, k, v, sums, learned, need_sums=need_sums)
        queries, keys = self._mapped(q, k, v, key_mask, positions)
        sums = self._grouped(sums)
        if by_token:
            ran("recurrent")
            out, sums = recurrent(queries, keys, sums)
        else:
            if form == "quadratic" and (sums is None or not causal):
                ran("quadratic")
                out = quadratic(queries, keys, causal=causal)
            elif not causal:
                ran("two products")
                out = bidirectional(queries, keys)
            else:
                ran("chunks")
                out = chunked(queries, keys, sums, chunk_size=N if form == "quadratic" else CHUNK)
            sums = (sums or empty_sums(keys)).add(keys) if need_sums else None
        return out.reshape(*q.shape[:3], v.shape[3]).to(q.dtype), self._ungrouped(sums)

    def _order(self, q: Tensor) -> tuple[Chunks, Size]:
        """How the device wants the sum. Tensor cores get bfloat16 where that is what the inputs are.

        Not float16, whose range the sums leave and whose precision bfloat16 would lose; nor signed features, which
        cancel.
        """
        if not wants_large_products(q.device) or torch.compiler.is_compiling():
            return OneByOne(), CACHED
        rounded = q.dtype == torch.bfloat16 and not self.query_map.signed and has_tensor_cores(q.device)
        return AtOnce(torch.bfloat16 if rounded else None), LARGE

    def _blockwise(
        self,
        job: Job,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        sums: Sums | None,
        learned: list[nn.Parameter],
        *,
        need_sums: bool,
    ) -> tuple[Tensor, Sums | None]:
        """See `blockwise`. There every head has sums of its own; here heads of a group may share them."""
        name = job.chunks.name
        if not self.shape.causal:
            ran(f"{name}, bidirectional")
            return blockwise.bidirectional(job, q, k, v, learned), None
        ran(name)
        out, sums = blockwise.causal(job, q, k, v, self._per_head(sums), learned, need_sums=need_sums)
        return out, self._per_group(sums)

    def _map_draws(self, q: Tensor, k: Tensor) -> bool:
        """Whether a map draws random numbers, which one token of zeros shows. The generators are put back."""
        if self._draws is not None:
            return self._draws
        before = _random_states(q.device)
        with torch.no_grad():
            query = torch.zeros_like(q[:1, :, :1], dtype=sum_dtype(q))
            self.query_map.map_queries(query, positions=torch.zeros(1, 1, dtype=torch.int64, device=q.device))
        self._map_key(k)
        self._draws = not all(map(torch.equal, before, _random_states(q.device)))
        if self._draws:
            _set_random_states(q.device, before)
        return self._draws

    @torch.no_grad()
    def _map_key(self, k: Tensor) -> Tensor | None:
        """The log scale of a key of zeros, if keys have any."""
        key = torch.zeros_like(k[:1, :, :1], dtype=sum_dtype(k))
        key = key if self.share_kv_heads else repeat_heads(key, self.shape.num_heads)
        first = torch.zeros(1, 1, dtype=torch.int64, device=k.device)
        _, log_scale = self.key_map.map_keys(key, positions=first, key_mask=None)
        return log_scale

    def _by_flash_linear(self, q: Tensor, k: Tensor, v: Tensor) -> bool:
        """Whether another library's kernels sum these: see `flash_linear`. They know no log scales; one key shows."""
        if self.query_map.signed or not flash_linear.wanted(q):
            return False
        if self._scales_keys is None:
            self._scales_keys = self._map_key(k) is not None
        return not self._scales_keys and flash_linear.agrees(q.device, self.key_map.feature_dim, v.shape[3])

    def _flash_linear(
        self, job: Job, q: Tensor, k: Tensor, v: Tensor, sums: Sums | None, *, need_sums: bool
    ) -> tuple[Tensor, Sums | None]:
        ran(flash_linear.NAME)
        queries = self.map_queries(q, positions=job.positions, key_mask=job.key_mask)
        keys, _ = self.map_keys(k, positions=job.positions, key_mask=job.key_mask)
        values = self.map_values(v, key_mask=job.key_mask)
        out, sums = flash_linear.causal(queries, keys, values, self._per_head(sums), need_sums=need_sums)
        return out.to(q.dtype), self._per_group(sums)

    @property
    def _group(self) -> int:
        """How many heads share a state."""
        return self.shape.num_heads // self.shape.num_kv_heads if self.share_kv_heads else 1

    def _per_head(self, sums: Sums | None) -> Sums | None:
        """Those of a group's shared state, once for each of its heads."""
        if sums is None or self._group == 1:
            return sums
        return Sums(*(x.repeat_interleave(self._group, 1) for x in (sums.values, sums.keys, sums.log_max)))

    def _per_group(self, sums: Sums | None) -> Sums | None:
        """Every head of a group that shares a state has the same."""
        if sums is None or self._group == 1:
            return sums
        return Sums(*(x[:, :: self._group] for x in (sums.values, sums.keys, sums.log_max)))

    def _positions(self, k: Tensor, key_mask: Tensor | None, state: LinearState | None) -> Tensor:
        """Of the keys, [B, M]."""
        if state is not None and key_mask is None and k.shape[2] == 1:
            return state.num_attended[:, None]
        positions = token_positions(key_mask, batch_size=k.shape[0], length=k.shape[2], device=k.device)
        return positions if state is None else positions + state.num_attended[:, None]

    def _attended(self, k: Tensor, key_mask: Tensor | None, state: LinearState | None) -> Tensor:
        """The number of attended tokens so far, int64 [B]."""
        if key_mask is not None:
            count = key_mask.sum(-1)
            return count if state is None else count + state.num_attended
        if state is not None:
            return state.num_attended + k.shape[2]
        return torch.full((k.shape[0],), k.shape[2], device=k.device)

    def _mapped(
        self, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, positions: Tensor
    ) -> tuple[Tensor, Keys]:
        """Mapped queries and keys. Heads of a group are a dimension over which shared keys broadcast."""
        N = q.shape[2]
        mask = None if key_mask is None else key_mask[:, -N:]
        queries = self.map_queries(q, positions=positions[:, -N:], key_mask=mask)
        if self.share_kv_heads:
            queries = queries.reshape(q.shape[0], self.shape.num_kv_heads, -1, *queries.shape[2:])
        return queries, self._mapped_keys(k, v, key_mask, positions)

    def _mapped_keys(self, k: Tensor, v: Tensor, key_mask: Tensor | None, positions: Tensor) -> Keys:
        features, log_scale = self._map_keys(k, positions, key_mask)
        v = zero_padding(v.to(features.dtype), key_mask)
        if not self.share_kv_heads:
            return Keys(features, repeat_heads(v, self.shape.num_heads), log_scale)
        return Keys(features.unsqueeze(2), v.unsqueeze(2), None if log_scale is None else log_scale.unsqueeze(2))

    @torch.no_grad()
    def _count_floored(self, features: Tensor, key_mask: Tensor | None) -> None:
        dead = features.amax(-1) <= FLOOR
        self.floored_rows += (dead if key_mask is None else dead & key_mask[:, None, :]).sum()

    def _after(self, sums: Sums | None, keys: Keys) -> Sums:
        after = self._ungrouped((self._grouped(sums) or empty_sums(keys)).add(keys))
        assert after is not None
        return after

    def _sums(self, state: LinearState | None) -> Sums | None:
        return None if state is None else Sums(state.values, state.keys, state.log_max)

    def _grouped(self, sums: Sums | None) -> Sums | None:
        if sums is None or not self.share_kv_heads:
            return sums
        return Sums(sums.values.unsqueeze(2), sums.keys.unsqueeze(2), sums.log_max.unsqueeze(2))

    def _ungrouped(self, sums: Sums | None) -> Sums | None:
        if sums is None or not self.share_kv_heads:
            return sums
        return Sums(sums.values.squeeze(2), sums.keys.squeeze(2), sums.log_max.squeeze(2))


def wants_large_products(device: torch.device) -> bool:
    """Whether a device is slow at many small products, and has room for large ones."""
    return device.type != "cpu"


@functools.cache
def has_tensor_cores(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 faster than float32, and torch gives its sums in float32: 2.8 and later."""
    named = "dtype" in torch.ops.aten.bmm.overloads()  # type: ignore[no-untyped-call]
    return named and device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def _random_states(device: torch.device) -> list[Tensor]:
    """Of the generators that a map on this device might draw from."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    elif device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return states


def _set_random_states(device: torch.device, states: list[Tensor]) -> None:
    """Put back what `_random_states` gave."""
    torch.set_rng_state(states[0])
    if device.type == "cuda":
        torch.cuda.set_rng_state(states[1], device)
    elif device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[1])


def shape_for_keys(shape: MixerShape) -> MixerShape:
    """The shape of a map that one key-value head shares with its group of query heads."""
    return dataclasses.replace(shape, num_heads=shape.num_kv_heads)
