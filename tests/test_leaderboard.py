"""Tables: what may stand side by side, what is averaged, and that nothing else is."""

import csv
import io
import itertools
import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hhbench.errors import UsageError
from hhbench.leaderboard import AVERAGE, FORMATS, Table, percent_of_teacher, render, table_of, tables
from hhbench.result import SCHEMA, Result, Score, find, key_of, save

DEVICE = {"device": "cpu A", "world_size": 1, "threads": 2, "precision": "32-true"}


def make(
    attn="hedgehog",
    value=0.8,
    *,
    seed=0,
    label=None,
    recipe="hedgehog",
    dataset="reviews",
    suite=("reviews", "pairs"),
    average=True,
    preset="mini",
    regime="finetuned-conversion",
    model="minilm",
    data="1a2b3c4d" * 8,
    weights="w" * 64,
    train_tokens=1000,
    examples=2000,
    metric="accuracy",
    higher=True,
    teacher=0.9,
    swap=0.5,
    transfer=None,
    kl=((0.4, 0.6), (0.1, 0.2)),
    has_weights=True,
    trials=(),
    version=1,
    task_version=1,
    source=None,
    state_bytes=None,
    length=64,
    created="2025-01-01T00:00:00+00:00",
    settings=None,
    machine=None,
) -> Result:
    identity = {
        "settings": {
            "task": "glue", "dataset": dataset, "attn": attn, "preset": preset, "regime": regime,
            "recipe": recipe, "option": {}, "seed": seed, "teacher_seed": 0, "model": model, "lr": 1e-3,
            "tune": list(trials), **(settings or {}),
        },
        "data": {"all": data},
        "weights": {model: weights} if weights else {},
        "attention": {"name": attn, "version": version, "source_sha256": source},
        "task": {"name": "glue", "version": task_version},
    }  # fmt: skip
    return Result(
        schema=SCHEMA,
        key=key_of(identity),
        created=created,
        config=identity["settings"],
        identity=identity,
        attention={
            "name": attn, "label": label or attn, "recipe": recipe, "params_added": 12_345,
            "has_weights": has_weights,
        },
        task={
            "name": "glue", "dataset": dataset, "suite": list(suite), "train_tokens": train_tokens,
            "title": f"movie {dataset}", "average": average,
        },
        score=Score(metric, value, higher, examples),
        metrics={metric: value},
        teacher=None if teacher is None else {"key": "t", "score": teacher},
        after_swap=swap,
        after_transfer=transfer,
        fidelity=kl and {
            "kl_before": list(kl[0]), "kl_after": list(kl[1]), "teacher_entropy": [],
            "student_entropy_before": [], "student_entropy_after": [], "floored_rows": 0,
        },
        tuning={
            "trials": [{"lr": lr, "validation": 0.5} for lr in trials], "picked": trials[0]
        } if trials else None,
        cost={
            "params": 100, "params_added": 12_345, "train_tokens": 3000, "seconds": {"train": 0.5},
            "train_tokens_per_s": 2000.0, "peak_memory_mb": 300.0, "state_bytes": state_bytes,
            "length": length,
        },
        environment={
            "commit": None, "dirty": None, "versions": {}, "platform": "Linux", "python": "3.12",
            **DEVICE, **(machine or {}),
        },
    )  # fmt: skip


def data_sets(results) -> list[Table]:
    return [table for table in tables(results) if table.group.dataset != AVERAGE]


def averages(results) -> list[Table]:
    return [table for table in tables(results) if table.group.dataset == AVERAGE]


def only(found):
    (one,) = found
    return one


def grid(table: Table) -> list[dict[str, str]]:
    """The Markdown of a table, read back as a reader sees it."""
    lines = [line for line in render([table]).splitlines() if line.startswith("|")]
    heading, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(heading, row, strict=True)) for row in rows]


