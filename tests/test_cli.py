"""The command line: help, what a wrong request is answered, and whole runs as a user starts them."""

import csv
import functools
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hhbench.cli import COMMANDS, main
from hhbench.commands import doctor
from hhbench.pretrained import MINILM
from hhbench.tasks.glue import MOVIE_REVIEWS, SNLI

HEAVY = ("torch", "lightning", "transformers", "timm", "datasets", "numpy")
TINY = [
    "--model", "gpt2-1x16x2", "--max-len", "16", "--train-examples", "128", "--test-examples", "48", "--batch-size",
    "32", "--epochs", "1", "--teacher-epochs", "1", "--transfer-epochs", "1", "--accelerator", "cpu",
]  # fmt: skip
AR = ["run", "--task", "recall", "--dataset", "ar", *TINY]
ATTENTION = "from hhbench.attention import Attention, FeatureMap, register_attention\n"
CAUSAL = (
    ATTENTION
    + '@register_attention(paper="mine", cost="N", directions=("causal",))\n'
    + "class OnlyForward(FeatureMap):\n    def forward(self, x):\n        return x.exp()\n"
)
RAISES = "raise RuntimeError('first line\\nsecond line')\n"
WRONG_SHAPE = ATTENTION + "class Flat(Attention):\n    def forward(self, q, k, v, **_):\n        return v.sum(-1)\n"
FAILS = ATTENTION + "class Fails(FeatureMap):\n    def forward(self, x):\n        return x @ x\n"


@pytest.fixture(autouse=True)
def _alone(offline_folder):
    """Every test works in it."""


def process(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "hhbench", *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def results(folder: Path) -> list[Path]:
    return sorted(folder.rglob("result.json"))


def trained(folder: Path) -> list[Path]:
    """Whatever training leaves behind."""
    return [path for path in folder.rglob("*") if path.suffix in (".safetensors", ".ckpt", ".npz")]


# --- help ---


@pytest.fixture(scope="module")
def helps() -> dict[str, tuple[str, list[str], int]]:
    """The help of every command, with the heavy modules that it loaded and its exit code; one process for each."""
    program = (
        "import sys, json\n"
        "from hhbench.cli import main\n"
        "try:\n    code = main(sys.argv[1:])\n"
        "except SystemExit as end:\n    code = end.code\n"
        "print(json.dumps([sorted({m.partition('.')[0] for m in sys.modules}), code]))\n"
    )
    found = {}
    for command in ["", *COMMANDS]:
        arguments = [*([command] if command else []), "--help"]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=600, check=True
        )
        text, _, last = done.stdout.rstrip("\n").rpartition("\n")
        modules, code = json.loads(last)
        found[command] = text, modules, code
    return found


@pytest.mark.parametrize("command", ["", *COMMANDS])
def test_help_is_light_and_shows_examples(helps, command):
    text, modules, code = helps[command]
    assert code == 0
    assert not set(HEAVY) & set(modules)
    assert "hhbench" in modules
    assert "examples:\n" in text
    assert f"hhbench {command}" in text.partition("examples:")[2]


def test_help_names_every_command(helps):
    text = helps[""][0]
    assert all(f"\n    {command}" in text for command in COMMANDS)


def test_help_of_run_names_every_setting_with_its_default(helps):
    text = " ".join(helps["run"][0].split())
    for flag in ("--task", "--attn", "--dataset", "--preset", "--regime", "--recipe", "--devices", "--num-nodes",
                 "--accelerator", "--precision", "--logger", "--out", "--resume", "--dry-run", "--config", "--tune",
                 "--option", "--seed", "--teacher-seed", "--allow-code", "--debug"):  # fmt: skip
        assert flag in text
    assert "(default: mini)" in text
    assert "(default: runs)" in text


def test_version(call):
    code, out, _ = call("--version")
    assert code == 0
    assert out.startswith("hhbench ")


# --- bad input ---

