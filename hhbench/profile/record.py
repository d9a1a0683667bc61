"""The record of one profile: one JSON document, complete enough to read, draw and compare it. No torch here."""

import dataclasses
import json
import re
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hhbench.errors import HHBenchError
from hhbench.result import Environment, checked, write

SCHEMA: Final = 1
FILE_NAME: Final = "profile.json"
MEASURED, WRONG, UNSUPPORTED, NO_MEMORY, NOT_RUN, FAILED = (
    "measured",
    "wrong",
    "unsupported",
    "out of memory",
    "not run",
    "failed",
)
NOISY = 0.3  # of the median, from the tenth to the ninetieth percentile


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One attention at one piece of work, one precision and one length.

    Attributes:
        attention: its label.
        version: of what it computes; None for a kernel of torch's.
        work: `train`, `prefill`, `first token` or `token`.
        length: tokens; of `token`, those before the new one.
        status: `measured`, or why there are no numbers.
        note: what a reader must know.
        tokens: that one call reads, or writes.
        rounds: in which it was measured.
        seconds: of one call, by the record's clock, one for each round.
        wall: of the same calls, by the clock on the wall.
        p10, p50, p90: percentiles of `seconds`.
        tokens_per_s: at the median.
        peak_bytes: the most that one call held at once, its inputs apart.
        flops: of one call, as the attention states them; None: not stated.
        counted_flops: by torch's counter, which knows products of matrices, convolutions and torch's own softmax
            (causal ones as if nothing were masked), but no FFT and no kernel of others.
        mfu: `flops` a second at the median, as a part of the ceiling.
        state_bytes: what decoding keeps after `length` tokens.
        kernels: what ran.
    """

    attention: str
    version: int | None
    work: str
    dtype: str
    length: int
    status: str
    note: str = ""
    tokens: int = 0
    rounds: list[int] = dataclasses.field(default_factory=list)
    seconds: list[float] = dataclasses.field(default_factory=list)
    wall: list[float] = dataclasses.field(default_factory=list)
    p10: float | None = None
    p50: float | None = None
    p90: float | None = None
    tokens_per_s: float | None = None
    peak_bytes: int | None = None
    flops: int | None = None
    counted_flops: int | None = None
    mfu: float | None = None
    state_bytes: int | None = None
    kernels: list[str] = dataclasses.field(default_factory=list)

    @property
    def place(self) -> tuple[str, str, str, int]:
        """What tells it apart."""
        return self.attention, self.work, self.dtype, self.length

    @property
    def measured(self) -> bool:
        return self.status == MEASURED

    @property
    def noisy(self) -> bool:
        """Whether its rounds disagree."""
        return self.p50 is not None and (self.p90 or 0) - (self.p10 or 0) > NOISY * self.p50


@dataclass(frozen=True, kw_only=True)
class Ceiling:
    """What a product of two square matrices reaches here, measured between the cells.

    Attributes:
        size: rows and columns of each.
        seconds: of one product, by the record's clock, in the order in which they were taken.
        flops_per_s: at the median.
    """

    dtype: str
    size: int
    seconds: list[float]
    flops_per_s: float


@dataclass(frozen=True, kw_only=True)
class Crossover:
    """From which length on an attention is faster than the fastest softmax.

    Attributes:
        against: the softmax that was fastest near there.
        length: None where it is outside of what was measured.
        low, high: between which it lies in 95 of 100 resamplings of the rounds; None where that is outside.
        first, last: the lengths that both were measured at.
        said: for a person: `382 (370 to 395)`, `below 256`, `above 8,192`.
        speedup: at `last`: softmax's time over the attention's.
    """

    attention: str
    work: str
    dtype: str
    against: str
    length: float | None
    low: float | None
    high: float | None
    first: int
    last: int
    said: str
    speedup: float


@dataclass(frozen=True, kw_only=True)
class Profile:
    """One profile.

    Attributes:
        kind: always `profile`.
        created: UTC, ISO 8601.
        settings: what two profiles must share to be compared cell by cell.
        subject: `title` and `facts`.
        clock: what `seconds` are read from.
        memory: what `peak_bytes` are read from.
        warnings: why the numbers may be worth less than they seem.
        between: cells between the lengths that were asked for, which place the crossovers and stand in no table.
    """

    schema: int
    kind: str
    created: str
    settings: dict[str, Any]
    subject: dict[str, Any]
    clock: str
    memory: str
    warnings: list[str]
    ceilings: list[Ceiling]
    crossovers: list[Crossover]
    environment: Environment
    cells: list[Cell]
    between: list[Cell] = dataclasses.field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)

    def as_line(self) -> str:
        """The document in one line."""
        return json.dumps(self.as_dict(), separators=(",", ":"), allow_nan=False)

    @property
    def device(self) -> str:
        return self.environment["device"]

    def find(self, attention: str, work: str, dtype: str, length: int) -> Cell | None:
        """The cell of a place."""
        return self._by_place.get((attention, work, dtype, length))

    @property
    def _by_place(self) -> dict[tuple[str, str, str, int], Cell]:
        found = self.__dict__.get("_places")
        if found is None:
            found = {cell.place: cell for cell in self.cells}
            object.__setattr__(self, "_places", found)
        return found

    def ordered(self, field: str) -> list[Any]:
        """The values of a cell's field in the order in which they first stand."""
        return list(dict.fromkeys(getattr(cell, field) for cell in self.cells))

    @classmethod
    def from_dict(cls, values: Any) -> "Profile":
        """From plain JSON values, every field checked.

        Raises:
            HHBenchError: it is no profile, of another schema, or a field is wrong. The message is the reason alone.
        """
        if not isinstance(values, Mapping) or values.get("kind") != "profile":
            raise HHBenchError("it is no profile: `hhbench profile` writes them")
        if values.get("schema") != SCHEMA:
            raise HHBenchError(f"its schema is {values.get('schema')!r}; this hhbench reads schema {SCHEMA}")
        found: Profile = checked(values, cls, "")
        for cell in (*found.cells, *found.between):
            if cell.measured and not (len(cell.seconds) == len(cell.rounds) > 0 and cell.p50):
                raise HHBenchError(f"the cell {cell.place} says that it was measured and has no times")
            if cell.measured and not any(c.dtype == cell.dtype and c.seconds for c in found.ceilings):
                raise HHBenchError(f"it has no ceiling in {cell.dtype}, which {cell.place} was measured in")
        return found


