"""Text or images without labels: attention transfer alone.

What a model is converted on where nobody says how good it is: an encoder on running text, a vision transformer on a
folder of images. The model keeps its head, if it has one; nothing is finetuned.
"""

import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

import transformers
from torch import nn
from torchmetrics import MetricCollection
from transformers import AutoModel

from hhbench import models, pretrained
from hhbench.config import RunConfig
from hhbench.data import PackageFile, image_files, remembered_hash
from hhbench.errors import DataError, HHBenchError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, Task, TaskData, key_mask_of, padded, register_task
from hhbench.tasks import imagenet, lm

HELD_OUT = 0.1  # of the images, to validate on and to test on


@register_task
class Unlabelled(Task):
    """Score: KL from softmax's weights to the attention's, in nats, on text or images that it was not taught on; the
    mean over layers, heads and attended queries, with softmax's output passed on from layer to layer.
    """

    name = "unlabelled"
    title = "Unlabelled"
    causal = False
    scored = False
    teaches = {"encoder": "wikipedia", "vision": None}
    regimes = ("pretrained-conversion",)
    version = 2  # 1 flipped images by no seed
    datasets = {"wikipedia": Dataset("wikipedia", "kl", higher_is_better=False, files=(lm.WIKIPEDIA,))}
    suites = {"mini": (), "paper": ()}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        images = image_files(Path(str(config.dataset)))
        return {
            "model": "minilm",
            "max_len": imagenet.ImageNet().settings(config)["max_len"] if images else 128,
            "dropout": 0.0,
            "train_examples": 2000,
            "test_examples": 200,
            "batch_size": 8,
            "epochs": 0.0,
            "lr": 1e-4,
            "teacher_epochs": 0.0,
            "teacher_lr": 1e-4,
            "transfer_epochs": 1.0,
            "transfer_lr": 1e-2,
            "weight_decay": 0.0,
            "beta2": 0.999,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def dataset(self, name: str) -> Dataset:
        path = Path(name)
        if name not in self.datasets and (path.is_dir() or (path.is_file() and path.suffix == ".txt")):
            return Dataset(path.name, "kl", higher_is_better=False)
        return super().dataset(name)

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        return (*super().files(config), *pretrained.files(str(config.model)))

    def load_data(self, config: RunConfig) -> TaskData:
        images = image_files(Path(str(config.dataset)))
        return _images(config, images) if images else _text(config)

    def weights(self, config: RunConfig) -> dict[str, str]:
        name = str(config.model)
        if not imagenet.is_of_transformers(name):
            return models.timm_weights_hash(name)
        return models.weights_hash(name)

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        name, dropout = str(config.model), float(config.dropout or 0)
        if not imagenet.is_of_transformers(name):
            return models.timm_model(name, pretrained=True, drop_rate=dropout)
        source = pretrained.source(name)
        with models.clear_errors(source):
            known = models.config_of(source)
        if "vocab" in data.facts:
            pretrained.check_fit(name, known, vocab=data.facts["vocab"], max_len=int(config.max_len or 0))
        found = getattr(transformers, (known.architectures or [""])[0], None)
        is_model = isinstance(found, type) and issubclass(found, transformers.PreTrainedModel)
        own: Any = found if is_model else AutoModel
        return models.transformers_model(own, name, pretrained=True, dropout=dropout)

    def step(self, model: nn.Module, batch: Batch) -> NoReturn:
        raise HHBenchError("there are no labels to train or test on")

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection({})


def _text(config: RunConfig) -> TaskData:
    """Windows of running text that don't overlap, between the tokens that the model puts at both ends."""
    texts = lm.load_texts(str(config.dataset), config.data_folder)
    tokenizer = models.tokenizer(str(config.model))
    ends = [[t for t in (token,) if t is not None] for token in (tokenizer.cls_token_id, tokenizer.sep_token_id)]
    length = int(config.max_len or 0) - sum(map(len, ends))
    if length < 1:
        raise UsageError(f"--max-len {config.max_len} leaves no room for text")

    def split(text: str, limit: int | None) -> Split:
        ids = lm.stream_of(text, tokenizer.backend_tokenizer, special=False).tokens.tolist()
        windows = [[*ends[0], *ids[i : i + length], *ends[1]] for i in range(0, len(ids), length)]
        examples = [{"input_ids": window} for window in windows[: limit or None]]
        return Split(examples, [len(example["input_ids"]) for example in examples])

    return TaskData(
        train=split(texts.train, config.train_examples),
        validation=split(texts.validation, config.test_examples),
        tests={"test": split(texts.test, config.test_examples)},
        collate=_Pad(int(tokenizer.pad_token_id or 0)),
        hashes=texts.hashes,
        facts={"vocab": len(tokenizer), "processor": tokenizer},
    )


class _Pad:
    def __init__(self, value: int) -> None:
        self.value = value

    def __call__(self, examples: Sequence[Example]) -> Batch:
        ids = [example["input_ids"] for example in examples]
        inputs = {"input_ids": padded(ids, self.value), "attention_mask": key_mask_of(ids)}
        return {"inputs": inputs, "num_tokens": sum(map(len, ids))}


class _Files:
    """Image files as (image, label), the label 0 for all."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.paths = paths

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image, UnidentifiedImageError

        try:
            return Image.open(self.paths[index]), 0
        except (OSError, UnidentifiedImageError) as error:
            raise DataError(f"{self.paths[index]} can't be read as an image: {error}") from error


def _images(config: RunConfig, paths: Sequence[Path]) -> TaskData:
    """A tenth of the images to test on and a tenth to validate on, drawn by one seed."""
    held = max(1, round(HELD_OUT * len(paths)))
    if len(paths) < 3:
        raise DataError(f"{config.dataset} holds {len(paths)} images: too few to hold some out")
    inputs = imagenet.inputs_of(config)
    order = list(range(len(paths)))
    random.Random(0).shuffle(order)

    rows = _Files(paths)
    return TaskData(
        train=inputs.split(rows, order[2 * held :], config.train_examples, training=True),
        validation=inputs.split(rows, order[held : 2 * held], config.test_examples),
        tests={"test": inputs.split(rows, order[:held], config.test_examples)},
        collate=inputs.collate,
        hashes={Path(str(config.dataset)).name: remembered_hash(paths)},
        facts={"processor": inputs.processor, "transforms": inputs.transforms},
    )
