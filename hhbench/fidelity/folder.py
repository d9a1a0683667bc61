"""A converted folder under the measures of `hhbench.fidelity`: its data, its teacher, and longer sequences."""

import copy
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from hhbench import hosts, models
from hhbench.attention import ATTENTIONS
from hhbench.config import RunConfig
from hhbench.errors import DataError, HHBenchError, UsageError
from hhbench.fidelity.measures import (
    MEASURES,
    FidelityReport,
    LengthPoint,
    Sample,
    evaluating,
    label_of,
    measure,
    on_device,
    sample,
)
from hhbench.hosts.probe import learned_positions
from hhbench.task import TASKS, Batch, Split, Task, TaskData

BATCH_TOKENS = 1024


@dataclass(frozen=True)
class Subject:
    """A converted model out of its folder, with what it is measured on and against.

    Attributes:
        run: what its manifest says of the run that made it.
        config: that run's, with the data set and the length that were asked for.
        taught_length: the longest sequence that it was taught on, in tokens.
        teacher: None where it can't be had.
        remarks: what the reader must know: why there is no teacher, that data differ from the run's.
    """

    folder: Path
    run: Mapping[str, Any]
    config: RunConfig
    taught_length: int
    task: Task
    data: TaskData
    student: nn.Module
    teacher: nn.Module | None
    remarks: tuple[str, ...]

    def before_transfer(self) -> "Subject":
        """The teacher as the swap left it: with the same attentions, as they were made, which were taught nothing.

        Raises:
            HHBenchError: the teacher can't be had.
            UsageError: the attention is a user's own, which a folder may not import.
        """
        if self.teacher is None:
            raise HHBenchError(f"the model before transfer is made from its teacher: {'; '.join(self.remarks)}")
        given = [p for p in hosts.placements(self.student) if not p.cross]
        layers = {i: (ATTENTIONS.get(p.attention, allow_code=False), p.options) for i, p in enumerate(given)}
        student = copy.deepcopy(self.teacher)
        torch.manual_seed(self.config.seed)  # as the run did before it built them
        hosts.convert(student, "softmax", layers=layers, context=self.taught_length)
        remarks = ("the model right after the swap, before anything was taught", *self.remarks)
        return dataclasses.replace(self, student=student, remarks=remarks)

    @property
    def title(self) -> str:
        """Model, attention and data."""
        labels = list(dict.fromkeys(label_of(p) for p in hosts.placements(self.student) if not p.is_softmax))
        model = Path(str(self.run["config"]["model"])).name
        return (
            f"{model} with {' and '.join(labels) or 'softmax'} on {self.task.dataset(str(self.config.dataset)).title}"
        )


def open_folder(
    folder: Path, *, attn: str | None = None, dataset: str | None = None, max_len: int | None = None
) -> Subject:
    """Load a converted model, the test split of its data and its teacher.

    Args:
        folder: of a converted model, or a run's that kept its model.
        attn: a user's own attention, which a folder may not name by itself.
        dataset: another data set of the run's task, or the user's own.
        max_len: in place of the run's, in tokens.

    Raises:
        HHBenchError: the folder doesn't say what made it, or its teacher isn't the one that it was converted from.
        UsageError: the data or the length don't fit the model.
        DataError: the data can't be had.
    """
    folder = models.model_folder(folder)
    run = models.manifest(folder).get("run")
    if not isinstance(run, dict) or "config" not in run:
        raise HHBenchError(
            f"{folder} doesn't say which run made it, and so not on which data: its hhbench.json has no run. "
            "hhbench convert and hhbench run --save-model write it"
        )
    own = RunConfig.from_dict(run["config"])
    task = TASKS.get(own.task, allow_code=False).build()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    student = models.load(folder, attn=attn).to(device)
    config = dataclasses.replace(own, dataset=dataset or own.dataset, max_len=max_len or own.max_len, test_examples=0)
    if (limit := learned_positions(student)) is not None and int(config.max_len or 0) > limit:
        raise UsageError(f"--max-len {config.max_len}: {folder} has positions for {limit} tokens")
    data, config = _load_data(task, config, folder)
    remarks = []
    if dataset is not None and dataset != own.dataset:
        if "vocab" in data.facts and not task.weights(own):
            raise UsageError(f"{folder} reads tokens that were made from its own data: --data can't be another")
    elif wrong := [name for name, found in data.hashes.items() if found != run.get("data", {}).get(name, found)]:
        remarks.append(f"these are not the run's data: {', '.join(wrong)} changed since")
    teacher, remark = _teacher(folder, run, task, own)
    if teacher is not None:
        teacher = teacher.to(device)
    else:
        remarks.append(f"local column alone: {remark}")
    return Subject(folder, run, config, int(own.max_len or 0), task, data, student, teacher, tuple(remarks))