class TestRows:
    def test_mean_and_sample_spread_by_hand(self):
        results = [make(value=v, seed=s) for s, v in enumerate([0.80, 0.82, 0.87])]
        row = only(only(data_sets(results)).rows)
        assert row.n == 3
        assert row.score_mean == pytest.approx(0.83)
        assert row.score_std == pytest.approx(math.sqrt((0.03**2 + 0.01**2 + 0.04**2) / 2))
        assert only(grid(only(data_sets(results))))["accuracy ↑"] == "0.830 ± 0.036 (n=3)"

    def test_one_seed_has_no_spread(self):
        table = only(data_sets([make()]))
        assert only(table.rows).score_std is None
        assert only(grid(table))["accuracy ↑"] == "0.800 (n=1)"

    def test_best_first_either_way(self):
        values = {"softmax": 0.9, "hedgehog": 0.8, "elu": 0.7}
        up = only(data_sets([make(a, v) for a, v in values.items()]))
        down = only(data_sets([make(a, v, metric="perplexity", higher=False) for a, v in values.items()]))
        assert [row.attention for row in up.rows] == ["softmax", "hedgehog", "elu"]
        assert [row.attention for row in down.rows] == ["elu", "hedgehog", "softmax"]
        assert "perplexity ↓" in grid(down)[0]

    def test_recipes_and_labels_are_rows_of_their_own(self):
        results = [
            make(),
            make(recipe="no-transfer"),
            make(label="hedgehog[act=exp]", settings={"option": {"act": "exp"}}),
        ]
        assert len(only(data_sets(results)).rows) == 3

    def test_settings_that_differ_are_told_and_not_averaged(self):
        results = [make(seed=0), make(seed=1), make(seed=1, settings={"clip": 1.0, "lr": 0.01}), make("elu")]
        rows = grid(only(data_sets(results)))
        assert sorted((row["attention"], row["settings"]) for row in rows) == [
            ("elu", "lr=0.001"),
            ("hedgehog", "clip=1.0, lr=0.01"),
            ("hedgehog", "lr=0.001"),
        ]

    def test_a_tuned_learning_rate_is_no_setting(self):
        results = [make(seed=s, trials=(1e-3, 1e-2), settings={"lr": lr}) for s, lr in enumerate([1e-3, 1e-2])]
        assert only(only(data_sets(results)).rows).n == 2

    def test_two_files_of_one_name_are_two_rows(self):
        results = [make("mine.py:Mine", source=letter * 64) for letter in "ab"]
        assert {row.settings for row in only(data_sets(results)).rows} == {
            "source=aaaaaaaa",
            "source=bbbbbbbb",
        }

    def test_a_copied_file_counts_once(self, tmp_path):
        for folder in ("run", "copy"):
            save(make(), tmp_path / folder)
        assert only(only(data_sets(find(tmp_path)[0])).rows).n == 1

    def test_of_the_same_seed_and_settings_the_newest_counts_and_that_is_said(self):
        # An option that is spelled out with its default value changes the key and nothing else.
        old = make(value=0.7, settings={"option": {"bias": False}})
        new = make(value=0.8, created="2025-01-02T00:00:00+00:00")
        for order in itertools.permutations([old, new]):
            table = only(data_sets(order))
            assert (only(table.rows).n, only(table.rows).score_mean) == (1, 0.8)
            assert any("2 results for 1 seed" in line for line in table.lines)

    def test_a_repeated_run_replaces_its_key(self):
        results = [make(value=0.8, created="2025-01-02T00:00:00+00:00"), make(value=0.7)]
        assert only(only(data_sets(results)).rows).score_mean == 0.8


