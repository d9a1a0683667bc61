"""Records of runs: what is written is read again, and what was damaged is named."""

import dataclasses
import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

import hhbench.result
from hhbench.errors import HHBenchError, UsageError
from hhbench.result import (
    ABSENT,
    Result,
    Score,
    diff_identity,
    environment,
    find,
    find_by_prefix,
    key_of,
    load,
    save,
)

IDENTITY = {
    "settings": {
        "task": "glue", "dataset": "reviews", "attn": "hedgehog", "preset": "mini", "regime": "scratch",
        "recipe": None, "option": {}, "seed": 0, "teacher_seed": 0, "model": "minilm", "lr": 1e-3, "tune": [],
    },
    "data": {"train": "a" * 64, "test": "b" * 64},
    "weights": {},
    "attention": {"name": "hedgehog", "version": 1, "source_sha256": None},
    "task": {"name": "glue", "version": 1},
}  # fmt: skip


def make(seed: int = 0, **changes) -> Result:
    identity = IDENTITY | {"settings": IDENTITY["settings"] | {"seed": seed}}
    fields = {
        "schema": 1,
        "key": key_of(identity),
        "created": "2025-01-02T03:04:05+00:00",
        "config": identity["settings"],
        "identity": identity,
        "attention": {
            "name": "hedgehog", "label": "hedgehog", "recipe": None, "params_added": 10,
            "has_weights": True,
        },
        "task": {
            "name": "glue", "dataset": "reviews", "suite": ["reviews"], "train_tokens": 1000,
            "title": "reviews", "average": False,
        },
        "score": Score("accuracy", 0.8, True, 2000),
        "metrics": {"accuracy": 0.8},
        "teacher": {"key": "t" * 16, "score": 0.9},
        "after_swap": 0.5,
        "after_transfer": None,
        "fidelity": {
            "kl_before": [0.5, 0.6], "kl_after": [], "teacher_entropy": [1.0, 2.0],
            "student_entropy_before": [1.5, 2.5], "student_entropy_after": [], "floored_rows": 0,
        },
        "layer_choice": None,
        "tuning": {"trials": [{"lr": 1e-3, "validation": 0.7}], "picked": 1e-3},
        "cost": {
            "params": 100, "params_added": 10, "train_tokens": 3000, "seconds": {"finetune": 1.5},
            "train_tokens_per_s": 2000.0, "peak_memory_mb": 300.0, "state_bytes": None, "length": 64,
        },
        "environment": {
            "commit": None, "dirty": None, "versions": {"torch": "2.6"}, "device": "cpu", "world_size": 1,
            "threads": 2, "precision": "32-true", "platform": "Linux", "python": "3.12.0",
        },
    }  # fmt: skip
    return Result(**(fields | changes))


def rewrite(path: Path, **changes) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


finite = st.floats(allow_nan=False, allow_infinity=False)


class TestSaveAndLoad:
    @given(
        value=finite,
        metrics=st.dictionaries(st.text(), finite),
        title=st.text(),
        layers=st.lists(finite),
        option=st.dictionaries(st.text(), st.none() | st.booleans() | st.integers() | finite | st.text()),
        seed=st.integers(0, 2**40),
    )
    def test_round_trip(self, tmp_path_factory, value, metrics, title, layers, option, seed):
        identity = IDENTITY | {"settings": IDENTITY["settings"] | {"option": option, "seed": seed}}
        base = make()
        result = dataclasses.replace(
            base,
            key=key_of(identity),
            identity=identity,
            score=Score("accuracy", value, True, 5),
            metrics=metrics,
            task=base.task | {"title": title},
            fidelity=base.fidelity | {"kl_before": layers},
        )
        path = save(result, tmp_path_factory.mktemp("run"))
        assert load(path) == result

    def test_blank_parts_round_trip(self, tmp_path):
        result = make(teacher=None, after_swap=None, fidelity=None, tuning=None)
        assert load(save(result, tmp_path / "a" / "b")) == result

    def test_nothing_but_the_record_is_left_behind(self, tmp_path):
        save(make(), tmp_path)
        save(make(after_swap=0.6), tmp_path)
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]
        assert load(tmp_path / "result.json").after_swap == 0.6

    def test_an_interrupted_write_leaves_the_old_record(self, tmp_path, monkeypatch):
        save(make(), tmp_path)

        def full_disk(_):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "fsync", full_disk)
        with pytest.raises(HHBenchError, match="No space left on device"):
            save(make(after_swap=0.6), tmp_path)
        assert load(tmp_path / "result.json") == make()
        assert [path.name for path in tmp_path.iterdir()] == ["result.json"]

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_score_that_is_no_number_is_refused(self, tmp_path, value):
        with pytest.raises(HHBenchError, match=r"score\.value is (nan|inf)"):
            save(make(score=Score("word_perplexity", value, False, 5)), tmp_path)
        assert not list(tmp_path.iterdir())

    def test_a_config_that_is_no_json_is_refused(self, tmp_path):
        with pytest.raises(HHBenchError, match="can't save"):
            save(make(config={"out": Path("runs")}), tmp_path)

    def test_a_key_of_another_identity_is_refused(self, tmp_path):
        with pytest.raises(HHBenchError, match="key"):
            save(make(key="0" * 16), tmp_path)

    def test_folder_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("")
        with pytest.raises(HHBenchError, match=r"can't write .*Not a directory") as caught:
            save(make(), tmp_path / "file" / "run")
        assert "\n" not in str(caught.value)


