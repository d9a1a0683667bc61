"""hhbench submit-result: one changed field of a good result is refused, or does no harm."""

import contextlib
import copy
import io
import json
import random
import re
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import hhbench
from hhbench import acceptance, leaderboard, result
from hhbench.cli import main
from hhbench.config import RunConfig

HOSTILE = [
    "<script>alert(1)</script>", "![x](http://example.org/x)", "[x](javascript:1)", "a|b", "a\\|b", "\x1b[31mred",
    "a\nb", "\u202eabc", "=cmd()", "$(id)", "`id`", "../../../etc/passwd", "/etc/passwd", "", "x" * 10_000,
    "file.py:Class", "os:system", "2026", "null",
]  # fmt: skip
ODD = [None, True, False, 0, -1, 1, 0.5, -0.5, 1e300, 2**63, 10**400, [], {}, [[]], {"a": 1}, *HOSTILE]


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A real result of a run that had every stage, as the values of its file."""
    out = tmp_path_factory.mktemp("runs")
    config = RunConfig(
        task="recall", dataset="ar", attn="hedgehog", regime="finetuned-conversion", model="gpt2-1x16x1",
        train_examples=256, test_examples=32, batch_size=16, epochs=1, teacher_epochs=1, transfer_epochs=1,
        tune=(1e-3, 3e-3), accelerator="cpu", logger="none", out=out,
    )  # fmt: skip
    hhbench.run(config)
    (path,) = out.rglob("result.json")
    return json.loads(path.read_text())


def examined(values, tmp_path, **options):
    path = tmp_path / "theirs.result.json"
    path.write_text(values if isinstance(values, str) else json.dumps(values))
    return acceptance.examine(path, **options)


def failed(values, tmp_path, **options):
    """The checks that fail."""
    return {f.check for f in examined(values, tmp_path, **options)[1] if f.outcome == "FAIL"}


def rehashed(values):
    """With the key of its identity: what a forger would do."""
    return values | {"key": result.key_of(values["identity"])}


def changed(values, path, value):
    """A copy in which one field, named by dots, is another."""
    made = copy.deepcopy(values)
    *parents, last = path.split(".")
    inner = made
    for name in parents:
        inner = inner[name]
    inner[last] = value(inner[last]) if callable(value) else value
    return made


def test_a_result_as_it_was_written_is_accepted(good, tmp_path):
    made, findings = examined(good, tmp_path)
    assert made is not None and made.as_dict() == good
    doubts = [f for f in findings if f.outcome != "PASS" and f.check != "environment"]  # a checkout may be changed
    assert not doubts and {"data", "weights", "model", "cost"} <= {f.check for f in findings}


@pytest.mark.parametrize(
    ("path", "value", "check"),
    [
        ("schema", 2, "record"),
        ("key", "0" * 16, "record"),
        ("identity.settings.lr", 0.5, "record"),
        ("identity.data.ar", "0" * 64, "record"),
        ("score.value", float("nan"), "file"),
        ("config.lr", 0.5, "settings"),
        ("config.attn", "elu", "settings"),
        ("config.devices", 8, "environment"),
        ("config.unheard_of", 1, "settings"),
        ("attention.name", "elu", "settings"),
        ("attention.label", "hedgehog[activation=exp]", "attention"),
        ("attention.recipe", "t2r", "settings"),
        ("attention.params_added", lambda n: n + 1, "cost"),
        ("attention.has_weights", False, "model"),
        ("task.name", "lm", "settings"),
        ("task.title", "another", "task"),
        ("task.suite", ["ar"], "task"),
        ("task.average", True, "task"),
        ("task.train_tokens", lambda n: n - 1, "data"),
        ("score.name", "f1", "score"),
        ("score.value", 1.5, "score"),
        ("score.higher_is_better", False, "score"),
        ("score.num_examples", 33, "data"),
        ("metrics.accuracy", 0.123, "score"),
        ("teacher.score", -0.2, "score"),
        ("teacher.key", "somebody", "stages"),
        ("teacher", None, "stages"),
        ("after_swap", 2.0, "score"),
        ("tuning", None, "stages"),
        ("tuning.picked", 0.7, "stages"),
        ("layer_choice", {"layers": [0], "scores": [0.1, 0.2]}, "stages"),
        ("fidelity.kl_after", [-1.0], "stages"),
        ("fidelity.student_entropy_after", [50.0], "stages"),
        ("fidelity.floored_rows", -1, "stages"),
        ("cost.params", lambda n: n - 1, "model"),
        ("cost.params_added", lambda n: n + 1, "model"),
        ("cost.state_bytes", lambda n: n // 2, "model"),
        ("cost.length", 4096, "cost"),
        ("cost.train_tokens", lambda n: n * 3, "cost"),
        ("cost.train_tokens", 0, "cost"),
        ("cost.train_tokens_per_s", lambda n: n * 2, "cost"),
        ("cost.peak_memory_mb", 0.0, "cost"),
        ("cost.seconds", {"train": -1.0}, "cost"),
        ("cost.seconds", {"train": 1e-3}, "cost"),
        ("environment.world_size", 2, "environment"),
        ("environment.threads", 0, "environment"),
        ("environment.precision", "bf16-mixed", "environment"),
        ("environment.commit", "main", "environment"),
        ("environment.device", "\x1b[2J", "text"),
        ("environment.versions", {"<b>torch</b>": "2"}, "text"),
        ("task.title", "x" * 5000, "text"),
        ("created", "yesterday", "created"),
        ("created", "2026-11-24T17:32:05+02:00", "created"),
        ("created", "1999-01-01T00:00:00+00:00", "created"),
    ],
)  # fmt: skip
def test_a_changed_field_fails_the_check_that_knows_of_it(good, tmp_path, path, value, check):
    assert check in failed(changed(good, path, value), tmp_path)


@pytest.mark.parametrize(
    ("name", "value", "check"),
    [
        ("lr", -1.0, "settings"),
        ("regime", "scratch", "task"),
        ("recipe", "t2r", "settings"),
        ("train_examples", 10**15, "cost"),
        ("max_len", 10**9, "cost"),
        ("model", "gpt2-1000000000x16x1", "model"),
        ("model", "gpt2-1x32x1", "model"),
        ("option", {"activation": 10**9}, "model"),
        ("layers", {"0-999999999": "softmax"}, "model"),
        ("epochs", 1e200, "data"),
    ],
)
def test_a_forger_who_hashes_anew_is_found_out_by_what_follows_from_the_settings(good, tmp_path, name, value, check):
    forged = changed(changed(good, f"identity.settings.{name}", value), f"config.{name}", value)
    found = failed(rehashed(forged), tmp_path)
    assert check in found and "record" not in found


def test_other_data_and_other_versions_are_told(good, tmp_path):
    other = changed(good, "identity.data", {"ar": "0" * 64})
    assert failed(rehashed(other), tmp_path) == {"data"}
    assert "data" in failed(rehashed(changed(good, "identity.data", {})), tmp_path)
    assert failed(rehashed(changed(good, "identity.weights", {"minilm": "0" * 64})), tmp_path) == {"weights"}
    newer = rehashed(changed(good, "identity.attention.version", 99))
    assert failed(newer, tmp_path) == {"attention"}
    assert "attention" in failed(rehashed(changed(good, "identity.attention.source_sha256", "0" * 64)), tmp_path)
    assert "task" in failed(rehashed(changed(good, "identity.task.version", 0)), tmp_path)


def test_the_future_is_refused_and_the_clocks_of_others_may_be_a_little_ahead(good, tmp_path):
    now = datetime.fromisoformat(good["created"])
    assert not failed(good, tmp_path, now=now - timedelta(minutes=5))
    assert failed(good, tmp_path, now=now - timedelta(days=1)) == {"created"}
    assert now <= datetime.now(UTC)


def test_an_attention_of_a_file_is_named_and_never_imported(good, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("mine.py").write_text("from pathlib import Path\nPath('imported').touch()\nclass Mine: ...\n")
    theirs = good
    for path, value in {
        "config.attn": "mine.py:Mine", "identity.settings.attn": "mine.py:Mine", "attention.name": "mine.py:Mine",
        "attention.label": "mine.py:Mine", "identity.attention.name": "mine.py:Mine",
        "identity.attention.source_sha256": "0" * 64,
    }.items():  # fmt: skip
        theirs = changed(theirs, path, value)
    made, findings = examined(rehashed(theirs), tmp_path)
    outcomes = {f.check: f.outcome for f in findings}
    assert made is not None and acceptance.accepted(findings)
    assert (outcomes["attention"], outcomes["data"], outcomes["model"]) == ("WARN", "WARN", "WARN")
    layered = changed(good, "config.layers", {"0": "mine.py:Mine"})
    layered["identity"]["settings"]["layers"] = {"0": "mine.py:Mine"}
    examined(rehashed(layered), tmp_path)
    without = rehashed(changed(theirs, "identity.attention.source_sha256", None))
    assert "attention" in failed(without, tmp_path)
    assert not Path("imported").exists()


@pytest.mark.parametrize(
    "text",
    [
        "", "{", "[]", "null", '"text"', "{}", "[" * 100_000, '{"schema": 1}', b"\xed\xa0\x80", b"\xff\xfe", "9" * 5000,
        " " * (acceptance.MOST_BYTES + 1), '{"schema": 1, "schema": 1}', '{"schema": 1e999}',
    ],
    ids=range(14),
)  # fmt: skip
def test_what_is_no_result_is_refused_in_one_line(tmp_path, text, capsys):
    path = tmp_path / "x.result.json"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    made, findings = acceptance.examine(path)
    assert made is None and not acceptance.accepted(findings)
    assert all(f.said.isprintable() and len(f.said) < 400 for f in findings)
    assert main(["submit-result", str(path), "--to", str(tmp_path / "to")]) == 1
    assert not (tmp_path / "to").exists() and "refused" in capsys.readouterr().err


def test_names_that_stand_twice_and_deep_nesting_are_refused(good, tmp_path):
    twice = json.dumps(good).replace('"schema": 1', '"schema": 1, "created": "2026-01-01T00:00:00+00:00"', 1)
    assert failed(twice, tmp_path) == {"file"}
    deep = []
    for _ in range(20):
        deep = [deep]
    assert failed(changed(good, "config.option", {"a": deep}), tmp_path) == {"file"}


def leaves(value, path=()):
    """Every place in JSON values."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, item in items:
        yield from leaves(item, (*path, name))


