"""Whether an attention is what it says it is: the checks behind `hhbench check`.

A check is a generator over a `Case` (an attention, its options, a direction, a small size). It yields what it
measured, each with the bound that it must keep. Nothing here names an attention: what one is asked follows from what
it declares, which is its rung, `has_weights`, `has_state`, its directions, and whether its `forward` takes a `form`.
An exception in the attention is a failure with one line; a check that doesn't apply is skipped with the reason.

To add a check, write a generator and decorate it with `@_check(id, title)`.
"""

import dataclasses
import inspect
import io
import itertools
import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.multiprocessing.spawn import ProcessException, start_processes

from hhbench.attention import (
    ATTENTIONS,
    Attention,
    AttentionSpec,
    Direction,
    MixerShape,
    SequenceMixer,
    repeat_heads,
)
from hhbench.errors import HHBenchError, in_one_line, unknown_name
from hhbench.linear_sum import CHUNK, FORMS
from hhbench.state import DecodingState

log = logging.getLogger("hhbench")

Status = Literal["PASS", "FAIL", "SKIP"]

B, N, E = 3, 7, 3  # rows, tokens and width of the values where a check doesn't need others
ACROSS = CHUNK + 12  # tokens that reach over the border of a chunk
EXACT = 1e-12  # float64, the same operations in another batch
CLOSE = 1e-10  # float64, other operations
FAST_LENGTH, LONG_LENGTH, QUADRATIC_LENGTH = 512, 65536, 4096
QUADRATIC_GROWTH = 3.0  # of FLOPs when tokens double: 2 if linear, little more with a logarithm, 4 if quadratic
SECONDS_FOR_PROCESSES = 120.0


@dataclass(frozen=True)
class Measured:
    """One number and the bound that it must not exceed. `what` says where it was measured."""

    value: float
    bound: float
    what: str = ""

    @property
    def kept(self) -> bool:
        return self.value <= self.bound  # not so for NaN

    @property
    def strain(self) -> float:
        """By which the worst of several is found: above 1, or infinite, where the bound is broken."""
        if self.bound > 0:
            return self.value / self.bound if self.value == self.value else math.inf
        return 0.0 if self.kept else math.inf


@dataclass(frozen=True)
class Finding:
    """What a check found: the measurement nearest to its bound, or beyond it.

    Attributes:
        check: the check's id.
        title: what it asserts.
        direction: of the attention.
        status: PASS, FAIL or SKIP.
        measured: the number; None where nothing was measured.
        bound: what it must not exceed.
        note: where it was measured, why it failed or why it was skipped.
        seconds: how long the check took.
    """

    check: str
    title: str
    direction: str
    status: Status
    measured: float | None
    bound: float | None
    note: str
    seconds: float


