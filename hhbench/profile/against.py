"""Whether a profile is slower than an older one, beyond the noise of both.

Times are compared as parts of yardsticks measured in the same profile, so that a slower machine is no regression: the
product of matrices that shows the ceiling, and softmax at the same work and length. A cell is a regression if it got
slower by both of them: 99 of 100 resamplings of the rounds of both profiles lie above TOLERANCE. One of few rounds is
not judged by its time. Softmax itself, and what has no softmax beside it, is measured by the product alone. A cell that
needs more memory by more than TOLERANCE, or that no longer runs or no longer computes what it did, is a regression too.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np

from hhbench.errors import HHBenchError, UsageError
from hhbench.profile import record
from hhbench.profile.record import Cell, Profile
from hhbench.profile.request import SOFTMAX
from hhbench.profile.rounds import resampled

TOLERANCE: Final = 0.1
CERTAINTY: Final = 0.01
ROUNDS: Final = 3  # fewer have no noise that they could be told from
SMALL: Final = 2**20  # bytes: below it a growth of memory means nothing


@dataclass(frozen=True)
class Change:
    """One cell in two profiles.

    Attributes:
        cell: the new one.
        ratio: new time over old time, by the yardstick that shows the smaller growth; None where only one has a time.
        low: what the ratio is above in 99 of 100 resamplings; None where there are too few rounds.
        why: what makes it a regression; empty where it is none.
    """

    cell: Cell
    ratio: float | None
    low: float | None
    why: str


@dataclass(frozen=True)
class Comparison:
    """What became of the cells that both profiles have, and what a reader must know."""

    changes: tuple[Change, ...]
    lines: tuple[str, ...]

    @property
    def regressions(self) -> list[Change]:
        return [change for change in self.changes if change.why]


def compare(new: Profile, old: Profile) -> Comparison:
    """Compare cell by cell.

    Raises:
        UsageError: the profiles are of other settings.
        HHBenchError: they have no cell in common.
    """
    check_settings(new.settings, old)
    changes = []
    for cell in new.cells:
        before = old.find(*cell.place)
        if before is not None and before.measured:
            changes.append(_change(cell, before, new, old))
    if not changes:
        raise HHBenchError("--against: the older profile has none of this one's cells: other attentions or lengths")
    compared = sum(change.ratio is not None for change in changes)
    said = [f"against {old.created}: {compared} cells compared, {sum(bool(c.why) for c in changes)} regressions"]
    if new.device != old.device:
        said.append(f"the older one ran on {old.device}, this one on {new.device}: yardsticks make up for that in part")
    unjudged = sum(change.ratio is not None and change.low is None for change in changes)
    if unjudged:
        said.append(f"fewer than {ROUNDS} rounds in {unjudged} cells: their noise is not known, nor judged their time")
    versions = sorted({c.cell.attention for c in changes if c.cell.version != _version(old, c.cell)})
    if versions:
        said.append(f"computes something else than before (another version): {', '.join(versions)}")
    return Comparison(tuple(changes), tuple(said))


def check_settings(settings: dict[str, object], old: Profile) -> None:
    """Refuse to compare with a profile of other settings.

    Args:
        settings: the new profile's, or as many of them as are known before it ran.
    """
    differ = [
        f"{name} {old.settings.get(name)!r} there and {value!r} here"
        for name, value in settings.items()
        if old.settings.get(name) != value
    ]
    if differ:
        raise UsageError(f"--against: the older profile is of other settings: {'; '.join(differ)}")


def _version(old: Profile, cell: Cell) -> int | None:
    before = old.find(*cell.place)
    return None if before is None else before.version


def _change(cell: Cell, before: Cell, new: Profile, old: Profile) -> Change:
    if not cell.measured:
        gone = cell.status in (record.WRONG, record.NO_MEMORY, record.FAILED, record.UNSUPPORTED)
        return Change(cell, None, None, f"was measured, now {cell.status}: {cell.note}" if gone else "")
    random = np.random.default_rng(0)
    grown = resampled(cell.seconds, random) / resampled(before.seconds, random)
    measures = [grown * resampled(_ceiling(old, cell), random) / resampled(_ceiling(new, cell), random)]
    points = [_ratio(cell.seconds, before.seconds) * _ratio(_ceiling(old, cell), _ceiling(new, cell))]
    softmax = [profile.find(SOFTMAX, cell.work, cell.dtype, cell.length) for profile in (new, old)]
    if cell.attention != SOFTMAX and all(one is not None and one.measured for one in softmax):
        ours, theirs = (one.seconds for one in softmax if one is not None)
        measures.append(grown * resampled(theirs, random) / resampled(ours, random))
        points.append(_ratio(cell.seconds, before.seconds) * _ratio(theirs, ours))
    low = min(float(np.quantile(measure, CERTAINTY)) for measure in measures)
    few = min(len(cell.seconds), len(before.seconds)) < ROUNDS
    why = f"{low - 1:.0%} slower at least" if low > 1 + TOLERANCE and not few else ""
    if cell.peak_bytes is not None and before.peak_bytes is not None:
        more = cell.peak_bytes - before.peak_bytes
        if more > max(SMALL, TOLERANCE * before.peak_bytes):
            memory = f"{more / 1e6:,.0f} MB more memory ({cell.peak_bytes / max(before.peak_bytes, 1):.2f} times)"
            why = f"{why}; {memory}" if why else memory
    return Change(cell, min(points), None if few else low, why)


def _ceiling(profile: Profile, cell: Cell) -> list[float]:
    return next(ceiling.seconds for ceiling in profile.ceilings if ceiling.dtype == cell.dtype)


def _ratio(a: list[float], b: list[float]) -> float:
    return float(np.median(a) / np.median(b))
