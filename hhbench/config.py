"""RunConfig: every setting of a run, with its default, its help and its check, in one place.

The command line, the YAML configuration and the Python API are all made from the fields below. A field whose default
is None is blank: the task's preset fills it. `prepare` in hhbench.runner does that, and from then on nothing is blank.
"""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from hhbench.errors import UsageError, unknown_name

REGIMES = ("scratch", "finetuned-conversion", "pretrained-conversion")
PRESETS = ("mini", "paper")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "bf16-true", "64-true")
LOGGERS = ("none", "csv", "tensorboard", "wandb")


@dataclass(frozen=True)
class Recipe:
    """A named bundle of stages for conversion. `transfer` or `finetune` False means that the stage is left out.

    `frozen`: finetuning leaves the attention's own parameters as they are.
    """

    help: str
    transfer: bool
    finetune: bool
    frozen: bool = False


RECIPES: Mapping[str, Recipe] = {
    "hedgehog": Recipe("attention transfer, then finetuning (Zhang et al. 2024)", transfer=True, finetune=True),
    "t2r": Recipe("swap and finetune, no transfer (Kasai et al. 2021)", transfer=False, finetune=True),
    "t2r-hh": Recipe("T2R's map taught by Hedgehog's transfer, then finetuning", transfer=True, finetune=True),
    "no-transfer": Recipe("swap and finetune: for attentions with nothing to teach", transfer=False, finetune=True),
    "transfer-only": Recipe("attention transfer and nothing after it", transfer=True, finetune=False),
    "frozen-map": Recipe("swap and finetune all but the map", transfer=False, finetune=True, frozen=True),
    "untrained": Recipe("swap and nothing after it", transfer=False, finetune=False),
    "replacement": Recipe("whole blocks replaced by a mixer, then finetuning", transfer=False, finetune=True),
}


def _positive(value: float) -> str | None:
    return None if 0 < value < math.inf else "must be above 0 and finite"


def _not_negative(value: float) -> str | None:
    return None if 0 <= value < math.inf else "must be finite and not negative"


def _seed(value: float) -> str | None:
    return None if 0 <= value < 2**32 else "must be at least 0 and below 2 ** 32"


def _rates(values: Sequence[float]) -> str | None:
    return None if all(0 < value < math.inf for value in values) else "must be above 0 and finite"


def _fraction(value: float) -> str | None:
    return None if 0 <= value < 1 else "must be at least 0 and below 1"


def setting(
    help: str,
    *,
    default: Any = None,
    type: Callable[[str], Any] = str,
    choices: Sequence[str] = (),
    check: Callable[[Any], str | None] | None = None,
    changes_result: bool = True,
    silent: bool = False,
    group: str = "what to run",
) -> Any:
    """A field of RunConfig.

    `changes_result` False keeps it out of the result's key: devices, folders, logging. `silent` keeps it out while it
    has its default: results from before there was such a setting keep their keys.
    """
    return dataclasses.field(
        default=default,
        metadata={
            "help": help,
            "type": type,
            "choices": tuple(choices),
            "check": check,
            "changes_result": changes_result,
            "silent": silent,
            "group": group,
        },
    )


def _numbers(text: str) -> tuple[float, ...]:
    name, _, values = text.rpartition("=")
    if name not in ("", "lr"):
        raise UsageError(f"--tune takes lr=1e-3,3e-3, not {text!r}: the learning rate is what is tuned")
    return tuple(float(value) for value in values.split(","))


def option_value(text: str) -> Any:
    """`true`, `3`, `0.5` and `none` as what they look like; the rest as text."""
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def split_label(label: str) -> tuple[str, dict[str, Any]]:
    """The name and the options of an attention written as tables have it: `hedgehog-window[window=8]`."""
    name, bracket, rest = label.strip().partition("[")
    if not bracket:
        return name, {}
    if not (name and rest.endswith("]")):
        raise UsageError(f"an attention is written name or name[option=value,option=value], not {label!r}")
    return name, options_of([rest[:-1]])


