"""What an interrupted stage goes on from, and that it ends as if nothing had happened."""

import contextlib
import copy
import dataclasses
import multiprocessing
import os
import random
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from stand import (
    LONGEST,
    SCHEDULE,
    VOCAB,
    RecordedTransfer,
    Stand,
    assert_equal,
    child_environment,
    make_schedule,
)

from hhbench import checkpoints, hosts, stopping
from hhbench.errors import HHBenchError
from hhbench.stopping import Stopped
from hhbench.task import Batch, Example, Split


def last(folder: Path) -> dict[str, Any]:
    """The newest checkpoint of a stage."""
    path = checkpoints.newest(folder, "step", ".ckpt")
    assert path is not None
    return checkpoints.load(path)


def test_an_interrupted_stage_goes_on_from_its_last_step(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole_stage = whole.stage(schedule)
    whole.fit(tmp_path / "whole", whole_stage)

    stand = Stand()
    stand.task.at[4] = signal.SIGINT  # the last batch of the first epoch
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule))
    assert last(tmp_path / "cut")["global_step"] == 5

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
    stand.task.at[6] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule))
    resumed = Stand(resume=True)
    stage = resumed.stage(schedule)
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [7, 8, 9]
    assert resumed.task.seen == whole.task.seen[7:]


@pytest.mark.parametrize("cuts", [(2, 5, 8), (4, 5, 9)])
def test_a_stage_may_be_interrupted_again_and_again(cuts, tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand()
    whole_stage = whole.stage(schedule)
    whole.fit(tmp_path / "whole", whole_stage)
    seen, validations, done = [], [], 0
    for cut in (*cuts, None):
        stand = Stand(resume=True)
        if cut is not None:
            stand.task.at[cut - done - 1] = signal.SIGINT
        stage = stand.stage(schedule)
        with contextlib.nullcontext() if cut is None else pytest.raises(KeyboardInterrupt):
            stand.fit(tmp_path / "cut", stage)
        seen += stand.task.seen
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
            stage.on_train_batch_start = interrupt_at(cut - 1)
        with contextlib.nullcontext() if cut is None else pytest.raises(KeyboardInterrupt):
            stand.fit(tmp_path / "cut", stage, validate=False)
        steps += stage.steps
    assert steps == list(range(10))
    for one, other in zip(stand.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)


def interrupt_at(batch_number: int) -> Any:
    def hook(batch: Batch, batch_idx: int) -> None:
        if batch_idx == batch_number:
            os.kill(os.getpid(), signal.SIGINT)

    return hook


def test_a_stage_interrupted_while_it_validates_goes_on(tmp_path):
    schedule = make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)
    whole = Stand(dropout=0.3)
    whole.fit(tmp_path / "whole", whole.stage(schedule))
    stand = Stand(dropout=0.3)
    stage = stand.stage(schedule)
    stage.on_validation_batch_start = interrupt_at(0)
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stage)
    assert [found["step"] for found in stage.validations] == [5]  # whose score may turn out to be the best
    resumed = Stand(dropout=0.3, resume=True)
    stage = resumed.stage(schedule)
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [5, 6, 7, 8, 9]
    assert resumed.task.seen == whole.task.seen[5:]
    assert [found["step"] for found in stage.validations] == [10]
    assert_equal(resumed.model, whole.model)


def test_ctrl_c_once_more_stops_at_once(tmp_path):
    """In the midst of a step there is nothing to keep: the last checkpoint is."""
    stand = Stand(checkpoint_minutes=0.0)
    stage = stand.stage()

    def interrupt_twice(batch: Batch, batch_idx: int) -> None:
        for _ in range(2 * (batch_idx == 2)):
            os.kill(os.getpid(), signal.SIGINT)

    stage.on_train_batch_start = interrupt_twice
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path, stage)
    assert stage.steps == [0, 1]
    assert last(tmp_path)["global_step"] == 2
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_in_the_last_step_ends_what_comes_after_the_stage(tmp_path):
    stand = Stand()
    stand.task.at[4] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path)
    assert checkpoints.load_finished(tmp_path) is not None


