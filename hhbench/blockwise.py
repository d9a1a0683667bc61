"""The linear sum a block of tokens at a time, with a backward pass of its own.

Nothing as long as the sequence is kept but inputs, outputs, what outputs of 16 bits lost, normalisers and a pair of
sums for each block. The backward pass computes the rest again, and the features with autograd, so that any feature map
works. The forms of `hhbench.linear_sum` are the truth for it: outputs and gradients are theirs to rounding.

A block is mapped at once and summed in chunks, by `hhbench.chunkwise`. On a CPU a block's features, sums and outputs
stay in the cache; on an accelerator blocks are large, and only bound the memory.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from hhbench import native
from hhbench.chunkwise import Chunks, Mapped
from hhbench.contracts import without_autocast
from hhbench.linear_sum import Sums, finite
from hhbench.scratch import scratch


@dataclass(frozen=True)
class Size:
    """Of a block.

    Attributes:
        tokens: at most; of one row, they are mapped at once.
        features: numbers, at most: more rows at a time where sequences are short, shorter blocks for wide maps.
    """

    tokens: int
    features: int


CACHED = Size(256, 12 * 256 * 128)  # on a CPU
LARGE = Size(2**14, 12 * 2**14 * 128)  # elsewhere; 100 MB in float32


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


_Place = tuple[slice, slice, slice]  # rows, heads, tokens


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
        size: of a block.
        chunks: how a causal block is summed, and all products are made.
    """

    maps: Maps
    num_heads: int
    feature_dim: int
    positions: Tensor
    key_mask: Tensor | None
    dtype: torch.dtype
    signed: bool
    holders: Sequence[nn.Module]
    size: Size
    chunks: Chunks

    def held(self) -> "_Held":
        """The maps' buffers as they are now."""
        return _Held([(m, name, b) for m in self.holders for name, b in m.named_buffers(recurse=False)])

    def rows(self) -> list[slice]:
        """Rows of the batch that are worked on together."""
        step = self._rows_at_once(min(self.positions.shape[1], self.size.tokens))
        return [slice(start, start + step) for start in range(0, self.positions.shape[0], step)]

    def blocks(self, rows: slice, length: int) -> list[_Block]:
        """The last tokens of these rows, so many of them, in blocks."""
        chunk = self.chunks.size
        fitting = self.size.features // (self.num_heads * self.feature_dim) // chunk * chunk
        size = min(max(fitting, chunk), self.size.tokens)
        before = self.positions.shape[1] - length
        places = torch.split(self.positions[rows, before:], size, 1)
        masks = itertools.repeat(None) if self.key_mask is None else torch.split(self.key_mask[rows, before:], size, 1)
        starts = range(0, length, size)
        return [
            _Block(slice(start, start + place.shape[1]), place, mask)
            for start, place, mask in zip(starts, places, masks, strict=False)
        ]

    def _rows_at_once(self, length: int) -> int:
        return max(1, self.size.features // (self.num_heads * length * self.feature_dim))

    def divide(self, u: Tensor, out: Tensor, lost: Tensor | None) -> None:
        """u [L, n, E + 1] to the output [b, H, n, E]; zero where a query has no key to attend to.

        Args:
            lost: takes what the output's type doesn't hold, or None.
        """
        u = u.view(-1, self.num_heads, *u.shape[1:])
        if lost is None:
            torch.div(u[..., :-1], self.divisor(u[..., -1:]), out=out)
            return
        exact = u[..., :-1] / self.divisor(u[..., -1:])
        lost.copy_(exact.sub_(out.copy_(exact)))

    def lost(self, out: Tensor) -> Tensor | None:
        """Memory for what an output of 16 bits loses: its gradient is a small difference of large numbers."""
        return None if out.dtype == self.dtype else torch.empty_like(out)

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


def _with_one(job: Job, v: Tensor, block: _Block) -> Tensor:
    """[v, 1], [L, n, E + 1]."""
    values = job.maps.map_values(v, key_mask=block.key_mask).flatten(0, 1)
    out = scratch("values", values, *values.shape[:2], values.shape[2] + 1)
    out[..., :-1].copy_(values)
    if not out.is_cpu:
        out[..., -1].fill_(1.0)
    return out


def _queries(job: Job, q: Tensor, block: _Block) -> Tensor:
    """Features [L, n, F]."""
    out = scratch("queries", q, *q.shape[:3], job.feature_dim, dtype=job.dtype)
    found = job.maps.map_queries(q, positions=block.positions, key_mask=block.key_mask, out=out)
    return found.flatten(0, 1)


def _keys(job: Job, k: Tensor, block: _Block) -> tuple[Tensor, Tensor | None]:
    """Features [L, n, F] and log scales [L, n]."""
    out = scratch("keys", k, k.shape[0], job.num_heads, k.shape[2], job.feature_dim, dtype=job.dtype)
    found, scale = job.maps.map_keys(k, positions=block.positions, key_mask=block.key_mask, out=out)
    return found.flatten(0, 1), None if scale is None else scale.flatten(0, 1)


class _Outputs(NamedTuple):
    """What the backward pass needs of the forward pass: outputs [B, H, N, E], what they lost, normalisers [B, H, N]."""

    out: Tensor
    lost: Tensor | None
    normalisers: Tensor

    def cotangent(self, job: Job, d_out: Tensor, at: _Place, into: Tensor) -> Tensor:
        """g = du [L, n, E + 1]: do / normaliser of the numerator, -(do . out) / normaliser of the normaliser."""
        out, d_out = self.out[at].to(job.dtype), d_out[at].to(job.dtype)
        if self.lost is not None:
            out = out + self.lost[at]
        g = into.view(*d_out.shape[:3], -1)
        of_numerator = torch.div(d_out, job.divisor(self.normalisers[at])[..., None], out=g[..., :-1])
        torch.sum(of_numerator * out, -1, keepdim=True, out=g[..., -1:]).neg_()
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
        lost = job.lost(out) if need.gradients else None
        ends: list[tuple[Tensor, Tensor]] = []
        kept: list[list[tuple[Tensor, Tensor]]] = []  # the sums before each block
        for rows in job.rows():
            empty = True
            if start is not None and log_max is not None:
                empty, some, some_max = False, start[rows].flatten(0, 1).clone(), log_max[rows].flatten()
            kept.append([])
            for block in job.blocks(rows, N):
                tokens = block.tokens
                queries = _queries(job, q[rows, :, tokens], block)
                keys, log_scale = _keys(job, k[rows, :, tokens], block)
                values = _with_one(job, v[rows, :, tokens], block)
                if empty:
                    some = keys.new_zeros(keys.shape[0], keys.shape[2], E + 1)
                    some_max = keys.new_full((keys.shape[0],), -torch.inf)
                if need.gradients:
                    kept[-1].append((some.clone(), some_max))
                last = tokens.stop == N and not need.sums
                compiled = native.wanted() and not need.gradients and log_scale is None
                if compiled and native.block(queries, keys, values, some, out[rows, :, tokens], first=empty, last=last):
                    empty = False
                    continue
                mapped = Mapped(queries, keys, values, log_scale)
                u, some_max = job.chunks.forward(mapped, some, some_max, first=empty, last=last)
                empty = False
                if normalisers is not None:
                    normalisers[rows, :, tokens] = u[..., E].view(-1, H, u.shape[1])
                job.divide(u, out[rows, :, tokens], None if lost is None else lost[rows, :, tokens])
            # Keys without log scales are of scale 1.
            ends.append((some, torch.zeros_like(some_max) if log_scale is None else some_max))
        if need.gradients:
            ctx.job, ctx.need, ctx.kept, ctx.held = job, need, kept, job.held()
            ctx.fresh = start is None
            ctx.save_for_backward(q, k, v, out, lost, normalisers, *params)
        sums, last_max = (torch.cat(x).view(B, H, *x[0].shape[1:]) for x in zip(*ends, strict=True))
        ctx.mark_non_differentiable(last_max)
        return out, sums, last_max

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor, d_sums: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        with without_autocast(d_out.device):  # as the forward pass was
            return _Causal._gradients(ctx, d_out, d_sums)

    @staticmethod
    def _gradients(ctx: Any, d_out: Tensor, d_sums: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lost, normalisers, *params = ctx.saved_tensors
        outputs = _Outputs(out, lost, normalisers)
        job: Job = ctx.job
        N = q.shape[2]
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
                values = _with_one(job, v[at], block)
                g = outputs.cotangent(job, d_out, at, scratch("g", values, *values.shape))
                summed = Mapped(queries, keys, values, scale_of_all)
                first = ctx.fresh and block.tokens.start == 0
                to_q, to_k, to_v = job.chunks.backward(summed, g, some, some_max, rest, first=first, last=last)
                last = False
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
        lost = job.lost(out) if keep else None
        kept: list[tuple[Tensor, Tensor]] = []
        for rows in job.rows():
            sums = log_max = None
            for block in job.blocks(rows, k.shape[2]):
                keys, log_scale = _keys(job, k[rows, :, block.tokens], block)
                values = _with_one(job, v[rows, :, block.tokens], block)
                if sums is None or log_max is None:
                    sums = keys.new_zeros(keys.shape[0], keys.shape[2], E + 1)
                    log_max = keys.new_full((keys.shape[0],), -torch.inf)
                if log_scale is not None:
                    top = torch.maximum(log_max, log_scale.amax(-1))
                    sums.mul_((log_max - finite(top)).exp()[:, None, None])
                    keys, log_max = keys * (log_scale - finite(top)[:, None]).exp()[..., None], top
                job.chunks.add_product(sums, keys.mT, values)
            assert sums is not None and log_max is not None
            kept.append((sums, log_max))
            for block in job.blocks(rows, N):
                u = job.chunks.product(_queries(job, q[rows, :, block.tokens], block), sums, "u", exact="b")
                if normalisers is not None:
                    normalisers[rows, :, block.tokens] = u[..., E].view(-1, H, u.shape[1])
                job.divide(u, out[rows, :, block.tokens], None if lost is None else lost[rows, :, block.tokens])
        if keep:
            ctx.job, ctx.kept, ctx.held = job, kept, job.held()
            ctx.save_for_backward(q, k, v, out, lost, normalisers, *params)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        with without_autocast(d_out.device):  # as the forward pass was
            return _Bidirectional._gradients(ctx, d_out)

    @staticmethod
    def _gradients(ctx: Any, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, lost, normalisers, *params = ctx.saved_tensors
        outputs = _Outputs(out, lost, normalisers)
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
                g = outputs.cotangent(job, d_out, at, scratch("g", queries, *queries.shape[:2], E + 1))
                job.chunks.add_product(d_sums, queries.mT, g)
                to_q = job.chunks.product(g, sums.mT, "to queries", exact="ab")
                (dq[at],) = learned.pull([mapped_q], [to_q], [own_q])
            for block in job.blocks(rows, k.shape[2]):
                at = rows, slice(None), block.tokens
                with ctx.held, torch.enable_grad():
                    own = [x[at].detach().requires_grad_() for x in (k, v)]
                    mapped_k, log_scale = job.maps.map_keys(own[0], positions=block.positions, key_mask=block.key_mask)
                    mapped_v = job.maps.map_values(own[1], key_mask=block.key_mask)
                keys = mapped_k.detach().flatten(0, 1)
                values = _with_one(job, v[at], block)
                to_k = job.chunks.product(values, d_sums.mT, "to keys", exact="b")
                to_v = job.chunks.product(keys, d_sums[..., :E], "to values")
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
