"""More than one device: start one process for each, and join them."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from hhbench.config import RunConfig
from hhbench.errors import HHBenchError

if TYPE_CHECKING:
    from hhbench.result import Result


def launched_world() -> int:
    """How many processes a launcher (torchrun, Slurm) started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE") or os.environ.get("SLURM_NTASKS") or 1)


def connect(config: RunConfig) -> None:
    """Join the processes that torchrun started, before anything asks for its rank."""
    import torch

    if "TORCHELASTIC_RUN_ID" not in os.environ or torch.distributed.is_initialized():
        return
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    torch.distributed.init_process_group("gloo" if on_cpu else "nccl")


def on_all_devices(config: RunConfig) -> "tuple[Result, Path]":
    """Run a config under torchrun on this machine, and read the result that rank 0 wrote.

    Raises:
        HHBenchError: a process failed; what it said stands above.
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
        code = subprocess.run(command, env=environment, check=False).returncode
        if code or not told.exists():
            raise HHBenchError(f"a process of {config.devices} failed (exit code {code}); its message stands above")
        path = Path(told.read_text())
        return result.load(path), path