class TestColumns:
    def test_what_no_row_has_is_left_out(self):
        scratch = make(regime="scratch", recipe=None, teacher=None, swap=None, kl=None)
        assert list(only(grid(only(data_sets([scratch]))))) == [
            "attention", "accuracy ↑", "params added", "tokens/s", "peak memory (MB)",
        ]  # fmt: skip

    def test_what_has_not_run_says_so(self):
        results = [
            make(transfer=0.75),
            make("t2r", 0.7, recipe="t2r", kl=None),
            make("aft", 0.6, has_weights=False, kl=None),
        ]
        first, second, third = grid(only(data_sets(results)))
        assert first["after transfer"] == "0.750"
        assert first["KL before → after"] == "0.500 → 0.150"
        assert (second["after transfer"], second["KL before → after"]) == ("not run", "not run")
        assert third["KL before → after"] == "no weights"
        assert first["params added"] == "12,345"

    def test_kl_without_transfer(self):
        assert only(grid(only(data_sets([make(kl=((0.4, 0.6), ()))]))))["KL before → after"] == "0.500 → not run"

    def test_a_divergence_of_nothing_has_no_sign(self):
        row = only(grid(only(data_sets([make(kl=((-1e-9, 0.0), (-2e-3, 0.0)))]))))
        assert row["KL before → after"] == "0.000 → -0.001"

    def test_time_and_memory_of_one_machine(self):
        table = only(data_sets([make(state_bytes=4096), make("elu", 0.7)]))
        rows = grid(table)
        assert [row["state (bytes)"] for row in rows] == ["4,096", "none"]
        assert rows[0]["tokens/s"] == "2,000"
        assert "Time and memory: cpu A, 2 threads, 32-true, length 64." in table.lines

    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"machine": {"device": "cpu B"}}, "device (cpu A, cpu B)"),
            ({"machine": {"precision": "bf16-mixed"}}, "precision (32-true, bf16-mixed)"),
            ({"length": 128}, "length (128, 64)"),
            ({"machine": {"world_size": 2}}, "world_size (1, 2)"),
        ],
    )
    def test_time_and_memory_of_two_machines_are_left_out(self, other, said):
        table = only(data_sets([make(state_bytes=1), make("elu", 0.7, **other)]))
        assert not {"tokens/s", "peak memory (MB)", "state (bytes)"} & grid(table)[0].keys()
        assert any("left out" in line and said in line for line in table.lines)
        assert "2000.0" not in render([table], "csv")

    def test_conditions(self):
        table = only(data_sets([make(), make("elu", version=3, created="2025-02-03T00:00:00+00:00")]))
        assert table.title == "glue / movie reviews (mini, finetuned-conversion)"
        assert table.lines[0] == (
            "Host minilm, weights wwwwwwww, 1,000 training tokens, 2,000 test examples, data 1a2b3c4d, "
            "untuned, versions: glue 1, elu 3, hedgehog 1. Run 2025-01-01 to 2025-02-03."
        )

    def test_a_mixer_is_marked(self):
        mixer = make("hyena", 0.7, recipe="replacement", has_weights=False, kl=((), ()))
        table = only(data_sets([make(), mixer]))
        assert any(line.startswith("replacement: the whole attention block is new") for line in table.lines)
        assert [row["recipe"] for row in grid(table)] == ["hedgehog", "replacement"]
        assert grid(table)[1]["KL before → after"] == "no weights"
        assert not any("replacement" in line for line in only(data_sets([make()])).lines)

    def test_a_spread_over_one_teacher_says_so(self):
        """Not where there is no spread, where teachers differ too, and where the teacher is a model as it is."""

        def said(*results):
            return any("share one teacher" in line for t in tables(results) for line in t.lines)

        assert said(make(), make(seed=1))
        assert not said(make(), make("elu", seed=1))
        assert not said(make(), make(seed=1, settings={"teacher_seed": 1}))
        assert not said(*(make(seed=seed, regime="pretrained-conversion") for seed in (0, 1)))
        # Of an average only what it has in common counts.
        (average,) = [t for t in tables([make(dataset="pairs"), make(seed=1), make()]) if t.parts]
        assert not any("share one teacher" in line for line in average.lines)
        (average,) = [
            t for t in tables([make(seed=s, dataset=d) for s in (0, 1) for d in ("reviews", "pairs")]) if t.parts
        ]
        assert any("share one teacher" in line for line in average.lines)

    def test_random_weights_and_tuning(self):
        table = only(data_sets([make(weights=None, trials=(1e-3, 3e-3, 1e-2))]))
        assert "from random weights" in table.lines[0]
        assert "best of 3 learning rates by validation" in table.lines[0]


