"""What time, memory and work are read from, on the device that is profiled."""

import gc
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import torch
from torch.utils import flop_counter

from hhbench.errors import UsageError, unknown_name
from hhbench.kernels import kernels
from hhbench.result import cpu_name

_KERNEL: Final = re.compile(r"aten::_(scaled_dot_product_\w+)|(flash_attn\w*::\w+)")
_MEMORY: Final = "[memory]"  # what torch's profiler calls an event of its allocator
LEAST: Final = 0.005  # seconds of an interleaved sample: shorter calls are repeated within it
SLOW, ROUNDS_IF_SLOW = 2.0, 3  # seconds; calls that take longer get only so many rounds
FLUSHED: Final = 256 * 2**20  # bytes, more than a GPU's cache holds
GEMM: Final = {"cpu": 1024, "cuda": 8192, "mps": 4096}  # rows of the square matrices that show the ceiling


def _softmax_flops(q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_flop_count(q, k, v))  # type: ignore[no-untyped-call]


def _softmax_backward_flops(grad: Any, q: Any, k: Any, v: Any, *_: Any, **__: Any) -> int:
    return int(flop_counter.sdpa_backward_flop_count(grad, q, k, v))  # type: ignore[no-untyped-call]


def _bmm_flops(a: Sequence[int], b: Sequence[int], *rest: object, **named: object) -> int:
    """[B, N, K] and [B, K, M]."""
    del rest, named
    return int(2 * a[0] * a[1] * a[2] * b[2])


_COUNTED: Final = {
    # torch's own softmax on a CPU, which its counter knows on a GPU alone.
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _softmax_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _softmax_backward_flops,
    # Its counter fails on a product whose type is named, in releases before 2.14.
    torch.ops.aten.bmm: _bmm_flops,
}


