"""What rounds come to: their percentiles, and how sure a median of them is. No torch here."""

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

DRAWS: Final = 1000
CERTAINTY: Final = (0.025, 0.975)
Floats = NDArray[np.float64]


def percentiles(values: Sequence[float] | Floats) -> tuple[float, float, float]:
    """The tenth, the median and the ninetieth."""
    p10, p50, p90 = (float(value) for value in np.quantile(values, (0.1, 0.5, 0.9)))
    return p10, p50, p90


def resampled(values: Sequence[float], random: np.random.Generator) -> Floats:
    """Medians of the rounds drawn anew, [DRAWS]."""
    rounds = np.array(values)
    found: Floats = np.median(rounds[random.integers(len(rounds), size=(DRAWS, len(rounds)))], axis=1)
    return found


def interval(draws: Floats) -> tuple[float, float]:
    """Between which 95 of 100 draws lie; infinite ones may be among them."""
    low, high = (float(x) for x in np.quantile(draws, CERTAINTY, method="nearest"))
    return low, high