class TestGroups:
    @pytest.mark.parametrize(
        ("other", "said"),
        [
            ({"data": "5e6f7a8b" * 8}, "data 5e6f7a8b"),
            ({"model": "bert"}, "host bert"),
            ({"weights": "v" * 64}, "weights vvvvvvvv"),
            ({"train_tokens": 2000}, "2,000 training tokens"),
            ({"examples": 1}, "1 test example"),
            ({"trials": (1e-3, 1e-2)}, "best of 2 learning rates by validation"),
            ({"task_version": 2}, "glue version 2"),
            ({"metric": "f1"}, "f1, higher is better"),
        ],
    )
    def test_other_conditions_make_another_table_whose_title_says_so(self, other, said):
        both = data_sets([make(), make("elu", **other)])
        assert [len(table.rows) for table in both] == [1, 1]
        assert only(t.title for t in both if t.rows[0].attention == "elu").endswith(f": {said}")
        assert len({table.title for table in both}) == 2

    @pytest.mark.parametrize("other", [{"preset": "paper"}, {"regime": "pretrained-conversion"}, {"dataset": "pairs"}])
    def test_other_headings_make_another_table(self, other):
        both = data_sets([make(), make("elu", **other)])
        assert [len(table.rows) for table in both] == [1, 1]
        assert not any(table.title.endswith(":") or "): " in table.title for table in both)

    def test_an_older_version_stands_apart_from_the_newest(self):
        results = [make(seed=0, version=1), make(seed=1, version=2), make("softmax", 0.9, version=1)]
        newest, older = data_sets(results)
        assert [(row.attention, row.n) for row in newest.rows] == [("softmax", 1), ("hedgehog", 1)]
        assert only(older.rows).attention_version == 1
        assert older.title.endswith(": older version: hedgehog 1")

    def test_data_sets_in_the_order_of_their_suite(self):
        results = [make(dataset=d, suite=("z", "a", "m")) for d in "amz"]
        assert [t.group.dataset for t in tables(results)] == ["z", "a", "m", AVERAGE]

    def test_table_of_a_run(self):
        results = [make(dataset=d, seed=s) for d in ("reviews", "pairs") for s in range(2)]
        new = make("elu", dataset="pairs")
        table = table_of(new, results)
        assert table.group.dataset == "pairs"
        assert {row.attention for row in table.rows} == {"hedgehog", "elu"}
        assert table_of(results[0], results).group.dataset == "reviews"


SUITE = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")
BERT = (58.8, 93.2, 90.2, 88.8, 91.0, 84.7, 91.3, 68.2)
PUBLISHED = {
    99.3: (59.2, 92.6, 90.1, 87.4, 91.0, 82.6, 89.6, 69.3),
    93.5: (56.9, 90.9, 89.1, 77.7, 90.0, 77.4, 84.5, 56.3),
}


class TestPercentOfTeacher:
    @pytest.mark.parametrize(("percent", "scores"), PUBLISHED.items())
    def test_the_papers_rows(self, percent, scores):
        assert round(percent_of_teacher(scores, BERT, higher_is_better=True), 1) == percent

    def test_lower_is_better(self):
        assert percent_of_teacher([25.0], [20.0], higher_is_better=False) == 80.0
        assert percent_of_teacher([20.0], [20.0], higher_is_better=False) == 100.0

    def test_nothing_to_compare_with(self):
        assert percent_of_teacher([0.5], [], higher_is_better=True) is None
        assert percent_of_teacher([0.5], [0.0], higher_is_better=True) is None

    def test_only_where_a_teacher_is(self):
        assert only(only(data_sets([make(teacher=None)])).rows).percent_of_teacher is None
        assert only(only(data_sets([make(value=0.81)])).rows).percent_of_teacher == pytest.approx(90)


