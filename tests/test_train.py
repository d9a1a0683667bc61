"""Training: who gets which examples, what a step is, what is kept; and that two processes take the step of one."""

import contextlib
import copy
import csv
import dataclasses
import itertools
import math
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MeanMetric, MetricCollection, SumMetric

from hhbench import hosts, progress, train
from hhbench.attention import OptimizerSettings
from hhbench.config import RunConfig
from hhbench.distill import TransferLoss, intercepted
from hhbench.errors import HHBenchError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, key_mask_of, padded
from hhbench.train import Batches, Schedule, TrainStage, TransferStage, evaluate, fit, loader, parameter_groups

VOCAB, LONGEST = 20, 9


def make_schedule(lr: float, epochs: float, weight_decay: float, warmup: float, clip: float) -> Schedule:
    return Schedule(lr=lr, epochs=epochs, weight_decay=weight_decay, beta2=0.999, warmup=warmup, clip=clip)


SCHEDULE = make_schedule(1e-2, 1.0, 0.1, 0.1, 1.0)


class Tiny(Task):
    """Is the first token one of the upper half? `contrary` trains on the wrong answers, and so gets ever worse.

    Attributes:
        seen: the indices of each batch.
        at: what to do with the loss of the n-th step, counted from 0.
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
            if isinstance(event, BaseException):
                raise event
            losses = losses if event is None else losses * event
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

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.steps.append(self.global_step)
        self.rates.append(optimizer.param_groups[0]["lr"])
        self.gradients.append({n: p.grad.clone() for n, p in self.model.named_parameters() if p.grad is not None})


class RecordedTraining(Recorded, TrainStage):
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.validations.append({"step": self.global_step, **self.metrics})


class RecordedTransfer(Recorded, TransferStage):
    pass


# --- batches ---


@contextlib.contextmanager
def as_rank(rank: int, world: int) -> Iterator[None]:
    with mock.patch.object(train, "rank", lambda: rank), mock.patch.object(train, "world_size", lambda: world):
        yield


def dealt(batches: Batches, rank: int = 0, world: int = 1) -> list[list[int]]:
    with as_rank(rank, world):
        found = list(batches)
        assert len(batches) == len(found)
    return found


lengths = st.lists(st.integers(1, 12), min_size=1, max_size=60)


@given(lengths=lengths, size=st.integers(1, 9), seed=st.integers(0, 5), epoch=st.integers(0, 3), pool=st.integers(1, 4))
def test_an_epoch_holds_every_example_once(lengths, size, seed, epoch, pool):
    with mock.patch.object(Batches, "POOL", pool):
        batches = Batches(lengths, size, seed=seed)
        batches.set_epoch(epoch)
        found = dealt(batches)
        again = Batches(lengths, size, seed=seed)
        again.set_epoch(epoch)
        assert dealt(again) == found == dealt(batches)
    assert sorted(itertools.chain(*found)) == list(range(len(lengths)))
    assert sorted(map(len, found), reverse=True)[: len(lengths) // size] == [size] * (len(lengths) // size)


def test_the_order_is_a_function_of_seed_and_epoch():
    lengths = torch.randint(1, 100, (500,)).tolist()
    orders = []
    for seed, epoch in itertools.product(range(3), range(3)):
        torch.manual_seed(epoch)  # the global generator has no say
        batches = Batches(lengths, 8, seed=seed)
        batches.set_epoch(epoch)
        orders.append(dealt(batches))
    assert all(one != other for one, other in itertools.combinations(orders, 2))
    assert all(len(found) == 63 for found in orders)


@given(lengths=lengths, size=st.integers(1, 9), seed=st.integers(0, 3))
def test_like_lengths_share_a_batch(lengths, size, seed):
    found = dealt(Batches(lengths, size, seed=seed))  # one pool
    ranges = sorted((min(lengths[i] for i in batch), max(lengths[i] for i in batch)) for batch in found)
    assert all(longest <= shortest for (_, longest), (shortest, _) in itertools.pairwise(ranges))


def test_batches_do_not_come_by_length():
    """Sorted within a pool, shuffled among batches: training doesn't go from short to long."""
    found = dealt(Batches(list(range(1, 401)), 8, seed=0))
    longest = [max(batch) for batch in found]
    assert longest != sorted(longest)
    assert longest[: len(longest) // 2] != sorted(longest)[: len(longest) // 2]


@given(
    lengths=lengths,
    share=st.integers(1, 6),
    world=st.integers(1, 4),
    micro=st.integers(1, 6),
    epoch=st.integers(0, 2),
)
def test_ranks_share_every_global_batch(lengths, share, world, micro, epoch):
    size, divide = share * world, math.ceil(share / micro)
    batches = Batches(lengths, size, seed=1, divide=divide)
    batches.set_epoch(epoch)
    with as_rank(0, world):
        expected = batches.global_batches()
    shares = [dealt(batches, rank, world) for rank in range(world)]
    assert len({len(share) for share in shares}) == 1  # all ranks take as many steps
    for step, batch in enumerate(expected):
        for each in shares:
            mine = list(itertools.chain(*each[step * divide : (step + 1) * divide]))
            assert len(mine) in (len(batch) // world, math.ceil(len(batch) / world))
        parts = [share[step * divide + part] for share in shares for part in range(divide)]
        assert sorted(itertools.chain(*parts)) == sorted(batch)
        if len(batch) >= world * divide:
            assert min(map(len, parts)) >= 1
            assert max(map(len, parts)) <= micro
    # Only a last batch that can't give every part an example is left out, so that nobody steps without one.
    missing = len(lengths) - sum(map(len, expected))
    assert missing in (0, len(lengths) % size)
    assert missing < world * divide
    assert len(expected) == 1 or all(len(batch) >= world * divide for batch in expected)


@given(lengths=lengths, tokens=st.integers(1, 60), world=st.integers(1, 5))
def test_testing_deals_every_example_to_one_rank(lengths, tokens, world):
    shares = [dealt(Batches(lengths, tokens, seed=None), rank, world) for rank in range(world)]
    everything = [i for share in shares for batch in share for i in batch]
    assert sorted(everything) == list(range(len(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1
    assert len(lengths) < world or min(map(len, shares)) >= 1
    for batch in itertools.chain(*shares):
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= tokens
    alone = dealt(Batches(lengths, tokens, seed=None))
    assert [lengths[i] for batch in alone for i in batch] == sorted(lengths, reverse=True)
    for batch, (following, *_) in itertools.pairwise(alone):  # as large as they can be
        assert (len(batch) + 1) * max(lengths[i] for i in [*batch, following]) > tokens


def test_a_loader_hands_out_indices_with_their_examples():
    stand = Stand()
    seen = []
    for batch in stand.batches():
        assert batch["inputs"]["input_ids"].shape[0] == len(batch["index"]) <= 8
        for row, index in enumerate(batch["index"].tolist()):
            tokens = stand.data.train.examples[index]["tokens"]
            assert batch["inputs"]["input_ids"][row, : len(tokens)].tolist() == tokens
            assert int(batch["inputs"]["attention_mask"][row].sum()) == len(tokens)
            seen.append(index)
    assert sorted(seen) == list(range(37))
    (batch,) = stand.batches(stand.data.tests["many"])
    assert sorted(batch["index"].tolist()) == list(range(70))


def test_a_batch_is_cut_for_accumulation():
    config = make_config(batch_size=12, micro_batch_size=5)
    stand = Stand()
    found = loader(stand.data.train, stand.data, config, train=True)
    sizes = [len(batch["index"]) for batch in found]
    assert len(found) == len(sizes) == 9  # batches of 12, 12 and 12; the last example can't be cut in three
    assert sizes == [4] * 9


@pytest.mark.parametrize("batch_size,devices,nodes", [(8, 3, 1), (6, 2, 2), (1, 2, 1)])
def test_a_batch_that_devices_can_t_share_is_refused(batch_size, devices, nodes):
    config = make_config(batch_size=batch_size, devices=devices, num_nodes=nodes)
    with pytest.raises(UsageError, match=f"--batch-size {batch_size} can't be divided over {devices * nodes}"):
        train.check_batch_size(config)
    train.check_batch_size(make_config(batch_size=8, devices=2, num_nodes=2))


# --- how a stage optimises ---


@given(warmup=st.floats(0, 0.99), total=st.integers(1, 300))
def test_the_rate_rises_to_one_and_falls_to_zero(warmup, total):
    schedule = make_schedule(1.0, 1.0, 0.0, warmup, 0.0)
    factors = [schedule.factor(step, total) for step in range(total + 1)]
    rising = max(1, round(warmup * total))
    assert all(0 < factor <= 1 + 1e-12 for factor in factors[:-1])
    assert factors[:rising] == pytest.approx([(step + 1) / rising for step in range(rising)])
    assert all(one >= other for one, other in itertools.pairwise(factors[rising - 1 :]))
    if rising < total:
        assert factors[-1] == pytest.approx(0, abs=1e-12)


def test_the_rate_by_hand():
    schedule = make_schedule(1.0, 1.0, 0.0, 0.2, 0.0)
    found = [schedule.factor(step, 10) for step in range(11)]
    falling = [0.5 * (1 + math.cos(math.pi * i / 8)) for i in range(9)]
    assert found == pytest.approx([0.5, 1.0, *falling], abs=1e-12)


def test_biases_norms_and_maps_do_not_decay():
    stand = Stand(attn="hedgehog")
    stand.model.bert.pooler.dense.weight.requires_grad_(False)
    decayed, free = stand.stage().trained()
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.1, 0.0)
    names = {id(p): name for name, p in stand.model.named_parameters()}
    in_free = {names[id(p)] for p in free["params"]}
    in_decayed = {names[id(p)] for p in decayed["params"]}
    maps = {id(p) for p in hosts.attention_parameters(stand.model)}
    assert len(maps) == 4
    assert in_decayed == {
        name
        for name, p in stand.model.named_parameters()
        if name.endswith("weight") and "Norm" not in name and id(p) not in maps and "pooler.dense" not in name
    }
    assert in_free == {name for name, p in stand.model.named_parameters() if p.requires_grad} - in_decayed
    assert {names[i] for i in maps} <= in_free
    (group,) = TransferStage(stand.model, SCHEDULE).trained()
    assert {id(p) for p in group["params"]} == maps
    assert group["weight_decay"] == 0


def test_what_a_module_says_of_its_own_parameters_is_honoured():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, bias=False))
    model[0].optimizer_settings = {
        "weight": OptimizerSettings(max_lr=1e-3),
        "bias": OptimizerSettings(max_lr=1.0, weight_decay=0.5),
    }
    schedule = dataclasses.replace(SCHEDULE, lr=1e-2, weight_decay=0.1)
    model = copy.deepcopy(model)
    groups = parameter_groups(model, model.parameters(), schedule)
    found = {id(p): (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}
    assert found == {
        id(model[0].weight): (1e-3, 0.0),
        id(model[0].bias): (1e-2, 0.5),
        id(model[1].weight): (1e-2, 0.1),
    }


def test_the_optimizer_gives_a_state_space_model_its_own_rate(tmp_path):
    """Of the run's 1e-2, H3's dt, A and B learn at 1e-3 and don't decay; its projections are weights like others."""
    stand = Stand(attn="h3")
    stage = stand.stage()
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in stage.trained() for p in g["params"]}
    found = {name: rates[id(p)] for name, p in stand.model.named_parameters() if ".mixer." in name}
    own = {name for name, rate in found.items() if rate == (1e-3, 0.0)}
    assert {name.rpartition(".")[2] for name in own} == {"log_dt", "log_A_real", "A_imag", "B"}
    assert {found[name] for name in found if name.endswith("_proj.weight")} == {(1e-2, 0.1)}
    before = {name: p.detach().clone() for name, p in stand.model.named_parameters() if ".mixer." in name}
    report = stand.fit(tmp_path, stage, validate=False)
    moved = {name: (p - before[name]).abs().max() for name, p in stand.model.named_parameters() if name in before}
    # The first of Adam's steps is as long as its rate, and no later one is much longer.
    assert all(0 < moved[name] < 1.5e-3 * report.steps for name in own)
    assert max(moved[name] for name in found if name.endswith("_proj.weight")) > max(moved[name] for name in own)


def test_a_step_divides_by_the_number_of_examples(tmp_path):
    """The first gradient is that of the mean loss of the first batch, before it is clipped."""
    stand = Stand()
    twin = copy.deepcopy(stand.model).train()
    stage = stand.stage()
    stand.fit(tmp_path, stage, validate=False)
    (first,) = {tuple(stand.task.seen[0])}
    batch = stand.data.collate([stand.data.train.examples[i] for i in first])
    cross_entropy(twin(**batch["inputs"]).logits, batch["labels"]).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(stage.gradients[0][name], parameter.grad, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["train", "transfer"])
def test_accumulated_parts_make_the_same_step(kind, tmp_path):
    stages = []
    for micro in (None, 2):
        stand = Stand(train_examples=32, micro_batch_size=micro)
        alike = [{"tokens": (e["tokens"] * LONGEST)[:5], "label": e["label"]} for e in stand.data.train.examples]
        stand.data = dataclasses.replace(stand.data, train=Split(alike, [5] * 32))
        stages.append(stand.stage() if kind == "train" else RecordedTransfer(stand.model, SCHEDULE))
        report = stand.fit(tmp_path / str(micro), stages[-1], validate=kind == "train")
        assert report.steps == len(stages[-1].steps) == 4
        assert report.tokens == 32 * 5
        assert len(stand.batches()) == (4 if micro is None else 16)
    for one, other in zip(stages[0].gradients, stages[1].gradients, strict=True):
        for name in one:
            torch.testing.assert_close(one[name], other[name], atol=1e-5, rtol=1e-4)


# --- fitting ---


def test_training_learns(tmp_path):
    stand = Stand(train_examples=200)
    report = stand.fit(tmp_path, stand.stage(make_schedule(1e-2, 4.0, 0.0, 0.1, 1.0)))
    assert report.validation >= 0.9
    assert (report.steps, report.tokens) == (100, 4 * sum(stand.data.train.lengths))
    assert report.seconds > 0
    assert not list(tmp_path.glob("*.ckpt"))


@pytest.mark.parametrize("dataset,name", [("contrary", "accuracy"), ("contrary loss", "loss")])
def test_the_best_epoch_is_kept(dataset, name, tmp_path):
    stand = Stand(dataset=dataset, train_examples=80)
    stage = stand.stage(make_schedule(1e-2, 4.0, 0.0, 0.0, 1.0))
    report = stand.fit(tmp_path, stage)
    scores = [found[name] for found in stage.validations]
    assert len(scores) == 4
    best = max(scores) if name == "accuracy" else min(scores)
    assert abs(scores[-1] - best) > 0.1  # the last epoch is worse
    assert report.validation == pytest.approx(best, abs=1e-6)
    found, _ = evaluate(stand.stage(), stand.batches(stand.data.validation), stand.config, title="test")
    assert found[name] == pytest.approx(best, abs=1e-6)


def test_without_validation_the_last_weights_stay(tmp_path):
    stand = Stand(dataset="contrary", train_examples=80)
    stage = stand.stage(make_schedule(1e-2, 4.0, 0.0, 0.0, 1.0))
    report = stand.fit(tmp_path, stage, validate=False)
    assert report.validation is None
    assert stage.validations == []
    found, _ = evaluate(stand.stage(), stand.batches(stand.data.validation), stand.config, title="test")
    assert found["accuracy"] < 0.3


@pytest.mark.parametrize("epochs,expected", [(0.3, [2]), (1, [5]), (1.5, [4, 8]), (2, [5, 10]), (2.1, [4, 8, 12])])
def test_every_begun_epoch_ends_with_a_validation(epochs, expected, tmp_path):
    stand = Stand()
    stage = stand.stage(make_schedule(1e-3, epochs, 0.0, 0.1, 1.0))
    report = stand.fit(tmp_path, stage)
    assert [found["step"] for found in stage.validations] == expected
    assert report.steps == len(stage.steps) == expected[-1]
    assert [found["examples"] for found in stage.validations] == [40] * len(expected)
    factors = [stage.schedule.factor(step, report.steps) for step in range(report.steps)]
    assert stage.rates == pytest.approx([1e-3 * factor for factor in factors])  # the schedule ends with the stage


def test_epochs_differ_in_their_order(tmp_path):
    stand = Stand()
    stand.fit(tmp_path, stand.stage(make_schedule(1e-3, 2.0, 0.0, 0.1, 1.0)))
    first, second = stand.task.seen[:5], stand.task.seen[5:]
    assert first != second
    assert sorted(itertools.chain(*first)) == sorted(itertools.chain(*second)) == list(range(37))
    again = Stand()
    again.fit(tmp_path, again.stage(make_schedule(1e-3, 2.0, 0.0, 0.1, 1.0)))
    assert again.task.seen == stand.task.seen
    for one, other in zip(stand.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(one, other)


def test_no_epochs_change_nothing(tmp_path):
    stand = Stand()
    before = copy.deepcopy(stand.model.state_dict())
    report = stand.fit(tmp_path, stand.stage(make_schedule(1e-3, 0.0, 0.0, 0.1, 1.0)))
    assert report == train.StageReport(0.0, 0, 0, None)
    assert all(torch.equal(tensor, before[name]) for name, tensor in stand.model.state_dict().items())


@pytest.mark.parametrize("factor", [math.nan, math.inf])
def test_a_loss_that_is_no_number_ends_the_run_with_its_step(factor, tmp_path):
    stand = Stand()
    stand.task.at[3] = factor
    with pytest.raises(HHBenchError, match=rf"the loss is {factor} at step 3: try a lower --lr"):
        stand.fit(tmp_path)


@pytest.mark.parametrize(
    "broken,message",
    [
        ("query.weight", r"softmax at layer bert\.encoder\.layer\.1\.attention\.self of the teacher gave NaN"),
        ("hhbench_slot.attention.key_map.weight", "the transfer loss is nan at step 2: try a lower --transfer-lr"),
    ],
)
def test_a_transfer_that_is_no_number_ends_before_the_step(broken, message, tmp_path):
    stand = Stand()
    stage = RecordedTransfer(stand.model, SCHEDULE)
    weight = stand.model.bert.encoder.layer[1].attention.self.get_parameter(broken)
    kept = {}

    def break_at_two(batch: Batch, batch_idx: int) -> None:
        if batch_idx == 2:
            weight.data.fill_(math.nan)
            kept.update({id(p): p.detach().clone() for p in hosts.attention_parameters(stand.model)})

    stage.on_train_batch_start = break_at_two
    with pytest.raises(HHBenchError, match=message):
        stand.fit(tmp_path, stage, validate=False)
    for parameter in hosts.attention_parameters(stand.model):
        torch.testing.assert_close(parameter.detach(), kept[id(parameter)], rtol=0, atol=0, equal_nan=True)


def test_an_interrupted_stage_goes_on_from_its_last_step(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole_stage = whole.stage(schedule)
    whole.fit(tmp_path / "whole", whole_stage)

    stand = Stand()
    stand.task.at[5] = KeyboardInterrupt()  # the first batch of the second epoch
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule))
    assert (tmp_path / "cut" / "last.ckpt").exists()

    resumed = Stand(resume=True)
    stage = resumed.stage(schedule)
    report = resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [5, 6, 7, 8, 9]
    assert report.steps == 10
    assert stage.rates == pytest.approx(whole_stage.rates[5:])
    assert resumed.task.seen == whole.task.seen[5:]
    assert [found["step"] for found in stage.validations] == [10]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)
    assert not list((tmp_path / "cut").glob("*.ckpt"))


def test_a_stage_interrupted_in_mid_epoch_sees_the_rest_of_it(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole.fit(tmp_path / "whole", whole.stage(schedule))
    stand = Stand()
    stand.task.at[7] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule))
    resumed = Stand(resume=True)
    stage = resumed.stage(schedule)
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [7, 8, 9]
    assert resumed.task.seen == whole.task.seen[7:]


