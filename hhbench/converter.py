"""Any pretrained model to a folder that holds it with another attention.

`hhbench convert` is a run in the regime `pretrained-conversion` that keeps its model: the same stages, checks, results
and resumption. What is decided here is which task the model and the data make, and where the folder goes.
"""

import dataclasses
import difflib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from hhbench import models, pretrained
from hhbench.attention import ATTENTIONS
from hhbench.config import RunConfig
from hhbench.data import image_files
from hhbench.errors import UsageError
from hhbench.runner import with_window
from hhbench.task import TASKS, Kind, Task


def kind_of(model: str) -> Kind:
    """What a model is: read from its config, or timm's list.

    Raises:
        UsageError: it is none of the three, or no name at all.
        DataError: there is no such model, or its folder isn't whole.
    """
    import timm

    source = pretrained.source(model)
    folder = Path(source)
    if folder.is_dir():
        models.check_folder(folder, pretrained=True)
    elif folder.is_file():
        raise UsageError(f"{model} is a file: name the folder that holds config.json and the weights")
    elif source.split(".")[0] in timm.list_models():
        return "vision"
    elif source.startswith((".", "/", "~")) or source.count("/") > 1:
        raise UsageError(f"there is no folder {model}")
    elif close := difflib.get_close_matches(source, pretrained.PRETRAINED, n=1, cutoff=0.8):
        raise UsageError(f"no model named {model!r}. Did you mean {close[0]!r}?")
    with models.clear_errors(source):
        config = models.config_of(source)
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
    return dataclasses.replace(config, model_folder=config.model_folder or _default_folder(config))


def _original(model: str) -> str:
    """A converted folder's own teacher; any other model as it is.

    Raises:
        UsageError: the folder doesn't say what it was made from, or that is gone or has changed.
    """
    folder = Path(model)
    if not models.is_converted(folder):
        return model
    run = models.manifest(folder).get("run") or {}
    original = (run.get("config") or {}).get("model")
    if original is None or run["config"].get("regime") != "pretrained-conversion":
        raise UsageError(
            f"{model} is converted already and doesn't say what from: name the model that it was made from"
        )
    if not Path(original).is_absolute():
        return str(original)  # a name: folders are kept by their whole path
    if not Path(original).is_dir():
        raise UsageError(f"{model} was made from {original}, which is gone: name a model to start from")
    if set(models.weights_hash(original).values()) != set(run.get("weights", {}).values()):
        raise UsageError(f"{model} was made from {original}, whose weights have changed since: name that to start anew")
    return str(original)


def _data_of(kind: Kind, task: str | None, dataset: str | None, model: str) -> tuple[str, str]:
    """The task and the data set: those that were named; else the first task for such a model that can read the data."""
    if task == "all" or "," in (task or ""):
        raise UsageError(f"a model is converted on one task, not on {task}")
    names = [task] if task else [name for name in TASKS.names() if kind in TASKS.get(name).part.teaches]
    tasks: list[Task] = [TASKS.get(name).build() for name in names]
    if dataset is None:
        for one in tasks:
            if (default := one.teaches.get(kind)) is not None:
                return one.name, default
        raise UsageError(f"name the data to teach {model} on with --data")
    _check_kind_of_data(kind, dataset, model)
    complaints = []
    for name, one in zip(names, tasks, strict=True):
        try:
            one.dataset(dataset)
            return name, dataset
        except UsageError as error:
            complaints.append(str(error))
    raise UsageError(f"{dataset} can't teach {model} ({kind}): {'; '.join(complaints)}")


def _check_kind_of_data(kind: Kind, dataset: str, model: str) -> None:
    """Images for a vision transformer, text for the others, where the data are the user's own."""
    path = Path(dataset)
    if not path.exists():
        if path.suffix in (".txt", ".csv", ".jsonl") or os.sep in dataset:
            raise UsageError(f"there is no file or folder {dataset}")
        return
    images = image_files(path)
    if kind == "vision" and not images:
        raise UsageError(f"{dataset} holds no images, and {model} ({kind}) takes a folder of images")
    if kind != "vision" and images and len(images) == sum(file.is_file() for file in path.rglob("*")):
        raise UsageError(f"{dataset} holds images, and {model} ({kind}) takes text")


def _default_folder(config: RunConfig) -> Path:
    attention = ATTENTIONS.get(with_window(config).attn).name.replace(".py:", "-")
    name = f"{Path(str(config.model)).absolute().name}-{attention}"
    return Path("converted") / re.sub(r"[^\w.=,+-]", "_", name)