def _load_data(task: Task, config: RunConfig, folder: Path) -> tuple[TaskData, RunConfig]:
    """The data, read with the converted folder's own tokenizer where the model that it was made from is gone."""
    try:
        return task.load_data(config), config
    except DataError:
        if not (folder / "tokenizer.json").exists():
            raise
        config = dataclasses.replace(config, model=str(folder))
        return task.load_data(config), config


def _teacher(folder: Path, run: Mapping[str, Any], task: Task, config: RunConfig) -> tuple[nn.Module | None, str]:
    """The model from which a folder was converted, checked by its hash; or None, and why."""
    told = run.get("teacher") or {}
    if told.get("folder"):
        home = Path(told["folder"])
        if not models.is_converted(home):
            return None, f"the teacher isn't in {home} any more"
        found = models.manifest(home)
        expected, actual = told.get("weights_sha256"), found.get("weights_sha256")
        if expected is None:
            expected, actual = told.get("key"), (found.get("teacher") or {}).get("key")
        if expected is None:
            return None, f"{folder} doesn't say by which hash its teacher is known"
        if actual != expected:
            raise HHBenchError(
                f"{home} isn't the teacher of {folder}: its hash is {str(actual)[:12]}, and {expected[:12]} was "
                "converted. Convert again, or put that teacher back"
            )
        return models.load(home), ""
    expected_weights = run.get("weights")
    if not expected_weights:
        return None, "the model was trained from scratch and has no teacher"
    try:
        weights = task.weights(config)
        if weights != expected_weights:
            changed = [name for name, sha256 in expected_weights.items() if weights.get(name) != sha256]
            raise HHBenchError(
                f"the weights of {', '.join(changed)} aren't those that {folder} was converted from: their hash "
                f"differs. Put the old ones back, or convert again"
            )
        torch.manual_seed(config.seed)
        return task.build_model(config, task.load_data(config)), ""
    except DataError as error:
        return None, f"the teacher can't be had: {error}"


