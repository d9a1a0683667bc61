"""A RunConfig in, a Result out.

    scratch                 build -> give it the attention -> train -> test
    finetuned-conversion    teacher trained on the task -> swap -> transfer -> finetune -> test
    pretrained-conversion   pretrained weights -> swap -> transfer -> train on the task -> test

A teacher is trained once and shared by all attentions and seeds that ask for the same. A finished key isn't run again.
"""

import contextlib
import copy
import dataclasses
import io
import logging
import os
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

import lightning
import numpy as np
import torch
from filelock import FileLock, Timeout
from torch import nn

from hhbench import checkpoints, data, fidelity, hosts, models, result, stopping
from hhbench.attention import ATTENTIONS, AttentionSpec, Direction, probe
from hhbench.config import RECIPES, RunConfig, split_label
from hhbench.data import PackageFile
from hhbench.errors import HHBenchError, UsageError, in_one_line, unknown_name
from hhbench.layer_choice import keep_worst
from hhbench.lora import LoraSettings, inject, merge, need_peft
from hhbench.pretrained import PRETRAINED
from hhbench.ranks import check_world, from_rank_zero, launched, rank, world_size
from hhbench.registry import source_hash
from hhbench.result import Cost, Fidelity, Identity, LayerChoice, Result, Score, Teacher, Trial, Tuning
from hhbench.task import TASKS, Split, Task, TaskData
from hhbench.train import (
    Schedule,
    StageReport,
    TrainStage,
    TransferStage,
    check_batch_size,
    evaluate,
    fit,
    loader,
)

log = logging.getLogger("hhbench")

# KL and entropies are measured on so much of the validation split, at most.
FIDELITY_EXAMPLES = 128
FIDELITY_TOKENS = 128 * 128

ACCELERATORS = ("auto", "cpu", "cuda", "gpu", "mps")

SECONDS_TO_CLAIM = 1.0  # between two looks at what another process does

# Settings that may stay blank.
OPTIONAL = {"recipe", "micro_batch_size", "data_folder", "window", "keep_layers", "lora", "model_folder", "workers"}

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


class Tested(NamedTuple):
    """What a test found.

    Attributes:
        value: the score.
        metrics: all of them.
        scores: of every test example, counted through all test sets.
        num_examples: their number.
    """

    value: float
    metrics: dict[str, float]
    scores: dict[int, float]
    num_examples: int


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

    @cached_property
    def settings(self) -> dict[str, Any]:
        """The settings that the key hashes."""
        settings = self.config.identity()
        settings["dataset"] = self.task.dataset(str(self.config.dataset)).title  # a path differs between machines
        if (model := settings["model"]) not in PRETRAINED and Path(model).is_dir():
            settings["model"] = Path(model).absolute().name  # its weights are hashed
        settings |= {"attn": self.spec.name, "task": self.task.name}  # a user's own file goes by its content
        return settings

    @property
    def files(self) -> tuple[PackageFile, ...]:
        """Every pinned file that it needs, weights included."""
        return self.task.files(self.config)

    @property
    def teacher_settings(self) -> dict[str, Any] | None:
        """What its teacher depends on: plans that agree in it share one. None without a teacher to train."""
        trained = self.config.regime == "finetuned-conversion"
        return {name: self.settings[name] for name in TEACHER_SETTINGS} if trained else None

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
            lora = (f", LoRA {self.lora}" if self.lora else "") + (", maps frozen" if c.freeze_maps else "")
            rate = f"best of {list(c.tune)}" if c.tune else f"{c.lr:g}"
            stages.append(f"{'finetune' if self.converts else 'train'} {c.epochs:g} epochs at {rate}{lora}")
        recipe = f", recipe {c.recipe}" if self.converts else ""
        return [
            f"{self.task.name} / {data.title} with {self.label} ({c.preset}, {c.regime}{recipe}, seed {c.seed})",
            f"  model {c.model}, up to {c.max_len} tokens, batch {c.batch_size}",
            f"  stages: {' -> '.join(stages)} -> test",
        ]

    def conversion(self, model: nn.Module) -> hosts.ConversionPlan:
        """What the attention of each layer of the model will be."""
        return hosts.plan_conversion(
            model,
            self.spec,
            keep_layers=self.kept,
            layers=self.layers,
            context=self.config.max_len,
            **self.config.options,
        )

    @property
    def lora(self) -> LoraSettings | None:
        return LoraSettings.parse(self.config.lora) if self.config.lora else None

    @property
    def kept(self) -> tuple[int, ...]:
        """The layers that are named to stay softmax."""
        text = self.config.keep_layers
        return () if text is None or self.chooses else tuple(int(index) for index in text.split(","))

    @property
    def chooses(self) -> int:
        """How many layers to keep are chosen by what transfer leaves."""
        head, _, count = (self.config.keep_layers or "").partition("auto:")
        return int(count) if count and not head else 0

    @property
    def layers(self) -> dict[int, tuple[str, dict[str, Any]]]:
        """The layers that are given another attention, with its options."""
        chosen = {}
        for layers, label in self.config.layers:
            first, dash, last = (layers, "", "") if layers.startswith("-") else layers.partition("-")
            for index in range(int(first), int(last if dash else first) + 1):
                chosen[index] = split_label(label)
        return chosen


