"""More than one device on this machine: torchrun starts a process for each, and this one waits for them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hhbench import stopping
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError

if TYPE_CHECKING:
    from hhbench.result import Result

SECONDS_BETWEEN_LOOKS = 0.2
SECONDS_TO_STOP = 30.0  # torchrun's own patience


def on_all_devices(config: RunConfig) -> "tuple[Result, Path]":
    """Run a config under torchrun on this machine, and read the result that rank 0 wrote.

    Raises:
        HHBenchError: a process failed; what it said stands above.
        Stopped: a signal came, and the processes kept a checkpoint.
    """
    from hhbench import result

    if config.num_nodes > 1:
        raise HHBenchError("more than one node needs a launcher: torchrun on each node, or srun")
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        settings, told = Path(folder) / "run.yaml", Path(folder) / "result-path"
        settings.write_text(yaml.safe_dump({k: v for k, v in config.as_dict().items() if v not in (None, [], {})}))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={config.devices}",
        ]
        command += ["-m", "hhbench", "run", "--config", str(settings), "--allow-code"]
        environment = os.environ | {"HHBENCH_RESULT_PATH": str(told)}
        environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // config.devices)))
        code = _wait(subprocess.Popen(command, env=environment))
        stopping.stop(stopping.noted(), "with all its processes")
        if code or not told.exists():
            raise HHBenchError(f"a process of {config.devices} failed (exit code {code}); its message stands above")
        path = Path(told.read_text())
        return result.load(path), path


def _wait(launcher: "subprocess.Popen[bytes]") -> int:
    """The launcher's exit code. What this process is told, its processes are told: torchrun passes SIGTERM on to them,
    and they keep a checkpoint.
    """
    passed_on = False
    while True:
        try:
            return launcher.wait(SECONDS_BETWEEN_LOOKS)
        except subprocess.TimeoutExpired:
            if stopping.noted() and not passed_on:
                launcher.terminate()
                passed_on = True
        except BaseException:  # Ctrl-C reaches the whole group: they end by themselves
            try:
                launcher.wait(SECONDS_TO_STOP)
            except subprocess.TimeoutExpired:
                launcher.kill()
            raise
