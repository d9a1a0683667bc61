"""Many runs on one machine: each a process of its own, as many at once as there are devices for.

    out/sweeps/NAME.yaml    a run's settings: `hhbench run --config` repeats it
    out/sweeps/NAME.log     all that it said, each attempt after the one before
    out/sweeps/NAME.lock    held by the sweep that has it in hand: two sweeps of one folder share the work

What is finished is read from results, what was under way goes on from its checkpoints: there is no state of a sweep's.
"""

import contextlib
import logging
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Final, Literal

from filelock import FileLock, Timeout

from hhbench import data, result, stopping
from hhbench.data import PackageFile
from hhbench.errors import HHBenchError, UsageError
from hhbench.grid import Earlier, Trial, teachers_of
from hhbench.leaderboard import counted
from hhbench.ranks import launched
from hhbench.result import Result

log = logging.getLogger("hhbench")

State = Literal["waiting", "running", "done", "failed", "stopped"]
FOLDER: Final = "sweeps"
SECONDS_BETWEEN_LOOKS: Final = 0.2
SECONDS_BETWEEN_CLAIMS: Final = 1.0  # of a run that another sweep has in hand
SIGNALS: Final = (signal.SIGINT, *stopping.SIGNALS)
# A run is a launch of its own, whatever launched the sweep: it is no rank of that, and must not requeue its job.
LAUNCHERS: Final = ("TORCHELASTIC_RUN_ID", "WORLD_SIZE", "RANK", "LOCAL_RANK", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID")


@dataclass(eq=False)
class Run:
    """Where one run of a sweep stands.

    Attributes:
        log: the file with all that it said.
        teacher: what has to be trained before it.
        teaches: whether it trains a teacher and stops.
        note: the score of what is done, the reason of what failed, the latest line of what is running.
        seconds: that it ran, in this sweep.
        result: None until it is done, and of a teacher.
    """

    trial: Trial
    log: Path
    teacher: "Run | None" = None
    teaches: bool = False
    state: State = "waiting"
    note: str = ""
    seconds: float = 0.0
    result: Result | None = None

    def become(self, state: State, note: str = "") -> None:
        self.state, self.note = state, note

    def last_line(self) -> str:
        """The newest line of the log that says something."""
        with contextlib.suppress(OSError), self.log.open("rb") as file:
            file.seek(max(0, self.log.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
            return next((line.strip() for line in reversed(lines) if line.strip()), "")
        return ""


Watch = Callable[[Sequence[Run], Sequence[Run]], None]  # every run, and those that changed since the last call


@dataclass(frozen=True)
class Agenda:
    """What a sweep would do. Making one loads and trains nothing.

    Attributes:
        trials: all of them.
        done: the results that are there, by trial's name.
        teachers: that are trained first, as several runs share them.
        seconds: of training that each of the others, and each teacher, is expected to take, by name; None: unknown.
        parallel: how many run at once.
    """

    trials: tuple[Trial, ...]
    done: Mapping[str, Result]
    teachers: tuple[Trial, ...]
    seconds: Mapping[str, float | None]
    parallel: int

    @classmethod
    def of(cls, trials: Sequence[Trial], parallel: int | None = None) -> "Agenda":
        """
        Args:
            trials: of `hhbench.grid`, with the same folder and devices.
            parallel: how many run at once; None: as many as there are GPUs for, one on a CPU.

        Raises:
            UsageError: `parallel` is below 1, or what is to run needs more than this machine.
        """
        if not trials:
            raise UsageError("a sweep needs a run")
        if trials[0].config.num_nodes > 1:
            raise UsageError("a sweep runs on this machine alone, without --num-nodes: hhbench submit takes it further")
        if launched().world > 1:
            raise UsageError(f"a sweep is one process, and {launched().by} started {launched().world}")
        if parallel is not None and parallel < 1:
            raise UsageError(f"--parallel must be at least 1, not {parallel}")
        devices, earlier = trials[0].config.devices, Earlier(trials[0].config.out)
        done = earlier.done(trials)
        pending = [trial for trial in trials if trial.name not in done]
        teachers = teachers_of(pending)
        by_name = {trial.name: earlier.teacher_seconds(trial) for trial in teachers}
        for trial in pending:
            spent = earlier.device_seconds(trial)
            by_name[trial.name] = None if spent is None else spent / devices
        at_once = parallel or max(1, len(_gpus(trials[0])) // devices)
        return cls(tuple(trials), done, tuple(teachers), by_name, min(at_once, max(1, len(pending))))

    @property
    def pending(self) -> list[Trial]:
        return [trial for trial in self.trials if trial.name not in self.done]

    def lines(self) -> list[str]:
        """What would be done, for a person."""
        known = [seconds for seconds in self.seconds.values() if seconds is not None]
        unknown = len(self.seconds) - len(known)
        lines = [
            f"{counted(len(self.trials), 'run')}: {len(self.done)} done already, {len(self.pending)} to do, "
            f"{self.parallel} at once"
        ]
        if self.teachers:
            lines.append(f"shared teachers, trained first: {', '.join(trial.title for trial in self.teachers)}")
        if known:
            about = _about(sum(known) / self.parallel)
            line = f"estimated time: {about} of training, by earlier results of the same tasks"
            lines.append(line + (f"; unknown for {unknown} of the runs" if unknown else ""))
            lines.append("  each run starts, loads its data and tests besides that")
        elif self.pending:
            lines.append("estimated time: unknown, as there are no earlier results of the same tasks")
        return lines

    def rows(self) -> list[tuple[str, str, str]]:
        """Each run in the order of its start: what it is, where it stands, what it is expected to take."""

        def expected(trial: Trial) -> str:
            seconds = self.seconds[trial.name]
            return "unknown" if seconds is None else _about(seconds)

        return [
            *((trial.title, "first", expected(trial)) for trial in self.teachers),
            *(
                (trial.title, "done already", "")
                if trial.name in self.done
                else (trial.title, "to do", expected(trial))
                for trial in self.trials
            ),
        ]


@dataclass(frozen=True)
class Outcome:
    """What a sweep came to: every run, teachers among them, and the results, those from before among them."""

    runs: tuple[Run, ...]
    results: tuple[Result, ...]

    @property
    def failures(self) -> list[Run]:
        return [run for run in self.runs if run.state == "failed"]

    @property
    def stopped(self) -> list[Run]:
        """What somebody ended by a signal: the same sweep goes on with it."""
        return [run for run in self.runs if run.state == "stopped"]


def sweep(trials: Sequence[Trial], *, parallel: int | None = None, watch: Watch | None = None) -> Outcome:
    """Run what isn't done yet, and go on when a run fails.

    >>> outcome = sweep(product({"task": "recall", "attn": ["hedgehog", "t2r"], "seed": range(3)}).trials, parallel=2)
    >>> [run.note for run in outcome.failures]

    Started again after it was ended, in whatever way, it repeats nothing that finished and goes on with what was under
    way. SIGINT, SIGTERM and SIGUSR1 are passed on to the runs, which save a checkpoint first; a second one kills them.

    Args:
        trials, parallel: see `Agenda.of`.
        watch: called several times a second.

    Raises:
        UsageError: see `Agenda.of`.
        KeyboardInterrupt: SIGINT came, and the runs have ended.
        Stopped: another of the signals came, and the runs have ended.
    """
    return carry_out(Agenda.of(trials, parallel), watch)


def carry_out(agenda: Agenda, watch: Watch | None = None) -> Outcome:
    """`sweep`, for an agenda that was looked at first."""
    folder = agenda.trials[0].config.out / FOLDER
    teachers = {
        trial.teacher: Run(trial, folder / f"{trial.name}.log", teaches=True) for trial in agenda.teachers
    }  # by the key that the others share with it
    runs = [
        *teachers.values(),
        *(Run(trial, folder / f"{trial.name}.log", teachers.get(trial.teacher)) for trial in agenda.pending),
    ]
    if runs:
        _fetch(runs)
        with tempfile.TemporaryDirectory(prefix="hhbench-sweep-") as told:
            _Workers(runs, _places(agenda), Path(told), watch or (lambda every, changed: None)).work()
    fresh = [run.result for run in runs if run.result is not None]
    return Outcome(tuple(runs), (*agenda.done.values(), *fresh))


def duration(seconds: float) -> str:
    """`under 1 s`, `45 s`, `12 min`, `3 h 20 min`."""
    if seconds < 1:
        return "under 1 s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


# ---- the processes ---------------------------------------------------------------------------------------------


@dataclass
class _Worker:
    """One place for a run: what its environment says, and what runs there."""

    environment: Mapping[str, str]
    run: Run | None = None
    process: "subprocess.Popen[bytes] | None" = None
    claim: FileLock | None = None
    since: float = 0.0
    signals: int = 0  # that were passed on


@dataclass
class _Workers:
    """Hands the runs to places until none is left."""

    runs: Sequence[Run]
    workers: Sequence[_Worker]
    told: Path  # a folder for what the processes say of their ends
    watch: Watch
    signals: list[int] = field(default_factory=list)
    _next_claim: dict[Run, float] = field(default_factory=dict)
    _shown: dict[Run, State] = field(default_factory=dict)

    def work(self) -> None:
        with self._heeding():
            try:
                while self._step():
                    self._show()
                    time.sleep(SECONDS_BETWEEN_LOOKS)
                self._show()
            finally:  # whatever went wrong here, nothing is left running
                for worker in self.workers:
                    if worker.process is not None:
                        worker.process.terminate()
                        worker.process.wait()
        if signal.SIGINT in self.signals:
            raise KeyboardInterrupt
        if self.signals:
            raise stopping.Stopped("the sweep was stopped by a signal: run it again to go on", again=False)

    def _step(self) -> bool:
        """Look at everything once; whether there is more to do."""
        for worker in self.workers:
            if worker.process is not None and worker.process.poll() is not None:
                self._end(worker)
        if self.signals:
            self._pass_signals_on()
        else:
            self._settle_orphans()
            for worker in self.workers:
                if worker.process is None:
                    self._start_next(worker)
        waiting = not self.signals and any(run.state == "waiting" for run in self.runs)
        return waiting or any(worker.process is not None for worker in self.workers)

    def _settle_orphans(self) -> None:
        """What waits for a teacher that won't come."""
        for run in self.runs:
            if run.state == "waiting" and run.teacher is not None:
                if run.teacher.state == "failed":
                    run.log = run.teacher.log
                    run.become("failed", f"its teacher failed: {run.teacher.note}")
                elif run.teacher.state == "stopped":
                    run.become("stopped", "its teacher was stopped")

    def _start_next(self, worker: _Worker) -> None:
        now = time.monotonic()
        for run in self.runs:
            ready = run.teacher is None or run.teacher.state == "done"
            if run.state != "waiting" or not ready or now < self._next_claim.get(run, 0.0):
                continue
            run.log.parent.mkdir(parents=True, exist_ok=True)
            claim = FileLock(run.log.with_suffix(".lock"))
            try:
                claim.acquire(timeout=0)
            except Timeout:
                run.note = "another sweep has it in hand"
                self._next_claim[run] = now + SECONDS_BETWEEN_CLAIMS
                continue
            waited = run in self._next_claim and not run.teaches
            if waited and (found := Earlier(run.trial.config.out).done([run.trial])):
                claim.release()
                self._done(run, found[run.trial.name])
                continue
            self._start(worker, run, claim)
            return

    def _start(self, worker: _Worker, run: Run, claim: FileLock) -> None:
        written = result.write(run.log.with_suffix(".yaml"), run.trial.config.as_yaml().encode())
        command = [sys.executable, "-m", "hhbench", "run", "--config", str(written), "--resume", "--allow-code"]
        inherited = {name: value for name, value in os.environ.items() if name not in LAUNCHERS}
        own = {result.TOLD: str(self._told(run))}
        with run.log.open("ab") as said:
            worker.process = subprocess.Popen(
                command + ["--teacher-only"] * run.teaches,
                env=inherited | dict(worker.environment) | own,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # a terminal's Ctrl-C reaches it through us alone, once
                preexec_fn=partial(stopping.end_with, os.getpid()),
            )
        worker.run, worker.claim, worker.since, worker.signals = run, claim, time.monotonic(), 0
        run.become("running")

    def _end(self, worker: _Worker) -> None:
        run, process, claim = worker.run, worker.process, worker.claim
        assert run is not None and process is not None and claim is not None
        worker.run = worker.process = worker.claim = None
        run.seconds = time.monotonic() - worker.since
        claim.release()
        code, told = process.returncode, self._told(run)
        if code in (stopping.CODE, -signal.SIGTERM) or (code and self.signals):
            run.become("stopped", "it goes on where it was when the sweep is run again")
        elif code:
            run.become("failed", _reason(run, code, told.with_name(f"{told.name}.failed")))
        elif run.teaches:
            run.become("done")
        else:
            try:
                self._done(run, result.load(Path(told.read_text())))
            except (OSError, HHBenchError) as error:
                run.become("failed", f"it ended well, but its result can't be read: {error}")

    def _done(self, run: Run, found: Result) -> None:
        run.result = found
        run.become("done", f"{found.score.name} {found.score.value:.4g}")

    def _told(self, run: Run) -> Path:
        return self.told / run.trial.name

    def _show(self) -> None:
        changed = [run for run in self.runs if self._shown.get(run, "waiting") != run.state]
        now = time.monotonic()
        for worker in self.workers:
            if worker.run is not None:
                worker.run.seconds, worker.run.note = now - worker.since, worker.run.last_line()
        self._shown = {run: run.state for run in self.runs}
        self.watch(self.runs, changed)

    @contextlib.contextmanager
    def _heeding(self) -> Iterator[None]:
        """Signals are passed on to the runs inside. A thread has no say in signals: there, whoever called has."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._note_signal) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _note_signal(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.signals.append(number)

    def _pass_signals_on(self) -> None:
        """To a run's first process alone: its ranks are that one's to tell, and its loaders must outlive the step."""
        for worker in self.workers:
            if worker.process is not None and worker.signals < min(len(self.signals), 2):
                with contextlib.suppress(ProcessLookupError):
                    if len(self.signals) > 1:
                        os.killpg(worker.process.pid, signal.SIGKILL)
                    else:
                        os.kill(worker.process.pid, signal.SIGTERM)
                worker.signals = len(self.signals)


def _reason(run: Run, code: int, failed: Path) -> str:
    """Why a run failed, in one line."""
    with contextlib.suppress(OSError):
        if reason := " ".join(failed.read_text().split()):
            return reason
    if code < 0:
        return f"it was ended by {signal.Signals(-code).name}"
    return run.last_line() or f"exit code {code}"


def _fetch(runs: Sequence[Run]) -> None:
    """What a later run lacks is said before the first one trains; the others need not wait for it."""
    lacking: dict[PackageFile, str] = {}  # why; an empty text: it is there
    for run in runs:
        for file in run.trial.plan.files:
            if file not in lacking:
                try:
                    data.fetch(file)
                    lacking[file] = ""
                except HHBenchError as error:
                    lacking[file] = str(error)
            if lacking[file]:
                run.become("failed", lacking[file])
                break


# ---- what a machine has ----------------------------------------------------------------------------------------


def _gpus(trial: Trial) -> list[str]:
    """The GPUs that runs may have, as CUDA names them; none for runs on a CPU."""
    if trial.config.accelerator not in ("auto", "cuda", "gpu"):
        return []
    import torch

    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    every = named.split(",") if named is not None else [str(index) for index in range(torch.cuda.device_count())]
    return every[: torch.cuda.device_count()]


def _places(agenda: Agenda) -> list[_Worker]:
    """A place for each run at once, with its share of the GPUs and of the CPU's threads."""
    first = agenda.trials[0]
    gpus, devices = _gpus(first), first.config.devices
    said = os.environ.get("OMP_NUM_THREADS", "")
    threads = int(said) if said.isdecimal() else _cpus()
    shared = {"OMP_NUM_THREADS": str(max(1, threads // (agenda.parallel * devices)))}
    places = []
    for index in range(agenda.parallel):
        mine = [gpus[(index * devices + i) % len(gpus)] for i in range(devices)] if gpus else []
        places.append(_Worker(shared | ({"CUDA_VISIBLE_DEVICES": ",".join(mine)} if mine else {})))
    return places


def _cpus() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _about(seconds: float) -> str:
    return f"{'about ' * (seconds >= 1)}{duration(seconds)}"
