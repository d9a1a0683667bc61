"""Training and testing one stage under Lightning, on one device or many.

Every loss is a sum, divided by the number of examples or tokens on all ranks together, and every rank gets its share
of the same seeded order: two processes take the step that one would.
"""

import contextlib
import functools
import inspect
import logging
import math
import time
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger, TensorBoardLogger, WandbLogger
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.exceptions import SIGTERMException
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from hhbench.attention import OptimizerSettings
from hhbench.config import RunConfig
from hhbench.distill import Loss, TransferLoss, intercepted
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import attention_parameters, attentions, slots
from hhbench.progress import Progress
from hhbench.task import Batch, Example, Split, Task, TaskData

log = logging.getLogger("hhbench")

SECONDS_BETWEEN_CHECKPOINTS = 300.0  # what a machine that dies takes with it, at most
# Padded tokens of an evaluation's batch, at most. A GPU that has no room for so many takes halves of them; a CPU gains
# nothing from more than its caches hold.
EVALUATED_TOKENS = {"cpu": 2048, "cuda": 2**17}


# ---- ranks -----------------------------------------------------------------------------------------------------


def world_size() -> int:
    return torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1


def rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_initialized() else 0


def barrier() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()


def summed_over_ranks(value: float, device: torch.device) -> float:
    """The sum of a number over all ranks, in float64 where the device has it."""
    if world_size() == 1:
        return value
    dtype = torch.float32 if device.type == "mps" else torch.float64
    total = torch.tensor(value, dtype=dtype, device=device)
    torch.distributed.all_reduce(total)
    return float(total)


# ---- batches ---------------------------------------------------------------------------------------------------


class Batches(Sampler[list[int]]):
    """Batches of like lengths, in an order that is a function of (seed, epoch) alone.

    Every rank makes the same global batches. While training each rank takes its share of every one; while testing
    the batches are dealt out whole, so that no example is repeated.

    Args:
        lengths: of the examples, in tokens.
        size: of a global batch: of training in examples, of testing in padded tokens, at most, and one example at
            least.
        seed: None orders by length, the longest first: testing. What needs most memory is tried at once.
        divide: the number of equal parts that a rank's share is cut into, for gradient accumulation.
    """

    POOL = 50  # batches whose examples are sorted by length together

    def __init__(self, lengths: Sequence[int], size: int, *, seed: int | None, divide: int = 1) -> None:
        self.lengths, self.size, self.seed, self.divide = np.asarray(lengths), size, seed, divide
        self.epoch = 0
        self.taken: dict[int, int] = {}  # by epoch, the batches that an interrupted run took of it

    @property
    def sampler(self) -> "Batches":
        """Where Lightning looks for `set_epoch`."""
        return self

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

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
        del batches[self._num_shuffled() :]
        return [batches[i] for i in torch.randperm(len(batches), generator=generator)]

    def _num_shuffled(self) -> int:
        """How many batches an epoch of training has: the last one must have an example for every part."""
        whole, rest = divmod(len(self.lengths), self.size)
        return whole + (rest >= (world_size() * self.divide if whole else 1))

    def __iter__(self) -> Iterator[list[int]]:
        batches = self.global_batches()
        if self.seed is None:
            yield from batches[rank() :: world_size()]
            return
        shares = [batch[rank() :: world_size()] for batch in batches]
        parts = [share[part :: self.divide] for share in shares for part in range(self.divide)]
        yield from parts[self.taken.get(self.epoch, 0) :]

    def __len__(self) -> int:
        if self.seed is None:
            return math.ceil((len(self._by_length()) - rank()) / world_size())
        return self._num_shuffled() * self.divide


def loader(split: Split, data: TaskData, config: RunConfig, *, train: bool, seed: int = 0) -> "DataLoader[Example]":
    """Batches of a split, each with the "index" of its examples."""
    batches = Batches(
        split.lengths,
        int(config.batch_size or 1) if train else _evaluated_tokens(split, config),
        seed=seed if train else None,
        divide=_accumulation(config) if train else 1,
    )

    def collate(pairs: list[tuple[int, Example]]) -> Batch:
        batch = data.collate([example for _, example in pairs])
        return batch | {"index": torch.tensor([index for index, _ in pairs])}

    return DataLoader(
        _Indexed(split),  # type: ignore[arg-type]
        batch_sampler=batches,
        collate_fn=collate,
        num_workers=config.workers,
        persistent_workers=config.workers > 0,
        pin_memory=_on_cuda(config),
    )


