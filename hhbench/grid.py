"""A grid of runs: settings, some of them lists, to one checked trial for every combination that can be.

A setting with a list is an axis. `tune` and `keep_layers` are lists themselves, and `layers` may be: a list of lists,
or of mappings, makes an axis of them.
"""

import argparse
import contextlib
import dataclasses
import itertools
import logging
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Final, Literal

from hhbench.config import RunConfig, option_value, split_label
from hhbench.errors import HHBenchError, UsageError, unknown_name
from hhbench.leaderboard import counted
from hhbench.result import Result, files, key_of, load, safe_name

if TYPE_CHECKING:
    from hhbench.runner import Plan

log = logging.getLogger("hhbench")

LISTS: Final = ("task", "dataset", "attn", "recipe")  # flags that take several names, apart by commas
# What a grid decides by itself, and the one folder that many runs can't share.
LEFT_OUT: Final = (*LISTS, "seed", "resume", "model_folder")
OWN_LISTS: Final[Mapping[str, type]] = {"tune": list, "keep_layers": list, "layers": dict}  # what an axis is a list of
SEEDS_AT_MOST: Final = 10_000
OPTION: Final = "option."
Likeness = Literal["seeds", "attention", "size"]
# What an earlier result may differ in from a trial that it is a guide to, and what it may not.
SEEDS: Final = ("seed", "teacher_seed")
ATTENTION: Final = (*SEEDS, "attn", "option", "recipe", "layers", "keep_layers", "lr", "teacher_lr", "transfer_lr")
SIZE: Final = ("task", "preset", "regime", "model", "max_len")


@dataclass(frozen=True)
class Trial:
    """One run of a grid.

    Attributes:
        name: a safe file name, unique in the grid; the same settings and the same code give the same name.
        title: what a person calls it: `glue/snli hedgehog (no-transfer) lr=0.001 s0`.
        config: with its data set, its blanks left blank.
        plan: what it resolved to.
    """

    name: str
    title: str
    config: RunConfig
    plan: "Plan"

    @cached_property
    def identity(self) -> dict[str, Any]:
        """All of a result's identity that is known before data are loaded."""
        return _identity(self.plan) | {"settings": self.plan.settings}

    @cached_property
    def teacher(self) -> str | None:
        """A key that two trials share if they share a teacher; None: it has none."""
        return None if self.plan.teacher_settings is None else key_of(_teacher_identity(self.plan))

    @property
    def own_files(self) -> bool:
        """Whether it reads data or weights of the user's, which may change while every setting stays."""
        from hhbench.pretrained import PRETRAINED

        c, task = self.plan.config, self.plan.task
        own_model = c.model not in PRETRAINED and Path(str(c.model)).exists()
        return c.dataset not in task.datasets or c.data_folder is not None or own_model


@dataclass(frozen=True)
class LeftOut:
    """Combinations that can't be, for one reason.

    Attributes:
        names: of the combinations, without their seeds.
        runs: how many they are, with their seeds.
        reason: why they can't be.
    """

    names: tuple[str, ...]
    runs: int
    reason: str

    def line(self) -> str:
        shown = ", ".join(self.names[:4]) + (f" and {len(self.names) - 4} more" if len(self.names) > 4 else "")
        return f"left out: {shown} ({counted(self.runs, 'run')}): {self.reason}"


@dataclass(frozen=True)
class Grid:
    """What a grid's product came to: the runs, in the order in which they start, and what can't be."""

    trials: tuple[Trial, ...]
    left_out: tuple[LeftOut, ...]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of a grid: lists of names, seeds, and lists for any other setting; then the settings of every run."""
    from hhbench.commands.settings import add_settings

    group = parser.add_argument_group("the grid (every combination of what is listed)")
    group.add_argument("--task", metavar="TASKS", help="names apart by commas; all: every one")
    group.add_argument("--dataset", metavar="DATASETS", help="of the tasks (default: all of the preset's)")
    group.add_argument(
        "--attn", metavar="ATTENTIONS", help="names, name[option=value] or your own file.py:Class; all: every one"
    )
    group.add_argument("--recipe", metavar="RECIPES", help="of conversions (default: each attention's own)")
    group.add_argument("--seeds", metavar="SEEDS", help="0:3 is 0, 1 and 2; or 0,2,5 (default: 0)")
    group.add_argument(
        "--grid", action="append", default=[], metavar="SETTING=VALUES",
        help="values of any other setting: lr=1e-3,3e-3 or option.activation=softmax,exp; with semicolons where a "
        "value has commas: keep-layers=0,1;2,3 (repeatable)",
    )  # fmt: skip
    add_settings(parser, leave_out=LEFT_OUT)


def trials_of(args: argparse.Namespace, *, elsewhere: bool = False) -> list[Trial]:
    """The runs of a grid's flags. What is left out is said, and why. See `product`."""
    grid = grid_of(args, elsewhere=elsewhere)
    for left_out in grid.left_out:
        log.warning("%s", left_out.line())
    return list(grid.trials)


