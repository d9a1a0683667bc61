"""A tiny task with its data and a model, ready to be trained, for tests of training."""

import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from hhbench import hosts, ranks, sharding, train
from hhbench.config import RunConfig
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, key_mask_of, padded
from hhbench.train import Schedule, TrainStage, TransferStage, fit, loader

VOCAB, LONGEST = 20, 9


def make_schedule(lr: float, epochs: float, weight_decay: float, warmup: float, clip: float) -> Schedule:
    return Schedule(lr=lr, epochs=epochs, weight_decay=weight_decay, beta2=0.999, warmup=warmup, clip=clip)


SCHEDULE = make_schedule(1e-2, 1.0, 0.1, 0.1, 1.0)


class Tiny(Task):
    """Is the first token one of the upper half? `contrary` trains on the wrong answers, and so gets ever worse.

    Attributes:
        seen: the indices of each batch.
        at: a signal that comes in the n-th step, counted from 0, or what its loss is multiplied by.
    """

    name = "tiny"
    title = "Tiny"
    causal = False
    datasets = {
        "toy": Dataset("toy", "accuracy"),
        "contrary": Dataset("contrary", "accuracy"),
        "contrary loss": Dataset("contrary loss", "loss", higher_is_better=False),
    }
    suites = {"mini": ("toy",), "paper": ("toy",)}

    def __init__(self) -> None:
        self.seen: list[list[int]] = []
        self.at: dict[int, Any] = {}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        return {}

    def load_data(self, config: RunConfig) -> TaskData:
        def split(count: int, seed: int, *, wrong: bool = False) -> Split:
            generator = torch.Generator().manual_seed(seed)
            lengths = torch.randint(2, LONGEST + 1, (count,), generator=generator).tolist()
            examples = []
            for length in lengths:
                tokens = torch.randint(2, VOCAB, (length,), generator=generator).tolist()
                examples.append({"tokens": tokens, "label": int(tokens[0] >= VOCAB // 2) ^ wrong})
            return Split(examples, lengths)

        contrary = str(config.dataset).startswith("contrary")
        return TaskData(
            train=split(config.train_examples or 37, 0, wrong=contrary),
            validation=split(40, 1),
            tests={"many": split(70, 2), "few": split(5, 3)},
            collate=collate,
            hashes={},
        )

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        from transformers import BertConfig, BertForSequenceClassification

        return BertForSequenceClassification(
            BertConfig(
                vocab_size=VOCAB,
                hidden_size=16,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=16,
                max_position_embeddings=LONGEST,
                hidden_dropout_prob=float(config.dropout or 0),
                attention_probs_dropout_prob=float(config.dropout or 0),
            )
        )

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits, labels = model(**batch["inputs"]).logits, batch["labels"]
        losses = cross_entropy(logits, labels, reduction="none")
        right = (logits.argmax(-1) == labels).float()
        if model.training:
            event = self.at.get(len(self.seen))
            self.seen.append(batch["index"].tolist())
            if isinstance(event, signal.Signals):
                os.kill(os.getpid(), event)
            elif event is not None:
                losses = losses * event
        return StepOutput(losses.sum(), len(labels), (right, losses.detach()), losses.detach())

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection({"accuracy": Right(), "loss": Loss(), "examples": Examples()}, compute_groups=False)


class Right(MeanMetric):
    def update(self, right: Tensor, losses: Tensor) -> None:
        super().update(right)


class Loss(MeanMetric):
    def update(self, right: Tensor, losses: Tensor) -> None:
        super().update(losses)


class Examples(SumMetric):
    def update(self, right: Tensor, losses: Tensor) -> None:
        super().update(torch.ones_like(right))


def collate(examples: Sequence[Example]) -> Batch:
    tokens = [example["tokens"] for example in examples]
    mask = key_mask_of(tokens)
    return {
        "inputs": {"input_ids": padded(tokens, 0), "attention_mask": mask},
        "labels": torch.tensor([example["label"] for example in examples]),
        "num_tokens": int(mask.sum()),
    }


def make_config(**changes: Any) -> RunConfig:
    fields = {
        "task": "tiny", "attn": "hedgehog", "dataset": "toy", "batch_size": 8, "dropout": 0.0, "accelerator": "cpu",
        "logger": "none",
    }  # fmt: skip
    return RunConfig(**fields | changes)


class Stand:
    """A task with its data and a converted model, ready to be trained."""

    def __init__(self, attn: str = "hedgehog", **changes: Any) -> None:
        self.config, self.task = make_config(**changes), Tiny()
        self.data = self.task.load_data(self.config)
        torch.manual_seed(0)
        self.model = hosts.convert(self.task.build_model(self.config, self.data), attn)
        with torch.no_grad():
            for parameter in self.model.parameters():
                if parameter.ndim == 2:
                    parameter.mul_(5)

    def batches(self, split: Split | None = None, **loading: Any) -> Any:
        split = split or self.data.train
        return loader(split, self.data, self.config, **{"train": split is self.data.train, **loading})

    def stage(self, schedule: Schedule = SCHEDULE) -> "RecordedTraining":
        return RecordedTraining(self.task, self.model, self.data, self.config, schedule)

    def fit(self, folder: Path, stage: Any = None, *, validate: bool = True, **arguments: Any) -> train.StageReport:
        higher = self.task.dataset(str(self.config.dataset)).higher_is_better
        return fit(
            stage or self.stage(),
            self.batches(),
            self.batches(self.data.validation) if validate else None,
            self.config,
            folder=folder,
            title="test",
            higher_is_better=higher,
            **arguments,
        )


class Recorded:
    """Keeps the gradients before each step, the step and the score of each validation."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.gradients: list[dict[str, Tensor]] = []
        self.steps: list[int] = []
        self.validations: list[dict[str, float]] = []
        self.rates: list[float] = []
        self.held = 0  # numbers of the weights that this rank has
        self.sums: dict[int, list[float]] = {}

    def note(self, name: str, loss: Tensor, count: float, batch_idx: int) -> None:
        """Keeps each step's loss and units, over all ranks and parts."""
        super().note(name, loss, count, batch_idx)
        sums = self.sums.setdefault(self.global_step, [0.0, 0.0])
        for place, value in enumerate((float(loss), float(count))):
            sums[place] += ranks.summed_over_ranks(value)

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        super().on_before_optimizer_step(optimizer)
        self.steps.append(self.global_step)
        self.rates.append(optimizer.param_groups[0]["lr"])
        local = (p.to_local() if isinstance(p, DTensor) else p for p in self.model.parameters())
        self.held = sum(p.numel() for p in local)
        found = ((name, p.grad) for name, p in self.model.named_parameters() if p.grad is not None)
        self.gradients.append({name: sharding.whole(gradient).clone() for name, gradient in found})


class RecordedTraining(Recorded, TrainStage):
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.validations.append({"step": self.global_step, **self.metrics})


class RecordedTransfer(Recorded, TransferStage):
    """Keeps what its draws of each batch begin with, too."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.seeds: list[int] = []

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        super().training_step(batch, batch_idx)
        self.seeds.append(self.draws.initial_seed())


def child_environment() -> dict[str, str]:
    """Of a process that can import the tests."""
    paths = [str(Path(__file__).parent), str(Path(train.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    threads = str(torch.get_num_threads())  # sums over other numbers of threads end in other bits
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": threads}


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, found), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name
