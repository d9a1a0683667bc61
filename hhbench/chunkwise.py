"""The causal linear sum of one block of mapped tokens, by chunks: pairs of tokens within one, running sums between.

    u_i = sum_{j <= i} phi(q_i).phi(k_j) [v_j, 1]        the output is u without its last column / its last column
    S   = sum_j phi(k_j) [v_j, 1]^T over the tokens of earlier chunks, divided by exp of their largest log scale
    R   = sum_i phi(q_i) g_i^T over those of later chunks, g_i = du_i: what keys receive in the backward pass

Two orders of the same work: `OneByOne` takes chunk after chunk, in buffers that stay in a CPU's cache; `AtOnce` takes
all chunks of the block in a few large products, as accelerators want them. Every head of every row of the batch is a
sum of its own, [L, ...] below.
"""

import itertools
from collections.abc import Iterable
from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.linear_sum import finite
from hhbench.scratch import scratch


class Mapped(NamedTuple):
    """A block of mapped tokens.

    Attributes:
        queries, keys: features [L, n, F].
        values: [values, 1], [L, n, E + 1].
        log_scale: of the keys, [L, n], or None.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    log_scale: Tensor | None


class Chunks(Protocol):
    """An order of the work.

    Attributes:
        name: of this implementation, for `hhbench.kernels`.
        size: tokens of a chunk.
        by_pairs: up to so many tokens, in causal order, all pairs at once take no more time, gradient or not.
        by_pairs_bidirectional: the same where each query sees all keys.
    """

    name: str
    size: int
    by_pairs: int
    by_pairs_bidirectional: int

    def product(self, a: Tensor, b: Tensor, name: str, *, exact: str = "") -> Tensor:
        """a @ b in the type of the sums; in the buffer of this name, where there are buffers.

        Args:
            exact: "a", "b" or "ab": which operands count with what rounding would take from them, if they are rounded.
        """

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        """Adds a @ b, in place, with all of b."""

    def forward(
        self, block: Mapped, sums: Tensor, log_max: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor]:
        """u [L, n, E + 1], and the largest log scale after the block.

        Args:
            sums: S before the block, [L, F, E + 1]; then, in place, after it. Anything if it is the last.
            log_max: the largest log scale before the block, [L].
            first: there is nothing in S yet.
            last: nobody asks for S after the block.
        """

    def backward(
        self, block: Mapped, g: Tensor, sums: Tensor, log_max: Tensor, rest: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """What the features of queries and of keys [L, n, F] and the values [L, n, E] receive.

        Args:
            g: what u receives, [L, n, E + 1].
            sums, log_max: those before the block. S may be overwritten.
            rest: R after the block, [L, F, E + 1]; then, in place, before it. Anything if it is the first.
            first: there is nothing in S before the block.
            last: there is nothing in R after it.
        """


# --- chunk after chunk ---


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


class _Chunk(NamedTuple):
    """Keys [L, n, F] and [values, 1] of a chunk, their scales, and the sums before it."""

    keys: Tensor
    values: Tensor
    scales: _Scales | None
    before: Tensor


class OneByOne:
    """Chunk after chunk."""

    name = "blocks"
    size = 64
    by_pairs = 96
    by_pairs_bidirectional = 32

    def product(self, a: Tensor, b: Tensor, name: str, *, exact: str = "") -> Tensor:
        del exact
        return torch.bmm(a, b, out=scratch(name, a, a.shape[0], a.shape[1], b.shape[2]))

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        total.baddbmm_(a, b)

    def forward(
        self, block: Mapped, sums: Tensor, log_max: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor]:
        n, done = block.queries.shape[1], 0
        u = scratch("u", block.values, *block.values.shape)
        cut = zip(*map(self._chunks, (*block[:3], u)), self._scales(block.log_scale), strict=False)
        for fq, fk, vc, uc, scale in cut:
            scales = None if scale is None else _Scales(scale, log_max)
            pairs = _pairs(fq, fk, scales, scratch("pairs", fq, *fq.shape[:2], fq.shape[1]))
            if first and not done:
                torch.bmm(pairs, vc, out=uc)
            else:
                torch.bmm(fq, sums, out=uc)
                if scales is not None:
                    uc.mul_(scales.of_sums)
                uc.baddbmm_(pairs, vc)
            done += fq.shape[1]
            if not last or done < n:
                _advance(sums, fk, vc, scales)
            log_max = log_max if scales is None else scales.after
        return u, log_max

    def backward(
        self, block: Mapped, g: Tensor, sums: Tensor, log_max: Tensor, rest: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        queries, keys, values, log_scale = block
        E = values.shape[2] - 1
        to_q, to_k = scratch("to queries", queries, *queries.shape), scratch("to keys", keys, *keys.shape)
        to_v = scratch("to values", keys, *values.shape[:2], E)
        # The sums before each chunk, forwards; then the chunks, backwards.
        chunks: list[_Chunk] = []
        for fk, vc, scale in zip(self._chunks(keys), self._chunks(values), self._scales(log_scale), strict=False):
            scales = None if scale is None else _Scales(scale, log_max)
            chunks.append(_Chunk(fk, vc, scales, sums))
            if len(chunks) * self.size < keys.shape[1]:
                sums = sums.clone()
                _advance(sums, fk, vc, scales)
                log_max = log_max if scales is None else scales.after
        cut = zip(chunks, *map(self._chunks, (queries, g, to_q, to_k, to_v)), strict=True)
        for (fk, vc, scales, before), fq, gc, dfq, dfk, dvc in reversed(list(cut)):
            L, n = fk.shape[:2]
            a = _pairs(fq, fk, scales, scratch("pairs", fq, L, n, n))
            p = _pairs(gc, vc, scales, scratch("gradients of pairs", fq, L, n, n))
            nothing_before = first and before is chunks[0].before
            of_queries, of_keys = (None, None) if scales is None else (scales.of_sums, scales.of_keys)
            _from_both(dfq, p, fk, None if nothing_before else (gc, before.mT), of_queries)
            _from_both(dfk, p.mT, fq, None if last else (vc, rest.mT), of_keys)
            _from_both(dvc, a.mT, gc[..., :E], None if last else (fk, rest[..., :E]), of_keys)
            last = False
            if not nothing_before:
                if scales is not None:
                    rest.mul_(scales.decay)
                    fq = fq * scales.of_sums
                rest.baddbmm_(fq.mT, gc)
        return to_q, to_k, to_v

    def _chunks(self, x: Tensor) -> tuple[Tensor, ...]:
        return torch.split(x, self.size, dim=1)

    def _scales(self, log_scale: Tensor | None) -> Iterable[Tensor | None]:
        return itertools.repeat(None) if log_scale is None else torch.split(log_scale, self.size, dim=1)


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


# --- all chunks at once ---

_ALIGNED = 8  # numbers of 16 bits: tensor cores want rows of whole 16 bytes


class _Levels:
    """Where keys have log scales: what `_Scales` says of a chunk, of all C chunks.

    Attributes:
        pairs [L, C, n, n], of_sums and of_keys [L, C, n, 1]: see `_Scales`.
        decay: exp(level_j - level_i) for j <= i, 0 elsewhere, [L, C + 1, C + 1]; level 0 is the largest log scale
            before the block, level i that after chunk i.
        after: the largest log scale after the block, [L].
    """

    def __init__(self, log_scale: Tensor, log_max: Tensor) -> None:
        top = torch.maximum(log_max[:, None], log_scale.flatten(1).cummax(-1).values).view_as(log_scale)
        levels = torch.cat([log_max[:, None], top[..., -1]], dim=1)
        self.after = levels[:, -1]
        top = finite(top)
        relative = log_scale[..., None, :] - top[..., None]
        self.pairs = relative.masked_fill_(relative > 0, 0.0).exp_()
        self.of_sums = (levels[:, :-1, None] - top).exp()[..., None]
        self.of_keys = (log_scale - finite(levels[:, 1:])[..., None]).exp()[..., None]
        difference = levels[:, None, :] - finite(levels)[:, :, None]
        self.decay = difference.masked_fill_(difference > 0, 0.0).exp_().tril_()


class AtOnce:
    """All chunks of the block at once.

    Args:
        operands: the type to which operands of products are rounded, their sums being float32; None: they stay as they
            are. With bfloat16 the products run in tensor cores. What rounding takes is multiplied too where it would
            show: in sums, which late in a sequence give nearly all of an output, and in g, whose parts cancel.
    """

    size = 128
    by_pairs_bidirectional = 0  # sums take two products as well

    def __init__(self, operands: torch.dtype | None = None) -> None:
        self.operands = operands
        self.by_pairs = self.size if operands is None else 1  # pairs are multiplied in float32
        self.name = "chunks at once" if operands is None else f"chunks at once, {str(operands).split('.')[-1]}"

    def product(self, a: Tensor, b: Tensor, name: str = "", *, exact: str = "") -> Tensor:
        del name
        if self.operands is None:
            return a @ b
        rounded_a, rounded_b = a.to(self.operands), b.to(self.operands)
        out = _float32_product(rounded_a, rounded_b)
        if "a" in exact:
            out += _float32_product((a - rounded_a).to(self.operands), rounded_b)
        if "b" in exact:
            out += _float32_product(rounded_a, (b - rounded_b).to(self.operands))
        return out

    def add_product(self, total: Tensor, a: Tensor, b: Tensor) -> None:
        total += self.product(a, b, exact="b")

    def forward(
        self, block: Mapped, sums: Tensor, log_max: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor]:
        width = block.values.shape[2]
        queries, keys, values = self._cut(block.queries), self._cut(block.keys), self._cut(self._aligned(block.values))
        levels = self._levels(block.log_scale, log_max)
        u = self.product(self._pairs(queries, keys, levels), values)
        if not (first and last and queries.shape[1] == 1):  # one chunk alone has no use for sums
            before = self._before(keys, values, levels, self._aligned(sums))
            u += self.product(_times(queries, levels.of_sums if levels else None), before[:, :-1], exact="b")
            sums.copy_(before[:, -1, :, :width])
        return self._joined(u, block.queries)[..., :width], levels.after if levels else log_max

    def backward(
        self, block: Mapped, g: Tensor, sums: Tensor, log_max: Tensor, rest: Tensor, *, first: bool, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        width = block.values.shape[2]
        queries, keys = self._cut(block.queries), self._cut(block.keys)
        values, g = self._cut(self._aligned(block.values)), self._cut(self._aligned(g))
        levels = self._levels(block.log_scale, log_max)
        a, p = self._pairs(queries, keys, levels), self._pairs(g, values, levels, exact="a")
        to_q, to_k, to_v = self.product(p, keys), self.product(p.mT, queries), self.product(a.mT, g)
        if not (first and last and queries.shape[1] == 1):
            of_sums, of_keys = (levels.of_sums, levels.of_keys) if levels else (None, None)
            before = self._before(keys, values, levels, self._aligned(sums))[:, :-1]
            to_q += _times(self.product(g, before.mT, exact="ab"), of_sums)
            after = self._after(_times(queries, of_sums), g, levels, self._aligned(rest))
            to_k += _times(self.product(values, after[:, 1:].mT, exact="b"), of_keys)
            to_v += _times(self.product(keys, after[:, 1:]), of_keys)
            rest.copy_(after[:, 0, :, :width])
        to_q, to_k, to_v = (self._joined(x, block.queries) for x in (to_q, to_k, to_v))
        return to_q, to_k, to_v[..., : width - 1]

    def _before(self, keys: Tensor, values: Tensor, levels: _Levels | None, sums: Tensor) -> Tensor:
        """S before each chunk and after the last, [L, C + 1, F, E + 1]."""
        own = self.product(_times(keys, levels.of_keys if levels else None).mT, values)
        every = torch.cat([sums[:, None], own], dim=1)
        return (levels.decay @ every.flatten(2)).view_as(every) if levels else every.cumsum(1)

    def _after(self, queries: Tensor, g: Tensor, levels: _Levels | None, rest: Tensor) -> Tensor:
        """R for what lies before the block, and after each chunk, [L, C + 1, F, E + 1]."""
        every = torch.cat([self.product(queries.mT, g, exact="b"), rest[:, None]], dim=1)
        return (levels.decay.mT @ every.flatten(2)).view_as(every) if levels else every.flip(1).cumsum(1).flip(1)

    def _pairs(self, rows: Tensor, columns: Tensor, levels: _Levels | None, *, exact: str = "") -> Tensor:
        """rows_i . columns_j, for pairs of a chunk that may meet, and 0 elsewhere: [L, C, n, n]."""
        return _times(self.product(rows, columns.mT, exact=exact), levels.pairs if levels else None).tril_()

    def _levels(self, log_scale: Tensor | None, log_max: Tensor) -> _Levels | None:
        if log_scale is None:
            return None
        size = min(log_scale.shape[1], self.size)
        log_scale = pad(log_scale, (0, -log_scale.shape[1] % size), value=-torch.inf)
        return _Levels(log_scale.view(log_scale.shape[0], -1, size), log_max)

    def _cut(self, x: Tensor) -> Tensor:
        """[L, n, X] -> [L, C, size, X], filled up with zeros; a block that is shorter is one chunk of its length."""
        size = min(x.shape[1], self.size)
        return _filled(x, rows=-x.shape[1] % size).view(x.shape[0], -1, size, x.shape[2])

    def _aligned(self, x: Tensor) -> Tensor:
        """Columns of zeros after those of [v, 1], here once and not in each product."""
        return x if self.operands is None else _filled(x, columns=-x.shape[-1] % _ALIGNED)

    @staticmethod
    def _joined(x: Tensor, like: Tensor) -> Tensor:
        """[L, C, size, X] -> [L, n, X]"""
        return x.flatten(1, 2)[:, : like.shape[1]]


def _float32_product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b [..., n, m], of operands of 16 bits, in float32."""
    if not _gives_float32(a.device):
        return a.float() @ b.float()
    columns, inner = b.shape[-1], -a.shape[-1] % _ALIGNED
    a, b = _filled(a, columns=inner), _filled(b, columns=-columns % _ALIGNED, rows=inner)
    return _bmm(a.flatten(0, -3), b.flatten(0, -3)).view(*a.shape[:-1], -1)[..., :columns]


def _gives_float32(device: torch.device) -> bool:
    """Of operands of 16 bits. Elsewhere float32 multiplies the same rounded numbers, which only tests ask for."""
    return device.type == "cuda"


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b, out_dtype=torch.float32)


def _filled(x: Tensor, *, columns: int = 0, rows: int = 0) -> Tensor:
    """With so many columns and rows of zeros more; `pad` would copy where there are none."""
    return pad(x, (0, columns, 0, rows)) if columns or rows else x


def _times(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor
