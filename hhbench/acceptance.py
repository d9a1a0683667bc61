"""Whether somebody else's result may join a table.

Nothing that a result names is imported, fetched or executed, and no path in it is opened: an attention of a user's own
file is named and that is all. What can be worked out again here is: the data's hashes where the cache has them, and the
model, laid out without its numbers, for its parameters and the state of its decoding. What is left is whether the
numbers can be true, and agree with each other. A plausible lie passes: only running the settings again finds it out.
"""

import contextlib
import dataclasses
import json
import math
import os
import re
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple

from hhbench import result
from hhbench.config import RECIPES, RunConfig
from hhbench.errors import DataError, HHBenchError, UsageError, in_one_line
from hhbench.pretrained import PRETRAINED
from hhbench.result import Result

if TYPE_CHECKING:
    from torch import nn

    from hhbench.attention import AttentionSpec
    from hhbench.runner import Plan
    from hhbench.task import Task, TaskData

Outcome = Literal["PASS", "WARN", "FAIL"]

MOST_BYTES: Final = 2**20  # of a file; the largest of docs/results has less than a hundredth of it
MOST_DEPTH: Final = 12
MOST_CHARACTERS: Final = 500  # of one text
SHOWN_CHARACTERS: Final = 60  # of a text in a message
MOST_PAIRS: Final = 4 * 10**9  # of tokens of a sequence, over all examples of a data set that is made here
MOST_LAYERS: Final = 1000
MOST_PARAMETERS: Final = 10**10  # of a model that is laid out here
FEW_PARAMETERS: Final = 5 * 10**7  # of one that is built with its numbers, where it can't be laid out without
MOST_OPTION: Final = 2**14  # an option is a width, a window, a number of features
CLOCK_SKEW: Final = timedelta(hours=1)
FLOPS_OF_A_DEVICE: Final = 1e17  # beyond every device there is, so that nothing honest is refused
# A table shows these as Markdown, as CSV that a spreadsheet may open, and on a terminal.
_MARKUP: Final = re.compile(r"[<>`|\\$]|\]\s*[(\[:]|!\[|://|^[=+@-]")
_HASH: Final = re.compile(r"[0-9a-f]{64}")
_COMMIT: Final = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# Of a metric, by the last part of its name: the lowest and the highest value that it can have.
_RANGES: Final[Mapping[str, tuple[float, float]]] = {
    **dict.fromkeys(("accuracy", "f1", "top1", "top5", "rouge1", "rouge2", "rougeL"), (0.0, 1.0)),
    **dict.fromkeys(("matthews", "pearson", "spearman", "pearson_spearman"), (-1.0, 1.0)),
    **dict.fromkeys(("word_perplexity", "token_perplexity"), (1.0, math.inf)),
    "kl": (0.0, math.inf),
}
_ROUNDING: Final = 1e-4  # float32 sums may leave a bound by so much


class Finding(NamedTuple):
    """What one check found. `said` is empty where it passed with nothing to say."""

    check: str
    outcome: Outcome
    said: str


Doubt = tuple[Outcome, str]


def examine(path: Path, *, now: datetime | None = None) -> tuple[Result | None, list[Finding]]:
    """Check a result file.

    Args:
        now: the time that `created` may not lie behind; the clock's unless given.

    Returns:
        The result, or None where the file holds none, and a finding of every check that could be made.
    """
    try:
        values = _read(path)
    except HHBenchError as error:
        return None, [Finding("file", "FAIL", str(error))]
    found = [Finding("file", "PASS", "")]
    try:
        made = Result.from_dict(values)
    except (HHBenchError, ValueError, OverflowError) as error:
        return None, [*found, Finding("record", "FAIL", _shown(str(error), 200))]
    found.append(Finding("record", "PASS", f"schema {made.schema}, key {made.key}"))
    found.append(_finding("text", _text(values)))
    if found[-1].outcome == "FAIL":  # what follows repeats texts of the file
        return made, found
    with _without_network():
        case = _Case(made, now or datetime.now(UTC))
        found += [_finding(name, check(case)) for name, check in _CHECKS.items()]
    return made, found