def prepare(config: RunConfig, *, elsewhere: bool = False) -> Plan:
    """Check a config and fill its blanks.

    Args:
        elsewhere: it is to run on another machine: this one needn't have its devices.

    Raises:
        UsageError: a name, an option or a combination that can't be; before anything is fetched or trained.
    """
    given, config = config, with_window(config)
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
    if not task.scored and not getattr(spec.part, "has_weights", True):
        raise UsageError(f"{spec.name} has no weights to compare with softmax's: name data with labels")
    if not task.scored and config.recipe is not None and RECIPES[config.recipe].finetune:
        raise UsageError(f"--recipe {config.recipe} finetunes, and {task.name} has no labels: use transfer-only")
    spec.check(direction=direction, options=config.options)
    if spec.external or config.option:
        try:
            probe(spec, direction=direction, options=config.options)
        except (TypeError, ValueError, RuntimeError) as error:  # an option of one of ours with a value of a wrong kind
            if isinstance(error, HHBenchError):
                raise
            raise UsageError(f"{spec.label(config.options)} can't be built: {in_one_line(error)}") from error
    recipe = config.recipe or spec.recipe
    if not task.scored and RECIPES[recipe].finetune:
        recipe = "transfer-only" if RECIPES[recipe].transfer else "untrained"
    config = dataclasses.replace(config, regime=regime, recipe=None if regime == "scratch" else recipe)
    if config.lora:  # as it is written in full: the same adapters, the same key
        config = dataclasses.replace(config, lora=str(LoraSettings.parse(config.lora)))
    config = config.filled(task.settings(config))
    blank = [f.name for f in dataclasses.fields(config) if getattr(config, f.name) is None]
    if missing := set(blank) - OPTIONAL:
        raise HHBenchError(f"the {config.preset} preset of {task.name} leaves {', '.join(sorted(missing))} blank")
    _check_settings(config)
    if not elsewhere:
        _check_devices(config)
    plan = Plan(given, config, task, spec)
    if config.tune and not (plan.trains and config.epochs):
        raise UsageError("--tune needs a stage that trains: this recipe has none, or --epochs is 0")
    for name in ("lora", "freeze_maps"):
        if getattr(config, name) and not (plan.converts and plan.trains):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} needs a conversion that finetunes: this regime or recipe has no such stage")
    if plan.chooses and not plan.transfers:
        raise UsageError("--keep-layers auto goes by what transfer leaves, and this recipe has none: name the layers")
    for name, options in plan.layers.values():
        ATTENTIONS.get(name).check(direction=direction, options=options)
    return plan


def fetch(plans: Iterable[Plan]) -> None:
    """Have every file that plans need, before the first of them trains.

    Raises:
        DataError: one can't be had.
    """
    for file in dict.fromkeys(file for plan in plans for file in plan.files):
        data.fetch(file)


def with_window(config: RunConfig) -> RunConfig:
    """`--window 64` folded into the attention: hedgehog becomes hedgehog-window[window=64]."""
    if config.window is None:
        return config
    windowed = {name.removesuffix("-window"): name for name in ATTENTIONS.names() if name.endswith("-window")}
    name = config.attn.removesuffix("-window")
    if name not in windowed:
        raise UsageError(f"{config.attn} has no form with a window; these have: {', '.join(windowed)}")
    option = tuple(sorted({**config.options, "window": config.window}.items()))
    return dataclasses.replace(config, attn=windowed[name], option=option, window=None)


