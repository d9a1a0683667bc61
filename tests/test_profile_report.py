"""What is made of a profile: record, crossover, comparison with an older one, tables, plots, and the leaderboard."""

import dataclasses
import json
from itertools import pairwise

import numpy as np
import pytest
from test_leaderboard import DEVICE
from test_leaderboard import make as make_result

from hhbench import leaderboard
from hhbench.errors import HHBenchError, UsageError
from hhbench.profile import plots, record, report
from hhbench.profile.against import compare
from hhbench.profile.crossover import crossing, crossovers, ratios
from hhbench.profile.record import Ceiling, Cell, Profile
from hhbench.profile.rounds import interval, percentiles, resampled

NOISE = (0.99, 1.0, 1.01, 1.0, 1.02)
LENGTHS = (128, 256, 512, 1024, 2048)


def cell(attention, length, seconds, *, work="prefill", noise=NOISE, **changes) -> Cell:
    samples = [seconds * factor for factor in noise]
    p10, p50, p90 = percentiles(samples)
    fields = {
        "attention": attention, "version": 1, "work": work, "dtype": "float32", "length": length,
        "status": record.MEASURED, "tokens": length, "rounds": list(range(len(samples))), "seconds": samples,
        "wall": samples, "p10": p10, "p50": p50, "p90": p90, "tokens_per_s": length / p50, "peak_bytes": 2**24,
        "flops": 10**9, "counted_flops": 10**9, "mfu": 0.5, "state_bytes": 1000, "kernels": [],
    }  # fmt: skip
    return Cell(**fields | changes)


def linear(name="elu", scale=1.0, crossing=512, **changes) -> list[Cell]:
    return [cell(name, n, scale * 1e-6 * n, **changes) for n in LENGTHS] + softmax(scale, crossing, **changes)


def softmax(scale=1.0, crossing=512, **changes) -> list[Cell]:
    return [cell("softmax", n, scale * 1e-6 * n**2 / crossing, **changes) for n in LENGTHS]


def profile(cells, scale=1.0, **changes) -> Profile:
    fields = {
        "schema": record.SCHEMA, "kind": "profile", "created": "2026-01-01T00:00:00+00:00",
        "settings": {
            "subject": "layer", "batch_size": None, "heads": 12, "head_dim": 64, "direction": "causal", "threads": 1,
            "device": "cpu",
        },
        "subject": {"title": "one layer", "facts": {}}, "clock": "CPU time", "memory": "torch's", "warnings": [],
        "ceilings": [
            Ceiling(dtype="float32", size=1024, seconds=[0.02 * scale * f for f in NOISE], flops_per_s=1e11 / scale)
        ],
        "crossovers": crossovers(cells, ["softmax"]),
        "environment": {
            "commit": None, "dirty": None, "versions": {"torch": "2"}, "platform": "Linux", "python": "3", **DEVICE,
        },
        "cells": list(cells),
    }  # fmt: skip
    return Profile(**fields | changes)


# --- the crossover ---


def test_a_crossover_between_two_lengths_is_found_where_powers_meet():
    (found,) = crossovers(linear(crossing=700), ["softmax"])
    assert found.length == pytest.approx(700)  # exact: both are powers of the length
    assert found.low == pytest.approx(found.high) == pytest.approx(700)  # both had the same noise in the same rounds
    assert (found.against, found.first, found.last) == ("softmax", 128, 2048)
    assert found.speedup == pytest.approx(2048 / 700)


def test_more_noise_is_less_certainty():
    noisy = [cell("elu", n, 1e-6 * n, noise=(0.7, 1.4, 0.9, 1.0, 1.2)) for n in LENGTHS] + softmax()
    (calm,), (found,) = crossovers(linear(), ["softmax"]), crossovers(noisy, ["softmax"])
    assert calm.high - calm.low < 1 < 50 < found.high - found.low
    assert found.low < 512 < found.high


def test_a_slow_round_that_both_saw_is_no_noise():
    slow = (1.0, 3.0, 1.0, 3.0, 1.0)
    (found,) = crossovers(linear(crossing=700, noise=slow), ["softmax"])
    assert found.low == pytest.approx(found.high) == pytest.approx(700)


def test_only_rounds_that_both_were_in_are_compared():
    ours = cell("elu", 128, 1e-3, noise=(1, 2, 3, 9, 9))
    theirs = cell("softmax", 128, 1e-3, noise=(1, 1, 1))
    assert ratios(ours, theirs) == pytest.approx([1, 2, 3])
    apart = dataclasses.replace(theirs, rounds=[7, 8, 9])
    assert ratios(ours, apart) == pytest.approx([3])  # the medians


