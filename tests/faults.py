"""Real processes of `python -m hhbench`, and ways to hurt them.

They are forked from a server that has imported what a run needs, so that a process takes a second and not ten.
"""

import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from hhbench import result

SIGKILL = -signal.SIGKILL  # as an exit code
LIMIT = 240.0  # seconds: what takes longer hangs
_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["hhbench.runner", "hhbench.tasks.lm", "hhbench.baselines.hedgehog", "faults"])


def _main(
    arguments: Sequence[str], log: Path, variables: Mapping[str, str], seconds: float, largest_file: int | None
) -> None:
    """What a process of `python -m hhbench` does, with checkpoints every few seconds of a run of a few seconds."""
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    os.environ.update(variables)
    if largest_file is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file, resource.RLIM_INFINITY))
    multiprocessing.set_start_method(multiprocessing.get_all_start_methods()[0], force=True)  # a fresh process's own
    often = ["--checkpoint-minutes", str(seconds / 60)] if "run" in arguments[:1] else []
    sys.argv = ["hhbench", *arguments, *often]
    runpy.run_module("hhbench", run_name="__main__", alter_sys=True)


@dataclass
class Run:
    """One process of hhbench under way.

    Attributes:
        log: what it prints, on either stream.
    """

    arguments: list[str]
    log: Path
    variables: dict[str, str] = field(default_factory=dict)
    seconds_between_checkpoints: float = 0.1
    largest_file: int | None = None

    def __post_init__(self) -> None:
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self.log.touch()
        self.process = _SERVER.Process(
            target=_main,
            args=(self.arguments, self.log, self.variables, self.seconds_between_checkpoints, self.largest_file),
        )
        self.process.start()

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    @property
    def ended(self) -> bool:
        return self.process.exitcode is not None

    def wait(self) -> int:
        """The exit code: what signal ended it, as a negative number."""
        self.process.join(LIMIT)
        if self.process.exitcode is None:
            self.kill()
            raise AssertionError(f"still running after {LIMIT:g} s:\n{self.said}")
        return self.process.exitcode

    def kill(self) -> None:
        self.process.kill()
        self.process.join(LIMIT)

    def until(self, came: Callable[["Run"], bool]) -> bool:
        """Wait for something that the process says or writes; False if it ended before."""
        end = time.monotonic() + LIMIT
        while not came(self):
            if self.ended:
                return came(self)
            assert time.monotonic() < end, f"it never came:\n{self.said}"
            time.sleep(0.001)
        return True

    def children(self) -> list[int]:
        """The processes that it started itself."""
        found = []
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rpartition(")")[2].split()
            except OSError:
                continue
            if int(fields[1]) == self.process.pid:
                found.append(int(stat.parent.name))
        return sorted(found)


def finished(arguments: Sequence[str], log: Path, **options: object) -> Run:
    """A run to its end, which must be a good one."""
    run = Run([*arguments], log, **options)  # type: ignore[arg-type]
    assert run.wait() == 0, run.said
    return run


# ---- the stages of a run, by what it says and writes ---------------------------------------------------------


def said(text: str) -> Callable[[Path, Run], bool]:
    return lambda out, run: text in run.said


def wrote(pattern: str) -> Callable[[Path, Run], bool]:
    return lambda out, run: any(path.match(pattern) for path in files(out))


def files(folder: Path) -> list[Path]:
    """Every file below a folder, while others come and go."""
    return [Path(root, name) for root, _, names in os.walk(folder) for name in names]


# Where each stage begins; it ends where the next one does.
BEGINNINGS: Mapping[str, Callable[[Path, Run], bool]] = {
    "fetch": said("  stages: "),
    "teacher": wrote("teachers/*.lock"),
    "transfer": said(" adds "),
    "finetuning": said("KL from softmax per layer"),
    "result": wrote("*examples.npz*"),
}


@dataclass(frozen=True)
class Kept:
    """All that a run leaves that must not depend on how often it was stopped."""

    values: dict[str, object]
    examples: dict[str, bytes]
    tokens: int

    @classmethod
    def of(cls, out: Path) -> "Kept":
        """What lies below a folder: one whole result, nothing half."""
        found, complaints = result.find(out)
        assert not complaints
        (made,) = found
        (path,) = out.rglob("result.json")
        with np.load(path.with_name("examples.npz"), allow_pickle=False) as arrays:
            examples = {name: arrays[name].tobytes() for name in arrays.files}
        names = ("key", "score", "metrics", "teacher", "after_swap", "after_transfer", "fidelity", "tuning")
        return cls({name: made.as_dict()[name] for name in names}, examples, made.cost["train_tokens"])


def nothing_half_is_trusted(out: Path) -> None:
    """At any moment, a result that is there is whole, and so are the scores of examples beside it."""
    for path in files(out):
        if path.name == result.FILE_NAME:
            result.load(path)
            with np.load(path.with_name("examples.npz"), allow_pickle=False) as arrays:
                assert {arrays[name].dtype.kind for name in arrays.files} == {"i", "f"}


@contextmanager
def small_disk(folder: Path, size: str = "200k", options: str = "") -> Iterator[str | None]:
    """A file system of a few pages on a folder; gives the reason where this user may not mount one."""
    folder.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}{options}", "tmpfs", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    if mounted.returncode:
        yield f"no file system can be mounted: {mounted.stderr.strip() or mounted.returncode}"
        return
    try:
        yield None
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def damage(path: Path, how: str, place: float) -> None:
    """Flip a byte of a file, or cut it there. `place`: a part of its size."""
    content = bytearray(path.read_bytes())
    at = int(place * len(content))
    if how == "flipped":
        content[at] ^= 0xFF
    path.write_bytes(content if how == "flipped" else content[:at])