def _check_devices(config: RunConfig) -> None:
    name, count = config.accelerator, config.devices
    gpus, mps = torch.cuda.device_count(), int(torch.backends.mps.is_available())
    available = {"cuda": gpus, "gpu": gpus or mps, "mps": mps}
    if name in available and available[name] < count:
        raise UsageError(f"--accelerator {name} --devices {count}: this machine has {available[name]} of them")
    if name == "auto" and 0 < gpus < count:
        raise UsageError(f"--devices {count}: this machine has {gpus} GPUs; add --accelerator cpu")


def _check_settings(config: RunConfig) -> None:
    check_batch_size(config)
    if config.accelerator not in ACCELERATORS:
        raise unknown_name("accelerator", config.accelerator, ACCELERATORS)
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
    check_world(config, launched())
    plan = prepare(config)
    if plan.lora:
        need_peft()
    if config.devices > 1 and launched().alone:
        from hhbench.cluster import on_all_devices

        (path,) = on_all_devices(config)
        return result.load(path), path
    under_way = _Run(plan)
    return under_way.result(), under_way.folder / result.FILE_NAME


def train_teacher(config: RunConfig) -> Path | None:
    """Train the teacher that a config converts, unless it is there, and nothing more; the folder that holds it.

    Returns:
        None where the regime trains no teacher.
    """
    check_world(config, launched())
    plan = prepare(config)
    if plan.teacher_settings is None:
        return None
    if config.devices > 1 and launched().alone:
        from hhbench.cluster import on_all_devices

        return on_all_devices(config, "--teacher-only")[0]
    under_way = _Run(plan)
    under_way.load_teacher()
    return Path(str(under_way.teacher_folder))


