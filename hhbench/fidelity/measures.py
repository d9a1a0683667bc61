"""How much of softmax a converted model kept: per layer and head, on data that it wasn't taught on.

Two comparisons, which answer different questions and are never mixed:

    local        softmax of the student's own q and k at that layer, as in attention transfer: softmax's output is
                 passed on, so that a layer's numbers owe nothing to the layers before it
    end-to-end   the original model against the converted one on the same input, each running free: the errors of
                 earlier layers, and what finetuning changed, are part of it

Averages run over attended queries only. What is measured of a query, with t the teacher's weights, s the student's, and
z the teacher's scaled q.k, over the n keys that the query sees:

    kl                sum_j t_j (log t_j - log s_j), nats
    teacher_entropy   - sum_j t_j log t_j, nats; student_entropy likewise. Uniform weights have log n
    spearman          rank correlation of s with z, ties given their mean rank. Weights that are all equal have no
                      order: 0. A query whose z are all equal asks for none, and is left out
    violations        order the keys by z; of the neighbours where z rises, the share where s falls, by more than a
                      millionth (rounding). The same queries as for spearman
    overlap           share of the teacher's top keys among the student's as many: `top_k`, but at most half of those
                      that the query sees, so that no overlap comes for nothing. One with a single key is left out
    cosine            of the two outputs of a head

An attention without weights has its cosine alone. So has a sequence mixer, end-to-end only, of the outputs of the
whole block: it has no heads, and no softmax of its own q and k to be compared with.
"""

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity

from hhbench import hosts
from hhbench.attention import Attention, repeat_heads
from hhbench.distill import TINY, intercepted, query_blocks, softmax_of
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import AttentionSlot, MixerSlot, Placement
from hhbench.task import Batch
from hhbench.train import encode

ROUNDING = 1e-6  # a weight that falls by less of itself hasn't fallen
Numbers = list[float | None]  # one of each head; None where no query had it


# ---- the report ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measures:
    """One layer in one comparison: a number for each head, [H]. See the module for what they are.

    All but the cosine are None as a whole where there are no weights.
    """

    cosine: Numbers
    kl: Numbers | None = None
    teacher_entropy: Numbers | None = None
    student_entropy: Numbers | None = None
    spearman: Numbers | None = None
    violations: Numbers | None = None
    overlap: Numbers | None = None


MEASURES = tuple(field.name for field in dataclasses.fields(Measures))


@dataclass(frozen=True)
class LayerReport:
    """One layer.

    Attributes:
        name: of the layer in the model.
        attention: what it runs, with its options.
        kept: it is the softmax that the host had.
        local: None for a mixer.
        end_to_end: None without a teacher.
    """

    name: str
    attention: str
    kept: bool
    local: Measures | None
    end_to_end: Measures | None


@dataclass(frozen=True)
class FidelityReport:
    """All layers, in order of depth.

    Attributes:
        layers: one each.
        queries: attended queries that were measured, of one layer.
        top_k: of the overlap.
    """

    layers: list[LayerReport]
    queries: int
    top_k: int

    def mean(self, column: str, measure: str) -> float | None:
        """Over the heads of the layers that were converted, of the `local` or the `end_to_end` column."""
        found = [getattr(layer, column) for layer in self.layers if not layer.kept]
        return _mean(value for one in found if one is not None for value in getattr(one, measure) or ())

    def _means(self, column: str) -> Measures | None:
        """The converted layers as if they were one layer of one head."""
        found: dict[str, Any] = {name: self.mean(column, name) for name in MEASURES}
        given = {name: [mean] for name, mean in found.items() if mean is not None}
        return Measures(**given) if "cosine" in given else None

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "FidelityReport":
        """What `as_dict` gave."""

        def column(found: Mapping[str, Any] | None) -> Measures | None:
            return None if found is None else Measures(**found)

        layers = [
            LayerReport(**{**one, "local": column(one["local"]), "end_to_end": column(one["end_to_end"])})
            for one in values["layers"]
        ]
        return cls(layers, values["queries"], values["top_k"])

    def table(self, *, heads: bool = False) -> tuple[list[str], list[list[str]]]:
        """Headers and rows: a layer a row, means over its heads, or with `heads` a row for each; then the mean."""
        columns = ["local"]
        if any(layer.end_to_end is not None for layer in self.layers):
            columns.append("end_to_end")
        titles = ["KL", "entropy", "Spearman", "falls", f"top {self.top_k}", "cosine"]
        headers = ["\nlayer", *(["\nhead"] if heads else []), "\nattention"]
        for column in columns:  # what it is stands over its first title
            headers += [f"{column.replace('_', '-')}:\n{titles[0]}", *(f"\n{title}" for title in titles[1:])]
        rows: list[list[str]] = []
        for index, layer in enumerate(self.layers):
            label = f"{layer.attention} (kept)" if layer.kept else layer.attention
            found: list[Measures | None] = [getattr(layer, column) for column in columns]
            if not heads:
                rows.append([str(index), label, *(c for one in found for c in _cells(one, None))])
                continue
            for head in range(max(len(one.cosine) for one in found if one is not None) if any(found) else 1):
                rows.append([str(index), str(head), label, *(c for one in found for c in _cells(one, head))])
        converted = [layer for layer in self.layers if not layer.kept]
        if len(converted) > 1:
            means = [self._means(column) for column in columns]
            what = "mean" if len(converted) == len(self.layers) else f"mean of {len(converted)} converted"
            rows.append([what, *([""] if heads else []), "", *(c for one in means for c in _cells(one, None))])
        return headers, rows


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return sum(known) / len(known) if known else None


