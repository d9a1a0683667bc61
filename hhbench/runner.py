"""A RunConfig in, a Result out.

    scratch                 build -> give it the attention -> train -> test
    finetuned-conversion    teacher trained on the task -> swap -> transfer -> finetune -> test
    pretrained-conversion   pretrained weights -> swap -> transfer -> train on the task -> test

A teacher is trained once and shared by all attentions and seeds that ask for the same. A finished key isn't run again.
"""

import contextlib
import copy
import dataclasses
import logging
import os
import platform
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from torch import nn

from hhbench import hosts, models, result
from hhbench.attention import ATTENTIONS, AttentionSpec, Direction, probe
from hhbench.config import RECIPES, RunConfig
from hhbench.distill import LayerFidelity, intercepted
from hhbench.errors import HHBenchError, UsageError, in_one_line, unknown_name
from hhbench.registry import source_hash
from hhbench.result import Cost, Fidelity, Identity, Result, Score, Teacher, Trial, Tuning
from hhbench.task import TASKS, Task, TaskData
from hhbench.train import (
    Schedule,
    StageReport,
    TrainStage,
    TransferStage,
    barrier,
    check_batch_size,
    encode,
    evaluate,
    fit,
    loader,
    rank,
    world_size,
)

log = logging.getLogger("hhbench")

TRANSFERRED = "transfer.safetensors"  # what transfer taught the maps, until the run is done
FIDELITY_EXAMPLES = 128  # of the validation split, on which KL and entropies are measured

# What a teacher depends on: not on the attention, nor on what happens after the swap.
TEACHER_SETTINGS = (
    "task", "dataset", "preset", "model", "max_len", "dropout", "train_examples", "test_examples", "batch_size",
    "teacher_epochs", "teacher_lr", "teacher_seed", "weight_decay", "beta2", "warmup", "clip", "precision",
    "micro_batch_size",
)  # fmt: skip


def expand(config: RunConfig) -> list[RunConfig]:
    """One config per data set: the preset's suite where none is named."""
    if config.dataset is not None:
        return [config]
    task = TASKS.get(config.task).build()
    return [dataclasses.replace(config, dataset=name) for name in task.suites[config.preset]]


@dataclass(frozen=True)
class Plan:
    """A checked config with nothing blank, and what it resolved to. Making one trains and downloads nothing."""

    given: RunConfig
    config: RunConfig
    task: Task
    spec: AttentionSpec

    @property
    def converts(self) -> bool:
        return self.config.regime != "scratch"

    @property
    def label(self) -> str:
        return self.spec.label(self.config.options)

    @property
    def transfers(self) -> bool:
        """Whether there is a transfer stage. What has no parameters has nothing to teach: the stage is skipped."""
        return self.converts and RECIPES[str(self.config.recipe)].transfer and bool(self.config.transfer_epochs)

    @property
    def trains(self) -> bool:
        return not self.converts or RECIPES[str(self.config.recipe)].finetune

    def lines(self) -> list[str]:
        """What the run will do, for a person."""
        c, data = self.config, self.task.dataset(str(self.config.dataset))
        stages = []
        if c.regime == "finetuned-conversion":
            stages.append(f"teacher {c.teacher_epochs:g} epochs at {c.teacher_lr:g} (seed {c.teacher_seed})")
        if self.converts:
            stages.append("swap")
        if self.transfers:
            stages.append(f"transfer {c.transfer_epochs:g} epochs at {c.transfer_lr:g}")
        if self.trains:
            rate = f"best of {list(c.tune)}" if c.tune else f"{c.lr:g}"
            stages.append(f"{'finetune' if self.converts else 'train'} {c.epochs:g} epochs at {rate}")
        recipe = f", recipe {c.recipe}" if self.converts else ""
        return [
            f"{self.task.name} / {data.title} with {self.label} ({c.preset}, {c.regime}{recipe}, seed {c.seed})",
            f"  model {c.model}, up to {c.max_len} tokens, batch {c.batch_size}",
            f"  stages: {' -> '.join(stages)} -> test",
        ]