class TestAverage:
    def suite(self, scores, attn="hedgehog", **changes):
        return [
            make(attn, value, dataset=name, suite=SUITE, teacher=teacher, **changes)
            for name, value, teacher in zip(SUITE, scores, BERT, strict=True)
        ]

    @pytest.mark.parametrize(("percent", "scores"), PUBLISHED.items())
    def test_the_papers_rows(self, percent, scores):
        table = only(averages(self.suite(scores)))
        row = only(grid(table))
        assert table.title == "glue average (mini, finetuned-conversion)"
        assert row["% of teacher"] == str(percent)
        assert row["average ↑"] == f"{sum(scores) / 8:.2f} (n=1)"
        assert [row[f"movie {name} accuracy ↑"] for name in SUITE] == [f"{value:.2f}" for value in scores]

    def test_only_when_all_sets_are_there(self):
        whole = self.suite(PUBLISHED[99.3])
        for left_out in range(8):
            assert averages(whole[:left_out] + whole[left_out + 1 :]) == []
        part = self.suite(PUBLISHED[93.5], attn="t2r")[:-1]
        table = only(averages(whole + part))
        assert [row.attention for row in table.rows] == ["hedgehog"]
        assert "Not averaged: t2r (hedgehog), which has no rte." in table.lines

    def test_seeds_that_have_all_sets_and_the_spread_of_their_averages(self):
        whole = [make(value=v, dataset=d, seed=s) for d, s, v in [
            ("reviews", 0, 0.80), ("pairs", 0, 0.60), ("reviews", 1, 0.90), ("pairs", 1, 0.56),
            ("reviews", 2, 0.10),
        ]]  # fmt: skip
        row = only(only(averages(whole)).rows)
        assert row.n == 2
        assert row.score_mean == pytest.approx(0.715)
        assert row.score_std == pytest.approx(0.03 / math.sqrt(2))
        assert row.parts == pytest.approx((0.85, 0.58))
        assert row.percent_of_teacher == pytest.approx(100 * 0.715 / 0.9)

    def test_no_seed_in_common(self):
        table = only(averages([make(seed=0), make(dataset="pairs", seed=1)]))
        assert table.rows == ()
        assert "no seed with all data sets" in render([table])

    @pytest.mark.parametrize(
        "other",
        [
            {"recipe": "no-transfer"}, {"preset": "paper"}, {"regime": "pretrained-conversion"},
            {"model": "bert"}, {"trials": (1e-3,)}, {"version": 2},
            {"task_version": 2}, {"label": "hedgehog[act=exp]"},
            {"source": "s" * 64}, {"higher": False},
        ],
    )  # fmt: skip
    def test_nothing_unlike_is_averaged(self, other):
        assert averages([make(), make(dataset="pairs", **other)]) == []

    def test_data_sets_may_differ_in_metric_tokens_and_settings(self):
        other = make(dataset="pairs", metric="f1", train_tokens=5, examples=7, data="d" * 64, settings={"lr": 0.5})
        assert "movie pairs f1 ↑" in only(grid(only(averages([make(), other]))))

    def test_an_average_that_is_not_there_does_not_show_in_the_title_of_one_that_is(self):
        table = only(averages([make(), make(dataset="pairs"), make(trials=(1e-3,))]))
        assert table.title == "glue average (mini, finetuned-conversion)"

    def test_two_rows_of_a_data_set_are_ambiguous(self):
        results = [make(), make(dataset="pairs"), make(dataset="pairs", settings={"lr": 0.5})]
        table = only(averages(results))
        assert table.rows == ()
        assert "Not averaged: hedgehog (hedgehog), which has more than one row of pairs." in table.lines

    def test_only_where_the_task_says_so(self):
        assert averages([make(average=False), make(dataset="pairs", average=False)]) == []
        assert averages([make(suite=("reviews",))]) == []


