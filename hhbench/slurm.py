"""Slurm: what a cluster asks of a job, a script for sbatch, and what Slurm says of jobs under way.

Scripts are plain: a person can read them, change them and sbatch them again. Jobs are found by their names, not by
their numbers, so one that was sent by hand is found as well.
"""

import dataclasses
import getpass
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, get_type_hints

from hhbench.errors import HHBenchError, UsageError, unknown_name
from hhbench.result import TOLD, checked
from hhbench.stopping import NOTICE

RUNNING: Final = {"RUNNING", "COMPLETING", "CONFIGURING", "SIGNALING", "STAGE_OUT", "RESIZING"}
PENDING: Final = {"PENDING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SUSPENDED", "STOPPED", "SPECIAL_EXIT"}
# What a script says by itself: a profile that said it too would undo it.
OWN_OPTIONS: Final = (
    "array", "chdir", "dependency", "error", "export", "job-name", "nodes", "ntasks", "ntasks-per-node", "open-mode",
    "output", "requeue", "no-requeue", "signal", "time", "wait",
)  # fmt: skip


def seconds_of(time: str) -> int:
    """Seconds of a time as Slurm writes it: minutes, minutes:seconds, hours:minutes:seconds, days-hours[:...].

    Raises:
        UsageError: it is none of these, or no time at all.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", time, re.ASCII)
    if not found:
        raise UsageError(f"a time is written as Slurm does, 90 (minutes), 04:00:00 or 1-12:00:00; not {time!r}")
    days, *rest = found.groups()
    parts = [int(part) for part in rest if part is not None]
    if days is None and len(parts) < 3:
        parts.insert(0, 0)  # of minutes, or of minutes and seconds
    hours, minutes, seconds = [*parts, 0, 0][:3]
    total = ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
    if not total:
        raise UsageError(f"a time limit of {time} leaves no time")
    return total


@dataclass(frozen=True, kw_only=True)
class ClusterProfile:
    """What one cluster asks of every job.

    Attributes:
        time: of one start of a trial, as Slurm writes it. A trial that needs longer is started again and goes on.
        signal: how many seconds before the end of that time a trial is told to save; at most half of it if left out.
        throttle: how many trials may run at a time.
        gpus: the type of a GPU for --gpus-per-node, or "any"; left out where there are none.
        gres: the same for clusters that go by --gres: "gpu" or "gpu:a100". The number of devices is appended.
        cpus_per_device: CPU cores, and threads, of each process.
        memory: of a node, as 64G.
        modules: for `module load`.
        environment: variables for every trial.
        setup: lines of shell that run before a trial. They are yours, and run as they stand.
        container: the words before `python`, such as apptainer exec --nv image.sif.
        python: the interpreter; this one if left out, `python` inside a container.
        sbatch, srun: further options, written --name or --name=value.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    reservation: str | None = None
    constraint: str | None = None
    time: str = "04:00:00"
    signal: int | None = None
    throttle: int | None = None
    gpus: str | None = None
    gres: str | None = None
    cpus_per_device: int | None = None
    memory: str | None = None
    modules: list[str] = field(default_factory=list)
    environment: dict[str, str] = field(default_factory=dict)
    setup: list[str] = field(default_factory=list)
    container: list[str] = field(default_factory=list)
    python: str | None = None
    sbatch: list[str] = field(default_factory=list)
    srun: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for name, value in dataclasses.asdict(self).items():
            texts = [*value, *value.values()] if isinstance(value, dict) else value
            for text in texts if isinstance(texts, list) else [texts]:
                if isinstance(text, str) and (not text or re.search(r"[\x00-\x1f\x7f]", text)):
                    raise UsageError(f"{name} can't be {text!r}: it must be one line with something in it")
            if isinstance(value, int) and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}")
        for name in self.environment:
            if not re.fullmatch(r"[A-Za-z_]\w*", name, re.ASCII):
                raise UsageError(f"environment has {name!r}, which is no variable's name")
        for name in ("sbatch", "srun"):
            for option in getattr(self, name):
                found = re.fullmatch(r"--([a-z][a-z0-9-]*)(=.*)?", option)
                if not found:
                    raise UsageError(f"{name} has {option!r}; an option is written --name or --name=value")
                if found[1] in OWN_OPTIONS:
                    raise UsageError(f"{name} has {option!r}, but --{found[1]} is what hhbench sets itself")
        if self.memory and not re.fullmatch(r"\d+[KMGT]?", self.memory, re.ASCII):
            raise UsageError(f"memory is written as 64G, not {self.memory!r}")
        if self.gpus and self.gres:
            raise UsageError("gpus and gres say the same: name one of them")
        if self.signal_seconds >= self.seconds:
            raise UsageError(
                f"the time limit of {self.time} ({self.seconds} s) is over before the signal that comes "
                f"{self.signal_seconds} s ahead of its end: give more time, or a later signal"
            )

    @property
    def seconds(self) -> int:
        """The time limit."""
        return seconds_of(self.time)

    @property
    def signal_seconds(self) -> int:
        return min(120, self.seconds // 2) if self.signal is None else self.signal

    def options(self, *, nodes: int, devices: int, on_gpus: bool) -> list[str]:
        """The options of sbatch that say what a job is given: `nodes` machines with `devices` processes each."""
        gpus = None
        if on_gpus and self.gpus:
            gpus = f"{devices}" if self.gpus == "any" else f"{self.gpus}:{devices}"
        named = {
            "partition": self.partition,
            "account": self.account,
            "qos": self.qos,
            "reservation": self.reservation,
            "constraint": self.constraint,
            "time": self.time,
            "nodes": nodes,
            "ntasks-per-node": devices,
            "cpus-per-task": self.cpus_per_device,
            "gpus-per-node": gpus,
            "gres": f"{self.gres}:{devices}" if on_gpus and self.gres else None,
            "mem": self.memory,
        }
        return [*(f"--{name}={value}" for name, value in named.items() if value is not None), *self.sbatch]


def profile_of(path: Path | None, **given: Any) -> ClusterProfile:
    """The profile that a YAML file holds, with what is given (and not None) over it.

    Raises:
        UsageError: the file can't be read, or a name or a value of it isn't one of a profile.
    """
    values: dict[str, Any] = {}
    if path is not None:
        import yaml

        try:
            values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
        except (OSError, ValueError, yaml.YAMLError) as error:
            raise UsageError(f"--cluster {path} can't be read: {str(error).splitlines()[0]}") from error
        if not isinstance(values, dict):
            raise UsageError(f"--cluster {path} must hold settings, one `name: value` a line")
    where = "" if path is None else f"--cluster {path}: "
    hints = get_type_hints(ClusterProfile)
    try:
        for name in values:
            if name not in hints:
                raise unknown_name("setting", str(name), hints)
        read = {name: _read(name, value, hints[name]) for name, value in values.items() if value is not None}
        ClusterProfile(**read)  # what the file says is wrong is said of the file
    except HHBenchError as error:
        raise UsageError(f"{where}{error}") from error
    return ClusterProfile(**read | {name: value for name, value in given.items() if value is not None})


def _read(name: str, value: Any, hint: Any) -> Any:
    if name == "time" and isinstance(value, int):  # YAML reads 4:00:00 as a number in base 60
        raise UsageError('time must stand in quotes, as "04:00:00"')
    if name == "environment" and isinstance(value, dict):  # a variable that is set to 1 is text too
        value = {
            key: str(v) if isinstance(v, int | float) and not isinstance(v, bool) else v for key, v in value.items()
        }
        if wrong := [key for key in value if not isinstance(key, str)]:
            raise UsageError(f"environment has {wrong[0]!r}, which is no variable's name")
    return checked(value, hint, name)


# ---- the script ------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Array:
    """One job: the same command for many configs, a task of an array for each.

    Attributes:
        name: the job's; how it is found again.
        configs: a folder of NNNN.yaml.
        told: the path of the file in which a task tells where its result is, without its number.
        logs: the path of what a task says, without NNNN.log.
        indices: the configs to run.
        workdir: where trials run, so that the user's relative paths mean what they meant.
        flags: of `hhbench run`, beside --config and --resume.
    """

    name: str
    configs: Path
    told: str
    logs: str
    indices: Sequence[int]
    nodes: int
    devices: int
    on_gpus: bool
    workdir: Path
    flags: Sequence[str] = ()


def script(array: Array, profile: ClusterProfile) -> str:
    """A script for sbatch.

    Raises:
        UsageError: the folder's name can't stand in a script.
    """
    if re.search(r"[\x00-\x1f\x7f\\]", array.logs):
        raise UsageError(f"Slurm can't write into {array.logs!r}: the folder's name has a line break or backslash")
    throttle = f"%{profile.throttle}" if profile.throttle else ""
    options = [
        f"--job-name={array.name}",
        f"--array={ranges(array.indices)}{throttle}",
        *profile.options(nodes=array.nodes, devices=array.devices, on_gpus=array.on_gpus),
        "--requeue",
        f"--signal=USR1@{profile.signal_seconds}",  # to the processes of the trial, not to this script
        "--open-mode=append",
        f"--output={array.logs.replace('%', '%%')}%4a.log",
    ]
    threads = {} if profile.cpus_per_device is None else {"OMP_NUM_THREADS": str(profile.cpus_per_device)}
    run = ["srun", "--kill-on-bad-exit=1", f"--nodes={array.nodes}", f"--ntasks-per-node={array.devices}"]
    if profile.cpus_per_device is not None:
        run.append(f"--cpus-per-task={profile.cpus_per_device}")  # srun doesn't take it over from sbatch
    python = profile.python or ("python" if profile.container else sys.executable)
    run += [*profile.srun, *profile.container, python, "-u", "-m", "hhbench", "run"]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {shlex.quote(option)}" for option in options),
        "# Written by hhbench submit. To start again what isn't done: sbatch this file.",
        f"cd {shlex.quote(str(array.workdir))} || exit",
        *(f"module load {shlex.quote(module)}" for module in profile.modules),
        *(f"export {name}={shlex.quote(value)}" for name, value in (threads | profile.environment).items()),
        *profile.setup,
        'printf -v n %04d "$SLURM_ARRAY_TASK_ID"',
        f'export {TOLD}={shlex.quote(array.told)}"$n"',
        f"export {NOTICE}={profile.signal_seconds}",
        f'rm -f "${TOLD}".failed "${TOLD}".stopped',  # of the start before
        # The script's exit code is that of the trial.
        f"exec {shlex.join(run)} \\",
        f'  --config {shlex.quote(str(array.configs))}/"$n".yaml {shlex.join([*array.flags, "--resume"])}',
    ]
    return "\n".join(lines) + "\n"


