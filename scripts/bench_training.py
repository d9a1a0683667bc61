"""What hhbench's training loop costs beside a bare PyTorch loop of the same model on the same batches.

python scripts/bench_training.py                      glue, lm and imagenet, mini
python scripts/bench_training.py --task lm --attn hedgehog --rounds 100

hhbench's own `fit` trains, with its loader, callbacks, checkpoints and progress. After every block of its steps a bare
loop (forward, loss, backward, clipping, AdamW, schedule) takes the same steps on a model of its own, from the batches
that the block was given: they lie ready, so that whatever reading and collating costs is hhbench's loss. Times are CPU
seconds of the process, which other jobs of the machine don't lengthen, and wall seconds beside them; validation, which
the bare loop has none of, is timed apart. The last line is one JSON document.
"""

import argparse
import copy
import json
import platform
import statistics
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from bench import chosen, guarded
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hhbench import result, runner
from hhbench.config import RunConfig
from hhbench.profile.clock import Moment
from hhbench.profile.rounds import interval, resampled
from hhbench.task import Batch
from hhbench.train import Schedule, TrainStage, fit, loader, parameter_groups

BLOCKS = {"glue": (1, 60), "lm": (4, 60), "imagenet": (6, 60)}  # steps of one, and how many count
WARM_UP = 3  # blocks
VALIDATED = 200  # examples: they aren't what is compared
GOAL = 0.95  # of the bare loop's throughput, at least


class Bare:
    """The loop that a tutorial would write."""

    def __init__(self, model: nn.Module, schedule: Schedule, steps: int) -> None:
        self.model, self.clip = model, schedule.clip
        groups = parameter_groups(model, model.parameters(), schedule)
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, schedule.beta2), fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: schedule.factor(step, steps))

    def train(self, batches: Sequence[Batch]) -> float:
        """Steps on every batch; the last one's loss."""
        self.model.train()
        for batch in batches:
            output = self.model(**batch["inputs"])
            logits: Tensor = output if isinstance(output, Tensor) else output.logits
            loss = cross_entropy(logits.flatten(0, -2), batch["labels"].flatten())
            self.optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
            self.optimizer.step()
            self.scheduler.step()
        return float(loss.detach())


@dataclass
class Rounds:
    """Seconds of each block, without validation."""

    ours: list[Moment] = field(default_factory=list)
    bare: list[Moment] = field(default_factory=list)
    losses: list[tuple[float, float]] = field(default_factory=list)


class Interleaved(TrainStage):
    """A stage that lets the bare loop take each of its blocks too."""

    bare: Bare
    block: int
    rounds: Rounds

    def start(self, bare: Bare, block: int) -> None:
        self.bare, self.block, self.rounds = bare, block, Rounds()
        self._batches: list[Batch] = []
        self._validated = Moment()

    def on_train_start(self) -> None:
        self._since = Moment.now()

    def on_validation_start(self) -> None:
        self._paused = Moment.now()

    def on_validation_end(self) -> None:
        self._validated += Moment.now() - self._paused

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        self._batches.append(batch)
        if len(self._batches) < self.block:
            return
        paused = Moment.now()
        self.rounds.ours.append(paused - self._since - self._validated)
        loss = self.bare.train(self._batches)
        self.rounds.bare.append(Moment.now() - paused)
        self.rounds.losses.append((float(outputs["loss"]), loss))
        self._batches.clear()
        self._validated = Moment()
        self._since = Moment.now()


@dataclass(frozen=True)
class Row:
    """One task. `kept` is bare seconds / hhbench's, the median over blocks; 95 % of those of blocks drawn anew lie
    between `kept_low` and `kept_high`.
    Both train the same: so say the losses after the first block.
    """

    task: str
    attention: str
    blocks: int
    steps_per_block: int
    bare_ms: float
    ours_ms: float
    kept: float
    kept_low: float
    kept_high: float
    kept_wall: float
    loss_ours: float
    loss_bare: float


