"""What a signal comes to where no step ends."""

import os
import signal
import time
from pathlib import Path

import pytest
from stand import make_config

from hhbench import stopping

SQUEUE = "#!/bin/sh\necho 7 ${STATE:-RUNNING} 7_N/A\n"
SCONTROL = '#!/bin/sh\necho "$@" >> "$ASKED"\n'


@pytest.fixture
def asked(tmp_path, monkeypatch) -> Path:
    """What scontrol is asked for, in a job of Slurm's."""
    for name, text in (("squeue", SQUEUE), ("scontrol", SCONTROL)):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("ASKED", str(tmp_path / "asked"))
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    for name, value in {"STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    return tmp_path / "asked"


def wait_for(path: Path, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while not (path.exists() and path.stat().st_size) and time.monotonic() < deadline:
        time.sleep(0.02)
    return path.exists()


def test_where_no_step_ends_in_time_slurm_is_asked_all_the_same(asked, monkeypatch):
    """A long validation, a test, a fetch."""
    monkeypatch.setenv(stopping.NOTICE, "0.4")
    with stopping.heeding():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert wait_for(asked, 20)
    assert asked.read_text() == "requeue 7\n"


@pytest.mark.parametrize("ends", ["a step ends", "the run ends", "another rank"])
def test_slurm_is_asked_once_at_most(ends, asked, monkeypatch):
    monkeypatch.setenv(stopping.NOTICE, "1")
    if ends == "another rank":
        monkeypatch.setenv("SLURM_PROCID", "1")
    with stopping.heeding():
        os.kill(os.getpid(), signal.SIGUSR1)
        if ends == "a step ends":
            with pytest.raises(stopping.Stopped, match="Slurm starts it again"):
                stopping.stop(stopping.noted(), "after step 3")
        elif ends == "another rank":
            time.sleep(1)
    time.sleep(1)
    assert (asked.read_text() if asked.exists() else "") == ("requeue 7\n" if ends == "a step ends" else "")


def test_a_signal_before_processes_start_is_not_lost(tmp_path):
    from hhbench.cluster import on_all_devices

    with stopping.heeding():
        os.kill(os.getpid(), signal.SIGTERM)
        with pytest.raises(stopping.Stopped, match="before its processes started"):
            on_all_devices(make_config(devices=2, out=tmp_path))
