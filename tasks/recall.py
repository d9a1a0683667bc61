"""Associative recall: find what followed a key earlier in the sequence. Generated; nothing is fetched.

`ar` is the paper's: key-value pairs drawn from a random map, then one key whose value must be recalled. `mqar` (Arora
et al. 2024, Zoology) shows the pairs once and then asks for every key.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection

from hhbench import hosts
from hhbench.config import RunConfig
from hhbench.data import hash_text
from hhbench.errors import UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, register_task

NO_TARGET = -100


@register_task
class Recall(Task):
    """Score: accuracy over the positions whose next token the sequence determines: the last one in `ar`, all the
    answers in `mqar`. The host is a small GPT-2 with random weights.
    """

    name = "recall"
    title = "Associative recall"
    causal = True
    regimes = ("scratch", "finetuned-conversion")
    datasets = {"ar": Dataset("ar", "accuracy"), "mqar": Dataset("mqar", "accuracy")}
    suites = {"mini": ("ar", "mqar"), "paper": ("ar", "mqar")}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        if config.preset == "paper":
            # Sizes, model and rates of the paper's recall task are not known: Zoology's for mqar, and for ar a
            # vocabulary of 40 and sequences of 128 tokens. All unverified.
            return {
                "model": "gpt2-2x128x4",
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
                "warmup": 0.1,
                "clip": 1.0,
            }
        return {
            "model": "gpt2-2x64x2",
            "max_len": 64,
            "dropout": 0.0,
            "train_examples": 20_000,
            "test_examples": 2_000,
            "batch_size": 64,
            "epochs": 4.0,
            "lr": 2e-3,
            "teacher_epochs": 4.0,
            "teacher_lr": 2e-3,
            "transfer_epochs": 1.0,
            "transfer_lr": 1e-2,
            "weight_decay": 0.1,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def load_data(self, config: RunConfig) -> TaskData:
        make = {"ar": associative_recall, "mqar": multi_query_recall}[str(config.dataset)]
        length, vocab = int(config.max_len or 0), vocabulary(config)
        if length < 4:
            raise UsageError(f"--max-len {length} has no room to show a key and ask for it: 4 at least")
        for name in ("train_examples", "test_examples"):
            if not getattr(config, name):
                raise UsageError(f"--{name.replace('_', '-')} 0: there is no end of generated examples; say how many")

        def split(count: int, seed: int) -> Split:
            tokens, targets = make(count, length=length, vocab=vocab, generator=torch.Generator().manual_seed(seed))
            return Split(list(zip(tokens, targets, strict=True)), [length] * count)  # type: ignore[arg-type]

        tests = int(config.test_examples or 0)
        # The same data for every seed of a run, so that seeds can share a teacher; no run trains on the test set.
        return TaskData(
            train=split(int(config.train_examples or 0), 1_000),
            validation=split(min(tests, 1_000), 1),
            tests={"test": split(tests, 0)},
            collate=_collate,
            hashes={str(config.dataset): hash_text(f"{config.dataset} {length} {vocab} version {self.version}")},
            facts={"vocab": vocab},
        )

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        return hosts.gpt2(
            str(config.model),
            vocab=data.facts["vocab"],
            max_len=int(config.max_len or 0),
            dropout=float(config.dropout or 0),
        )

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).logits.float()
        targets = batch["labels"]
        asked = targets != NO_TARGET
        loss = cross_entropy(logits[asked], targets[asked], reduction="sum")
        right = (logits.argmax(-1) == targets) & asked
        return StepOutput(loss, int(asked.sum()), (right[asked].float(),), right.sum(-1) / asked.sum(-1))

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection({"accuracy": MeanMetric()})


def vocabulary(config: RunConfig) -> int:
    """Tokens: half are keys, half are values. As many keys as the longest sequence can ask about."""
    return 40 if config.dataset == "ar" else max(64, 2 * (int(config.max_len or 0) // 4))


def associative_recall(count: int, *, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [count, length]: key value key value ... key, of one random map for each sequence.

    The last key stood before; its value is the only target. `length` even makes the last token of the pairs unused.
    """
    keys, num_pairs = vocab // 2, (length - 1) // 2
    values = torch.randint(keys, vocab, (count, keys), generator=generator)
    shown = torch.randint(0, keys, (count, num_pairs), generator=generator)
    tokens = torch.stack([shown, values.gather(1, shown)], dim=-1).flatten(1)
    which = torch.randint(0, num_pairs, (count, 1), generator=generator)
    asked = shown.gather(1, which)
    tokens = torch.cat([tokens, asked], dim=1)
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, -1:] = values.gather(1, asked)
    return tokens, targets


def multi_query_recall(count: int, *, length: int, vocab: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Tokens and targets [count, length]: distinct keys with their values, then the keys again in another order,
    each followed by its value. Every value of the second half is a target.
    """
    keys, num_pairs = vocab // 2, length // 4
    first = torch.rand(count, keys, generator=generator).argsort(-1)[:, :num_pairs]
    values = torch.randint(keys, vocab, (count, num_pairs), generator=generator)
    order = torch.rand(count, num_pairs, generator=generator).argsort(-1)
    again, answers = first.gather(1, order), values.gather(1, order)
    tokens = torch.cat(
        [torch.stack([first, values], -1).flatten(1), torch.stack([again, answers], -1).flatten(1)], dim=1
    )
    targets = torch.full_like(tokens, NO_TARGET)
    targets[:, 2 * num_pairs :: 2] = answers  # the token after each repeated key
    return tokens, targets


def _collate(examples: Sequence[Example]) -> Batch:
    tokens = torch.stack([tokens for tokens, _ in examples])  # type: ignore[misc]
    return {
        "inputs": {"input_ids": tokens, "use_cache": False},
        "labels": torch.stack([targets for _, targets in examples]),  # type: ignore[misc]
        "num_tokens": tokens.numel(),
    }
