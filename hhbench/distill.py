"""Attention transfer: teach each layer's maps to mimic the softmax that they replace.

Teacher-forced (Zhang et al. 2024, section 4.2): every layer computes softmax from its own q and k and passes the true
output on, so that the layers' losses don't depend on each other. The loss of a layer is the soft cross-entropy

    L = - mean over attended queries and heads of sum_j softmax_ij log weights_ij

which is KL(softmax || weights) plus the entropy of softmax; or the error of its output; or both (see `TransferLoss`).

Memory grows with the number of tokens and not with depth. The model itself runs without a graph. A layer's loss is
taken a few queries at a time, and each block's graph is freed before the next one is built.

A linear attention has a way of its own (`_PairLoss`): its tokens are mapped once, loss and gradient follow from the
features by formula, and the maps receive the gradient at the end. Any other is asked for its weights, block by block.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeGuard, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hhbench.attention import (
    ATTENTIONS,
    Attention,
    repeat_heads,
    sum_dtype,
    token_positions,
    zero_padding,
)
from hhbench.errors import HHBenchError, unknown_name
from hhbench.hosts import AttentionSlot, Interceptor, slots
from hhbench.linear_attention import LinearAttention

QUERY_BLOCK = 256  # queries at a time, at most
PAIRS = 2**17  # pairs of a query and a key at a time, for each head and sequence: 32 queries of 4,096 tokens
SAMPLED_BLOCK = 16  # consecutive queries that are drawn together
MAPPED = 1024  # tokens of all sequences that are mapped at a time
TILE = 2**17  # pairs at a time on a CPU, for each of its threads: what the cache of a core holds
HIDDEN = -1e30  # the logit of a key that a query doesn't see: finite, so that a query which sees none gives no NaN
OUTPUT_FACTOR = 1000.0  # of the output's error where the weights are taught too, as LoLCATs' public code has it
TINY = torch.finfo(torch.float32).tiny

Loss = Literal["weights", "output", "both"]
LOSSES: tuple[str, ...] = get_args(Loss)


@contextlib.contextmanager
def intercepted(model: nn.Module, interceptors: dict[str, Interceptor]) -> Iterator[None]:
    """Within the context, the named layers call their interceptors instead of their attentions."""
    hosted = slots(model)
    try:
        for name, interceptor in interceptors.items():
            hosted[name].interceptor = interceptor
        yield
    finally:
        for slot in hosted.values():
            slot.interceptor = None


def softmax_of(slot: AttentionSlot) -> Attention:
    """The softmax of the layer in which this slot sits: the teacher. A layer that was kept is its own."""
    if slot.placement.is_softmax:
        return slot.attention
    teacher = ATTENTIONS.get("softmax").build(slot.attention.shape)
    assert isinstance(teacher, Attention)
    return teacher.eval()  # a teacher drops nothing out


@dataclass(frozen=True)
class _Block:
    """Some queries, and how keys are brought before them so that the queries are the last tokens, as the contract has
    it: a causal block's keys end with its last query; keys that all are seen go round until they do.

    Attributes:
        rows: of the batch.
        tokens: which of the keys' tokens ask.
        causal: whether later keys are left out.
    """

    rows: slice
    tokens: slice
    causal: bool

    def keys(self, x: Tensor, dim: int = 2) -> Tensor:
        """x [B, G, M, D], or of another shape with the tokens at `dim`."""
        x, stop = x[self.rows], self.tokens.stop
        if self.causal:
            return x.narrow(dim, 0, stop)
        return x if stop == x.shape[dim] else x.roll(-stop, dim)

    def mask(self, key_mask: Tensor | None) -> Tensor | None:
        return None if key_mask is None else self.keys(key_mask, 1)

    def asked(self, key_mask: Tensor | None) -> Tensor | None:
        """The mask of the queries [B, n]."""
        return None if key_mask is None else key_mask[self.rows, self.tokens]

    def queries(self, q: Tensor, num_keys: int) -> Tensor:
        """q [B, H, N, D], the last N of the tokens."""
        before = num_keys - q.shape[2]
        return q[self.rows, :, self.tokens.start - before : self.tokens.stop - before]


def _cut(num_queries: int, num_keys: int, size: int, *, causal: bool) -> Iterator[_Block]:
    """All queries in blocks, the last of which may be smaller."""
    before = num_keys - num_queries
    for start in range(before, num_keys, size):
        yield _Block(slice(None), slice(start, min(start + size, num_keys)), causal)


def _whole_rows(q: Tensor, num_keys: int) -> Iterator[_Block]:
    """All queries of some rows of the batch: where each sees every key, wherever it stands."""
    B, N = q.shape[0], q.shape[2]
    size = max(1, B * QUERY_BLOCK // N)
    for start in range(0, B, size):
        yield _Block(slice(start, start + size), slice(num_keys - N, num_keys), False)


class QueryBlock(NamedTuple):
    """Queries [b, H, n, D], the keys [b, G, m, D] and the key mask [b, m] that go with them, and the queries' mask
    [b, n]. The queries are the last of the keys' tokens.
    """

    q: Tensor
    k: Tensor
    key_mask: Tensor | None
    attended: Tensor | None


def query_blocks(q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool) -> Iterator[QueryBlock]:
    """Queries in blocks whose keys are in their own order.

    Where every query sees every key, that leaves blocks of whole rows of the batch.
    """
    M = k.shape[2]
    blocks = _cut(q.shape[2], M, QUERY_BLOCK, causal=True) if causal else _whole_rows(q, M)
    for block in blocks:
        yield QueryBlock(block.queries(q, M), block.keys(k), block.mask(key_mask), block.asked(key_mask))


def draw_blocks(count: int, taken: int, generator: torch.Generator | None) -> list[int]:
    """So many of `count` blocks, every choice as likely as any other, in order."""
    return sorted(torch.randperm(count, generator=generator)[:taken].tolist())


def has_features(student: Attention) -> TypeGuard[LinearAttention]:
    """Whether its weights are what `LinearAttention` makes of its maps, and no subclass's own."""
    return isinstance(student, LinearAttention) and type(student).weights is LinearAttention.weights


