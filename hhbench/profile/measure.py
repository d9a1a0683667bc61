"""How cells are measured: probed from short to long within a budget, then timed in rounds; crossovers more finely.

Probing an attention at a length, after the shorter ones, tells what longer ones will cost: what doesn't fit into the
budget or the memory is not run, and says so. Then rounds: in each one every cell is timed once, in an order that is
drawn anew, so that a slow minute of the machine falls on all alike. Attentions at the same work and length follow each
other: their ratios are taken within a round.

Lengths that double say little of where two times cross: softmax's own time has steps. So the last part of the budget
goes to lengths around each crossover that was found, for the two that cross.
"""

import dataclasses
import itertools
import math
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from statistics import median
from typing import Any, Final

import torch

from hhbench import result
from hhbench.attention import ATTENTIONS
from hhbench.config import split_label
from hhbench.errors import DataError, HHBenchError, in_one_line
from hhbench.profile import record
from hhbench.profile.clock import (
    MEMORY_BY,
    Clock,
    Inspection,
    cpu_threads,
    device_name,
    device_of,
    free_memory,
    gemm,
    inspect,
    out_of_memory,
)
from hhbench.profile.crossover import crossovers
from hhbench.profile.record import Ceiling, Cell, Profile
from hhbench.profile.request import SOFTMAX, Request
from hhbench.profile.rounds import percentiles
from hhbench.profile.subjects import BACKENDS, FIRST, PREFILL, WORKS, LayerSubject, Subject, Workload, is_softmax
from hhbench.task import TASKS

SAMPLE: Final = 0.02  # seconds: calls that are shorter are repeated within a sample
REPEATS: Final = 20  # at most
FEW, LONG, LEAST = 3, 0.25, 5  # rounds of a cell that takes longer than LONG seconds, and of every other, at least
STEEPEST: Final = 2.2  # no attention's time or memory grows by a higher power of the length
MEMORY_SHARE: Final = 0.7  # of the free memory that a call may be expected to take
GEMM_EVERY: Final = 8  # cells
BETWEEN: Final = (0.5, 0.25, 0.75)  # of the way, in powers, from the length before a crossover to the one after it
FOR_BETWEEN: Final = 0.15  # of the budget
DTYPES: Final = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Watch = Callable[[int, int, str], None]


@dataclass
class _Entry:
    """A cell that is being measured."""

    label: str
    work: str
    dtype: str
    length: int
    workload: Workload | None = None
    inspection: Inspection | None = None
    status: str = record.NOT_RUN
    note: str = ""
    cost: float = 0.0  # of one sample on the wall, inputs included
    repeats: int = 1
    hidden: int = 0  # samples in which other threads worked too
    rounds: list[int] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.label} {self.work} {self.length:,}"

    @property
    def least(self) -> int:
        return FEW if self.cost > LONG else LEAST

    def fail(self, status: str, note: str) -> None:
        self.status, self.note, self.workload = status, note, None


@dataclass(frozen=True)
class _Verdict:
    """Why a row isn't timed, as status and note, and whether there was a definition to compare it with."""

    ended: tuple[str, str] | None
    compared: bool


@dataclass
class _Track:
    """What one attention's work has cost at shorter lengths, and why there are no longer ones."""

    probe: list[tuple[int, float]] = field(default_factory=list)
    sample: list[tuple[int, float]] = field(default_factory=list)
    memory: list[tuple[int, float]] = field(default_factory=list)
    ended: tuple[str, str] | None = None


def profile(request: Request, watch: Watch = lambda done, total, title: None) -> Profile:
    """Measure what a request asks for.

    Args:
        watch: told what is done of how much, and what comes next.

    Raises:
        UsageError: a name, an option or a device that can't be.
        DataError: a task's data or a model's weights can't be had.
    """
    device = device_of(request.device)
    with cpu_threads(request.threads) as threads:
        torch.manual_seed(request.seed)
        return _Session(request, subject_of(request, device), device, threads, watch).profile()


def subject_of(request: Request, device: torch.device) -> Subject:
    """What a request profiles."""
    if request.subject == "layer":
        return LayerSubject(request, device)
    from hhbench.profile.whole import ModelSubject, TaskSubject

    return (ModelSubject if request.model else TaskSubject)(request, device)


def settings_of(request: Request) -> dict[str, Any]:
    """What a profile of this request must share with an older one to be compared with it."""
    threads = request.threads or torch.get_num_threads()
    return request.settings() | {"threads": threads, "device": device_of(request.device).type}