def _cells(measures: Measures | None, head: int | None) -> list[str]:
    """KL, entropies, Spearman, falls, overlap and cosine as a table has them; means over heads, or of one head."""

    def number(name: str, form: str = ".3f") -> str:
        values = getattr(measures, name)
        if values is None:
            return "no weights"
        value = _mean(values) if head is None else values[head]
        return "-" if value is None else f"{value:{form}}"

    if measures is None:
        return ["no softmax"] + [""] * 5
    if measures.kl is None:
        return ["no weights", "", "", "", "", number("cosine")]
    if measures.spearman is None:
        return [number("kl"), "", "", "", "", number("cosine")]
    entropies = f"{number('teacher_entropy', '.2f')} → {number('student_entropy', '.2f')}"
    return [
        number("kl"), entropies, number("spearman"), number("violations", ".1%"), number("overlap"), number("cosine"),
    ]  # fmt: skip


# ---- one layer -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Seen:
    """What one layer attended with. q [B, H, N, D], k [B, G, M, D], out [B, H, N, E]."""

    attention: Attention
    q: Tensor
    k: Tensor
    key_mask: Tensor | None
    out: Tensor


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # Apple's MPS has no float64


def _ranks_of_sorted(x: Tensor, inside: Tensor) -> Tensor:
    """Mean ranks, from 0, of rows in ascending order [Q, M], of which the first entries are `inside`."""
    index = torch.arange(x.shape[-1], device=x.device).expand_as(x)
    first = torch.ones_like(inside)
    first[:, 1:] = x[:, 1:] != x[:, :-1]
    if bool((first | ~inside).all()):  # no ties: most rows of most heads
        return index.to(x.dtype)
    last = torch.ones_like(inside)
    last[:, :-1] = first[:, 1:]
    start = index.where(first, 0).cummax(-1).values
    stop = index.where(last, x.shape[-1] - 1).flip(-1).cummin(-1).values.flip(-1)
    return ((start + stop) / 2).to(x.dtype)


