"""The linear sum a block of tokens at a time: features, sums and outputs of a block stay in the cache.

What a CPU wants. Nothing as long as the sequence is kept but inputs, outputs, normalisers and a pair of sums for each
block; the backward pass computes the rest again, and the features with autograd, so that any feature map works. The
forms of `hhbench.linear_sum` are the truth for it: outputs and gradients are theirs to rounding.

    u_i = sum_{j <= i} phi(q_i).phi(k_j) [v_j, 1]        out_i = u_i without its last column / its last column
    S   = sum_j phi(k_j) [v_j, 1]^T over the tokens of earlier chunks, divided by exp of their largest log scale
    R   = sum_i phi(q_i) g_i^T over those of later chunks, g_i = du_i: what keys receive in the backward pass

A block is mapped at once and summed in chunks: pairs within a chunk, S and R between chunks. Every head of every row
of the batch is a sum of its own, [L, ...] below.
"""

import itertools
import threading
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hhbench import native
from hhbench.linear_sum import Sums, finite

BLOCK = 256  # tokens that are mapped at once
CHUNK = 64  # tokens that meet pair by pair
FEATURES = 12 * BLOCK * 128  # of a block: more rows at a time where sequences are short, shorter blocks for wide maps
KEPT_BYTES = 2**26  # of buffers, before they are let go


