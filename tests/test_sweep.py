"""Sweeps as a user starts them: real processes, on the cheapest task."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hhbench import result
from hhbench.cli import main
from hhbench.errors import UsageError
from hhbench.grid import product
from hhbench.sweep import Agenda, duration, sweep

TINY = [
    "--task", "recall", "--dataset", "ar", "--model", "gpt2-1x16x2", "--max-len", "16", "--train-examples", "64",
    "--test-examples", "16", "--epochs", "1", "--teacher-epochs", "1", "--transfer-epochs", "1",
    "--accelerator", "cpu", "--logger", "none",
]  # fmt: skip
ATTENTION = "import time\nfrom pathlib import Path\nfrom hhbench.attention import FeatureMap\n"
FAILS = (
    ATTENTION
    + """class Fails(FeatureMap):
    def forward(self, x):
        if x.requires_grad:
            raise RuntimeError("it fails\\nwhile it trains")
        return x.exp()
"""
)
# Takes its time over each step, so that whoever ends it ends it in the middle, until there is no need to.
SLOW = (
    ATTENTION
    + """class Slow(FeatureMap):
    def forward(self, x):
        if x.requires_grad and not Path("hurry").exists():
            time.sleep(0.3)
        return x.exp()
"""
)


@pytest.fixture(autouse=True)
def _alone(offline_folder):
    (offline_folder / "fails.py").write_text(FAILS)
    (offline_folder / "slow.py").write_text(SLOW)


@pytest.fixture
def call(capsys, caplog):
    """Run a sweep from this process: its exit code, output, and what it logged and said besides."""

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        caplog.clear()
        code = main(["sweep", *TINY, *arguments])
        out, err = capsys.readouterr()
        return code, out, "\n".join([*caplog.messages, err])

    return call


def start(*arguments: str) -> "subprocess.Popen[str]":
    """A sweep as a process of its own."""
    command = [sys.executable, "-m", "hhbench", "sweep", *TINY, *arguments]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(happened, process, seconds=240):
    end = time.monotonic() + seconds
    while not happened():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def under_way() -> bool:
    """Whether the slow one trains, and has a checkpoint."""
    return any(Path("runs/recall/ar").glob("*[sS]low*/*/step-*.ckpt"))


def children(pid: int) -> list[int]:
    """The runs that a sweep has started and that still live."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def results() -> dict[Path, int]:
    """Result files, each with when it was written."""
    return {path: path.stat().st_mtime_ns for path in Path("runs").rglob("result.json")}


def started(errors: str) -> list[str]:
    return [line.split("started ")[1].split(";")[0] for line in errors.splitlines() if "] started " in line]


# --- what is done, and what fails ---