class _DoesNotApplyError(Exception):
    """Raised by a check that has nothing to ask this attention."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """One attention with its options in one direction, and the size at which it is built."""

    spec: AttentionSpec
    causal: bool
    options: Mapping[str, Any] = field(default_factory=dict)
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 4
    scale: float = 0.7
    max_len: int = FAST_LENGTH

    @property
    def shape(self) -> MixerShape:
        return MixerShape(
            dim=self.num_heads * self.head_dim,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
            max_len=self.max_len,
            causal=self.causal,
        )

    @property
    def direction(self) -> Direction:
        return self.shape.direction

    @property
    def is_mixer(self) -> bool:
        return issubclass(self.spec.part, SequenceMixer)

    @property
    def has_weights(self) -> bool:
        return not self.is_mixer and bool(getattr(self.spec.part, "has_weights", True))

    def at(self, **changes: Any) -> "Case":
        """The same attention at another size."""
        return dataclasses.replace(self, **changes)

    def build(self, dtype: torch.dtype = torch.float64) -> Any:
        """The module in evaluation mode, moved off its initial weights: an identity hides too much."""
        module = self.spec.build(self.shape, **self.options).to(dtype).eval()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module

    def inputs(
        self, batch: int = B, length: int = N, dtype: torch.dtype = torch.float64, *, width: int | None = None
    ) -> list[Tensor]:
        """q, k and v, or hidden states for a mixer. Values are as wide as `width`.

        An attention without weights may gate values by queries, so its values are as wide as its heads.
        """
        if self.is_mixer:
            return [torch.randn(batch, length, self.shape.dim, dtype=dtype)]
        width = width or (E if self.has_weights else self.head_dim)
        return [
            torch.randn(batch, self.num_heads, length, self.head_dim, dtype=dtype),
            torch.randn(batch, self.num_kv_heads, length, self.head_dim, dtype=dtype),
            torch.randn(batch, self.num_kv_heads, length, width, dtype=dtype),
        ]

    def masks(self, length: int) -> dict[str, Tensor | None]:
        """No mask, and one with three rows: nothing padded, the left padded, holes."""
        rows = [torch.ones(length) > 0, torch.arange(length) >= length // 3, torch.rand(length) < 0.6]
        return {"no padding": None, "padded rows": torch.stack(rows)}


Check = Callable[[Case], Iterator[Measured]]


@dataclass(frozen=True)
class Entry:
    """A check with what a user and a test need to know of it.

    Attributes:
        id: what `--only` takes.
        title: what it asserts.
        run: the check.
        long: only the long profile has it.
    """

    id: str
    title: str
    run: Check
    long: bool


CHECKS: dict[str, Entry] = {}


def _check(id: str, title: str, *, long: bool = False) -> Callable[[Check], Check]:
    def add(run: Check) -> Check:
        CHECKS[id] = Entry(id, title, run, long)
        return run

    return add


def check(
    spec: str | AttentionSpec,
    *,
    options: Mapping[str, Any] | None = None,
    directions: Collection[Direction] | None = None,
    long: bool = False,
    only: Collection[str] | None = None,
    watch: Callable[[int, int, str], None] | None = None,
) -> list[Finding]:
    """Run the checks of an attention, in every direction that it serves.

    Args:
        spec: a name, `file.py:Class`, a dotted path, or a spec.
        options: of the attention.
        directions: these only.
        long: add the long profile: 65,536 tokens where the cost of these options is below quadratic.
        only: the ids of the checks to run; those of the long profile may be among them.
        watch: called before each check with the number done, the number of all, and what comes next.

    Raises:
        UsageError: no such attention, option, direction or check.
    """
    spec = ATTENTIONS.get(spec) if isinstance(spec, str) else spec
    options = dict(options or {})
    for id in only or ():
        if id not in CHECKS:
            raise unknown_name("check", id, CHECKS)
    chosen = [e for e in CHECKS.values() if (e.id in only if only is not None else long or not e.long)]
    plan: list[tuple[Entry, Case]] = []
    for direction in sorted(directions or spec.directions):
        spec.check(direction=direction, options=options)
        case = Case(spec=spec, causal=direction == "causal", options=options)
        with torch.random.fork_rng(devices=[]):
            case.spec.build(case.shape, **options)  # what can't be built is the user's mistake, not 30 failures
        plan += [(entry, case) for entry in chosen]
    findings = []
    for done, (entry, case) in enumerate(plan):
        if watch is not None:
            watch(done, len(plan), f"{entry.id}, {case.direction}")
        findings.append(_judge(entry, case))
    return findings


def _judge(entry: Entry, case: Case) -> Finding:
    start = time.perf_counter()

    def finding(status: Status, worst: Measured | None, note: str) -> Finding:
        value, bound = (None, None) if worst is None else (float(worst.value), worst.bound)
        seconds = time.perf_counter() - start
        return Finding(entry.id, entry.title, case.direction, status, value, bound, note, round(seconds, 3))

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            measured = list(entry.run(case))
        except _DoesNotApplyError as reason:
            return finding("SKIP", None, str(reason))
        except HHBenchError as error:
            log.debug("%s", entry.id, exc_info=True)
            return finding("FAIL", None, str(error))
        except Exception as error:
            log.debug("%s", entry.id, exc_info=True)
            return finding("FAIL", None, in_one_line(error))
    if not measured:
        return finding("PASS", None, "")
    worst = max(reversed(measured), key=lambda m: (m.strain, m.bound))  # the last of equals
    return finding("PASS" if worst.kept else "FAIL", worst, worst.what)


def as_json(spec: AttentionSpec, options: Mapping[str, Any], findings: list[Finding]) -> str:
    """The findings as one JSON document; a number that isn't finite becomes null."""

    def plain(finding: Finding) -> dict[str, Any]:
        values = dataclasses.asdict(finding)
        finite = finding.measured is not None and math.isfinite(finding.measured)
        return values | {"measured": finding.measured if finite else None}

    counts = {s: sum(f.status == s for f in findings) for s in ("PASS", "FAIL", "SKIP")}
    document = {
        "attention": spec.name,
        "options": dict(options),
        "passed": counts["PASS"],
        "failed": counts["FAIL"],
        "skipped": counts["SKIP"],
        "findings": [plain(f) for f in findings],
    }
    return json.dumps(document, indent=1, default=str)


# ---- tensors ---------------------------------------------------------------------------------------------------


def _token_dim(x: Tensor) -> int:
    """The dimension that counts tokens: 1 of hidden states, 2 of heads."""
    return x.ndim - 2


def _take(x: Tensor, start: int, stop: int) -> Tensor:
    return x.narrow(_token_dim(x), start, stop - start)


def _tokens(x: Tensor) -> Tensor:
    """Tokens first: [B, H, N, E] or [B, N, C] as [B, N, ...], for a mask [B, N] to pick from."""
    return x.movedim(_token_dim(x), 1)


def _grads(output: Tensor, inputs: list[Tensor], cotangent: Tensor) -> list[Tensor]:
    found = torch.autograd.grad((output * cotangent).sum(), inputs, allow_unused=True, retain_graph=True)
    return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=True)]


def _distance(found: Tensor, expected: Tensor, *, floor: float = 1.0) -> float:
    """The largest difference, relative to the largest expected value where that exceeds `floor`; NaN if any is."""
    if found.shape != expected.shape:
        raise HHBenchError(f"the output is {list(found.shape)} where {list(expected.shape)} was expected")
    if found.numel() == 0:
        return 0.0
    expected = expected.detach().to(torch.float64)
    difference = (found.detach().to(torch.float64) - expected).abs().max().item()
    return difference / max(floor, expected.abs().max().item())


def _beyond_rounding(found: Tensor, truth: Tensor) -> float:
    """The largest difference beyond what rounding the truth to found's dtype costs, relative to the largest truth.

    Half a unit in the last place of bfloat16 is up to 3.9e-3 of a value by itself.
    """
    half_unit = torch.ldexp(torch.full_like(truth, torch.finfo(found.dtype).eps / 4), truth.frexp().exponent)
    half_unit = half_unit.masked_fill(truth == 0, 0.0)
    error = ((found.double() - truth).abs() - half_unit).clamp_min(0)
    return float(error.max() / truth.abs().max())


def _not_finite(tensors: list[Tensor]) -> float:
    return float(sum((~t.isfinite()).sum().item() for t in tensors))


def _require(held: bool, otherwise: str) -> None:
    """For what is no number."""
    if not held:
        raise HHBenchError(otherwise)


