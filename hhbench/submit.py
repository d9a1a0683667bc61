"""A grid as jobs: the folder that holds them, what they will cost, and how far they are.

    OUT/submissions/ID/
      submission.json          what was submitted
      trials/NNNN.yaml         the config of each trial; teachers/NNNN.yaml, of each teacher that several share
      trials.sh teachers.sh    the scripts; or torchrun.sh
      results/NNNN             where the trial's result lies, once it is done; NNNN.failed, NNNN.stopped: why it isn't
      logs/                    what they say

A trial's checkpoints and its result lie below OUT, in the folder of its key, as those of any run: what another
submission, a sweep or a run has done is done.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final, Literal, TypedDict

from hhbench import slurm, torchrun
from hhbench.errors import HHBenchError, UsageError, unknown_name
from hhbench.grid import Earlier, Trial, teachers_of
from hhbench.leaderboard import counted
from hhbench.result import Result, checked, load, write

Word = Literal["done", "failed", "running", "pending", "stopped"]
WORDS: Final[tuple[Word, ...]] = ("done", "failed", "running", "pending", "stopped")
RECORD: Final = "submission.json"
LONGEST_MESSAGE: Final = 10_000  # of a failure, in characters


class Titled(TypedDict):
    """What a person calls a trial, and the name of its files when it is collected."""

    name: str
    title: str


@dataclass(frozen=True, kw_only=True)
class Record:
    """What submission.json says. `out` is where results lie."""

    schema: int
    on: str
    created: str
    nodes: int
    devices: int
    trials: list[Titled]
    teachers: list[Titled]


@dataclass(frozen=True)
class Submission:
    """A grid that was submitted, in its folder."""

    folder: Path
    record: Record

    @property
    def id(self) -> str:
        return self.folder.name

    @property
    def jobs(self) -> tuple[str, str]:
        """The names of its jobs in Slurm: the teachers', the trials'."""
        return f"hhbench-{self.id}-teachers", f"hhbench-{self.id}"

    def config(self, index: int, *, teacher: bool = False) -> Path:
        """The settings of a trial, or of a shared teacher."""
        return self.folder / ("teachers" if teacher else "trials") / f"{_number(index)}.yaml"

    def told(self, index: int, *, teacher: bool = False) -> Path:
        """The file that holds the path of its result."""
        return self.folder / "results" / f"{'teacher-' * teacher}{_number(index)}"

    def log(self, index: int, *, teacher: bool = False) -> Path:
        return self.folder / "logs" / f"{'teacher' if teacher else 'trial'}-{_number(index)}.log"


@dataclass(frozen=True)
class Draft:
    """A submission before anything is written or sent.

    Attributes:
        trials: all of the grid's.
        done: the results that are there already, by trial's name.
        teachers: to be trained before the trials.
        earlier: what lies below the same folder.
        on_gpus: whether the trials ask for GPUs, where the cluster has some.
    """

    submission: Submission
    trials: Sequence[Trial]
    done: Mapping[str, Result]
    teachers: Sequence[Trial]
    earlier: Earlier
    workdir: Path
    on_gpus: bool

    @property
    def missing(self) -> list[int]:
        """The indices of the trials that are to be run."""
        return [i for i, trial in enumerate(self.trials) if trial.name not in self.done]

    # ---- its scripts -------------------------------------------------------------------------------------------

    def slurm_scripts(self, profile: slurm.ClusterProfile) -> dict[str, str]:
        """By file name, in the order in which they are sent."""
        folder, record = self.submission.folder, self.submission.record

        def array(kind: str, name: str, indices: Sequence[int], told: str, *flags: str) -> slurm.Array:
            return slurm.Array(
                name=name,
                configs=folder / kind,
                told=f"{folder}/results/{told}",
                logs=f"{folder}/logs/{kind.removesuffix('s')}-",
                indices=indices,
                nodes=record.nodes,
                devices=record.devices,
                on_gpus=self.on_gpus,
                workdir=self.workdir,
                flags=["--allow-code", *flags],
            )

        teachers, trials = self.submission.jobs
        scripts = {}
        if self.teachers:
            every = range(len(self.teachers))
            scripts["teachers.sh"] = slurm.script(
                array("teachers", teachers, every, "teacher-", "--teacher-only"), profile
            )
        scripts["trials.sh"] = slurm.script(array("trials", trials, self.missing, ""), profile)
        return scripts

    def torchrun_script(self, hosts: Sequence[str]) -> str:
        def work(index: int, *flags: str, teacher: bool = False) -> torchrun.Work:
            return torchrun.Work(
                config=self.submission.config(index, teacher=teacher),
                told=self.submission.told(index, teacher=teacher),
                log=self.submission.log(index, teacher=teacher),
                flags=["--allow-code", *flags],
            )

        works = [work(i, "--teacher-only", teacher=True) for i in range(len(self.teachers))]
        works += [work(i) for i in self.missing]
        return torchrun.script(works, hosts=hosts, devices=self.submission.record.devices, workdir=self.workdir)

    def write(self, scripts: Mapping[str, str]) -> None:
        """Write the folder.

        Raises:
            HHBenchError: it can't be written.
        """
        folder = self.submission.folder
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            for place in (folder, *(folder / name for name in ("trials", "teachers", "results", "logs"))):
                place.mkdir()
            for trials, teacher in ((self.trials, False), (self.teachers, True)):
                for i, trial in enumerate(trials):
                    self.submission.config(i, teacher=teacher).write_text(trial.config.as_yaml(), encoding="utf-8")
            for i, trial in enumerate(self.trials):
                if trial.name in self.done:
                    self.submission.told(i).write_text(str(self.earlier.file(self.done[trial.name])))
            for name, text in scripts.items():
                (folder / name).write_text(text, encoding="utf-8")
        except OSError as error:
            raise HHBenchError(f"can't write {folder}: {error.strerror or error}") from error
        values = json.dumps(dataclasses.asdict(self.submission.record), indent=1, ensure_ascii=False)
        write(folder / RECORD, values.encode())

    # ---- what it will cost -------------------------------------------------------------------------------------

    def lines(self, profile: slurm.ClusterProfile | None) -> list[str]:
        """What is submitted and what it costs at most, for a person.

        Args:
            profile: of the cluster; None without one, where nothing limits the time.
        """
        record, missing, teachers = self.submission.record, len(self.missing), len(self.teachers)
        done = len(self.trials) - missing
        world = record.nodes * record.devices
        size = f"{counted(record.nodes, 'node')} x {counted(record.devices, 'device')}"
        lines = [
            f"{counted(len(self.trials), 'trial')}: {done} done already, {missing} to run"
            + (f"; {counted(teachers, 'shared teacher')} first" if teachers else "")
        ]
        if profile is not None:
            jobs = 1 + bool(teachers)
            throttle = f", at most {profile.throttle} at a time" if profile.throttle else ""
            limit = (missing + teachers) * world * profile.seconds / 3600
            lines += [
                f"{counted(jobs, 'array job')} of {counted(missing + teachers, 'task')} on {size}{throttle}, "
                f"{profile.time} for each start",
                f"GPU-hours: at most {limit:,.1f} by the time limit, if no task is started again; {self._estimate()}",
            ]
        else:
            lines += [f"one after the other on {size}", f"GPU-hours: {self._estimate()}"]
        return [*lines, f"memory: {self._memory()}"]

    def _estimate(self) -> str:
        """Device-hours, by earlier results that differ in nothing but their seeds."""
        expected = [self.earlier.device_seconds(self.trials[i], ["seeds"]) for i in self.missing]
        known = [seconds for seconds in expected if seconds is not None]
        if not known:
            return "no earlier result with the same settings to go by"
        return f"about {sum(known) / 3600:,.2g} by earlier results, which {len(known)} of {len(expected)} trials have"

    def _memory(self) -> str:
        """The largest peak among earlier results of the same tasks, models and lengths."""
        alike = [self.earlier.like(self.trials[i], "size") for i in self.missing]
        results = {one.key: one for each in alike for one in each}
        if not results:
            return "not known: no earlier result with the same task, model and length"
        most = max(results.values(), key=lambda one: one.cost["peak_memory_mb"])
        lacking = sum(not each for each in alike)
        where = most.environment
        return (
            f"about {most.cost['peak_memory_mb'] / 1000:,.1f} GB for each device: the largest peak of "
            f"{counted(len(results), 'earlier result')} with the same task, model and length "
            f"({most.attention['label']} on {where['world_size']} x {where['device']})"
            + (f"; {lacking} of {len(alike)} trials have none" if lacking else "")
        )


def draft(trials: Sequence[Trial], *, on: str, workdir: Path) -> Draft:
    """A submission of these trials, all with the same folder for results; its own has nothing in it yet."""
    config = trials[0].config
    earlier = Earlier(config.out.absolute())
    done = earlier.done(trials)
    teachers = teachers_of([trial for trial in trials if trial.name not in done])
    now = datetime.now(UTC)
    name = f"{now:%Y%m%d-%H%M%S}-{secrets.token_hex(3)}"
    record = Record(
        schema=1,
        on=on,
        created=now.isoformat(timespec="seconds"),
        nodes=config.num_nodes,
        devices=config.devices,
        trials=[Titled(name=trial.name, title=trial.title) for trial in trials],
        teachers=[Titled(name=trial.name, title=trial.title) for trial in teachers],
    )
    return Draft(
        Submission(config.out.absolute() / "submissions" / name, record),
        [_with_absolute_out(trial) for trial in trials],
        done,
        [_with_absolute_out(trial) for trial in teachers],
        earlier,
        workdir,
        on_gpus=config.accelerator not in ("cpu", "mps"),
    )


def _with_absolute_out(trial: Trial) -> Trial:
    return dataclasses.replace(trial, config=dataclasses.replace(trial.config, out=trial.config.out.absolute()))


def _number(index: int) -> str:
    return f"{index:04d}"


# ---- how far it is ---------------------------------------------------------------------------------------------


def find_submission(out: Path, given: str | None) -> Submission:
    """The submission that a user means: by its folder, its id, the start of its id; the latest if none is named.

    Raises:
        UsageError: there is none, or it isn't one.
    """
    if given is not None and (Path(given) / RECORD).is_file():
        return _read(Path(given).absolute())
    folder = out / "submissions"
    known = sorted(path.parent.name for path in folder.glob(f"*/{RECORD}"))
    if not known:
        raise UsageError(f"no submission below {folder}; hhbench submit makes them, and --out says where to look")
    fitting = known[-1:] if given is None else [name for name in known if name.startswith(given)]
    if not fitting:
        raise unknown_name("submission", str(given), known)
    if len(fitting) > 1:
        raise UsageError(f"{given!r} begins {len(fitting)} submissions: {', '.join(fitting[:5])}")
    return _read((folder / fitting[0]).absolute())


def _read(folder: Path) -> Submission:
    path = folder / RECORD
    try:
        record: Record = checked(json.loads(path.read_text(encoding="utf-8")), Record, "")
        for trial in (*record.trials, *record.teachers):
            if not trial["name"] or "/" in trial["name"] or trial["name"].startswith("."):
                raise HHBenchError(f"{trial['name']!r} is no file's name")
    except (OSError, ValueError, RecursionError) as error:
        raise HHBenchError(f"{path} can't be read: {error}") from error
    except HHBenchError as error:
        raise HHBenchError(f"{path}: {error}") from error
    return Submission(folder, record)


@dataclass(frozen=True)
class Progress:
    """How far a trial is.

    Attributes:
        result: of a trial that is done.
        note: why it failed, waits or stopped; empty where there is nothing to say.
    """

    index: int
    trial: Titled
    word: Word
    note: str = ""
    result: Result | None = None


def progress(submission: Submission) -> list[Progress]:
    """How far each trial is: by the files that the trials leave, and for the others by Slurm's queue.

    Raises:
        HHBenchError: Slurm isn't here or doesn't answer.
    """
    queue = slurm.standings(submission.jobs[1]) if submission.record.on == "slurm" else {}
    return [_progress(submission, i, trial, queue.get(i)) for i, trial in enumerate(submission.record.trials)]


def _progress(submission: Submission, index: int, trial: Titled, standing: slurm.Standing | None) -> Progress:
    told = submission.told(index)
    damaged = ""
    if told.is_file():
        try:
            result = load(Path(told.read_text(encoding="utf-8").strip()))
            return Progress(index, trial, "done", f"{result.score.name} {result.score.value:.4g}", result)
        except HHBenchError as error:
            damaged = str(error)
    if standing is not None and standing.alive:
        if standing.state in slurm.RUNNING:
            return Progress(index, trial, "running", f"job {standing.job}")
        return Progress(index, trial, "pending", standing.reason)
    if failure := _said(told, "failed"):
        return Progress(index, trial, "failed", failure)
    if stopped := _said(told, "stopped"):  # Slurm calls it failed, by its exit code
        return Progress(index, trial, "stopped", stopped)
    if submission.record.on != "slurm":
        return Progress(index, trial, "stopped" if damaged else "pending", damaged or "no result yet")
    log = submission.log(index)
    said = f"see {log}" if log.is_file() else "it never started"
    state = standing.state if standing else ""
    if state in ("FAILED", "OUT_OF_MEMORY", "NODE_FAIL", "BOOT_FAIL"):
        return Progress(index, trial, "failed", damaged or f"{state} in Slurm's words; {said}")
    return Progress(
        index, trial, "stopped", damaged or f"{state or 'not in the queue any more'}, without a result; {said}"
    )


def failures_of_teachers(submission: Submission) -> list[tuple[Titled, str]]:
    """The shared teachers whose training failed, and why."""
    found = []
    for i, teacher in enumerate(submission.record.teachers):
        if failure := _said(submission.told(i, teacher=True), "failed"):
            found.append((teacher, failure))
    return found


def _said(told: Path, end: Literal["failed", "stopped"]) -> str:
    """The one line that a run left which ended so."""
    try:
        text = told.with_name(f"{told.name}.{end}").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return " ".join(text[:LONGEST_MESSAGE].split()) or "without a word"


def collect(trials: Sequence[Progress], folder: Path) -> list[Path]:
    """Copy the results of what is done into a folder, each whole and checked, and return their paths.

    Raises:
        HHBenchError: the folder can't be written.
    """
    return [
        write(folder / f"{trial.trial['name']}.result.json", trial.result.as_json())
        for trial in trials
        if trial.result is not None
    ]
