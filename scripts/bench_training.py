"""What hhbench's training loop costs beside a bare PyTorch loop of the same model on the same batches.

python scripts/bench_training.py                      glue, lm and imagenet, mini
python scripts/bench_training.py --task lm --attn hedgehog --rounds 100
python scripts/bench_training.py --publish            and put the table into docs/performance.md

hhbench's own `fit` trains, with its loader, callbacks, checkpoints and progress. After every block of its steps a bare
loop (forward, loss, backward, clipping, AdamW, schedule) takes the same steps on a model of its own, from the batches
that the block was given: they lie ready, so that whatever reading and collating costs is hhbench's loss. Times are CPU
seconds of the process, which other jobs of the machine don't lengthen, and wall seconds beside them; validation, which
the bare loop has none of, is timed apart. The last line is one JSON document.
"""

import argparse
import copy
import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from bench import Row, add_outputs, chosen, finish, guarded, record, say
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from hhbench import runner
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError, UsageError
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
    our_loss, bare_loss = found.losses[0]  # after the first block: both train the same
    if abs(our_loss - bare_loss) > 1e-4 * abs(bare_loss):
        raise HHBenchError(
            f"{task_name}: the bare loop trains something else: {bare_loss} is its loss, {our_loss} ours"
        )
    walls = statistics.median(theirs.wall / mine.wall for mine, theirs in zip(ours, bare, strict=True))
    return Row(
        task_name,
        f"{task_name} ({task.dataset(str(config.dataset)).title}), {plan.label}: throughput kept",
        statistics.median(kept),
        low,
        high,
        unit="%",
        rounds=len(kept),
        note=f"{len(kept)} blocks of {block} step{'s' * (block > 1)}; by the wall clock {walls:.1%}",
        details={"ms_per_step": dict(zip(("bare", "hhbench"), per_step, strict=True)), "losses": [our_loss, bare_loss]},
    ).towards(GOAL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", help="of glue, lm, imagenet; separated by commas (default: all)")
    parser.add_argument("--attn", default="softmax", help="the cheapest shows the loop's own cost best")
    parser.add_argument("--rounds", type=int, help="blocks that count")
    parser.add_argument("--threads", type=int, default=1, help="of torch: with more, a busy machine distorts ratios")
    add_outputs(parser)
    args = parser.parse_args()
    if args.publish and (args.task or args.rounds or args.attn != "softmax" or args.threads != 1):
        raise UsageError("--publish needs the usual run of all tasks: leave the other options out")
    torch.set_num_threads(args.threads)
    rows = []
    for task in chosen(args.task, BLOCKS, "task"):
        block, rounds = BLOCKS[task]
        rows.append(measure(task, args.attn, block, args.rounds or rounds))
        say(f"{rows[-1].what}: {rows[-1].value:.1%}")
    finish(record("bench_training", rows), args, "training")
    return 0


if __name__ == "__main__":
    sys.exit(guarded(main))