class _Queries(NamedTuple):
    """Mapped queries of some blocks, n tokens, and what the pairs need of them. R query heads share a head of keys.

    Attributes:
        features: [L, R, n, F].
        logits: scale q, [L, R, n, D]: what softmax multiplies keys with.
        outputs: softmax's, [L, R, n, E]; None where they teach nothing.
        unasked: padded queries, bool [L, 1, n, 1]; None where there are none.
        gradient: with respect to the features, to be filled in.
    """

    features: Tensor
    logits: Tensor
    outputs: Tensor | None
    unasked: Tensor | None
    gradient: Tensor


class _PairLoss:
    """The loss of a linear attention and its gradient with respect to its features, by formula.

    With scores s_ij = phi(q_i).phi(k_j), S_i = sum_j s_ij, p the weights of softmax and o_i = sum_j s_ij v_j / S_i,

        "weights"   L_i = - sum_j p_ij log s_ij + log S_i      dL_i / ds_ij = 1 / S_i - p_ij / s_ij
        "output"    L_i = mean over channels of e_i^2          dL_i / ds_ij = 2 / E e_i.(v_j - o_i) / S_i

    for e_i = o_i - softmax's output. The weights s_ij / S_i are never formed. Each token is mapped once or, where there
    are many, its key once more for the gradient: features receive what all pairs give, and only then the maps. On a CPU
    pairs come in tiles that stay in the cache.

    Everything is laid out by L = B S heads of keys, for S = H or, where the student's keys are shared, S = G.
    """

    def __init__(
        self,
        student: LinearAttention,
        loss: Loss,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        key_mask: Tensor | None,
        out: Tensor,
    ) -> None:
        self.student, self.q, self.k, self.out, self.dtype = student, q, k, out, sum_dtype(q)
        self.by_weights, self.by_output = loss != "output", loss != "weights"
        B, M, causal = k.shape[0], k.shape[2], student.shape.causal
        self.key_mask = None if key_mask is None or key_mask.all() else key_mask
        self.positions = token_positions(self.key_mask, batch_size=B, length=M, device=k.device)
        size = max(1, MAPPED // B)
        self.key_blocks = [slice(start, min(start + size, M)) for start in range(0, M, size)]
        self._mapped: tuple[Tensor, Tensor | None] | None = None
        features, scales = [], []
        for tokens in self.key_blocks:
            mapped = self._map_keys(tokens)
            features.append(mapped[0].detach())
            scales.append(None if mapped[1] is None else mapped[1].detach())
            if len(self.key_blocks) == 1:
                self._mapped = mapped  # its graph is small enough to wait
            del mapped
        heads = features[0].shape[1]
        self.features = torch.cat(features, 2).flatten(0, 1)
        self.gradient = torch.zeros_like(self.features)
        self.log_scale = None if scales[0] is None else torch.cat([s for s in scales if s is not None], 2).flatten(0, 1)
        if self.log_scale is not None:
            top = self.log_scale.cummax(-1).values if causal else self.log_scale.amax(-1, keepdim=True).expand(-1, M)
            self.top = top.masked_fill(top == -torch.inf, 0.0)
            self.scale_gradient = torch.zeros_like(self.log_scale)
        # Features at or above a floor leave no score of a visible key at 0; others may.
        self.may_vanish = self.log_scale is not None or student.query_map.signed

        def by_head(x: Tensor) -> Tensor:
            return repeat_heads(zero_padding(x.to(self.dtype), self.key_mask), heads).flatten(0, 1)

        self.keys = by_head(k)
        self.values = by_head(v) if self.by_output else None
        self.hidden = None
        if self.key_mask is not None:
            self.hidden = ~self.key_mask.repeat_interleave(heads, 0)[:, None, None, :]

    def _map_keys(self, tokens: slice) -> tuple[Tensor, Tensor | None]:
        mask = None if self.key_mask is None else self.key_mask[:, tokens]
        with torch.enable_grad():
            return self.student.map_keys(self.k[:, :, tokens], positions=self.positions[:, tokens], key_mask=mask)

    def cut(self, blocks: Sequence[_Block]) -> Iterator[Sequence[_Block]]:
        """Blocks whose queries are mapped together."""
        width = max(block.tokens.stop - block.tokens.start for block in blocks)
        step = max(1, MAPPED // (self.k.shape[0] * width))
        return (blocks[start : start + step] for start in range(0, len(blocks), step))

    @torch.no_grad()
    def add(self, blocks: Sequence[_Block], weight: float) -> Tensor:
        """The loss of these queries, summed over them and heads. Query maps receive its gradient times `weight`."""
        L, M, before = self.features.shape[0], self.k.shape[2], self.k.shape[2] - self.q.shape[2]
        causal = self.student.shape.causal

        def asking(x: Tensor, dim: int, skipped: int = 0) -> Tensor:
            parts = [x.narrow(dim, b.tokens.start - skipped, b.tokens.stop - b.tokens.start) for b in blocks]
            return parts[0] if len(parts) == 1 else torch.cat(parts, dim)

        q = asking(self.q, 2, before)
        mask = None if self.key_mask is None else asking(self.key_mask, 1)
        with torch.enable_grad():
            mapped = self.student.map_queries(q, positions=asking(self.positions, 1), key_mask=mask)

        def by_head(x: Tensor) -> Tensor:
            return x.reshape(L, -1, *x.shape[2:])

        features = by_head(mapped.detach())
        queries = _Queries(
            features=features,
            logits=by_head(zero_padding(q.to(self.dtype), mask) * self.student.shape.scale),
            outputs=by_head(asking(self.out, 2, before).to(self.dtype)) if self.by_output else None,
            unasked=None if mask is None else ~mask.repeat_interleave(L // mask.shape[0], 0)[:, None, :, None],
            gradient=torch.empty_like(features),
        )
        total, start = features.new_zeros(()), 0
        for block in blocks:
            n = block.tokens.stop - block.tokens.start
            num_keys = block.tokens.stop if causal else M
            heads = L
            if features.device.type == "cpu":
                heads = max(1, TILE * torch.get_num_threads() // (features.shape[1] * n * num_keys))
            for first in range(0, L, heads):
                some = slice(first, min(first + heads, L))
                total += self._tile(queries, some, slice(start, start + n), block.tokens, num_keys)
            start += n
        if mapped.requires_grad:
            mapped.backward(queries.gradient.mul_(-weight).view_as(mapped))  # type: ignore[no-untyped-call]
        return total

    def _tile(self, queries: _Queries, heads: slice, rows: slice, tokens: slice, num_keys: int) -> Tensor:
        """The loss of some heads and of consecutive queries, which see the first `num_keys` keys or some of them."""
        m, n, causal = num_keys, rows.stop - rows.start, self.student.shape.causal
        fq, fk = queries.features[heads, :, rows].flatten(1, 2), self.features[heads, :m]
        unasked = None if queries.unasked is None else queries.unasked[heads, :, rows]
        scores = torch.bmm(fq, fk.mT).view(fk.shape[0], -1, n, m)
        relative = None
        if self.log_scale is not None:
            relative = self.log_scale[heads, None, None, :m] - self.top[heads, None, tokens, None]
            scores.mul_(relative.clamp_max_(0.0).exp_())
        if causal:
            scores[..., m - n :].tril_()
        normaliser = scores.sum(-1, keepdim=True)
        inverse = normaliser.reciprocal().masked_fill_(normaliser == 0, 0.0)
        # Down the loss with respect to a score: a part for each pair, less a constant for each query.
        total, constant, towards = normaliser.new_zeros(()), torch.zeros_like(inverse), None
        values = None if self.values is None else self.values[heads, :m]
        if values is not None and queries.outputs is not None:
            factor, wanted = OUTPUT_FACTOR if self.by_weights else 1.0, queries.outputs[heads, :, rows]
            found = torch.bmm(scores.flatten(1, 2), values).view_as(wanted).mul_(inverse)
            error = found - wanted
            if unasked is not None:
                error.masked_fill_(unasked, 0.0)
            total += factor * error.square().mean(-1).sum()
            towards = error.mul_(inverse).mul_(-2 * factor / error.shape[-1])
            constant += (towards * found).sum(-1, keepdim=True)
        if self.by_weights:
            target = self._softmax(queries.logits[heads, :, rows], heads, m)
            if unasked is not None:
                target.masked_fill_(unasked, 0.0)
            down = target / scores.clamp_min_(TINY)
            logs = scores.log() if self.may_vanish else scores.log_()
            total -= torch.dot(target.flatten(), logs.flatten())
            mass = torch.ones_like(inverse) if unasked is None else inverse.new_ones(()) * ~unasked
            if self.may_vanish:  # a weight at the floor depends on no score
                floored = scores <= TINY
                down.masked_fill_(floored, 0.0)
                mass = target.masked_fill_(floored, 0.0).sum(-1, keepdim=True)
            total += (normaliser.masked_fill(normaliser == 0, 1.0).log_() * mass).sum()
            constant += mass * inverse
        else:
            down = torch.zeros_like(scores)
        down.sub_(constant)
        if towards is not None and values is not None:
            down.flatten(1, 2).baddbmm_(towards.flatten(1, 2), values.mT)
        if causal:
            down[..., m - n :].tril_()
        if relative is not None:
            self.scale_gradient[heads, :m] += (down * scores).sum((1, 2))
            down.mul_(relative)
        pairs = down.flatten(1, 2)
        queries.gradient[heads, :, rows] = torch.bmm(pairs, fk).view(fk.shape[0], -1, n, fk.shape[-1])
        self.gradient[heads, :m].baddbmm_(pairs.mT, fq)
        return total

    def _softmax(self, logits: Tensor, heads: slice, num_keys: int) -> Tensor:
        """The teacher's weights [g, R, n, m] of queries [g, R, n, D], the last n of the keys if causal."""
        n, m = logits.shape[2], num_keys
        scores = torch.bmm(logits.flatten(1, 2), self.keys[heads, :m].mT).view(*logits.shape[:3], m)
        if self.hidden is not None:
            scores.masked_fill_(self.hidden[heads, ..., :m], HIDDEN)
        if self.student.shape.causal:
            future = torch.ones(n, n, dtype=torch.bool, device=scores.device).triu_(1)
            scores[..., m - n :].masked_fill_(future, HIDDEN)
        return scores.softmax(-1)

    @torch.no_grad()
    def finish(self, weight: float) -> None:
        """The maps of the keys receive the gradient of all that was added, times `weight`."""
        gradient = self.gradient.mul_(-weight).view(self.k.shape[0], -1, *self.gradient.shape[1:])
        of_scale = None if self.log_scale is None else self.scale_gradient.mul_(-weight).view(*gradient.shape[:3])
        for tokens in self.key_blocks:
            features, log_scale = self._mapped or self._map_keys(tokens)
            taught = {features: gradient[:, :, tokens]}
            if log_scale is not None and of_scale is not None:
                taught[log_scale] = of_scale[:, :, tokens]
            taught = {mapped: received for mapped, received in taught.items() if mapped.requires_grad}
            torch.autograd.backward(list(taught), list(taught.values()))


def _mean_over_queries(per_query: Tensor, attended: Tensor | None) -> Tensor:
    """Sum over batch and attended queries, mean over heads. per_query: [B, H, n]."""
    if attended is not None:
        per_query = per_query.masked_fill(~attended[:, None, :], 0.0)
    return per_query.sum() / per_query.shape[1]


@dataclass
class TransferLoss:
    """An interceptor that teaches one layer. Losses are back-propagated here, inside the model's forward pass.

    Attributes:
        weight: what the loss is multiplied with: 1 / (layers x attended queries).
        loss: "weights", the soft cross-entropy; "output", the mean over channels of the squared error of the layer's
            output; "both", their sum with the second 1,000 times, as LoLCATs' public code weighs them: next to an
            entropy, outputs of a pretrained model are small. An attention without weights is taught by its output
            whatever this says.
        queries: take the loss on about so many queries of each sequence, drawn anew at each call: blocks of consecutive
            ones, each as likely as any other, the same for all sequences of the batch. Their loss counts all blocks /
            drawn blocks times, so that its mean over all draws, and its gradient's, are those of the whole loss. 0
            takes all queries, and so does a bidirectional attention that isn't `ordered_by_positions`.
        generator: what the draws come from; torch's own by default.
        total: the sum of the loss at the last call, without the weight.
    """

    weight: float = 1.0
    loss: Loss = "weights"
    queries: int = 0
    generator: torch.Generator | None = None
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __post_init__(self) -> None:
        if self.loss not in LOSSES:
            raise unknown_name("transfer loss", self.loss, LOSSES)

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        student = slot.attention
        teacher = softmax_of(slot)
        out: Tensor = teacher(q, k, v, key_mask=key_mask)
        if not out.isfinite().all():
            raise HHBenchError(
                f"softmax at layer {slot.placement.layer} of the teacher gave NaN or infinity: there is nothing to "
                "mimic; check its weights, or use precision 32-true"
            )
        self.total = torch.zeros((), device=q.device)
        if not any(parameter.requires_grad for parameter in student.parameters()):
            return out
        if not student.has_weights:
            self._teach_whole(student, q, k, v, key_mask, out)
            return out
        if has_features(student):
            self._teach_features(student, q, k, v, key_mask, out)
            return out
        M, H, positions = k.shape[2], student.shape.num_heads, None
        if not student.shape.causal:
            positions = token_positions(key_mask, batch_size=k.shape[0], length=M, device=k.device)
        blocks, share = self._blocks(student, q, M)
        for block in blocks:
            queries, keys, mask, asked = block.queries(q, M), block.keys(k), block.mask(key_mask), block.asked(key_mask)
            with torch.enable_grad():
                places = None if positions is None else block.keys(positions, 1)
                weights = student.weights(queries, keys, key_mask=mask, positions=places)
            target = None if self.loss == "output" else teacher.weights(queries, keys, key_mask=mask)
            values = None if self.loss == "weights" else repeat_heads(zero_padding(block.keys(v), mask), H)
            total, gradient = self._loss(weights.detach(), target, values, block.queries(out, M), asked)
            del target
            self.total = self.total + total / (share * H)
            weights.backward(gradient.mul_(self.weight / (share * H)))  # type: ignore[no-untyped-call]
        return out

    def _teach_features(
        self, student: LinearAttention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor
    ) -> None:
        H, (blocks, share) = student.shape.num_heads, self._blocks(student, q, k.shape[2])
        with torch.autocast(q.device.type, enabled=False):
            loss = _PairLoss(student, self.loss, q, k, v, key_mask, out)
            for some in loss.cut(blocks):
                self.total = self.total + loss.add(some, self.weight / (share * H)) / (share * H)
            loss.finish(self.weight / (share * H))

    def _blocks(self, student: Attention, q: Tensor, num_keys: int) -> tuple[Sequence[_Block], float]:
        """The blocks that are taught at this call, and their share of all."""
        N, causal = q.shape[2], student.shape.causal
        if not causal and not student.ordered_by_positions:
            return list(_whole_rows(q, num_keys)), 1.0
        size = min(QUERY_BLOCK, max(1, PAIRS // num_keys))
        if causal and has_features(student) and q.device.type == "cpu":  # small blocks: few pairs that don't meet
            size = min(size, max(32, num_keys // 8))
        if not 0 < self.queries < N:
            return list(_cut(N, num_keys, size, causal=causal)), 1.0
        size = min(size, SAMPLED_BLOCK, self.queries)
        blocks = list(_cut(N, num_keys, size, causal=causal))
        taken = min(len(blocks), round(self.queries / size))
        drawn = draw_blocks(len(blocks), taken, self.generator)
        return [blocks[i] for i in drawn], taken / len(blocks)

    def _loss(
        self, weights: Tensor, target: Tensor | None, values: Tensor | None, out: Tensor, asked: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The loss, summed over queries and heads, and its gradient with respect to the weights [B, H, n, m].

        Written out: a graph from the weights to the loss would need as much memory again, and more time.
        """
        unasked = None if asked is None else ~asked[:, None, :, None]
        total, gradient = weights.new_zeros(()), None
        if target is not None:
            target = target.to(weights.dtype)
            if unasked is not None:
                target = target.masked_fill_(unasked, 0.0)
            floored = weights.clamp_min(TINY)
            total = -torch.dot(target.flatten(), floored.log().flatten())  # no product of all pairs in memory
            # The floor lets no gradient through: weights / floored is 1 above it, and 0 where a weight is.
            gradient = target.div_(floored).mul_(floored.reciprocal_().mul_(weights)).neg_()
            del floored
        if values is not None:
            factor = 1.0 if target is None else OUTPUT_FACTOR
            values = values.to(weights.dtype)
            error = weights @ values - out
            if unasked is not None:
                error = error.masked_fill_(unasked, 0.0)
            total = total + factor * error.square().mean(-1).sum()
            of_output = error.mul_(2 * factor / error.shape[-1]) @ values.mT
            gradient = of_output if gradient is None else gradient.add_(of_output)
        assert gradient is not None
        return total, gradient

    def _teach_whole(
        self, student: Attention, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None, out: Tensor
    ) -> None:
        """By the error of the whole output, of which a sample takes part."""
        N = q.shape[2]
        asked = None if key_mask is None else key_mask[:, -N:]
        share = 1.0
        if 0 < self.queries < N:
            size = min(SAMPLED_BLOCK, self.queries)
            count = math.ceil(N / size)
            taken = min(count, round(self.queries / size))
            share = taken / count
            drawn = torch.zeros(count, dtype=torch.bool)
            drawn[draw_blocks(count, taken, self.generator)] = True
            sampled = drawn.repeat_interleave(size)[:N].to(q.device).expand(q.shape[0], N)
            asked = sampled if asked is None else asked & sampled
        with torch.enable_grad():
            error = mse_loss(student(q, k, v, key_mask=key_mask), out, reduction="none").mean(-1)
            loss = _mean_over_queries(error, asked) / share
            self.total = loss.detach()
            (loss * self.weight).backward()  # type: ignore[no-untyped-call]