def prepare(config: RunConfig) -> Plan:
    """Check a config and fill its blanks.

    Raises:
        UsageError: a name, an option or a combination that can't be; before anything is fetched or trained.
    """
    given = config
    task = TASKS.get(config.task).build()
    spec = ATTENTIONS.get(config.attn)
    if config.dataset is None:
        raise UsageError(f"name a data set of {task.name}: {', '.join(task.datasets)}, or use expand() for the suite")
    task.dataset(config.dataset)
    regime = config.regime or task.regimes[0]
    if regime not in task.regimes:
        raise UsageError(f"{task.name} has no regime {regime}; it has {', '.join(task.regimes)}")
    if regime == "scratch" and config.recipe is not None:
        raise UsageError(f"--recipe {config.recipe} is for conversions; scratch trains everything together")
    if regime != "scratch" and config.recipe is not None and (config.recipe == "replacement") == spec.convertible:
        raise UsageError(
            f"--recipe {config.recipe} doesn't fit {spec.name}, which "
            + ("takes over q, k and v" if spec.convertible else "replaces whole blocks: it has no q and k to teach")
        )
    direction: Direction = "causal" if task.causal else "bidirectional"
    spec.check(direction=direction, options=config.options)
    if spec.external or config.option:
        try:
            probe(spec, direction=direction, options=config.options)
        except (TypeError, ValueError, RuntimeError) as error:  # an option of one of ours with a value of a wrong kind
            if isinstance(error, HHBenchError):
                raise
            raise UsageError(f"{spec.label(config.options)} can't be built: {in_one_line(error)}") from error
    config = dataclasses.replace(
        config, regime=regime, recipe=None if regime == "scratch" else config.recipe or spec.recipe
    )
    config = config.filled(task.settings(config))
    blank = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None]
    if missing := set(blank) - {"recipe", "micro_batch_size", "data_folder"}:
        raise HHBenchError(f"the {config.preset} preset of {task.name} leaves {', '.join(sorted(missing))} blank")
    _check_machine(config)
    plan = Plan(given, config, task, spec)
    if config.tune and not (plan.trains and config.epochs):
        raise UsageError("--tune needs a stage that trains: this recipe has none, or --epochs is 0")
    return plan