def _names(case: Case, module: nn.Module) -> list[str]:
    """What the inputs and the trainable parameters are called, in the order of `_leaves`."""
    return (["x"] if case.is_mixer else ["q", "k", "v"]) + [n for n, p in module.named_parameters() if p.requires_grad]


def _leaves(module: nn.Module, inputs: list[Tensor]) -> list[Tensor]:
    return [x.requires_grad_() for x in inputs] + [p for p in module.parameters() if p.requires_grad]


def _gradient_distances(
    case: Case, module: nn.Module, found: list[Tensor], expected: list[Tensor], bound: float, where: str
) -> Iterator[Measured]:
    for name, one, other in zip(_names(case, module), found, expected, strict=True):
        yield Measured(_distance(one, other), bound, f"gradient of {name}, {where}")


def _mixers_skip(case: Case) -> None:
    if case.is_mixer:
        raise _DoesNotApplyError("a mixer takes hidden states, not q, k and v")


def _causal_only(case: Case) -> None:
    if not case.causal:
        raise _DoesNotApplyError("it sees the future by design")


def _needs_weights(case: Case) -> None:
    _mixers_skip(case)
    if not case.has_weights:
        raise _DoesNotApplyError("it declares that it has no weights")


# ---- outputs ---------------------------------------------------------------------------------------------------


@_check("output", "the output has the shape and dtype of its inputs, and is the same when asked again")
def _output(case: Case) -> Iterator[Measured]:
    for dtype in (torch.float64, torch.float32):
        module, inputs = case.build(dtype), case.inputs(dtype=dtype)
        _require(module.shape == case.shape, "it doesn't keep the shape that it was given")
        out = module(*inputs)
        expected = inputs[0].shape if case.is_mixer else (*inputs[0].shape[:3], inputs[2].shape[3])
        if not isinstance(out, Tensor) or out.shape != expected or out.dtype != dtype:
            got = f"{out.dtype} {list(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise HHBenchError(f"the output is {got} where {dtype} {list(expected)} was expected")
        yield Measured(_distance(module(*inputs), out), 0.0, f"two calls, {dtype}")


@_check("future-gradient", "no gradient reaches a later token")
def _future_gradient(case: Case) -> Iterator[Measured]:
    _causal_only(case)
    module, inputs = case.build(), [x.requires_grad_() for x in case.inputs(batch=2)]
    out = module(*inputs)
    reached = 0.0
    for i in range(N):
        here = _take(out, i, i + 1)
        for g in _grads(here, inputs, torch.randn_like(here)):
            if i + 1 < N:
                yield Measured(_take(g, i + 1, N).abs().max().item(), EXACT, f"from token {i}")
            reached = max(reached, g.abs().max().item())
    _require(reached > 0, "no gradient reaches any token")


@_check("future-value", "a later token changes no earlier output")
def _future_value(case: Case) -> Iterator[Measured]:
    """By value as well: a stabiliser over future keys has no gradient, and shows in float32 only."""
    _causal_only(case)
    for length in (N, ACROSS):
        for dtype, factor, bound in (
            (torch.float64, 50.0, EXACT),
            (torch.float32, 50.0, 1e-6),
            (torch.float32, 1000.0, 1e-6),
        ):
            module, inputs = case.build(dtype), case.inputs(batch=1, length=length, dtype=dtype)
            changed = [x.clone() for x in inputs]
            for x in changed:
                _take(x, length - 1, length).mul_(factor)
            with torch.no_grad():
                before, after = module(*inputs), module(*changed)
            # Rounding of a convolution by FFT is relative to the largest term, which may be the changed token's.
            largest = after.abs().max().item() if case.is_mixer else 1.0
            distance = _distance(_take(after, 0, length - 1), _take(before, 0, length - 1), floor=max(1.0, largest))
            yield Measured(distance, bound, f"last of {length} tokens times {factor:g}, {dtype}")
            _require(not torch.equal(after, before), "no output depends on the last token")


@_check("prefix", "a prefix of the tokens gives a prefix of the output")
def _prefix(case: Case) -> Iterator[Measured]:
    _causal_only(case)
    module, inputs = case.build(), case.inputs(batch=1, length=ACROSS)
    with torch.no_grad():
        whole = module(*inputs)
        for length in (1, N, CHUNK, ACROSS - 1):
            found = module(*(_take(x, 0, length) for x in inputs))
            yield Measured(_distance(found, _take(whole, 0, length)), CLOSE, f"{length} of {ACROSS} tokens")


@_check("sees-future", "a bidirectional output depends on later tokens")
def _sees_future(case: Case) -> Iterator[Measured]:
    if case.causal:
        raise _DoesNotApplyError("it is causal")
    module, inputs = case.build(), [x.requires_grad_() for x in case.inputs(length=4)]
    first = _take(module(*inputs), 0, 1)
    g = _grads(first, inputs, torch.randn_like(first))[-1]
    _require(bool((_take(g, 1, 4) != 0).any()), "no gradient reaches a later token")
    yield from ()  # a generator, as every check


# ---- padding and batches ---------------------------------------------------------------------------------------


@_check("padding", "padded equals unpadded, outputs and gradients, whatever lies in the padding")
def _padding(case: Case) -> Iterator[Measured]:
    module = case.build()
    for length in (N, ACROSS):
        parts = case.inputs(batch=1, length=length)
        leaves = _leaves(module, parts)
        alone = module(*parts)
        cotangent = torch.randn_like(alone)
        expected = _grads(alone, leaves, cotangent)
        for (left, right), garbage in itertools.product(((3, 0), (0, 2), (2, 3)), ("random", "1e30", "inf", "nan")):
            key_mask = torch.zeros(1, left + length + right, dtype=torch.bool)
            key_mask[:, left : left + length] = True
            where = f"{length} tokens, {left} left and {right} right, {garbage}"
            out = module(*(_between(x, left, right, garbage) for x in parts), key_mask=key_mask)
            yield Measured(_not_finite([out]), 0.0, f"not finite, {where}")
            found = _take(out, left, left + length)
            yield Measured(_distance(found, alone), CLOSE, where)
            yield from _gradient_distances(case, module, _grads(found, leaves, cotangent), expected, CLOSE, where)