GLUE = ["run", "--task", "glue", "--attn", "hedgehog"]
RECALL = ["run", "--task", "recall", "--attn", "elu"]
# arguments -> words of the answer
MISUSE = {
    "no command": ([], "command"),
    "command": (["rnu"], "Did you mean 'run'?"),
    "flag": ([*RECALL, "--sede", "1"], "Did you mean '--seed'?"),
    "flag of list": (["list", "tasks", "--debgu"], "Did you mean '--debug'?"),
    "what to list": (["list", "attention"], "Did you mean 'attentions'?"),
    "no task": (["run", "--attn", "elu"], "--task is needed"),
    "no attention": (["run", "--task", "recall"], "--attn is needed"),
    "task": (["run", "--task", "gleu", "--attn", "elu"], "no task named 'gleu'. Did you mean 'glue'?"),
    "second task": (["run", "--task", "recall,gleu", "--attn", "elu"], "Did you mean 'glue'?"),
    "attention": (["run", "--task", "glue", "--attn", "hedghog"], "Did you mean 'hedgehog'?"),
    "second attention": (["run", "--task", "recall", "--attn", "elu,hedghog"], "Did you mean 'hedgehog'?"),
    "data set": ([*GLUE, "--dataset", "snil"], "Did you mean 'snli'?"),
    "data set of recall": ([*RECALL, "--dataset", "mqra"], "Did you mean 'mqar'?"),
    "data set of lm": (["run", "--task", "lm", "--attn", "elu", "--dataset", "no.txt"], "no data set of lm"),
    "missing csv": ([*GLUE, "--dataset", "no.csv"], "no file no.csv"),
    "option": ([*GLUE, "--option", "activaton=exp"], "Did you mean 'activation'?"),
    "option's value": ([*GLUE, "--option", "activation=tanh"], "activation is softmax, exp or joint-softmax"),
    "option's type": ([*GLUE, "--option", "feature_dim=wide"], "hedgehog[feature_dim=wide] can't be built"),
    "option without a value": ([*GLUE, "--option", "noequals"], "--option takes name=value"),
    "preset": ([*GLUE, "--preset", "minni"], "Did you mean 'mini'?"),
    "regime": ([*GLUE, "--regime", "finetuned"], "Did you mean 'finetuned-conversion'?"),
    "recipe": ([*GLUE, "--recipe", "hedgehogs"], "Did you mean 'hedgehog'?"),
    "recipe in scratch": ([*GLUE, "--recipe", "t2r", "--regime", "scratch"], "for conversions"),
    "regime of the task": ([*RECALL, "--regime", "pretrained-conversion"], "recall has no regime"),
    "precision": ([*GLUE, "--precision", "bf16"], "no precision named 'bf16'"),
    "logger": ([*GLUE, "--logger", "cvs"], "Did you mean 'csv'?"),
    "lr that is no number": ([*RECALL, "--lr", "abc"], "--lr can't be 'abc'"),
    "lr zero": ([*RECALL, "--lr", "0"], "--lr must be above 0"),
    "lr infinite": ([*RECALL, "--lr", "inf"], "--lr must be above 0 and finite"),
    "epochs negative": ([*RECALL, "--epochs", "-1"], "--epochs must be finite and not negative"),
    "epochs infinite": ([*RECALL, "--epochs", "inf"], "--epochs must be finite"),
    "batch zero": ([*RECALL, "--batch-size", "0"], "--batch-size must be above 0"),
    "batch of 1.5": ([*RECALL, "--batch-size", "1.5"], "--batch-size can't be '1.5'"),
    "seed negative": ([*RECALL, "--seed", "-1"], "--seed must be at least 0"),
    "seed huge": ([*RECALL, "--seed", "99999999999"], "--seed must be at least 0 and below"),
    "seed list": ([*RECALL, "--seed", "0:3"], "--seed can't be '0:3'"),
    "tune what": ([*RECALL, "--tune", "epochs=1,2"], "the learning rate is what is tuned"),
    "tune nothing": ([*GLUE, "--recipe", "untrained", "--tune", "lr=1e-3"], "--tune needs a stage that trains"),
    "tune values": ([*RECALL, "--tune", "lr=fast"], "--tune can't be"),
    "accelerator": ([*RECALL, "--accelerator", "cdua"], "Did you mean 'cuda'?"),
    "devices and batch": ([*RECALL, "--devices", "3", "--batch-size", "64"], "can't be divided over 3 devices"),
    "no GPU": ([*RECALL, "--accelerator", "mps", "--devices", "64", "--batch-size", "64"], "this machine has"),
    "out below a file": ([*RECALL, "--out", "file/runs"], "--out file/runs can't be written"),
    "config missing": (["run", "--config", "no.yaml"], "--config no.yaml can't be read: "),
    "show": (["show", "hedghog"], "Did you mean 'hedgehog'?"),
    "show three": (["show", "a", "b", "c"], "one name, or two results"),
    "data": (["data", "list", "minilmm"], "Did you mean 'minilm'?"),
    "a file without a class": (["run", "--task", "recall", "--attn", "mine.py"], "mine.py:ClassName"),
    "too long": ([*RECALL, "--dataset", "mqar", "--max-len", "5000"], "--max-len 5000 doesn't fit mqar"),
    "no such file": (["run", "--task", "recall", "--attn", "nothing.py:Mine"], "no file nothing.py"),
}  # fmt: skip