def test_rounds_drawn_anew():
    """The median of three is the middle one unless the same side comes up twice: 7 in 27 each."""
    draws = resampled([1.0, 2.0, 3.0], np.random.default_rng(0))
    assert len(draws) == 1000
    assert abs((draws == 1.0).mean() - 7 / 27) < 0.05
    assert abs((draws == 3.0).mean() - 7 / 27) < 0.05
    assert interval(np.array([*range(1, 40), np.inf])) == (2, 39)


def test_a_crossover_outside_of_what_was_measured_is_said():
    (below,), (above,) = (crossovers(linear(crossing=n), ["softmax"]) for n in (50, 9000))
    assert (below.length, below.said) == (None, "below 128")
    assert (above.length, above.said) == (None, "above 2,048")


def test_the_fastest_softmax_counts():
    cells = [*linear(crossing=300), *(cell("softmax by SDPA math", n, 1e-6 * n**2 / 600) for n in LENGTHS)]
    (found,) = crossovers(cells, ["softmax", "softmax by SDPA math"])
    assert (found.against, found.length) == ("softmax by SDPA math", pytest.approx(600))


def test_the_last_crossing_counts():
    lengths = np.array([1.0, 2.0, 4.0, 8.0])
    rows = np.array([[0.5, 2.0, 1.0, 0.25], [2.0, 0.5, 2.0, 0.5], [0.5, 0.5, 0.5, 2.0], [0.5, 0.9, 0.5, 0.1]])
    assert crossing(lengths, rows) == pytest.approx([4.0, 32**0.5, np.inf, 0.0])


# --- the comparison ---


def test_a_profile_is_no_regression_of_itself():
    found = compare(profile(linear()), profile(linear()))
    assert len(found.changes) == 10
    assert found.regressions == []
    assert "no regression" in report.comparison_lines(found)[-1]


def test_a_slower_machine_is_no_regression():
    assert compare(profile(linear(scale=3.0), scale=3.0), profile(linear())).regressions == []


def test_a_faster_softmax_is_no_regression_of_others():
    new = [c for c in linear() if c.attention == "elu"] + softmax(scale=0.5)
    assert compare(profile(new), profile(linear())).regressions == []


def test_what_got_slower_is_a_regression():
    new = [cell("elu", n, (1.3e-6 if n == 512 else 1e-6) * n) for n in LENGTHS] + softmax()
    found = compare(profile(new), profile(linear()))
    (change,) = found.regressions
    assert (change.cell.attention, change.cell.length) == ("elu", 512)
    assert 1.1 < change.low <= change.ratio == pytest.approx(1.3, rel=0.02)
    assert report.comparison_lines(found)[-1].startswith("REGRESSION: elu prefill float32 at 512")


def test_what_lies_within_the_noise_is_none():
    noise = (0.6, 1.6, 1.0, 0.7, 1.5)
    new = [cell("elu", n, 1.3e-6 * n, noise=noise) for n in LENGTHS] + softmax()
    assert compare(profile(new), profile(linear(noise=noise))).regressions == []


def test_few_rounds_are_not_judged():
    new = [cell("elu", n, 2e-6 * n, noise=NOISE[:2]) for n in LENGTHS] + softmax()
    found = compare(profile(new), profile(linear()))
    assert found.regressions == []
    assert "fewer than 3 rounds in 5 cells: their noise is not known, nor judged their time" in found.lines
    slower = [cell("elu", n, 4e-6 * n) for n in LENGTHS] + softmax()
    assert compare(profile(slower), profile(new)).regressions == []


def test_more_memory_and_wrong_numbers_are_regressions():
    new = linear()
    new[0] = dataclasses.replace(new[0], peak_bytes=2**25)
    new[1] = Cell(
        attention="elu", version=1, work="prefill", dtype="float32", length=256, status=record.WRONG, note="off"
    )
    new[2] = dataclasses.replace(new[1], length=512, status=record.NOT_RUN, note="budget")
    why = [change.why for change in compare(profile(new), profile(linear())).regressions]
    assert why == ["17 MB more memory (2.00 times)", "was measured, now wrong: off"]


def test_profiles_of_other_settings_are_not_compared():
    other = profile(linear())
    other = dataclasses.replace(other, settings=other.settings | {"heads": 4})
    with pytest.raises(UsageError, match="heads 4 there and 12 here"):
        compare(profile(linear()), other)
    with pytest.raises(HHBenchError, match="none of this one's cells"):
        compare(profile(linear("relu")[:5]), profile(linear()[:5]))


# --- the record ---