def mutations(values):
    """One change each: another value at a place, a name that is gone, a name that is new."""
    for path in leaves(values):
        if not path:
            continue
        for value in ODD:
            yield path, "set", value
        yield path, "remove", None
    for path in leaves(values):
        yield path, "add", None


def mutated(values, path, kind, value):
    made = copy.deepcopy(values)
    if kind == "add":
        inner = made
        for name in path:
            inner = inner[name]
        if not isinstance(inner, dict):
            return None
        inner["<b>new</b>"] = "\x1b[0m"
        return made
    inner = made
    for name in path[:-1]:
        inner = inner[name]
    if kind == "remove":
        del inner[path[-1]]
    elif inner[path[-1]] == value and type(inner[path[-1]]) is type(value):
        return None
    else:
        inner[path[-1]] = value
    return made


def check_harmless(good, tmp_path, chosen):
    """Each change is refused, or nothing but numbers, a machine's name and folders is another in what is kept."""
    accepted, folder = 0, tmp_path / "kept"
    optional = ("after_swap", "after_transfer", "fidelity")  # without one its column is gone
    keys = ("identity", "key", "schema", "task", "score", "attention")
    numbers = re.compile(r"[\d.,e+-]+|not run|none| +|-+:?")
    of_good = numbers.sub("", leaderboard.render(leaderboard.tables([result.Result.from_dict(good)])))
    for path, kind, value in chosen:
        values = mutated(good, path, kind, value)
        if values is None:
            continue
        made, findings = examined(values, tmp_path)
        assert all(f.said.isprintable() for f in findings)
        if not acceptance.accepted(findings):
            continue
        accepted += 1
        kept = acceptance.keep(made, folder)
        assert kept.parent == folder and list(folder.iterdir()) == [kept]
        for name in keys:
            assert json.loads(kept.read_text())[name] == good[name], (path, kind, value)
        tables = leaderboard.tables([result.load(kept)])
        text, csv = leaderboard.render(tables), leaderboard.render(tables, "csv")
        assert (text + csv).replace("\n", "").isprintable() and "<" not in text + csv
        if path[0] not in ("environment", *optional) and path != ("teacher", "score"):
            assert numbers.sub("", text) == of_good, (path, kind, value)
        kept.unlink()
    return accepted


