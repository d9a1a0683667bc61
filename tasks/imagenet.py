"""ImageNet: classify an image with a vision transformer of timm.

The mini preset is scikit-learn's digits, every one of the 8x8 pixels a token. CIFAR-10 is there by name for those who
have it as an image folder or reach the hub.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from hhbench import models
from hhbench.config import RunConfig
from hhbench.data import hash_bytes, hash_files, hub_table
from hhbench.errors import DataError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, register_task

DIGITS_MODEL = "vit-digits"
# timm's smallest ViT, cut down to images of 8x8 pixels; the mean over tokens is classified.
DIGITS_ARGUMENTS = {
    "img_size": 8,
    "patch_size": 1,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 3,
    "num_heads": 4,
    "mlp_ratio": 2.0,
    "class_token": False,
    "global_pool": "avg",
}
HUB = {
    "imagenet-1k": ("ILSVRC/imagenet-1k", "image", "label"),
    "cifar10": ("uoft-cs/cifar10", "img", "label"),
}


@register_task
class ImageNet(Task):
    """Score: top-1 accuracy. Test is the official validation split (ImageNet) or test split; validation is held out
    of the training images.
    """

    name = "imagenet"
    title = "ImageNet"
    causal = False
    datasets = {
        "digits": Dataset("digits", "top1", source="scikit-learn"),
        "cifar10": Dataset("cifar10", "top1"),
        "imagenet-1k": Dataset("imagenet-1k", "top1"),
    }
    suites = {"mini": ("digits",), "paper": ("imagenet-1k",)}
    regimes = ("finetuned-conversion", "pretrained-conversion", "scratch")

    def settings(self, config: RunConfig) -> dict[str, Any]:
        if config.preset == "paper" or config.dataset != "digits":
            # Every hyperparameter of the paper's ViT runs is unverified; these are a proposal.
            return {
                "model": "vit_base_patch16_224",
                "max_len": 197,
                "dropout": 0.0,
                "train_examples": 0,
                "test_examples": 0,
                "batch_size": 128 if config.regime != "scratch" else 1024,
                "epochs": 10.0 if config.regime != "scratch" else 300.0,
                "lr": 1e-5 if config.regime != "scratch" else 1e-3,
                "teacher_epochs": 0.0,  # the pretrained checkpoint is the teacher
                "teacher_lr": 1e-5,
                "transfer_epochs": 2.0,
                "transfer_lr": 1e-2,
                "weight_decay": 0.01,
                "beta2": 0.999,
                "warmup": 0.05,
                "clip": 1.0,
            }
        return {
            "model": DIGITS_MODEL,
            "max_len": 64,
            "dropout": 0.0,
            "train_examples": 0,
            "test_examples": 0,
            "batch_size": 50,
            "epochs": 2.0 if config.regime != "scratch" else 40.0,
            "lr": 5e-4 if config.regime != "scratch" else 4e-3,
            "teacher_epochs": 40.0,
            "teacher_lr": 4e-3,
            "transfer_epochs": 5.0,
            "transfer_lr": 1e-2,
            "weight_decay": 0.05,
            "beta2": 0.999,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets and Path(name).is_dir():
            return Dataset(Path(name).name, "top1")
        return super().dataset(name)

    def load_data(self, config: RunConfig) -> TaskData:
        if config.model == DIGITS_MODEL and config.regime == "pretrained-conversion":
            raise UsageError(f"{DIGITS_MODEL} has no pretrained weights: use finetuned-conversion, or scratch")
        if config.dataset == "digits":
            return _digits(config)
        if config.model == DIGITS_MODEL:
            raise UsageError(f"{DIGITS_MODEL} takes images of 8x8 pixels: name a timm model with --model")
        return _images(config)

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        classes = data.facts["num_classes"]
        if config.model == DIGITS_MODEL:
            arguments = DIGITS_ARGUMENTS | {"num_classes": classes, "drop_rate": config.dropout}
            model = models.HostRecipe("timm", "vit_tiny_patch16_224", arguments).build()
            # Single pixels say nothing without their place: timm's 0.02 would leave it a whisper.
            nn.init.normal_(model.pos_embed, std=0.5)  # type: ignore[arg-type]
            return model
        return models.timm_model(
            str(config.model),
            pretrained=config.regime != "scratch",
            num_classes=classes,
            drop_rate=config.dropout,
        )

    def weights(self, config: RunConfig) -> dict[str, str]:
        if config.model == DIGITS_MODEL or config.regime == "scratch":
            return {}
        return models.timm_weights_hash(str(config.model))

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).float()
        labels = batch["labels"]
        loss = cross_entropy(logits, labels, reduction="sum")
        return StepOutput(loss, len(labels), (logits.detach(), labels), (logits.argmax(-1) == labels).float())

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        classes = data.facts["num_classes"]
        return MetricCollection(
            {
                "top1": MulticlassAccuracy(classes, average="micro"),
                "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
            },
            compute_groups=False,
        )


def _digits(config: RunConfig) -> TaskData:
    """1,797 images in an order of one seed: 600 to test on, 297 to validate on, 900 to train on."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.default_rng(0).permutation(len(bunch.target))
    images = torch.tensor(bunch.images[order] / 8.0 - 1.0, dtype=torch.float32)[:, None]
    labels = bunch.target[order].tolist()
    examples = list(zip(images, labels, strict=True))
    num_tokens = int(config.max_len or 0)

    def split(rows: Sequence[Any], limit: int | None) -> Split:
        rows = rows[: limit or None]
        return Split(rows, [num_tokens] * len(rows))

    digest = hash_bytes(np.ascontiguousarray(bunch.images).tobytes() + bunch.target.astype(np.int64).tobytes())
    return TaskData(
        train=split(examples[897:], config.train_examples),
        validation=split(examples[600:897], config.test_examples),
        tests={"test": split(examples[:600], config.test_examples)},
        collate=_Collate(num_tokens),
        hashes={"digits": digest},
        facts={"num_classes": 10},
    )


