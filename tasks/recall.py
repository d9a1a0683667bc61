"""Associative recall: find what followed a key earlier in the sequence. Generated; nothing is fetched.

`ar` is the paper's: key-value pairs of a random map, the last of whose keys stood before and must be answered. `mqar`
(Arora et al. 2024, Zoology) shows distinct pairs once and then asks many times.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection

from hhbench import models
from hhbench.config import RunConfig
from hhbench.data import hash_text
from hhbench.errors import UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, register_task

NO_TARGET = -100


# Keys and values, half each, by preset.
VOCABULARY = {"mini": {"ar": 24, "mqar": 32}, "paper": {"ar": 40, "mqar": 8192}}


@register_task
class Recall(Task):
    """Score: accuracy of the answers, the last one of each sequence in `ar`, all in `mqar`. The loss counts every
    token that the sequence determines. The host is a small GPT-2 with random weights and one head.
    """

    name = "recall"
    title = "Associative recall"
    causal = True
    regimes = ("scratch", "finetuned-conversion")
    datasets = {name: Dataset(name, "accuracy", source="generated") for name in ("ar", "mqar")}
    suites = {"mini": ("ar", "mqar"), "paper": ("ar", "mqar")}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        if config.preset == "paper":
            # Sizes, model and rates of the paper's recall task are not known. Zoology's for mqar; for ar a vocabulary
            # of 40 and sequences of 128 tokens. All unverified.
            return {
                "model": "gpt2-2x128x1",
                "max_len": 128,
                "dropout": 0.0,
                "train_examples": 100_000,
                "test_examples": 3_000,
                "batch_size": 256,
                "epochs": 64.0,
                "lr": 1e-3,
                "teacher_epochs": 64.0,
                "teacher_lr": 1e-3,
                "transfer_epochs": 2.0,
                "transfer_lr": 1e-2,
                "weight_decay": 0.1,
                "beta2": 0.95,
                "warmup": 0.1,
                "clip": 1.0,
            }
        scratch = config.regime == "scratch"
        return {
            "model": "gpt2-2x64x1",
            "max_len": 48 if config.dataset == "ar" else 72,
            "dropout": 0.0,
            "train_examples": 51_200 if config.dataset == "ar" else 32_000,
            "test_examples": 2_000,
            "batch_size": 32,
            "epochs": 1.0 if scratch else 0.2,
            "lr": 1e-3,
            "teacher_epochs": 1.0,
            "teacher_lr": 1e-3,
            "transfer_epochs": 0.2,
            "transfer_lr": 1e-2,
            "weight_decay": 0.1,
            "beta2": 0.95,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def load_data(self, config: RunConfig) -> TaskData:
        make = {"ar": associative_recall, "mqar": multi_query_recall}[str(config.dataset)]
        length, vocab = int(config.max_len or 0), VOCABULARY[config.preset][str(config.dataset)]
        least, most = (4, None) if config.dataset == "ar" else (6, 3 * vocab + 5)  # mqar's keys are distinct
        if length < least or (most and length > most):
            takes = f"from {least} to {most} tokens" if most else f"{least} tokens or more"
            raise UsageError(f"--max-len {length} doesn't fit {config.dataset}, which takes {takes}")
        for name in ("train_examples", "test_examples"):
            if not getattr(config, name):
                raise UsageError(f"--{name.replace('_', '-')} 0 would be all, and generated examples have no end")

        def split(count: int, seed: int) -> Split:
            generator = torch.Generator().manual_seed(seed)
            tokens, targets = make(count, length=length, vocab=vocab, generator=generator)
            return Split(list(zip(tokens, targets, strict=True)), [length - 1] * count)  # type: ignore[arg-type]

        tests = int(config.test_examples or 0)
        # The same examples for every run, in an order of the run's seed: a teacher is shared by all seeds.
        return TaskData(
            train=split(int(config.train_examples or 0), 2),
            validation=split(min(tests, 500), 1),
            tests={"test": split(tests, 0)},
            collate=partial(_collate, last_only=config.dataset == "ar"),
            hashes={str(config.dataset): hash_text(f"{config.dataset} {length} {vocab} version {self.version}")},
            facts={"vocab": vocab},
        )

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        return models.gpt2(
            str(config.model),
            vocab=data.facts["vocab"],
            max_len=int(config.max_len or 0),
            dropout=float(config.dropout or 0),
            mlp_ratio=2,
            initializer_range=0.1,
        )

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).logits.float()
        targets = batch["labels"]
        determined = targets != NO_TARGET
        loss = cross_entropy(logits[determined], targets[determined], reduction="sum")
        asked = determined & batch["asked"]
        right = (logits.argmax(-1) == targets) & asked
        return StepOutput(loss, int(determined.sum()), (right[asked].float(),), right.sum(-1) / asked.sum(-1))

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection({"accuracy": MeanMetric()})


def associative_recall(count: int, *, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [count, length - 1]: key value key value ... key, of one random map for each sequence.

    Every key that stood before has its value as its target, the last key among them: it is the one that counts.
    """
    keys, num_pairs = vocab // 2, length // 2
    values = torch.randint(keys, vocab, (count, keys), generator=generator)
    shown = torch.randint(0, keys, (count, num_pairs), generator=generator)
    which = torch.randint(0, num_pairs - 1, (count, 1), generator=generator)
    shown[:, -1:] = shown.gather(1, which)
    answers = values.gather(1, shown)
    before = (shown[:, :, None] == shown[:, None, :]).tril(-1).any(-1)
    tokens = torch.stack([shown, answers], dim=-1).flatten(1)[:, :-1]
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, ::2] = answers.masked_fill(~before, NO_TARGET)
    return tokens, targets


def multi_query_recall(count: int, *, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [count, length - 1]: distinct keys with their values, a third of the sequence; then keys
    drawn from them with replacement, each followed by its value, which is a target.

    Asking for every key once would teach models to guess by elimination.
    """
    keys, num_pairs = vocab // 2, length // 6
    # A piece at a time: a shuffle of thousands of keys for every sequence would not fit in memory.
    piece = max(1, 2**24 // keys)
    shuffles = (
        torch.rand(min(piece, count - i), keys, generator=generator).argsort(-1) for i in range(0, count, piece)
    )
    first = torch.cat([shuffle[:, :num_pairs] for shuffle in shuffles])
    values = torch.randint(keys, vocab, (count, num_pairs), generator=generator)
    order = torch.randint(0, num_pairs, (count, 2 * num_pairs), generator=generator)
    asked, answers = first.gather(1, order), values.gather(1, order)
    pairs, queries = (torch.stack(both, -1).flatten(1) for both in ((first, values), (asked, answers)))
    tokens = torch.cat([pairs, queries], dim=1)[:, :-1]
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, 2 * num_pairs :: 2] = answers
    return tokens, targets


def _collate(examples: Sequence[Example], *, last_only: bool) -> Batch:
    tokens = torch.stack([tokens for tokens, _ in examples])  # type: ignore[misc]
    targets = torch.stack([targets for _, targets in examples])  # type: ignore[misc]
    asked = torch.ones_like(targets, dtype=torch.bool)
    if last_only:
        asked[:, :-1] = False
    return {
        "inputs": {"input_ids": tokens, "use_cache": False},
        "labels": targets,
        "asked": asked,
        "num_tokens": tokens.numel(),
    }