def accepted(findings: Iterable[Finding]) -> bool:
    """Whether nothing failed."""
    return all(finding.outcome != "FAIL" for finding in findings)


def file_name(made: Result) -> str:
    """What an accepted result is called: safe on every system, and different for different results."""
    seed = made.identity["settings"]["seed"]
    parts = (made.task["name"], made.task["dataset"], made.attention["label"], f"s{seed}", made.key)
    words = (result.safe_name(part, most=60) for part in parts)
    return f"{'-'.join(words)}.{result.FILE_NAME}"


def keep(made: Result, folder: Path) -> Path:
    """Write an accepted result into a folder, whole or not at all, under `file_name`. The same one may be there.

    Raises:
        HHBenchError: another result is there under this name, or the folder can't be written.
    """
    path = folder / file_name(made)
    content = made.as_json()
    aside = result.write(path.with_name(f".{uuid.uuid4().hex}.part"), content)
    try:
        path.hardlink_to(aside)  # unlike a rename it never replaces
    except FileExistsError:
        if not path.is_file() or path.read_bytes() != content:
            raise HHBenchError(
                f"{path} is there and is another run of the same settings: nothing is replaced"
            ) from None
    except OSError as error:
        raise HHBenchError(f"can't write {path}: {error.strerror or error}") from error
    finally:
        aside.unlink(missing_ok=True)
    return path


# ---- the file --------------------------------------------------------------------------------------------------


def _read(path: Path) -> Any:
    """The JSON of a file, bounded in every direction."""
    try:
        if not path.is_file():
            raise HHBenchError(f"no file {path}")
        with path.open("rb") as file:
            content = file.read(MOST_BYTES + 1)
    except OSError as error:
        raise HHBenchError(f"{path} can't be read: {error.strerror or error}") from error
    if len(content) > MOST_BYTES:
        raise HHBenchError(f"it is larger than {MOST_BYTES:,} bytes: no result is")
    try:
        values = json.loads(
            content.decode("utf-8"), object_pairs_hook=_once_each, parse_constant=_no_constant, parse_float=_finite
        )
    except RecursionError as error:
        raise HHBenchError("its JSON is nested too deeply") from error
    except ValueError as error:
        raise HHBenchError(f"not JSON: {_shown(str(error), 200)}") from error
    level, depth = [values], 0
    while level:
        depth += 1
        level = [inner for outer in level for inner in _inside(outer)]
    if depth > MOST_DEPTH:
        raise HHBenchError(f"its JSON is nested {depth} deep: no result's is deeper than {MOST_DEPTH}")
    return values


def _once_each(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Of a name that stands twice, readers differ in which value counts."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a name stands twice in one object")
    return found


def _no_constant(constant: str) -> None:
    raise ValueError(f"{constant} is no JSON")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError("a number is beyond what a float can hold")
    return number


def _inside(value: Any) -> Iterable[Any]:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _text(values: Any) -> Iterator[Doubt]:
    """No text is absurdly long or holds what a terminal would obey; none that a table shows is markup."""
    for path, text in _texts(values, ""):
        if len(text) > MOST_CHARACTERS:
            yield "FAIL", f"{_shown(path)} has {len(text):,} characters, more than {MOST_CHARACTERS}"
        elif not text.isprintable():
            yield "FAIL", f"{_shown(path)} holds control or invisible characters: {_shown(text)}"
        elif not path.startswith("config.") and (found := _MARKUP.search(text)):
            yield "FAIL", f"{_shown(path)} holds {found[0]!r}, which a table could take for markup: {_shown(text)}"


def _texts(value: Any, path: str) -> Iterator[tuple[str, str]]:
    """Every text below a value, names among them, with where it stands."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for name, item in value.items():
            inner = f"{path}.{name}" if path else name
            yield inner, name
            yield from _texts(item, inner)
    elif isinstance(value, list):
        for index, item in enumerate(value):
            yield from _texts(item, f"{path}[{index}]")


def _shown(text: str, most: int = SHOWN_CHARACTERS) -> str:
    """A text of the file as a message may repeat it: on one line, nothing in it that a terminal would obey."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)
    return clean if len(clean) <= most else f"{clean[:most]}..."


# ---- what is known here of the result's settings ---------------------------------------------------------------