def _order(scores: Tensor, weights: Tensor, visible: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Spearman and the share of violations of each query [Q], and which queries have an order. All args [Q, M]."""
    n = visible.sum(-1)
    inside = torch.arange(scores.shape[-1], device=scores.device) < n[:, None]
    scores, by_score = scores.masked_fill(~visible, torch.inf).sort(-1)
    weights = weights.gather(-1, by_score).masked_fill(~inside, torch.inf)
    in_order, by_weight = weights.sort(-1)
    ranks = torch.stack(
        [
            _ranks_of_sorted(scores, inside),
            torch.empty_like(scores).scatter(-1, by_weight, _ranks_of_sorted(in_order, inside)),
        ]
    )
    a, b = _precise(ranks - (n[:, None] - 1) / 2).masked_fill(~inside, 0.0)
    of_scores, of_weights = a.square().sum(-1), b.square().sum(-1)
    spearman = (a * b).sum(-1) / (of_scores * of_weights).sqrt().clamp_min(TINY)
    rises = (scores[:, 1:] > scores[:, :-1]) & inside[:, 1:]
    falls = rises & (weights[:, 1:] < weights[:, :-1] * (1 - ROUNDING))
    return spearman, falls.sum(-1) / rises.sum(-1).clamp_min(1), of_scores > 0


def _overlap(target: Tensor, weights: Tensor, visible: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """Share of the top keys that both have, of each query [Q], and which queries have some. All tensors [Q, M]."""
    most = (visible.sum(-1) // 2).clamp_max(top_k)
    size = min(top_k, target.shape[-1])
    top = [x.masked_fill(~visible, -1.0).topk(size).indices for x in (target, weights)]
    counted = torch.arange(size, device=target.device) < most[:, None]
    both = (top[0][:, :, None] == top[1][:, None, :]) & counted[:, :, None] & counted[:, None, :]
    return both.sum((-1, -2)) / most.clamp_min(1), most > 0


class _Tally:
    """Sums over the attended queries of one layer, per head, in float64."""

    def __init__(self, layer: str, heads: int, *, top_k: int, order: bool) -> None:
        self.layer, self.heads, self.top_k, self.order = layer, heads, top_k, order
        self.queries = 0
        self._sums: dict[str, list[float]] = {}
        self._counts: dict[str, list[int]] = {}

    def _add(self, name: str, head: int, values: Tensor, counted: Tensor | None = None) -> None:
        values = values if counted is None else values[counted]
        self._sums.setdefault(name, [0.0] * self.heads)[head] += float(_precise(values).sum())
        self._counts.setdefault(name, [0] * self.heads)[head] += values.numel()

    def add(self, teacher: _Seen, student: _Seen) -> None:
        """One batch of the layer."""
        N = student.q.shape[2]
        mask = student.key_mask
        attended = torch.ones(len(student.q), N, dtype=torch.bool, device=student.q.device)
        attended = attended if mask is None else mask[:, -N:]
        self.queries += int(attended.sum())
        for head in range(self.heads):
            ours, theirs = (_precise(seen.out[:, head])[attended] for seen in (student, teacher))
            self._finite(theirs, "output of the teacher")
            self._finite(ours, "output")
            self._add("cosine", head, cosine_similarity(ours, theirs, dim=-1))
        if not (student.attention.has_weights and teacher.attention.has_weights):
            return
        causal = student.attention.shape.causal
        blocks = (query_blocks(_wide(seen.q), _wide(seen.k), mask, causal) for seen in (teacher, student))
        for (q, k, keys, asked), (own_q, own_k, _, _) in zip(*blocks, strict=True):
            self._add_block(teacher.attention, q, k, student.attention, own_q, own_k, keys, asked)

    def _add_block(
        self,
        teacher: Attention,
        q: Tensor,
        k: Tensor,
        student: Attention,
        own_q: Tensor,
        own_k: Tensor,
        key_mask: Tensor | None,
        attended: Tensor | None,
    ) -> None:
        target = teacher.weights(q, k, key_mask=key_mask)
        weights = student.weights(own_q, own_k, key_mask=key_mask)
        self._finite(target, "weights of the teacher")
        self._finite(weights, "weights")
        scores = q @ repeat_heads(k, self.heads).mT * teacher.shape.scale
        # Queries of zeros weigh every key that they may see alike: whatever window the teacher has, that is its mask.
        visible = teacher.weights(torch.zeros_like(q), k, key_mask=key_mask)[:, 0] > 0
        rows = visible.any(-1) if attended is None else attended & visible.any(-1)
        for head in range(self.heads):
            t, s, z, seen = target[:, head][rows], weights[:, head][rows], scores[:, head][rows], visible[rows]
            precise_t, precise_s = _precise(t), _precise(s)
            log_t, log_s = precise_t.clamp_min(TINY).log(), precise_s.clamp_min(TINY).log()
            self._add("kl", head, (precise_t * (log_t - log_s)).sum(-1))
            self._add("teacher_entropy", head, -(precise_t * log_t).sum(-1))
            self._add("student_entropy", head, -(precise_s * log_s).sum(-1))
            if self.order:
                spearman, violations, ordered = _order(z, s, seen)
                self._add("spearman", head, spearman, ordered)
                self._add("violations", head, violations, ordered)
                self._add("overlap", head, *_overlap(t, s, seen, self.top_k))

    def add_outputs(self, teacher: Tensor, student: Tensor, attended: Tensor | None) -> None:
        """One batch of a whole block's outputs [B, N, C]."""
        self._finite(teacher, "output of the teacher")
        self._finite(student, "output")
        similarity = cosine_similarity(_precise(student), _precise(teacher), dim=-1)
        self.queries += similarity.numel() if attended is None else int(attended.sum())
        self._add("cosine", 0, similarity.flatten() if attended is None else similarity[attended])

    def _finite(self, x: Tensor, what: str) -> None:
        if not bool(x.isfinite().all()):
            raise HHBenchError(f"{self.layer}: {what} with NaN or infinite numbers, which can't be compared")

    def measures(self) -> Measures:
        """The means."""

        def means(name: str) -> Numbers | None:
            if name not in self._sums:
                return None
            sums, counts = self._sums[name], self._counts[name]
            return [total / count if count else None for total, count in zip(sums, counts, strict=True)]

        found: dict[str, Any] = {name: means(name) for name in MEASURES}
        return Measures(**found | {"cosine": found["cosine"] or [None] * self.heads})


def _wide(x: Tensor) -> Tensor:
    """Half precision would round weights into ties."""
    return x.float() if x.element_size() < 4 else x


# ---- the whole model -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LengthPoint:
    """How a model fares on sequences of a length.

    Attributes:
        times: the length that it was taught at.
        length: in tokens, at most.
        examples: how many were measured.
        kl: of the local column, the mean over converted layers and heads; None for an attention without weights.
        perplexity, teacher_perplexity: per token, for decoders.
        skipped: why nothing was measured.
    """

    times: int
    length: int
    examples: int = 0
    kl: float | None = None
    perplexity: float | None = None
    teacher_perplexity: float | None = None
    skipped: str | None = None


@torch.no_grad()
def measure(
    student: nn.Module,
    batches: Iterable[Batch],
    *,
    teacher: nn.Module | None = None,
    top_k: int = 10,
    order: bool = True,
    watch: Callable[[int], None] | None = None,
) -> FidelityReport:
    """Compare the attentions of a hosted model with softmax. Both models are left as they were.

    Args:
        student: a model that `hosts.convert` gave its attentions.
        batches: of the model's keyword arguments, on any device.
        teacher: the softmax model that the student was converted from, for the `end_to_end` column; it is given
            hhbench's softmax if it has none of hhbench's attentions yet.
        top_k: how many keys the overlap compares.
        order: False leaves out spearman, violations and overlap, which take most of the time.
        watch: called with the number of batches done.

    Raises:
        UsageError: the student has no attention of hhbench's, or the teacher's layers aren't its own.
        HHBenchError: there was no batch, or something in it isn't finite.
    """
    places = _places(student)
    if not places:
        raise UsageError(f"{type(student).__name__} has no attention of hhbench's: convert it first")
    if top_k < 1:
        raise UsageError(f"top_k must be at least 1, not {top_k}")
    if teacher is not None:
        teacher = _softmax_model(teacher, places)
    local, end_to_end = (
        {p.layer: _Tally(p.layer, _heads(place), top_k=top_k, order=order) for p, place in places} for _ in range(2)
    )
    done = 0
    with evaluating(student, *([teacher] if teacher is not None else [])):
        for done, batch in enumerate(batches, start=1):
            inputs = on_device(batch, student)
            if slots := hosts.slots(student):
                with intercepted(student, {name: _Local(local[name]) for name in slots}):
                    encode(student, inputs)
            if teacher is not None:
                _run_free(student, teacher, inputs, end_to_end)
            if watch is not None:
                watch(done)
    if not done:
        raise HHBenchError("there is no batch to measure on")
    layers = [
        LayerReport(
            placement.layer,
            label_of(placement),
            placement.is_softmax,
            local[placement.layer].measures() if isinstance(place, AttentionSlot) else None,
            end_to_end[placement.layer].measures() if teacher is not None else None,
        )
        for placement, place in places
    ]
    queries = max(tally.queries for tally in (*local.values(), *end_to_end.values()))
    return FidelityReport(layers, queries, top_k)


@dataclass
class _Local:
    """An interceptor that compares a layer with softmax of its own q and k, and passes softmax's output on."""

    tally: _Tally

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        teacher = softmax_of(slot)
        out: Tensor = teacher(q, k, v, key_mask=key_mask)
        own: Tensor = slot.attention(q, k, v, key_mask=key_mask)
        self.tally.add(_Seen(teacher, q, k, key_mask, out), _Seen(slot.attention, q, k, key_mask, own))
        return out


@dataclass
class _Keep:
    """An interceptor that keeps what a layer of the teacher attended with."""

    seen: list[_Seen]

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out: Tensor = slot.attention(q, k, v, key_mask=key_mask)
        self.seen.append(_Seen(slot.attention, q, k, key_mask, out))
        return out


@dataclass
class _Against:
    """An interceptor that compares a layer with what was kept of the teacher's, which is then forgotten."""

    seen: list[_Seen]
    tally: _Tally

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out: Tensor = slot.attention(q, k, v, key_mask=key_mask)
        self.tally.add(self.seen.pop(), _Seen(slot.attention, q, k, key_mask, out))
        return out


def _run_free(student: nn.Module, teacher: nn.Module, inputs: Batch, tallies: Mapping[str, _Tally]) -> None:
    """Both models on one batch, the teacher first."""
    pairs = list(zip(_places(student), _places(teacher), strict=True))
    kept: dict[str, list[_Seen]] = {own.layer: [] for (own, _), _ in pairs}
    blocks: dict[str, Tensor] = {}
    attended = inputs.get("attention_mask")
    attended = None if attended is None else attended.bool()

    def keep(layer: str) -> Callable[..., None]:
        return lambda module, args, out: blocks.update({layer: _first(out)})

    def compare(layer: str) -> Callable[..., None]:
        return lambda module, args, out: tallies[layer].add_outputs(blocks.pop(layer), _first(out), attended)

    slotted = [(own.layer, theirs.layer) for (own, place), (theirs, _) in pairs if isinstance(place, AttentionSlot)]
    mixed = [(own.layer, theirs.layer) for (own, place), (theirs, _) in pairs if isinstance(place, MixerSlot)]
    with contextlib.ExitStack() as hooks:
        for own, theirs in mixed:
            hook = teacher.get_submodule(theirs).register_forward_hook(keep(own))
            hooks.callback(hook.remove)
        hooks.enter_context(intercepted(teacher, {theirs: _Keep(kept[own]) for own, theirs in slotted}))
        encode(teacher, on_device(inputs, teacher))
    with contextlib.ExitStack() as hooks:
        for own, _ in mixed:
            hook = student.get_submodule(own).register_forward_hook(compare(own))
            hooks.callback(hook.remove)
        hooks.enter_context(intercepted(student, {own: _Against(kept[own], tallies[own]) for own, _ in slotted}))
        encode(student, inputs)


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, tuple) else out
    return found