def batches_of(data: TaskData, examples: int, *, longer_than: int = 0) -> list[Batch]:
    """Batches of like lengths from the test sets: so many examples, spread evenly over each set."""
    batches = []
    for share, split in _shares(data, examples):
        chosen = _spread(split, share, longer_than)
        while chosen:
            size = max(1, BATCH_TOKENS // max(1, split.lengths[chosen[0]]))
            batches.append(data.collate([split.examples[index] for index in chosen[:size]]))
            chosen = chosen[size:]
    return batches


def _shares(data: TaskData, examples: int) -> list[tuple[int, Split]]:
    """The test sets, each with how many of the examples it gives."""
    return [(-(-examples // len(data.tests)), split) for split in data.tests.values()]


def _spread(split: Split, examples: int, longer_than: int) -> list[int]:
    """Indices, the longest first."""
    able = [index for index, length in enumerate(split.lengths) if length > longer_than]
    count = min(examples, len(able))
    return sorted((able[i * len(able) // count] for i in range(count)), key=lambda index: -split.lengths[index])


# ---- longer sequences ------------------------------------------------------------------------------------------


def extrapolate(
    subject: Subject, multiples: Sequence[int], *, examples: int, watch: Callable[[int, int, str], None] | None = None
) -> list[LengthPoint]:
    """KL, and a decoder's perplexity, at multiples of the length that a model was taught at.

    The longer the sequences, the fewer: each length gets about as many tokens. One that the positions don't reach, or
    of which the data have no examples, is skipped, and says so.
    """
    points = []
    shorter = subject.taught_length
    for times in multiples:
        length = times * subject.taught_length
        try:
            batches, config, data = _at_length(subject, length, shorter if times > 1 else 0, examples // times)
            show = None if watch is None else partial(_show, watch, len(batches), f"{length:,} tokens")
            report = measure(subject.student, (batch["inputs"] for batch in batches), order=False, watch=show)
            own = _perplexity(subject, subject.student, batches, config, data)
            teachers = _perplexity(subject, subject.teacher, batches, config, data)
            count = sum(map(_num_examples, batches))
            points.append(LengthPoint(times, length, count, report.mean("local", "kl"), own, teachers))
        except HHBenchError as error:
            points.append(LengthPoint(times, length, skipped=str(error)))
        shorter = length
    return points


def _num_examples(batch: Batch) -> int:
    return next(len(x) for x in batch["inputs"].values() if isinstance(x, Tensor))


def _show(watch: Callable[[int, int, str], None], total: int, title: str, done: int) -> None:
    watch(done, total, title)


def _at_length(
    subject: Subject, length: int, longer_than: int, examples: int
) -> tuple[list[Batch], RunConfig, TaskData]:
    """Batches of examples of a length, and the settings and the data from which they are."""
    limit = learned_positions(subject.student)
    if limit is not None and length > limit:
        raise UsageError(f"the model has learned positions for {limit} tokens")
    config = dataclasses.replace(subject.config, max_len=length)
    data = subject.task.load_data(config)
    batches = batches_of(data, max(1, examples), longer_than=longer_than)
    if not batches:
        raise UsageError(f"the data have no example of more than {longer_than} tokens")
    if longer_than and "input_ids" not in batches[0]["inputs"]:
        raise UsageError("an image's number of tokens doesn't change")
    return batches, config, data


@torch.no_grad()
def _perplexity(
    subject: Subject, model: nn.Module | None, batches: Sequence[Batch], config: RunConfig, data: TaskData
) -> float | None:
    """Per token; None where the task has none, or there is no model."""
    metrics = subject.task.metrics(data, config)
    if model is None or "token_perplexity" not in metrics:
        return None
    with evaluating(model):
        for batch in batches:
            inputs = on_device(batch["inputs"], model)
            metrics.update(*subject.task.step(model, on_device(batch, model) | {"inputs": inputs}).metric_inputs)
    return float(metrics.compute()["token_perplexity"])


# ---- all of it -------------------------------------------------------------------------------------------------


def multiples_of(text: str) -> tuple[int, ...]:
    """`1,2,4` as numbers, in order."""
    try:
        found = tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        found = (0,)
    if found[0] < 1:
        raise UsageError(f"--lengths takes whole numbers such as 1,2,4, not {text!r}")
    return found


@dataclass(frozen=True)
class Fidelity:
    """What `hhbench fidelity` prints, writes and draws of a folder."""

    subject: Subject
    examples: int
    report: FidelityReport
    samples: tuple[Sample, ...]
    lengths: tuple[LengthPoint, ...]

    @classmethod
    def of(
        cls,
        subject: Subject,
        *,
        examples: int = 64,
        multiples: Sequence[int] = (1, 2, 4),
        top_k: int = 10,
        watch: Callable[[int, int, str], None] | None = None,
    ) -> "Fidelity":
        """Measure a folder on its test split, and at multiples of the length that it was taught at.

        Args:
            examples: of the test split.
            watch: called with the number of batches done, of how many, and of what.
        """
        batches = batches_of(subject.data, examples)

        show = None if watch is None else partial(_show, watch, len(batches), "layers")
        inputs = [batch["inputs"] for batch in batches]
        report = measure(subject.student, inputs, teacher=subject.teacher, top_k=top_k, watch=show)
        samples = sample(subject.student, inputs[0])
        points = extrapolate(subject, multiples, examples=examples, watch=watch)
        return cls(subject, sum(map(_num_examples, batches)), report, tuple(samples), tuple(points))

    def heading(self) -> str:
        """What was measured, in a few lines."""
        lines = [
            f"{self.subject.title}: {self.examples} test examples of up to {self.subject.config.max_len} tokens, "
            f"{self.report.queries:,} queries"
        ]
        return "\n".join([*lines, *self.subject.remarks])

    def further_tables(self) -> list[tuple[list[str], list[list[str]]]]:
        """KL as the run saw it before and after transfer, and at longer sequences; headers and rows of each."""

        def number(value: float | None, form: str = ".3f") -> str:
            return "-" if value is None else f"{value:{form}}"

        tables = []
        if measured := self._of_the_run():
            rows = [
                [moment, *(number(fmean(measured[name]) if measured.get(name) else None) for name in names)]
                for moment, names in (
                    ("after the swap", ("kl_before", "teacher_entropy", "student_entropy_before")),
                    ("after transfer", ("kl_after", "teacher_entropy", "student_entropy_after")),
                )
                if measured.get(names[0])
            ]
            tables.append((["in the run, on validation data", "KL", "entropy of softmax", "entropy"], rows))
        rows = [
            [
                f"{p.length:,}",
                str(p.examples),
                number(p.kl),
                number(p.perplexity, ".4g"),
                number(p.teacher_perplexity, ".4g"),
                "" if p.skipped is None else f"skipped: {p.skipped}",
            ]
            for p in self.lengths
        ]
        tables.append((["tokens", "examples", "local KL", "perplexity", "softmax's perplexity", ""], rows))
        return tables

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        subject = self.subject
        return {
            "folder": str(subject.folder),
            "title": subject.title,
            "task": subject.task.name,
            "dataset": subject.config.dataset,
            "data": dict(subject.data.hashes),
            "max_len": subject.config.max_len,
            "taught_length": subject.taught_length,
            "examples": self.examples,
            "remarks": list(subject.remarks),
            "means": {
                column: {name: self.report.mean(column, name) for name in MEASURES}
                for column in ("local", "end_to_end")
            },
            **self.report.as_dict(),
            "lengths": [dataclasses.asdict(point) for point in self.lengths],
            "in_the_run": self._of_the_run(),
        }

    def save_plots(self, folder: Path) -> list[Path]:
        """See `hhbench.fidelity.plots.save_plots`."""
        from hhbench.fidelity.plots import save_plots

        return save_plots(self.report, folder, title=self.subject.title, samples=self.samples, lengths=self.lengths)

    def _of_the_run(self) -> Mapping[str, Any] | None:
        """What the run that made the model measured before and after transfer."""
        return self.subject.run.get("fidelity") or None