class _Case:
    """A result, and what can be worked out here of its settings: each part when a check first asks for it."""

    def __init__(self, made: Result, now: datetime) -> None:
        self.made, self.now = made, now
        self.settings: Mapping[str, Any] = made.identity["settings"]

    @cached_property
    def config(self) -> RunConfig:
        """Its settings, with nothing of its machine: no folder of it is read or written.

        Raises:
            UsageError: they aren't settings.
        """
        return dataclasses.replace(RunConfig.from_dict(self.made.config), **_HERE)

    @cached_property
    def task(self) -> "Task | None":
        """None where it isn't one that is installed here."""
        from hhbench.task import TASKS

        name = self.made.identity["task"]["name"]
        return TASKS.get(name, allow_code=False).build() if name in TASKS.names() else None

    @cached_property
    def spec(self) -> "AttentionSpec | None":
        """None where it isn't one that is installed here."""
        from hhbench.attention import ATTENTIONS

        name = self.made.identity["attention"]["name"]
        return ATTENTIONS.get(name, allow_code=False) if name in ATTENTIONS.names() else None

    @property
    def has_known_data(self) -> bool:
        """Whether the data set is one of the task's own, not a file."""
        return self.task is not None and self.config.dataset in self.task.datasets

    @cached_property
    def plan(self) -> "Plan":
        """The run that its settings ask for.

        Raises:
            DataError: this can't be worked out here; the message is the reason.
            UsageError: no run could have had these settings.
        """
        from hhbench.attention import ATTENTIONS
        from hhbench.runner import prepare

        config, identity = self.config, self.made.identity
        if self.task is None or self.spec is None or not self.has_known_data:
            raise DataError("unknown source: the task, the data set or the attention is somebody's own")
        if (identity["task"]["version"], identity["attention"]["version"]) != (self.task.version, self.spec.version):
            raise DataError("another version of the task or the attention made it")
        if any(_name_of(label) not in ATTENTIONS.names() for _, label in config.layers):
            raise DataError("unknown source: a layer has somebody's own attention")
        if any(isinstance(v, int | float) and abs(v) > MOST_OPTION for v in config.options.values()):
            raise UsageError(f"an option is beyond {MOST_OPTION:,}")
        depth = re.match(r"gpt2-(\d+)x", str(config.model))
        named = (depth[1] if depth else "", *(layers for layers, _ in config.layers))
        if any(int(number) > MOST_LAYERS for number in re.findall(r"\d+", " ".join(named))):
            raise UsageError(f"a model of more than {MOST_LAYERS:,} layers")
        return prepare(config)

    @cached_property
    def data(self) -> "TaskData":
        """Its data, from the cache alone.

        Raises:
            DataError: they aren't pinned or aren't in the cache; the message is the reason.
        """
        from hhbench import data

        plan = self.plan
        known, model = plan.task.dataset(str(plan.config.dataset)), str(plan.config.model)
        if not known.files and known.source == "the hub":
            raise DataError(f"unknown source: the hub's {known.title} is not pinned")
        if model not in PRETRAINED and Path(model).exists():
            raise DataError("unknown source: its model is named like a folder of this machine")
        examples = int(plan.config.train_examples or 0) + int(plan.config.test_examples or 0)
        if known.source == "generated" and examples * int(plan.config.max_len or 0) ** 2 > MOST_PAIRS:
            raise DataError(f"{examples:,} examples of {plan.config.max_len} tokens are too many to make here")
        missing = [file.name for file in plan.task.files(plan.config) if data.status(file) != "ready"]
        if missing:
            raise DataError(f"run hhbench data fetch {' '.join(missing)} and check again")
        return plan.task.load_data(plan.config)

    @cached_property
    def model(self) -> "tuple[nn.Module, int]":
        """The model that its settings make, for its shapes alone, and how many parameters it had before the swap.

        Raises:
            DataError: it can't be built here; the message is the reason.
        """
        import torch

        if self.plan.chooses:
            raise DataError("which layers stay softmax was chosen by what was measured")
        bare = dataclasses.replace(self.plan.config, regime="scratch")  # no weights are read

        def build(device: str) -> "tuple[nn.Module, int]":
            with torch.device(device), torch.random.fork_rng(devices=[]):
                model = self.plan.task.build_model(bare, self.data)
                before = _num_parameters(model)
                if before > (MOST_PARAMETERS if device == "meta" else FEW_PARAMETERS):
                    raise DataError(f"its model has {before:,} parameters")
                self.plan.conversion(model).carry_out()
            return model, before

        try:
            return build("meta")
        except RuntimeError:  # some attentions look at the numbers that they are made of
            return build("cpu")


