"""Who started this process; and that two processes take the step of one."""

import contextlib
import copy
import dataclasses
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from stand import RecordedTransfer, Stand, child_environment, make_config, make_schedule
from torch import Tensor

from hhbench import ranks
from hhbench.errors import HHBenchError, UsageError
from hhbench.ranks import Launch, first_host, launched
from hhbench.stopping import Stopped
from hhbench.train import evaluate

# --- who started this process ---


@pytest.fixture
def no_launcher(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "TORCHELASTIC_")) or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "environment,expected",
    [
        ({}, Launch(None, 1, 0, 0)),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, Launch(None, 1, 0, 0)),  # the batch script
        (
            {"SLURM_NTASKS": "4", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0"},
            Launch("Slurm", 2, 1, 0),
        ),
        (
            {
                "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "1",
            },
            Launch("Slurm", 4, 1, 1, nodes=2),
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "2", "RANK": "3", "LOCAL_RANK": "1",
            },
            Launch("torchrun", 4, 3, 1, nodes=2),
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "4", "RANK": "3", "LOCAL_RANK": "1",
                "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0",
            },
            Launch("torchrun", 4, 3, 1),  # its agents were started by srun
        ),
    ],
    ids=["nobody", "a batch script", "srun", "srun, two machines", "torchrun, two machines", "torchrun under srun"],
)  # fmt: skip
def test_who_started_this_process(environment, expected, no_launcher, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


@pytest.mark.parametrize(
    "nodes,first",
    [
        ("login", "login"), ("a,b", "a"), ("gpu[03-07,9],login", "gpu03"), ("gpu[1,5]", "gpu1"),
        ("r[1-2]n[01-04]", "r1n01"), ("node-a3[007-010]-ib,x", "node-a3007-ib"),
    ],
)  # fmt: skip
def test_the_first_machine_of_a_list(nodes, first):
    assert first_host(nodes) == first


@pytest.mark.parametrize("devices,nodes,started", [(2, 1, 4), (4, 2, 4), (1, 1, 2)])
def test_a_world_of_another_size_is_refused_at_once(devices, nodes, started, no_launcher, monkeypatch):
    for name, value in (("SLURM_STEP_NUM_TASKS", started), ("SLURM_PROCID", 0), ("SLURM_LOCALID", 0)):
        monkeypatch.setenv(name, str(value))
    message = f"Slurm started {started} processes; --devices {devices} x --num-nodes {nodes} is {devices * nodes}"
    with pytest.raises(UsageError, match=message):
        ranks.connect(make_config(devices=devices, num_nodes=nodes, batch_size=8))


def test_a_world_spread_otherwise_over_machines_is_refused(no_launcher, monkeypatch):
    for name, value in (("STEP_NUM_TASKS", 4), ("STEP_NUM_NODES", 1), ("PROCID", 0), ("LOCALID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    with pytest.raises(UsageError, match="Slurm started 4 processes on 1 machine, not on 2"):
        ranks.connect(make_config(devices=2, num_nodes=2, batch_size=8))


@pytest.mark.parametrize("devices", [1, 2])
def test_a_shell_that_srun_started_is_no_rank(devices, no_launcher, monkeypatch):
    """srun --pty bash: what runs there starts its own processes."""
    for name, value in (("STEP_NUM_TASKS", 1), ("STEP_NUM_NODES", 1), ("PROCID", 0), ("LOCALID", 0)):
        monkeypatch.setenv(f"SLURM_{name}", str(value))
    ranks.connect(make_config(devices=devices, batch_size=8))
    assert ranks.world_size() == 1
    assert launched().alone
    with pytest.raises(UsageError, match="Slurm started 1 process; --devices 1 x --num-nodes 2 is 2"):
        ranks.connect(make_config(num_nodes=2, batch_size=8))


def test_a_machine_whose_name_does_not_resolve_is_named(no_launcher, monkeypatch):
    for name, value in {
        "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "1", "SLURM_LOCALID": "0", "SLURM_JOB_ID": "12",
        "SLURM_STEP_NODELIST": "nowhere[07-08].invalid",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(HHBenchError, match=r"'nowhere07\.invalid' doesn't resolve here: set MASTER_ADDR"):
        ranks.connect(make_config(devices=2))


# --- two processes ---


# Batches of unequal lengths, the last one of fewer examples: five, or one, of which a rank has none.
CASES: dict[str, dict[str, Any]] = {
    "train": {"stage": "train"},
    "train, 21 steps": {"stage": "train", "train_examples": 161, "lr": 2e-3},
    "train in parts": {"stage": "train", "train_examples": 33, "micro_batch_size": 2, "clip": 0.05},
    "transfer": {"stage": "transfer"},
    "transfer in parts": {"stage": "transfer", "train_examples": 33, "micro_batch_size": 2, "clip": 1e-3},
    "performer": {"stage": "train", "attn": "performer"},
    "train, sharded": {"stage": "train", "train_examples": 33, "micro_batch_size": 2, "strategy": "fsdp"},
}


def record(folder: Path, devices: int) -> dict[str, Any]:
    """Train, transfer and evaluate on so many devices; called in each process."""
    found: dict[str, Any] = {}
    for name, case in CASES.items():
        settings = {k: v for k, v in case.items() if k not in ("stage", "lr", "clip")}
        if devices == 1:
            settings.pop("strategy", None)
        stand = Stand(devices=devices, **settings)
        schedule = make_schedule(case.get("lr", 1e-2), 1.0, 0.1, 0.1, case.get("clip", 1.0))
        trains = case["stage"] == "train"
        stage = stand.stage(schedule) if trains else RecordedTransfer(stand.model, schedule)
        report = stand.fit(folder / name, stage, validate=trains)
        found[name] = {
            "gradients": stage.gradients,
            "losses": stage.sums,
            "held": stage.held,
            "tokens": report.tokens,
            "expected tokens": sum(stand.data.train.lengths),
            "validation": report.validation,
            "weights": copy.deepcopy(stand.model.state_dict()),
            "seeds": [] if trains else stage.seeds,
        }
    stand = Stand(devices=devices)
    for name, split in stand.data.tests.items():
        found[name] = evaluate(stand.stage(), stand.batches(split), stand.config, title=name)
    return found


def record_stopped(folder: Path, strategy: str) -> dict[str, Any]:
    """Train with dropout, once whole and once told to stop in the midst, and that to one rank alone."""
    found: dict[str, Any] = {}
    for name, resume in (("whole", False), ("stopped", False), ("stopped", True)):
        stand = Stand(devices=2, dropout=0.3, strategy=strategy, resume=resume)
        torch.manual_seed(3)
        stage = stand.stage(make_schedule(1e-2, 2.0, 0.1, 0.1, 1.0))

        def tell(
            batch: Any, batch_idx: int, stage: Any = stage, asked: bool = name == "stopped" and not resume
        ) -> None:
            if asked and stage.global_step == 2 and ranks.rank() == 1:
                os.kill(os.getpid(), signal.SIGUSR1)

        stage.on_train_batch_start = tell
        try:
            found[f"report, {name}"] = dataclasses.asdict(stand.fit(folder / name, stage))
        except Stopped as stopped:
            found["said"] = str(stopped)
        found.setdefault(f"steps, {name}", []).extend(stage.steps)
        found[name] = copy.deepcopy(stand.model.state_dict())
    return found


def record_handed_over(folder: Path, devices: int, *, stop: bool, resume: bool) -> dict[str, Any]:
    """Train on so many devices, to the end or until a signal, from the start or from what was left."""
    stand = Stand(devices=devices, resume=resume)
    stage = stand.stage(make_schedule(1e-3, 2.0, 0.1, 0.1, 1.0))

    def tell(batch: Any, batch_idx: int) -> None:
        if stop and stage.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    stage.on_train_batch_start = tell
    with pytest.raises(Stopped) if stop else contextlib.nullcontext():
        report = stand.fit(folder, stage)
    tokens = None if stop else report.tokens
    return {"steps": stage.steps, "seen": stand.task.seen, "tokens": tokens, "weights": stand.model.state_dict()}


def record_scores(folder: Path, devices: int) -> dict[str, Any]:
    """The test score after training with dropout, for each seed."""
    scores = []
    for seed in range(4):
        stand = Stand(devices=devices, dropout=0.1, train_examples=240)
        torch.manual_seed(seed)
        stage = stand.stage(make_schedule(5e-3, 1.0, 0.0, 0.1, 1.0))
        stand.fit(folder / str(seed), stage, validate=False)
        scores.append(evaluate(stage, stand.batches(stand.data.tests["many"]), stand.config, title="test")[0])
    return {"scores": [found["accuracy"] for found in scores]}


def record_unused(folder: Path, *, find: bool) -> str:
    """What is said of a weight that the loss doesn't reach; "" if the stage is trained."""
    stand = Stand(devices=2, find_unused_parameters=find)
    stand.model.register_parameter("idle", torch.nn.Parameter(torch.zeros(3)))
    try:
        stand.fit(folder, validate=False)
    except HHBenchError as error:
        return str(error)
    return ""


def record_as_rank(folder: str) -> None:
    """What each of two processes runs."""
    ranks.connect(make_config(devices=2))
    assert ranks.world_size() == 2
    found = record(Path(folder), 2)
    for strategy in ("ddp", "fsdp"):
        found[f"stopped, {strategy}"] = record_stopped(Path(folder) / strategy, strategy)
    record_handed_over(Path(folder) / "handed", 2, stop=True, resume=False)
    found["handed up"] = record_handed_over(Path(folder) / "handed up", 2, stop=False, resume=True)
    found |= record_scores(Path(folder) / "scores", 2)
    found["unused"] = record_unused(Path(folder) / "unused", find=False)
    found["unused, found"] = record_unused(Path(folder) / "unused", find=True)
    torch.save(found, Path(folder) / f"rank-{ranks.rank()}.pt")
    ranks.barrier()


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        largest = float(other[name].abs().max())
        torch.testing.assert_close(one[name], other[name], atol=1e-5 * max(largest, 1e-3), rtol=0, msg=name)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[dict[str, Any]]:
    """What one process found, and what each of two did: once for all of xdist's workers."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "ranks"
    files = [folder / name for name in ("one.pt", "rank-0.pt", "rank-1.pt")]
    with FileLock(folder.with_suffix(".lock")):
        if not files[0].exists():
            folder.mkdir(exist_ok=True)
            torch.save(compare_worlds(folder), files[0])
    return [torch.load(file, weights_only=True) for file in files]


def compare_worlds(folder: Path) -> dict[str, Any]:
    """Have two processes leave what they did in a folder, and do the same in one."""
    script = folder / "script.py"
    script.write_text("import sys\nfrom test_ranks import record_as_rank\nrecord_as_rank(sys.argv[1])\n")
    record_handed_over(folder / "handed up", 1, stop=True, resume=False)
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
    one = record(folder / "one", 1)
    one["whole"] = record_handed_over(folder / "alone", 1, stop=False, resume=False)
    one["handed over"] = record_handed_over(folder / "handed", 1, stop=False, resume=True)
    return one | record_scores(folder / "scores one", 1)


@pytest.mark.parametrize("case", CASES)
def test_two_processes_take_the_step_of_one(worlds, case):
    one, *both = (world[case] for world in worlds)
    for found in both:
        assert len(found["gradients"]) == len(one["gradients"]) == len(one["losses"]) >= 5
        compare(found["gradients"][0], one["gradients"][0])
        assert found["tokens"] == one["tokens"] == one["expected tokens"]
        assert found["validation"] == one["validation"]
        for step in range(min(20, len(one["losses"]))):
            (loss, count), (expected, units) = found["losses"][step], one["losses"][step]
            assert count == units
            assert loss / count == pytest.approx(expected / units, abs=1e-4), step
    for name, tensor in both[0]["weights"].items():
        assert torch.equal(tensor, both[1]["weights"][name]), name
        assert torch.allclose(tensor, one["weights"][name], atol=0.05), name


@pytest.mark.parametrize("case", ["train", "train in parts", "transfer"])
def test_two_processes_end_where_one_does(worlds, case):
    """Five steps of Adam, which magnifies rounding: within a hundredth of a step."""
    one, two, _ = (world[case]["weights"] for world in worlds)
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


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_stops_both_and_they_go_on_as_if_nothing_was(worlds, strategy):
    for world in worlds[1:]:
        found = world[f"stopped, {strategy}"]
        assert found["said"] == "stopped by a signal after step 3"
        assert found["steps, stopped"] == found["steps, whole"] == list(range(10))
        assert found["report, stopped"]["tokens"] == found["report, whole"]["tokens"]
        assert found["report, stopped"]["validation"] == found["report, whole"]["validation"]
        for name, tensor in found["whole"].items():
            assert torch.equal(found["stopped"][name], tensor), name


def test_one_process_goes_on_where_two_were_stopped(worlds):
    """The order of the global batches is kept."""
    whole, rest = worlds[0]["whole"], worlds[0]["handed over"]
    assert rest["steps"] == list(range(3, 10))
    assert rest["seen"] == whole["seen"][3:]
    assert rest["tokens"] == whole["tokens"]
    for name, tensor in whole["weights"].items():
        torch.testing.assert_close(rest["weights"][name], tensor, atol=1e-4, rtol=0, msg=name)


def test_two_processes_go_on_where_one_was_stopped(worlds):
    whole = worlds[0]["whole"]
    for world in worlds[1:]:
        rest = world["handed up"]
        assert rest["steps"] == list(range(3, 10))
        assert rest["tokens"] == whole["tokens"]
        for name, tensor in whole["weights"].items():
            torch.testing.assert_close(rest["weights"][name], tensor, atol=1e-4, rtol=0, msg=name)
    parts = zip(*(world["handed up"]["seen"] for world in worlds[1:]), strict=True)
    assert [sorted(a + b) for a, b in parts] == [sorted(batch) for batch in whole["seen"][3:]]


def test_with_dropout_two_processes_score_as_one_does(worlds):
    """Each rank drops out what it draws itself: the scores differ as those of seeds do."""
    one, two, other = (world["scores"] for world in worlds)
    assert two == other != one
    means = [sum(scores) / len(scores) for scores in (one, two)]
    assert means[0] > 0.65  # of two answers: it learned something
    assert abs(means[1] - means[0]) <= max(max(one) - min(one), 0.05)


def test_no_two_draws_of_a_transfer_are_the_same(worlds):
    drawn = [world["transfer in parts"]["seeds"] for world in worlds[1:]]
    assert len(drawn[0]) == len(drawn[1]) > 5
    assert len({seed for seeds in drawn for seed in seeds}) == 2 * len(drawn[0])


def test_weights_that_the_loss_does_not_reach_are_named_and_looked_for_when_asked(worlds):
    for world in worlds[1:]:
        assert world["unused"].startswith(
            "1 parameter takes no part in the loss: idle. Freeze what it leaves out, or add --find-"
        )
        assert world["unused, found"] == ""


def test_a_sharded_model_has_a_share_on_each_rank(worlds):
    whole = worlds[0]["train, sharded"]["held"]
    shares = [world["train, sharded"]["held"] for world in worlds[1:]]
    assert sum(shares) == whole == worlds[1]["train"]["held"]
    assert max(shares) < 0.6 * whole


def test_where_slurm_can_not_be_asked_nothing_is_started_again(monkeypatch, tmp_path):
    for name, value in {"STEP_NUM_TASKS": "1", "PROCID": "0", "LOCALID": "0", "JOB_ID": "7"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    monkeypatch.delenv("TORCHELASTIC_RUN_ID", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert ranks.launched().by == "Slurm"
    assert not ranks.requeue()