def test_an_interrupted_stage_is_not_continued_unasked(tmp_path):
    stand = Stand()
    stand.task.at[2] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path)
    again = Stand()
    stage = again.stage()
    again.fit(tmp_path, stage)
    assert stage.steps == [0, 1, 2, 3, 4]


# --- checkpoints ---


def cut_off(stand: Stand, folder: Path, stage: Any, *, at: int, **arguments: Any) -> dict[str, Any]:
    """Fit until Ctrl-C before that batch; the checkpoint that is left."""
    stage.on_train_batch_start = interrupt_at(at - 1)
    with pytest.raises(KeyboardInterrupt):
        stand.fit(folder, stage, **arguments)
    return last(folder)


@pytest.mark.parametrize("seconds", [0.0, 1e6])
def test_a_checkpoint_is_written_now_and_then(seconds, tmp_path):
    stand, steps = Stand(micro_batch_size=4, checkpoint_minutes=seconds / 60), []
    stage = stand.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0))

    def note(batch: Batch, batch_idx: int) -> None:
        kept = sorted(tmp_path.glob("step-*.ckpt"))
        steps.append(last(tmp_path)["global_step"] if kept else None)
        assert len(kept) <= checkpoints.KEPT
        assert not list(tmp_path.glob(".*.part"))

    stage.on_train_batch_start = note
    report = stand.fit(tmp_path, stage)
    assert report.steps == 10
    if seconds:
        assert steps == [None] * 20
    else:  # before each step but the first, and not in the midst of one
        assert steps == [None, None, *(step for step in range(1, 10) for _ in range(2))]
    assert [found["step"] for found in stage.validations] == [5, 10]
    assert not list(tmp_path.glob("*.ckpt")) + list(tmp_path.glob(".*.part"))
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
    (path,) = tmp_path.glob("step-*.ckpt")
    assert path.stat().st_size < 3 * size + 40_000


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

    (best,) = (state for name, state in kept["callbacks"].items() if "_Best" in name)
    assert best["weights"] == {}
    resumed = make(resume=True)
    kept = cut_off(resumed, tmp_path / "cut", resumed.stage(schedule), at=1)  # in the second epoch
    (best,) = (state for name, state in kept["callbacks"].items() if "_Best" in name)
    assert best["weights"].keys() == kept["state_dict"].keys()
    resumed = make(resume=True)
    resumed.fit(tmp_path / "cut", resumed.stage(schedule))
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
    stand.task.at[at - 1] = signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
        stand.fit(tmp_path / "cut", stand.stage(schedule), validate=False)
    resumed = Stand(dropout=0.3, resume=True)
    resumed.fit(tmp_path / "cut", resumed.stage(schedule), validate=False)
    assert_equal(resumed.model, whole.model)


@pytest.mark.parametrize("kind", ["train", "transfer"])
def test_a_step_that_is_interrupted_between_its_parts_is_taken_whole(kind, tmp_path):
    def make(**changes: Any) -> tuple[Stand, Any]:
        stand = Stand(train_examples=32, micro_batch_size=2, **changes)
        return stand, stand.stage() if kind == "train" else RecordedTransfer(stand.model, SCHEDULE, "both", 3)

    validate = kind == "train"
    whole, stage = make()
    whole.fit(tmp_path / "whole", stage, validate=validate)
    stand, stage = make()
    kept = cut_off(stand, tmp_path / "cut", stage, at=6, validate=validate)  # the third part of the second step
    assert kept["global_step"] == 2
    resumed, stage = make(resume=True)
    stage_report = resumed.fit(tmp_path / "cut", stage, validate=validate)
    assert stage_report.steps == 4
    assert stage.steps == [2, 3]
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
    with pytest.raises(Stopped, match="stopped by a signal after step 3"):
        stand.fit(tmp_path / "cut", stage)
    assert last(tmp_path / "cut")["global_step"] == 3
    resumed = Stand(resume=True)
    stage = resumed.stage()
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == [3, 4]
    assert_equal(resumed.model, whole.model)