class TestDamage:
    @pytest.fixture
    def path(self, tmp_path) -> Path:
        return save(make(), tmp_path)

    def refused(self, path: Path) -> str:
        with pytest.raises(HHBenchError) as caught:
            load(path)
        assert str(caught.value).startswith(f"{path}: ")
        assert "\n" not in str(caught.value)
        return str(caught.value)

    def test_truncated_anywhere(self, path):
        content = path.read_bytes()
        for length in range(0, len(content) - 2, 97):
            path.write_bytes(content[:length])
            assert "not whole JSON" in self.refused(path)

    def test_not_text(self, path):
        path.write_bytes(b"\xff\xfe\x00")
        assert "not whole JSON" in self.refused(path)

    def test_nested_without_end(self, path):
        path.write_text("[" * 100_000)
        assert "not whole JSON" in self.refused(path)

    def test_nan(self, path):
        path.write_text(path.read_text().replace("0.8", "NaN"))
        assert "NaN" in self.refused(path)

    @pytest.mark.parametrize("schema", [2, 0, "1", None])
    def test_another_schema(self, path, schema):
        rewrite(path, schema=schema)
        assert f"schema is {schema!r}" in self.refused(path)

    @pytest.mark.parametrize("content", ["[]", "3", '"result"', "null", "{}"])
    def test_other_json(self, path, content):
        path.write_text(content)
        assert "schema is None" in self.refused(path)

    def test_tampered_identity(self, path):
        settings = make().identity["settings"] | {"lr": 0.5}
        rewrite(path, identity=make().identity | {"settings": settings})
        assert "changed after it was written" in self.refused(path)

    NEWER = ("layer_choice",)  # than some records: what they lack has its default

    @pytest.mark.parametrize("name", NEWER)
    def test_a_newer_field_may_be_missing(self, path, name):
        values = json.loads(path.read_text())
        del values[name]
        path.write_text(json.dumps(values))
        assert load(path) == make()

    @pytest.mark.parametrize("name", [f.name for f in dataclasses.fields(Result) if f.name != "layer_choice"])
    def test_missing_field(self, path, name):
        values = json.loads(path.read_text())
        del values[name]
        path.write_text(json.dumps(values))
        assert name in self.refused(path)

    def test_unknown_field(self, path):
        rewrite(path, luck=1)
        assert "luck is an unknown field" in self.refused(path)

    @pytest.mark.parametrize(
        ("changes", "reason"),
        [
            ({"metrics": {"accuracy": "high"}}, "metrics.accuracy must be a number, not 'high'"),
            ({"metrics": {"accuracy": True}}, "metrics.accuracy must be a number, not True"),
            ({"metrics": []}, "metrics must be an object"),
            ({"teacher": {"key": "t"}}, "teacher.score is missing"),
            ({"after_swap": "0.5"}, "after_swap must be a number"),
            ({"score": None}, "score must be an object"),
            ({"created": 5}, "created must be text"),
            (
                {"tuning": {"trials": [{"lr": 1, "validation": None}], "picked": 1}},
                "tuning.trials[0].validation",
            ),
            ({"cost": make().cost | {"params": 1.5}}, "cost.params must be an integer"),
            (
                {"attention": make().attention | {"has_weights": 1}},
                "attention.has_weights must be true or false",
            ),
            ({"task": make().task | {"suite": "reviews"}}, "task.suite must be a list"),
        ],
    )
    def test_mistyped_field(self, path, changes, reason):
        rewrite(path, **changes)
        assert reason in self.refused(path)

    @pytest.mark.parametrize("name", ["preset", "regime", "model", "seed", "teacher_seed"])
    def test_settings_that_tables_need(self, path, name):
        settings = {k: v for k, v in IDENTITY["settings"].items() if k != name}
        identity = IDENTITY | {"settings": settings}
        rewrite(path, identity=identity, key=key_of(identity))
        assert f"identity.settings.{name} is missing" in self.refused(path)

    def test_no_file(self, tmp_path):
        assert "No such file" in self.refused(tmp_path / "result.json")


class TestKey:
    def test_is_16_hex_characters_whatever_the_order(self):
        key = key_of(IDENTITY)
        assert len(key) == 16 and int(key, 16) >= 0
        assert key_of(dict(reversed(IDENTITY.items()))) == key

    def test_every_part_counts(self):
        settings = IDENTITY["settings"] | {"lr": 2e-3}
        assert key_of(IDENTITY | {"settings": settings}) != key_of(IDENTITY)
        assert key_of(IDENTITY | {"weights": {"minilm": "c"}}) != key_of(IDENTITY)

    def test_difference(self):
        other = IDENTITY | {
            "settings": IDENTITY["settings"] | {"lr": 2e-3, "clip": 1.0},
            "data": {"train": "a" * 64, "test": "c" * 64},
        }
        assert diff_identity(IDENTITY, other) == [
            ("data.test", "b" * 64, "c" * 64),
            ("settings.clip", ABSENT, 1.0),
            ("settings.lr", 1e-3, 2e-3),
        ]
        assert diff_identity(IDENTITY, IDENTITY) == []


