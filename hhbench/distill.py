"""Attention transfer: teach each layer's maps to mimic the softmax that they replace.

Teacher-forced (Zhang et al. 2024, section 4.2): every layer computes softmax from its own q and k and passes the true
output on, so that the layers' losses don't depend on each other. The loss of a layer is the soft cross-entropy

    L = - mean over attended queries and heads of sum_j softmax_ij log weights_ij

which is KL(softmax || weights) plus the entropy of softmax; or the error of its output; or both (see `TransferLoss`).

Memory grows with the number of tokens and not with depth. The model itself runs without a graph. A layer's loss is
taken a few queries at a time, and each block's graph is freed before the next one is built.
"""

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hhbench.attention import ATTENTIONS, Attention, repeat_heads, token_positions, zero_padding
from hhbench.errors import HHBenchError, unknown_name
from hhbench.hosts import AttentionSlot, Interceptor, slots

QUERY_BLOCK = 256  # queries at a time, at most
PAIRS = 2**17  # pairs of a query and a key at a time, for each head and sequence: 32 queries of 4,096 tokens
SAMPLED_BLOCK = 16  # consecutive queries that are drawn together
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

    def _blocks(self, student: Attention, q: Tensor, num_keys: int) -> tuple[Sequence[_Block], float]:
        """The blocks that are taught at this call, and their share of all."""
        N, causal = q.shape[2], student.shape.causal
        if not causal and not student.ordered_by_positions:
            return list(_whole_rows(q, num_keys)), 1.0
        size = min(QUERY_BLOCK, max(1, PAIRS // num_keys))
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
