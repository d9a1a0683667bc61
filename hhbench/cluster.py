"""More than one device on this machine: torchrun's agent starts a process for each, and this one waits for them."""

import contextlib
import logging
import math
import os
import signal
import sys
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from hhbench import stopping
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError
from hhbench.result import TOLD


def on_all_devices(config: RunConfig, *flags: str) -> list[Path]:
    """`hhbench run` of a config in a process for each device of this machine, and the paths that rank 0 told of.

    Args:
        flags: further ones of the command.

    Raises:
        HHBenchError: a process failed; what it said stands above.
        Stopped: a signal came, and the processes kept a checkpoint.
    """
    config.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=config.out) as folder:
        settings, told = Path(folder) / "run.yaml", Path(folder) / "result-path"
        settings.write_text(config.as_yaml())
        variables = {TOLD: str(told)}
        if "OMP_NUM_THREADS" not in os.environ:
            variables["OMP_NUM_THREADS"] = str(max(1, (os.cpu_count() or 1) // config.devices))
        if "TORCH_ELASTIC_SHUTDOWN_TIMEOUT" not in os.environ:  # of processes that were told to stop; torch says 30
            variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(math.ceil(stopping.patience()))
        command = ["-m", "hhbench", "run", "--config", str(settings), "--allow-code", *flags]
        with _environment(variables), _passing_signals_on() as received:
            if stopping.noted():
                raise stopping.Stopped("stopped by a signal before its processes started", again=False)
            try:
                launch = LaunchConfig(
                    min_nodes=1,
                    max_nodes=1,
                    nproc_per_node=config.devices,
                    run_id=uuid.uuid4().hex,
                    rdzv_backend="c10d",
                    rdzv_endpoint="localhost:0",
                    max_restarts=0,
                )
                elastic_launch(launch, sys.executable)(*command)
            except SignalException as ended:
                received.add(int(ended.sigval))
            except ChildFailedError:
                pass  # it said so itself
        if signal.SIGINT in received:
            raise KeyboardInterrupt
        if received:
            raise stopping.Stopped("stopped by a signal, all processes with it", again=False)
        if not told.exists():
            raise HHBenchError(f"a process of {config.devices} failed: {_reason(told)}")
        return [Path(line) for line in told.read_text().splitlines()]


def _reason(told: Path) -> str:
    with contextlib.suppress(OSError):
        return " ".join(told.with_name(f"{told.name}.failed").read_text().split())
    return "its message stands above"


@contextlib.contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """Variables for the processes that are started inside."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextlib.contextmanager
def _passing_signals_on() -> Iterator[set[int]]:
    """The signals that come inside. The agent passes SIGTERM on to its processes, which keep a checkpoint then; a
    cluster's SIGUSR1 is made one. What the agent says of its processes' ends is left out: they speak for themselves.
    """
    received: set[int] = set()

    def end(number: int, frame: FrameType | None) -> None:
        del frame
        received.add(number)
        os.kill(os.getpid(), signal.SIGTERM)

    def end_early(number: int, frame: FrameType | None) -> None:
        raise SignalException("before the agent's own handler was there", signal.Signals(number))

    numbers = (*stopping.SIGNALS, signal.SIGINT)
    before = {number: signal.getsignal(number) for number in numbers}
    signal.signal(signal.SIGTERM, end_early)
    signal.signal(signal.SIGUSR1, end)
    logging.disable(logging.ERROR)
    try:
        yield received
    finally:
        logging.disable(logging.NOTSET)
        for number, handler in before.items():
            signal.signal(number, handler)