class _Run:
    """One run under way: its data, its models, its folder."""

    def __init__(self, plan: Plan) -> None:
        self.plan, self.config, self.task = plan, plan.config, plan.task
        self.seconds: dict[str, float] = {}
        self.tokens = 0
        self.host_params = self.params_added = 0
        self.teacher: Teacher | None = None
        self.teacher_folder: str | None = None
        self.after_swap: float | None = None
        self.after_transfer: float | None = None
        self.fidelity: Fidelity | None = None
        self.tuning: Tuning | None = None
        self.layer_choice: LayerChoice | None = None
        self.data: TaskData = self.task.load_data(self.config)
        batch = int(self.config.batch_size or 1)
        if len(self.data.train) < batch:
            raise UsageError(
                f"{self.config.dataset} gives {len(self.data.train)} training examples, fewer than one batch of "
                f"{batch}: lower --batch-size"
            )
        self.weights = self.task.weights(self.config)
        self.key = result.key_of(self.identity)
        self.folder = self._folder()

    @cached_property
    def identity(self) -> Identity:
        spec, task = self.plan.spec, self.task
        own_task = source_hash(type(task))  # a user's own file says which data they are, as much as the data do
        return Identity(
            settings=self.plan.settings,
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

    @property
    def model_folder(self) -> Path | None:
        """Where the trained model is kept, if it is."""
        return self.config.model_folder or (self.folder / "model" if self.config.save_model else None)

    def result(self) -> Result:
        """The result that is there, or a new one. Whoever comes second to a run waits for the first."""
        if (found := self._found()) is not None:
            return found
        _check_model_folder(self.config.model_folder, key=self.key, force=self.config.force)
        with _claimed(self.folder / ".lock"):
            if (found := self._found()) is not None:
                return found
            if rank() == 0:
                (self.folder / result.FILE_NAME).unlink(missing_ok=True)  # with --force, what is run again
            made = self._run()
            if rank() == 0:
                result.save(made, self.folder)
            checkpoints.forget(self.folder)
        return made

    def _found(self) -> Result | None:
        """The result that rank 0 sees: another process may write it between two ranks' looks."""
        return from_rank_zero(self._look() if rank() == 0 else None)  # type: ignore[no-any-return]

    def _look(self) -> Result | None:
        done = self.folder / result.FILE_NAME
        if self.config.force or not done.exists():
            return None
        found = result.load(done)
        kept = self.model_folder is None or (self.model_folder / models.MANIFEST).exists()
        if found.key != self.key or not kept:
            return None
        log.info("done already: %s", done)
        return found

    # ---- the stages --------------------------------------------------------------------------------------------

    def _run(self) -> Result:
        plan, c = self.plan, self.config
        _reset_peak_memory()
        model = self._start()
        before = _count(model)
        torch.manual_seed(c.seed)
        conversion = plan.conversion(model)
        if plan.converts:
            for line in conversion.lines():
                log.info("%s", line)
        conversion.carry_out()
        measured = sum(_is_measured(slot) for slot in hosts.slots(model).values())
        if plan.chooses > measured:
            raise UsageError(
                f"--keep-layers auto:{plan.chooses}: {measured} layers have weights to compare with softmax's"
            )
        self.host_params, self.params_added = before, _count(model) - before
        log.info("%s adds %s parameters to %s", plan.label, f"{self.params_added:,}", f"{before:,}")
        # Where the last stage was tested there is nothing to test again.
        tested = self._after_the_swap(model) if plan.converts else None
        if plan.trains or tested is None:
            if plan.trains:
                self.tuning = self._train(model)
            tested = self._test(model, "test")
        if self.fidelity is not None:
            self.fidelity["floored_rows"] = sum(int(counter) for counter in _floored(model))
            if self.fidelity["floored_rows"]:
                log.info("%d rows of features lay at the floor in the test", self.fidelity["floored_rows"])
        made = self._record(model, tested)
        if rank() == 0:
            Result.from_dict(made.as_dict())  # a score that is no number leaves no model either
            if self.model_folder is not None:
                models.save(
                    model,
                    self.model_folder,
                    notes={"run": self._notes(made)},
                    processor=self.data.facts.get("processor"),
                )
            order, packed = sorted(tested.scores), io.BytesIO()
            np.savez_compressed(
                packed,
                index=np.array(order, dtype=np.int32),
                score=np.array([tested.scores[i] for i in order], dtype=np.float32),
            )
            result.write(self.folder / "examples.npz", packed.getvalue())
        return made

    def _notes(self, made: Result) -> dict[str, Any]:
        """What a saved model says of the run that made it: enough to find its teacher and its data again."""
        folder = self.teacher_folder
        sha256 = models.manifest(folder)["weights_sha256"] if folder else None
        teacher = None if made.teacher is None else {**made.teacher, "folder": folder, "weights_sha256": sha256}
        return {
            "key": made.key,
            "config": made.config | self._places(),
            "weights": self.weights,
            "data": dict(self.data.hashes),
            "transforms": self.data.facts.get("transforms"),  # timm's: it has no processor that saves itself
            "teacher": teacher,
            "scores": {
                "name": made.score.name,
                "after_swap": made.after_swap,
                "after_transfer": made.after_transfer,
                "final": made.score.value,
            },
            "fidelity": made.fidelity,
            "layer_choice": made.layer_choice,
            "commit": made.environment["commit"],
        }

    def _places(self) -> dict[str, str]:
        """The user's own files among the settings, so that they are found from another folder too."""
        c = self.config
        named = {"dataset": self.task.datasets, "model": PRETRAINED, "data_folder": ()}
        given = {name: getattr(c, name) for name, known in named.items() if getattr(c, name) not in (None, *known)}
        return {name: str(Path(path).absolute()) for name, path in given.items() if Path(path).exists()}

    def _after_the_swap(self, model: nn.Module) -> Tested | None:
        """Measure what the swap left, teach the maps if the recipe says so, and measure again. What the last test
        found, if the model is as it was then.
        """
        if all(placement.is_softmax for placement in hosts.placements(model)):
            self.after_swap = self.teacher["score"] if self.teacher else None
            return None
        # A classifier that was only pretrained has a head of random weights: its score would mean nothing.
        scorable = self.config.regime == "finetuned-conversion" or self.task.scores_pretrained or not self.task.scored

        def test(title: str) -> Tested | None:
            return self._test(model, title) if scorable else None

        def score(tested: Tested | None) -> float | None:
            return None if tested is None else tested.value

        self.fidelity = self._fidelity_before(model)
        tested = test("test after the swap")
        self.after_swap = score(tested)
        if self.plan.transfers and self.params_added:
            self._transfer(model)
            self._fidelity_after(model, self.fidelity)
            tested = test("test after transfer")
            self.after_transfer = score(tested)
            if self.plan.chooses:
                self._choose_layers(model, lambda: score(test("test with layers kept")))
                return None
        return tested

    def _choose_layers(self, model: nn.Module, score: Callable[[], float | None]) -> None:
        """Give the layers that transfer taught least their softmax back."""
        assert self.fidelity is not None
        measured = [name for name, slot in hosts.slots(model).items() if _is_measured(slot)]
        divergences = dict(zip(measured, self.fidelity["kl_after"], strict=True))
        steps = keep_worst(model, divergences, self.plan.chooses, score)
        self.params_added = _count(model) - self.host_params
        depth = list(hosts.slots(model))
        self.layer_choice = LayerChoice(
            layers=[depth.index(step.layer) for step in steps if step.layer is not None],
            scores=[step.score for step in steps],
        )
        log.info("kept as softmax: layers %s", ", ".join(map(str, self.layer_choice["layers"])))

    def _start(self) -> nn.Module:
        """The model to give the attention to; `teacher` is set if it was trained or has a score of its own."""
        c = self.config
        if c.regime == "finetuned-conversion":
            return self.load_teacher()
        torch.manual_seed(c.seed)
        model = self.task.build_model(c, self.data)
        models.check_finite(model)
        if c.regime == "pretrained-conversion" and self.task.scores_pretrained:
            hosts.convert(model, "softmax")
            score = self._test(model, "test the pretrained model").value
            self.teacher = Teacher(key=result.key_of(self.weights), score=score)
        return model

    def load_teacher(self) -> nn.Module:
        """The softmax model that is converted: trained once, then read from its folder."""
        c = self.config
        settings = self.plan.teacher_settings
        identity = {k: v for k, v in self.identity.items() if k != "attention"} | {"settings": settings}
        key = result.key_of(identity)
        folder = c.out / "teachers" / _safe(f"{self.task.name}-{Path(str(c.dataset)).name}-{c.preset}-{key[:8]}")
        with _claimed(folder.with_suffix(".lock")):
            if not from_rank_zero(models.is_converted(folder)):
                self._make_teacher(folder, key, identity)
        model = models.load(folder)
        self.teacher_folder = str(folder.absolute())
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
        stage.rate_flag = "--teacher-lr"
        report = self._fit(stage, folder, "train the teacher", seed=c.teacher_seed)
        score = self._test(model, "test the teacher").value
        if rank() == 0:
            notes = {
                "key": key, "identity": identity, "score": score, "score_name": stage.score_name,
                "validation": report.validation, "seconds": report.seconds,
            }  # fmt: skip
            models.save(model, folder / "model", notes={"teacher": notes})  # beside the stage's own files
        checkpoints.forget(folder)

    def _transfer(self, model: nn.Module) -> None:
        """Teach the maps."""
        c = self.config
        lightning.seed_everything(c.seed, workers=True, verbose=False)
        learning = {id(p) for p in hosts.attention_parameters(model)}
        frozen = [p for p in model.parameters() if id(p) not in learning]
        for parameter in frozen:
            parameter.requires_grad_(False)
        schedule = self._schedule(float(c.transfer_lr or 0), float(c.transfer_epochs or 0))
        stage = TransferStage(model, schedule, loss=c.transfer_loss, queries=c.queries)
        batches = loader(self.data.train, self.data, c, train=True, seed=c.seed)
        report = fit(stage, batches, None, c, folder=self.folder / "transfer", title="attention transfer")
        for parameter in frozen:
            parameter.requires_grad_(True)
        self._spent("transfer", report)

    def _train(self, model: nn.Module) -> Tuning | None:
        """Train or finetune: all weights, or low-rank adapters that are merged into them at the end."""
        c, lora = self.config, self.plan.lora
        freezes = c.freeze_maps or (c.recipe is not None and RECIPES[c.recipe].frozen)
        frozen = hosts.attention_parameters(model) if freezes else []
        if lora is not None:
            inject(model, lora, train_maps=not frozen)
        for parameter in frozen:
            parameter.requires_grad_(False)
        tuning = self._tune(model)
        if lora is not None:
            merge(model)
        for parameter in frozen:
            parameter.requires_grad_(True)
        return tuning

    def _tune(self, model: nn.Module) -> Tuning | None:
        """Train once; with `tune`, once per learning rate, and the validation split picks."""
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
        stage = TrainStage(self.task, model, self.data, c, self._schedule(lr, float(c.epochs or 0)))
        title = "finetune" if self.plan.converts else "train"
        # A folder for each trial: --resume must not go on with another one's checkpoint.
        folder = self.folder / f"lr-{lr:g}" if c.tune else self.folder
        return self._fit(stage, folder, f"{title} at {lr:g}" if c.tune else title, seed=c.seed)

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

    def _test(self, model: nn.Module, title: str) -> Tested:
        c = self.config
        stopping.stop_between_stages(f"before {title}")
        model.eval()
        for counter in _floored(model):
            counter.zero_()
        if not self.task.scored:
            (split,) = self.data.tests.values()
            layers = self._measure_fidelity(model, split).values()
            value = fmean(kl for kl, _, _ in layers) if layers else 0.0  # all of them are softmax
            return Tested(value, {self.task.dataset(str(c.dataset)).score: value}, {}, len(split))
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
        value = fmean(values)
        return Tested(value, metrics | {stage.score_name: value}, scores, len(scores))

    @property
    def _fidelity_split(self) -> Split:
        affordable = max(1, FIDELITY_TOKENS // int(self.config.max_len or 1))
        return self.data.validation.first(min(FIDELITY_EXAMPLES, affordable))

    def _measure_fidelity(self, model: nn.Module, split: Split) -> dict[str, tuple[float, float, float]]:
        """Per layer that isn't softmax: KL, entropy of softmax, entropy of the attention, means over heads. Every rank
        measures all of it.
        """
        if not any(_is_measured(slot) for slot in hosts.slots(model).values()):
            return {}
        size = min(16, int(self.config.batch_size or 1))
        rows = ([split.examples[i] for i in range(s, min(s + size, len(split)))] for s in range(0, len(split), size))
        report = fidelity.measure(model, (self.data.collate(some)["inputs"] for some in rows), order=False)
        columns = ("kl", "teacher_entropy", "student_entropy")
        return {
            layer.name: tuple(fmean(getattr(layer.local, column)) for column in columns)  # type: ignore[misc]
            for layer in report.layers
            if not layer.kept and layer.local is not None and layer.local.kl is not None
        }

    def _fidelity_before(self, model: nn.Module) -> Fidelity:
        layers = self._measure_fidelity(model, self._fidelity_split).values()
        return Fidelity(
            kl_before=[kl for kl, _, _ in layers],
            kl_after=[],
            teacher_entropy=[entropy for _, entropy, _ in layers],
            student_entropy_before=[entropy for _, _, entropy in layers],
            student_entropy_after=[],
            floored_rows=0,
        )

    def _fidelity_after(self, model: nn.Module, fidelity: Fidelity) -> None:
        layers = self._measure_fidelity(model, self._fidelity_split).values()
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

    def _record(self, model: nn.Module, tested: Tested) -> Result:
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
            score=Score(data.score, tested.value, data.higher_is_better, tested.num_examples),
            metrics=tested.metrics,
            teacher=self.teacher,
            after_swap=self.after_swap,
            after_transfer=self.after_transfer,
            fidelity=self.fidelity,
            tuning=self.tuning,
            layer_choice=self.layer_choice,
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


def _check_model_folder(folder: Path | None, *, key: str, force: bool) -> None:
    """Refuse to replace what is not this run's model, before anything trains."""
    if folder is None:
        return
    above = next(path for path in folder.absolute().parents if path.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise UsageError(f"{folder} can't be written: {above} is {'read-only' if above.is_dir() else 'a file'}")
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return
    if not models.is_converted(folder):
        raise UsageError(f"{folder} is there and holds no model of hhbench's: name another folder")
    found = models.manifest(folder).get("run", {}).get("key")
    if found != key and not force:
        raise UsageError(f"{folder} holds another model (run {found}): name another folder, or add --force")


def _safe(name: str) -> str:
    return result.safe_name(name, most=100, ascii=False)


def _is_measured(slot: hosts.AttentionSlot) -> bool:
    """Whether a layer has a divergence from softmax: it has weights, and they aren't softmax's own."""
    return slot.attention.has_weights and not slot.placement.is_softmax


def _count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


@contextlib.contextmanager
def _claimed(path: Path) -> Iterator[None]:
    """Hold a lock for all ranks. What is trained once for all, and what two processes were asked for at the same time,
    the second one waits for. A process that dies lets go of it.
    """
    lock = FileLock(path)
    said = False
    while True:
        held = False
        if rank() == 0:
            path.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(Timeout):
                lock.acquire(timeout=SECONDS_TO_CLAIM if said else 0)
                held = True
        if from_rank_zero(held):
            break
        if not said and rank() == 0:
            log.info("another process is at work on %s: waiting for it", path.parent)
        said = True
        stopping.stop_between_stages("while it waited for another process")
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
    return result.cpu_name()
