"""Any pretrained model to a folder that holds it with another attention.

`hhbench convert` is a run in the regime `pretrained-conversion` that keeps its model: the same stages, checks, results
and resumption. What is decided here is which task the model and the data make, and where the folder goes.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hhbench import models, pretrained
from hhbench.config import RunConfig
from hhbench.data import offline
from hhbench.errors import UsageError
from hhbench.task import TASKS, Kind, Task


def kind_of(model: str) -> Kind:
    """What a model is: read from its config, or timm's list.

    Raises:
        UsageError: it is none of the three.
        DataError: there is no such model.
    """
    import timm

    source = pretrained.source(model)
    if not Path(source).exists() and source.split(".")[0] in timm.list_models():
        return "vision"
    with models.clear_errors(source):
        config = AutoConfig.from_pretrained(source, local_files_only=offline())
    architecture = (config.architectures or [""])[0]
    if config.model_type in MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES:
        return "vision"
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return "decoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return "encoder"
    if config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return "decoder"
    raise UsageError(
        f"{model} ({config.model_type}) is no decoder, encoder or vision transformer: hhbench has no data for it"
    )


def config_of(model: str, settings: Mapping[str, Any]) -> RunConfig:
    """The run that converts a model.

    Args:
        model: a hub name, a timm name, a packaged name or a folder. A folder that was converted stands for the model
            that it was made from.
        settings: of RunConfig; `task`, `dataset` and `model_folder` may be missing.
    """
    model = _original(model)
    kind = kind_of(model)
    task, dataset = _data_of(kind, settings.get("task"), settings.get("dataset"), model)
    given = {"regime": "pretrained-conversion", "task": task, "dataset": dataset, "model": model}
    config = RunConfig.from_dict(dict(settings) | given)
    if config.model_folder is None:
        return RunConfig.from_dict(config.as_dict() | {"model_folder": str(_default_folder(config))})
    return config


def _original(model: str) -> str:
    """A converted folder's own teacher; any other model as it is."""
    folder = Path(model)
    if not models.is_converted(folder):
        return model
    run = models.manifest(folder).get("run") or {}
    original = (run.get("config") or {}).get("model")
    if original is None or run["config"].get("regime") != "pretrained-conversion":
        raise UsageError(
            f"{model} is converted already and doesn't say what from: name the model that it was made from"
        )
    return str(original)


def _data_of(kind: Kind, task: str | None, dataset: str | None, model: str) -> tuple[str, str]:
    """The task and the data set: those that were named; else the first task for such a model that can read the data."""
    names = [task] if task else [name for name in TASKS.names() if kind in TASKS.get(name).part.teaches]
    tasks: list[Task] = [TASKS.get(name).build() for name in names]
    if dataset is None:
        for one in tasks:
            if (default := one.teaches.get(kind)) is not None:
                return one.name, default
        raise UsageError(f"name the data to teach {model} on with --data")
    complaints = []
    for name, one in zip(names, tasks, strict=True):
        try:
            one.dataset(dataset)
            return name, dataset
        except UsageError as error:
            complaints.append(str(error))
    raise UsageError(f"{model}, a {kind} model, can't be taught on {dataset}: {'; '.join(complaints)}")


def _default_folder(config: RunConfig) -> Path:
    name = "-".join([Path(str(config.model)).name, config.attn.replace(".py:", "-")])
    return Path("converted") / re.sub(r"[^\w.=,+-]", "_", name)