@pytest.mark.parametrize("cuts", [(2, 5, 8), (4, 4, 9)])
def test_a_stage_may_be_interrupted_again_and_again(cuts, tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole_stage = whole.stage(schedule)
    whole.fit(tmp_path / "whole", whole_stage)
    seen, validations, done = [], [], 0
    for cut in (*cuts, None):
        stand = Stand(resume=True)
        if cut is not None:
            stand.task.at[cut - done] = KeyboardInterrupt()
        stage = stand.stage(schedule)
        with contextlib.nullcontext() if cut is None else pytest.raises(KeyboardInterrupt):
            stand.fit(tmp_path / "cut", stage)
        seen += stand.task.seen if cut is None else stand.task.seen[:-1]
        validations += [found["step"] for found in stage.validations]
        done = len(seen)
    assert seen == whole.task.seen
    assert validations == [found["step"] for found in whole_stage.validations]
    for one, other in zip(stand.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def test_an_interrupted_transfer_goes_on(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.0, 0.1, 0.0)
    whole = Stand()
    whole.fit(tmp_path / "whole", RecordedTransfer(whole.model, schedule), validate=False)
    steps = []
    for cut in (3, None):
        stand = Stand(resume=True)
        stage = RecordedTransfer(stand.model, schedule)
        if cut is not None:
            stage.on_train_batch_start = interrupt_at(cut)
        with contextlib.nullcontext() if cut is None else pytest.raises(KeyboardInterrupt):
            stand.fit(tmp_path / "cut", stage, validate=False)
        steps += stage.steps
    assert steps == list(range(10))
    for one, other in zip(stand.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def interrupt_at(step: int) -> Any:
    def hook(batch: Batch, batch_idx: int) -> None:
        if batch_idx == step:
            raise KeyboardInterrupt

    return hook


def test_a_stage_interrupted_while_it_validates_goes_on(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole.fit(tmp_path / "whole", whole.stage(schedule))
    stand = Stand()
    stage = stand.stage(schedule)
    stage.on_validation_batch_start = interrupt_at(0)
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stage)
    resumed = Stand(resume=True)
    stage = resumed.stage(schedule)
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [5, 6, 7, 8, 9]
    assert resumed.task.seen == whole.task.seen[5:]
    assert stage.validations[-1]["step"] == 10


def test_an_interrupted_stage_is_not_continued_unasked(tmp_path):
    stand = Stand()
    stand.task.at[3] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path)
    again = Stand()
    stage = again.stage()
    again.fit(tmp_path, stage)
    assert stage.steps == [0, 1, 2, 3, 4]


# --- checkpoints ---


def assert_equal(one: nn.Module, other: nn.Module) -> None:
    for (name, found), expected in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(found, expected), name


def cut_off(stand: Stand, folder: Path, stage: Any, *, at: int, **arguments: Any) -> dict[str, Any]:
    """Fit until Ctrl-C before that batch; the checkpoint that is left."""
    stage.on_train_batch_start = interrupt_at(at)
    with pytest.raises(KeyboardInterrupt):
        stand.fit(folder, stage, **arguments)
    return torch.load(folder / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_checkpoint_is_written_now_and_then(seconds, monkeypatch, tmp_path):
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", seconds)
    stand, steps = Stand(micro_batch_size=4), []
    stage = stand.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0))

    def note(batch: Batch, batch_idx: int) -> None:
        last = tmp_path / "last.ckpt"
        steps.append(torch.load(last, weights_only=True)["global_step"] if last.exists() else None)
        assert not last.with_suffix(".part").exists()

    stage.on_train_batch_start = note
    report = stand.fit(tmp_path, stage)
    assert report.steps == 10
    if seconds:
        assert steps == [None] * 20
    else:  # before each step but the first, and not in the midst of one
        assert steps == [None, None, *(step for step in range(1, 10) for _ in range(2))]
    assert [found["step"] for found in stage.validations] == [5, 10]
    assert not list(tmp_path.glob("*.ckpt")) + list(tmp_path.glob("*.part"))
    plain = Stand(micro_batch_size=4)
    plain.fit(tmp_path, plain.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)))
    assert_equal(stand.model, plain.model)  # writing one changes nothing