@pytest.mark.parametrize("case", MISUSE)
def test_misuse_is_one_line_and_exit_code_2(call, tmp_path, case):
    arguments, words = MISUSE[case]
    (tmp_path / "file").touch()
    (tmp_path / "mine.py").touch()
    code, out, err = call(*arguments)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert err.startswith("hhbench")
    assert words in err
    assert "Traceback" not in err
    assert not trained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} <= {"file", "mine.py", "cache"}


@pytest.mark.parametrize("accelerator", ["cuda", "gpu"])
def test_devices_that_do_not_exist(call, accelerator):
    import torch

    if torch.cuda.is_available() or torch.backends.mps.is_available():
        pytest.skip("this machine has one")
    code, _, err = call(*AR, "--attn", "elu", "--accelerator", accelerator)
    assert code == 2
    assert err == f"hhbench: --accelerator {accelerator} --devices 1: this machine has 0 of them\n"


@pytest.mark.skipif(hasattr(os, "geteuid") and os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_without_permission(call, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    code, _, err = call(*AR, "--attn", "elu", "--out", "locked/runs")
    assert code == 2
    assert "--out locked/runs can't be written" in err


@pytest.mark.parametrize(
    ("source", "name", "code", "words"),
    [
        (CAUSAL, "OnlyForward", 2, "OnlyForward has no bidirectional form; it is causal"),
        (RAISES, "Any", 1, "RuntimeError: first line second line"),
        ("def broken(:\n", "Any", 1, "SyntaxError"),
        ("import no_such_package\n", "Any", 1, "no_such_package"),
        (WRONG_SHAPE, "Flat", 1, "where [2, "),
        (FAILS, "Fails", 1, "RuntimeError"),
        (CAUSAL, "OnlyForwards", 2, "Did you mean 'OnlyForward'?"),
        ("class Plain:\n    pass\n", "Plain", 2, "none of hhbench.attention's FeatureMap, Attention and SequenceMixer"),
    ],
    ids=["direction", "raises", "syntax", "import", "shape", "fails", "class", "no attention"],
)  # fmt: skip
def test_a_users_attention_that_can_not_be(call, tmp_path, monkeypatch, source, name, code, words):
    from hhbench.attention import ATTENTIONS

    monkeypatch.setattr(ATTENTIONS, "_specs", dict(ATTENTIONS._specs))
    (tmp_path / "mine.py").write_text(source)
    got, out, err = call("run", "--task", "glue", "--attn", f"{tmp_path / 'mine.py'}:{name}")
    assert (got, out, err.count("\n")) == (code, "", 1)
    assert words in err
    assert "mine.py" in err or "OnlyForward" in err or "Flat" in err or "Fails" in err
    assert not trained(tmp_path)


def test_nothing_cached_and_no_network(call, tmp_path):
    """Named: the file, the command that fetches it. Nothing was trained, not even the run that lacks nothing."""
    code, out, err = call("run", "--task", "recall,glue", "--attn", "elu", *TINY)
    assert (code, out, err.count("\n")) == (1, "", 1)
    assert "is missing in" in err
    assert any(f"hhbench data fetch {file.name}" in err for file in (MOVIE_REVIEWS, MINILM, SNLI))
    assert not trained(tmp_path)
    assert not results(tmp_path)


def test_a_corrupted_cache_file_offline(call, tmp_path):
    packages = tmp_path / "cache" / "packages"
    packages.mkdir(parents=True)
    (packages / MOVIE_REVIEWS.filename).write_bytes(b"half")
    code, _, err = call("run", "--task", "glue", "--dataset", "movie-reviews", "--attn", "elu")
    assert (code, err.count("\n")) == (1, 1)
    assert f"{MOVIE_REVIEWS.filename}) is corrupt in {packages}" in err
    assert f"hhbench data fetch {MOVIE_REVIEWS.name}" in err


def test_a_cache_that_can_not_be_written(call, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.delenv("HHBENCH_OFFLINE")
    code, _, err = call("data", "fetch", "minilm")
    assert (code, err.count("\n")) == (1, 1)
    assert "Set HHBENCH_CACHE" in err


@pytest.mark.parametrize("case", ["setting", "code", "attention", "value", "list", "yaml", "option"])
def test_a_configuration_that_can_not_be(call, tmp_path, case):
    (tmp_path / "mine.py").write_text(CAUSAL)
    text, words = {
        "setting": ("task: recall\nattn: elu\nbach_size: 8\n", "Did you mean 'batch_size'?"),
        "code": ("task: recall\nattn: mine.py:OnlyForward\n", "--allow-code"),
        "attention": ("task: recall\nattn: hedghog\n", "Did you mean 'hedgehog'?"),
        "value": ("task: recall\nattn: elu\nlr: fast\n", "lr can't be 'fast'"),
        "list": ("- recall\n- elu\n", "must hold settings"),
        "yaml": ("task: [recall\n", "can't be read"),
        "option": ("task: recall\nattn: elu\noption: exp\n", "name=value"),
    }[case]
    (tmp_path / "run.yaml").write_text(text)
    code, _, err = call("run", "--config", "run.yaml")
    assert (code, err.count("\n")) == (2, 1)
    assert words in err
    assert not trained(tmp_path)


def test_a_configuration_can_not_allow_itself_code(call, tmp_path):
    (tmp_path / "mine.py").write_text("open('imported', 'w').close()\n" + CAUSAL)
    (tmp_path / "run.yaml").write_text("task: recall\nattn: mine.py:OnlyForward\nallow_code: true\n")
    code, _, err = call("run", "--config", "run.yaml", "--dry-run")
    assert code == 2
    assert "--allow-code" in err
    assert not (tmp_path / "imported").exists()


def test_debug_shows_the_trace(call):
    from hhbench.errors import UsageError

    with pytest.raises(UsageError):
        call("run", "--task", "gleu", "--attn", "elu", "--debug")


def test_a_process_ends_with_the_code_and_the_line():
    """What the tests above see in one process is what a shell sees."""
    done = process("run", "--task", "gleu", "--attn", "elu")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert "Did you mean 'glue'?" in done.stderr
    done = process("run", "--task", "gleu", "--attn", "elu", "--debug")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "Did you mean 'glue'?" in done.stderr


def test_an_unforeseen_error_is_one_line(call, monkeypatch):
    def broken(args):
        raise KeyError("x\ny")

    monkeypatch.setattr(doctor, "call", broken)
    code, _, err = call("doctor")
    assert (code, err.count("\n")) == (1, 1)
    assert "--debug" in err


# --- list, show, data, doctor ---


@pytest.mark.parametrize(
    ("what", "names"),
    [
        ("attentions", ["softmax", "hedgehog", "t2r", "elu"]),
        ("tasks", ["glue", "imagenet", "lm", "recall", "summarization"]),
        ("datasets", ["movie-reviews", "snli", "cola", "mnli", "wikipedia", "wikitext103", "digits", "cifar10",
                      "imagenet-1k", "ar", "mqar"]),
        ("models", ["minilm", "smollm2", "dinov2"]),
        ("presets", ["mini", "paper", "minilm", "bert-base-uncased"]),
        ("recipes", ["hedgehog", "t2r", "t2r-hh", "no-transfer", "transfer-only", "untrained"]),
    ],
)  # fmt: skip
def test_list(call, tmp_path, what, names):
    code, out, _ = call("list", what)
    assert code == 0
    words = out.split()
    assert all(any(name in word for word in words) for name in names)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("hedgehog", ["Zhang et al. 2024, ", "activation=softmax", "causal", "recipe: hedgehog, attention transfer"]),
        ("softmax", ["bidirectional"]),
        ("glue", ["movie-reviews", "mnli", "finetuned-conversion", "(paper, "]),
        ("recall", ["causal", "mqar"]),
        ("t2r-hh", ["transfer"]),
    ],
)
def test_show(call, tmp_path, name, words):
    code, out, _ = call("show", name)
    assert code == 0
    assert all(word in out for word in words)
    assert not (tmp_path / "runs").exists()


def test_show_a_users_file(call, tmp_path, monkeypatch):
    from hhbench.attention import ATTENTIONS

    monkeypatch.setattr(ATTENTIONS, "_specs", dict(ATTENTIONS._specs))
    (tmp_path / "mine.py").write_text(CAUSAL)
    code, out, _ = call("show", f"{tmp_path}/mine.py:OnlyForward")
    assert code == 0
    assert "OnlyForward: OnlyForward, a FeatureMap (causal)" in out


def test_data_list_and_verify(call, tmp_path):
    code, out, _ = call("data", "list")
    assert code == 0
    assert all(file.name in out for file in (MINILM, MOVIE_REVIEWS, SNLI))
    assert "missing" in out
    assert "ready" not in out
    code, out, _ = call("data", "list", "snli")
    assert "snli" in out
    assert "wikipedia" not in out
    assert call("data", "verify")[0] == 0  # nothing is damaged
    (tmp_path / "cache" / "packages").mkdir(parents=True)
    (tmp_path / "cache" / "packages" / SNLI.filename).write_bytes(b"half")
    code, out, err = call("data", "verify")
    assert (code, err) == (1, "hhbench: damaged: snli. Fetch again: hhbench data fetch snli\n")
    assert "corrupt" in out


def test_data_fetch_of_what_needs_no_fetching(call):
    code, _, err = call("data", "fetch", "recall")
    assert (code, err) == (0, "")


def test_doctor(call, tmp_path):
    code, out, _ = call("doctor")
    assert code == 0
    for word in (
        "python",
        "torch",
        "lightning",
        "transformers",
        "timm",
        "pip",
        "cache",
        str(tmp_path / "cache"),
        "off",
    ):
        assert word in out


# --- runs ---


def test_a_dry_run_trains_and_downloads_nothing(call, tmp_path):
    code, out, err = call("run", "--task", "glue,lm,imagenet,recall", "--attn", "all", "--dry-run")
    assert (code, out, err) == (0, "", "")
    assert not list(tmp_path.iterdir())


def test_a_dry_run_says_what_it_would_do(call, caplog):
    call("run", "--task", "glue", "--attn", "hedgehog,elu", "--tune", "lr=1e-3,3e-3", "--dry-run")
    said = caplog.text
    assert "glue / movie-reviews with hedgehog (mini, finetuned-conversion, recipe hedgehog, seed 0)" in said
    assert "glue / snli with elu (mini, finetuned-conversion, recipe no-transfer, seed 0)" in said
    assert "best of [0.001, 0.003]" in said
    assert "4 runs planned, nothing done" in said


def test_a_run_prints_the_table_and_the_path(call, tmp_path):
    code, out, _ = call(*AR, "--attn", "elu,softmax")
    assert code == 0
    table, *paths = out.rstrip().split("\nresult: ")
    assert "### recall / ar (mini, scratch)" in table
    assert table.count("### ") == 1
    assert "| elu " in table
    assert "| softmax " in table
    assert sorted(path.strip() for path in paths) == [
        str(path.relative_to(tmp_path)) for path in results(tmp_path / "runs")
    ]
    code, again, _ = call(*AR, "--attn", "elu,softmax")
    assert (code, again) == (0, out)


def test_flags_override_the_configuration(call, tmp_path):
    settings = {"task": "recall", "dataset": "ar", "attn": "hedgehog", "option": {"activation": "exp"}, "seed": 5}
    tiny = dict(zip((flag[2:] for flag in TINY[::2]), TINY[1::2], strict=True))
    lines = "\n".join(f"{name}: {json.dumps(value)}" for name, value in (settings | tiny).items())
    (tmp_path / "run.yaml").write_text(lines)
    code, out, err = call("run", "--config", "run.yaml", "--seed", "2", "--out", "elsewhere")
    assert (code, err) == (0, "")
    assert "hedgehog[activation=exp]" in out
    (path,) = results(tmp_path / "elsewhere")
    config = json.loads(path.read_text())["config"]
    assert (config["seed"], config["option"], config["batch_size"]) == (2, {"activation": "exp"}, 32)


def test_a_result_is_run_again_from_its_file(call, made, tmp_path):
    path = results(made)[0]
    assert call("run", "--config", path, "--out", "again", "--accelerator", "cpu")[0] == 0
    (again,) = results(tmp_path / "again")
    one, two = (json.loads(file.read_text()) for file in (path, again))
    assert (one["key"], one["score"], one["metrics"]) == (two["key"], two["score"], two["metrics"])


def test_a_configuration_may_name_all_attentions(call, tmp_path, caplog):
    (tmp_path / "run.yaml").write_text("task: recall\nattn: all\n")
    code, _, err = call("run", "--config", "run.yaml", "--dry-run")
    assert (code, err) == (0, "")
    assert "with hedgehog" in caplog.text


def test_code_in_a_configuration_runs_when_allowed(call, tmp_path, monkeypatch):
    from hhbench.attention import ATTENTIONS

    monkeypatch.setattr(ATTENTIONS, "_specs", dict(ATTENTIONS._specs))
    (tmp_path / "mine.py").write_text(CAUSAL)
    (tmp_path / "run.yaml").write_text(f"task: recall\nattn: {tmp_path}/mine.py:OnlyForward\n")
    assert call("run", "--config", "run.yaml", "--allow-code", "--dry-run")[0] == 0


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A folder with the results of three runs."""
    folder = tmp_path_factory.mktemp("made")
    for attn, seed in [("elu", "0"), ("elu", "1"), ("softmax", "0")]:
        assert main([*AR, "--attn", attn, "--seed", seed, "--out", str(folder)]) == 0
    return folder


def test_leaderboard(call, made):
    code, out, err = call("leaderboard", made)
    assert (code, err) == (0, "")
    assert "### recall / ar (mini, scratch)" in out
    assert "(n=2)" in out
    code, out, _ = call("leaderboard", made, "--format", "csv")
    rows = list(csv.DictReader(io.StringIO(out)))
    assert code == 0
    assert sorted(row["attention"] for row in rows) == ["elu", "softmax"]
    code, _, err = call("leaderboard", made, "--format", "cvs")
    assert (code, err.count("\n")) == (2, 1)
    assert "Did you mean 'csv'?" in err


def test_leaderboard_skips_what_it_can_not_read(call, made):
    whole = results(made)[0].read_text()
    (made / "cut").mkdir()
    (made / "cut" / "result.json").write_text(whole[: len(whole) // 2])
    (made / "other.result.json").write_text(json.dumps(json.loads(whole) | {"schema": 99}))
    try:
        code, out, err = call("leaderboard", made)
    finally:
        (made / "cut" / "result.json").unlink()
        (made / "other.result.json").unlink()
    assert code == 0
    assert "| elu " in out
    cut, other = sorted(err.splitlines())
    assert f"skipped {made}/cut/result.json: not whole JSON" in cut
    assert f"skipped {made}/other.result.json: its schema is 99" in other


def test_leaderboard_without_results(call, tmp_path):
    code, _, err = call("leaderboard")
    assert (code, err.count("\n")) == (1, 1)
    assert "runs" in err
    (tmp_path / "runs").mkdir()
    code, _, err = call("leaderboard")
    assert (code, err.count("\n")) == (1, 1)
    assert "hhbench run" in err


def test_show_results(call, made):
    elu, other, softmax = (json.loads(path.read_text()) for path in results(made))
    code, out, _ = call("show", elu["key"][:8], "--out", made)
    assert code == 0
    assert json.loads(out) == elu
    assert json.loads(call("show", results(made)[0].parent)[1]) == elu
    code, out, _ = call("show", elu["key"][:8], other["key"][:8], "--out", made)
    assert code == 0
    rows = [line.split() for line in out.splitlines()[1:]]
    assert rows == [["settings.seed", "0", "1"]]
    assert "attention.name" in call("show", elu["key"], softmax["key"], "--out", made)[1]
    assert call("show", elu["key"], elu["key"], "--out", made)[1] == "the same key\n"
    code, _, err = call("show", elu["key"], "zzzz", "--out", made)
    assert (code, err.count("\n")) == (2, 1)


# --- Ctrl-C ---


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_an_interrupted_run_is_resumed(tmp_path):
    """Ctrl-C once training began: exit code 130, a line that says how to go on, and going on ends the run."""
    command = [
        sys.executable, "-m", "hhbench", "run", "--task", "recall", "--dataset", "ar", "--attn", "elu", *TINY,
        "--train-examples", "4096", "--epochs", "15",
    ]  # fmt: skip
    # A shell that starts the tests in its background has them, and what they start, ignore Ctrl-C.
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=heed
    ) as running:
        deadline = time.monotonic() + 300
        while not list(tmp_path.rglob("metrics.csv")) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=300)
    assert running.returncode == 130, err
    assert out == ""
    assert "Traceback" not in err
    assert [line for line in err.splitlines() if "interrupted" in line] == [
        "hhbench: interrupted. What is done is kept: run the same command with --resume to go on."
    ]
    assert not results(tmp_path)
    assert len(list(tmp_path.rglob("step-*.ckpt"))) == 1
    done = process(*command[3:], "--resume")
    assert done.returncode == 0, done.stderr
    assert "continuing train from" in done.stderr
    assert "result: " in done.stdout
    assert len(results(tmp_path)) == 1
    assert not list(tmp_path.rglob("*.ckpt"))
