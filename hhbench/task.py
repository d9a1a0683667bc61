"""The contract of a task: what is measured, on which data, with which model.

A task is one file in tasks/. It says how its data becomes batches, which model hosts the attention, what the loss is
and which number counts. Training, conversion, evaluation, results and tables are hhbench's.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchmetrics import MetricCollection

from hhbench.config import REGIMES, RunConfig
from hhbench.data import PackageFile
from hhbench.errors import UsageError, unknown_name
from hhbench.registry import Registry

Example = Mapping[str, Any]
Batch = dict[str, Any]
Kind = Literal["decoder", "encoder", "vision"]  # of a pretrained model


@dataclass(frozen=True)
class Dataset:
    """One data set of a task.

    Attributes:
        title: what tables call it.
        score: the metric that counts.
        higher_is_better: its direction.
        files: pinned files of the package registry that it is read from.
        source: where it comes from if there are none.
    """

    title: str
    score: str
    higher_is_better: bool = True
    files: tuple[PackageFile, ...] = ()
    source: str = "the hub"


@dataclass(frozen=True)
class Split:
    """Examples, and how long each one is in tokens: batches are made of like lengths.

    Attributes:
        draws: reading one draws random numbers, as augmentation does. They are a function of (seed, epoch, index) then.
        costly: reading one takes a CPU so long, as decoding an image does, that a GPU would wait for it.
    """

    examples: Sequence[Example]
    lengths: Sequence[int]
    draws: bool = False
    costly: bool = False

    def __len__(self) -> int:
        return len(self.examples)

    def first(self, count: int) -> "Split":
        """At most `count` examples; 0 = all."""
        if not 0 < count < len(self):
            return self
        return replace(self, examples=self.examples[:count], lengths=self.lengths[:count])


@dataclass(frozen=True)
class TaskData:
    """Everything a run trains, selects and tests on.

    Attributes:
        train, validation: the test sets take no part in training or selection.
        tests: by name; the score is the mean over them (MNLI has two).
        collate: examples to a batch: "inputs" (the model's keyword arguments), "labels", whatever `step` needs.
        hashes: sha256 of each source, by name; part of the result's key.
        facts: what the task's model needs to know: number of classes, vocabulary, tokenizer.
    """

    train: Split
    validation: Split
    tests: Mapping[str, Split]
    collate: Callable[[Sequence[Example]], Batch]
    hashes: Mapping[str, str]
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class StepOutput:
    """What one batch gives.

    Attributes:
        loss: summed over the units that it counts (examples, tokens).
        count: the number of those units.
        metric_inputs: positional arguments of the task's metrics.
        scores: per example, [B]: correct or not, or its loss.
    """

    loss: Tensor
    count: int
    metric_inputs: tuple[Tensor, ...]
    scores: Tensor


class Task(ABC):
    """What is measured. Subclass it in a file of tasks/, or of your own.

    Attributes:
        name: the file's name.
        title: what tables call it.
        causal: whether its model may look ahead.
        datasets: by name.
        suites: the data sets that `--task NAME` stands for, by preset.
        average: whether the suite's mean is a table of its own, as GLUE's is.
        scores_pretrained: whether a pretrained model has a score before any training on the task (a language model
            does; a classifier's head is new).
        scored: whether `step` and `metrics` say how good a model is. Where data have no labels there is attention
            transfer alone, and what counts is the divergence from softmax that it leaves.
        teaches: the kinds of pretrained models that its data can teach, each with the data set that does unless the
            user names another, or None.
        regimes: which of hhbench's regimes make sense; the first is the default.
        version: raised whenever its results change.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    causal: ClassVar[bool]
    datasets: ClassVar[Mapping[str, Dataset]]
    suites: ClassVar[Mapping[str, tuple[str, ...]]]
    average: ClassVar[bool] = False
    scores_pretrained: ClassVar[bool] = False
    scored: ClassVar[bool] = True
    teaches: ClassVar[Mapping[Kind, str | None]] = {}
    regimes: ClassVar[tuple[str, ...]] = REGIMES
    version: ClassVar[int] = 1

    @abstractmethod
    def settings(self, config: RunConfig) -> dict[str, Any]:
        """The preset's value of every blank of RunConfig, for this config's data set and regime."""

    @abstractmethod
    def load_data(self, config: RunConfig) -> TaskData:
        """Fetch, check, split and tokenise. Raises DataError before anything trains."""

    def weights(self, config: RunConfig) -> dict[str, str]:
        """sha256 of the pretrained weights that `build_model` starts from, by name; fetched first if need be."""
        del config
        return {}

    @abstractmethod
    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        """The host with its own softmax, pretrained where the config's model is.

        The caller has seeded torch: random weights depend on nothing else.
        """

    @abstractmethod
    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        """Loss and predictions of one batch."""

    @abstractmethod
    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        """Fresh metrics; one of them is the data set's score."""

    def dataset(self, name: str) -> Dataset:
        """The data set of a name. A user's own file or folder is a data set too, where the task can read it."""
        if name not in self.datasets:
            raise unknown_name(f"data set of {self.name}", name, self.datasets)
        return self.datasets[name]

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        """Every pinned file that this config needs, weights included."""
        return self.dataset(str(config.dataset)).files


TaskT = TypeVar("TaskT", bound=type[Task])


@dataclass(frozen=True)
class TaskSpec:
    """A registered task: its class."""

    part: type[Task]

    def build(self) -> Task:
        return self.part()


def _adopt(cls: type, name: str) -> TaskSpec:
    if not (isinstance(cls, type) and issubclass(cls, Task)):
        raise UsageError(f"{name} is no hhbench.task.Task")
    return TaskSpec(cls)


TASKS: Registry[TaskSpec] = Registry("task", package="hhbench.tasks", entry_points="hhbench.tasks", adopt=_adopt)


def register_task(cls: TaskT) -> TaskT:
    """Register a task under its `name`."""
    TASKS.add(cls.name, TaskSpec(cls), external=not cls.__module__.startswith("hhbench."))
    return cls


def padded(sequences: Sequence[Any], value: int) -> Tensor:
    """Sequences of integers, lists or arrays, right-padded: int64 [B, N], N the longest of the batch."""
    rows = np.full((len(sequences), max(map(len, sequences))), value, np.int64)
    for row, sequence in zip(rows, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(rows)


def key_mask_of(sequences: Sequence[Any]) -> Tensor:
    """bool [B, N], True where `padded` put a token."""
    lengths = torch.tensor([len(s) for s in sequences])
    return torch.arange(int(lengths.max()))[None, :] < lengths[:, None]