def _places(model: nn.Module) -> list[tuple[Placement, AttentionSlot | MixerSlot]]:
    """Everything of hhbench's in a model but cross-attention, in order of depth."""
    return [(m.placement, m) for m in hosts.hosted(model).values() if isinstance(m, AttentionSlot | MixerSlot)]


def _heads(place: AttentionSlot | MixerSlot) -> int:
    return place.attention.shape.num_heads if isinstance(place, AttentionSlot) else 1


def label_of(placement: Placement) -> str:
    options = ",".join(f"{name}={value}" for name, value in sorted(placement.options.items()))
    return f"{placement.attention}[{options}]" if options else placement.attention


def _softmax_model(teacher: nn.Module, places: Sequence[tuple[Placement, Any]]) -> nn.Module:
    """The teacher with hhbench's softmax, checked against the student's layers."""
    if not hosts.slots(teacher):
        hosts.convert(teacher, "softmax")
    shapes = [(p.shape.num_heads, p.shape.head_dim) for p, _ in places]
    theirs = [(p.shape.num_heads, p.shape.head_dim) for p, _ in _places(teacher)]
    if shapes != theirs:
        raise UsageError(
            f"the teacher has {len(theirs)} attention layers and the student {len(shapes)}, or their heads differ: "
            "it isn't the model that the student was converted from"
        )
    return teacher