def _check_machine(config: RunConfig) -> None:
    check_batch_size(config)
    name, count = config.accelerator, config.devices
    available = {
        "cuda": torch.cuda.device_count(),
        "gpu": torch.cuda.device_count() or int(torch.backends.mps.is_available()),
    }
    available["mps"] = int(torch.backends.mps.is_available())
    if name not in ("auto", "cpu", *available):
        raise unknown_name("accelerator", name, ("auto", "cpu", *available))
    if name in available and available[name] < count:
        raise UsageError(f"--accelerator {name} --devices {count}: this machine has {available[name]} of them")
    if name == "auto" and 0 < torch.cuda.device_count() < count:
        raise UsageError(f"--devices {count}: this machine has {torch.cuda.device_count()} GPUs; add --accelerator cpu")
    if config.logger not in ("none", "csv") and find_spec(config.logger) is None:
        raise UsageError(f"--logger {config.logger} needs the package {config.logger}: pip install {config.logger}")
    there = next(folder for folder in (config.out.absolute(), *config.out.absolute().parents) if folder.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UsageError(
            f"--out {config.out} can't be written: {there} is {'read-only' if there.is_dir() else 'a file'}"
        )


def run(config: RunConfig) -> Result:
    """Run one config to its result, or return the result that is there. See `execute`.

    >>> run(RunConfig(task="recall", dataset="ar", attn="hedgehog", out=Path("runs")))
    """
    return execute(config)[0]


def execute(config: RunConfig) -> tuple[Result, Path]:
    """The result of a config, and the path of its file. With more than one device, starts a process for each.

    Raises:
        UsageError: the config can't be.
        DataError: data or weights can't be had.
        HHBenchError: training failed in a way that the user can act on.
    """
    from hhbench.cluster import launched_world, on_all_devices

    plan = prepare(config)
    world = config.devices * config.num_nodes
    if world > 1 and launched_world() == 1:
        config.out.mkdir(parents=True, exist_ok=True)
        return on_all_devices(config)
    if launched_world() != world:
        raise UsageError(f"the launcher started {launched_world()} processes; --devices x --num-nodes is {world}")
    under_way = _Run(plan)
    return under_way.result(), under_way.folder / result.FILE_NAME


class _Run:
    """One run under way: its data, its models, its folder."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, self.task = plan, plan.config, plan.task
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.params_added = 0
        self.teacher: Teacher | None = None
        self.after_swap: float | None = None
        self.after_transfer: float | None = None
        self.fidelity: Fidelity | None = None
        self.tuning: Tuning | None = None
        self.data: TaskData = self.task.load_data(self.config)
        self.weights = self.task.weights(self.config)
        self.key = result.key_of(self.identity)
        self.folder = self._folder()

    @cached_property
    def identity(self) -> Identity:
        spec, task = self.plan.spec, self.task
        settings = self.config.identity()
        settings["dataset"] = self.task.dataset(str(self.config.dataset)).title  # a path differs between machines
        settings["attn"] = spec.name  # and so does a user's file, which goes by its content
        own_task = source_hash(type(task))  # a user's own file says which data they are, as much as the data do
        return Identity(
            settings=settings,
            data=dict(self.data.hashes) | ({"task's file": own_task} if own_task else {}),
            weights=self.weights,
            attention={"name": spec.name, "version": spec.version, "source_sha256": spec.source_hash()},
            task={"name": task.name, "version": task.version},
        )

    def _folder(self) -> Path:
        c = self.config
        parts = [
            self.plan.label,
            c.preset,
            str(c.regime),
            *([c.recipe] if c.recipe else []),
            f"s{c.seed}",
            self.key[:8],
        ]
        return c.out / _safe(self.task.name) / _safe(Path(str(c.dataset)).name) / _safe("-".join(parts))

    def result(self) -> Result:
        done = self.folder / result.FILE_NAME
        if done.exists() and not self.config.force:
            found = result.load(done)
            if found.key == self.key and (
                not self.config.save_model or (self.folder / "model" / "hhbench.json").exists()
            ):
                log.info("done already: %s", done)
                return found
        if rank() == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        made = self._run()
        if rank() == 0:
            result.save(made, self.folder)
            (self.folder / TRANSFERRED).unlink(missing_ok=True)
        barrier()
        return made

    # ---- the stages --------------------------------------------------------------------------------------------

    def _run(self) -> Result:
        plan, c = self.plan, self.config
        _reset_peak_memory()
        model = self._start()
        before = _count(model)
        torch.manual_seed(c.seed)
        hosts.convert(model, plan.spec, **c.options)
        self.params_added = _count(model) - before
        log.info("%s adds %s parameters to %s", plan.label, f"{self.params_added:,}", f"{before:,}")
        if plan.converts:
            self._after_the_swap(model)
        if plan.trains:
            self.tuning = self._train(model)
        value, metrics, scores = self._test(model, "test")
        if self.fidelity is not None:
            self.fidelity["floored_rows"] = sum(int(counter) for counter in _floored(model))
            if self.fidelity["floored_rows"]:
                log.info("%d rows of features lay at the floor in the test", self.fidelity["floored_rows"])
        if rank() == 0:
            if c.save_model:
                models.save(model, self.folder / "model", attn=c.attn, options=c.options)
            order = sorted(scores)
            np.savez_compressed(
                self.folder / "examples.npz",
                index=np.array(order, dtype=np.int32),
                score=np.array([scores[i] for i in order], dtype=np.float32),
            )
        return self._record(model, value, metrics, len(scores))

    def _after_the_swap(self, model: nn.Module) -> None:
        """Measure what the swap left, teach the maps if the recipe says so, and measure again."""
        if self.plan.spec.part is ATTENTIONS.get("softmax").part:
            self.after_swap = self.teacher["score"] if self.teacher else None
            return
        # A classifier that was only pretrained has a head of random weights: its score would mean nothing.
        scorable = self.config.regime == "finetuned-conversion" or self.task.scores_pretrained
        self.fidelity = self._fidelity_before(model)
        if scorable:
            self.after_swap = self._test(model, "test after the swap")[0]
        if self.plan.transfers and self.params_added:
            self._transfer(model)
            self._fidelity_after(model, self.fidelity)
            if scorable:
                self.after_transfer = self._test(model, "test after transfer")[0]

    def _start(self) -> nn.Module:
        """The model to give the attention to; `teacher` is set if it was trained or has a score of its own."""
        c = self.config
        if c.regime == "finetuned-conversion":
            return self._load_teacher()
        torch.manual_seed(c.seed)
        model = self.task.build_model(c, self.data)
        if c.regime == "pretrained-conversion" and self.task.scores_pretrained:
            hosts.convert(model, "softmax")
            score = self._test(model, "test the pretrained model")[0]
            self.teacher = Teacher(key=result.key_of(self.weights), score=score)
        return model

    def _load_teacher(self) -> nn.Module:
        """The softmax model that is converted: trained once, then read from its folder."""
        c = self.config
        settings = {name: self.identity["settings"][name] for name in TEACHER_SETTINGS}
        identity = {k: v for k, v in self.identity.items() if k != "attention"} | {"settings": settings}
        key = result.key_of(identity)
        folder = c.out / "teachers" / _safe(f"{self.task.name}-{Path(str(c.dataset)).name}-{c.preset}-{key[:8]}")
        with _locked_by_rank_zero(folder.with_suffix(".lock")):
            if not (folder / "hhbench.json").exists():
                self._make_teacher(folder, key, identity)
        barrier()
        model = models.load(folder)
        notes = models.manifest(folder)["teacher"]
        log.info("teacher %s: %s %.4f", key[:8], notes["score_name"], notes["score"])
        self.teacher = Teacher(key=key, score=notes["score"])
        return model

    def _make_teacher(self, folder: Path, key: str, identity: Mapping[str, Any]) -> None:
        c = self.config
        lightning.seed_everything(c.teacher_seed, workers=True, verbose=False)
        model = hosts.convert(self.task.build_model(c, self.data), "softmax")
        schedule = self._schedule(float(c.teacher_lr or 0), float(c.teacher_epochs or 0))
        stage = TrainStage(self.task, model, self.data, c, schedule)
        report = self._fit(stage, folder, "train the teacher", seed=c.teacher_seed)
        score, _, _ = self._test(model, "test the teacher")
        if rank() == 0:
            notes = {
                "key": key, "identity": identity, "score": score, "score_name": stage.score_name,
                "validation": report.validation, "seconds": report.seconds,
            }  # fmt: skip
            models.save(model, folder, attn="softmax", options={}, notes={"teacher": notes})

    def _transfer(self, model: nn.Module) -> None:
        """Teach the maps, or read what an interrupted run taught them."""
        c = self.config
        kept = self.folder / TRANSFERRED
        maps = {
            f"{n}.{p}": t
            for n, s in hosts.slots(model).items()
            for p, t in s.attention.state_dict(keep_vars=True).items()
        }
        if c.resume and kept.exists():
            log.info("transfer was finished: %s", kept)
            for name, tensor in load_file(kept).items():
                maps[name].data.copy_(tensor)
            return
        lightning.seed_everything(c.seed, workers=True, verbose=False)
        learning = {id(p) for p in hosts.attention_parameters(model)}
        frozen = [p for p in model.parameters() if id(p) not in learning]
        for parameter in frozen:
            parameter.requires_grad_(False)
        schedule = self._schedule(float(c.transfer_lr or 0), float(c.transfer_epochs or 0))
        stage = TransferStage(model, schedule)
        batches = loader(self.data.train, self.data, c, train=True, seed=c.seed)
        report = fit(stage, batches, None, c, folder=self.folder / "transfer", title="attention transfer")
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._spent("transfer", report)
        if rank() == 0:
            save_file({name: tensor.detach().cpu().contiguous() for name, tensor in maps.items()}, kept)

    def _train(self, model: nn.Module) -> Tuning | None:
        """Train or finetune all weights; with `tune`, once per learning rate, and the validation split picks."""
        c = self.config
        if not c.tune:
            self._spent("train", self._train_once(model, float(c.lr or 0)))
            return None
        higher = self.task.dataset(str(c.dataset)).higher_is_better
        start = copy.deepcopy(model.state_dict())
        trials: list[Trial] = []
        best_state, best, picked = start, -torch.inf, c.tune[0]
        for lr in c.tune:
            model.load_state_dict(start)
            report = self._train_once(model, lr)
            self._spent("train", report)
            validation = report.validation if report.validation is not None else float("nan")
            trials.append({"lr": lr, "validation": validation})
            merit = validation if higher else -validation
            if merit > best:
                best, best_state, picked = merit, copy.deepcopy(model.state_dict()), lr
        model.load_state_dict(best_state)
        return Tuning(trials=trials, picked=picked)

    def _train_once(self, model: nn.Module, lr: float) -> StageReport:
        c = self.config
        lightning.seed_everything(c.seed, workers=True, verbose=False)
        model.train()
        frozen = hosts.attention_parameters(model) if c.recipe and RECIPES[c.recipe].frozen else []
        for parameter in frozen:
            parameter.requires_grad_(False)
        stage = TrainStage(self.task, model, self.data, c, self._schedule(lr, float(c.epochs or 0)))
        title = "finetune" if self.plan.converts else "train"
        # A folder for each trial: --resume must not go on with another one's checkpoint.
        folder = self.folder / f"lr-{lr:g}" if c.tune else self.folder
        report = self._fit(stage, folder, f"{title} at {lr:g}" if c.tune else title, seed=c.seed)
        for parameter in frozen:
            parameter.requires_grad_(True)
        return report

    def _fit(self, stage: TrainStage, folder: Path, title: str, *, seed: int) -> StageReport:
        c = self.config
        return fit(
            stage,
            loader(self.data.train, self.data, c, train=True, seed=seed),
            loader(self.data.validation, self.data, c, train=False),
            c,
            folder=folder / "train",
            title=title,
            higher_is_better=self.task.dataset(str(c.dataset)).higher_is_better,
        )

    # ---- measuring ---------------------------------------------------------------------------------------------

    def _test(self, model: nn.Module, title: str) -> tuple[float, dict[str, float], dict[int, float]]:
        """The score, all metrics, and the score of every test example, counted through all test sets."""
        c = self.config
        model.eval()
        for counter in _floored(model):
            counter.zero_()
        stage = TrainStage(self.task, model, self.data, c, self._schedule(1.0, 0))
        metrics: dict[str, float] = {}
        scores: dict[int, float] = {}
        values = []
        for name, split in self.data.tests.items():
            found, per_example = evaluate(stage, loader(split, self.data, c, train=False), c, title=title)
            values.append(found[stage.score_name])
            prefix = "" if len(self.data.tests) == 1 else f"{name}/"
            metrics |= {f"{prefix}{metric}": value for metric, value in found.items()}
            scores |= {len(scores) + index: score for index, score in per_example.items()}
        value = sum(values) / len(values)
        return value, metrics | {stage.score_name: value}, scores

    @torch.no_grad()
    def _measure_fidelity(self, model: nn.Module) -> list[tuple[float, float, float]]:
        """Per layer: KL, entropy of softmax, entropy of the attention. Every rank measures all of it."""
        layers = {name: LayerFidelity() for name, slot in hosts.slots(model).items() if slot.attention.has_weights}
        if not layers:
            return []
        split = self.data.validation.first(FIDELITY_EXAMPLES)
        device = next(model.parameters()).device
        model.eval()
        with intercepted(model, dict(layers)):
            for start in range(0, len(split), 16):
                batch = self.data.collate([split.examples[i] for i in range(start, min(start + 16, len(split)))])
                encode(
                    model,
                    {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in batch["inputs"].items()},
                )
        return [layer.means() for layer in layers.values()]

    def _fidelity_before(self, model: nn.Module) -> Fidelity:
        layers = self._measure_fidelity(model)
        return Fidelity(
            kl_before=[kl for kl, _, _ in layers],
            kl_after=[],
            teacher_entropy=[entropy for _, entropy, _ in layers],
            student_entropy_before=[entropy for _, _, entropy in layers],
            student_entropy_after=[],
            floored_rows=0,
        )

    def _fidelity_after(self, model: nn.Module, fidelity: Fidelity) -> None:
        layers = self._measure_fidelity(model)
        fidelity["kl_after"] = [kl for kl, _, _ in layers]
        fidelity["student_entropy_after"] = [entropy for _, _, entropy in layers]
        log.info(
            "KL from softmax per layer: %s before transfer, %s after",
            " ".join(f"{kl:.3f}" for kl in fidelity["kl_before"]),
            " ".join(f"{kl:.3f}" for kl in fidelity["kl_after"]),
        )

    def _schedule(self, lr: float, epochs: float) -> Schedule:
        c = self.config
        return Schedule(
            lr, epochs, float(c.weight_decay or 0), float(c.beta2 or 0), float(c.warmup or 0), float(c.clip or 0)
        )

    def _spent(self, stage: str, report: StageReport) -> None:
        self.seconds[stage] = self.seconds.get(stage, 0.0) + report.seconds
        self.tokens += report.tokens

    def _record(self, model: nn.Module, value: float, metrics: dict[str, float], num_examples: int) -> Result:
        c, task, spec = self.config, self.task, self.plan.spec
        data = task.dataset(str(c.dataset))
        hosted = hosts.attentions(model)
        states = [a.state_bytes(int(c.max_len or 0)) for a in hosted]
        return Result(
            schema=result.SCHEMA,
            key=self.key,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=c.as_dict(),
            identity=self.identity,
            attention={
                "name": spec.name,
                "label": self.plan.label,
                "recipe": c.recipe,
                "params_added": self.params_added,
                "has_weights": all(a.has_weights for a in hosted),
            },
            task={
                "name": task.name,
                "dataset": data.title,
                "suite": [task.dataset(n).title for n in task.suites[c.preset]]
                if c.dataset in task.suites[c.preset]
                else [data.title],
                "train_tokens": round(sum(self.data.train.lengths) * float(c.epochs or 0)),
                "title": data.title,
                "average": task.average,
            },
            score=Score(data.score, value, data.higher_is_better, num_examples),
            metrics=metrics,
            teacher=self.teacher,
            after_swap=self.after_swap,
            after_transfer=self.after_transfer,
            fidelity=self.fidelity,
            tuning=self.tuning,
            cost=Cost(
                params=_count(model),
                params_added=self.params_added,
                train_tokens=self.tokens,
                seconds={stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
                train_tokens_per_s=round(self.tokens / max(sum(self.seconds.values()), 1e-9), 1),
                peak_memory_mb=round(_peak_memory() / 2**20, 1),
                state_bytes=sum(s for s in states if s is not None) if all(s is not None for s in states) else None,
                length=int(c.max_len or 0),
            ),
            environment=result.environment(
                device=_device_name(c),
                world_size=world_size(),
                threads=torch.get_num_threads(),
                precision=c.precision,
            ),
        )


def _safe(name: str) -> str:
    """A file name: a label may hold slashes and brackets."""
    return re.sub(r"[^\w.=,+-]", "_", name)


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def _locked_by_rank_zero(path: Path) -> Iterator[None]:
    """Two runs that want the same teacher don't train it twice: the second waits."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    if rank() == 0:
        lock.acquire()
    barrier()
    try:
        yield
    finally:
        lock.release()


def _floored(model: nn.Module) -> list[torch.Tensor]:
    """The counters of rows whose features lay at the floor, of the attentions that keep one."""
    found = (getattr(slot.attention, "floored_rows", None) for slot in hosts.slots(model).values())
    return [counter for counter in found if isinstance(counter, torch.Tensor)]


def _reset_peak_memory() -> None:
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # Linux alone can forget its high-water mark
        Path("/proc/self/clear_refs").write_text("5")


def _peak_memory() -> int:
    """Bytes: of the GPU where there is one, else of this process."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _device_name(config: RunConfig) -> str:
    if config.accelerator in ("auto", "cuda", "gpu") and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    if config.accelerator in ("auto", "mps", "gpu") and torch.backends.mps.is_available():
        return "Apple MPS"
    return _cpu_name()


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
