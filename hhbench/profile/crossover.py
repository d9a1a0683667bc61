"""From which length on an attention is faster than the fastest softmax, and how sure that is."""

from collections.abc import Mapping, Sequence

import numpy as np

from hhbench.profile.record import Cell, Crossover
from hhbench.profile.rounds import Floats, interval, resampled


def crossovers(cells: Sequence[Cell], softmaxes: Sequence[str]) -> list[Crossover]:
    """One for each attention, work and precision in which it and a softmax were measured at some length.

    At each length the softmax with the smallest median counts, and the median of the ratios within the rounds that
    both were measured in: both saw the same machine then.

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
    lengths = list(both)
    by_length = [ratios(ours, theirs) for ours, theirs in both.values()]
    point, draws = estimate(lengths, by_length)
    low, high = interval(draws)
    first, last = lengths[0], lengths[-1]
    near = min(both, key=lambda n: abs(n - min(max(point, first), last)))

    def within(x: float) -> float | None:
        return x if first < x <= last else None

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
        said=in_words(point, low, high, first, last),
        speedup=float(1 / np.median(by_length[-1])),
    )


def in_words(point: float, low: float, high: float, first: int, last: int) -> str:
    """A crossover and its interval for a person: `382 (370 to 395)`, `below 256`, `above 8,192`."""

    def shown(length: float) -> str:
        return f"above {last:,}" if length > last else f"{length:,.0f}"

    if point <= first:
        return f"below {first:,}" if high <= first else f"below {first:,} (up to {shown(high)})"
    if point > last:
        return f"above {last:,}" if low > last else f"above {last:,} (from {shown(low)})"
    lower = f"below {first:,}" if low <= first else shown(low)
    return f"{point:,.0f} ({lower} to {shown(high)})"


def estimate(lengths: Sequence[int], ratios: Sequence[Sequence[float]]) -> tuple[float, Floats]:
    """Where the median of rounds' ratios falls below 1 for good, and where it does so in rounds drawn anew, [DRAWS].

    0 stands for below the first length, infinity for above the last.

    Args:
        ratios: of the attention's time to softmax's: for each length, one for each round.
    """
    middle = np.array([[np.median(each) for each in ratios]])
    # The same draws for each length: what slows a round down is no difference between two lengths.
    draws = np.stack([resampled(each, np.random.default_rng(0)) for each in ratios], axis=1)
    return float(crossing(lengths, middle)[0]), crossing(lengths, draws)


def crossing(lengths: Sequence[float], ratios: Floats) -> Floats:
    """Where rows of ratios [R, lengths] fall below 1 for good: [R].

    Between two lengths the ratio is taken to be a power of the length. 0 where it is below from the first length on,
    infinity where it is not below at the last.
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


def ratios(ours: Cell, theirs: Cell) -> list[float]:
    """Of two cells' times in each round that both were measured in; of their medians if there is no such round."""
    other = dict(zip(theirs.rounds, theirs.seconds, strict=True))
    found = [own / other[n] for n, own in zip(ours.rounds, ours.seconds, strict=True) if n in other]
    return found or [_p50(ours) / _p50(theirs)]


def _p50(cell: Cell) -> float:
    assert cell.p50 is not None  # it was measured
    return cell.p50