def test_a_checkpoint_of_transfer_holds_the_maps_alone(tmp_path):
    stand = Stand()
    kept = cut_off(stand, tmp_path, RecordedTransfer(stand.model, SCHEDULE), at=2, validate=False)
    maps = {id(p) for p in hosts.attention_parameters(stand.model)}
    names = {f"model.{name}" for name, p in stand.model.named_parameters() if id(p) in maps}
    assert kept["state_dict"].keys() == names
    assert len(kept["optimizer_states"][0]["state"]) == len(names) == 4
    size = sum(p.numel() * 4 for p in hosts.attention_parameters(stand.model))
    assert (tmp_path / "last.ckpt").stat().st_size < 3 * size + 30_000


def test_checkpoints_hold_nothing_that_is_frozen(tmp_path):
    """As with LoRA: a part is trained. Buffers are kept whatever they are."""
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)

    def make(**changes: Any) -> Stand:
        stand = Stand(attn="performer", **changes)
        for name, parameter in stand.model.named_parameters():
            parameter.requires_grad_(name.startswith("classifier"))
        return stand

    whole = make()
    before = copy.deepcopy(whole.model.state_dict())
    whole.fit(tmp_path / "whole", whole.stage(schedule))
    stand = make()
    kept = cut_off(stand, tmp_path / "cut", stand.stage(schedule), at=3)
    shared = stand.model.named_buffers(remove_duplicate=False)  # performer's two maps are one
    buffers = {f"model.{name}" for name, _ in shared if name in before}
    assert buffers
    assert kept["state_dict"].keys() == {"model.classifier.weight", "model.classifier.bias"} | buffers

    resumed = make(resume=True)
    stage, best = resumed.stage(schedule), []
    end = stage.on_train_batch_end

    def note(*args: Any) -> None:
        if (tmp_path / "cut" / "best.ckpt").exists():
            best.append(torch.load(tmp_path / "cut" / "best.ckpt", weights_only=True)["state_dict"].keys())
        end(*args)

    stage.on_train_batch_end = note
    resumed.fit(tmp_path / "cut", stage)
    assert best
    assert all(names == kept["state_dict"].keys() for names in best)
    assert_equal(resumed.model, whole.model)


