"""`hhbench check` can fail: each planted bug is caught by the check that is meant for it, and the same without is not.

The registered attentions are checked in test_attention.py.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import elu, pad, softplus

from hhbench import check as checks
from hhbench import cli
from hhbench.attention import (
    Attention,
    AttentionSpec,
    Direction,
    FeatureMap,
    MixerShape,
    SequenceMixer,
    repeat_heads,
    token_positions,
    visible_keys,
    zero_padding,
)
from hhbench.check import CHECKS, Finding, check
from hhbench.errors import UsageError
from hhbench.state import DecodingState

BOTH: tuple[Direction, ...] = ("bidirectional", "causal")


def spec_of(part: type, cost: str = "N^2 D", directions: Sequence[Direction] = BOTH) -> AttentionSpec:
    return AttentionSpec(
        name=part.__name__,
        part=part,
        paper="-",
        cost=cost,
        directions=frozenset(directions),
        recipe="no-transfer",
        version=1,
        external=True,
    )


# --- correct ones ---


class Plain(Attention):
    """exp(k) features per key, over pairs of tokens, in parts that a bug can replace."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.gain = nn.Parameter(torch.ones(shape.num_heads, 1, shape.head_dim))

    def queries(self, q: Tensor) -> Tensor:
        return elu(q * self.gain.to(q.dtype)) + 1

    def keys(self, k: Tensor) -> Tensor:
        return elu(k) + 1

    def visible(self, key_mask: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
        return visible_keys(
            key_mask, causal=self.shape.causal, num_queries=q.shape[2], num_keys=k.shape[2], device=q.device
        )

    def scores(self, q: Tensor, k: Tensor, positions: Tensor) -> Tensor:
        return self.queries(q) @ self.keys(k).mT

    def divide(self, scores: Tensor) -> Tensor:
        total = scores.sum(-1, keepdim=True)
        return scores / total.masked_fill(total == 0, 1.0)

    def weights(
        self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None, positions: Tensor | None = None
    ) -> Tensor:
        wide = torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k = (zero_padding(x.to(wide), key_mask) for x in (q, k))
        if positions is None:
            positions = token_positions(key_mask, batch_size=len(k), length=k.shape[2], device=k.device)
        with torch.autocast("cpu", enabled=False):
            scores = self.scores(q, repeat_heads(k, self.shape.num_heads), positions)
            visible = self.visible(key_mask, q, k)
            return self.divide(scores if visible is None else scores * visible)

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        key_mask: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        weights = self.weights(q, k, key_mask=key_mask, positions=positions)
        v = repeat_heads(zero_padding(v, key_mask), self.shape.num_heads)
        with torch.autocast("cpu", enabled=False):
            return (weights @ v.to(weights.dtype)).to(q.dtype)


@dataclass(frozen=True)
class Sums(DecodingState):
    values: Tensor
    keys: Tensor


class Remembering(Plain):
    """Plain, with running sums."""

    has_state = True

    def forward(self, q, k, v, *, key_mask=None, positions=None, state=None, return_state=False):
        if not return_state:
            return super().forward(q, k, v, key_mask=key_mask, positions=positions)
        q, k, v = (zero_padding(x, key_mask) for x in (q, k, v))
        k, v = (repeat_heads(x, self.shape.num_heads) for x in (k, v))
        features = zero_padding(self.keys(k), key_mask)
        values = (features[..., :, None] * v[..., None, :]).cumsum(2)
        keys = features.cumsum(2)
        if state is not None:
            values, keys = self.carried(state, values, keys)
        q = self.queries(q)
        total = (q * keys).sum(-1, keepdim=True)
        out = (q[..., None, :] @ values).squeeze(-2) / total.masked_fill(total == 0, 1.0)
        return out, self.kept(values, keys)

    def carried(self, state: Sums, values: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        return values + state.values[:, :, None], keys + state.keys[:, :, None]

    def kept(self, values: Tensor, keys: Tensor) -> DecodingState:
        return Sums(values[:, :, -1], keys[:, :, -1])

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        D = self.shape.head_dim
        return batch_size * self.shape.num_heads * (D * D + D) * 4 if self.shape.causal else None


class Gated(Plain):
    """No weights: each channel of v has its own, and q gates the mean."""

    has_weights = False

    def keys(self, k: Tensor) -> Tensor:
        return softplus(k)

    def gate(self, q: Tensor, key_mask: Tensor | None) -> Tensor:
        return self.queries(zero_padding(q, key_mask)).sigmoid()

    def channels(self, k: Tensor, key_mask: Tensor | None) -> Tensor:
        return repeat_heads(zero_padding(self.keys(zero_padding(k, key_mask)), key_mask), self.shape.num_heads)

    def channel_weights(self, q: Tensor, k: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        features = self.channels(k, key_mask)[:, :, None]
        visible = visible_keys(
            key_mask, causal=self.shape.causal, num_queries=q.shape[2], num_keys=k.shape[2], device=q.device
        )
        scores = features.expand(-1, -1, q.shape[2], -1, -1)
        scores = scores if visible is None else scores * visible[..., None]
        total = scores.sum(3, keepdim=True)
        return scores / total.masked_fill(total == 0, 1.0)

    def weights(self, q, k, *, key_mask=None, positions=None):
        return Attention.weights(self, q, k)

    def quadratic(self, q, k, v, *, key_mask=None, positions=None):
        v = repeat_heads(zero_padding(v, key_mask), self.shape.num_heads)
        return self.gate(q, key_mask) * (self.channel_weights(q, k, key_mask=key_mask) * v[:, :, None]).sum(3)

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        dtype, wide = q.dtype, torch.float64 if q.dtype == torch.float64 else torch.float32
        q, k, v = (x.to(wide) for x in (q, k, v))
        features = self.channels(k, key_mask)
        terms = features * repeat_heads(zero_padding(v, key_mask), self.shape.num_heads)
        if self.shape.causal:
            sums, total = (x.cumsum(2)[:, :, -q.shape[2] :] for x in (terms, features))
        else:
            sums, total = (x.sum(2, keepdim=True) for x in (terms, features))
        return (self.gate(q, key_mask) * sums / total.masked_fill(total == 0, 1.0)).to(dtype)


class Convolution(SequenceMixer):
    """A gated long convolution; two-sided where it is bidirectional. Lag 0 belongs to the kernel of the past."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.gate = nn.Linear(shape.dim, shape.dim)
        self.past = nn.Parameter(torch.randn(shape.max_len, shape.dim) / shape.max_len)
        self.future = None if shape.causal else nn.Parameter(torch.randn(shape.max_len, shape.dim) / shape.max_len)

    def kernel(self, length: int) -> Tensor:
        """By lag, from 0 up to `length` - 1, then from -`length` up to -1."""
        past = self.past[:length]
        if self.future is None:
            return pad(past, (0, 0, 0, length))
        return torch.cat([past, self.future[:length].flip(0)])

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        x = x if key_mask is None else x.masked_fill(~key_mask[..., None], 0.0)
        length, gate = x.shape[1], self.gate(x)
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast("cpu", enabled=False):
            spectrum = torch.fft.rfft(self.kernel(length).to(wide), dim=0)
            out = torch.fft.irfft(torch.fft.rfft(x.to(wide), n=2 * length, dim=1) * spectrum, n=2 * length, dim=1)
        return (gate.to(wide) * (x.to(wide) + out[:, :length])).to(x.dtype)

    def quadratic(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        x = x if key_mask is None else x.masked_fill(~key_mask[..., None], 0.0)
        rows = []
        for i in range(x.shape[1]):
            row = (x[:, : i + 1].flip(1) * self.past[: i + 1]).sum(1)
            if self.future is not None:
                ahead = x[:, i + 1 :]
                row = row + (ahead * self.future[: ahead.shape[1]]).sum(1)
            rows.append(row)
        return self.gate(x) * (x + torch.stack(rows, 1))


@pytest.mark.parametrize("part", [Plain, Remembering, Gated, Convolution])
@pytest.mark.parametrize("direction", BOTH)
def test_a_correct_one_passes(part, direction):
    findings = check(spec_of(part), directions=[direction], long=part in (Plain, Convolution))
    assert [f for f in findings if f.status == "FAIL"] == []
    assert sum(f.status == "PASS" for f in findings) >= 15


# --- planted bugs, by the check that is meant for each ---

BUGS: dict[str, tuple[type, str, tuple[Direction, ...]]] = {}


def caught_by(check_id: str, directions: Sequence[Direction] = BOTH):
    def add(part: type) -> type:
        BUGS[part.__name__] = (part, check_id, tuple(directions))
        return part

    return add


@caught_by("padding")
class MaskOnValuesOnly(Plain):
    """Padded keys stay in the normaliser."""

    def visible(self, key_mask, q, k):
        return super().visible(None, q, k)


@caught_by("future-gradient", ["causal"])
class OffByOne(Plain):
    def visible(self, key_mask, q, k):
        N = q.shape[2]
        past = torch.ones(N, N, dtype=torch.bool).tril(1)
        return past if key_mask is None else past & key_mask[:, None, None]


@caught_by("precision-long", ["causal"])
class HalfPrecisionSums(Plain):
    """Both sums run in the dtype of the inputs."""

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        if q.dtype == torch.float64:
            return super().forward(q, k, v, key_mask=key_mask, positions=positions)
        keys = self.keys(k)
        total = (self.queries(q) * keys.cumsum(2)).sum(-1, keepdim=True)
        sums = (keys[..., :, None] * v[..., None, :]).cumsum(2)
        return (self.queries(q)[..., None, :] @ sums).squeeze(-2) / total


@caught_by("precision", ["causal"])
class HalfPrecisionSumsOnShortSequences(HalfPrecisionSums):
    pass


@caught_by("future-value", ["causal"])
class StabiliserOverFutureKeys(Plain):
    """As in public copies of FAVOR+: the largest key of all is subtracted, then an epsilon is added."""

    def keys(self, k):
        return (k - k.amax((-1, -2), keepdim=True).detach()).exp() + 1e-4


@caught_by("future-value", ["causal"])
class StabiliserThatCancels(StabiliserOverFutureKeys):
    """Without the epsilon it cancels, until float32 underflows."""

    def keys(self, k):
        return (k - k.amax((-1, -2), keepdim=True).detach()).exp()


class PeriodFromTheCurrentLength(Plain):
    """cosFormer's cosine over the length of the tokens at hand."""

    def scores(self, q, k, positions):
        distance = positions[:, None, -q.shape[2] :, None] - positions[:, None, None, :]
        return super().scores(q, k, positions) * (distance * math.pi / (2 * k.shape[2])).cos()


@caught_by("prefix", ["causal"])
class PeriodOfAPrefix(PeriodFromTheCurrentLength):
    pass


@caught_by("padding", ["bidirectional"])
class PeriodOfPadding(PeriodFromTheCurrentLength):
    pass


@caught_by("forms", ["bidirectional"])
class LagZeroTwice(Convolution):
    def kernel(self, length):
        kernel = super().kernel(length)
        return torch.cat([kernel[:1] + self.future[:1], kernel[1:]])


@caught_by("no-key")
class NormaliserWithoutGuard(Plain):
    def divide(self, scores):
        return scores / scores.sum(-1, keepdim=True)


@caught_by("batch")
class MeanOverTheBatch(Plain):
    def keys(self, k):
        return elu(k - k.mean((0, 2), keepdim=True).detach()) + 1


@caught_by("output")
class Random(Plain):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs) + 1e-9 * torch.randn(())


@caught_by("output")
class AlwaysFloat32(Plain):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs).float()


@caught_by("sees-future", ["bidirectional"])
class CausalInSecret(Plain):
    def visible(self, key_mask, q, k):
        return visible_keys(key_mask, causal=True, num_queries=q.shape[2], num_keys=k.shape[2], device=q.device)


@caught_by("padding")
class GarbageInTheGradient(Plain):
    """0 * inf in the padding."""

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        keep = 1.0 if key_mask is None else key_mask[:, None, :, None].to(v.dtype)
        return super().forward(q, k, v * keep, positions=positions, key_mask=key_mask) + 0 * (v * keep).sum()


@caught_by("heads")
class HeadsMeet(Plain):
    def keys(self, k):
        return elu(k - k.mean(1, keepdim=True)) + 1


@caught_by("weights")
class NegativeWeights(Plain):
    def keys(self, k):
        return k


@caught_by("weights")
class RowsSumToLess(Plain):
    def divide(self, scores):
        return scores / (scores.sum(-1, keepdim=True) + 1e-6)


@caught_by("weights-v")
class OtherWeightsThanItUses(Plain):
    def forward(self, q, k, v, **kwargs):
        return super().forward(q, 1.001 * k, v, **kwargs)


@caught_by("channel-weights")
class ChannelWeightsThatDontSum(Gated):
    def channel_weights(self, q, k, *, key_mask=None):
        return 1.001 * super().channel_weights(q, k, key_mask=key_mask)


@caught_by("forms")
class AnotherQuadraticForm(Plain):
    def quadratic(self, q, k, v, **kwargs):
        return super().quadratic(q, k, v, **kwargs) + 1e-6 * v.mean()


@caught_by("forms")
class DetachedInTheFastForm(Plain):
    """Equal outputs, unequal gradients."""

    def quadratic(self, q, k, v, **kwargs):
        return Plain.forward(self, q, k, v, **kwargs)

    def forward(self, q, k, v, **kwargs):
        return super().forward(q, k.detach(), v, **kwargs)


@caught_by("forms-long", ["causal"])
class WindowWhereNoneWasPromised(Plain):
    """Right up to 600 tokens."""

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        far = v.clone()
        far[:, :, :-600] = 0.0
        return super().forward(q, k, far, key_mask=key_mask, positions=positions)


@caught_by("tail")
class QueriesAreTheFirst(Plain):
    def visible(self, key_mask, q, k):
        past = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
        past = past.tril() if self.shape.causal else past
        return past if key_mask is None else past & key_mask[:, None, None]

    def scores(self, q, k, positions):
        distance = positions[:, None, : q.shape[2], None] - positions[:, None, None, :]
        return super().scores(q, k, positions) * (distance / 512).cos()


@caught_by("positions")
class PositionsStartAtOne(Plain):
    def forward(self, q, k, v, *, key_mask=None, positions=None):
        return super().forward(q, k, v, key_mask=key_mask) * (1.0 if positions is None else 1.0 + 1e-9)


@caught_by("decoding", ["causal"])
class NormaliserForgets(Remembering):
    """A cached normaliser that lost the earlier keys."""

    def carried(self, state, values, keys):
        return super().carried(state, values, keys)[0], keys


@caught_by("state-size", ["causal"])
class StateThatGrows(Remembering):
    def kept(self, values, keys):
        return Sums(values, keys)


@caught_by("state-size", ["causal"])
class StateLargerThanItSays(Remembering):
    def state_bytes(self, num_tokens, *, batch_size=1):
        return super().state_bytes(num_tokens, batch_size=batch_size) - 4


@caught_by("gradcheck")
class DetachedKeys(Plain):
    def keys(self, k):
        return super().keys(k.detach())


@caught_by("parameters")
class DeadParameter(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.dead = nn.Parameter(torch.ones(3))

    def queries(self, q):
        return super().queries(q) + (0 * self.dead).sum()


@caught_by("save-load")
class ProjectionThatIsNotSaved(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.register_buffer("projection", torch.randn(shape.head_dim, shape.head_dim), persistent=False)

    def keys(self, k):
        return super().keys(k @ self.projection.to(k.dtype))


@caught_by("large-logits")
class NaiveExponential(Plain):
    def queries(self, q):
        return (10 * q * self.gain.to(q.dtype)).exp()

    def keys(self, k):
        return (10 * k).exp()


class ForgetsTheMaskInATransformer(Plain):
    """Right wherever it is called with random inputs; wrong where a host gives it a head width of 8."""

    def visible(self, key_mask, q, k):
        return super().visible(None if self.shape.head_dim == 8 else key_mask, q, k)


@caught_by("bert", ["bidirectional"])
class WrongInBert(ForgetsTheMaskInATransformer):
    pass


@caught_by("gpt2", ["causal"])
class WrongInGPT2(ForgetsTheMaskInATransformer):
    pass


@caught_by("llama", ["causal"])
class WrongInLlama(ForgetsTheMaskInATransformer):
    pass


@caught_by("timm", ["bidirectional"])
class WrongWithoutAMask(Plain):
    """Images come without a mask; it takes one for granted."""

    def forward(self, q, k, v, *, key_mask=None, positions=None):
        if self.training and key_mask is None:
            raise RuntimeError("where is\nthe mask?")
        return super().forward(q, k, v, key_mask=key_mask, positions=positions)


@caught_by("ddp")
class UnusedParameter(Plain):
    def __init__(self, shape):
        super().__init__(shape)
        self.unused = nn.Parameter(torch.ones(3))


@caught_by("ddp")
class BreaksInASecondProcess(Plain):
    def forward(self, *args, **kwargs):
        if torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("only\nhere")
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize(
    "part,check_id,direction",
    [pytest.param(p, c, d, id=f"{n}-{d}") for n, (p, c, directions) in BUGS.items() for d in directions],
)
def test_a_planted_bug_is_caught_by_the_check_meant_for_it(part, check_id, direction):
    (finding,) = check(spec_of(part), directions=[direction], only=[check_id])
    assert finding.status == "FAIL", finding
    assert finding.note and "\n" not in finding.note
    assert finding.measured is None or not finding.measured <= finding.bound


def test_every_check_has_a_bug_that_it_catches():
    assert {check_id for _, check_id, _ in BUGS.values()} == CHECKS.keys()


def test_a_lone_map_is_checked_in_every_form():
    class Map(FeatureMap):
        def forward(self, x: Tensor) -> Tensor:
            return elu(x) + 1

    findings = {f.check: f for f in check(spec_of(Map), directions=["causal"])}
    assert {findings[id].status for id in ("forms", "decoding", "state-size", "weights-v")} == {"PASS"}
    assert findings["ddp"].status == "SKIP" and findings["ddp"].note == "it has no parameters"


# --- what is measured, and where ---


@pytest.mark.parametrize(
    "cost,length",
    [("N F E", 65536), ("N log N C", 65536), ("N^2 D", 4096), ("not stated", 4096), ("N w D + N^2", 4096)],
)
def test_the_long_length_follows_the_stated_cost(cost, length, monkeypatch):
    seen = []
    monkeypatch.setattr(checks, "_precision_at", lambda case, length, why: seen.append((length, why)) or [])
    check(spec_of(Plain, cost), directions=["causal"], only=["precision-long"])
    reason = (
        "; it states neither cost nor FLOPs" if cost == "not stated" else f"; it states a cost of {cost}, and no FLOPs"
    )
    assert seen == [(length, reason if length == 4096 else "")]


@pytest.mark.parametrize("variant,length", [("simple", 65536), ("conv", 65536), ("full", 4096)])
def test_the_long_length_follows_the_flops_of_the_options(variant, length, monkeypatch):
    """Whatever the cost says: one variant's is quadratic."""
    seen = []
    monkeypatch.setattr(checks, "_precision_at", lambda case, length, why: seen.append((length, why)) or [])
    for direction in ("causal", "bidirectional"):
        check("aft", options={"variant": variant}, directions=[direction], only=["precision-long"])
    reason = "; its FLOPs grow 4.0-fold from 32,768 to 65,536 tokens" if length == 4096 else ""
    assert seen == [(length, reason)] * 2


def test_the_note_says_why_a_length_is_short(monkeypatch):
    monkeypatch.setattr(checks, "QUADRATIC_LENGTH", 64)
    (finding,) = check("softmax", directions=["causal"], only=["precision-long"])
    assert finding.note.startswith("N = 64, ")
    assert finding.note.endswith("; its FLOPs grow 4.0-fold from 32,768 to 65,536 tokens")


def test_precision_says_its_length():
    (finding,) = check("elu", directions=["causal"], only=["precision"])
    assert "N = 512" in finding.note


def test_rounding_of_the_output_is_no_error():
    truth = torch.cat([torch.tensor([1.003, -0.4, 0.0]), torch.randn(1000).clamp(-1, 1)]).double()
    for dtype in (torch.bfloat16, torch.float16):
        assert checks._beyond_rounding(truth.to(dtype), truth) == 0
        off = truth.to(dtype)
        off[2] = 2**-6
        assert checks._beyond_rounding(off, truth) == pytest.approx(2**-6 / 1.003, rel=1e-5)


def test_the_worst_measurement_is_reported():
    def findings_of(*measured: checks.Measured) -> Finding:
        case = checks.Case(spec=spec_of(Plain), causal=True)
        return checks._judge(checks.Entry("x", "x", lambda case: iter(measured), False), case)

    M = checks.Measured
    assert findings_of(M(1e-12, 1e-10, "a"), M(0.5, 1.0, "b"), M(0.0, 0.0, "c")).note == "b"
    assert findings_of(M(0.5, 1.0, "a"), M(1e-9, 0.0, "b")).status == "FAIL"
    found = findings_of(M(0.5, 1.0, "a"), M(math.nan, 1.0, "b"))
    assert (found.status, found.note) == ("FAIL", "b")
    assert findings_of(M(1.0, 1.0)).status == "PASS"


def test_checks_are_repeatable_and_leave_the_generator_alone():
    before = torch.random.get_rng_state()
    runs = [
        [(f.check, f.direction, f.status, f.measured, f.note) for f in check("hedgehog", only=["padding", "forms"])]
        for _ in range(2)
    ]
    assert runs[0] == runs[1]
    assert torch.equal(torch.random.get_rng_state(), before)


def test_progress_is_told_before_each_check():
    told = []
    check("elu", only=["weights", "batch"], watch=lambda done, total, title: told.append((done, total, title)))
    assert [t[:2] for t in told] == [(0, 4), (1, 4), (2, 4), (3, 4)]
    assert told[0][2] == "batch, bidirectional"


def test_fresh_processes_find_the_attention_by_its_name(tmp_path, monkeypatch):
    """Where a GPU forbids a fork."""
    (tmp_path / "mine.py").write_text(MINE)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (finding,) = check(f"{tmp_path}/mine.py:Mine", directions=["causal"], only=["ddp"])
    assert (finding.status, finding.note) == ("PASS", "gradients of the two processes")


# --- the command ---

MINE = """
import torch
from torch import nn
from hhbench.attention import FeatureMap

class Mine(FeatureMap):
    def __init__(self, shape, *, sharp: float = 1.0):
        super().__init__(shape)
        self.weight = nn.Parameter(torch.eye(shape.head_dim))
        self.sharp = sharp

    def forward(self, x):
        return (self.sharp * x @ self.weight.to(x.dtype)).sigmoid()

class Broken(FeatureMap):
    def forward(self, x):
        return x[nonsense]
"""


@pytest.fixture
def mine(tmp_path: Path) -> str:
    (tmp_path / "mine.py").write_text(MINE)
    return f"{tmp_path}/mine.py"


def test_the_table_of_one_s_own_attention(mine, capsys):
    assert cli.main(["check", f"{mine}:Mine", "--only", "padding,prefix", "--option", "sharp=2"]) == 0
    out = capsys.readouterr().out
    lines = {(line.split() + [""] * 3)[0] + "-" + (line.split() + [""] * 3)[1]: line for line in out.splitlines()}
    assert lines["padding-causal"].split()[2] == "PASS" and "1e-10" in lines["padding-causal"]
    assert lines["prefix-bidirectional"].split()[2] == "SKIP"
    assert "mine.py:Mine[sharp=2]: 3 passed, 0 failed, 1 skipped in" in out


def test_what_raises_fails_with_one_line(mine, capsys):
    assert cli.main(["check", f"{mine}:Broken", "--only", "batch", "--direction", "causal"]) == 1
    out = capsys.readouterr().out
    assert "FAIL" in out and "NameError: name 'nonsense' is not defined" in out
    assert "0 passed, 1 failed, 0 skipped" in out


def test_json_is_all_of_stdout(mine, capsys):
    assert cli.main(["check", f"{mine}:Broken", "--only", "batch,ddp", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["passed"], found["failed"], found["skipped"]) == (0, 2, 2)
    assert found["attention"] == "mine.py:Broken"
    assert found["findings"][0] | {"seconds": 0} == {
        "check": "batch",
        "title": CHECKS["batch"].title,
        "direction": "bidirectional",
        "status": "FAIL",
        "measured": None,
        "bound": None,
        "note": "NameError: name 'nonsense' is not defined",
        "seconds": 0,
    }


def test_json_has_no_number_that_json_lacks():
    finding = Finding("x", "x", "causal", "FAIL", math.nan, 1.0, "", 0.0)
    text = checks.as_json(spec_of(Plain), {"width": 3}, [finding])
    assert json.loads(text)["findings"][0]["measured"] is None and "NaN" not in text


@pytest.mark.parametrize(
    "arguments,message",
    [
        (["hedgehogg"], "Did you mean 'hedgehog'"),
        (["elu", "--only", "tial"], "Did you mean 'tail'"),
        (["hedgehog", "--option", "biass=true"], "Did you mean 'bias'"),
        (["hedgehog", "--option", "bias"], "--option takes name=value"),
        (["hedgehog", "--option", "activation=relu"], "activation is"),
    ],
)
def test_wrong_usage_is_one_line(arguments, message, capsys):
    assert cli.main(["check", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and message in captured.err and captured.err.count("\n") == 1


def test_a_direction_that_it_doesn_t_serve_is_refused():
    with pytest.raises(UsageError, match="Plain has no bidirectional form"):
        check(spec_of(Plain, directions=["causal"]), directions=["bidirectional"])