def device_of(name: str | None) -> torch.device:
    """The device of a name, or this machine's first.

    Raises:
        UsageError: there is no such device here.
    """
    there = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        "cpu": True,
    }
    if name is None:
        return torch.device(next(kind for kind, here in there.items() if here))
    kind, _, index = name.partition(":")
    if kind not in there or (index and not index.isdigit()):
        raise unknown_name("device", name, there)
    if not there[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        known = ", ".join(kind for kind, here in there.items() if here)
        raise UsageError(f"--device {name}: this machine has none; it has {known}")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """What a record calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple MPS" if device.type == "mps" else cpu_name()


@dataclass(frozen=True)
class Moment:
    """Seconds on the wall, and of CPU time of this thread and of the whole process; or those between two moments."""

    wall: float = 0.0
    thread: float = 0.0
    process: float = 0.0

    @staticmethod
    def now() -> "Moment":
        return Moment(time.perf_counter(), time.thread_time(), time.process_time())

    def __sub__(self, other: "Moment") -> "Moment":
        return Moment(self.wall - other.wall, self.thread - other.thread, self.process - other.process)

    def __add__(self, other: "Moment") -> "Moment":
        return Moment(self.wall + other.wall, self.thread + other.thread, self.process + other.process)


@dataclass(frozen=True)
class Clock:
    """Which time a call takes.

    On a GPU it is that between two events of its own stream. On a CPU with one thread it is the CPU time of that
    thread, which a busy machine doesn't stretch; with several threads their sum would hide who waits for whom, and
    it is the clock on the wall.

    Attributes:
        threads: of the CPU.
        cold: a GPU's cache is flushed before each sample, and each sample is one call.
    """

    device: torch.device
    threads: int
    cold: bool = False

    @property
    def name(self) -> str:
        if self.device.type == "cuda":
            return "CUDA events"
        return "CPU time of the one thread" if self._counts_thread else "the clock on the wall"

    @property
    def _counts_thread(self) -> bool:
        return self.device.type == "cpu" and self.threads == 1

    def time(self, run: Callable[[], object], repeats: int = 1) -> "Timed":
        """Call `run` so many times. Garbage is collected before, not meanwhile."""
        gc.collect(0)
        with _no_garbage_collection():
            self.synchronize()
            events = self._events()
            start = Moment.now()
            if events:
                if self.cold:
                    torch.empty(FLUSHED, dtype=torch.uint8, device=self.device).zero_()
                events[0].record()
            for _ in range(repeats):
                run()
            if events:
                events[1].record()
            self.synchronize()
            took = Moment.now() - start
        seconds = took.thread if self._counts_thread else took.wall
        if events:
            seconds = events[0].elapsed_time(events[1]) / 1000
        # More CPU time than this thread's own: the call has threads that this clock doesn't see.
        hidden = self._counts_thread and took.process > 1.2 * took.thread + 1e-3
        return Timed(seconds / repeats, took.wall / repeats, hidden)

    def sample(self, run: Callable[[], object], repeats: int) -> "Timed":
        """One round's time of a call. What another call left in the caches is not in it if it is repeated."""
        if repeats > 1:
            run()
        return self.time(run, repeats)

    def warm_up(self, run: Callable[[], object], below: float) -> "Timed":
        """The time of a first call, or of a second if the first took less than so many seconds: a first is slower."""
        timed = self.time(run)
        return self.time(run) if timed.wall < below else timed

    def interleaved(self, calls: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
        """Seconds of each call, one sample a round, after a warm-up. All take turns; every other round goes backwards.

        A call that takes SLOW seconds has its samples in the first ROUNDS_IF_SLOW rounds.
        """
        usual = {name: self.warm_up(call, SLOW).seconds for name, call in calls.items()}
        samples: dict[str, list[float]] = {name: [] for name in calls}
        for number in range(rounds):
            for name in list(calls)[:: -1 if number % 2 else 1]:
                if usual[name] < SLOW or number < ROUNDS_IF_SLOW:
                    repeats = 1 if self.cold else max(1, math.ceil(LEAST / max(usual[name], 1e-9)))
                    samples[name].append(self.sample(calls[name], repeats).seconds)
        return samples

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        elif self.device.type == "mps":
            torch.mps.synchronize()

    def _events(self) -> "list[torch.cuda.Event]":
        timed = self.device.type == "cuda"
        return [torch.cuda.Event(enable_timing=True) for _ in range(2)] if timed else []  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class Timed:
    """Seconds of one call by the clock and on the wall; `hidden`: other threads worked too."""

    seconds: float
    wall: float
    hidden: bool


@contextmanager
def _no_garbage_collection() -> Iterator[None]:
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


@dataclass(frozen=True)
class Inspection:
    """What one call did.

    Attributes:
        counted_flops: by torch's counter.
        peak_bytes: the most that it held at once beyond what was there before.
        kernels: what ran.
    """

    counted_flops: int
    peak_bytes: int | None
    kernels: tuple[str, ...]


MEMORY_BY: Final = {
    "cpu": "torch's allocator, by its profiler; what libraries allocate for themselves isn't seen",
    "cuda": "torch.cuda.max_memory_allocated, beyond what was there before",
    "mps": "not measured on this device",
}


def inspect(run: Callable[[], object], device: torch.device) -> Inspection:
    """Call `run` once and watch it. That takes longer than a call does."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else it says on stderr whenever it starts and stops
    peak = None
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device) - before
    counter = flop_counter.FlopCounterMode(display=False, custom_mapping=_COUNTED)
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    watched = torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=device.type == "cpu", acc_events=True
    )
    with _no_garbage_collection(), watched, kernels() as ran, counter:
        out = run()
    del out
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    ops = {match[1] or match[2] for event in events if (match := _KERNEL.fullmatch(event.name()))}
    if device.type == "cpu":
        peak = _peak(events)
    forward = sorted(op for op in ops if "backward" not in op)
    return Inspection(int(counter.get_total_flops()), peak, (*ran, *forward))


class _Whole:
    """In place of the counter's record of modules: it can't follow one that recomputes without gradients."""

    parents: Final = ("Global",)

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


def _peak(events: Any) -> int:
    """The most bytes at once, from the allocator's events in the order of time."""
    changes = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == _MEMORY)
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most


def free_memory(device: torch.device) -> int | None:
    """Bytes that could still be had; None where nothing tells."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    found = []
    with suppress(OSError, ValueError):
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        found.append(int(lines["MemAvailable"].split()[0]) * 1024)
    with suppress(OSError, ValueError):  # a container's own limit; "max" is none
        group = Path("/sys/fs/cgroup")
        limit, used = (int((group / f"memory.{name}").read_text()) for name in ("max", "current"))
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        found.append(limit - used + int(cached.get("inactive_file", 0)))
    return min(found, default=None)


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, on any device."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("allocate memory" in text or "out of memory" in text)


@contextmanager
def cpu_threads(count: int | None) -> Iterator[int]:
    """torch with so many threads; as it is for None."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield torch.get_num_threads()
    finally:
        torch.set_num_threads(before)


def gemm(device: torch.device, dtype: torch.dtype) -> tuple[int, Callable[[], object]]:
    """The size of a product of two square matrices, and the call."""
    size = GEMM[device.type]
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return size, lambda: a @ b