class TestRender:
    def results(self):
        attentions = {"softmax": 0.9, "hedgehog": 0.85, "elu": 0.7}
        return [
            make(a, v + s / 100, seed=s, dataset=d)
            for (a, v), s, d in itertools.product(attentions.items(), range(3), ("reviews", "pairs"))
        ] + [make("t2r", preset="paper"), make("elu", data="f" * 64)]

    @pytest.mark.parametrize("format", FORMATS)
    @given(shuffle=st.randoms(use_true_random=False))
    def test_same_bytes_in_whatever_order(self, format, shuffle: random.Random):
        results = self.results()
        expected = render(tables(results), format)
        shuffle.shuffle(results)
        assert render(tables(results), format) == expected

    def test_damaged_file_is_named_and_the_table_still_prints(self, tmp_path):
        for number, result in enumerate(self.results()):
            save(result, tmp_path / str(number))
        expected = render(tables(find(tmp_path)[0]))
        (tmp_path / "cut").mkdir()
        (tmp_path / "cut" / "result.json").write_text('{"schema": 1, "key"')
        results, skipped = find(tmp_path)
        assert render(tables(results)) == expected
        assert str(tmp_path / "cut" / "result.json") in only(skipped)

    def test_markdown(self):
        text = render(tables([make("softmax", 0.9, recipe="no-transfer", swap=None, kl=None), make(swap=None)]))
        expected = """
### glue / movie reviews (mini, finetuned-conversion)

Host minilm, weights wwwwwwww, 1,000 training tokens, 2,000 test examples, data 1a2b3c4d, untuned, \
versions: glue 1, hedgehog 1, softmax 1. Run 2025-01-01.
Time and memory: cpu A, 2 threads, 32-true, length 64.

| attention | recipe      |  accuracy ↑ | teacher | % of teacher | KL before → after | params added | \
tokens/s | peak memory (MB) |
| --------- | ----------- | ----------: | ------: | -----------: | ----------------: | -----------: | \
-------: | ---------------: |
| softmax   | no-transfer | 0.900 (n=1) |   0.900 |        100.0 |           not run |       12,345 | \
   2,000 |              300 |
| hedgehog  | hedgehog    | 0.800 (n=1) |   0.900 |         88.9 |     0.500 → 0.150 |       12,345 | \
   2,000 |              300 |
"""
        assert text == expected.lstrip()

    def test_names_cannot_break_a_table(self):
        assert "| a\\|b c    | hedgehog |" in render(tables([make(label="a|b\nc"), make("elu")]))

    def test_csv_is_one_flat_table_with_every_number_in_full(self):
        results = self.results()
        lines = list(csv.DictReader(io.StringIO(render(tables(results), "csv"))))
        assert len(lines) == sum(len(table.rows) for table in tables(results))
        row = only(x for x in lines if x["dataset"] == "pairs" and x["attention"] == "elu")
        assert float(row["score_mean"]) == sum([0.7, 0.7 + 1 / 100, 0.7 + 2 / 100]) / 3
        assert (row["n"], row["preset"], row["higher_is_better"]) == ("3", "mini", "true")
        assert row["data"] == "1a2b3c4d" * 8
        assert len(row["keys"].split()) == 3
        assert row["after_transfer"] == ""

    def test_no_results(self):
        assert render(tables([])) == "No results.\n"
        assert render([], "csv").count("\n") == 1

    def test_unknown_format(self):
        with pytest.raises(UsageError, match="Did you mean 'csv'"):
            render([], "cvs")