# What a submitted config says of its machine is not used here.
_HERE: Final[Mapping[str, Any]] = {
    "out": Path(),
    "data_folder": None,
    "model_folder": None,
    "accelerator": "cpu",
    "devices": 1,
    "num_nodes": 1,
    "workers": 0,
    "logger": "none",
    "save_model": False,
    "resume": False,
    "force": False,
    "allow_code": False,
}


@contextlib.contextmanager
def _without_network() -> Iterator[None]:
    """Nothing is fetched because a file names it."""
    before = os.environ.get("HHBENCH_OFFLINE")
    os.environ["HHBENCH_OFFLINE"] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ["HHBENCH_OFFLINE"]
        else:
            os.environ["HHBENCH_OFFLINE"] = before


def _name_of(label: str) -> str:
    """The name of an attention that is written with its options."""
    return label.partition("[")[0].strip()


def _num_parameters(model: "nn.Module") -> int:
    return sum(parameter.numel() for parameter in model.parameters())


# ---- the checks ------------------------------------------------------------------------------------------------


def _settings(case: _Case) -> Iterator[Doubt]:
    """The settings that can be rerun are those that the key hashes."""
    own, made = json.loads(json.dumps(case.config.identity())), case.made
    names = {name: Path(str(own[name])).name for name in ("dataset", "model") if own[name] is not None}
    for name in sorted(own.keys() | case.settings.keys()):
        ours, theirs = own.get(name, result.ABSENT), case.settings.get(name, result.ABSENT)
        if ours == theirs or (name in names and theirs == names[name]):
            continue
        if name == "attn" and case.spec is None and Path(str(ours)).name == theirs:
            continue
        yield "FAIL", f"{name} is {_shown(repr(ours))} in its config and {_shown(repr(theirs))} in its identity"
    repeated = {
        "task": (made.task["name"], made.identity["task"]["name"], case.settings.get("task")),
        "attention": (made.attention["name"], made.identity["attention"]["name"], case.settings.get("attn")),
        "recipe": (made.attention["recipe"], case.settings.get("recipe")),
        "data set": (made.task["dataset"], case.settings.get("dataset")),
    }
    for name, values in repeated.items():
        if name == "task" and case.task is None:
            values = values[:2]  # settings say the file
        if any(value != values[0] for value in values):
            yield "FAIL", f"it says of its {name}: {_shown(', '.join(map(repr, values)), 200)}"


def _task(case: _Case) -> Iterator[Doubt]:
    made, task = case.made, case.task
    if task is None:
        yield "WARN", f"{_shown(made.task['name'])} is no task of this hhbench: its data and score are taken on trust"
        return
    yield from _version(task.name, made.identity["task"]["version"], task.version)
    dataset, regime, recipe = str(case.config.dataset), case.settings["regime"], made.attention["recipe"]
    if regime not in task.regimes:
        yield "FAIL", f"{task.name} has no regime {_shown(str(regime))}"
    if (recipe is None) != (regime == "scratch") or (recipe is not None and recipe not in RECIPES):
        yield "FAIL", f"recipe {_shown(repr(recipe))} doesn't fit regime {_shown(str(regime))}"
    if dataset not in task.datasets:
        yield "WARN", f"{_shown(made.task['dataset'])} is no data set of {task.name}: unknown source"
        return
    suite = task.suites[case.config.preset]
    known = [task.dataset(n).title for n in (suite if dataset in suite else (dataset,))]
    if made.task["suite"] != known or made.task["average"] != task.average:
        yield "FAIL", f"the suite of {task.name} is {', '.join(known)}, not {_shown(', '.join(made.task['suite']))}"
    if {made.task["title"], made.task["dataset"]} != {task.dataset(dataset).title}:
        yield "FAIL", f"{dataset} is called {task.dataset(dataset).title}, not {_shown(made.task['title'])}"