def test_changes_drawn_at_random_are_refused_or_do_no_harm(good, tmp_path):
    chosen = random.Random(7).sample(list(mutations(good)), 250)
    assert check_harmless(good, tmp_path, chosen) < 50


@pytest.mark.slow
def test_every_change_is_refused_or_does_no_harm(good, tmp_path):
    assert check_harmless(good, tmp_path, mutations(good)) > 0


def test_the_identity_can_not_be_changed_at_all(good, tmp_path):
    for path, kind, value in mutations(good):
        if path and path[0] in ("identity", "key", "schema") and (kind != "set" or value in (None, -1, "")):
            values = mutated(good, path, kind, value)
            if values is not None:
                assert failed(values, tmp_path) & {"record", "text", "file"}, (path, kind, value)


def test_a_kept_result_lies_in_its_folder_and_replaces_nothing(good, tmp_path, capsys):
    theirs, to = tmp_path / "theirs.json", tmp_path / "table"
    theirs.write_text(json.dumps(good))
    assert main(["submit-result", str(theirs), "--to", str(to)]) == 0
    (kept,) = to.iterdir()
    assert kept.name == f"recall-ar-hedgehog-s0-{good['key']}.result.json"
    assert str(kept) in capsys.readouterr().out and result.load(kept).as_dict() == good
    assert main(["submit-result", str(theirs), "--to", str(to)]) == 0  # the same again
    theirs.write_text(json.dumps(changed(good, "environment.device", "Another CPU")))
    before = kept.read_bytes()
    assert main(["submit-result", str(theirs), "--to", str(to)]) == 1
    assert "nothing is replaced" in capsys.readouterr().err
    assert kept.read_bytes() == before and list(to.iterdir()) == [kept]