def test_a_record_is_read_as_it_was_written(tmp_path):
    made = profile(linear())
    path = record.save(made, record.place_below(tmp_path, made))
    assert record.load(path) == made
    assert record.find(tmp_path) == ([made], [])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"kind": "result"}, "no profile"),
        ({"schema": 99}, "schema"),
        ({"ceilings": []}, "no ceiling in float32"),
        ({"cells": [{}]}, "missing"),
        ({"clock": 3}, "clock must be text"),
    ],
)
def test_a_damaged_record_is_refused_with_the_reason(change, says, tmp_path):
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(profile(linear()).as_dict() | change))
    with pytest.raises(HHBenchError, match=says) as error:
        record.load(path)
    assert str(error.value).startswith(str(path))
    assert record.find(tmp_path) == ([], [f"skipped {error.value}"])


# --- tables and plots ---


def test_tables_have_a_row_for_each_attention_and_length():
    made = profile([*linear(), *linear(work="train"), *linear(work="token"), *linear(work="first token")])
    shown = report.sections(made)
    assert [len(section.rows) for section in shown] == [10, 10, 10, 1]
    assert all(len(row) == len(section.headers) for section in shown for row in section.rows)
    row = dict(zip(shown[1].headers, shown[1].rows[3], strict=True))
    assert (row["attention"], row["tokens"], row["x softmax"], row["MFU"]) == ("elu", "1,024", "2", "50.0%")
    assert row["ms (p10 to p90)"] == "1.02 (1.02 to 1.04)"
    assert shown[-1].rows[0][1].startswith("512 (")


def test_a_cell_without_numbers_says_why():
    gone = Cell(
        attention="mine", version=1, work="prefill", dtype="float32", length=64, status=record.NO_MEMORY, note="at 64"
    )
    (section, _) = report.sections(profile([*linear(), gone]))
    row = dict(zip(section.headers, section.rows[-1], strict=True))
    assert (row["ms (p10 to p90)"], row["note"], row["tokens/s"]) == ("out of memory", "at 64", "")


def test_rounds_that_disagree_are_marked():
    noisy = cell("elu", 128, 1e-3, noise=(0.5, 1.0, 1.5))
    (section,) = report.sections(profile([noisy]))
    assert section.rows[0][2].endswith("~")


def test_labels_are_told_apart():
    labels = ["softmax", *(f"attention {i}" for i in range(20))]
    looks = {(look["color"], look["linestyle"], look["marker"]) for look in plots.styles(labels).values()}
    assert len(looks) == len(labels)


def test_labels_do_not_lie_over_each_other():
    placed = plots.spread([0.1, 0.5, 0.5, 0.51, 0.99, 1.0], 0.05)
    assert placed == sorted(placed)
    assert min(b - a for a, b in pairwise(placed)) == pytest.approx(0.05)
    assert placed[0] == 0.1
    assert placed[-1] <= 1.0
    assert plots.spread([], 0.05) == []


def test_plots_are_written(tmp_path):
    made = profile([*linear(), *linear(work="train"), *linear(work="token"), *linear(work="first token")])
    paths = plots.save_plots(made, tmp_path / "plots")
    names = ["time", "tokens", "speedup", "crossover", "memory", "flops", "decode"]
    assert [path.name for path in paths] == [f"{name}.png" for name in names]
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in paths)


# --- beside the results ---


def of_task(**changes) -> Profile:
    made = profile(linear("hedgehog", work="train"))
    settings = {"subject": "task", "task": "glue", "batch_size": None, "threads": 1, "device": "cpu"}
    facts = {"host": "minilm", "dataset": "reviews"}
    return dataclasses.replace(made, settings=settings, subject={"title": "glue", "facts": facts}, **changes)


def test_a_profile_of_the_task_stands_in_its_row():
    (table,) = leaderboard.tables([make_result()], [of_task()])
    (row,) = table.rows
    assert row.profiled_tokens_per_s == pytest.approx(1e6)  # at 128, which is nearest to the table's 64
    assert row.profiled_times_softmax == pytest.approx(0.25)
    assert "profiled tokens/s" in leaderboard.render([table])
    assert any(line.startswith("Profiled: cpu A, 2 threads, float32, length 128") for line in table.lines)


@pytest.mark.parametrize(
    "other",
    [
        {"label": "hedgehog[activation=exp]"},
        {"machine": {"device": "cpu B"}},
        {"machine": {"precision": "bf16-mixed"}},
        {"model": "bert"},
        {"dataset": "pairs"},
        {"version": 2},
    ],
)
def test_a_profile_of_something_else_stands_in_no_row(other):
    (table,) = leaderboard.tables([make_result(**other)], [of_task()])
    assert table.rows[0].profiled_tokens_per_s is None
    assert "profiled" not in leaderboard.render([table]).lower()


def test_two_machines_share_no_profile():
    results = [make_result(seed=0), make_result(seed=1, machine={"device": "cpu B"})]
    (table,) = leaderboard.tables(results, [of_task()])
    assert table.rows[0].profiled_tokens_per_s is None
