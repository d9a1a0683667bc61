"""Training and testing one stage under Lightning, on one device or many.

Every loss is a sum, divided by the number of examples or tokens on all ranks together, and every rank gets its share
of the same seeded order: two processes take the step that one would.
"""

import contextlib
import dataclasses
import functools
import inspect
import logging
import math
import os
import random
import sys
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.fabric.plugins.environments.cluster_environment import ClusterEnvironment
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.fabric.utilities.seed import pl_worker_init_function
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from hhbench import checkpoints, sharding, stopping
from hhbench.attention import OptimizerSettings
from hhbench.checkpoints import Checkpoints
from hhbench.config import RunConfig
from hhbench.distill import Loss, TransferLoss, intercepted
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import attention_parameters, attentions, slots
from hhbench.progress import Progress
from hhbench.ranks import gathered, launched, rank, summed_over_ranks, world_size
from hhbench.task import Batch, Example, Split, Task, TaskData

log = logging.getLogger("hhbench")

# Padded tokens of an evaluation's batch, at most. A GPU that has no room for so many takes halves of them; a CPU gains
# nothing from more than its caches hold.
EVALUATED_TOKENS = {"cpu": 2048, "cuda": 2**17}
MOST_WORKERS = 16  # processes that load data for one GPU, unless the user says how many


# ---- batches ---------------------------------------------------------------------------------------------------