class _Indexed(torch.utils.data.Dataset[tuple[int, Example]]):
    def __init__(self, split: Split) -> None:
        self.split = split

    def __getitem__(self, index: int) -> tuple[int, Example]:
        return index, self.split.examples[index]

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
        self.steps_between_points = 1  # of the curves
        self.shown: dict[str, Tensor] = {}  # beside the progress bar
        self.strict_loading = False  # checkpoints lack what is frozen; `check` sees to it that they lack nothing else

    def transfer_batch_to_device(self, batch: Batch, device: torch.device, dataloader_idx: int) -> Batch:
        """On a CPU it is where it should be. Lightning would search all of it for what it could move."""
        return batch if device.type == "cpu" else super().transfer_batch_to_device(batch, device, dataloader_idx)

    def note(self, name: str, loss: Tensor, batch_idx: int) -> None:
        """Show a loss in the progress bar, and now and then write it to the curves. Lightning's own `log` does that and
        far more, in a millisecond of every step.
        """
        self.shown = {"loss": loss}
        if (batch_idx + 1) % self.accumulation or (self.global_step + 1) % self.steps_between_points:
            return
        for logger in self.loggers:
            logger.log_metrics({name: float(loss), "epoch": self.current_epoch}, step=self.global_step)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        changed = self._changed_names()
        state = checkpoint["state_dict"]
        checkpoint["state_dict"] = {name: tensor for name, tensor in state.items() if name in changed}
        checkpoint["tokens"] = self.tokens

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.check(checkpoint)
        self.tokens = int(checkpoint.get("tokens", 0))

    def check(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint that holds more or less than this stage changes, or other shapes."""
        found = {name: tensor.shape for name, tensor in checkpoint["state_dict"].items()}
        own = self.state_dict()
        if found != {name: own[name].shape for name in self._changed_names()}:
            raise HHBenchError("the checkpoint is of another model or of other settings: run without --resume")

    @abstractmethod
    def trained(self) -> list[dict[str, Any]]:
        """Parameter groups for the optimizer."""

    @abstractmethod
    def buffers_changed(self) -> Iterable[Tensor]:
        """The buffers that may differ after this stage."""

    def _changed_names(self) -> set[str]:
        changed = {id(p) for group in self.trained() for p in group["params"]} | {id(b) for b in self.buffers_changed()}
        return {name for name, tensor in self.state_dict(keep_vars=True).items() if id(tensor) in changed}

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
    """

    def __init__(self, task: Task, model: nn.Module, data: TaskData, config: RunConfig, schedule: Schedule) -> None:
        super().__init__(model, schedule)
        self.task = task
        self.measures = task.metrics(data, config)
        self.score_name = task.dataset(str(config.dataset)).score
        self.metrics: dict[str, float] = {}
        self.scores: dict[int, float] = {}
        self.affordable = math.inf  # tokens of a batch that evaluation has memory for

    def trained(self) -> list[dict[str, Any]]:
        return parameter_groups(self.model, self.model.parameters(), self.schedule)

    def buffers_changed(self) -> Iterable[Tensor]:
        return self.model.buffers()

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        out = self.task.step(self.model, batch)
        self.tokens += attended_tokens(batch)
        everywhere = summed_over_ranks(out.count, self.device)
        loss = out.loss * (world_size() / everywhere)  # DDP divides the gradients' sum by the world size
        if not torch.isfinite(loss):
            raise HHBenchError(
                f"the loss is {float(loss.detach())} at step {self.global_step}: try a lower --lr or precision 32-true"
            )
        self.note("train/loss", loss.detach(), batch_idx)
        return loss

    def _start(self) -> None:
        self.measures.reset()
        self.scores = {}

    def _evaluate(self, batch: Batch) -> None:
        """Measure a batch. One that a GPU has no memory for is measured in halves, and so are all as large after it."""
        index: Tensor = batch["index"]
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
        self.draws.manual_seed((torch.initial_seed() + 1_000_003 * draw) % 2**63)
        queries = attended_tokens(batch)
        self.tokens += queries
        everywhere = summed_over_ranks(queries, self.device)
        weight = world_size() / (len(self.taught) * everywhere * self.accumulation)
        for loss in self.losses.values():
            loss.weight = weight
        with torch.no_grad(), intercepted(self.model, dict(self.losses)):
            encode(self.model, batch["inputs"])
        total = torch.stack([self.losses[name].total for name in self.taught]).mean() / queries
        if not torch.isfinite(total):
            raise HHBenchError(
                f"the transfer loss is {float(total)} at step {self.global_step}: try a lower --transfer-lr or "
                "precision 32-true"
            )
        self.note("transfer/loss", total, batch_idx)
        if (batch_idx + 1) % self.accumulation:
            return
        parameters = attention_parameters(self.model)
        if world_size() > 1:
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                torch.distributed.all_reduce(parameter.grad)
                parameter.grad /= world_size()
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


class _Checkpoints(Callback):
    """Keeps `last.ckpt`, every few minutes, on Ctrl-C and on SIGTERM: whatever ends a stage, it can go on.

    It is written aside and then renamed, between two optimizer steps, with the state of torch's generators: what is
    dropped out after it is what would have been.

    Args:
        path: of the checkpoint.
        accumulation: batches per optimizer step.
    """

    def __init__(self, path: Path, accumulation: int) -> None:
        self.path, self.accumulation = path, accumulation
        self._saved = 0.0
        self._generators: dict[str, Tensor] = {}  # as they were between the last two steps
        self._resumed: dict[str, Tensor] = {}

    def state_dict(self) -> dict[str, Any]:
        return dict(self._generators)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._resumed = state_dict

    def on_train_start(self, *args: Any) -> None:
        self._saved = time.monotonic()

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if batch_idx % self.accumulation:
            return
        _set_generators(self._resumed)
        self._resumed, self._generators = {}, _generators()
        # Validation and the order of a new epoch lie behind: nothing is between this and the step.
        due = rank() == 0 and time.monotonic() - self._saved >= SECONDS_BETWEEN_CHECKPOINTS
        if summed_over_ranks(float(due), module.device) and trainer.global_step:
            self._save(trainer)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if (batch_idx + 1) % self.accumulation == 0:
            self._generators = _generators()

    def on_validation_end(self, *args: Any) -> None:
        self._generators = _generators()

    def on_exception(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, exception: BaseException
    ) -> None:
        if isinstance(exception, KeyboardInterrupt | SIGTERMException) and trainer.global_step:
            self._save(trainer)

    def _save(self, trainer: lightning.Trainer) -> None:
        # Lightning counts the batch that is under way, and would validate a step early ever after; gradients of a step
        # that was begun are lost, so that all its batches are to come again.
        progress = trainer.fit_loop.epoch_loop.batch_progress
        kept = progress.state_dict()
        begun = progress.current.completed % self.accumulation
        for counts in (progress.current, progress.total):
            counts.completed -= begun
        progress.total.ready = progress.total.completed
        aside = self.path.with_suffix(".part")
        try:
            trainer.save_checkpoint(aside)
            if rank() == 0:
                aside.replace(self.path)
        except OSError as error:  # a full disk costs the checkpoint, not the run
            log.warning("%s can't be written: %s", self.path, error)
            aside.unlink(missing_ok=True)
            barrier()  # the others wait in save_checkpoint
        progress.load_state_dict(kept)
        self._saved = time.monotonic()


def _generators() -> dict[str, Tensor]:
    asked = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]  # `is_available` would ask the driver
    cuda = {"cuda": torch.cuda.get_rng_state()} if asked else {}
    return {"cpu": torch.get_rng_state(), **cuda}


