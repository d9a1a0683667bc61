"""Attention transfer: teach each layer's maps to mimic the softmax that they replace.

Teacher-forced (Zhang et al. 2024, section 4.2): every layer computes softmax from its own q and k and passes the true
output on, so that the layers' losses don't depend on each other. The loss of a layer is the soft cross-entropy

    L = - mean over attended queries and heads of sum_j softmax_ij log weights_ij

which is KL(softmax || weights) plus the entropy of softmax. An attention without weights is taught by the error of
its output instead. Each layer's loss is back-propagated as soon as it is known and its graph freed, so that memory
doesn't grow with depth; the model itself runs without a graph.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.functional import mse_loss

from hhbench.attention import ATTENTIONS, Attention
from hhbench.hosts import AttentionSlot, Interceptor, slots

QUERY_BLOCK = 256
TINY = torch.finfo(torch.float32).tiny


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


def _softmax_like(attention: Attention) -> Attention:
    """Softmax for the layer in which this attention sits: the teacher."""
    teacher = ATTENTIONS.get("softmax").build(attention.shape)
    assert isinstance(teacher, Attention)
    return teacher.eval()  # a teacher drops nothing out


def _query_blocks(
    q: Tensor, k: Tensor, key_mask: Tensor | None, causal: bool
) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor | None]]:
    """Queries in blocks, with the keys, the key mask and the mask of the queries [B, n] that go with them.

    A block's queries are the last of its keys' tokens, as the contract has it. Where every query sees every key, that
    leaves blocks of whole rows of the batch.
    """
    B, N, M = q.shape[0], q.shape[2], k.shape[2]
    if not causal:
        size = max(1, B * QUERY_BLOCK // N)
        for start in range(0, B, size):
            rows = slice(start, start + size)
            mask = None if key_mask is None else key_mask[rows]
            yield q[rows], k[rows], mask, None if mask is None else mask[:, M - N :]
        return
    for start in range(0, N, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, N)
        seen = M - N + stop  # a causal block's keys end with its last query
        mask = None if key_mask is None else key_mask[:, :seen]
        asked = None if key_mask is None else key_mask[:, M - N + start : M - N + stop]
        yield q[:, :, start:stop], k[:, :, :seen], mask, asked


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
        total: the sum of the loss since the last reset, without the weight.
    """

    weight: float = 1.0
    total: Tensor = field(default_factory=lambda: torch.zeros(()))

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        student = slot.attention
        teacher = _softmax_like(student)
        out: Tensor = teacher(q, k, v, key_mask=key_mask)
        self.total = torch.zeros((), device=q.device)
        with torch.enable_grad():
            if not student.has_weights:
                error = mse_loss(student(q, k, v, key_mask=key_mask), out, reduction="none").mean(-1)
                self._learn(_mean_over_queries(error, None if key_mask is None else key_mask[:, -q.shape[2] :]))
                return out
            for block, keys, mask, attended in _query_blocks(q, k, key_mask, student.shape.causal):
                target = teacher.weights(block, keys, key_mask=mask)
                log_weights = student.weights(block, keys, key_mask=mask).clamp_min(TINY).log()
                self._learn(_mean_over_queries(-(target * log_weights).sum(-1), attended))
        return out

    def _learn(self, loss: Tensor) -> None:
        self.total = self.total + loss.detach()
        (loss * self.weight).backward()  # type: ignore[no-untyped-call]


@dataclass
class LayerFidelity:
    """An interceptor that measures one layer while softmax's output is passed on, and its sums so far, in nats.

    Sums run over heads' means of attended queries.
    """

    kl: float = 0.0
    teacher_entropy: float = 0.0
    student_entropy: float = 0.0
    queries: int = 0

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        student = slot.attention
        teacher = _softmax_like(student)
        precise = torch.float32 if q.device.type == "mps" else torch.float64  # Apple's MPS has no float64
        for block, keys, mask, attended in _query_blocks(q, k, key_mask, student.shape.causal):
            target = teacher.weights(block, keys, key_mask=mask).to(precise)
            weights = student.weights(block, keys, key_mask=mask).to(precise)
            log_target, log_weights = target.clamp_min(TINY).log(), weights.clamp_min(TINY).log()
            self.kl += float(_mean_over_queries((target * (log_target - log_weights)).sum(-1), attended))
            self.teacher_entropy += float(_mean_over_queries(-(target * log_target).sum(-1), attended))
            self.student_entropy += float(_mean_over_queries(-(weights * log_weights).sum(-1), attended))
            self.queries += int(attended.sum()) if attended is not None else block.shape[0] * block.shape[2]
        out: Tensor = teacher(q, k, v, key_mask=key_mask)
        return out

    def means(self) -> tuple[float, float, float]:
        """KL(softmax || weights), entropy of softmax, entropy of the attention, per query."""
        n = max(self.queries, 1)
        return self.kl / n, self.teacher_entropy / n, self.student_entropy / n
