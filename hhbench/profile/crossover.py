"""From which length on an attention is faster than the fastest softmax, and how sure that is."""

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from hhbench.profile.record import Cell, Crossover

DRAWS: Final = 1000
CERTAINTY: Final = (0.025, 0.975)
Floats = NDArray[np.float64]


def crossovers(cells: Sequence[Cell], softmaxes: Sequence[str]) -> list[Crossover]:
    """One for each attention, work and precision in which it and a softmax were measured at some length.

    At each length the softmax with the smallest median counts. Between two lengths the ratio of the medians is taken
    to be a power of the length. Rounds are drawn anew, the same ones for both, since both saw the same machine then.

    Args:
        softmaxes: labels of those that are compared with.
    """
    measured = [cell for cell in cells if cell.measured]
    fastest: dict[tuple[str, str, int], Cell] = {}
    for cell in measured:
        place = cell.work, cell.dtype, cell.length
        if cell.attention in softmaxes and (place not in fastest or _p50(cell) < _p50(fastest[place])):
            fastest[place] = cell
    found = []
    for label, work, dtype in dict.fromkeys((c.attention, c.work, c.dtype) for c in measured):
        own = {c.length: c for c in measured if (c.attention, c.work, c.dtype) == (label, work, dtype)}
        both = {n: (c, fastest[work, dtype, n]) for n, c in sorted(own.items()) if (work, dtype, n) in fastest}
        if both and label not in softmaxes:
            found.append(_crossover(label, work, dtype, both))
    return found


def _crossover(label: str, work: str, dtype: str, both: Mapping[int, tuple[Cell, Cell]]) -> Crossover:
    lengths = np.array(list(both), dtype=float)
    medians = np.array([_p50(ours) / _p50(theirs) for ours, theirs in both.values()])
    point = float(crossing(lengths, medians[None])[0])
    random = np.random.default_rng(0)
    draws = np.stack([ratios(ours, theirs, random) for ours, theirs in both.values()], axis=1)
    low, high = (float(x) for x in np.quantile(crossing(lengths, draws), CERTAINTY, method="nearest"))
    first, last = int(lengths[0]), int(lengths[-1])
    near = min(both, key=lambda n: abs(n - min(max(point, first), last)))

    def within(x: float) -> float | None:
        return x if first < x <= last else None

    if point <= first:
        said = f"below {first:,}" if high <= first else f"below {first:,} (up to {_shown(high, last)})"
    elif point > last:
        said = f"above {last:,}" if low > last else f"above {last:,} (from {_shown(low, last)})"
    else:
        lower = f"below {first:,}" if low <= first else _shown(low, last)
        said = f"{point:,.0f} ({lower} to {_shown(high, last)})"
    return Crossover(
        attention=label,
        work=work,
        dtype=dtype,
        against=both[near][1].attention,
        length=within(point),
        low=within(low),
        high=within(high),
        first=first,
        last=last,
        said=said,
        speedup=float(1 / medians[-1]),
    )


def crossing(lengths: Floats, ratios: Floats) -> Floats:
    """Where rows of ratios [R, lengths] fall below 1 for good: [R].

    0 where they are below from the first length on, infinity where they are not below at the last.
    """
    logs = np.log(ratios)
    slower = logs >= 0
    found = np.zeros(len(logs))
    for row, (above, log) in enumerate(zip(slower, logs, strict=True)):
        if above[-1]:
            found[row] = np.inf
        elif above.any():
            i = int(np.flatnonzero(above)[-1])
            part = log[i] / (log[i] - log[i + 1])
            found[row] = np.exp(np.log(lengths[i]) + part * np.log(lengths[i + 1] / lengths[i]))
    return found


def ratios(ours: Cell, theirs: Cell, random: np.random.Generator, *, draws: int = DRAWS) -> Floats:
    """The ratio of two cells' medians in `draws` resamplings of the rounds that both were measured in, [draws]."""
    by_round = [dict(zip(cell.rounds, cell.seconds, strict=True)) for cell in (ours, theirs)]
    shared = sorted(by_round[0].keys() & by_round[1].keys())
    if not shared:
        return np.full(draws, _p50(ours) / _p50(theirs))
    a, b = (np.array([own[number] for number in shared]) for own in by_round)
    drawn = random.integers(len(shared), size=(draws, len(shared)))
    result: Floats = np.median(a[drawn], axis=1) / np.median(b[drawn], axis=1)
    return result


def _p50(cell: Cell) -> float:
    assert cell.p50 is not None  # it was measured
    return cell.p50


def _shown(length: float, last: int) -> str:
    return f"above {last:,}" if length > last else f"{length:,.0f}"