def _attention(case: _Case) -> Iterator[Doubt]:
    said, label, spec = case.made.identity["attention"], case.made.attention["label"], case.spec
    if spec is None:
        if not re.fullmatch(r"[\w.-]+:\w+|[\w.]+\.\w+", said["name"]):
            yield "FAIL", f"no attention named {_shown(said['name'])}, nor is that a file's or a package's class"
        elif not _HASH.fullmatch(said["source_sha256"] or ""):
            yield "FAIL", f"{_shown(said['name'])} is somebody's own, without the sha256 of its source"
        else:
            yield "WARN", f"{said['name']} is somebody's own: not imported, its cost is taken on trust"
        if _name_of(label) != said["name"]:
            yield "FAIL", f"its label {_shown(label)} is of another attention"
        return
    yield from _version(spec.name, said["version"], spec.version)
    if said["source_sha256"] != spec.source_hash():
        yield "FAIL", f"{spec.name} is hhbench's own or a plug-in's, and the sha256 of its source is another"
    if label != (known := spec.label(case.config.options)):
        yield "FAIL", f"its label is {_shown(label)}; its options make it {known}"


def _version(name: str, theirs: int, ours: int) -> Iterator[Doubt]:
    if theirs < 1:
        yield "FAIL", f"{name} never had version {theirs}"
    elif theirs > ours:
        yield "FAIL", f"{name} is version {theirs} there and {ours} here: update hhbench to compare them"
    elif theirs < ours:
        yield "WARN", f"{name} is version {theirs} there and {ours} here: the table keeps older versions apart"


def _data(case: _Case) -> Iterator[Doubt]:
    """The hashes of the data, and what follows from the data alone."""
    made = case.made
    hashes = {**made.identity["data"]}
    if not hashes or not all(_is_hash(value) for value in hashes.values()):
        yield "FAIL", "its data have no hashes"
        return
    try:
        data = case.data
    except DataError:
        files = case.task.dataset(str(case.config.dataset)).files if case.task and case.has_known_data else ()
        pinned = {file.name: file.sha256 for file in files}
        if files and hashes == pinned:
            yield "WARN", "its hash is the pinned file's"
        elif files and hashes.keys() == pinned.keys():
            yield "FAIL", "its hash is another than the pinned file's"
        raise
    if hashes != dict(data.hashes):
        yield "FAIL", f"other data: {_shown(json.dumps(hashes), 200)}, and here {json.dumps(dict(data.hashes))}"
    if (tested := sum(len(split) for split in data.tests.values())) != made.score.num_examples:
        yield "FAIL", f"its score is of {made.score.num_examples:,} examples; the test set has {tested:,}"
    if (tokens := round(sum(data.train.lengths) * float(case.config.epochs or 0))) != made.task["train_tokens"]:
        yield "FAIL", f"it trained on {made.task['train_tokens']:,} tokens; its settings say {tokens:,}"


def _is_hash(value: str) -> bool:
    """A sha256, or what the libraries of the hub make of a data set."""
    return re.fullmatch(r"[0-9a-f]{16,64}", value) is not None


def _weights(case: _Case) -> Iterator[Doubt]:
    said = {**case.made.identity["weights"]}
    if said != (known := case.plan.task.weights(case.plan.config) if case.data else {}):
        yield "FAIL", f"other weights: {_shown(json.dumps(said), 200)}, and here {json.dumps(known)}"