def grid_of(args: argparse.Namespace, *, elsewhere: bool = False) -> Grid:
    """The grid of the flags of `add_arguments`, those of the command line over the file's. See `product`."""
    from hhbench.commands.settings import settings_in, settings_of

    in_file = settings_in(args.config) if args.config else {}
    if isinstance(in_file.get("seed"), int) and in_file["seed"] >= 60 and not args.seeds:
        raise UsageError(f"seed: {in_file['seed']}, or was it 1:3? YAML reads that as 63: put it in quotes or brackets")
    flags: dict[str, Any] = settings_of(argparse.Namespace(**vars(args) | {"config": None}))
    flags |= {name: _names(flags[name]) for name in LISTS if name in flags}
    if args.seeds:
        flags["seed"] = seeds_of(args.seeds)
    for text in args.grid:
        name, values = _axis(text)
        if name in flags:
            raise UsageError(f"--grid {text}: {name} is given twice")
        flags[name] = values
    # A file can't allow itself.
    for kind, label in _named({name: value for name, value in in_file.items() if name not in flags}):
        _look_up(kind, label, allow_code=bool(args.allow_code))
    options = _options(in_file) | _options(flags)
    settings = _without_options(in_file) | _without_options(flags) | ({"option": options} if options else {})
    return product(settings, elsewhere=elsewhere)


def product(settings: Mapping[str, Any], *, elsewhere: bool = False) -> Grid:
    """Every combination of settings, checked; a combination that can't be is left out.

    >>> product({"task": "recall", "attn": ["hedgehog", "t2r"], "seed": range(3), "option": {"activation": "exp"}})

    Args:
        settings: of RunConfig, a list for each that has several values. `task` and `attn` may be "all", an attention
            may be written with its options, `seed` may be "0:3".
        elsewhere: see `hhbench.runner.prepare`.

    Raises:
        UsageError: a name or a value that nothing has, or nothing is left.
        HHBenchError: a user's file raised while it was imported.
    """
    axes = _axes(settings)
    further = [name for name, values in axes.items() if len(values) > 1 and name not in ("seed", *LISTS)]
    trials: dict[str, Trial] = {}
    refused: dict[str, list[RunConfig]] = {}
    fitting: Counter[tuple[str, str]] = Counter()
    reasons: dict[tuple[str, str], UsageError] = {}
    for combination in itertools.product(*axes.values()):
        chosen = dict(zip(axes, combination, strict=True))
        for config in _configs(chosen):
            values = [(name, repr(value)) for name, value in chosen.items()]
            varied = [f"{name}={chosen[name]}" for name in further if not name.startswith(OPTION)]
            try:
                trial = _trial(config, varied, elsewhere=elsewhere)
            except UsageError as error:
                refused.setdefault(str(error), []).append(config)
                reasons |= {value: error for value in values if value not in reasons}
            else:
                trials.setdefault(trial.name, trial)
                fitting.update(values)
    left_out = tuple(_left_out(reason, configs) for reason, configs in refused.items())
    if not trials:
        if len(left_out) == 1:
            raise UsageError(left_out[0].reason)
        raise UsageError("no combination is left:\n" + "\n".join(f"  {each.line()}" for each in left_out))
    for (name, value), reason in reasons.items():
        # A name may fit nothing here: `all` has some that don't. Any other value was meant for something.
        if name not in LISTS and not fitting[name, value]:
            raise reason
    return Grid(tuple(trials.values()), left_out)