class TestFind:
    def test_both_names_in_the_order_of_paths(self, tmp_path):
        for seed, folder in enumerate(["b", "a/deep", "c"]):
            save(make(seed), tmp_path / folder)
        (tmp_path / "c" / "result.json").rename(tmp_path / "kept.result.json")
        (tmp_path / "other.json").write_text("{}")
        results, skipped = find(tmp_path)
        assert [r.identity["settings"]["seed"] for r in results] == [1, 0, 2]
        assert skipped == []

    def test_damaged_files_are_named_and_the_rest_is_read(self, tmp_path):
        save(make(0), tmp_path / "good")
        cut = save(make(1), tmp_path / "cut")
        cut.write_text(cut.read_text()[:100])
        newer = save(make(2), tmp_path / "newer")
        rewrite(newer, schema=7)
        results, skipped = find(tmp_path)
        assert results == [make(0)]
        assert [line.split(": ")[0] for line in skipped] == [f"skipped {cut}", f"skipped {newer}"]

    def test_no_folder(self, tmp_path):
        with pytest.raises(HHBenchError, match="no folder"):
            find(tmp_path / "runs")


class TestFindByPrefix:
    def test_key_prefix_file_and_folder(self, tmp_path):
        path = save(make(), tmp_path / "run")
        save(make(), tmp_path / "copy")
        for text in (make().key, make().key[:6], str(path), str(path.parent)):
            assert find_by_prefix(tmp_path, text) == make()

    def test_ambiguous(self, tmp_path):
        for seed in range(2):
            save(make(seed), tmp_path / str(seed))
        with pytest.raises(UsageError, match="2 keys"):
            find_by_prefix(tmp_path, "")

    def test_near_name(self, tmp_path):
        save(make(), tmp_path)
        wrong = "x" + make().key[1:8]
        with pytest.raises(UsageError, match=f"Did you mean '{make().key[:8]}'"):
            find_by_prefix(tmp_path, wrong)


class TestEnvironment:
    def test_what_is_installed_and_what_the_caller_says(self):
        found = environment(device="cpu", world_size=2, threads=4, precision="bf16-mixed")
        assert found["versions"]["torch"] == importlib.metadata.version("torch")
        assert (found["device"], found["world_size"], found["threads"]) == ("cpu", 2, 4)
        assert found["precision"] == "bf16-mixed"
        assert Result.from_dict(make(environment=found).as_dict()).environment == found

    def test_missing_package_is_left_out(self, monkeypatch):
        monkeypatch.setattr(hhbench.result, "_PACKAGES", ("no-such-package-anywhere", "numpy"))
        found = environment(device="cpu", world_size=1, threads=1, precision="32-true")
        assert list(found["versions"]) == ["numpy"]

    @pytest.fixture
    def checkout(self, tmp_path, monkeypatch) -> Path:
        (tmp_path / "hhbench").mkdir()
        module = tmp_path / "hhbench" / "result.py"
        module.write_text("")
        monkeypatch.setattr(hhbench.result, "__file__", str(module))
        return tmp_path

    def state(self) -> tuple[str | None, bool | None]:
        found = environment(device="cpu", world_size=1, threads=1, precision="32-true")
        return found["commit"], found["dirty"]

    def commit(self, root: Path) -> None:
        for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "one"]):
            identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
            subprocess.run(["git", *identity, *command], cwd=root, check=True, capture_output=True)

    def test_commit_and_dirty(self, checkout):
        self.commit(checkout)
        commit, dirty = self.state()
        assert commit is not None and len(commit) == 40 and dirty is False
        (checkout / "notes.txt").write_text("no code")
        assert self.state() == (commit, False)
        (checkout / "hhbench" / "result.py").write_text("x = 1")
        assert self.state() == (commit, True)

    def test_outside_a_checkout(self, checkout):
        assert self.state() == (None, None)

    def test_no_git(self, checkout, monkeypatch):
        self.commit(checkout)
        monkeypatch.setenv("PATH", "")
        assert self.state() == (None, None)

    def test_another_repository_around_it_says_nothing(self, checkout, monkeypatch):
        inner = checkout / "env" / "hhbench"
        inner.mkdir(parents=True)
        self.commit(checkout)
        monkeypatch.setattr(hhbench.result, "__file__", str(inner / "result.py"))
        assert self.state() == (None, None)


def test_nothing_heavy_is_imported():
    code = "import sys, hhbench.leaderboard; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    heavy = {"torch", "numpy", "lightning", "transformers", "timm", "datasets", "rich"}
    assert not heavy & set(done.stdout.split())