def _between(x: Tensor, left: int, right: int, garbage: str) -> Tensor:
    """x with so many tokens more on either side: random ones, or this value with either sign."""

    def tokens(size: int) -> Tensor:
        shape = [*x.shape]
        shape[_token_dim(x)] = size
        noise = torch.randn(shape, dtype=x.dtype)
        return noise if garbage == "random" else noise.sign() * float(garbage)

    return torch.cat([tokens(left), x, tokens(right)], _token_dim(x))


@_check("batch", "a row of a batch gives what it gives alone")
def _batch(case: Case) -> Iterator[Measured]:
    module, inputs = case.build(), case.inputs()
    with torch.no_grad():
        for where, mask in case.masks(N).items():
            batch = module(*inputs, key_mask=mask)
            for b in range(B):
                one = module(*(x[b : b + 1] for x in inputs), key_mask=None if mask is None else mask[b : b + 1])
                yield Measured(_distance(one, batch[b : b + 1]), EXACT, f"row {b}, {where}")


@_check("heads", "a head's output depends on its own q, k and v only")
def _heads(case: Case) -> Iterator[Measured]:
    _mixers_skip(case)
    for grouped in (case, case.at(num_kv_heads=case.num_heads)):
        module, inputs = grouped.build(), grouped.inputs()
        changed = [x.clone() for x in inputs]
        group = grouped.num_heads // grouped.num_kv_heads
        for x, heads in zip(changed, (group, 1, 1), strict=True):
            x[:, :heads] = 3 * torch.randn_like(x[:, :heads])
        with torch.no_grad():
            before, after = module(*inputs), module(*changed)
        where = f"{grouped.num_heads} heads of q, {grouped.num_kv_heads} of k and v"
        yield Measured(_distance(after[:, group:], before[:, group:]), EXACT, where)
        _require(not torch.equal(after[:, :group], before[:, :group]), "a head doesn't depend on its own q, k and v")


@_check("no-key", "a query with no key to attend to gets zeros and finite gradients")
def _no_key(case: Case) -> Iterator[Measured]:
    module, inputs = case.build(), case.inputs()
    leaves = _leaves(module, inputs)
    key_mask = torch.ones(B, N, dtype=torch.bool)
    key_mask[1] = False
    key_mask[2, :4] = False
    out = module(*inputs, key_mask=key_mask)
    yield Measured(_not_finite([out]), 0.0, "outputs that are not finite")
    found = _grads(out, leaves, torch.randn_like(out))
    for name, g in zip(_names(case, module), found, strict=True):
        yield Measured(_not_finite([g]), 0.0, f"gradients of {name} that are not finite")
    if case.is_mixer:
        return
    blind = torch.zeros(B, N, dtype=torch.bool)
    blind[1] = True
    blind[2, :4] = case.causal
    yield Measured(_tokens(out)[blind].abs().max().item(), 0.0, "output of a query with no key")
    _require(bool((_tokens(out)[~blind] != 0).any()), "the output is zero everywhere")
    if case.has_weights:
        weights = module.weights(*inputs[:2], key_mask=key_mask)
        yield Measured(_tokens(weights)[blind].abs().max().item(), 0.0, "weights of a query with no key")


# ---- the definition --------------------------------------------------------------------------------------------


def _visible(case: Case, mask: Tensor | None) -> Tensor:
    """Which of the N keys each of the N queries sees, [B, N, N]."""
    visible = torch.ones(B, N, N, dtype=torch.bool) if mask is None else mask[:, None, :].expand(B, N, N)
    return visible.tril() if case.causal else visible


@_check("weights", "weights are not negative, zero where nothing may be seen, and rows sum to one")
def _weights(case: Case) -> Iterator[Measured]:
    _needs_weights(case)
    module, (q, k, _) = case.build(), case.inputs()
    with torch.no_grad():
        for where, mask in case.masks(N).items():
            weights = module.weights(q, k, key_mask=mask)
            expected = [B, case.num_heads, N, N]
            _require(list(weights.shape) == expected, f"weights are {list(weights.shape)}, not {expected}")
            visible = _visible(case, mask)[:, None].expand(weights.shape)
            yield Measured((-weights).max().clamp_min(0).item(), 0.0, f"negative weight, {where}")
            yield Measured((weights * ~visible).abs().max().item(), 0.0, f"weight of a key that is not seen, {where}")
            yield Measured(_distance(weights.sum(-1), visible.any(-1).double()), EXACT, f"sum of a row, {where}")


@_check("weights-v", "weights @ v equals forward")
def _weights_v(case: Case) -> Iterator[Measured]:
    _needs_weights(case)
    for grouped in (case, case.at(num_kv_heads=case.num_heads)):
        module, (q, k, v) = grouped.build(), grouped.inputs()
        heads = f"{grouped.num_heads} heads of q, {grouped.num_kv_heads} of k and v"
        with torch.no_grad():
            for where, mask in grouped.masks(N).items():
                expected = module.weights(q, k, key_mask=mask) @ repeat_heads(v, grouped.num_heads)
                yield Measured(_distance(module(q, k, v, key_mask=mask), expected), CLOSE, f"{heads}, {where}")