def ranges(indices: Sequence[int]) -> str:
    """0, 1, 2, 5 as 0-2,5."""
    parts: list[list[int]] = []
    for index in sorted(indices):
        if parts and index == parts[-1][-1] + 1:
            parts[-1][1:] = [index]
        else:
            parts.append([index])
    return ",".join("-".join(map(str, part)) for part in parts)


# ---- Slurm's commands ------------------------------------------------------------------------------------------


def check(profile: ClusterProfile, *, nodes: int, largest_index: int) -> None:
    """Refuse what this cluster can't run, before anything is sent.

    Raises:
        UsageError: no such partition; one that is too small, too short or down; too many trials for an array.
        HHBenchError: Slurm isn't here, or doesn't answer.
    """
    if shutil.which("sbatch") is None:
        raise UsageError("no sbatch on this machine's PATH: submit where Slurm's commands are, or use --on torchrun")
    shown = [line.split("|") for line in _slurm("sinfo", "-h", "-o", "%R|%l|%D|%a").splitlines()]
    partitions = {name: (limit, int(count), state) for name, limit, count, state in shown}
    for name in profile.partition.split(",") if profile.partition else ():
        if name not in partitions:
            raise unknown_name("partition", name, partitions)
        limit, count, state = partitions[name]
        if state != "up":
            raise UsageError(f"partition {name} is {state}")
        if nodes > count:
            raise UsageError(f"--num-nodes {nodes}: partition {name} has {count}")
        if limit != "infinite" and profile.seconds > seconds_of(limit):
            raise UsageError(f"a time of {profile.time} is longer than partition {name} allows: {limit}")
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _slurm("scontrol", "show", "config"), re.MULTILINE)
    if found and largest_index >= int(found[1]):
        raise UsageError(
            f"{largest_index + 1} trials: this cluster's arrays end at {int(found[1])}; submit fewer at once"
        )