def _layers(text: str) -> tuple[tuple[str, str], ...]:
    """`0=softmax,3-5=taylor[project_to=16]`: pairs of layers, one or a range, and an attention's label."""
    pairs = []
    for part in re.split(r",(?![^\[]*\])", text):
        layers, equals, label = part.strip().partition("=")
        if not (equals and label and re.fullmatch(r"-?\d+|\d+-\d+", layers)):
            raise UsageError(f"--layers takes LAYER=NAME or FIRST-LAST=NAME, separated by commas, not {part!r}")
        pairs.append((layers, label))
    return tuple(pairs)


def _kept(text: str) -> str | None:
    return None if re.fullmatch(r"-?\d+(,-?\d+)*|auto:[1-9]\d*", text) else "takes layers as 0,1 or auto:COUNT"


def options_of(texts: Sequence[str]) -> dict[str, Any]:
    """The options of repeated `--option name=value`."""
    return dict(pair for text in texts for pair in _options(text))


def _options(text: str) -> tuple[tuple[str, Any], ...]:
    pairs = [pair.partition("=") for pair in text.split(",")]
    if any(not (name and equals) for name, equals, _ in pairs):
        raise UsageError(f"--option takes name=value, not {text!r}")
    return tuple((name, option_value(value)) for name, _, value in pairs)


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """One run: one task, one data set, one attention, one regime, one preset, one seed."""

    task: str = setting("glue, lm, imagenet, recall, or your own file.py:Class")
    attn: str = setting("an attention's name, or your own file.py:Class")
    dataset: str | None = setting("a data set of the task, or your own file or folder; all of the preset's if left out")
    preset: str = setting(
        "mini: real data at laptop size; paper: the published protocol", default="mini", choices=PRESETS
    )
    regime: str | None = setting("how the model comes about; the task has a default", choices=REGIMES)
    recipe: str | None = setting("the stages of a conversion; the attention has a default", choices=tuple(RECIPES))
    option: tuple[tuple[str, Any], ...] = setting(
        "an option of the attention, name=value (repeatable)", default=(), type=_options
    )
    window: int | None = setting(
        "softmax over so many tokens nearby, the attention beyond them; the same as its -window form",
        type=int,
        check=_positive,
        silent=True,
    )
    layers: tuple[tuple[str, str], ...] = setting(
        "another attention for some layers: 0=softmax,3-5=taylor[project_to=16]", default=(), type=_layers, silent=True
    )
    keep_layers: str | None = setting(
        "layers that stay softmax: 0,1; or auto:2, the two that transfer taught least", check=_kept, silent=True
    )
    seed: int = setting("of weights, data order and augmentation", default=0, type=int, check=_seed)
    teacher_seed: int = setting("of the teacher that is converted", default=0, type=int, check=_seed)

    model: str | None = setting("the host: a model of transformers or timm, or a folder", group="model and data")
    max_len: int | None = setting("longest sequence in tokens", type=int, check=_positive, group="model and data")
    dropout: float | None = setting(
        "of softmax's weights and of the hidden states", type=float, check=_fraction, group="model and data"
    )
    data_folder: Path | None = setting(
        "a local copy of a hub data set, laid out as on the hub",
        type=Path,
        changes_result=False,
        group="model and data",
    )
    train_examples: int | None = setting(
        "at most so many to train on; 0 = all", type=int, check=_not_negative, group="model and data"
    )
    test_examples: int | None = setting(
        "at most so many to test on; 0 = all", type=int, check=_not_negative, group="model and data"
    )

    batch_size: int | None = setting(
        "examples per optimizer step, over all devices together", type=int, check=_positive, group="training"
    )
    epochs: float | None = setting(
        "of training (scratch) or finetuning (conversion)", type=float, check=_not_negative, group="training"
    )
    lr: float | None = setting("of training or finetuning", type=float, check=_positive, group="training")
    teacher_epochs: float | None = setting(
        "of the teacher, in finetuned-conversion", type=float, check=_not_negative, group="training"
    )
    teacher_lr: float | None = setting("of the teacher", type=float, check=_positive, group="training")
    transfer_epochs: float | None = setting("of attention transfer", type=float, check=_not_negative, group="training")
    transfer_lr: float | None = setting("of attention transfer", type=float, check=_positive, group="training")
    transfer_loss: Literal["weights", "output", "both"] = setting(
        "what transfer compares: the layers' weights, their output, or both",
        default="weights",
        choices=("weights", "output", "both"),
        silent=True,
        group="training",
    )
    queries: int = setting(
        "transfer's loss on so many random queries of each sequence; 0 = all",
        default=0,
        type=int,
        check=_not_negative,
        silent=True,
        group="training",
    )
    lora: str | None = setting(
        "finetune low-rank adapters alone: r=8,alpha=16,targets=qkvo", silent=True, group="training"
    )
    freeze_maps: bool = setting(
        "finetuning leaves the attention's own parameters as transfer taught them",
        default=False,
        type=bool,
        silent=True,
        group="training",
    )
    weight_decay: float | None = setting(
        "of AdamW; none on biases and norms", type=float, check=_not_negative, group="training"
    )
    beta2: float | None = setting(
        "AdamW's second beta: how long it remembers squared gradients", type=float, check=_fraction, group="training"
    )
    warmup: float | None = setting(
        "part of the steps over which the learning rate rises", type=float, check=_fraction, group="training"
    )
    clip: float | None = setting(
        "largest norm of the gradient; 0 = none", type=float, check=_not_negative, group="training"
    )
    tune: tuple[float, ...] = setting(
        "learning rates to try, lr=1e-3,3e-3; the validation split picks",
        default=(),
        type=_numbers,
        check=_rates,
        group="training",
    )
    precision: str = setting("Lightning's precision", default="32-true", choices=PRECISIONS, group="training")

    accelerator: str = setting("auto, cpu, cuda, mps ...", default="auto", changes_result=False, group="machine")
    devices: int = setting(
        "how many; more than one trains under DDP",
        default=1,
        type=int,
        check=_positive,
        changes_result=False,
        group="machine",
    )
    num_nodes: int = setting("machines", default=1, type=int, check=_positive, changes_result=False, group="machine")
    strategy: str = setting(
        "ddp: each device trains a copy; fsdp: it keeps a share of weights, gradients and moments while it trains",
        default="ddp",
        choices=("ddp", "fsdp"),
        changes_result=False,
        group="machine",
    )
    find_unused_parameters: bool = setting(
        "under DDP, let parameters take no part in the loss; costs time",
        default=False,
        type=bool,
        changes_result=False,
        group="machine",
    )
    workers: int | None = setting(
        "processes that load data (default: 0; for images on a GPU its share of the CPUs, 16 at most)",
        type=int,
        check=_not_negative,
        changes_result=False,
        group="machine",
    )
    micro_batch_size: int | None = setting(
        "examples per device and forward pass; the rest of the batch is accumulated",
        type=int,
        check=_positive,
        group="machine",
    )
    checkpoint_minutes: float = setting(
        "between two checkpoints: what is lost with a machine, at most",
        default=5.0,
        type=float,
        check=_not_negative,
        changes_result=False,
        group="machine",
    )
    logger: str = setting("where curves go", default="csv", choices=LOGGERS, changes_result=False, group="machine")
    out: Path = setting(
        "folder for results, teachers and checkpoints",
        default=Path("runs"),
        type=Path,
        changes_result=False,
        group="machine",
    )
    save_model: bool = setting(
        "keep the trained model, for hhbench.load", default=False, type=bool, changes_result=False, group="machine"
    )
    model_folder: Path | None = setting(
        "keep it there, not in the run's folder", type=Path, changes_result=False, group="machine"
    )
    resume: bool = setting(
        "continue an interrupted run from its last checkpoint",
        default=False,
        type=bool,
        changes_result=False,
        group="machine",
    )
    force: bool = setting(
        "run again although a result is there",
        default=False,
        type=bool,
        changes_result=False,
        group="machine",
    )
    allow_code: bool = setting(
        "import the code that a YAML configuration names",
        default=False,
        type=bool,
        changes_result=False,
        group="machine",
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value, meta = getattr(self, field.name), field.metadata
            flag = f"--{field.name.replace('_', '-')}"
            if field.name in ("task", "attn") and not value:
                raise UsageError(f"{flag} is needed")
            if value is None:
                continue
            if meta["type"] is float and isinstance(value, int):  # 1 and 1.0 are one setting, with one key
                object.__setattr__(self, field.name, float(value))
            if meta["choices"] and value not in meta["choices"]:
                raise unknown_name(field.name, str(value), meta["choices"])
            if meta["check"] is not None and (complaint := meta["check"](value)):
                raise UsageError(f"{flag} {complaint}, not {value}")

    @property
    def options(self) -> dict[str, Any]:
        return dict(self.option)

    def filled(self, blanks: Mapping[str, Any]) -> "RunConfig":
        """A copy with its blank fields taken from `blanks`."""
        return dataclasses.replace(self, **{k: v for k, v in blanks.items() if getattr(self, k) is None})

    def as_dict(self) -> dict[str, Any]:
        """The settings as plain JSON values."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        paths = {n: str(values[n]) for n in ("out", "data_folder", "model_folder") if values[n] is not None}
        return values | paths | {"option": self.options, "tune": list(self.tune), "layers": dict(self.layers)}

    def as_yaml(self) -> str:
        """The settings that aren't blank, as `hhbench run --config` reads them."""
        import yaml

        return yaml.safe_dump({k: v for k, v in self.as_dict().items() if v not in (None, [], {})}, sort_keys=False)

    def identity(self) -> dict[str, Any]:
        """The settings that can change a number."""
        values = self.as_dict()
        return {
            f.name: values[f.name]
            for f in dataclasses.fields(self)
            if f.metadata["changes_result"] and not (f.metadata["silent"] and getattr(self, f.name) == f.default)
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "RunConfig":
        """From plain values, as in YAML or a result file. Unknown names are refused."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        known: dict[str, Any] = {}
        for raw, value in values.items():
            name = raw.replace("-", "_")
            if name not in fields:
                raise unknown_name("setting", raw, fields)
            known[name] = _converted(name, fields[name].metadata["type"], value)
        return cls(**known)


def _converted(name: str, kind: Callable[[str], Any], value: Any) -> Any:
    """A YAML value as the field's own type."""
    if value is None:
        return None
    try:
        if name == "option":
            if isinstance(value, str):
                return _options(value)
            return tuple(sorted(value.items())) if isinstance(value, Mapping) else tuple((k, v) for k, v in value)
        if name == "layers":
            if isinstance(value, str):
                return _layers(value)
            pairs = value.items() if isinstance(value, Mapping) else value
            return tuple(pair for layers, label in pairs for pair in _layers(f"{layers}={label}"))
        if name == "keep_layers" and isinstance(value, int | list | tuple):
            value = ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
        if name == "tune":
            return tuple(float(v) for v in value) if isinstance(value, list | tuple) else _numbers(str(value))
        if kind is bool and not isinstance(value, bool):
            raise ValueError("it is true or false")
        if kind is int and int(value) != float(value):
            raise ValueError("it must be whole")
        return kind(value)
    except UsageError:
        raise
    except (TypeError, ValueError, OverflowError) as error:
        raise UsageError(f"{name} can't be {value!r}: {error}") from error