@_check("channel-weights", "without weights: those of each channel are not negative and sum to one over the keys")
def _channel_weights(case: Case) -> Iterator[Measured]:
    _mixers_skip(case)
    if case.has_weights:
        raise _DoesNotApplyError("it has weights")
    module, (q, k, v) = case.build(), case.inputs()
    try:
        module.weights(q, k)
    except HHBenchError:
        pass
    else:
        raise HHBenchError("it declares that it has no weights, and returns some")
    if not hasattr(module, "channel_weights"):
        raise _DoesNotApplyError("it has no channel_weights")
    with torch.no_grad():
        for where, mask in case.masks(N).items():
            weights = module.channel_weights(q, k, key_mask=mask)
            expected = [B, case.num_heads, N, N, v.shape[3]]
            _require(list(weights.shape) == expected, f"channel weights are {list(weights.shape)}, not {expected}")
            visible = _visible(case, mask)[:, None, :, :, None].expand(weights.shape)
            yield Measured((-weights).max().clamp_min(0).item(), 0.0, f"negative weight, {where}")
            yield Measured((weights * ~visible).abs().max().item(), 0.0, f"weight of a key that is not seen, {where}")
            yield Measured(_distance(weights.sum(-2), visible.any(-2).double()), EXACT, f"sum over the keys, {where}")


def _at_real_tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Tokens first, zero where they are padded: what a mixer says there is nobody's business."""
    x = _tokens(x)
    return x if mask is None else x * mask.view(*mask.shape, *[1] * (x.ndim - 2))


def _forms_at(case: Case, length: int, batch: int = B) -> Iterator[Measured]:
    module, inputs = case.build(), case.inputs(batch, length)
    leaves = _leaves(module, inputs)
    own = type(module).quadratic not in (SequenceMixer.quadratic, Attention.quadratic)
    if not (own or case.has_weights):
        raise _DoesNotApplyError("it has no quadratic form to compare with")
    formed = "form" in inspect.signature(module.forward).parameters
    forms = [form for form in FORMS if case.causal or form != "recurrent"] if formed else [None]
    for where, mask in case.masks(length).items():
        mask = None if mask is None else mask[-batch:]
        expected = _at_real_tokens(module.quadratic(*inputs, key_mask=mask), mask)
        cotangent = torch.randn_like(expected)
        expected_grads = _grads(expected, leaves, cotangent)
        for form in forms:
            named = {} if form is None else {"form": form}
            found = _at_real_tokens(module(*inputs, key_mask=mask, **named), mask)
            at = f"{form or 'forward'}, {length} tokens, {where}"
            yield Measured(_distance(found, expected), CLOSE, at)
            grads = _grads(found, leaves, cotangent)
            yield from _gradient_distances(case, module, grads, expected_grads, CLOSE, at)


@_check("forms", "every form of the sum equals the quadratic one, forward and backward")
def _forms(case: Case) -> Iterator[Measured]:
    for length in (1, N):
        yield from _forms_at(case, length)
    yield from _forms_at(case.at(num_heads=2, num_kv_heads=1), 2 * CHUNK + 12, batch=2)
    yield from _forms_at(case.at(num_kv_heads=case.num_heads), N)


@_check("forms-long", "every form equals the quadratic one at 1,024 tokens", long=True)
def _forms_long(case: Case) -> Iterator[Measured]:
    yield from _forms_at(case.at(num_heads=2, max_len=1024), 1024, batch=1)


@_check("tail", "the last queries alone give the tail of the output")
def _tail(case: Case) -> Iterator[Measured]:
    _mixers_skip(case)
    module, (q, k, v) = case.build(), case.inputs()
    with torch.no_grad():
        for where, mask in {"no padding": None, "left": torch.arange(N) >= torch.tensor([[0], [2], [N - 1]])}.items():
            out = module(q, k, v, key_mask=mask)
            for num_queries in (1, 3):
                start = N - num_queries
                at = f"{num_queries} of {N} queries, {where}"
                found = module(q[:, :, start:], k, v, key_mask=mask)
                yield Measured(_distance(found, out[:, :, start:]), CLOSE, at)
                if case.has_weights:
                    found = module.weights(q[:, :, start:], k, key_mask=mask)
                    expected = module.weights(q, k, key_mask=mask)[:, :, start:]
                    yield Measured(_distance(found, expected), CLOSE, f"weights, {at}")


@_check("positions", "positions count attended tokens unless they are given")
def _positions(case: Case) -> Iterator[Measured]:
    _mixers_skip(case)
    module, inputs = case.build(), case.inputs()
    key_mask = torch.arange(N) >= torch.tensor([[0], [2], [5]])
    positions = (key_mask.long().cumsum(-1) - 1).clamp_min(0)
    with torch.no_grad():
        given = module(*inputs, key_mask=key_mask, positions=positions)
        yield Measured(_distance(module(*inputs, key_mask=key_mask), given), 0.0, "left padding")


# ---- decoding --------------------------------------------------------------------------------------------------


def _needs_state(case: Case, module: Any) -> None:
    if not case.causal:
        raise _DoesNotApplyError("a bidirectional attention has no state: later tokens change earlier outputs")
    if not module.has_state:
        raise _DoesNotApplyError("it has no state of constant size")