def measure(task_name: str, attn: str, block: int, rounds: int) -> Row:
    """One fit of a mini run, interleaved with the bare loop."""
    config = RunConfig(task=task_name, attn=attn, regime="scratch", accelerator="cpu", test_examples=VALIDATED)
    (first, *_) = runner.expand(config)
    plan = runner.prepare(first)
    config, task = plan.config, plan.task
    data = task.load_data(config)
    torch.manual_seed(0)
    model = task.build_model(config, data)
    plan.conversion(model).carry_out()
    model.train()
    lightning.seed_everything(0, workers=True, verbose=False)
    train = loader(data.train, data, config, train=True, seed=0)
    steps = (rounds + WARM_UP) * block
    schedule = Schedule(
        float(config.lr or 0),
        steps / len(train),
        float(config.weight_decay or 0),
        float(config.beta2 or 0),
        float(config.warmup or 0),
        float(config.clip or 0),
    )
    stage = Interleaved(task, model, data, config, schedule)
    stage.start(Bare(copy.deepcopy(model), schedule, steps), block)
    validation = loader(data.validation, data, config, train=False)
    score = task.dataset(str(config.dataset))
    with tempfile.TemporaryDirectory() as folder:
        fit(
            stage,
            train,
            validation,
            config,
            folder=Path(folder),
            title=f"{task_name} with {attn}",
            higher_is_better=score.higher_is_better,
        )
    found = stage.rounds
    ours, bare = found.ours[WARM_UP:], found.bare[WARM_UP:]
    kept = [theirs.process / mine.process for mine, theirs in zip(ours, bare, strict=True)]
    low, high = interval(resampled(kept, np.random.default_rng(0)))
    per_step = [1000 * statistics.median(m.process for m in moments) / block for moments in (bare, ours)]
    return Row(
        task=f"{task_name} ({task.dataset(str(config.dataset)).title})",
        attention=plan.label,
        blocks=len(kept),
        steps_per_block=block,
        bare_ms=per_step[0],
        ours_ms=per_step[1],
        kept=statistics.median(kept),
        kept_low=low,
        kept_high=high,
        kept_wall=statistics.median(theirs.wall / mine.wall for mine, theirs in zip(ours, bare, strict=True)),
        loss_ours=found.losses[0][0],
        loss_bare=found.losses[0][1],
    )


def table(rows: Sequence[Row]) -> str:
    columns: dict[str, Callable[[Row], str]] = {
        "task": lambda r: r.task,
        "attention": lambda r: r.attention,
        "blocks x steps": lambda r: f"{r.blocks} x {r.steps_per_block}",
        "bare ms/step": lambda r: f"{r.bare_ms:.2f}",
        "hhbench ms/step": lambda r: f"{r.ours_ms:.2f}",
        "throughput kept (95 %)": lambda r: f"{r.kept:.1%} ({r.kept_low:.1%} .. {r.kept_high:.1%})",
        "by wall clock": lambda r: f"{r.kept_wall:.1%}",
        "first losses": lambda r: f"{r.loss_ours:.5f} {r.loss_bare:.5f}",
    }
    cells = [list(columns), *([cell(row) for cell in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(len(columns))]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) for line in cells)


def machine() -> dict[str, Any]:
    return {
        "cpu": result.cpu_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lightning": lightning.__version__,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="of glue, lm, imagenet; separated by commas (default: all)")
    parser.add_argument("--attn", default="softmax", help="the cheapest shows the loop's own cost best")
    parser.add_argument("--rounds", type=int, help="blocks that count")
    parser.add_argument("--threads", type=int, default=1, help="of torch: with more, a busy machine distorts ratios")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = []
    for task in chosen(arguments.task, BLOCKS, "task"):
        block, rounds = BLOCKS[task]
        rows.append(measure(task, arguments.attn, block, arguments.rounds or rounds))
    print(table(rows))
    about = machine()
    print(", ".join(f"{name} {value}" for name, value in about.items()))
    print(json.dumps({"machine": about, "goal": GOAL, "rows": [asdict(row) for row in rows]}))
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
