"""The committed results: every mini task has every attention and tells them apart, as its preset promises."""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import numpy as np
import pytest

from hhbench.attention import ATTENTIONS
from hhbench.result import Result, load

RESULTS = Path(__file__).resolve().parent.parent / "docs" / "results" / "mini"
PATHS = sorted(RESULTS.glob("*.result.json"))
SEEDS = {0, 1, 2}
# What the tables are read for; the others have a seed at least.
SCRATCH = {"softmax", "hedgehog", "t2r", "elu"}
CONVERSIONS = {
    "softmax no-transfer",
    "hedgehog hedgehog",
    "hedgehog no-transfer",
    "t2r t2r",
    "t2r t2r-hh",
    "elu no-transfer",
}
REPEATED = SCRATCH | CONVERSIONS


def _value(one: Result) -> float:
    """On a scale where differences add up: perplexities in nats per word."""
    return math.log(one.score.value) if one.score.name == "word_perplexity" else one.score.value


def _standard_error(path: Path, one: Result) -> float:
    """Of the mean over the test set."""
    scores = np.load(path.with_name(path.name.replace(".result.json", ".examples.npz")))["score"].astype(np.float64)
    spread = scores.std(ddof=1) / math.sqrt(len(scores))
    # Windows hold losses in nats; the score counts them per word.
    return float(spread / scores.mean() * _value(one) if one.score.name == "word_perplexity" else spread)


def _tables() -> dict[tuple[str, str], dict[str, list[tuple[Path, Result]]]]:
    tables: dict[tuple[str, str], dict[str, list[tuple[Path, Result]]]] = defaultdict(lambda: defaultdict(list))
    for path in PATHS:
        one = load(path)
        if one.config["preset"] == "mini":
            row = " ".join(filter(None, (one.attention["label"], one.attention["recipe"])))
            tables[one.task["name"], one.task["title"]][row].append((path, one))
    return tables


@pytest.mark.parametrize(("task", "title"), sorted(_tables()))
def test_a_mini_task_tells_attentions_apart(task: str, title: str) -> None:
    rows = _tables()[task, title]
    assert set(ATTENTIONS.names()) <= {one.attention["name"] for members in rows.values() for _, one in members}
    repeated = {row: members for row, members in rows.items() if row in REPEATED}
    for members in repeated.values():
        assert {one.config["seed"] for _, one in members} >= SEEDS
    means = {label: statistics.mean(_value(one) for _, one in members) for label, members in rows.items()}
    spreads = [statistics.stdev(_value(one) for _, one in members) for members in repeated.values()]
    errors = [_standard_error(path, one) for members in rows.values() for path, one in members]
    gap = max(means.values()) - min(means.values())
    assert gap > max(spreads)
    assert gap > 2 * max(errors)


def test_recall_is_set_so_that_softmax_solves_it_and_elu_does_not() -> None:
    for (task, _), rows in _tables().items():
        if task == "recall":
            assert all(one.score.value >= 0.99 for _, one in rows["softmax"])
            assert all(one.score.value < 0.5 for _, one in rows["elu"])