def _images(config: RunConfig) -> TaskData:
    """An image folder (`train/CLASS/*.jpg`, and `validation`, `val` or `test`), or a set of the hub, through timm's
    transforms for the model.
    """
    from timm.data import create_transform, resolve_data_config

    name = str(config.dataset)
    arguments = resolve_data_config(model=models.timm_model(str(config.model), pretrained=False))
    train_transform = create_transform(**arguments, is_training=True)
    test_transform = create_transform(**arguments)
    if Path(name).is_dir():
        train_rows, test_rows, classes, hashes = _folder(Path(name))
    else:
        repo, image, label = HUB[name]
        table = hub_table(repo, folder=config.data_folder)
        test = next((s for s in ("test", "validation") if s in table and -1 not in table[s][label][:1]), "validation")
        train_rows, test_rows = (_HubRows(table[s], image, label) for s in ("train", test))
        classes = table["train"].features[label].num_classes
        hashes = {name: str(table["train"]._fingerprint)}
    order = torch.randperm(len(train_rows), generator=torch.Generator().manual_seed(0)).tolist()
    held = max(1, min(len(order) // 10, 10_000))
    num_tokens = int(config.max_len or 0)

    def split(rows: Any, indices: list[int], transform: Any, limit: int | None) -> Split:
        indices = indices[: limit or None]
        return Split(_Transformed(rows, indices, transform), [num_tokens] * len(indices))

    return TaskData(
        train=split(train_rows, order[held:], train_transform, config.train_examples),
        validation=split(train_rows, order[:held], test_transform, config.test_examples),
        tests={"test": split(test_rows, list(range(len(test_rows))), test_transform, config.test_examples)},
        collate=_Collate(num_tokens),
        hashes=hashes,
        facts={"num_classes": classes},
    )


def _folder(path: Path) -> tuple[Any, Any, int, dict[str, str]]:
    from torchvision.datasets import ImageFolder

    test = next((path / s for s in ("test", "validation", "val") if (path / s).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise DataError(
            f"{path} needs a folder train and one of test, validation and val, each with one folder a class"
        )
    try:
        train, held = ImageFolder(path / "train"), ImageFolder(test)
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{path}: {error}") from error
    if train.classes != held.classes:
        raise DataError(
            f"{path}: train has the classes {train.classes[:5]} ..., {test.name} has {held.classes[:5]} ..."
        )
    files = [Path(file) for file, _ in (*train.samples, *held.samples)]
    return train, held, len(train.classes), {path.name: hash_files(files)}


class _HubRows:
    """Rows of a hub's set as (image, label)."""

    def __init__(self, table: Any, image: str, label: str) -> None:
        self.table, self.image, self.label = table, image, label

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        return row[self.image], int(row[self.label])

    def __len__(self) -> int:
        return len(self.table)


class _Transformed(Sequence[Example]):
    """Images read and transformed when a batch asks for them."""

    def __init__(self, rows: Any, indices: list[int], transform: Any) -> None:
        self.rows, self.indices, self.transform = rows, indices, transform

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return _Transformed(self.rows, self.indices[index], self.transform)
        image, label = self.rows[self.indices[index]]
        return self.transform(image.convert("RGB")), label

    def __len__(self) -> int:
        return len(self.indices)


class _Collate:
    """Examples (image, label) to a batch; each image is `num_tokens` tokens to its model."""

    def __init__(self, num_tokens: int) -> None:
        self.num_tokens = num_tokens

    def __call__(self, examples: Sequence[Example]) -> Batch:
        return {
            "inputs": {"x": torch.stack([image for image, _ in examples])},  # type: ignore[misc]
            "labels": torch.tensor([label for _, label in examples]),
            "num_tokens": self.num_tokens * len(examples),
        }