class Batches(Sampler[list[int]]):
    """Batches of like lengths, in an order that is a function of (seed, epoch) alone.

    Every rank makes the same global batches. While training each rank takes its share of every one; where an epoch's
    last batch is too small for all, a rank runs an example that counts for nothing, written as `-1 - index`. While
    testing the batches are dealt out whole, so that no example is repeated.

    Args:
        lengths: of the examples, in tokens.
        size: of a global batch: of training in examples, of testing in padded tokens, at most, and one example at
            least.
        seed: None orders by length, the longest first: testing. What needs most memory is tried at once.
        divide: the number of equal parts that a rank's share is cut into, for gradient accumulation.
        even: give every rank as many batches to test on; one that has fewer runs an example that counts for nothing.
    """

    POOL = 50  # batches whose examples are sorted by length together

    def __init__(
        self, lengths: Sequence[int], size: int, *, seed: int | None, divide: int = 1, even: bool = False
    ) -> None:
        self.lengths, self.size, self.seed = np.asarray(lengths), size, seed
        self.divide, self.even = divide, even
        self._epoch = torch.zeros((), dtype=torch.int64)
        self._epoch.share_memory_()  # type: ignore[no-untyped-call]  # with the processes that load data
        self.taken: dict[int, int] = {}  # by epoch, the batches that an interrupted run took of it

    @property
    def sampler(self) -> "Batches":
        """Where Lightning looks for `set_epoch`."""
        return self

    @property
    def epoch(self) -> int:
        return int(self._epoch)

    def set_epoch(self, epoch: int) -> None:
        self._epoch.fill_(epoch)

    def global_batches(self) -> list[list[int]]:
        return self._by_length() if self.seed is None else self._shuffled(self.seed)

    def _by_length(self) -> list[list[int]]:
        order = np.argsort(-self.lengths, kind="stable")
        most = max(1, len(order) // world_size())  # Lightning wants a batch on every rank
        batches, start = [], 0
        while start < len(order):
            count = min(most, max(1, self.size // max(1, int(self.lengths[order[start]]))))
            batches.append(order[start : start + count].tolist())
            start += count
        return batches

    def _shuffled(self, seed: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + self.epoch)
        order = torch.randperm(len(self.lengths), generator=generator).numpy()
        batches = []
        for start in range(0, len(order), self.size * self.POOL):
            pool = order[start : start + self.size * self.POOL]
            pool = pool[np.argsort(self.lengths[pool], kind="stable")].tolist()
            batches += [pool[i : i + self.size] for i in range(0, len(pool), self.size)]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()
        if self.seed is None:
            yield from batches[rank() :: world_size()]
            if self.even and len(batches) % world_size() > 0 and rank() >= len(batches) % world_size():
                yield [-1 - batches[-1][-1]]
            return
        parts = [
            batch[rank() :: world_size()][part :: self.divide] or [-1 - batch[0]]
            for batch in batches
            for part in range(self.divide)
        ]
        yield from parts[self.taken.get(self.epoch, 0) :]

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil((len(self._by_length()) - (0 if self.even else rank())) / world_size())
        return math.ceil(len(self.lengths) / self.size) * self.divide


def loader(split: Split, data: TaskData, config: RunConfig, *, train: bool, seed: int = 0) -> "DataLoader[Example]":
    """Batches of a split, each with the "index" of its examples."""
    batches = Batches(
        split.lengths,
        int(config.batch_size or 1) if train else _evaluated_tokens(split, config),
        seed=seed if train else None,
        divide=_accumulation(config) if train else 1,
        even=config.strategy == "fsdp",
    )

    def collate(pairs: list[tuple[int, Example]]) -> Batch:
        batch = data.collate([example for _, example in pairs])
        # Whether it is one of the epoch's, and not there for a rank alone that has no share: see `Batches`. A plain
        # value, as a GPU would have to be waited for.
        counts = pairs[0][0] >= 0
        return batch | {"index": torch.tensor([index for index, _ in pairs]), "counts": counts}

    workers = min(usual_workers(split, config), len(batches)) if config.workers is None else config.workers
    return DataLoader(
        _Indexed(split, batches),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=workers,
        worker_init_fn=_start_loading,
        persistent_workers=workers > 0,
        # What a task collates with need not be picklable. Elsewhere than on Linux forking is not safe.
        multiprocessing_context="fork" if workers and sys.platform == "linux" else None,
        pin_memory=_on_cuda(config),
    )


def usual_workers(split: Split, config: RunConfig) -> int:
    """Processes that load a split unless the user says how many.

    On a CPU they would take the model's own cores, and elsewhere than on Linux they can't be forked.
    """
    if sys.platform != "linux" or not split.costly or not _on_cuda(config):
        return 0
    # srun gives each rank CPUs of its own; ranks that torchrun starts share their machine's, or their job's.
    launch = launched()
    sharing = 1 if launch.by == "Slurm" and not launch.alone else config.devices
    return min(MOST_WORKERS, max(1, len(os.sched_getaffinity(0)) // sharing))


def _start_loading(worker: int) -> None:
    stopping.outlive_signals()
    pl_worker_init_function(worker)  # what Lightning gives a loader that has no function of its own


class _Indexed(torch.utils.data.Dataset[tuple[int, Example]]):
    """Examples with their index. What is drawn for one, to augment it, is a function of (seed, epoch, index): the
    processes that load data hold no state of their own.
    """

    def __init__(self, split: Split, batches: Batches) -> None:
        self.split, self.batches = split, batches

    def __getitem__(self, index: int) -> tuple[int, Example]:
        place = index if index >= 0 else -1 - index
        if self.batches.seed is None or not self.split.draws:
            return index, self.split.examples[place]
        before = checkpoints.random_state()
        drawn = np.random.SeedSequence([self.batches.seed, self.batches.epoch, place]).generate_state(1)
        seed = int(drawn[0])
        torch.default_generator.manual_seed(seed)
        np.random.seed(seed)  # libraries that augment draw from it
        random.seed(seed)
        try:
            return index, self.split.examples[place]
        finally:
            checkpoints.set_random_state(before)

    def __len__(self) -> int:
        return len(self.split)


def _on_cuda(config: RunConfig) -> bool:
    return config.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available()


def _evaluated_tokens(split: Split, config: RunConfig) -> int:
    """Padded tokens of an evaluation's batch, at most. Without a graph four times `micro_batch_size` fit."""
    most = EVALUATED_TOKENS["cuda" if _on_cuda(config) else "cpu"]
    if config.micro_batch_size is None:
        return most
    return min(most, 4 * config.micro_batch_size * max(split.lengths, default=1))


def _accumulation(config: RunConfig) -> int:
    """Into how many forward passes a rank's share of a batch is cut."""
    share = int(config.batch_size or 1) // world_size()
    return math.ceil(share / config.micro_batch_size) if config.micro_batch_size else 1


def check_batch_size(config: RunConfig) -> None:
    """Refuse a batch that the devices can't share evenly."""
    world = config.devices * config.num_nodes
    if (config.batch_size or 1) % world:
        raise UsageError(f"--batch-size {config.batch_size} can't be divided over {world} devices")
    if config.strategy == "fsdp" and world == 1:
        raise UsageError("--strategy fsdp shares a model out over devices: add --devices 2 or more")


# ---- the two stages --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Schedule:
    """How one stage optimises. The learning rate rises over `warmup` of the steps and falls to 0 by a cosine."""

    lr: float
    epochs: float
    weight_decay: float
    beta2: float
    warmup: float
    clip: float

    def factor(self, step: int, total: int) -> float:
        rising = max(1, round(self.warmup * total))
        if step < rising:
            return (step + 1) / rising
        return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))


def parameter_groups(model: nn.Module, parameters: Iterable[nn.Parameter], schedule: Schedule) -> list[dict[str, Any]]:
    """Groups for the optimizer. Feature maps, biases and norms don't decay; what a module says of its own parameters
    by `optimizer_settings` (state-space models, implicit filters) is honoured.
    """
    maps = {id(p) for slot in slots(model).values() for p in slot.attention.parameters()}
    own: dict[int, OptimizerSettings] = {}
    for module in model.modules():
        for name, settings in getattr(module, "optimizer_settings", {}).items():
            own[id(getattr(module, name))] = settings
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for parameter in parameters:
        if not parameter.requires_grad:
            continue
        decays = parameter.ndim >= 2 and id(parameter) not in maps
        plain = OptimizerSettings(weight_decay=schedule.weight_decay if decays else 0.0)
        settings = own.get(id(parameter), plain)
        groups.setdefault((min(schedule.lr, settings.max_lr), settings.weight_decay), []).append(parameter)
    return [{"params": group, "lr": lr, "weight_decay": decay} for (lr, decay), group in groups.items()]


class _Stage(lightning.LightningModule):
    """What training and transfer share: the optimizer, its schedule, and what a checkpoint holds.

    A checkpoint holds what the stage changes, its optimizer's state with it, and nothing of what is frozen.
    """

    def __init__(self, model: nn.Module, schedule: Schedule) -> None:
        super().__init__()
        self.model, self.schedule = model, schedule
        self.tokens = 0  # attended tokens that this rank trained on
        self.accumulation = 1  # forward passes per step
        self._summed = torch.zeros(())  # the losses of a step's parts
        self._expected = self._counted = 1.0  # units of a step: as its first part lets expect, and as they were
        self.steps_between_points = 1  # of the curves
        self.shown: dict[str, Tensor] = {}  # beside the progress bar
        self.strict_loading = False  # checkpoints lack what is frozen; `check` sees to it that they lack nothing else

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """On a CPU it is where it should be. Lightning would search all of it for what it could move."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def weight(self, count: float, batch_idx: int) -> float:
        """What to multiply a part's summed loss with, so that the gradient, averaged over ranks, is that of the mean
        over all units of the step. Of a step in parts the first one lets expect how many there are; `correct` mends it.
        """
        if batch_idx % self.accumulation == 0:
            self._counted = 0.0
            self._expected = max(1.0, summed_over_ranks(count, self.device)) * self.accumulation
        self._counted += count
        return world_size() / self._expected

    def correct(self, parameters: Iterable[nn.Parameter]) -> None:
        """Divide the gradients of a step in parts by the units that it had."""
        gradients = [p.grad for p in parameters if p.grad is not None]
        if self.accumulation > 1 and gradients:
            torch._foreach_mul_(gradients, self._expected / summed_over_ranks(self._counted, self.device))

    def note(self, name: str, loss: Tensor, count: float, batch_idx: int) -> None:
        """Show a part's mean loss in the progress bar, and now and then write the step's, over all ranks, to the
        curves. Lightning's own `log` does that and far more, in a millisecond of every step.

        Args:
            loss: summed over `count` units.
        """
        self.shown = {"loss": loss / max(count, 1)}
        part = batch_idx % self.accumulation
        self._summed = loss if part == 0 else self._summed + loss
        if part + 1 < self.accumulation or (self.global_step + 1) % self.steps_between_points:
            return
        mean = summed_over_ranks(float(self._summed), self.device) / summed_over_ranks(self._counted, self.device)
        for logger in self.loggers:
            logger.log_metrics({name: mean, "epoch": self.current_epoch}, step=self.global_step)

    def changed(self) -> dict[str, Tensor]:
        """What this stage changes, by name."""
        changed = {id(p) for group in self.trained() for p in group["params"]} | {id(b) for b in self.buffers_changed()}
        return {name: tensor for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in changed}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        changed = self.changed()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in changed}
        checkpoint["tokens"] = summed_over_ranks(self.tokens, self.device)
        checkpoint["accumulation"] = self.accumulation

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoints.adapt(checkpoint, self.accumulation)
        self.tokens = int(checkpoint["tokens"]) if rank() == 0 else 0

    def check(self, found: Mapping[str, Tensor]) -> None:
        """Refuse tensors that are more or less than this stage changes, or of other shapes."""
        own = {name: tensor.shape for name, tensor in self.changed().items()}
        if {name: tensor.shape for name, tensor in found.items()} != own:
            raise HHBenchError("the checkpoint is of another model or of other settings: run without --resume")

    @abstractmethod
    def trained(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""

    @abstractmethod
    def buffers_changed(self) -> Iterable[Tensor]:
        """The buffers that may differ after this stage."""

    def configure_optimizers(self) -> OptimizerLRScheduler:
        optimizer = torch.optim.AdamW(
            self.trained(),
            lr=self.schedule.lr,
            betas=(0.9, self.schedule.beta2),
            # The plain loop costs a fifth of a small encoder's step; in mixed precision Lightning clips no fused one.
            fused=self.device.type in ("cpu", "cuda") and "mixed" not in str(self.trainer.precision),
        )
        total = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.schedule.factor(step, total))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class TrainStage(_Stage):
    """Train every weight of the model that isn't frozen on the task's loss, and test it.

    Attributes:
        metrics: of the last evaluation, by name.
        scores: per example of the last evaluation, by index.
        rate_flag: the option that sets the learning rate, for messages.
    """

    rate_flag = "--lr"

    def __init__(self, task: Task, model: nn.Module, data: TaskData, config: RunConfig, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.task, self.config = task, config
        self._looked = False
        self._whole: list[nn.Module] = []  # the model while a sharded copy trains; in a list it is no part of the stage
        self.measures = task.metrics(data, config)
        self.score_name = task.dataset(str(config.dataset)).score
        self.metrics: dict[str, float] = {}
        self.scores: dict[int, float] = {}
        self.affordable = math.inf  # tokens of a batch that evaluation has memory for

    def configure_model(self) -> None:
        """Under FSDP a copy is trained, of which this rank has a share."""
        if isinstance(self.trainer.strategy, ModelParallelStrategy) and not self._whole:
            assert self.device_mesh is not None
            self._whole.append(self.model)
            self.model = sharding.sharded_copy(self.model, self.device_mesh["data_parallel"])

    def make_whole(self) -> None:
        """What a sharded copy learned is the model's."""
        if self._whole:
            sharding.gather(self.model, self._whole[0])
            self.model = self._whole.pop()

    def trained(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.model.parameters(), self.schedule)

    def buffers_changed(self) -> Iterable[Tensor]:
        return self.model.buffers()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.task.step(self.model, batch)
        self.tokens += attended_tokens(batch) * batch["counts"]
        count = out.count * batch["counts"]
        weight = self.weight(count, batch_idx) * bool(count)
        loss = out.loss * (weight * self.accumulation)  # Lightning divides by the parts of a step
        if not torch.isfinite(loss):
            raise HHBenchError(
                f"the loss is {float(loss.detach())} at step {self.global_step}: {self._origin(batch)}; try a lower "
                f"{self.rate_flag} or precision 32-true"
            )
        self.note("train/loss", out.loss.detach() * bool(count), count, batch_idx)
        return loss

    def _origin(self, batch: Batch) -> str:
        """Where a loss that is no number comes from."""
        if self._whole:
            return "of a sharded model no rank can find out alone where it comes from"
        for name, parameter in self.model.named_parameters():
            if not torch.isfinite(parameter).all():
                return f"the weights {name} are not finite"
        found: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                tensors = output if isinstance(output, tuple | list) else (output,)
                if any(isinstance(t, Tensor) and t.is_floating_point() and not t.isfinite().all() for t in tensors):
                    found.append(name or "the model")

            return hook

        handles = [module.register_forward_hook(look(name)) for name, module in self.model.named_modules()]
        try:
            with torch.no_grad():
                self.task.step(self.model, batch)
        finally:
            for handle in handles:
                handle.remove()
        return f"the output of {found[0]} is not finite" if found else "every layer's output is finite"

    def on_after_backward(self) -> None:
        """Name what the loss doesn't reach, once. Under DDP it would wait for these gradients for ever."""
        if self._looked:
            return
        self._looked = True
        unused = [name for name, p in self.model.named_parameters() if p.requires_grad and p.grad is None]
        if not unused:
            return
        one = len(unused) == 1
        named = f"{len(unused)} parameter{' takes' if one else 's take'} no part in the loss: {', '.join(unused[:5])}"
        named += ", ..." * (len(unused) > 5)
        if world_size() > 1 and not self.config.find_unused_parameters:
            raise HHBenchError(f"{named}. Freeze what it leaves out, or add --find-unused-parameters, which costs time")
        if rank() == 0:
            log.warning("%s", named)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.correct(p for group in optimizer.param_groups for p in group["params"])

    def on_test_start(self) -> None:
        stopping.heed()

    def on_test_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        if world_size() == 1:  # ranks may test unequal numbers of batches: they agree on nothing here
            stopping.stop(stopping.noted(), "while testing")

    def _start(self) -> None:
        self.measures.reset()
        self.scores = {}

    def _evaluate(self, batch: Batch) -> None:
        """Measure a batch. One that a GPU has no memory for is measured in halves, and so are all as large after it."""
        index: Tensor = batch["index"]
        if not batch["counts"]:  # the others need this rank's share of the weights
            self.task.step(self.model, batch)
            return
        out, tokens = None, attended_tokens(batch)
        if tokens <= self.affordable:
            try:
                out = self.task.step(self.model, batch)
            except torch.OutOfMemoryError:
                if len(index) == 1:
                    raise
                self.affordable = tokens / 2
        if out is None:  # only here has the exception let go of what its frames held
            torch.cuda.empty_cache()
            for half in index.chunk(2):
                self._evaluate(self._collated(half.tolist()))
            return
        self.measures.update(*out.metric_inputs)
        self.scores.update(zip(index.tolist(), out.scores.tolist(), strict=True))

    def _collated(self, indices: list[int]) -> Batch:
        """The batch of some examples of the split that is evaluated."""
        batches: Any = self.trainer.test_dataloaders if self.trainer.testing else self.trainer.val_dataloaders
        batch = batches.collate_fn([batches.dataset[i] for i in indices])
        on_device: Batch = self.trainer.strategy.batch_to_device(self.trainer.precision_plugin.convert_input(batch))
        return on_device

    def _finish(self, stage: str) -> None:
        self.metrics = {name: float(value) for name, value in self.measures.compute().items()}
        for name, value in self.metrics.items():
            self.log(f"{stage}/{name}", value, rank_zero_only=False, sync_dist=False)

    on_validation_epoch_start = _start
    on_test_epoch_start = _start

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self._evaluate(batch)

    def on_validation_epoch_end(self) -> None:
        self._finish("val")

    def on_test_epoch_end(self) -> None:
        self._finish("test")


class TransferStage(_Stage):
    """Train the maps of every layer to mimic softmax; nothing else changes.

    The layers' backward passes run inside the forward pass, which DDP's reducer can't see: gradients are averaged
    over ranks here.

    Args:
        model: a host. Layers whose attention has nothing to learn pass softmax's output on and count for nothing.
        schedule: how it is optimised.
        loss, queries: see `TransferLoss`. What is drawn at a step is a function of the seed, the rank and the step.

    Raises:
        HHBenchError: no layer has anything to learn.
    """

    automatic_optimization = False

    def __init__(self, model: nn.Module, schedule: Schedule, loss: Loss = "weights", queries: int = 0) -> None:
        super().__init__(model, schedule)
        self.draws = torch.Generator()
        self.seed = torch.initial_seed()  # the run's, on every rank: dropout's, later, is one of each rank's own
        self.losses = {name: TransferLoss(loss=loss, queries=queries, generator=self.draws) for name in slots(model)}
        hosted = slots(model).items()
        self.taught = [name for name, s in hosted if any(p.requires_grad for p in s.attention.parameters())]
        if not self.taught:
            raise HHBenchError("no layer has anything to learn by attention transfer: leave the transfer stage out")

    def trained(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, attention_parameters(self.model), self.schedule)

    def buffers_changed(self) -> Iterable[Tensor]:
        return (buffer for attention in attentions(self.model) for buffer in attention.buffers())

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        self.model.eval()  # nothing is dropped out: each layer mimics the softmax that will be used
        part = batch_idx % self.accumulation
        if part == 0:
            optimizer.zero_grad()  # type: ignore[union-attr]
        draw = (self.global_step * self.accumulation + part) * world_size() + rank()
        self.draws.manual_seed((self.seed + 1_000_003 * draw) % 2**63)
        queries = attended_tokens(batch) * batch["counts"]
        self.tokens += queries
        weight = self.weight(queries, batch_idx) * bool(queries) / len(self.taught)
        for loss in self.losses.values():
            loss.weight = weight
        with torch.no_grad(), intercepted(self.model, dict(self.losses)):
            encode(self.model, batch["inputs"])
        total = torch.stack([self.losses[name].total for name in self.taught]).mean() * bool(queries)
        if not torch.isfinite(total):
            layer = next(name for name in self.taught if not torch.isfinite(self.losses[name].total))
            raise HHBenchError(
                f"the transfer loss is {float(total)} at step {self.global_step}: that of {layer} is not finite; try a "
                "lower --transfer-lr or precision 32-true"
            )
        self.note("transfer/loss", total, queries, batch_idx)
        if (batch_idx + 1) % self.accumulation:
            return
        parameters = attention_parameters(self.model)
        if world_size() > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world_size()
        self.correct(parameters)
        if self.schedule.clip:
            torch.nn.utils.clip_grad_norm_(parameters, self.schedule.clip)
        optimizer.step()  # type: ignore[union-attr]
        scheduler.step()  # type: ignore[union-attr]


def encode(model: nn.Module, inputs: Batch) -> None:
    """Run a host up to its last hidden state, without its head and its cache: transfer needs neither."""
    if hasattr(model, "forward_features"):
        model.forward_features(**inputs)  # type: ignore[operator]
        return
    base = getattr(model, "base_model", model)
    base(**(inputs | ({"use_cache": False} if "use_cache" in _parameters(type(base).forward) else {})))


@functools.cache
def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(function).parameters)


def attended_tokens(batch: Batch) -> int:
    """Attended tokens of a batch; an image's are its patches, which the task counts."""
    return int(batch["num_tokens"])


# ---- running a stage -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StageReport:
    """What a stage cost, and how good its best epoch was.

    Attributes:
        seconds: of training, evaluation apart.
        tokens: attended tokens trained on, over all ranks.
        steps: optimizer steps.
        validation: the score of the epoch that was kept; None without a validation split.
    """

    seconds: float
    tokens: int
    steps: int
    validation: float | None


class _Clock(Callback):
    """Training time without evaluation."""

    def __init__(self) -> None:
        self.seconds, self._since = 0.0, 0.0

    def state_dict(self) -> dict[str, Any]:
        running = time.perf_counter() - self._since if self._since else 0.0
        return {"seconds": self.seconds + running}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.seconds = float(state_dict["seconds"])

    def on_train_start(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_validation_start(self, *args: Any) -> None:
        self._stop()

    def on_validation_end(self, *args: Any) -> None:
        self._since = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        self.seconds, self._since = self.seconds + time.perf_counter() - self._since, 0.0


class _Best(Callback):
    """Remembers the weights of the best validation. A checkpoint holds them too, so that both are of one moment."""

    def __init__(self, monitor: str, *, higher_is_better: bool) -> None:
        self.monitor, self.higher_is_better = monitor, higher_is_better
        self.score: float | None = None
        self.weights: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return {"score": self.score, "weights": self.weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.score, self.weights = state_dict["score"], state_dict["weights"]

    def on_validation_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        assert isinstance(module, TrainStage)
        score = module.metrics[self.monitor]
        better = self.score is None or (score > self.score if self.higher_is_better else score < self.score)
        if better and math.isfinite(score):
            self.score = score
            found = module.changed().items()
            self.weights = {name: sharding.whole(t.detach()).to("cpu", copy=True) for name, t in found}


def fit(
    stage: TrainStage | TransferStage,
    train: "DataLoader[Example]",
    validation: "DataLoader[Example] | None",
    config: RunConfig,
    *,
    folder: Path,
    title: str,
    higher_is_better: bool = True,
) -> StageReport:
    """Train one stage; with a validation loader, the model ends with the weights of its best epoch.

    With `config.resume` it goes on from its newest good checkpoint; a stage that was finished isn't trained again.

    Args:
        folder: for checkpoints and curves. What the stage leaves there, `checkpoints.forget` removes.
        title: what the progress bar says.

    Raises:
        Stopped: a signal came; a checkpoint is kept.
        KeyboardInterrupt: Ctrl-C; a checkpoint is kept.
    """
    if config.resume and (kept := checkpoints.load_finished(folder)):
        log.info("%s was finished", title)
        stage.check(kept[0])
        stage.load_state_dict(kept[0], strict=False)
        return StageReport(**kept[1])
    if not config.resume:
        checkpoints.forget(folder)
    stopping.stop_between_stages(f"before {title}")
    batches_per_step = _accumulation(config)
    steps = math.ceil(stage.schedule.epochs * len(train) / batches_per_step)
    if steps == 0:
        return StageReport(0.0, 0, 0, None)
    # One validation per begun epoch, the last one at the very end.
    validations = math.ceil(stage.schedule.epochs)
    steps = validations * math.ceil(steps / validations)
    stage.accumulation, stage.steps_between_points = batches_per_step, max(1, min(50, steps // 10))
    clock = _Clock()
    keeper = Checkpoints(folder, batches_per_step, minutes=config.checkpoint_minutes)
    callbacks: list[Callback] = [Progress(title, steps), clock, keeper]
    best = None
    if validation is not None:
        assert isinstance(stage, TrainStage)
        best = _Best(stage.score_name, higher_is_better=higher_is_better)
        callbacks.append(best)
    with _quiet():
        trainer = _trainer(
            config,
            sharded=config.strategy == "fsdp" and isinstance(stage, TrainStage),
            max_steps=steps,
            check_val_every_n_epoch=None,
            val_check_interval=steps // validations * batches_per_step,
            limit_val_batches=1.0 if validation is not None else 0,
            accumulate_grad_batches=batches_per_step if isinstance(stage, TrainStage) else 1,
            gradient_clip_val=stage.schedule.clip or None if isinstance(stage, TrainStage) else None,
            callbacks=callbacks,
            logger=_logger(config, folder),
            enable_checkpointing=False,
            log_every_n_steps=stage.steps_between_points,
        )
        resume = checkpoints.newest(folder, "step", ".ckpt") if config.resume else None
        if resume is not None:
            log.info("continuing %s from %s", title, resume)
            assert isinstance(train.batch_sampler, Batches)
            content = checkpoints.load(resume)
            stage.check(content["state_dict"])
            epoch, taken = checkpoints.steps_taken(content)
            # Lightning would start the epoch that was interrupted afresh.
            train.batch_sampler.set_epoch(epoch)
            train.batch_sampler.taken = {epoch: taken * batches_per_step}
        with _interruptible(), stopping.steps():
            trainer.fit(stage, train, validation, ckpt_path=resume, weights_only=True)
    if isinstance(stage, TrainStage):
        stage.make_whole()
    if best is not None and best.weights:
        stage.load_state_dict(best.weights, strict=False)
    tokens = int(summed_over_ranks(stage.tokens, stage.device))
    report = StageReport(clock.seconds, tokens, steps, None if best is None else best.score)
    checkpoints.save_finished(folder, stage.changed(), dataclasses.asdict(report))
    stopping.stop_between_stages(f"after {title}")
    return report


def evaluate(
    stage: TrainStage, batches: "DataLoader[Example]", config: RunConfig, *, title: str
) -> tuple[dict[str, float], dict[int, float]]:
    """Metrics by name, and the score of each example by its index, over all ranks."""
    with _quiet(), _interruptible():
        trainer = _trainer(config, callbacks=[Progress(title, len(batches))], logger=False, enable_checkpointing=False)
        trainer.test(stage, batches, verbose=False)
    return stage.metrics, {index: score for part in gathered(stage.scores) for index, score in part.items()}


def _trainer(config: RunConfig, *, sharded: bool = False, **arguments: Any) -> lightning.Trainer:
    world = config.devices * config.num_nodes
    backend = "gloo" if config.accelerator == "cpu" else None
    strategy: Any = "auto"
    if world > 1 and sharded:
        strategy = ModelParallelStrategy(
            data_parallel_size=world,
            tensor_parallel_size=1,
            save_distributed_checkpoint=False,
            process_group_backend=backend,
        )
    elif world > 1:
        # Buffers are seeded alike on every rank; ranks may test unequal numbers of batches, which a broadcast would
        # wait for.
        strategy = DDPStrategy(
            broadcast_buffers=False,
            find_unused_parameters=config.find_unused_parameters,
            process_group_backend=backend,
        )
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        plugins=_environment() if world > 1 else LightningEnvironment(),
        precision=config.precision,  # type: ignore[arg-type]
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


def _environment() -> ClusterEnvironment:
    """How Lightning is to find the ranks. Its own search sees a Slurm job where there is one process alone, and would
    requeue it wherever a signal comes.
    """
    return SLURMEnvironment(auto_requeue=False) if launched().by == "Slurm" else TorchElasticEnvironment()


def _logger(config: RunConfig, folder: Path) -> Logger | bool:
    if config.logger == "none":
        return False
    if config.logger == "csv":
        return CSVLogger(folder, name=None, version="curves")
    if config.logger == "tensorboard":
        return TensorBoardLogger(folder, name=None, version="curves")
    return WandbLogger(project="hhbench", save_dir=folder, name=folder.parent.name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep Lightning's hints for developers away from a user's terminal."""
    names = ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero")
    before = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="lightning")
        warnings.filterwarnings("ignore", module="torch.utils.data")
        try:
            yield
        finally:
            for name, level in before.items():
                logging.getLogger(name).setLevel(level)


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Lightning turns Ctrl-C into an exit; the command line wants to say how to go on."""
    try:
        yield
    except SystemExit as error:
        raise KeyboardInterrupt from error