@contextlib.contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    modes = {module: module.training for model in models for module in model.modules()}
    try:
        for model in models:
            model.eval()
        yield
    finally:
        for module, training in modes.items():
            module.training = training


def on_device(inputs: Batch, model: nn.Module) -> Batch:
    device = next(model.parameters()).device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


# ---- a sample for the eye --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sample:
    """Some queries of one head: q.k, scaled, with both weights, [Q, M]; NaN where a query sees no key."""

    layer: int
    head: int
    scores: Tensor
    teacher: Tensor
    student: Tensor


SAMPLED_QUERIES = 4  # of each sequence


@dataclass
class _Sampling:
    """An interceptor that notes weights and q.k of a few queries, and passes softmax's output on."""

    found: list[tuple[Tensor, Tensor, Tensor]]

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        teacher, student = softmax_of(slot), slot.attention
        for row in range(min(len(q), SAMPLED_QUERIES)):
            mask = None if key_mask is None else key_mask[row : row + 1]
            attended = torch.arange(k.shape[2]) if mask is None else mask[0].nonzero().flatten().cpu()
            half = len(attended) // 2  # the later ones: a causal query sees many keys there
            last = [half + (i + 1) * (len(attended) - half) // SAMPLED_QUERIES - 1 for i in range(SAMPLED_QUERIES)]
            wanted = attended[last]
            one = slice(row, row + 1)
            for block, keys, seen, _ in query_blocks(_wide(q[one]), _wide(k[one]), mask, student.shape.causal):
                first = keys.shape[2] - block.shape[2]
                here = [index - first for index in sorted({*wanted.tolist()}) if first <= index < keys.shape[2]]
                scores = block[:, :, here] @ repeat_heads(keys, block.shape[1]).mT * student.shape.scale
                weights = [a.weights(block, keys, key_mask=seen)[:, :, here] for a in (teacher, student)]
                visible = teacher.weights(torch.zeros_like(block), keys, key_mask=seen)[:, :, here] > 0
                noted = (x[0].masked_fill(~visible[0], torch.nan).float().cpu() for x in (scores, *weights))
                self.found.append(tuple(noted))  # type: ignore[arg-type]
        out: Tensor = teacher(q, k, v, key_mask=key_mask)
        return out


@torch.no_grad()
def sample(student: nn.Module, batch: Batch, *, layers: int = 3, heads: int = 4) -> list[Sample]:
    """A few queries of a few heads of converted layers with weights, spread over depth: what the scatter plot shows."""
    slots = hosts.slots(student)
    depth = {name: index for index, (placement, _) in enumerate(_places(student)) for name in [placement.layer]}
    able = [n for n, slot in slots.items() if slot.attention.has_weights and not slot.placement.is_softmax]
    chosen = [able[i] for i in _evenly(len(able), layers)]
    watchers = {name: _Sampling([]) for name in chosen}
    with evaluating(student), intercepted(student, {n: watchers.get(n, _Pass()) for n in slots}):
        encode(student, on_device(batch, student))
    samples = []
    for name in chosen:
        longest = max(scores.shape[-1] for scores, _, _ in watchers[name].found)
        joined = [
            torch.cat([nn.functional.pad(x, (0, longest - x.shape[-1]), value=math.nan) for x in column], dim=1)
            for column in zip(*watchers[name].found, strict=True)
        ]
        samples += [Sample(depth[name], head, *(x[head] for x in joined)) for head in _evenly(len(joined[0]), heads)]
    return samples


class _Pass:
    """An interceptor that passes softmax's output on."""

    def __call__(self, slot: AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        out: Tensor = softmax_of(slot)(q, k, v, key_mask=key_mask)
        return out


def _evenly(available: int, wanted: int) -> list[int]:
    """At most `wanted` of `available` indices, the first and the last among them."""
    if available <= wanted:
        return list(range(available))
    return [round(i * (available - 1) / max(1, wanted - 1)) for i in range(wanted)]