def plan(request: Request) -> list[str]:
    """What will be done, for a person. Every name is checked, nothing is run.

    Raises:
        UsageError: an attention, an option or a device that can't be.
    """
    for label in request.attentions:
        name, options = split_label(label)
        spec = ATTENTIONS.get(name)
        for direction in sorted(spec.directions)[:1]:
            spec.check(direction=direction, options=options)
    if request.task:
        TASKS.get(request.task)
    device = device_of(request.device)
    threads = request.threads or torch.get_num_threads()
    lengths = f"{request.lengths[0]:,} to {request.lengths[-1]:,}" if request.lengths else "the task's own"
    what = {"layer": "one layer", "model": f"the model {request.model}", "task": f"{request.task}'s training step"}
    on = device_name(device) + (f", {threads} thread{'s' * (threads > 1)}" if device.type == "cpu" else "")
    return [
        f"{len(request.attentions)} attentions in {what[request.subject]}: {', '.join(request.modes) or 'every mode'}; "
        f"{', '.join(request.dtypes)}; {len(request.lengths) or 1} lengths, {lengths} tokens",
        f"  on {on}; time is {Clock(device, threads).name}",
        f"  up to {request.rounds} rounds within {request.seconds:,.0f} s; what doesn't fit is not run, and says so",
    ]