@pytest.mark.parametrize("attn", ["t2r", "elu"])
def test_a_checkpoint_of_another_model_is_refused(attn, tmp_path):
    stand = Stand()
    cut_off(stand, tmp_path, stand.stage(), at=2)
    other = Stand(attn=attn, resume=True)
    with pytest.raises(HHBenchError, match="another model or of other settings: run without --resume"):
        other.fit(tmp_path, other.stage())


@pytest.mark.parametrize("at", [2, 5, 7])
def test_what_is_dropped_out_after_a_resumption_is_what_would_have_been(at, tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand(dropout=0.3)
    whole.fit(tmp_path / "whole", whole.stage(schedule), validate=False)
    stand = Stand(dropout=0.3)
    stand.task.at[at] = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule), validate=False)
    resumed = Stand(dropout=0.3, resume=True)
    resumed.fit(tmp_path / "cut", resumed.stage(schedule), validate=False)
    assert_equal(resumed.model, whole.model)


@pytest.mark.parametrize("kind", ["train", "transfer"])
def test_a_step_cut_off_between_its_parts_is_taken_whole(kind, tmp_path):
    def make(**changes: Any) -> tuple[Stand, Any]:
        stand = Stand(train_examples=32, micro_batch_size=2, **changes)
        return stand, stand.stage() if kind == "train" else RecordedTransfer(stand.model, SCHEDULE, "both", 3)

    validate = kind == "train"
    whole, stage = make()
    whole.fit(tmp_path / "whole", stage, validate=validate)
    stand, stage = make()
    kept = cut_off(stand, tmp_path / "cut", stage, at=6, validate=validate)  # the third part of the second step
    assert kept["global_step"] == 1
    resumed, stage = make(resume=True)
    stage_report = resumed.fit(tmp_path / "cut", stage, validate=validate)
    assert stage_report.steps == 4
    assert stage.steps == [1, 2, 3]
    assert_equal(resumed.model, whole.model)


