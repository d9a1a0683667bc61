"""The processes of one run: who started them, which one this is, and what they agree on.

torchrun and Slurm start processes; hhbench joins them before anything asks for its rank. Nothing here is heavy until
processes are joined.
"""

import contextlib
import os
import re
import socket
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

from hhbench.config import RunConfig
from hhbench.errors import HHBenchError, UsageError

if TYPE_CHECKING:
    import torch

SECONDS_TO_ANSWER = 60  # of Slurm's commands
SECONDS_TO_MEET = 120  # of ranks that start at different times; a peer that never comes is an error then


@dataclass(frozen=True)
class Launch:
    """How this process was started.

    Attributes:
        by: the launcher; None without one.
        world: how many processes it started.
        rank, local_rank: which one this is, of all and on its machine.
        nodes: on how many machines they are; None if it doesn't say.
    """

    by: Literal["torchrun", "Slurm"] | None
    world: int
    rank: int
    local_rank: int
    nodes: int | None = None

    @property
    def alone(self) -> bool:
        """Whether a process for each device is still to be started. `srun --pty bash` starts one, too: a shell."""
        return self.by != "torchrun" and self.world == 1


def launched() -> Launch:
    """What the environment says. The body of a batch script is one process, however many tasks its job has: only
    srun starts a process for each.
    """
    env = os.environ
    if "TORCHELASTIC_RUN_ID" in env:
        world, here = int(env["WORLD_SIZE"]), int(env.get("LOCAL_WORLD_SIZE", 0))
        nodes = world // here if here else None
        return Launch("torchrun", world, int(env["RANK"]), int(env["LOCAL_RANK"]), nodes)
    if "SLURM_STEP_NUM_TASKS" in env and "SLURM_PROCID" in env:
        nodes = int(env["SLURM_STEP_NUM_NODES"]) if "SLURM_STEP_NUM_NODES" in env else None
        world = int(env["SLURM_STEP_NUM_TASKS"])
        return Launch("Slurm", world, int(env["SLURM_PROCID"]), int(env["SLURM_LOCALID"]), nodes)
    return Launch(None, 1, 0, 0)


def check_world(config: RunConfig, launch: Launch) -> None:
    """Refuse several machines without a launcher, and a world of another size than the launcher's, with both numbers,
    before anyone waits for anyone.
    """
    if launch.by is None and config.num_nodes > 1:
        raise UsageError("--num-nodes needs a launcher: torchrun on each machine, srun, or hhbench submit")
    if launch.alone and config.num_nodes == 1:
        return
    world = config.devices * config.num_nodes
    if launch.world != world:
        raise UsageError(
            f"{launch.by} started {launch.world} process{'es' * (launch.world != 1)}; "
            f"--devices {config.devices} x --num-nodes {config.num_nodes} is {world}"
        )
    if launch.nodes not in (None, config.num_nodes):
        raise UsageError(
            f"{launch.by} started {launch.world} processes on {launch.nodes} machine{'s' * (launch.nodes != 1)}, "
            f"not on {config.num_nodes}"
        )


def connect(config: RunConfig) -> None:
    """Join the processes that torchrun or Slurm started, before anything asks for its rank.

    Raises:
        UsageError: the launcher started another number of processes than the config asks for.
        HHBenchError: the first machine's name doesn't resolve, or the others didn't come within two minutes.
    """
    import torch

    launch = launched()
    check_world(config, launch)
    if launch.world == 1 or torch.distributed.is_initialized():
        return
    host, port = _meeting_place(launch)
    try:
        socket.getaddrinfo(host, port)
    except OSError as error:
        raise HHBenchError(
            f"the first machine's name {host!r} doesn't resolve here: set MASTER_ADDR to its address"
        ) from error
    os.environ.update({"MASTER_ADDR": host, "MASTER_PORT": str(port)})
    on_cpu = config.accelerator == "cpu" or not torch.cuda.is_available()
    if not on_cpu:
        torch.cuda.set_device(launch.local_rank)
    backend = "gloo" if on_cpu else "nccl"
    if launch.by == "torchrun":  # its agent holds the store, and knows its processes
        torch.distributed.init_process_group(backend)
        return
    distributed: Any = torch.distributed
    try:
        store = distributed.TCPStore(
            host, port, launch.world, is_master=launch.rank == 0, timeout=timedelta(seconds=SECONDS_TO_MEET)
        )
        distributed.init_process_group(backend, store=store, rank=launch.rank, world_size=launch.world)
    except (RuntimeError, ValueError) as error:  # torch's DistError is a RuntimeError
        raise HHBenchError(
            f"rank {launch.rank} of {launch.world} could not meet the others at {host}:{port} within "
            f"{SECONDS_TO_MEET} s: {str(error).splitlines()[0]}"
        ) from error


