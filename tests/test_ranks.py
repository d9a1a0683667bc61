"""Who started this process; and that two processes take the step of one."""

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from stand import RecordedTransfer, Stand, child_environment, make_config, make_schedule
from torch import Tensor

from hhbench import ranks
from hhbench.train import evaluate

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
    ranks.connect(make_config(devices=2))
    assert ranks.world_size() == 2
    found = record(Path(folder), 2)
    torch.save(found, Path(folder) / f"rank-{ranks.rank()}.pt")
    ranks.barrier()


def compare(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name in one:
        largest = float(other[name].abs().max())
        torch.testing.assert_close(one[name], other[name], atol=1e-5 * max(largest, 1e-3), rtol=0, msg=name)


@pytest.fixture(scope="module")
def worlds(tmp_path_factory) -> list[dict[str, Any]]:
    """What one process found, and what each of two did."""
    folder = tmp_path_factory.mktemp("ranks")
    script = folder / "script.py"
    script.write_text("import sys\nfrom test_ranks import record_as_rank\nrecord_as_rank(sys.argv[1])\n")
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