def _score(case: _Case) -> Iterator[Doubt]:
    made = case.made
    score = made.score
    if score.num_examples < 1:
        yield "FAIL", f"its score is of {score.num_examples} examples"
    if made.metrics.get(score.name) != score.value:
        yield "FAIL", f"its score is {score.value} and its metric {_shown(score.name)} is another"
    if case.task is not None and case.has_known_data:
        known = case.task.dataset(str(case.config.dataset))
        if (score.name, score.higher_is_better) != (known.score, known.higher_is_better):
            yield "FAIL", f"{known.title} is scored by {known.score}, not by {_shown(score.name)}"
    values = {f"metrics.{name}": (name, value) for name, value in made.metrics.items()}
    values |= {
        moment: (score.name, value)
        for moment, value in (
            ("after the swap", made.after_swap),
            ("after transfer", made.after_transfer),
            ("its teacher's", made.teacher and made.teacher["score"]),
        )
        if value is not None
    }
    if made.tuning is not None:
        values |= {f"trial {i}": (score.name, t["validation"]) for i, t in enumerate(made.tuning["trials"])}
    unknown = set()
    for where, (metric, value) in values.items():
        bounds = _RANGES.get(metric.rpartition("/")[2])
        if bounds is None:
            unknown.add(metric)
        elif not bounds[0] - _ROUNDING <= value <= bounds[1] + _ROUNDING:
            yield "FAIL", f"{_shown(where)} is {value:g}; {_shown(metric)} lies between {bounds[0]:g} and {bounds[1]:g}"
    if unknown:
        yield "WARN", f"no known range: {_shown(', '.join(sorted(unknown)), 200)}"


def _stages(case: _Case) -> Iterator[Doubt]:
    """What a run reports of its stages is what its settings have for stages."""
    made, config = case.made, case.config
    converts = case.settings["regime"] != "scratch"
    if case.settings["regime"] == "finetuned-conversion" and made.teacher is None:
        yield "FAIL", "a finetuned conversion has a teacher, and it names none"
    if made.teacher is not None and not re.fullmatch(r"[0-9a-f]{16}", made.teacher["key"]):
        yield "FAIL", "the key of its teacher is none"
    transfers = converts and made.attention["recipe"] in RECIPES and RECIPES[str(made.attention["recipe"])].transfer
    reported = {
        "a teacher": (made.teacher, converts),
        "a score after the swap": (made.after_swap, converts),
        "a score after transfer": (made.after_transfer, transfers),
        "fidelity": (made.fidelity, converts),
        "tuning": (made.tuning, bool(config.tune)),
        "a choice of layers": (made.layer_choice, (config.keep_layers or "").startswith("auto")),
    }
    for name, (value, possible) in reported.items():
        if value is not None and not possible:
            yield "FAIL", f"it reports {name}, for which its settings have no stage"
    if made.fidelity is not None:
        yield from _fidelity(case, made.fidelity)
    if made.layer_choice is not None and any(layer < 0 for layer in made.layer_choice["layers"]):
        yield "FAIL", "a layer that was kept has a negative number"
    if config.tune:
        trials = made.tuning["trials"] if made.tuning else []
        rates = [trial["lr"] for trial in trials]
        if rates != list(config.tune):
            yield "FAIL", f"it tried the learning rates {_shown(str(rates))}; its settings say {list(config.tune)}"
        elif made.tuning is not None:
            best = (max if made.score.higher_is_better else min)(trials, key=lambda trial: trial["validation"])
            if made.tuning["picked"] not in [t["lr"] for t in trials if t["validation"] == best["validation"]]:
                yield "FAIL", f"it picked {made.tuning['picked']:g}; validation was best at {best['lr']:g}"


def _fidelity(case: _Case, said: result.Fidelity) -> Iterator[Doubt]:
    uniform = math.log(max(1, int(case.config.max_len or 1)))  # the largest entropy that weights can have
    highest = {
        "kl_before": math.inf,
        "kl_after": math.inf,
        "teacher_entropy": uniform,
        "student_entropy_before": uniform,
        "student_entropy_after": uniform,
    }
    for name, most in highest.items():
        values: list[float] = said[name]  # type: ignore[literal-required]
        if any(not -_ROUNDING <= value <= most + _ROUNDING for value in values):
            yield "FAIL", f"fidelity.{name} leaves its range, 0 to {most:.3g} nats"
    before, after = ("kl_before", "teacher_entropy", "student_entropy_before"), ("kl_after", "student_entropy_after")
    lengths = {name: len(said[name]) for name in (*before, *after)}  # type: ignore[literal-required]
    if len({lengths[name] for name in before}) > 1 or {lengths[name] for name in after} - {0, lengths["kl_before"]}:
        yield "FAIL", f"fidelity has unequal numbers of layers: {lengths}"
    if said["floored_rows"] < 0:
        yield "FAIL", f"fidelity.floored_rows is {said['floored_rows']}"