class Maps(Protocol):
    """The feature maps of a linear attention, with all that it does around them, on any tokens of some rows.

    Inputs come as the attention got them. What is returned is of all H heads, in the type of the sums; padded keys are
    zero, and their log scales -inf. `out` is memory that may be written to and returned, where no gradient is wanted.
    """

    def map_queries(
        self, q: Tensor, *, positions: Tensor, key_mask: Tensor | None, out: Tensor | None = None
    ) -> Tensor:
        """[b, H, n, D] -> [b, H, n, F]"""

    def map_keys(
        self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None, out: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """[b, G, n, D] -> [b, H, n, F] and [b, H, n]"""

    def map_values(self, v: Tensor, *, key_mask: Tensor | None) -> Tensor:
        """[b, G, n, E] -> [b, H, n, E]"""


class _Block(NamedTuple):
    """Some tokens of some rows; as keys, or as queries."""

    tokens: slice
    positions: Tensor
    key_mask: Tensor | None


@dataclass(frozen=True)
class Job:
    """All that doesn't need a gradient: the maps, the tokens' places, and how the work is cut.

    Attributes:
        maps: see `Maps`.
        num_heads: H.
        feature_dim: F, as the map states it: what memory is set aside for, and how wide blocks may be.
        positions: int64 [B, M], of the keys; the queries are the last N of them.
        key_mask: bool [B, M] or None.
        dtype: of the sums.
        signed: features may cancel.
        holders: modules whose buffers the maps read: the backward pass reads those of the forward pass.
    """

    maps: Maps
    num_heads: int
    feature_dim: int
    positions: Tensor
    key_mask: Tensor | None
    dtype: torch.dtype
    signed: bool
    holders: Sequence[nn.Module]

    def held(self) -> "_Held":
        """The maps' buffers as they are now."""
        return _Held([(m, name, b) for m in self.holders for name, b in m.named_buffers(recurse=False)])

    def rows(self) -> list[slice]:
        """Rows of the batch that are worked on together."""
        step = self._rows_at_once(min(self.positions.shape[1], BLOCK))
        return [slice(start, start + step) for start in range(0, self.positions.shape[0], step)]

    def blocks(self, rows: slice, length: int) -> list[_Block]:
        """The last tokens of these rows, so many of them, in blocks."""
        size = min(max(FEATURES // (self.num_heads * self.feature_dim) // CHUNK * CHUNK, CHUNK), BLOCK)
        before = self.positions.shape[1] - length
        places = torch.split(self.positions[rows, before:], size, 1)
        masks = itertools.repeat(None) if self.key_mask is None else torch.split(self.key_mask[rows, before:], size, 1)
        starts = range(0, length, size)
        return [
            _Block(slice(start, start + place.shape[1]), place, mask)
            for start, place, mask in zip(starts, places, masks, strict=False)
        ]

    def _rows_at_once(self, length: int) -> int:
        return max(1, FEATURES // (self.num_heads * length * self.feature_dim))

    def divide(self, u: Tensor, out: Tensor) -> None:
        """u [L, n, E + 1] to the output [b, H, n, E]; zero where a query has no key to attend to."""
        u = u.view(-1, self.num_heads, *u.shape[1:])
        torch.div(u[..., :-1], self.divisor(u[..., -1:]), out=out)

    def divisor(self, normaliser: Tensor) -> Tensor:
        """The normaliser, or 1 where there is no key to attend to and the numerator is 0."""
        if self.key_mask is None and not self.signed:
            return normaliser
        return normaliser.masked_fill(normaliser == 0, 1.0)


class _Held:
    """Buffers to which modules are put back for the time of a context: others may have taken their place since."""

    def __init__(self, buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        self._then = buffers

    def __enter__(self) -> None:
        self._now = [(module, name, getattr(module, name)) for module, name, _ in self._then]
        self._put(self._then)

    def __exit__(self, *_: object) -> None:
        self._put(self._now)

    @staticmethod
    def _put(buffers: Sequence[tuple[nn.Module, str, Tensor]]) -> None:
        for module, name, buffer in buffers:
            setattr(module, name, buffer)


class _Scratch(threading.local):
    """Buffers that every chunk of every call writes anew: memory that is fresh each time is not in the cache.

    One for each thread. What is in a buffer is read before anything else asks for it.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], Tensor] = {}

    def __call__(self, name: str, like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of this shape, 1 to begin with: the same one for the same name, shape and type."""
        dtype = dtype or like.dtype
        key = name, shape, dtype, like.device
        found = self._made.get(key)
        if found is None:
            if sum(x.nbytes for x in self._made.values()) > KEPT_BYTES:
                self._made.clear()
            with torch.inference_mode(False):  # it outlives the mode that this call is in
                found = self._made[key] = torch.ones(shape, dtype=dtype, device=like.device)
        return found

    def with_one(self, job: Job, v: Tensor, block: _Block) -> Tensor:
        """[v, 1], [L, n, E + 1]."""
        values = job.maps.map_values(v, key_mask=block.key_mask).flatten(0, 1)
        out = self("values", values, *values.shape[:2], values.shape[2] + 1)
        out[..., :-1].copy_(values)
        return out

    def queries(self, job: Job, q: Tensor, block: _Block) -> Tensor:
        """Features [L, n, F]."""
        out = self("queries", q, *q.shape[:3], job.feature_dim, dtype=job.dtype)
        found = job.maps.map_queries(q, positions=block.positions, key_mask=block.key_mask, out=out)
        return found.flatten(0, 1)

    def keys(self, job: Job, k: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
        """Features [L, n, F] and log scales [L, n]."""
        out = self("keys", k, k.shape[0], job.num_heads, k.shape[2], job.feature_dim, dtype=job.dtype)
        found, scale = job.maps.map_keys(k, positions=block.positions, key_mask=block.key_mask, out=out)
        return found.flatten(0, 1), None if scale is None else scale.flatten(0, 1)


_scratch = _Scratch()


class _Scales:
    """The factors of one chunk whose keys have log scales.

    Attributes:
        after: the largest log scale so far, [L].
        pairs: exp(log_scale_j - top_i), [L, n, n]; 1 at most, for pairs that may meet.
        of_sums: exp(before - top_i): of what earlier chunks give to queries, [L, n, 1].
        of_keys: exp(log_scale_j - after): of keys in the sums, [L, n, 1].
        decay: exp(before - after): of earlier sums, [L, 1, 1].
    """

    def __init__(self, log_scale: Tensor, before: Tensor) -> None:
        top = torch.maximum(before[:, None], log_scale.cummax(-1).values)
        self.after, top = top[:, -1], finite(top)
        relative = log_scale[:, None, :] - top[:, :, None]
        self.pairs = relative.masked_fill_(relative > 0, 0.0).exp_()
        self.of_sums = (before[:, None] - top).exp()[..., None]
        after = finite(self.after)[:, None]
        self.of_keys = (log_scale - after).exp()[..., None]
        self.decay = (before[:, None] - after).exp()[..., None]


def _chunks(x: Tensor) -> tuple[Tensor, ...]:
    """The chunks of a block [L, n, X]."""
    return torch.split(x, CHUNK, dim=1)


def _scales(log_scale: Tensor | None) -> Iterable[Tensor | None]:
    return itertools.repeat(None) if log_scale is None else torch.split(log_scale, CHUNK, dim=1)


def _pairs(rows: Tensor, columns: Tensor, scales: _Scales | None, out: Tensor) -> Tensor:
    """rows_i . columns_j, [L, n, X] both, for pairs of a chunk that may meet, and 0 elsewhere."""
    torch.bmm(rows, columns.mT, out=out)
    if scales is not None:
        out.mul_(scales.pairs)
    return out.tril_()


def _advance(sums: Tensor, features: Tensor, values: Tensor, scales: _Scales | None) -> None:
    """The sums after a chunk, in place."""
    if scales is not None:
        sums.mul_(scales.decay)
        features = features * scales.of_keys
    sums.baddbmm_(features.mT, values)


def _from_both(
    out: Tensor, pairs: Tensor, near: Tensor, far: tuple[Tensor, Tensor] | None, scale: Tensor | None
) -> None:
    """pairs @ near, what the chunk itself gives, and scale * far[0] @ far[1], what the sums give if there is any."""
    if far is None:
        torch.bmm(pairs, near, out=out)
        return
    torch.bmm(*far, out=out)
    if scale is not None:
        out.mul_(scale)
    out.baddbmm_(pairs, near)


def _cotangent(job: Job, d_out: Tensor, out: Tensor, normaliser: Tensor, into: Tensor) -> Tensor:
    """g = du [L, n, E + 1]: do / normaliser of the numerator, -(do . out) / normaliser of the normaliser."""
    g = into.view(*d_out.shape[:3], -1)
    of_numerator = torch.div(d_out.to(job.dtype), job.divisor(normaliser)[..., None], out=g[..., :-1])
    torch.sum(of_numerator * out.to(job.dtype), -1, keepdim=True, out=g[..., -1:]).neg_()
    return into


class _Learned:
    """The gradients of the maps' parameters, block by block."""

    def __init__(self, params: Sequence[Tensor]) -> None:
        self._params = params
        self.gradients: list[Tensor | None] = [None] * len(params)

    def pull(self, mapped: Sequence[Tensor], received: Sequence[Tensor], own: Sequence[Tensor]) -> list[Tensor]:
        """What a block's own inputs receive through its maps, which may depend on none of them."""
        pairs = [(m, r.view_as(m)) for m, r in zip(mapped, received, strict=True) if m.requires_grad]
        if not pairs:
            return [torch.zeros_like(x) for x in own]
        outputs, cotangents = zip(*pairs, strict=True)
        found = torch.autograd.grad(outputs, (*own, *self._params), cotangents, allow_unused=True)
        for i, gradient in enumerate(found[len(own) :]):
            if gradient is not None:
                total = self.gradients[i]
                self.gradients[i] = gradient if total is None else total.add_(gradient)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(own, found, strict=False)]


class _Need(NamedTuple):
    """What a causal sum is asked for: whether it returns the sums, and will be asked for gradients."""

    sums: bool
    gradients: bool


class _Chunk(NamedTuple):
    """Keys [L, n, F] and [values, 1] of a chunk, their scales, and the sums before it."""

    keys: Tensor
    values: Tensor
    scales: _Scales | None
    before: Tensor


class _Causal(torch.autograd.Function):
    """(q, k, v, S, log_max) -> (out, S, log_max): the causal sum, from a state to the one after the last token."""

    @staticmethod
    def forward(
        ctx: Any,
        job: Job,
        need: _Need,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        start: Tensor | None,
        log_max: Tensor | None,
        *params: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        B, H, N, E = *q.shape[:3], v.shape[3]
        out = q.new_empty(B, H, N, E)
        normalisers = out.new_empty(B, H, N, dtype=job.dtype) if need.gradients else None
        ends: list[tuple[Tensor, Tensor]] = []
        kept: list[list[tuple[Tensor, Tensor]]] = []  # the sums before each block
        for rows in job.rows():
            empty, done = True, 0
            if start is not None and log_max is not None:
                empty, some, some_max = False, start[rows].flatten(0, 1).clone(), log_max[rows].flatten()
            kept.append([])
            for block in job.blocks(rows, N):
                tokens = block.tokens
                queries = _scratch.queries(job, q[rows, :, tokens], block)
                keys, log_scale = _scratch.keys(job, k[rows, :, tokens], block)
                values = _scratch.with_one(job, v[rows, :, tokens], block)
                if empty:
                    some = keys.new_zeros(keys.shape[0], keys.shape[2], E + 1)
                    some_max = keys.new_full((keys.shape[0],), -torch.inf)
                if need.gradients:
                    kept[-1].append((some.clone(), some_max))
                after = done + queries.shape[1]
                compiled = native.wanted() and not need.gradients and log_scale is None
                if compiled and native.block(
                    queries,
                    keys,
                    values,
                    some,
                    out[rows, :, tokens],
                    first=empty,
                    last=after == N and not need.sums,
                ):
                    empty, done = False, after
                    continue
                u = _scratch("u", values, *values.shape)
                for fq, fk, vc, uc, scale in zip(
                    _chunks(queries), _chunks(keys), _chunks(values), _chunks(u), _scales(log_scale), strict=False
                ):
                    scales = None if scale is None else _Scales(scale, some_max)
                    pairs = _pairs(fq, fk, scales, _scratch("pairs", fq, *fq.shape[:2], fq.shape[1]))
                    if empty:
                        torch.bmm(pairs, vc, out=uc)
                    else:
                        torch.bmm(fq, some, out=uc)
                        if scales is not None:
                            uc.mul_(scales.of_sums)
                        uc.baddbmm_(pairs, vc)
                    done += fq.shape[1]
                    if need.sums or done < N:
                        _advance(some, fk, vc, scales)
                    some_max = some_max if scales is None else scales.after
                    empty = False
                if normalisers is not None:
                    normalisers[rows, :, tokens] = u[..., E].view(-1, H, u.shape[1])
                job.divide(u, out[rows, :, tokens])
            # Keys without log scales are of scale 1.
            ends.append((some, torch.zeros_like(some_max) if log_scale is None else some_max))
        if need.gradients:
            ctx.job, ctx.need, ctx.kept, ctx.held = job, need, kept, job.held()
            ctx.fresh = start is None
            ctx.save_for_backward(q, k, v, out, normalisers, *params)
        sums, last_max = (torch.cat(x).view(B, H, *x[0].shape[1:]) for x in zip(*ends, strict=True))
        ctx.mark_non_differentiable(last_max)
        return out, sums, last_max

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_sums: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        q, k, v, out, normalisers, *params = ctx.saved_tensors
        job: Job = ctx.job
        N, E = q.shape[2], v.shape[3]
        suffix = d_sums.contiguous().clone()
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        learned = _Learned(params)
        for rows, kept in zip(job.rows(), ctx.kept, strict=True):
            rest = suffix[rows].flatten(0, 1)
            last = not ctx.need.sums
            for block, (some, some_max) in reversed(list(zip(job.blocks(rows, N), kept, strict=True))):
                at = rows, slice(None), block.tokens
                with ctx.held, torch.enable_grad():
                    own = [x[at].detach().requires_grad_() for x in (q, k, v)]
                    mapped_q = job.maps.map_queries(own[0], positions=block.positions, key_mask=block.key_mask)
                    mapped_k, log_scale = job.maps.map_keys(own[1], positions=block.positions, key_mask=block.key_mask)
                    mapped_v = job.maps.map_values(own[2], key_mask=block.key_mask)
                queries, keys = mapped_q.detach().flatten(0, 1), mapped_k.detach().flatten(0, 1)
                scale_of_all = None if log_scale is None else log_scale.detach().flatten(0, 1)
                values = _scratch.with_one(job, v[at], block)
                g = _cotangent(job, d_out[at], out[at], normalisers[at], _scratch("g", values, *values.shape))
                to_q, to_k = _scratch("to queries", queries, *queries.shape), _scratch("to keys", keys, *keys.shape)
                to_v = _scratch("to values", keys, *values.shape[:2], E)
                # The sums before each chunk, forwards; then the chunks, backwards.
                chunks = []
                for fk, vc, scale in zip(_chunks(keys), _chunks(values), _scales(scale_of_all), strict=False):
                    scales = None if scale is None else _Scales(scale, some_max)
                    chunks.append(_Chunk(fk, vc, scales, some))
                    if len(chunks) * CHUNK < keys.shape[1]:
                        some = some.clone()
                        _advance(some, fk, vc, scales)
                        some_max = some_max if scales is None else scales.after
                cut = zip(chunks, *map(_chunks, (queries, g, to_q, to_k, to_v)), strict=True)
                for (fk, vc, scales, before), fq, gc, dfq, dfk, dvc in reversed(list(cut)):
                    L, n = fk.shape[:2]
                    a = _pairs(fq, fk, scales, _scratch("pairs", fq, L, n, n))
                    p = _pairs(gc, vc, scales, _scratch("gradients of pairs", fq, L, n, n))
                    first = ctx.fresh and block.tokens.start == 0 and before is chunks[0].before
                    of_queries, of_keys = (None, None) if scales is None else (scales.of_sums, scales.of_keys)
                    _from_both(dfq, p, fk, None if first else (gc, before.mT), of_queries)
                    _from_both(dfk, p.mT, fq, None if last else (vc, rest.mT), of_keys)
                    _from_both(dvc, a.mT, gc[..., :E], None if last else (fk, rest[..., :E]), of_keys)
                    last = False
                    if not first:
                        if scales is not None:
                            rest.mul_(scales.decay)
                            fq = fq * scales.of_sums
                        rest.baddbmm_(fq.mT, gc)
                mapped, received = [mapped_q, mapped_k, mapped_v], [to_q, to_k, to_v]
                if log_scale is not None:
                    mapped.append(log_scale)
                    received.append((to_k * keys).sum(-1))
                dq[at], dk[at], dv[at] = learned.pull(mapped, received, own)
        return None, None, dq, dk, dv, None if ctx.fresh else suffix, None, *learned.gradients


class _Bidirectional(torch.autograd.Function):
    """(q, k, v) -> out, over all keys: one pass adds them up, one asks."""

    @staticmethod
    def forward(ctx: Any, job: Job, keep: bool, q: Tensor, k: Tensor, v: Tensor, *params: Tensor) -> Tensor:
        B, H, N, E = *q.shape[:3], v.shape[3]
        out = q.new_empty(B, H, N, E)
        normalisers = out.new_empty(B, H, N, dtype=job.dtype) if keep else None
        kept: list[tuple[Tensor, Tensor]] = []
        for rows in job.rows():
            sums = log_max = None
            for block in job.blocks(rows, k.shape[2]):
                keys, log_scale = _scratch.keys(job, k[rows, :, block.tokens], block)
                values = _scratch.with_one(job, v[rows, :, block.tokens], block)
                if sums is None or log_max is None:
                    sums = keys.new_zeros(keys.shape[0], keys.shape[2], E + 1)
                    log_max = keys.new_full((keys.shape[0],), -torch.inf)
                if log_scale is not None:
                    top = torch.maximum(log_max, log_scale.amax(-1))
                    sums.mul_((log_max - finite(top)).exp()[:, None, None])
                    keys, log_max = keys * (log_scale - finite(top)[:, None]).exp()[..., None], top
                sums.baddbmm_(keys.mT, values)
            assert sums is not None and log_max is not None
            kept.append((sums, log_max))
            for block in job.blocks(rows, N):
                queries = _scratch.queries(job, q[rows, :, block.tokens], block)
                u = torch.bmm(queries, sums, out=_scratch("u", sums, *queries.shape[:2], E + 1))
                if normalisers is not None:
                    normalisers[rows, :, block.tokens] = u[..., E].view(-1, H, u.shape[1])
                job.divide(u, out[rows, :, block.tokens])
        if keep:
            ctx.job, ctx.kept, ctx.held = job, kept, job.held()
            ctx.save_for_backward(q, k, v, out, normalisers, *params)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, normalisers, *params = ctx.saved_tensors
        job: Job = ctx.job
        E = v.shape[3]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
        learned = _Learned(params)
        for rows, (sums, log_max) in zip(job.rows(), ctx.kept, strict=True):
            d_sums = torch.zeros_like(sums)
            for block in job.blocks(rows, q.shape[2]):
                at = rows, slice(None), block.tokens
                with ctx.held, torch.enable_grad():
                    own_q = q[at].detach().requires_grad_()
                    mapped_q = job.maps.map_queries(own_q, positions=block.positions, key_mask=block.key_mask)
                queries = mapped_q.detach().flatten(0, 1)
                g = _cotangent(
                    job, d_out[at], out[at], normalisers[at], _scratch("g", queries, *queries.shape[:2], E + 1)
                )
                d_sums.baddbmm_(queries.mT, g)
                to_q = torch.bmm(g, sums.mT, out=_scratch("to queries", queries, *queries.shape))
                (dq[at],) = learned.pull([mapped_q], [to_q], [own_q])
            for block in job.blocks(rows, k.shape[2]):
                at = rows, slice(None), block.tokens
                with ctx.held, torch.enable_grad():
                    own = [x[at].detach().requires_grad_() for x in (k, v)]
                    mapped_k, log_scale = job.maps.map_keys(own[0], positions=block.positions, key_mask=block.key_mask)
                    mapped_v = job.maps.map_values(own[1], key_mask=block.key_mask)
                keys = mapped_k.detach().flatten(0, 1)
                values = _scratch.with_one(job, v[at], block)
                to_k = torch.bmm(values, d_sums.mT, out=_scratch("to keys", keys, *keys.shape))
                to_v = torch.bmm(keys, d_sums[..., :E], out=_scratch("to values", keys, *keys.shape[:2], E))
                mapped, received = [mapped_k, mapped_v], [to_k, to_v]
                if log_scale is not None:
                    of_keys = (log_scale.detach().flatten(0, 1) - finite(log_max)[:, None]).exp()[..., None]
                    to_k.mul_(of_keys)
                    to_v.mul_(of_keys)
                    mapped.append(log_scale)
                    received.append((to_k * keys).sum(-1))
                dk[at], dv[at] = learned.pull(mapped, received, own)
        return None, None, dq, dk, dv, *learned.gradients


def causal(
    job: Job, q: Tensor, k: Tensor, v: Tensor, sums: Sums | None, params: Sequence[Tensor], *, need_sums: bool
) -> tuple[Tensor, Sums | None]:
    """The output [B, H, N, E], and the sums after the last token if they are needed.

    Args:
        job: the maps and the tokens' places.
        q, k, v: [B, H, N, D], [B, G, N, D], [B, G, N, E].
        sums: those before the first token, [B, H, F, E], [B, H, F] and [B, H]; None = there is none.
        params: what the maps learn.
    """
    start, log_max = None, None
    if sums is not None:
        start, log_max = torch.cat([sums.values, sums.keys[..., None]], -1), sums.log_max
    given = q, k, v, *params, *(() if start is None else (start,))
    need = _Need(sums=need_sums, gradients=torch.is_grad_enabled() and any(x.requires_grad for x in given))
    out, after, log_max = _Causal.apply(job, need, q, k, v, start, log_max, *params)
    if not need_sums:
        return out, None
    return out, Sums(after[..., :-1], after[..., -1], log_max)


def bidirectional(job: Job, q: Tensor, k: Tensor, v: Tensor, params: Sequence[Tensor]) -> Tensor:
    """The output [B, H, N, E] over all keys [B, G, M, D]; the queries are the last N of them. See `causal`."""
    keep = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v, *params))
    out: Tensor = _Bidirectional.apply(job, keep, q, k, v, *params)
    return out