def send(script: Path, *, after: str | None = None, test: bool = False) -> str:
    """Give a script to sbatch, and return the job's number.

    Args:
        after: a job that must have ended before, well or not.
        test: only ask whether it would be taken.

    Raises:
        HHBenchError: sbatch refuses it.
    """
    options = [*(["--test-only"] if test else []), *([f"--dependency=afterany:{after}"] if after else [])]
    return _slurm("sbatch", "--parsable", *options, str(script)).strip().partition(";")[0]


@dataclass(frozen=True)
class Standing:
    """What Slurm says of a task: its state in Slurm's word, and why it waits."""

    job: int
    state: str
    reason: str

    @property
    def alive(self) -> bool:
        return self.state in RUNNING | PENDING


def standings(name: str) -> Mapping[int, Standing]:
    """By index, what the queue says of the tasks of a name. Ended ones are known for some minutes.

    Raises:
        HHBenchError: Slurm isn't here, or doesn't answer.
    """
    found: dict[int, Standing] = {}
    shown = _slurm("squeue", "-h", "-r", "-t", "all", f"--name={name}", "-o", "%F|%K|%T|%r")
    for line in shown.splitlines():
        job, index, state, reason = line.split("|", 3)
        one = Standing(int(job), state, reason)
        other = found.get(int(index))
        if other is None or one.job > other.job:  # it may have been sent by hand once more
            found[int(index)] = one
    return found


def cancel(name: str) -> None:
    """Cancel every job of a name that is the user's."""
    _slurm("scancel", f"--name={name}", f"--user={getpass.getuser()}")


def _slurm(*command: str) -> str:
    """What one of Slurm's commands says.

    Raises:
        HHBenchError: it isn't there, or it fails.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    except FileNotFoundError as error:
        raise HHBenchError(f"no {command[0]} on this machine's PATH: run this where Slurm's commands are") from error
    except subprocess.TimeoutExpired as error:
        raise HHBenchError(f"{command[0]} didn't answer within {error.timeout:.0f} s") from error
    except subprocess.CalledProcessError as error:
        said = " ".join(error.stderr.split()) or f"exit code {error.returncode}"
        raise HHBenchError(f"{command[0]} refuses: {said}") from error
    return done.stdout