def test_a_full_disk_costs_the_checkpoint_and_not_the_run(tmp_path, caplog):
    stand = Stand(checkpoint_minutes=0.0)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, hard))
    try:
        report = stand.fit(tmp_path, validate=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert report.steps == 5
    assert f"{tmp_path / 'step-00000001.ckpt'} can't be written" in caplog.text
    assert f"{tmp_path / 'finished'} can't be written" in caplog.text
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
    stand, stage = make_killed(kind, checkpoint_minutes=0.0)

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
        code = f"from test_checkpoints import fit_until_killed; fit_until_killed({kind!r}, {str(tmp_path / kind)!r})"
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
        assert last(tmp_path / kind)["global_step"] == 7
        whole, stage = make_killed(kind)
        whole.fit(tmp_path / "whole", stage, validate=kind == "train")
        resumed, stage = make_killed(kind, resume=True)
        resumed.fit(tmp_path / kind, stage, validate=kind == "train")
        assert stage.steps == [7, 8, 9]
        assert_equal(resumed.model, whole.model)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal's sender isn't known elsewhere")
def test_what_loads_data_outlives_the_signals_of_a_run(tmp_path):
    """Terminals, torchrun and Slurm send theirs to all of its processes: the step can still be finished."""
    stand = Stand(workers=2, micro_batch_size=2, train_examples=160)
    stage, told = stand.stage(), []

    def tell_all(batch: Batch, batch_idx: int) -> None:
        if batch_idx == 9:
            told.extend(child.pid for child in multiprocessing.active_children())
            for name in ("INT", "USR1", "TERM"):
                subprocess.run(["kill", f"-{name}", *map(str, told)], check=True)
            os.kill(os.getpid(), signal.SIGTERM)

    stage.on_train_batch_start = tell_all
    with pytest.raises(Stopped, match="after step 3"):
        stand.fit(tmp_path, stage, validate=False)
    assert len(told) == 2
    assert last(tmp_path)["global_step"] == 3


def load_for_ever(ready: Any) -> None:
    stopping.outlive_signals()
    ready.set()
    time.sleep(600)


@pytest.mark.skipif(sys.platform != "linux", reason="a signal's sender isn't known elsewhere")
def test_the_word_of_its_parent_ends_what_loads_data():
    forked = multiprocessing.get_context("fork")
    ready = forked.Event()
    child = forked.Process(target=load_for_ever, args=(ready,), daemon=True)
    child.start()
    try:
        assert ready.wait(60)
        subprocess.run(["kill", "-TERM", str(child.pid)], check=True)
        child.join(0.5)
        assert child.is_alive()
        child.terminate()
        child.join(60)
        assert child.exitcode == 0
    finally:
        child.kill()


# --- the same run ---


class Noisy(Sequence[Example]):
    """Examples that every reading changes, by all generators that augmentations draw from."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples = examples

    def __getitem__(self, index: Any) -> Any:
        example = self.examples[index]
        drawn = (int(torch.randint(2, VOCAB, ())), int(np.random.randint(2, VOCAB)), random.randrange(2, VOCAB))
        return example | {"tokens": [*drawn, *example["tokens"]][:LONGEST]}

    def __len__(self) -> int:
        return len(self.examples)


def make_noisy(kind: str, **changes: Any) -> tuple[Stand, Any]:
    stand = Stand(dropout=0.3 if kind == "train" else 0.0, micro_batch_size=4, workers=2, **changes)
    noisy = Noisy(stand.data.train.examples)
    stand.data = dataclasses.replace(stand.data, train=Split(noisy, stand.data.train.lengths, draws=True))
    schedule = make_schedule(1e-2, 3.0, 0.1, 0.1, 1.0)
    return stand, stand.stage(schedule) if kind == "train" else RecordedTransfer(stand.model, schedule, "weights", 3)


@pytest.mark.parametrize("kind", ["train", "transfer"])
def test_a_run_stopped_at_three_random_steps_ends_with_the_same_bytes(kind, tmp_path):
    """Dropout, augmentation, two processes that load data, two parts to a step; a cluster's signal each time."""
    whole, stage = make_noisy(kind)
    torch.manual_seed(5)
    whole.fit(tmp_path / "whole", stage, validate=kind == "train")
    assert stage.steps == list(range(15))
    steps: list[int] = []
    for stop in (*sorted(random.Random(kind).sample(range(1, 15), 3)), None):
        stand, stage = make_noisy(kind, resume=True)
        torch.manual_seed(5)

        def signal_at(batch: Batch, batch_idx: int, stop: int | None = stop, stage: Any = stage) -> None:
            if stage.global_step + 1 == stop:
                os.kill(os.getpid(), signal.SIGUSR1)

        stage.on_train_batch_start = signal_at
        with contextlib.nullcontext() if stop is None else pytest.raises(Stopped):
            stand.fit(tmp_path / "cut", stage, validate=kind == "train")
        steps += stage.steps
    assert steps == list(range(15))
    assert_equal(stand.model, whole.model)


def test_what_is_drawn_for_an_example_goes_by_seed_epoch_and_index():
    def tokens(workers: int, seed: int, epoch: int) -> dict[int, list[int]]:
        stand, _ = make_noisy("train")
        stand.config = dataclasses.replace(stand.config, workers=workers)
        batches = stand.batches(seed=seed)
        batches.batch_sampler.set_epoch(epoch)
        found = (zip(b["index"].tolist(), b["inputs"]["input_ids"].tolist(), strict=True) for b in batches)
        return {index: [t for t in row if t] for rows in found for index, row in rows}

    here = tokens(0, 1, 2)
    assert tokens(2, 1, 2) == here
    assert all(tokens(0, *other)[3] != here[3] for other in ((2, 2), (1, 3)))
    dataset = make_noisy("train")[0].batches().dataset
    before = checkpoints.random_state()
    assert dataset[3][0] == 3
    after = checkpoints.random_state()
    assert torch.equal(after["torch"], before["torch"])
    assert after["python"] == before["python"]
    assert torch.equal(after["numpy"][1], before["numpy"][1])


# --- damage ---


@pytest.mark.parametrize("damage", ["flipped", "cut", "empty"])
def test_a_damaged_checkpoint_is_passed_over_for_the_one_before(damage, tmp_path, caplog):
    whole = Stand()
    whole.fit(tmp_path / "whole", whole.stage())
    stand = Stand(checkpoint_minutes=0.0)
    cut_off(stand, tmp_path / "cut", stand.stage(), at=4)
    older, newest = sorted((tmp_path / "cut").glob("step-*.ckpt"))
    content = bytearray(newest.read_bytes())
    content[len(content) // 2] ^= 1
    newest.write_bytes({"flipped": content, "cut": content[: len(content) // 2], "empty": b""}[damage])
    resumed = Stand(resume=True)
    stage = resumed.stage()
    resumed.fit(tmp_path / "cut", stage)
    assert f"{newest} is damaged: going on without it" in caplog.text
    assert stage.steps[0] == int(older.name.split("-")[1])
    assert_equal(resumed.model, whole.model)


def test_a_finished_stage_is_not_trained_again(tmp_path):
    stand = Stand()
    report = stand.fit(tmp_path)
    again = Stand(resume=True)
    stage = again.stage()
    assert again.fit(tmp_path, stage) == report
    assert stage.steps == []
    assert_equal(again.model, stand.model)
    (kept,) = tmp_path.glob("finished-*.safetensors")
    kept.write_bytes(kept.read_bytes()[:-1])
    retrained = Stand(resume=True)
    stage = retrained.stage()
    retrained.fit(tmp_path, stage)
    assert stage.steps == [0, 1, 2, 3, 4]
    checkpoints.forget(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_of_two_parts_to_a_step_goes_on_in_four(tmp_path):
    """As on another number of devices: the order of global batches and the steps are kept."""
    whole = Stand(micro_batch_size=4)
    whole.fit(tmp_path / "whole", whole_stage := whole.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)))
    stand = Stand(micro_batch_size=4)
    cut_off(stand, tmp_path / "cut", stand.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0)), at=4)
    resumed = Stand(micro_batch_size=2, resume=True)
    stage = resumed.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0))
    resumed.fit(tmp_path / "cut", stage)
    assert stage.steps == list(range(2, 10))
    assert [v["step"] for v in stage.validations] == [v["step"] for v in whole_stage.validations]
    for one, other in zip(resumed.model.parameters(), whole.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0)