@_check("decoding", "from a state: a prefill, a piece, then single tokens give the output of all at once")
def _decoding(case: Case) -> Iterator[Measured]:
    module, inputs = case.build(), case.inputs(length=ACROSS)
    _needs_state(case, module)
    for where, mask in {"no padding": None, "left": torch.arange(ACROSS) >= torch.tensor([[0], [2], [9]])}.items():
        with torch.no_grad():
            whole, state, pieces = module(*inputs, key_mask=mask), None, []
            for start, stop in [(0, N), (N, ACROSS - 5), *((i, i + 1) for i in range(ACROSS - 5, ACROSS))]:
                part = None if mask is None or start > N else mask[:, start:stop]  # after a prefill nothing is padded
                kwargs = {"key_mask": part, "state": state, "return_state": True}
                out, state = module(*(_take(x, start, stop) for x in inputs), **kwargs)
                pieces.append(out)
        found = _tokens(torch.cat(pieces, _token_dim(whole)))
        real = torch.ones(B, ACROSS, dtype=torch.bool) if mask is None else mask
        yield Measured(_distance(found[real], _tokens(whole)[real]), CLOSE, f"{ACROSS} tokens, {where}")


@_check("state-size", "the state has the bytes that it says, and the same after any number of tokens")
def _state_size(case: Case) -> Iterator[Measured]:
    module = case.build(torch.float32)
    held = module.state_bytes(10)
    if held is not None:
        _require(case.causal, "a bidirectional attention can't decode, and state_bytes is not None")
        yield Measured(abs(module.state_bytes(10, batch_size=3) - 3 * held), 0.0, "bytes of three rows")
    _needs_state(case, module)
    _require(held is not None, "it has a state, and state_bytes is None")
    sizes = []
    for length in (1, 5, CHUNK + 2):
        with torch.no_grad():
            inputs = case.inputs(batch=2, length=length, dtype=torch.float32, width=case.head_dim)
            _, state = module(*inputs, return_state=True)
        _require(isinstance(state, DecodingState), f"the state is a {type(state).__name__}, not a DecodingState")
        said = module.state_bytes(length, batch_size=2)
        yield Measured(abs(state.nbytes - said), 0.0, f"{state.nbytes} bytes after {length} tokens, it says {said}")
        sizes.append(state.nbytes)
    yield Measured(max(sizes) - min(sizes), 0.0, f"{sizes[0] // 2} bytes a sequence")


# ---- gradients and weights -------------------------------------------------------------------------------------


@_check("gradcheck", "gradients equal finite differences")
def _gradcheck(case: Case) -> Iterator[Measured]:
    """One random direction for each tensor, in which a wrong entry shows; differences of the fourth order."""
    module, inputs, step = case.build(), case.inputs(batch=2), 1e-5
    leaves = _leaves(module, inputs)
    key_mask = torch.ones(2, N, dtype=torch.bool)
    key_mask[1, :2] = False
    cotangent = torch.randn_like(module(*inputs)) * key_mask.view(2, *([1] if not case.is_mixer else []), N, 1)

    def value() -> Tensor:
        total: Tensor = (module(*inputs, key_mask=key_mask) * cotangent).sum()
        return total

    found = torch.autograd.grad(value(), leaves, allow_unused=True)
    for name, leaf, g in zip(_names(case, module), leaves, found, strict=True):
        direction = torch.randn_like(leaf)
        direction /= direction.norm()
        with torch.no_grad():
            original, values = leaf.clone(), []
            for steps in (1, -1, 2, -2):
                leaf.copy_(original + steps * step * direction)
                values.append(value())
            leaf.copy_(original)
            expected = (8 * (values[0] - values[1]) - (values[2] - values[3])) / (12 * step)
            slope = torch.zeros_like(expected) if g is None else (g.conj() * direction).sum().real
        yield Measured(_distance(slope, expected, floor=1e-2), 1e-6, f"gradient of {name}")


@_check("parameters", "every parameter gets a finite gradient that isn't zero")
def _parameters(case: Case) -> Iterator[Measured]:
    module, inputs = case.build(), case.inputs(length=ACROSS)
    parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if not parameters:
        raise _DoesNotApplyError("it has no parameters")
    out = module(*inputs)
    found = _grads(out, list(parameters.values()), torch.randn_like(out))
    yield Measured(_not_finite(found), 0.0, "gradients that are not finite")
    dead = [name for name, g in zip(parameters, found, strict=True) if not (g != 0).any()]
    yield Measured(len(dead), 0.0, f"parameters without a gradient: {', '.join(dead[:3]) or 'none'}")


@_check("save-load", "a saved module gives the same outputs when loaded into a new one")
def _save_load(case: Case) -> Iterator[Measured]:
    one, other, inputs = case.build(), case.build(), case.inputs()
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    other.load_state_dict(torch.load(file, weights_only=True), strict=True)
    with torch.no_grad():
        yield Measured(_distance(other(*inputs), one(*inputs)), 0.0, "outputs of the loaded one")


# ---- precision -------------------------------------------------------------------------------------------------


def _precision_at(case: Case, length: int, why: str = "") -> Iterator[Measured]:
    """One head of width 32; the last 256 queries in float64, on the inputs that half precision was given.

    `why` is added to each note. A mixer's own projections round too, as a host's do around an attention: their
    products may be four times as far.
    """
    case = case.at(num_heads=1, num_kv_heads=1, head_dim=32, scale=32**-0.5, max_len=length)
    exact = case.build(torch.float64)
    module = case.spec.build(case.shape, **case.options).float().eval()
    module.load_state_dict(exact.state_dict())
    inputs = case.inputs(batch=1, length=length, dtype=torch.float32, width=32)
    form = {"form": "chunked"} if "form" in inspect.signature(exact.forward).parameters else {}
    start = max(0, length - 256)
    with torch.no_grad():
        for dtype, bound in ((torch.bfloat16, 3e-3), (torch.float16, 1e-3)):
            rounded = [x.to(dtype) for x in inputs]
            truth = _take(exact(*(x.double() for x in rounded), **form), start, length)
            with torch.autocast("cpu", dtype):
                found = {"under autocast": module(*rounded)}
            if not case.is_mixer:  # projections of float32 take half precision under autocast only
                found["without autocast"] = module(*rounded)
            for how, out in found.items():
                error = _beyond_rounding(_take(out, start, length), truth)
                yield Measured(
                    error,
                    bound * (4 if case.is_mixer else 1),
                    f"N = {length:,}, {str(dtype).removeprefix('torch.')} {how}{why}",
                )