def _cost(case: _Case) -> Iterator[Doubt]:
    """Tokens, seconds and memory agree with each other, with the settings, and with what machines can do."""
    made, config = case.made, case.config
    cost, world = made.cost, made.environment["world_size"]
    if made.attention["params_added"] != cost["params_added"]:
        yield "FAIL", f"its attention adds {made.attention['params_added']:,} parameters, or {cost['params_added']:,}"
    if cost["params"] < 1 or cost["params_added"] > cost["params"]:
        yield "FAIL", f"{cost['params_added']:,} of {cost['params']:,} parameters are the attention's"
    if cost["length"] != config.max_len:
        yield "FAIL", f"its cost is of length {cost['length']:,}; its settings say {config.max_len}"
    if cost["state_bytes"] is not None and cost["state_bytes"] < 0:
        yield "FAIL", f"its state has {cost['state_bytes']:,} bytes"
    least = cost["params"] * 2 / world / 2**20 if world > 0 else 0.0  # two bytes a weight, at the best precision
    if not least <= cost["peak_memory_mb"] <= 2**24:
        yield "FAIL", f"its peak memory is {cost['peak_memory_mb']:,} MB; its weights alone have {least:,.0f}"
    seconds = cost["seconds"]
    if extra := sorted(seconds.keys() - {"train", "transfer"}):
        yield "FAIL", f"no stage is called {_shown(', '.join(extra))}"
    if any(not 0 <= spent <= 10 * 365 * 86400 for spent in seconds.values()):
        yield "FAIL", f"no stage takes {_shown(str(seconds))} seconds"
        return
    yield from _speed(case, sum(seconds.values()), 0.005 * len(seconds) + 1e-9)
    yield from _tokens(case)


def _speed(case: _Case, seconds: float, rounding: float) -> Iterator[Doubt]:
    cost = case.made.cost
    tokens, speed, world = cost["train_tokens"], cost["train_tokens_per_s"], case.made.environment["world_size"]
    slowest = tokens / (seconds + rounding) - 0.1
    fastest = tokens / (seconds - rounding) + 0.1 if seconds > rounding else math.inf
    if not slowest <= speed <= fastest:
        yield "FAIL", f"{tokens:,} tokens in {seconds:,.2f} s are not {speed:,.1f} tokens/s"
    # A token takes a product with each weight, embeddings apart.
    if seconds > rounding and tokens / seconds * cost["params"] > FLOPS_OF_A_DEVICE * max(1, world):
        yield "FAIL", f"{speed:,.0f} tokens/s of {cost['params']:,} parameters are beyond {world} devices"


def _tokens(case: _Case) -> Iterator[Doubt]:
    """The stages' tokens, all in all, are what the settings imply: to within the last steps of each epoch."""
    made, config = case.made, case.config
    trained, epochs = made.cost["train_tokens"], float(config.epochs or 0)
    most = (config.train_examples or 0) * (config.max_len or 0) * epochs
    if made.task["train_tokens"] < 0 or (config.train_examples and made.task["train_tokens"] > most):
        yield "FAIL", f"it says {made.task['train_tokens']:,} training tokens; its settings allow {most:,.0f}"
    generated = (
        case.task is not None and case.has_known_data and (case.task.dataset(str(config.dataset)).source == "generated")
    )
    if (
        generated and made.task["train_tokens"] < (config.train_examples or 0) * epochs
    ):  # they have no end: all are made
        yield (
            "FAIL",
            f"{config.train_examples:,} generated examples have more than {made.task['train_tokens']:,} tokens",
        )
    recipe = RECIPES.get(str(made.attention["recipe"]))
    trials = max(1, len(config.tune)) if recipe is None or recipe.finetune else 0
    transfers = recipe is not None and recipe.transfer
    if not epochs:
        return  # without an epoch of training there is nothing to go by
    per_epoch = made.task["train_tokens"] / epochs
    expected = per_epoch * epochs * trials
    slack = (config.batch_size or 0) * (config.max_len or 0) * (math.ceil(epochs) * trials + 1)
    highest = 1.25 * (expected + per_epoch * float(config.transfer_epochs or 0) * transfers) + slack
    if not 0.75 * expected - slack <= trained <= highest:
        yield "FAIL", f"its stages trained on {trained:,} tokens; its settings imply {expected:,.0f} to {highest:,.0f}"