def test_the_rest_of_a_grid_goes_on_when_a_run_fails(call, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    code, out, err = call("--attn", "fails.py:Fails,elu", "--parallel", "2")
    assert code == 1
    assert started(err) == ["recall/ar fails.py:Fails s0", "recall/ar elu s0"]
    assert "1 of 2 failed:\n  recall/ar fails.py:Fails s0: RuntimeError: it fails while it trains\n" in out
    (log,) = (line.split("log: ")[1] for line in out.splitlines() if "log: " in line)
    assert "RuntimeError: it fails" in Path(log).read_text()
    assert "\n| elu " in out
    before = results()
    (done,) = result.find(Path("runs"))[0]
    assert done.environment["threads"] == 1  # they share the two
    # Again: what is done is not repeated, what failed is tried again. What is done says how long the rest may take.
    code, out, err = call("--attn", "fails.py:Fails,elu,t2r", "--seeds", "0:2", "--dry-run")
    assert code == 0
    assert "6 runs: 1 done already, 5 to do" in out
    assert "by earlier results of the same tasks" in out
    assert "unknown" not in out
    assert not started(err)
    assert results() == before


def test_a_run_whose_data_can_not_be_had_fails_by_itself(call):
    """Offline, with nothing cached: what needs a file fails before anything starts, for that file alone."""
    code, out, err = call("--task", "recall,glue", "--dataset", "ar,movie-reviews,snli", "--attn", "elu")
    assert code == 1
    assert "2 of 3 failed" in out
    assert out.count("is missing in") == 2
    assert started(err) == ["recall/ar elu s0"]


@pytest.mark.slow
def test_a_shared_teacher_is_trained_first_and_its_failure_stops_only_those_that_need_it(call):
    code, out, err = call(
        "--regime", "finetuned-conversion", "--attn", "elu,relu", "--grid", "batch_size=16,4096", "--parallel", "2"
    )
    assert code == 1
    order = started(err)
    assert all(title.startswith("recall/ar teacher ") for title in order[:2])
    assert sorted(order[2:]) == [f"recall/ar {name} (no-transfer) batch_size=16 s0" for name in ("elu", "relu")]
    assert "3 of 6 failed" in out
    assert out.count("its teacher failed: ar gives 64 training examples, fewer than one batch of 4096") == 2
    assert {one.identity["settings"]["batch_size"] for one in result.find(Path("runs"))[0]} == {16}
    assert len(list(Path("runs/teachers").glob("*/model"))) == 1


@pytest.mark.slow
def test_a_terminal_gets_a_live_table(call, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, _, err = call("--attn", "elu")
    assert code == 0
    assert "1 running, 0 waiting" in err
    assert "done recall/ar elu s0: accuracy" in err
    assert not started(err)


def test_a_dry_run_shows_the_plan_and_does_nothing(call):
    code, out, err = call("--attn", "all", "--seeds", "0:2", "--dry-run")
    assert code == 0
    assert "estimated time: unknown" in out
    assert "recall/ar hedgehog s1" in out
    assert "dry run: nothing done" in err
    assert not Path("runs").exists()


@pytest.mark.slow
def test_the_library_gives_runs_and_results():
    settings = dict(zip((flag[2:] for flag in TINY[::2]), TINY[1::2], strict=True))
    seen = []
    outcome = sweep(product(settings | {"attn": ["elu"]}).trials, watch=lambda runs, changed: seen.extend(changed))
    (run,) = outcome.runs
    assert (run.state, outcome.failures, outcome.stopped) == ("done", [], [])
    assert [one.attention["name"] for one in outcome.results] == ["elu"]
    assert run in seen
    again = sweep(product(settings | {"attn": ["elu"]}).trials)
    assert again.runs == ()
    assert [one.key for one in again.results] == [one.key for one in outcome.results]


# --- ended and started again ---


@pytest.mark.parametrize("with_its_runs", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_sweep_that_is_killed_leaves_nothing_running_and_goes_on_when_it_is_started_again(call, with_its_runs):
    grid = ("--attn", "elu,slow.py:Slow", "--epochs", "12", "--checkpoint-minutes", "0", "--parallel", "2")
    first = start(*grid)
    running: list[int] = []

    def one_is_left() -> bool:
        running[:] = children(first.pid)
        return bool(results() and under_way() and len(running) == 1)

    until(one_is_left, first)
    before = results()
    assert len(before) == 1
    (run,) = running
    first.kill()
    if with_its_runs:  # as when the machine dies
        os.kill(run, signal.SIGKILL)
    first.communicate()
    end = time.monotonic() + 120
    while alive(run):
        assert time.monotonic() < end, "the run outlived its sweep"
        time.sleep(0.05)
    assert results() == before
    Path("hurry").touch()
    code, out, err = call(*grid)
    assert code == 0, (out, err)
    assert "2 runs: 1 done already, 1 to do" in out
    assert started(err) == ["recall/ar slow.py:Slow s0"]
    (log,) = Path("runs/sweeps").glob("*Slow*.log")
    assert "continuing train" in log.read_text()
    assert ("stopped by a signal" in log.read_text()) is not with_its_runs
    after = results()
    assert len(after) == 2
    assert before.items() <= after.items()


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_signal_is_passed_on_and_the_sweep_ends_after_its_runs(number, code, call):
    grid = ("--attn", "slow.py:Slow,relu", "--epochs", "12", "--checkpoint-minutes", "0")
    first = start(*grid)
    until(under_way, first)
    (run,) = children(first.pid)
    first.send_signal(number)
    _, err = first.communicate(timeout=240)
    assert not alive(run)
    assert first.returncode == code, err
    assert "stopped recall/ar slow.py:Slow s0" in err
    assert started(err) == ["recall/ar slow.py:Slow s0"]
    assert not results()
    Path("hurry").touch()
    code, out, err = call(*grid)
    assert code == 0, (out, err)
    assert len(results()) == 2
    (log,) = Path("runs/sweeps").glob("*Slow*.log")
    assert "stopped by a signal" in log.read_text()
    assert "continuing train" in log.read_text()


@pytest.mark.slow
def test_two_sweeps_of_one_folder_share_the_work():
    grid = ("--attn", "elu,relu")
    sweeps = [start(*grid), start(*grid)]
    said = [process.communicate(timeout=400) for process in sweeps]
    assert [process.returncode for process in sweeps] == [0, 0], said
    assert sorted(name for _, err in said for name in started(err)) == ["recall/ar elu s0", "recall/ar relu s0"]
    assert len(results()) == 2
    for out, _ in said:
        assert out.count("(n=1)") == 2
    assert not list(Path("runs").rglob("*.tmp"))


# --- what a sweep refuses, and how it words things ---


@pytest.mark.parametrize(
    ("change", "parallel", "message"),
    [({}, 0, "--parallel must be at least 1"), ({"num_nodes": 2}, None, "hhbench submit")],
)
def test_what_one_machine_cannot_do_is_refused(change, parallel, message):
    trials = product({"task": "recall", "dataset": "ar", "attn": "elu"} | change).trials
    with pytest.raises(UsageError, match=message):
        Agenda.of(trials, parallel)


def test_a_sweep_that_slurm_started_many_times_is_refused(monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "0")
    monkeypatch.setenv("SLURM_LOCALID", "0")
    with pytest.raises(UsageError, match="a sweep is one process, and Slurm started 2"):
        Agenda.of(product({"task": "recall", "dataset": "ar", "attn": "elu"}).trials)


@pytest.mark.parametrize(
    ("seconds", "text"), [(0.2, "under 1 s"), (45, "45 s"), (720, "12 min"), (12_000, "3 h 20 min")]
)
def test_durations_are_for_people(seconds, text):
    assert duration(seconds) == text