def place_below(out: Path, profile: Profile) -> Path:
    """Where a new record goes: a folder of its own."""
    settings = profile.settings
    name = settings.get("task") or settings.get("model") or settings.get("direction")
    name = re.sub(r"[^\w.=,+-]", "_", f"{settings['subject']}-{name}")
    stamp = re.sub(r"\D", "", profile.created)[:14]
    return out / "profile" / f"{name}-{stamp}-{uuid.uuid4().hex[:4]}" / FILE_NAME


def save(profile: Profile, path: Path) -> Path:
    """Write the record, whole or not at all, and return its path.

    Raises:
        HHBenchError: it can't be written.
    """
    return write(path, (profile.as_line() + "\n").encode())


def load(path: Path) -> Profile:
    """Read a record. A file that holds more than one line is read by its last, which is what the command prints.

    Raises:
        HHBenchError: it can't be read, is cut short, or is no profile. File and reason are named.
    """
    try:
        text = path.read_text(encoding="utf-8")
        lines = text.strip().splitlines()
        try:
            values = json.loads(text)
        except ValueError:
            values = json.loads(lines[-1] if lines else "")
        return Profile.from_dict(values)
    except OSError as error:
        raise HHBenchError(f"{path}: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        if isinstance(error, HHBenchError):
            raise
        raise HHBenchError(f"{path}: not whole JSON ({error})") from error
    except HHBenchError as error:
        raise HHBenchError(f"{path}: {error}") from error


def find(folder: Path) -> tuple[list[Profile], list[str]]:
    """Every profile below a folder, the newest first, and a line for each file that was skipped."""
    found, skipped = [], []
    for path in sorted({*folder.rglob(FILE_NAME), *folder.rglob(f"*.{FILE_NAME}")}):
        try:
            found.append(load(path))
        except HHBenchError as error:
            skipped.append(f"skipped {error}")
    return sorted(found, key=lambda profile: profile.created, reverse=True), skipped
