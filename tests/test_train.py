"""Training: who gets which examples, what a step is, what is kept, what is shown."""

import contextlib
import copy
import csv
import dataclasses
import itertools
import math
from collections.abc import Iterator
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from stand import (
    LONGEST,
    SCHEDULE,
    RecordedTransfer,
    Stand,
    Tiny,
    assert_equal,
    make_config,
    make_schedule,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hhbench import hosts, progress, train
from hhbench.attention import OptimizerSettings
from hhbench.distill import TransferLoss, intercepted
from hhbench.errors import HHBenchError, UsageError
from hhbench.ranks import Launch
from hhbench.task import Batch, Split, StepOutput
from hhbench.train import Batches, TransferStage, evaluate, loader, parameter_groups

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
            mine = [i for i in itertools.chain(*each[step * divide : (step + 1) * divide]) if i >= 0]
            assert len(mine) in (len(batch) // world, math.ceil(len(batch) / world))
        parts = [share[step * divide + part] for share in shares for part in range(divide)]
        counted = [i for i in itertools.chain(*parts) if i >= 0]
        assert sorted(counted) == sorted(batch)
        assert all(len(part) == 1 and -1 - part[0] in batch for part in parts if part[0] < 0)  # stands for no example
        assert min(map(len, parts)) >= 1
        assert max(map(len, parts)) <= micro
    assert sorted(itertools.chain(*expected)) == list(range(len(lengths)))  # and so on any number of devices


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
    assert len(found) == len(sizes) == 12  # batches of 12, 12, 12 and 1, each in three parts
    assert sorted(sizes) == [1] * 3 + [4] * 9
    assert sum(int((batch["index"] >= 0).sum()) for batch in found) == 37


@pytest.mark.parametrize("batch_size,devices,nodes", [(8, 3, 1), (6, 2, 2), (1, 2, 1)])
def test_a_batch_that_devices_can_t_share_is_refused(batch_size, devices, nodes):
    config = make_config(batch_size=batch_size, devices=devices, num_nodes=nodes)
    with pytest.raises(UsageError, match=f"--batch-size {batch_size} can't be divided over {devices * nodes}"):
        train.check_batch_size(config)
    train.check_batch_size(make_config(batch_size=8, devices=2, num_nodes=2))


@pytest.mark.parametrize(
    ("costly", "on_gpu", "cpus", "devices", "cluster", "expected"),
    [
        (True, True, 8, 1, False, 8),
        (True, True, 8, 4, False, 2),
        (True, True, 8, 4, True, 8),  # srun gave this rank CPUs of its own
        (True, True, 128, 2, False, 16),
        (True, True, 2, 4, False, 1),
        (True, False, 8, 1, False, 0),  # a CPU's cores are the model's
        (False, True, 8, 1, False, 0),
    ],
)
def test_images_for_a_gpu_are_read_by_its_share_of_the_cpus(
    costly, on_gpu, cpus, devices, cluster, expected, monkeypatch
):
    monkeypatch.setattr(train, "_on_cuda", lambda _: on_gpu)
    monkeypatch.setattr(train.os, "sched_getaffinity", lambda _: set(range(cpus)))
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", str(cpus))  # of a job: its ranks may share them
    launch = Launch("Slurm", devices, 0, 0) if cluster else Launch("torchrun", devices, 0, 0)
    monkeypatch.setattr(train, "launched", lambda: launch)
    split = Split([], [], costly=costly)
    assert train.usual_workers(split, make_config(devices=devices)) == expected


def test_who_says_how_many_processes_load_data_gets_them(monkeypatch):
    monkeypatch.setattr(train, "usual_workers", lambda split, config: 16)
    for workers, expected in ((0, 0), (2, 2), (None, 5)):  # five batches have no use for more
        assert Stand(workers=workers, train_examples=20, batch_size=4).batches().num_workers == expected


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
    """Parts of unequal lengths, and a last batch of five examples that can't be cut in four."""
    stages = []
    for micro in (None, 2):
        stand = Stand(micro_batch_size=micro)
        stages.append(stand.stage() if kind == "train" else RecordedTransfer(stand.model, SCHEDULE))
        report = stand.fit(tmp_path / str(micro), stages[-1], validate=kind == "train")
        assert report.steps == len(stages[-1].steps) == 5
        assert report.tokens == sum(stand.data.train.lengths)
        assert len(stand.batches()) == (5 if micro is None else 20)
    for step, (one, other) in enumerate(zip(stages[0].gradients, stages[1].gradients, strict=True)):
        for name in one:
            largest = float(one[name].abs().max())
            torch.testing.assert_close(one[name], other[name], atol=1e-5 * (10**step) * largest, rtol=0)


@pytest.mark.parametrize("cause", ["weights", "output"])
def test_a_loss_that_is_no_number_names_its_layer(cause, tmp_path):
    stand = Stand()
    layer = stand.model.bert.encoder.layer[1].output.dense
    if cause == "weights":
        layer.weight.data[0, 0] = math.nan
        expected = r"the weights bert\.encoder\.layer\.1\.output\.dense\.weight are not finite"
    else:
        layer.register_forward_hook(lambda module, inputs, output: output / 0)
        expected = r"the output of bert\.encoder\.layer\.1\.output\.dense is not finite"
    with pytest.raises(HHBenchError, match=f"the loss is nan at step 0: {expected}"):
        stand.fit(tmp_path)


def test_parameters_without_a_gradient_are_named(tmp_path, caplog):
    stand = Stand()
    stand.model.register_parameter("idle", nn.Parameter(torch.zeros(3)))
    stand.fit(tmp_path, validate=False)
    assert caplog.text.count("1 parameter takes no part in the loss: idle") == 1
    caplog.clear()
    stand = Stand()
    stand.fit(tmp_path, validate=False)
    assert "no part in the loss" not in caplog.text


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
    with pytest.raises(HHBenchError, match=rf"the loss is {factor} at step 3: every layer's output is finite; try"):
        stand.fit(tmp_path)


@pytest.mark.parametrize(
    "broken,message",
    [
        ("query.weight", r"softmax at layer bert\.encoder\.layer\.1\.attention\.self of the teacher gave NaN"),
        (
            "hhbench_slot.attention.key_map.weight",
            r"the transfer loss is nan at step 2: that of bert\.encoder\.layer\.1\.attention\.self is not finite",
        ),
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

    def note(name: str, loss: Tensor, count: float, batch_idx: int) -> None:
        losses.append(float(loss) / count)
        original(name, loss, count, batch_idx)

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