class _Session:
    """One profile under way."""

    def __init__(self, request: Request, subject: Subject, device: torch.device, threads: int, watch: Watch) -> None:
        self.request, self.subject, self.device, self.watch = request, subject, device, watch
        self.threads, self.clock = threads, Clock(device, threads)
        self.start = time.perf_counter()
        self.seconds = request.seconds  # until which new work is begun
        self.entries: list[_Entry] = []
        self.between: list[_Entry] = []
        self.ceilings: dict[str, tuple[int, Callable[[], object], list[float]]] = {
            name: (*gemm(device, DTYPES[name]), []) for name in request.dtypes
        }
        self.warnings: list[str] = []

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.start

    @property
    def live(self) -> list[_Entry]:
        return [entry for entry in self.entries if entry.workload is not None]

    def profile(self) -> Profile:
        softmaxes = sum(map(is_softmax, self.subject.labels()))
        if 0 < softmaxes < len(self.subject.labels()) and len(self.subject.lengths) > 1:
            self.seconds *= 1 - FOR_BETWEEN
        self._probe()
        if self._rounds():
            self._refine()
        return self._record()

    # ---- probing -----------------------------------------------------------------------------------------------

    def _probe(self) -> None:
        checked = self._check()
        tracks: dict[tuple[str, str, str], _Track] = {}
        for (label, name), verdict in checked.items():
            buildable = verdict.ended is None or verdict.ended[0] != record.UNSUPPORTED
            for work in self.subject.works(label if buildable else SOFTMAX):
                tracks[label, work, name] = _Track(ended=verdict.ended)
        lengths = self.subject.lengths
        rungs = [n for n in (lengths[0] // 16, lengths[0] // 4) if n >= 256]  # only to tell what the first one costs
        done, total = 0, len(tracks) * (len(rungs) + len(lengths))
        for length in (*rungs, *lengths):
            order = sorted(tracks, key=lambda key: _forecast(tracks[key].probe, length) or 0.0)
            for label, work, name in order:
                entry = _Entry(label, work, name, length)
                self.watch(done, total, f"probing {entry.name}")
                self._probe_one(entry, tracks[label, work, name])
                done += 1
                if length in lengths:
                    if entry.workload is not None and not checked[label, name].compared:
                        entry.note = "; ".join(filter(None, (entry.note, "no definition to check it against")))
                    self.entries.append(entry)

    def _check(self) -> "dict[tuple[str, str], _Verdict]":
        """Whether each row may be timed, by label and precision."""
        labels = self.subject.labels()
        found: dict[tuple[str, str], _Verdict] = {}
        for index, label in enumerate(labels):
            self.watch(index, len(labels), f"checking {label}")
            for name in self.request.dtypes:
                try:
                    wrong, compared = self.subject.check(label, DTYPES[name])
                except DataError:  # no row can do without
                    raise
                except Exception as error:  # an attention's own, or a device's that lacks an operation
                    status = self._status_of(error)
                    note = str(error) if status == record.UNSUPPORTED else f"its check failed: {in_one_line(error)}"
                    found[label, name] = _Verdict((status, note), True)
                    continue
                found[label, name] = _Verdict((record.WRONG, wrong) if wrong and compared else None, compared)
        return found

    def _probe_one(self, entry: _Entry, track: _Track) -> None:
        """Watch one call, and take its time for the plan; or say why not."""
        if track.ended is not None:
            entry.fail(*track.ended)
            return
        least = min(FEW if (_forecast(track.sample, entry.length) or 0.0) > LONG else LEAST, self.request.rounds)
        cost = _forecast(track.probe, entry.length) or 0.0
        sample = _forecast(track.sample, entry.length) or 0.0
        reserved = sum(min(other.least, self.request.rounds) * other.cost for other in self.live)
        if self.spent + reserved + cost + least * sample > self.seconds:
            said = f"what is left is too little for {least} rounds" if sample else "it was spent before"
            self._end(entry, track, record.NOT_RUN, f"budget: {said}")
            return
        needed = max(
            _forecast(track.memory, entry.length, least=1.0) or 0.0,
            self.subject.least_bytes(DTYPES[entry.dtype], entry.length),
        )
        free = free_memory(self.device)
        if free is not None and needed > MEMORY_SHARE * free:
            self._end(entry, track, record.NOT_RUN, f"memory: about {needed / 1e9:,.0f} GB of {free / 1e9:,.0f} free")
            return
        start = time.perf_counter()
        try:
            work = self.subject.workload(entry.label, entry.work, DTYPES[entry.dtype], entry.length)
            entry.inspection = inspect(work.prepare(), self.device)
            begun = time.perf_counter()
            run = work.prepare()
            made = time.perf_counter() - begun
            timed = self.clock.warm_up(run, SAMPLE)
            del run
        except Exception as error:
            self._stumble(entry, track, error)
            return
        entry.workload, entry.status, entry.note = work, record.MEASURED, work.note
        entry.repeats = max(1, min(REPEATS, math.ceil(SAMPLE / max(timed.wall, 1e-9))))
        entry.cost = made + timed.wall * (entry.repeats + (entry.repeats > 1))
        track.probe.append((entry.length, time.perf_counter() - start))
        track.sample.append((entry.length, made + timed.wall))
        if entry.inspection.peak_bytes:
            track.memory.append((entry.length, float(entry.inspection.peak_bytes)))

    def _end(self, entry: _Entry, track: _Track, status: str, note: str) -> None:
        """Neither this length nor a longer one."""
        entry.fail(status, note)
        track.ended = status, note

    def _stumble(self, entry: _Entry, track: _Track | None, error: Exception) -> None:
        """A call failed. What ran out of memory does so at longer lengths too."""
        status = self._status_of(error)
        if status == record.NO_MEMORY:
            entry.fail(status, f"at {entry.length:,} tokens")
            if track is not None:
                track.ended = record.NOT_RUN, f"memory: it ran out {entry.note}"
        elif status == record.UNSUPPORTED:
            entry.fail(status, str(error))
        else:
            entry.fail(status, in_one_line(error))
            if track is not None:
                track.ended = record.FAILED, entry.note

    def _status_of(self, error: Exception) -> str:
        """What a call is that failed. Memory that ran out is given back."""
        if out_of_memory(error):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            return record.NO_MEMORY
        return record.UNSUPPORTED if isinstance(error, HHBenchError) else record.FAILED

    # ---- rounds ------------------------------------------------------------------------------------------------

    def _rounds(self) -> bool:
        """Whether nobody interrupted them."""
        order = random.Random(self.request.seed)
        for number in range(self.request.rounds):
            entries = _in_turns(self._affordable(number), order)
            try:
                self._round(number, entries)
            except KeyboardInterrupt:
                if number == 0:  # some cells have no time at all
                    raise
                self.warnings.append(f"interrupted in round {number + 1} of {self.request.rounds}")
                return False
        return True

    def _round(self, number: int, entries: Sequence[_Entry]) -> None:
        total = self.request.rounds * len(entries)
        for index, entry in enumerate(entries):
            if index % GEMM_EVERY == 0:
                self._sample_ceilings()
            if number >= FEW and self.spent > self.seconds:
                break
            self.watch(number * len(entries) + index, total, f"round {number + 1}: {entry.name}")
            self._sample(entry, number)

    def _affordable(self, number: int) -> list[_Entry]:
        """The cells of a round: all while they have the least number of rounds, then the cheapest that fit."""
        due = [entry for entry in self.live if number < entry.least]
        left = self.seconds - self.spent - sum(entry.cost for entry in due)
        share = left / (self.request.rounds - number)
        for entry in sorted((e for e in self.live if number >= e.least), key=lambda e: e.cost):
            share -= entry.cost
            if share < 0:
                break
            due.append(entry)
        return due

    def _sample(self, entry: _Entry, number: int) -> None:
        assert entry.workload is not None
        try:
            timed = self.clock.sample(entry.workload.prepare(), entry.repeats)
        except Exception as error:
            self._stumble(entry, None, error)
            return
        entry.rounds.append(number)
        entry.seconds.append(timed.seconds)
        entry.wall.append(timed.wall)
        entry.hidden += timed.hidden

    def _sample_ceilings(self) -> None:
        for _, run, seconds in self.ceilings.values():
            run()
            seconds.append(self.clock.time(run).seconds)

    # ---- crossovers --------------------------------------------------------------------------------------------

    def _refine(self) -> None:
        """Time the two that cross at lengths between those around each crossover."""
        cells = [self._cell(entry, {}) for entry in self.entries]
        softmaxes = [label for label in self.subject.labels() if is_softmax(label)]
        known = {(e.label, e.work, e.dtype, e.length): e for e in self.entries if e.seconds}
        wanted: dict[tuple[str, str, str, int], _Track] = {}
        for part, found in itertools.product(BETWEEN, crossovers(cells, softmaxes)):
            if found.length is None:
                continue
            row = found.attention, found.work, found.dtype
            own = [place[-1] for place in known if place[:-1] == row]
            before, after = max(n for n in own if n < found.length), min(n for n in own if n >= found.length)
            length = round(before * (after / before) ** part)
            for label in (found.attention, found.against) if before < length < after else ():
                if (nearest := known.get((label, *row[1:], before)) or known.get((label, *row[1:], after))) is not None:
                    forecast = [(nearest.length, nearest.cost)]
                    wanted[label, *row[1:], length] = _Track(probe=forecast, sample=forecast)
        self.seconds = self.request.seconds
        asked, self.entries = self.entries, []  # rounds of their own
        try:
            for index, (place, track) in enumerate(wanted.items()):
                entry = _Entry(*place)
                self.watch(index, len(wanted), f"probing {entry.name}")
                self._probe_one(entry, track)
                self.entries.append(entry)
            self._rounds()
        except KeyboardInterrupt:
            self.warnings.append("interrupted before the crossovers were looked at more finely")
            self.entries = []
        self.entries, self.between = asked, self.entries

    # ---- the record --------------------------------------------------------------------------------------------

    def _record(self) -> Profile:
        ceilings = [
            Ceiling(dtype=name, size=size, seconds=_rounded(seconds), flops_per_s=2 * size**3 / median(seconds))
            for name, (size, _, seconds) in self.ceilings.items()
            if seconds
        ]
        reached = {ceiling.dtype: ceiling.flops_per_s for ceiling in ceilings}
        places = {(entry.label, entry.dtype, entry.length, entry.work): i for i, entry in enumerate(self.entries)}
        labels = {label: i for i, label in enumerate(self.subject.labels())}
        works = [work for own in WORKS.values() for work in own]
        ordered = sorted(places, key=lambda p: (labels[p[0]], self.request.dtypes.index(p[1]), p[2], works.index(p[3])))
        cells = [self._cell(self.entries[places[place]], reached) for place in ordered]
        cells = [cell for measured in cells for cell in self._with_first_token(measured)]
        between = [self._cell(entry, reached) for entry in sorted(self.between, key=lambda entry: entry.length)]
        between = [cell for measured in between for cell in self._with_first_token(measured)]
        self._warn(cells, ceilings)
        cuda = {"cuda": torch.version.cuda or ""} if self.device.type == "cuda" else {}
        environment = result.environment(
            device=device_name(self.device),
            world_size=1,
            threads=self.threads,
            precision=",".join(self.request.dtypes),
        )
        environment["versions"] |= cuda
        return Profile(
            schema=record.SCHEMA,
            kind="profile",
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            settings=settings_of(self.request),
            subject={"title": self.subject.title, "facts": self.subject.facts, "seconds": round(self.spent, 1)},
            clock=self.clock.name,
            memory=MEMORY_BY[self.device.type],
            warnings=self.warnings,
            ceilings=ceilings,
            crossovers=crossovers([*cells, *between], [label for label in labels if is_softmax(label)]),
            environment=environment,
            cells=cells,
            between=between,
        )

    def _cell(self, entry: _Entry, reached: dict[str, float]) -> Cell:
        version = None if entry.label in BACKENDS else ATTENTIONS.get(split_label(entry.label)[0]).version
        place = {"attention": entry.label, "work": entry.work, "dtype": entry.dtype, "length": entry.length}
        if entry.workload is None or entry.inspection is None or not entry.seconds:
            return Cell(**place, version=version, status=entry.status, note=entry.note)  # type: ignore[arg-type]
        p10, p50, p90 = percentiles(entry.seconds)
        work, ceiling = entry.workload, reached.get(entry.dtype)
        mfu = work.flops / p50 / ceiling if work.flops is not None and ceiling else None
        return Cell(
            **place,  # type: ignore[arg-type]
            version=version,
            status=entry.status,
            note=entry.note,
            tokens=work.tokens,
            rounds=entry.rounds,
            seconds=_rounded(entry.seconds),
            wall=_rounded(entry.wall),
            p10=p10,
            p50=p50,
            p90=p90,
            tokens_per_s=work.tokens / p50,
            peak_bytes=entry.inspection.peak_bytes,
            flops=work.flops,
            counted_flops=entry.inspection.counted_flops,
            mfu=mfu,
            state_bytes=work.state_bytes,
            kernels=list(entry.inspection.kernels),
        )

    def _with_first_token(self, cell: Cell) -> list[Cell]:
        """A prefill is a first token too, where nothing else is kept of a prompt."""
        alike = cell.work == PREFILL and "decode" in self.subject.modes
        if not alike or any(other.label == cell.attention and other.work == FIRST for other in self.entries):
            return [cell]
        return [cell, dataclasses.replace(cell, work=FIRST)]

    def _warn(self, cells: list[Cell], ceilings: list[Ceiling]) -> None:
        measured = [cell for cell in cells if cell.measured]
        noisy = [cell for cell in measured if cell.noisy]
        if noisy:
            worst = max(noisy, key=lambda cell: ((cell.p90 or 0) - (cell.p10 or 0)) / (cell.p50 or 1))
            self.warnings.append(
                f"noise: in {len(noisy)} of {len(measured)} cells rounds disagree by more than {record.NOISY:.0%} of "
                f"the median (marked ~), most in {worst.attention} {worst.work} at {worst.length:,}"
            )
        for ceiling in ceilings:
            p10, _, p90 = percentiles(ceiling.seconds)
            if p90 > (1 + record.NOISY) * p10:
                self.warnings.append(
                    f"noise: the same {ceiling.dtype} product of matrices took from {p10 * 1e3:.3g} to "
                    f"{p90 * 1e3:.3g} ms: the machine is shared, or changes its clock"
                )
        hidden = {entry.label for entry in self.entries if entry.hidden > len(entry.seconds) / 2}
        if hidden:
            self.warnings.append(
                f"threads: {', '.join(sorted(hidden))} worked in other threads too, whose time isn't counted: "
                "compare `wall`"
            )
        if self.spent > 1.1 * self.request.seconds:
            self.warnings.append(f"budget: {self.spent:,.0f} s instead of {self.request.seconds:,.0f} s")


def _forecast(known: Sequence[tuple[int, float]], length: int, *, least: float = 0.0) -> float | None:
    """What a cost will be at a length, by the power with which it grew last; None where nothing is known."""
    if not known:
        return None
    n, cost = known[-1]
    power = 2.0
    if len(known) > 1:
        earlier, before = known[-2]
        power = math.log(cost / before) / math.log(n / earlier)
    return float(cost * (length / n) ** min(max(power, least), STEEPEST))


def _in_turns(entries: Sequence[_Entry], order: random.Random) -> list[_Entry]:
    """Places in an order that is drawn, and the attentions of each place likewise."""
    places: dict[tuple[str, str, int], list[_Entry]] = {}
    for entry in entries:
        places.setdefault((entry.work, entry.dtype, entry.length), []).append(entry)
    drawn = list(places.values())
    order.shuffle(drawn)
    for place in drawn:
        order.shuffle(place)
    return [entry for place in drawn for entry in place]


def _rounded(values: Sequence[float]) -> list[float]:
    """To what a clock can tell."""
    return [float(f"{value:.5g}") for value in values]