def seeds_of(text: str) -> list[int]:
    """`0:3` is 0, 1 and 2; `0,2,5` is a list; both may be joined.

    Raises:
        UsageError: it is neither, a range is empty, or there are more than ten thousand.
    """
    seeds: dict[int, None] = {}
    for part in text.split(","):
        found = re.fullmatch(r"\s*(\d{1,10})\s*(?::\s*(\d{1,10})\s*)?", part, re.ASCII)
        if not found:
            raise UsageError(f"--seeds takes FIRST:END as 0:3, which is 0, 1 and 2, or a list as 0,2,5; not {text!r}")
        first, end = int(found[1]), int(found[2] or int(found[1]) + 1)
        if end <= first:
            raise UsageError(f"--seeds {part.strip()} has none in it: {first} to below {end}")
        if end - first + len(seeds) > SEEDS_AT_MOST:
            raise UsageError(f"--seeds {text} has more than {SEEDS_AT_MOST:,}")
        seeds |= dict.fromkeys(range(first, end))
    return list(seeds)


def teachers_of(trials: Sequence[Trial]) -> list[Trial]:
    """For each teacher that two or more trials share and that isn't trained yet, the trial that trains it, to be run
    with --teacher-only before them. What one trial alone needs, it trains by itself.
    """
    shared = Counter(trial.teacher for trial in trials)
    first = {trial.teacher: trial for trial in reversed(trials)}
    made = []
    for teacher, trial in reversed(first.items()):
        if teacher is not None and shared[teacher] > 1 and (trial.own_files or teacher not in _trained(trial)):
            task, dataset = _place(trial.plan)
            name, title = (
                safe_name(f"teacher-{task}-{dataset}-{teacher[:8]}"),
                f"{task}/{dataset} teacher {teacher[:8]}",
            )
            made.append(dataclasses.replace(trial, name=name, title=title))
    return made


class Earlier:
    """The results and the teachers below a folder: which trials are done, and a guide to those that are still to run.

    A result that is like a trial by "seeds" differs from it in nothing else; by "attention", in what an attention and
    its recipe bring along too; by "size" it has the same task, model and length at least.
    """

    def __init__(self, out: Path) -> None:
        self._results: defaultdict[str, list[Result]] = defaultdict(list)
        self._done: dict[str, Result] = {}
        self._files: dict[str, Path] = {}
        for path, one in _results_below(out):
            self._files[one.key] = path
            self._done[key_of(_known_before_loading(one))] = one
            for key in _likeness_keys(one.identity["settings"]).values():
                self._results[key].append(one)
        self._teachers: defaultdict[str, list[float]] = defaultdict(list)
        for identity, seconds in _teachers_below(out):
            self._teachers[_likeness_keys(identity["settings"])["size"]].append(seconds)

    def done(self, trials: Iterable[Trial]) -> dict[str, Result]:
        """The results that are there, by trial's name. Nothing is loaded for it: settings, attention and task are
        compared.

        What reads files of the user's, keeps its model or is forced has to find out by itself whether it is done.
        """
        named = ((trial, self._done.get(key_of(trial.identity))) for trial in trials)
        return {
            trial.name: result
            for trial, result in named
            if result and not (trial.own_files or trial.config.save_model or trial.config.force)
        }

    def file(self, result: Result) -> Path:
        """Where one of the results lies."""
        return self._files[result.key]

    def like(self, trial: Trial, likeness: Likeness) -> Sequence[Result]:
        """The results that are so like a trial."""
        return self._results.get(_likeness_keys(trial.plan.settings)[likeness], ())

    def device_seconds(
        self, trial: Trial, likenesses: Sequence[Likeness] = ("seeds", "attention", "size")
    ) -> float | None:
        """How long a trial trains, times its devices: the median of the results that are like it in the first of
        these ways that has any. None: there are none.
        """
        for likeness in likenesses:
            if alike := self.like(trial, likeness):
                return median(sum(one.cost["seconds"].values()) * one.environment["world_size"] for one in alike)
        return None

    def teacher_seconds(self, trial: Trial) -> float | None:
        """How long its teacher trains: the median of those of the same size. None: there are none."""
        seconds = self._teachers.get(_likeness_keys(trial.plan.teacher_settings or {})["size"])
        return median(seconds) if seconds else None


# ---- settings to combinations ----------------------------------------------------------------------------------