def _meeting_place(launch: Launch) -> tuple[str, int]:
    env = os.environ
    if launch.by == "torchrun":
        return env["MASTER_ADDR"], int(env["MASTER_PORT"])
    host = env.get("MASTER_ADDR") or first_host(env.get("SLURM_STEP_NODELIST") or env["SLURM_JOB_NODELIST"])
    # Jobs that share a machine must not share a port: job ids differ, and so do the steps of one.
    number = int(env["SLURM_JOB_ID"]) * 7 + int(env.get("SLURM_STEP_ID") or 0)
    return host, int(env.get("MASTER_PORT") or 20_000 + number % 20_000)


def first_host(nodes: str) -> str:
    """The first machine of a list as Slurm writes it: `gpu[03-07,9],login` is gpu03."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", nodes)
    assert first is not None  # an empty match is one too
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", first[0])


def requeue() -> bool:
    """Have Slurm start this job again, from rank 0, unless it is ending it; whether it will. The others wait until it
    is asked for: a step whose tasks leave early would be ended before that.
    """
    if launched().by != "Slurm":
        return False
    return bool(summed_over_ranks(float(rank() == 0 and requeue_this_job())))


def requeue_this_job() -> bool:
    """`requeue`, without the other ranks."""
    # A container may have none of Slurm's commands; Slurm may not answer, or not requeue this job.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return _requeued(os.environ["SLURM_JOB_ID"])
    return False


def _requeued(number: str) -> bool:
    # SQUEUE_STATES and the like are a user's, and may hide a job.
    variables = {name: value for name, value in os.environ.items() if not name.startswith("SQUEUE_")}

    def slurm(*command: str) -> str:
        return subprocess.run(
            command, env=variables, capture_output=True, text=True, check=True, timeout=SECONDS_TO_ANSWER
        ).stdout

    # An array's last task has the number of the whole array: it is requeued by its index.
    for line in slurm("squeue", "-h", "-a", "-r", "-j", number, "-o", "%A %T %F_%K").splitlines():
        job, state, task = line.split()
        # What is cancelled, or out of time, is no longer running in Slurm's books when its signal comes.
        if job == number and state == "RUNNING":
            slurm("scontrol", "requeue", job if task.endswith("_N/A") else task)
            return True
    return False


@contextlib.contextmanager
def one_line_for_lost_ranks() -> Iterator[None]:
    """What the survivors of a dead rank see is a broken connection, whose words tell a user nothing."""
    try:
        yield
    except RuntimeError as error:
        signs = ("gloo", "closed by peer", "reset by peer", "NCCL")
        if world_size() == 1 or not any(sign in str(error) for sign in signs):
            raise
        raise HHBenchError(f"rank {rank()} lost the others: what ended the first of them is in its output") from error


# ---- what ranks agree on ---------------------------------------------------------------------------------------


def world_size() -> int:
    import torch

    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    import torch

    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    import torch

    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def summed_over_ranks(value: float, device: "torch.device | None" = None) -> float:
    """The sum of a number over all ranks, in float64 where the device has it.

    Args:
        device: that the ranks talk over; found out if left out.
    """
    return _reduced(value, "SUM", device)


def largest_over_ranks(value: float, device: "torch.device | None" = None) -> float:
    """The largest of the ranks' numbers. See `summed_over_ranks`."""
    return _reduced(value, "MAX", device)


def _reduced(value: float, how: Literal["SUM", "MAX"], device: "torch.device | None") -> float:
    if world_size() == 1:
        return value
    import torch

    device = device or _device()
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(value, dtype=dtype, device=device)
    torch.distributed.all_reduce(total, op=getattr(torch.distributed.ReduceOp, how))
    return float(total)


def gathered(value: Any) -> list[Any]:
    """Each rank's plain value, by rank, on every one."""
    if world_size() == 1:
        return [value]
    import torch

    found: list[Any] = [None] * world_size()
    torch.distributed.all_gather_object(found, value)
    return found


def from_rank_zero(value: Any) -> Any:
    """Rank 0's plain value, on every rank."""
    return gathered(value)[0]


def _device() -> "torch.device":
    import torch

    nccl = torch.distributed.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if nccl else torch.device("cpu")