def _set_generators(states: dict[str, Tensor]) -> None:
    if "cpu" in states:
        torch.set_rng_state(states["cpu"].cpu())
    if "cuda" in states and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"].cpu())


def _skip_taken(batches: Batches, checkpoint: Path) -> None:
    """Have the epoch that was interrupted go on where it was: Lightning would start it afresh."""
    loops = torch.load(checkpoint, map_location="cpu", weights_only=True)["loops"]["fit_loop"]
    epoch = loops["epoch_progress"]["current"]["processed"]
    batches.set_epoch(epoch)
    batches.taken = {epoch: loops["epoch_loop.batch_progress"]["current"]["completed"]}


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

    Args:
        folder: for checkpoints and curves. A stage leaves `last.ckpt` there when it is interrupted, and every few
            minutes before that; `config.resume` goes on from it.
        title: what the progress bar says.
    """
    batches_per_step = _accumulation(config)
    steps = math.ceil(stage.schedule.epochs * len(train) / batches_per_step)
    if steps == 0:
        return StageReport(0.0, 0, 0, None)
    # One validation per begun epoch, the last one at the very end.
    validations = math.ceil(stage.schedule.epochs)
    steps = validations * math.ceil(steps / validations)
    stage.accumulation, stage.steps_between_points = batches_per_step, max(1, min(50, steps // 10))
    last = folder / "last.ckpt"
    clock = _Clock()
    callbacks: list[Callback] = [Progress(title, steps), clock, _Checkpoints(last, batches_per_step)]
    best = None
    if validation is not None:
        assert isinstance(stage, TrainStage)
        best = ModelCheckpoint(
            dirpath=folder,
            filename="best",
            monitor=f"val/{stage.score_name}",
            mode="max" if higher_is_better else "min",
            save_weights_only=True,
            save_on_train_epoch_end=False,
            enable_version_counter=False,  # one file: an older one may be what a resumed run falls back on
        )
        callbacks.append(best)
    with _quiet():
        trainer = _trainer(
            config,
            max_steps=steps,
            check_val_every_n_epoch=None,
            val_check_interval=steps // validations * batches_per_step,
            limit_val_batches=1.0 if validation is not None else 0,
            accumulate_grad_batches=batches_per_step if isinstance(stage, TrainStage) else 1,
            gradient_clip_val=stage.schedule.clip or None if isinstance(stage, TrainStage) else None,
            callbacks=callbacks,
            logger=_logger(config, folder),
            enable_checkpointing=True,
            log_every_n_steps=stage.steps_between_points,
        )
        resume = str(last) if config.resume and last.exists() else None
        if resume:
            log.info("continuing %s from %s", title, last)
            assert isinstance(train.batch_sampler, Batches)
            _skip_taken(train.batch_sampler, last)
        with _interruptible():
            trainer.fit(stage, train, validation, ckpt_path=resume, weights_only=True)
    if best is not None and best.best_model_path:
        kept = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
        stage.check(kept)
        stage.load_state_dict(kept["state_dict"], strict=False)
    barrier()
    if rank() == 0:
        for path in (*folder.glob("*.ckpt"), last.with_suffix(".part")):
            path.unlink(missing_ok=True)
    tokens = int(
        summed_over_ranks(stage.tokens, torch.device("cpu") if not torch.cuda.is_available() else stage.device)
    )
    score = None if best is None or best.best_model_score is None else float(best.best_model_score)
    return StageReport(clock.seconds, tokens, steps, score)


def evaluate(
    stage: TrainStage, batches: "DataLoader[Example]", config: RunConfig, *, title: str
) -> tuple[dict[str, float], dict[int, float]]:
    """Metrics by name, and the score of each example by its index, over all ranks."""
    with _quiet(), _interruptible():
        trainer = _trainer(config, callbacks=[Progress(title, len(batches))], logger=False, enable_checkpointing=False)
        trainer.test(stage, batches, verbose=False)
    scores = stage.scores
    if world_size() > 1:
        parts: list[dict[int, float]] = [{} for _ in range(world_size())]
        torch.distributed.all_gather_object(parts, scores)
        scores = {index: score for part in parts for index, score in part.items()}
    return stage.metrics, scores


def _trainer(config: RunConfig, **arguments: Any) -> lightning.Trainer:
    parallel = config.devices * config.num_nodes > 1
    strategy: Any = "auto"
    if parallel:
        # Buffers are seeded alike on every rank; ranks may test unequal numbers of batches, which a broadcast would
        # wait for.
        strategy = DDPStrategy(
            broadcast_buffers=False, process_group_backend="gloo" if config.accelerator == "cpu" else None
        )
    return lightning.Trainer(
        accelerator=config.accelerator,
        devices=config.devices,
        num_nodes=config.num_nodes,
        strategy=strategy,
        precision=config.precision,  # type: ignore[arg-type]
        use_distributed_sampler=False,
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        **arguments,
    )


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
