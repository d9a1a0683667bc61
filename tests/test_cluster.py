"""`hhbench run --devices 2`: real processes, what they are told, and what is said when one fails."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stand import child_environment

TINY = [
    "--task", "recall", "--dataset", "ar", "--model", "gpt2-1x16x2", "--max-len", "16", "--train-examples", "512",
    "--test-examples", "64", "--batch-size", "16", "--accelerator", "cpu", "--devices", "2", "--logger", "csv",
]  # fmt: skip
FAILS = """\
import torch

from hhbench.attention import FeatureMap


class Fails(FeatureMap):
    def forward(self, x):
        if self.training and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1:
            raise RuntimeError("it was bound to happen")
        return x.relu() + 1
"""


def start(*arguments: object) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "hhbench", "run", *TINY, *map(str, arguments)]
    return subprocess.Popen(command, env=child_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(*arguments: object) -> tuple[int, str, str]:
    with start(*arguments) as running:
        out, err = running.communicate(timeout=300)
    return running.returncode, out, err


def at_work(process: Path) -> bool:
    """Whether a process of /proc is there, and no zombie that nobody has asked about."""
    try:
        return process.joinpath("stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for_checkpoint(running: "subprocess.Popen[str]", folder: Path) -> None:
    deadline = time.monotonic() + 200
    while not list(folder.rglob("step-*.ckpt")) and time.monotonic() < deadline:
        assert running.poll() is None, running.communicate()[1]
        time.sleep(0.02)


@pytest.mark.slow  # test_ranks.py has the same of two processes
@pytest.mark.parametrize(
    "number,code,said",
    [
        (signal.SIGUSR1, 75, "hhbench: stopped by a signal, all processes with it"),
        (signal.SIGINT, 130, "run the same command with --resume to go on."),
    ],
    ids=["a cluster", "Ctrl-C"],
)
def test_a_signal_stops_every_process_and_they_go_on(number, code, said, tmp_path):
    arguments = ("--attn", "elu", "--epochs", 10, "--dropout", 0.1, "--checkpoint-minutes", 0.005)
    ended, _, err = finish(*arguments, "--out", tmp_path / "whole")
    assert ended == 0, err
    with start(*arguments, "--out", tmp_path / "cut") as running:
        wait_for_checkpoint(running, tmp_path)
        os.kill(running.pid, number)
        _, err = running.communicate(timeout=120)
    assert running.returncode == code, err
    assert "Traceback" not in err
    assert err.splitlines()[-1].endswith(said)
    assert not list(tmp_path.rglob("cut/**/result.json"))
    ended, _, err = finish(*arguments, "--out", tmp_path / "cut", "--resume")
    assert ended == 0, err
    assert "continuing train from" in err
    scores = [json.loads(path.read_text())["metrics"] for path in sorted(tmp_path.rglob("result.json"))]
    assert len(scores) == 2
    assert scores[0] == scores[1]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="only Linux tells a child that its parent is gone")
def test_processes_whose_agent_is_killed_end_and_let_go_of_the_run(tmp_path):
    arguments = ("--attn", "elu", "--epochs", 10, "--checkpoint-minutes", 0.005, "--out", tmp_path)
    with start(*arguments) as running:
        wait_for_checkpoint(running, tmp_path)
        listed = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text()
        children = [Path("/proc", pid) for pid in listed.split()]
        assert len(children) >= 2
        running.kill()
        deadline = time.monotonic() + 60
        while any(at_work(child) for child in children):
            assert time.monotonic() < deadline, "they hold the run's lock, and their devices"
            time.sleep(0.1)
    code, _, err = finish(*arguments, "--resume")
    assert code == 0, err
    assert "continuing train from" in err


def test_a_process_that_fails_ends_the_others_with_its_message(tmp_path):
    (tmp_path / "mine.py").write_text(FAILS)
    code, out, err = finish("--attn", f"{tmp_path / 'mine.py'}:Fails", "--epochs", 1, "--out", tmp_path / "runs")
    assert code == 1
    assert out == ""
    assert "it was bound to happen" in err
    assert "Traceback" not in err
    said = err.splitlines()[-1]
    assert said.startswith("hhbench: a process of 2 failed: ")
    assert said.endswith("RuntimeError: it was bound to happen")


def test_a_teacher_alone_is_trained_on_all_devices(tmp_path):
    arguments = ("--attn", "hedgehog", "--regime", "finetuned-conversion", "--teacher-epochs", 1, "--teacher-only")
    code, out, err = finish(*arguments, "--out", tmp_path)
    assert code == 0, err
    (folder,) = (tmp_path / "teachers").glob("*/model")
    assert Path(out.removeprefix("teacher: ").strip()) == folder.parent.resolve()
    assert not list(tmp_path.rglob("result.json"))


@pytest.mark.parametrize("flags", [("--batch-size", "15"), ("--strategy", "fsdp", "--devices", "1")])
def test_what_devices_can_not_share_is_refused(flags, tmp_path):
    code, _, err = finish("--attn", "elu", "--out", tmp_path, *flags)
    assert code == 2
    assert "can't be divided over 2 devices" in err or "add --devices 2 or more" in err


def test_several_machines_need_a_launcher(tmp_path):
    code, _, err = finish("--attn", "elu", "--num-nodes", 2, "--out", tmp_path / "runs")
    assert code == 2
    assert err == "hhbench: --num-nodes needs a launcher: torchrun on each machine, srun, or hhbench submit\n"
    assert not list(tmp_path.iterdir())