@_check("precision", f"half precision is near float64 at {FAST_LENGTH} tokens")
def _precision(case: Case) -> Iterator[Measured]:
    yield from _precision_at(case, FAST_LENGTH)


@_check(
    "precision-long", "half precision is near float64 at 65,536 tokens, or 4,096 where the cost is quadratic", long=True
)
def _precision_long(case: Case) -> Iterator[Measured]:
    length, why = _long_length(case)
    yield from _precision_at(case, length, f"; {why}" if why else "")


def _long_length(case: Case) -> tuple[int, str]:
    """The longest sequence to ask it about, and why if it is a shorter one.

    What its FLOPs say counts, as options may change the cost. An attention that doesn't state them has its spec's.
    """
    module = case.spec.build(case.shape, **case.options)
    half, whole = (module.flops(n, n) for n in (LONG_LENGTH // 2, LONG_LENGTH))
    if half and whole:
        growth = whole / half
        if growth < QUADRATIC_GROWTH:
            return LONG_LENGTH, ""
        return QUADRATIC_LENGTH, f"its FLOPs grow {growth:.1f}-fold from {LONG_LENGTH // 2:,} to {LONG_LENGTH:,} tokens"
    cost = case.spec.cost.replace(" ", "").lower()
    if "n" in cost and cost != "notstated" and not any(s in cost for s in ("n^2", "n**2", "n²")):
        return LONG_LENGTH, ""
    return QUADRATIC_LENGTH, f"it states a cost of {case.spec.cost}, and no FLOPs" if cost != "notstated" else (
        "it states neither cost nor FLOPs"
    )


@_check("large-logits", "with logits fifty times larger float32 is finite and near the float64 quadratic form")
def _large_logits(case: Case) -> Iterator[Measured]:
    case = case.at(head_dim=16, scale=0.25)
    exact = case.build(torch.float64)
    module = case.spec.build(case.shape, **case.options).float().eval()
    module.load_state_dict(exact.state_dict())
    inputs = case.inputs(length=64, dtype=torch.float32)
    if case.is_mixer:  # it has no logits: only that nothing overflows
        with torch.no_grad():
            yield Measured(_not_finite([module(inputs[0] * 50)]), 0.0, "not finite, hidden states times 50")
        return
    inputs = [inputs[0] * 50**0.5, inputs[1] * 50**0.5, inputs[2]]
    wide = [x.double() for x in inputs]
    leaves, wide_leaves = _leaves(module, inputs), _leaves(exact, wide)
    found, expected = module(*inputs), exact.quadratic(*wide)
    yield Measured(_not_finite([found]), 0.0, "outputs that are not finite")
    yield Measured(_distance(found, expected, floor=1e-30), 1e-4, "output")
    cotangent = torch.randn_like(expected)
    found_grads = _grads(found, leaves[:3], cotangent.float())
    for name, one, other in zip("qkv", found_grads, _grads(expected, wide_leaves[:3], cotangent), strict=True):
        yield Measured(_distance(one, other, floor=1e-30), 1e-3, f"gradient of {name}")


# ---- hosts and processes ---------------------------------------------------------------------------------------

_TEXT = {"vocab_size": 30, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 1}


def _hosted(case: Case, model: nn.Module) -> nn.Module:
    """The converted model with weights large enough that attention is far from uniform."""
    from hhbench import hosts

    hosts.convert(model, case.spec, **case.options)
    added = {id(p) for p in hosts.attention_parameters(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in added:
                parameter.add_(0.2 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(6)
    return model


def _trains(model: nn.Module, out: Tensor) -> Iterator[Measured]:
    """Forward and backward are finite and reach every parameter."""
    yield Measured(_not_finite([out]), 0.0, "logits that are not finite")
    (out * torch.randn_like(out)).sum().backward()  # type: ignore[no-untyped-call]
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    unused = [name for name, p in trained.items() if p.grad is None]
    yield Measured(len(unused), 0.0, f"parameters without a gradient: {', '.join(unused[:3]) or 'none'}")
    yield Measured(_not_finite([p.grad for p in trained.values() if p.grad is not None]), 0.0, "gradients, not finite")


def _in_text_host(case: Case, model: nn.Module, side: str) -> Iterator[Measured]:
    from hhbench import hosts

    model = _hosted(case, model)
    ids, lengths = torch.randint(2, 30, (2, 9)), (9, 5)
    mask = torch.stack([torch.arange(9) < n for n in lengths])
    mask = mask.flip(1) if side == "left" else mask

    def logits(ids: Tensor, mask: Tensor) -> Tensor:
        extra = {"position_ids": hosts.position_ids(mask), "use_cache": False} if case.causal else {}
        out: Tensor = model(input_ids=ids.where(mask, 1), attention_mask=mask.long(), **extra).logits
        return out

    model.train()
    yield from _trains(model, logits(ids, mask))
    model.eval()
    with torch.no_grad():
        padded = logits(ids, mask)[1][mask[1]]
        alone = logits(ids[1:, mask[1]], mask[1:, mask[1]])[0]
    yield Measured(_distance(padded, alone), 1e-5, f"a row padded on the {side}")


@_check("bert", "works in BERT: trains, and padded rows equal unpadded")
def _in_bert(case: Case) -> Iterator[Measured]:
    if case.causal:
        raise _DoesNotApplyError("BERT is bidirectional")
    import transformers as tf

    config = tf.BertConfig(**_TEXT, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    yield from _in_text_host(case, tf.BertForMaskedLM(config), "right")


@_check("gpt2", "works in GPT-2: trains, and padded rows equal unpadded")
def _in_gpt2(case: Case) -> Iterator[Measured]:
    if not case.causal:
        raise _DoesNotApplyError("GPT-2 is causal")
    import transformers as tf

    sizes = {"vocab_size": 30, "n_positions": 64, "n_layer": 2, "n_embd": 32, "n_head": 4}
    quiet = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0, "bos_token_id": None, "eos_token_id": None}
    yield from _in_text_host(case, tf.GPT2LMHeadModel(tf.GPT2Config(**sizes, **quiet)), "left")


@_check("llama", "works in Llama with grouped heads: trains, and padded rows equal unpadded")
def _in_llama(case: Case) -> Iterator[Measured]:
    if not case.causal:
        raise _DoesNotApplyError("Llama is causal")
    import transformers as tf

    config = tf.LlamaConfig(**_TEXT, num_key_value_heads=2, bos_token_id=None, eos_token_id=None)
    yield from _in_text_host(case, tf.LlamaForCausalLM(config), "left")


@_check("timm", "works in a timm vision transformer: trains, and images of a batch don't meet")
def _in_timm(case: Case) -> Iterator[Measured]:
    if case.causal:
        raise _DoesNotApplyError("a vision transformer is bidirectional")
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "depth": 2, "embed_dim": 32, "num_heads": 4, "num_classes": 5}
    model = _hosted(case, VisionTransformer(**sizes))
    images = torch.randn(2, 3, 32, 32)
    yield from _trains(model.train(), model(images))
    model.eval()
    with torch.no_grad():
        yield Measured(_distance(model(images[1:]), model(images)[1:]), 1e-5, "an image alone")


@_check("ddp", "trains in two processes: no unused parameter, equal gradients")
def _ddp(case: Case) -> Iterator[Measured]:
    """Two steps of DistributedDataParallel, which refuses a parameter without a gradient, on the CPU."""
    module = case.build(torch.float32)
    if not any(p.requires_grad for p in module.parameters()):
        raise _DoesNotApplyError("it has no parameters")
    if not torch.distributed.is_available():
        raise _DoesNotApplyError("this torch has no distributed package")
    # A process that may hold a GPU can't be forked; a fresh one finds the class by its name.
    fork = sys.platform == "linux" and not torch.cuda.is_available()
    cls = case.spec.part
    if not fork and "<locals>" in cls.__qualname__:
        raise _DoesNotApplyError("another process can't import a class that a function made")
    reference = f"{inspect.getfile(cls)}:{cls.__qualname__}" if case.spec.external else case.spec.name
    with tempfile.TemporaryDirectory() as folder:
        context = start_processes(  # type: ignore[no-untyped-call]
            _train_on_one_rank,
            (folder, case if fork else None, reference, case.causal, dict(case.options)),
            nprocs=2,
            join=False,
            start_method="fork" if fork else "spawn",
        )
        deadline = time.monotonic() + SECONDS_FOR_PROCESSES
        try:
            while not context.join(timeout=1):
                if time.monotonic() > deadline:
                    raise HHBenchError(f"two processes were not done after {SECONDS_FOR_PROCESSES:g} s")
        except ProcessException as error:
            raise HHBenchError(_last_line(str(error))) from error
        finally:
            for process in context.processes:
                if process.is_alive():
                    process.kill()
                process.join()
        ranks = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(2)]
    unused = ranks[0]["unused"]
    yield Measured(len(unused), 0.0, f"parameters without a gradient: {', '.join(unused[:3]) or 'none'}")
    if not unused:
        one, other = (torch.tensor(rank["gradients"]) for rank in ranks)
        yield Measured(_distance(other, one), 0.0, "gradients of the two processes")


def _last_line(trace: str) -> str:
    lines = [line for line in trace.splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line and not line.startswith(" ")]
    return (errors or lines)[-1]


def _train_on_one_rank(
    rank: int, folder: str, case: Case | None, reference: str, causal: bool, options: dict[str, Any]
) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    try:
        case = case or Case(spec=ATTENTIONS.get(reference), causal=causal, options=options)
        torch.manual_seed(0)
        module = case.build(torch.float32).train()
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        out = module(*case.inputs(dtype=torch.float32))
        found = torch.autograd.grad(out.sum(), list(trained.values()), allow_unused=True)
        unused = [name for name, g in zip(trained, found, strict=True) if g is None]
        gradients: list[float] = []
        if not unused:
            model = nn.parallel.DistributedDataParallel(module)
            optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
            torch.manual_seed(rank)
            for _ in range(2):
                out = model(*case.inputs(dtype=torch.float32))
                optimizer.zero_grad()
                (out * torch.randn_like(out)).sum().backward()
                optimizer.step()
            for p in trained.values():
                assert p.grad is not None
                g = torch.view_as_real(p.grad) if p.grad.is_complex() else p.grad
                gradients += g.flatten()[:1000].tolist()
        Path(folder, f"{rank}.json").write_text(json.dumps({"unused": unused, "gradients": gradients}))
        torch.distributed.barrier()  # neither leaves while the other still talks to it
        os._exit(0)  # without the libraries' farewell: gloo's threads, caught in it, now and then abort the process
    finally:
        torch.distributed.destroy_process_group()