def _axes(settings: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The values of each setting and of each option, in the order in which they vary: the last one fastest."""
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    fields = {field.name: field for field in dataclasses.fields(RunConfig)}
    given = {name.replace("-", "_"): value for name, value in settings.items() if value is not None}
    axes = {name: _values(name, value) for name, value in given.items()}
    options = axes.pop("option", None)
    for name, values in axes.items():
        if name not in fields:
            raise unknown_name("setting", name, fields)
        if not values:
            raise UsageError(f"{name} has no value")
        if len(values) > 1 and not fields[name].metadata["changes_result"]:
            raise UsageError(f"{name} changes no result: give it one value")
    for name, registry in (("task", TASKS), ("attn", ATTENTIONS)):
        if name not in axes:
            raise UsageError(f"--{name} is needed; hhbench list {name.replace('attn', 'attention')}s shows them")
        axes[name] = registry.names() if axes[name] == ["all"] else axes[name]
        for label in axes[name]:
            _look_up(name, label)
    for dataset in axes.get("dataset", ()):
        _check_dataset(dataset, axes["task"])
    # A whole table with one seed comes before a part of it with all.
    first = {name: axes.pop(name) for name in ("seed", "task", "dataset", "attn", "recipe") if name in axes}
    return first | axes | {f"{OPTION}{name}": _listed(value) for name, value in _options({"option": options}).items()}


def _named(settings: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """The tasks and attentions that settings name, those of single layers too."""
    for kind in ("task", "attn"):
        for label in _values(kind, settings.get(kind) or []):
            yield kind, label
    for layers in _values("layers", settings.get("layers") or {}):
        for _, label in RunConfig.from_dict({"task": "any", "attn": "any", "layers": layers}).layers:
            yield "attn", label


def _look_up(kind: str, label: str, *, allow_code: bool = True) -> None:
    """Refuse an attention or a task that nobody has, or that may not be imported."""
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    if label == "all":
        return
    if kind == "attn":
        ATTENTIONS.get(split_label(label)[0], allow_code=allow_code)
    else:
        TASKS.get(label, allow_code=allow_code)


def _check_dataset(name: str, tasks: Sequence[str]) -> None:
    """Refuse a data set that none of the tasks has."""
    from hhbench.task import TASKS

    errors = []
    for task in tasks:
        try:
            TASKS.get(task).build().dataset(name)
        except HHBenchError as error:
            errors.append(error)
    if len(errors) == len(tasks):
        raise errors[0]


def _values(name: str, value: Any) -> Any:
    if name == "option":
        return value
    if name in LISTS and isinstance(value, str):
        return _names(value)
    if name == "seed":
        seeds = seeds_of(value) if isinstance(value, str) else _listed(value)
        return [seed for each in seeds for seed in (seeds_of(each) if isinstance(each, str) else [each])]
    return _listed(value) if name not in OWN_LISTS or _is_list_of(value, OWN_LISTS[name]) else [value]


def _is_list_of(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, kind) for item in value)


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple | range) else [value]


def _names(text: str) -> list[str]:
    """Apart by commas, but not by those inside brackets."""
    return [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]


def _axis(text: str) -> tuple[str, list[Any]]:
    """`lr=1e-3,3e-3` of --grid, as a name and values."""
    name, equals, rest = text.partition("=")
    name = name.strip().replace("-", "_") if not name.startswith(OPTION) else name.strip()
    texts = [part.strip() for part in rest.split(";")] if ";" in rest else _names(rest)
    texts = [part for part in texts if part]
    if not (equals and name and texts):
        raise UsageError(f"--grid takes SETTING=VALUE,VALUE or option.NAME=VALUE,VALUE, not {text!r}")
    if name.startswith(OPTION):
        return name, [option_value(part) for part in texts]
    if name == "seed":
        return name, seeds_of(rest)
    if name in OWN_LISTS:  # each value is a list, or layers and their attentions
        pairs = OWN_LISTS[name] is dict
        return name, [dict(p.partition("=")[::2] for p in _names(t)) if pairs else _names(t) for t in texts]
    meant: dict[str, Any] = {"true": True, "false": False, "none": None}
    return name, [meant.get(part.lower(), part) for part in texts]


def _options(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The options among settings, with those that --grid gives as option.NAME."""
    given = settings.get("option") or {}
    if not isinstance(given, Mapping):
        given = dict(RunConfig.from_dict({"task": "-", "attn": "-", "option": given}).option)
    return {**given, **{name.removeprefix(OPTION): v for name, v in settings.items() if name.startswith(OPTION)}}


def _without_options(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {name: v for name, v in settings.items() if name != "option" and not name.startswith(OPTION)}


def _configs(chosen: Mapping[str, Any]) -> Iterator[RunConfig]:
    """The configs of one combination: one, or where no data set is named one for each of the suite."""
    from hhbench.runner import expand

    name, options = split_label(chosen["attn"])
    options |= {n.removeprefix(OPTION): value for n, value in chosen.items() if n.startswith(OPTION)}
    settings = {n: value for n, value in _without_options(chosen).items() if value is not None}
    yield from expand(RunConfig.from_dict(settings | {"attn": name, "option": options}))


def _trial(config: RunConfig, varied: Sequence[str], *, elsewhere: bool) -> Trial:
    from hhbench.runner import prepare

    plan = prepare(config, elsewhere=elsewhere)
    c, place = plan.config, _place(plan)
    recipe = [f"({c.recipe})"] if c.recipe else []
    title = " ".join(["/".join(place), plan.label, *recipe, *varied, f"s{c.seed}"])
    words = "-".join([*place, plan.label, *([c.recipe] if c.recipe else []), f"s{c.seed}"])
    trial = Trial("", title, config, plan)
    return dataclasses.replace(trial, name=safe_name(f"{words[:150]}-{key_of(trial.identity)[:8]}"))


def _left_out(reason: str, configs: Sequence[RunConfig]) -> LeftOut:
    def name(c: RunConfig) -> str:
        options = f"[{','.join(f'{n}={value}' for n, value in c.option)}]" if c.option else ""
        return f"{c.task}/{c.dataset} {c.attn}{options}" + (f" ({c.recipe})" if c.recipe else "")

    return LeftOut(tuple(dict.fromkeys(map(name, configs))), len(configs), reason)


def _place(plan: "Plan") -> tuple[str, str]:
    return plan.task.name, Path(str(plan.config.dataset)).name


# ---- what is there already -------------------------------------------------------------------------------------


def _identity(plan: "Plan") -> dict[str, Any]:
    from hhbench.registry import source_hash

    spec, task = plan.spec, plan.task
    return {
        "attention": {"name": spec.name, "version": spec.version, "source_sha256": spec.source_hash()},
        "task": {"name": task.name, "version": task.version},
        "task's file": source_hash(type(task)),
    }


def _teacher_identity(plan: "Plan") -> dict[str, Any]:
    return {k: v for k, v in _identity(plan).items() if k != "attention"} | {"settings": plan.teacher_settings}


def _known_before_loading(result: Result) -> dict[str, Any]:
    identity = result.identity
    return {
        "settings": identity["settings"],
        "attention": identity["attention"],
        "task": identity["task"],
        "task's file": identity["data"].get("task's file"),
    }


def _trained(trial: Trial) -> set[str]:
    """The keys of the teachers below a trial's folder, by what is known before data are loaded."""
    return {key_of(identity) for identity, _ in _teachers_below(trial.config.out)}


def _teachers_below(out: Path) -> Iterable[tuple[dict[str, Any], float]]:
    """The teachers that are trained: what is known of each before data are loaded, and the seconds that it took."""
    from hhbench import models

    for folder in sorted((out / "teachers").glob("*/")):
        try:
            notes = models.manifest(folder)["teacher"]
            found = notes["identity"]
            yield (
                {
                    "task": found["task"],
                    "task's file": found["data"].get("task's file"),
                    "settings": found["settings"],
                },
                float(notes["seconds"]),
            )
        except (HHBenchError, KeyError, TypeError, ValueError, AttributeError):
            continue  # not one, or damaged: the run that needs it says so


def _results_below(out: Path) -> Iterator[tuple[Path, Result]]:
    """The whole results below a folder, in the order of their paths; none where there is no folder."""
    for path in files(out):
        with contextlib.suppress(HHBenchError):
            yield path, load(path)


def _likeness_keys(settings: Mapping[str, Any]) -> dict[Likeness, str]:
    """For each likeness what two settings that have it share."""
    return {
        "seeds": key_of({name: value for name, value in settings.items() if name not in SEEDS}),
        "attention": key_of({name: value for name, value in settings.items() if name not in ATTENTION}),
        "size": key_of({name: settings.get(name) for name in SIZE}),
    }
