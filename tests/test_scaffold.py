"""`hhbench new`: what it writes works as written, and CONTRIBUTING's walk leads where it says."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hhbench import scaffold
from hhbench.attention import ATTENTIONS
from hhbench.check import check
from hhbench.cli import main
from hhbench.config import RECIPES
from hhbench.errors import UsageError
from hhbench.task import TASKS

ROOT = Path(__file__).resolve().parent.parent
RUNGS = {"map": "FeatureMap", "attention": "Attention", "mixer": "SequenceMixer"}
LONGEST = "a-name-of-thirty-characters-12"
# Real runs, cut short.
SHORT = ["--train-examples", "64", "--test-examples", "32", "--epochs", "0.5", "--accelerator", "cpu"]


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    """An empty folder to stand in, and registries that forget what a test made."""
    monkeypatch.chdir(tmp_path)
    for registry in (ATTENTIONS, TASKS):
        monkeypatch.setattr(registry, "_external", {})
    yield
    for registry in (ATTENTIONS, TASKS):
        for name, spec in list(registry._specs.items()):
            if not spec.part.__module__.startswith("hhbench."):  # a built-in's file is not run again
                del registry._specs[name]


@pytest.fixture
def checkout(tmp_path, monkeypatch) -> Path:
    """A folder that `new` takes for its checkout."""
    for folder in ("baselines", "tasks", "tests"):
        (tmp_path / folder).mkdir()
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    monkeypatch.setattr(scaffold, "ROOT", tmp_path)
    return tmp_path


def files(folder: Path) -> dict[str, str]:
    """What lies below a folder, by path, with its hash; caches and runs aside."""
    made = {"__pycache__", ".pytest_cache", ".hypothesis", ".ruff_cache", "runs"}
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not made & set(path.relative_to(folder).parts)
    }


def python(*arguments: str, folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *arguments],
        cwd=folder,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, f"{' '.join(arguments)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


# --- CONTRIBUTING's walk ---


def blocks(language: str, heading: str) -> list[str]:
    """The code of a section of CONTRIBUTING."""
    section = (ROOT / "CONTRIBUTING.md").read_text().partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    found = re.findall(rf"^( *)```{language}\n(.*?)^ *```", section, flags=re.DOTALL | re.MULTILINE)
    assert found
    return [re.sub(rf"^{indent}", "", code, flags=re.MULTILINE) for indent, code in found]


def walked(section: str, folder: Path) -> dict[str, str]:
    """What the commands of a section say, run one after the other in a folder."""
    environment = {"PYTHONPATH": str(folder), "HHBENCH_OFFLINE": "1"}
    which = python("-c", "import hhbench; print(hhbench.__file__)", folder=folder, **environment)
    assert Path(which.strip()) == folder / "hhbench" / "__init__.py"
    outputs = {}
    for line in "".join(blocks("bash", section)).splitlines():
        command = line.split("  #")[0].strip()
        words = shlex.split(command)
        words = words[1:] if words[0] == "python" else ["-m", *words]
        assert words[:2] in (["-m", "hhbench"], ["-m", "pytest"])
        outputs[command] = python(*words, *(SHORT if words[2] == "run" else ()), folder=folder, **environment)
    return outputs


@pytest.mark.parametrize(("section", "name"), [("Add an attention", "my-map"), ("Add a task or a data set", "my-task")])
def test_contributing_s_walk(section, name, tmp_path):
    """In a copy of the checkout: every command succeeds and shows the new name, and no file is edited for it."""
    for part in ("hhbench", "tasks", "baselines"):
        shutil.copytree(ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "tests").mkdir()
    for part in ("pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / part, tmp_path / part)
    before = files(tmp_path)
    outputs = walked(section, tmp_path)

    def output(start: str) -> str:
        (found,) = (out for command, out in outputs.items() if command.startswith(start))
        return found

    assert next(iter(outputs)).startswith("hhbench new ") and next(iter(outputs)).endswith(f" {name}")
    wrote, _, told = output("hhbench new").partition("next:\n")
    after = files(tmp_path)
    assert [f"wrote {path}" for path in after if path not in before] == wrote.splitlines()
    assert {path: digest for path, digest in after.items() if path in before} == before
    told = [line.strip() for line in told.splitlines()]
    assert len(told) >= 2 and told == [command for command in outputs if command in told]

    assert re.search(r"\d passed", output("python -m pytest"))
    assert re.search(rf"^{name} ", output("hhbench list"), flags=re.MULTILINE)
    assert "result: runs/" in output("hhbench run")
    if name == "my-task":
        assert "### my-task / first-token (mini, scratch)" in output("hhbench run")
        return
    assert "PASS" in output("hhbench check") and "FAIL" not in output("hhbench check")
    for dataset in ("ar", "mqar"):
        for command in ("hhbench run", "hhbench leaderboard"):
            table = output(command).partition(f"### recall / {dataset} (mini, scratch)")[2].partition("###")[0]
            assert re.search(r"^\| my-map +\|", table, flags=re.MULTILINE)


def test_the_example_of_contributing_keeps_the_contract(tmp_path):
    (example,) = blocks("python", "Add an attention")
    (tmp_path / "my_map.py").write_text(example)
    assert not failures("my_map.py:SquaredReLU")


# --- what is written ---


def failures(name: str) -> list[str]:
    findings = check(name)
    assert [f for f in findings if f.status == "PASS"]
    return [f"{f.check}, {f.direction}: {f.measured} > {f.bound} {f.note}" for f in findings if f.status == "FAIL"]


@pytest.mark.parametrize("rung", RUNGS)
def test_an_attention_of_each_rung_keeps_the_contract(rung):
    scaffold.new("attention", "my-own", rung=rung)
    assert not failures("my_own.py:MyOwn")
    spec = ATTENTIONS.get("my_own.py:MyOwn")
    assert spec.rung == RUNGS[rung]
    assert spec.directions == {"causal", "bidirectional"}
    assert spec.recipe in RECIPES and (spec.recipe == "replacement") == (rung == "mixer")
    assert spec.part.__doc__ and len(spec.options) >= 1


@pytest.mark.parametrize("rung", RUNGS)
def test_an_option_of_each_rung_keeps_the_contract(rung):
    scaffold.new("attention", "my-own", rung=rung)
    options = {"gate_bias": False} if rung == "mixer" else {"shared_heads": True}
    found = check("my_own.py:MyOwn", options=options)
    assert not [f for f in found if f.status == "FAIL"]


def test_generated_tests_pass_wherever_they_lie(tmp_path):
    """They find their file by their own place, not by where pytest was started."""
    for rung in RUNGS:
        scaffold.new("attention", f"my-{rung}", rung=rung, folder=Path("some folder"))
    scaffold.new("task", "my-task", folder=Path("some folder"))
    out = python("-m", "pytest", "-q", "some folder", folder=tmp_path)
    names = {"test_my_map.py", "test_my_attention.py", "test_my_mixer.py", "test_my_task.py"}
    assert names == {path.name for path in tmp_path.rglob("test_*.py")}
    assert re.search(r"1\d passed", out)
    assert "failed" not in out


@pytest.mark.parametrize("name", ["xy", LONGEST])
@pytest.mark.parametrize("place", ["checkout", "folder"])
def test_what_is_written_is_clean(name, place, request, tmp_path):
    if place == "checkout":
        request.getfixturevalue("checkout")
    for rung in RUNGS:
        scaffold.new("attention", f"{name[:-1]}{rung[2]}", rung=rung)
    scaffold.new("task", name)
    assert len(list(tmp_path.rglob("*.py"))) == 8
    config = ["--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    python("-m", "ruff", "check", *config, ".", folder=tmp_path)
    python("-m", "ruff", "format", "--check", *config, ".", folder=tmp_path)


@pytest.mark.parametrize("place", ["checkout", "folder"])
def test_types_are_strict(place, request, tmp_path):
    if place == "checkout":
        request.getfixturevalue("checkout")
    for rung in RUNGS:
        scaffold.new("attention", f"my-{rung}", rung=rung)
    scaffold.new("task", "my-task")
    written = [str(path) for path in tmp_path.rglob("*.py") if not path.name.startswith("test_")]
    cache = ["--cache-dir", str(ROOT / ".mypy_cache")]
    python("-m", "mypy", "--config-file", str(ROOT / "pyproject.toml"), *cache, *written, folder=ROOT)


# --- where ---


def test_in_a_checkout_it_goes_where_built_ins_lie(checkout, capsys, monkeypatch):
    (checkout / "docs").mkdir()
    assert main(["new", "attention", "my_map"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote baselines/my_map.py",
        "wrote tests/baselines/test_my_map.py",
        "next:",
        "  hhbench check my-map",
        "  python -m pytest tests/baselines/test_my_map.py",
        "  hhbench run --task recall --attn my-map",
    ]
    monkeypatch.chdir("docs")
    written = scaffold.new("task", "my-task")
    assert written.files == (checkout / "tasks/my_task.py", checkout / "tests/tasks/test_my_task.py")
    assert {"baselines/my_map.py", "tasks/my_task.py"} < set(files(checkout))


def test_elsewhere_it_goes_into_a_folder(tmp_path, capsys):
    assert main(["new", "attention", "my-map", "--folder", "my stuff"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "wrote my stuff/my_map.py",
        "wrote my stuff/test_my_map.py",
        "next:",
        "  hhbench check 'my stuff/my_map.py:MyMap'",
        "  python -m pytest 'my stuff/test_my_map.py'",
        "  hhbench run --task recall --attn 'my stuff/my_map.py:MyMap'",
    ]
    assert main(["new", "task", "my-task"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "  hhbench run --task my_task.py:MyTask --attn softmax,hedgehog"
    assert {"my stuff/my_map.py", "my stuff/test_my_map.py", "my_task.py", "test_my_task.py"} == set(files(tmp_path))


def test_a_folder_may_be_named_in_a_checkout(checkout):
    assert scaffold.new("attention", "my-map", folder=Path()).files == (Path("my_map.py"), Path("test_my_map.py"))
    with pytest.raises(UsageError, match="leave --folder out"):
        scaffold.new("attention", "my-map", folder=checkout / "baselines")


# --- refusals ---


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        *(
            (["attention", name], f"{name!r} can't be a name: take 2 to 30 lower-case letters and digits")
            for name in ("MyMap", "3d", "a--b", "my.map", "class", "none", "_map", "éa", "", "x", f"{LONGEST}3")
        ),
        (["attention", "elu"], "attention 'elu' is there already"),
        (["attention", "glue"], "task 'glue' is there already"),
        (["task", "softmax"], "attention 'softmax' is there already"),
        (["attention", "their-map"], "attention 'their-map' is there already"),
        (["attention", "their_map"], "attention 'their-map' is there already"),
        (["attention", "all"], "--attn all"),
        (["attention", "feature-map"], "a class FeatureMap would hide the FeatureMap that its file imports"),
        (["task", "split"], "a class Split would hide"),
        (["attention", "json"], "would hide the module json"),
        (["task", "my-task", "--rung", "map"], "--rung"),
        (["attention", "my-map", "--rung", "block"], "--rung"),
        (["attention", "my-map", "--folder", "a-file/below"], "can't be written"),
        (["attention", "my-map", "--folder", "a-file"], "can't be written"),
    ],
)
def test_what_can_not_be(arguments, words, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(ATTENTIONS, "_plugins", lambda: {"their-map": None})
    Path("a-file").touch()
    try:
        code = main(["new", *arguments])
    except SystemExit as end:
        code = end.code
    out, err = capsys.readouterr()
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert words in err
    assert list(files(tmp_path)) == ["a-file"]


@pytest.mark.parametrize("there", ["my_map.py", "test_my_map.py"])
def test_nothing_is_overwritten(there, tmp_path):
    Path(there).write_text("mine")
    before = files(tmp_path)
    with pytest.raises(UsageError, match=f"^{there} exists already"):
        scaffold.new("attention", "my-map")
    assert files(tmp_path) == before


def test_a_test_file_s_name_is_taken_once_in_a_checkout(checkout):
    """pytest can't tell tests/test_thing.py and tests/baselines/test_thing.py apart."""
    (checkout / "tests" / "test_thing.py").touch()
    with pytest.raises(UsageError, match=r"^tests/test_thing\.py exists already"):
        scaffold.new("attention", "thing")