def _model(case: _Case) -> Iterator[Doubt]:
    """What the model that the settings make says of itself."""
    from hhbench import hosts

    made, (model, before) = case.made, case.model
    hosted = hosts.attentions(model)
    states = [attention.state_bytes(int(case.config.max_len or 0)) for attention in hosted]
    own = _num_parameters(model)
    facts = {
        "params": (made.cost["params"], own),
        "params_added": (made.cost["params_added"], own - before),
        "state_bytes": (made.cost["state_bytes"], None if None in states else sum(filter(None, states))),
        "has_weights": (made.attention["has_weights"], all(attention.has_weights for attention in hosted)),
    }
    for name, (theirs, ours) in facts.items():
        if theirs != ours:
            yield "FAIL", f"{name} is {theirs} there; the model that its settings make has {ours}"


def _environment(case: _Case) -> Iterator[Doubt]:
    place, config = case.made.environment, case.made.config
    world = config.get("devices", 1), config.get("num_nodes", 1)
    if place["world_size"] < 1 or place["world_size"] != math.prod(world):
        yield "FAIL", f"{place['world_size']} processes, and {world[0]} devices on {world[1]} nodes"
    if not 1 <= place["threads"] <= 4096:
        yield "FAIL", f"{place['threads']} threads"
    if place["precision"] != case.settings.get("precision"):
        yield "FAIL", f"it ran in {_shown(place['precision'])}; its settings say {case.settings.get('precision')}"
    if place["commit"] is not None and not _COMMIT.fullmatch(place["commit"]):
        yield "FAIL", f"{_shown(place['commit'])} is no commit"
    if not re.fullmatch(r"\d+\.\d+(\.\w+)?\+?", place["python"]):
        yield "FAIL", f"{_shown(place['python'])} is no version of Python"
    if not place["device"].strip():
        yield "FAIL", "its device has no name"
    if place["dirty"]:
        yield "WARN", "hhbench's code had been changed since its commit"
    if place["commit"] is None:
        yield "WARN", "it doesn't say at which commit of hhbench it ran"


def _created(case: _Case) -> Iterator[Doubt]:
    text = case.made.created
    try:
        created = datetime.fromisoformat(text)
    except ValueError:
        created = None
    if created is None or created.tzinfo is None or created.astimezone(UTC).isoformat(timespec="seconds") != text:
        yield "FAIL", f"{_shown(text)} is no time in UTC as hhbench writes it"
    elif created > case.now + CLOCK_SKEW:
        yield "FAIL", f"it ended at {text}, which is still to come"
    elif created.year < 2024:
        yield "FAIL", f"it ended at {text}, before there was such a benchmark"


_CHECKS: Final[Mapping[str, Callable[[_Case], Iterator[Doubt]]]] = {
    "settings": _settings,
    "task": _task,
    "attention": _attention,
    "data": _data,
    "weights": _weights,
    "score": _score,
    "stages": _stages,
    "cost": _cost,
    "model": _model,
    "environment": _environment,
    "created": _created,
}


def _finding(check: str, doubts: Iterable[Doubt]) -> Finding:
    """All that one check has to say, under the worst of it."""
    found: list[Doubt] = []
    try:
        found.extend(doubts)
    except DataError as error:
        found.append(("WARN", f"not checked: {_shown(str(error), 200)}"))
    except Exception as error:  # libraries raise what they like of settings that no run could have had
        found.append(("FAIL", _shown(str(error) if isinstance(error, HHBenchError) else in_one_line(error), 200)))
    worst = next((outcome for outcome in ("FAIL", "WARN") if outcome in {o for o, _ in found}), "PASS")
    said = [text for outcome, text in found if outcome == worst]
    more = f" (and {len(said) - 3} more)" if len(said) > 3 else ""
    return Finding(check, worst, "; ".join(said[:3]) + more)  # type: ignore[arg-type]