@pytest.mark.parametrize("name", ["..", "../..", "/", "a/../../b", "\\\\server\\x", "x" * 300, ".hidden", "CON\x00"])
def test_no_name_leads_out_of_the_folder(good, tmp_path, name):
    made = result.Result.from_dict(good)
    hostile = {"task": made.task | {"name": name, "dataset": name}, "attention": made.attention | {"label": name}}
    made = result.Result(**{f: hostile.get(f, getattr(made, f)) for f in good})
    path = acceptance.keep(made, tmp_path / "table")
    assert path.parent == tmp_path / "table" and list(path.parent.iterdir()) == [path]
    assert not path.name.startswith(".") and path.name.endswith(".result.json") and len(path.name) < 255


def test_the_table_is_printed_with_an_outcome_for_each_check(good, tmp_path):
    theirs = tmp_path / "theirs.json"
    theirs.write_text(json.dumps(changed(good, "cost.state_bytes", 1)))
    with contextlib.redirect_stdout(io.StringIO()) as out:
        assert main(["submit-result", str(theirs)]) == 1
    rows = {line.split()[0]: line.split()[1] for line in out.getvalue().splitlines()[1:]}
    assert rows["model"] == "FAIL" and rows["data"] == "PASS" and {"file", "record", "text"} <= rows.keys()