def test_a_terminated_stage_goes_on(tmp_path):
    """SIGTERM, as a cluster sends it: the step is finished, then the checkpoint is written."""
    whole = Stand()
    whole.fit(tmp_path / "whole", whole.stage())
    stand = Stand()
    stage = stand.stage()

    def terminate(batch: Batch, batch_idx: int) -> None:
        if batch_idx == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stage.on_train_batch_start = terminate
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stage)
    assert torch.load(tmp_path / "cut" / "last.ckpt", weights_only=True)["global_step"] == 3
    resumed = Stand(resume=True)
    stage = resumed.stage()
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [3, 4]
    assert_equal(resumed.model, whole.model)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(train, "SECONDS_BETWEEN_CHECKPOINTS", 0.0)
    stand = Stand()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        report = stand.fit(tmp_path, validate=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert report.steps == 5
    assert f"{tmp_path / 'last.ckpt'} can't be written" in caplog.text
    assert not list(tmp_path.iterdir())
    plain = Stand()
    plain.fit(tmp_path, validate=False)
    assert_equal(stand.model, plain.model)


KILLED = {
    "train": {"dropout": 0.3},
    "transfer": {},
}


def make_killed(kind: str, **changes: Any) -> tuple[Stand, Any]:
    stand = Stand(**KILLED[kind], **changes)
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    stage = stand.stage(schedule) if kind == "train" else RecordedTransfer(stand.model, schedule, "weights", 3)
    return stand, stage


def fit_until_killed(kind: str, folder: str) -> None:
    """What the process that is killed runs: it stands still in its eighth step."""
    train.SECONDS_BETWEEN_CHECKPOINTS = 0.0
    stand, stage = make_killed(kind)

    def wait(batch: Batch, batch_idx: int) -> None:
        if stage.global_step == 7:
            Path(folder, "ready").touch()
            time.sleep(600)

    stage.on_train_batch_start = wait
    stand.fit(Path(folder), stage, validate=kind == "train")


def test_a_killed_stage_ends_where_it_would_have(tmp_path):
    """kill -9 of a real process in mid-epoch; then the same weights, bit for bit, as without it."""
    children = {}
    for kind in KILLED:
        (tmp_path / kind).mkdir()
        code = f"from test_train import fit_until_killed; fit_until_killed({kind!r}, {str(tmp_path / kind)!r})"
        children[kind] = subprocess.Popen([sys.executable, "-c", code], env=child_environment())
    try:
        for kind, child in children.items():
            for _ in range(1200):
                if (tmp_path / kind / "ready").exists() or child.poll() is not None:
                    break
                time.sleep(0.1)
            assert child.poll() is None, kind
            child.kill()
            assert child.wait(60) == -signal.SIGKILL
    finally:
        for child in children.values():
            child.kill()
    for kind in KILLED:
        assert torch.load(tmp_path / kind / "last.ckpt", weights_only=True)["global_step"] == 7
        whole, stage = make_killed(kind)
        whole.fit(tmp_path / "whole", stage, validate=kind == "train")
        resumed, stage = make_killed(kind, resume=True)
        resumed.fit(tmp_path / kind, stage, validate=kind == "train")
        assert stage.steps == [7, 8, 9]
        assert_equal(resumed.model, whole.model)


# --- evaluation ---


def test_evaluation_counts_every_example_once():
    stand = Stand()
    for name, split in stand.data.tests.items():
        metrics, scores = evaluate(stand.stage(), stand.batches(split), stand.config, title=name)
        assert metrics["examples"] == len(split)
        assert sorted(scores) == list(range(len(split)))
        assert metrics["loss"] == pytest.approx(sum(scores.values()) / len(split), abs=1e-6)
        example = stand.data.collate([split.examples[3]])
        with torch.no_grad():
            loss = stand.task.step(stand.model.eval(), example | {"index": torch.tensor([3])}).loss
        assert scores[3] == pytest.approx(float(loss), abs=1e-5)


class Narrow(Tiny):
    """Has memory for so many tokens, as a GPU has."""

    room = 50

    def __init__(self) -> None:
        super().__init__()
        self.tried: list[int] = []

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        self.tried.append(batch["num_tokens"])
        if batch["num_tokens"] > self.room:
            raise torch.OutOfMemoryError("no room")
        return super().step(model, batch)


@pytest.mark.parametrize("during", ["test", "fit"])
def test_what_memory_has_no_room_for_is_evaluated_in_halves(during, tmp_path):
    stand, narrow = Stand(), Stand()
    narrow.task = Narrow()
    split = stand.data.tests["many"]
    if during == "test":
        expected, found = (
            evaluate(one.stage(), one.batches(split), one.config, title="test") for one in (stand, narrow)
        )
        assert sorted(found[1]) == list(range(70))
        assert found[1] == pytest.approx(expected[1], abs=1e-6)
        assert found[0] == pytest.approx(expected[0], abs=1e-6)
        assert sum(tokens for tokens in narrow.task.tried if tokens <= 50) == sum(split.lengths)
        failed = [tokens for tokens in narrow.task.tried if tokens > 50]
        assert failed[0] == sum(split.lengths)
        assert all(
            later <= earlier / 2 for earlier, later in itertools.pairwise(failed)
        )  # none as large is tried again
        return
    narrow.task.room = max(batch["num_tokens"] for batch in narrow.batches())  # of a training batch
    stand.fit(tmp_path / "wide", wide := stand.stage())
    narrow.fit(tmp_path / "narrow", stage := narrow.stage())
    assert len(stage.validations) == 1
    assert stage.validations[0] == pytest.approx(wide.validations[0], abs=1e-6)
    assert_equal(stand.model, narrow.model)


def test_an_example_too_large_for_memory_ends_the_evaluation():
    stand = Stand()
    stand.task = Narrow()
    stand.task.room = 1
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(stand.stage(), stand.batches(stand.data.tests["few"]), stand.config, title="test")


def test_evaluations_fill_a_budget_of_tokens(monkeypatch):
    stand, longest = Stand(), LONGEST
    split = stand.data.tests["many"]
    for micro, most, budget in [(None, 30, 30), (8, 30, 30), (1, 1000, 4 * longest)]:
        monkeypatch.setitem(train.EVALUATED_TOKENS, "cpu", most)
        stand.config = dataclasses.replace(stand.config, micro_batch_size=micro)
        shapes = [batch["inputs"]["input_ids"].shape for batch in stand.batches(split)]
        assert max(rows * columns for rows, columns in shapes) <= budget
        assert min(rows * columns for rows, columns in shapes[:-1]) > budget - 2 * longest
        assert [columns for _, columns in shapes] == sorted((c for _, c in shapes), reverse=True)


# --- what is shown ---


def test_curves_hold_losses_and_validations(tmp_path):
    stand = Stand(logger="csv")
    stage = stand.stage(make_schedule(1e-2, 4.0, 0.1, 0.1, 1.0))
    losses = []
    original = stage.note

    def note(name: str, loss: Tensor, batch_idx: int) -> None:
        losses.append(float(loss))
        original(name, loss, batch_idx)

    stage.note = note
    stand.fit(tmp_path, stage)
    with (tmp_path / "curves" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    written = {int(row["step"]): float(row["train/loss"]) for row in rows if row["train/loss"]}
    assert written == pytest.approx({step: losses[step] for step in range(1, 20, 2)})  # a tenth of 20 steps apart
    assert [int(row["step"]) for row in rows if row["val/accuracy"]] == [4, 9, 14, 19]


@pytest.mark.parametrize("kind", ["train", "transfer"])
def test_a_long_stage_says_how_far_it_is(kind, monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    stand = Stand()
    stage = stand.stage() if kind == "train" else TransferStage(stand.model, SCHEDULE)
    with caplog.at_level("INFO", logger="hhbench"):
        stand.fit(tmp_path, stage, validate=kind == "train")
    lines = [line for line in caplog.messages if line.startswith("test: ")]
    assert [line.split()[1] for line in lines] == [f"{step}/5" for step in range(1, 6)]
    assert lines[-1].endswith(f"loss {float(stage.shown['loss']):.4g}")


# --- transfer ---


def test_a_transfer_stage_trains_the_maps_alone(tmp_path):
    stand = Stand(train_examples=64)
    before = copy.deepcopy(stand.model.state_dict())
    stage = RecordedTransfer(stand.model, make_schedule(2e-2, 3.0, 0.1, 0.0, 0.0))
    report = stand.fit(tmp_path, stage, validate=False)
    added = {id(p) for p in hosts.attention_parameters(stand.model)}
    for name, tensor in stand.model.state_dict(keep_vars=True).items():
        assert torch.equal(tensor, before[name]) == (id(tensor) not in added), name
    assert report.steps == len(stage.steps) == 24
    assert report.tokens == 3 * sum(stand.data.train.lengths)
    assert stage.rates[0] == 2e-2
    assert stage.rates[-1] < 1e-3


def test_a_transfer_step_is_the_mean_over_layers_and_queries(tmp_path):
    stand = Stand()
    twin = copy.deepcopy(stand.model).eval()
    stage = RecordedTransfer(stand.model, SCHEDULE)
    stand.fit(tmp_path, stage, validate=False)
    batch = next(iter(stand.batches()))
    losses = {name: TransferLoss(weight=1 / (2 * batch["num_tokens"])) for name in hosts.slots(twin)}
    with torch.no_grad(), intercepted(twin, dict(losses)):
        train.encode(twin, batch["inputs"])
    for name, parameter in twin.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(stage.gradients[0][name], parameter.grad, atol=1e-6, rtol=1e-5)
    assert len(stage.gradients[0]) == 4


def test_a_transfer_stage_samples_by_seed_and_step(tmp_path):
    """The same draws each time; others with another seed; and not all queries."""

    def trained(seed: int, queries: int) -> Tensor:
        stand = Stand()
        torch.manual_seed(seed)
        stand.fit(tmp_path, RecordedTransfer(stand.model, SCHEDULE, "weights", queries), validate=False)
        return torch.cat([p.detach().flatten() for p in hosts.attention_parameters(stand.model)])

    first = trained(0, 3)
    assert torch.equal(first, trained(0, 3))
    assert not torch.equal(first, trained(1, 3))
    assert not torch.equal(first, trained(0, 0))
    assert torch.equal(trained(0, 0), trained(1, 0))


def test_layers_with_nothing_to_learn_count_for_nothing(tmp_path):
    """A layer kept as softmax: the other's gradient is that of its own mean."""
    stand = Stand()
    kept, taught = hosts.slots(stand.model)
    hosts.slots(stand.model)[kept].attention.requires_grad_(False)
    twin = copy.deepcopy(stand.model).eval()
    stage = RecordedTransfer(stand.model, SCHEDULE)
    assert stage.taught == [taught]
    stand.fit(tmp_path, stage, validate=False)
    batch = next(iter(stand.batches()))
    losses = {kept: TransferLoss(), taught: TransferLoss(weight=1 / batch["num_tokens"])}
    with torch.no_grad(), intercepted(twin, dict(losses)):
        train.encode(twin, batch["inputs"])
    assert len(stage.gradients[0]) == 2
    for name, gradient in stage.gradients[0].items():
        torch.testing.assert_close(gradient, twin.get_parameter(name).grad, atol=1e-6, rtol=1e-5)
    with pytest.raises(HHBenchError, match="no layer has anything to learn"):
        TransferStage(Stand(attn="elu").model, SCHEDULE)


# --- two processes ---


def record(folder: Path, devices: int) -> dict[str, Any]:
    """Train, transfer and evaluate on so many devices; called in each process."""
    found: dict[str, Any] = {}
    stand = Stand(devices=devices)
    stage = stand.stage(make_schedule(1e-2, 1.0, 0.1, 0.1, 1.0))
    report = stand.fit(folder / "train", stage)
    found["train"] = {"gradients": stage.gradients, "tokens": report.tokens, "validation": report.validation}
    found["train"]["weights"] = copy.deepcopy(stand.model.state_dict())
    for name, split in stand.data.tests.items():
        found[name] = evaluate(stand.stage(), stand.batches(split), stand.config, title=name)
    stand = Stand(devices=devices)
    transfer = RecordedTransfer(stand.model, make_schedule(1e-2, 1.0, 0.1, 0.1, 1.0))
    report = stand.fit(folder / "transfer", transfer, validate=False)
    found["transfer"] = {"gradients": transfer.gradients, "tokens": report.tokens, "validation": None}
    found["transfer"]["weights"] = copy.deepcopy(stand.model.state_dict())
    return found


def record_as_rank(folder: str) -> None:
    """What each of two processes runs."""
    from hhbench.cluster import connect

    connect(make_config(devices=2))
    assert train.world_size() == 2
    found = record(Path(folder), 2)
    torch.save(found, Path(folder) / f"rank-{train.rank()}.pt")
    train.barrier()


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        largest = float(other[name].abs().max())
        torch.testing.assert_close(one[name], other[name], atol=1e-5 * max(largest, 1e-3), rtol=0, msg=name)


def child_environment() -> dict[str, str]:
    """Of a process that can import this file."""
    paths = [str(Path(__file__).parent), str(Path(train.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[dict[str, Any]]:
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text("import sys\nfrom test_train import record_as_rank\nrecord_as_rank(sys.argv[1])\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, str(script), str(folder)],
        env=child_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-5000:]
    ranks = [torch.load(folder / f"rank-{rank}.pt", weights_only=True) for rank in range(2)]
    return [record(folder / "one", 1), *ranks]


@pytest.mark.parametrize("stage", ["train", "transfer"])
def test_two_processes_take_the_step_of_one(worlds, stage):
    """Batches of unequal lengths, the last one of an odd number of examples."""
    one, *ranks = (world[stage] for world in worlds)
    for found in ranks:
        assert len(found["gradients"]) == len(one["gradients"]) == 5
        compare(found["gradients"][0], one["gradients"][0])
        assert found["tokens"] == one["tokens"] == sum(Stand().data.train.lengths)
        assert found["validation"] == one["validation"]
    for name, tensor in ranks[0]["weights"].items():
        assert torch.equal(tensor, ranks[1]["weights"][name]), name


@pytest.mark.parametrize("stage", ["train", "transfer"])
def test_two_processes_end_where_one_does(worlds, stage):
    """Five steps of Adam, which magnifies rounding: within a hundredth of a step."""
    one, two, _ = (world[stage]["weights"] for world in worlds)
    moved = 0.0
    start = Stand().model.state_dict()
    for name, tensor in one.items():
        if tensor.is_floating_point():
            moved = max(moved, float((tensor - start[name]).abs().max()))
            torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=0, msg=name)
    assert moved > 1e-2


@pytest.mark.parametrize("split,count", [("many", 70), ("few", 5)])
def test_two_processes_evaluate_every_example_once(worlds, split, count):
    """Three batches for two ranks, and one: some rank has fewer than another, or none."""
    (one_metrics, one_scores), *ranks = (world[split] for world in worlds)
    for metrics, scores in ranks:
        assert metrics["examples"] == one_metrics["examples"] == count
        assert metrics["accuracy"] == one_metrics["accuracy"]
        assert scores.keys() == one_scores.keys() == set(range(count))
        assert metrics["loss"] == pytest.approx(one_metrics["loss"], abs=1e-4)
