"""ImageNet: classify an image with a vision transformer, of timm or of transformers.

The mini preset is scikit-learn's digits, every one of the 8x8 pixels a token. Fashion-MNIST is there by name, for
pretrained models at laptop size, and CIFAR-10 for those who have it as an image folder or reach the hub.
"""

import gzip
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy

from hhbench import data, models, pretrained
from hhbench.config import RunConfig
from hhbench.data import PackageFile, hash_bytes, hub_table, remembered_hash
from hhbench.errors import DataError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, register_task

FASHION_MNIST = PackageFile(
    name="fashion-mnist",
    package="dataset-fashion-mnist",
    version="0.0~git20200523.55506a9-1",
    filename="dataset-fashion-mnist_0.0~git20200523.55506a9-1_all.deb",
    sha256="39e172fe32dd318ebb3e512220c3beea2fa47d7e20bab348fb4e0922d6beefc0",
    megabytes=30.9,
    licence="MIT",
    holds="Fashion-MNIST: 60,000 and 10,000 grey images of 28 x 28, ten kinds of clothes (Xiao et al. 2017)",
)
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
LAYOUT = "needs a folder train and one of test, validation and val, each with one folder a class"


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
        "fashion-mnist": Dataset("fashion-mnist", "top1", files=(FASHION_MNIST,)),
        "cifar10": Dataset("cifar10", "top1"),
        "imagenet-1k": Dataset("imagenet-1k", "top1"),
    }
    suites = {"mini": ("digits",), "paper": ("imagenet-1k",)}
    teaches = {"vision": "fashion-mnist"}
    regimes = ("finetuned-conversion", "pretrained-conversion", "scratch")

    def settings(self, config: RunConfig) -> dict[str, Any]:
        if config.preset == "mini" and config.dataset != "digits":
            converts = config.regime != "scratch"
            return {
                "model": "dinov2",
                "max_len": 26 if is_of_transformers(config.model or "dinov2") else 197,  # 5 x 5 patches and the class
                "dropout": 0.0,
                "train_examples": 3200,
                "test_examples": 1000,
                "batch_size": 32,
                "epochs": 0.5 if converts else 3.0,
                "lr": 5e-5 if converts else 3e-4,
                "teacher_epochs": 1.0,
                "teacher_lr": 5e-5,
                "transfer_epochs": 0.5,
                "transfer_lr": 1e-2,
                "weight_decay": 0.01,
                "beta2": 0.999,
                "warmup": 0.1,
                "clip": 1.0,
            }
        if config.preset == "paper":
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
            if not (Path(name) / "train").is_dir():
                raise UsageError(f"{name} {LAYOUT}")
            return Dataset(Path(name).name, "top1")
        return super().dataset(name)

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        return (*super().files(config), *pretrained.files(str(config.model)))

    def load_data(self, config: RunConfig) -> TaskData:
        if config.model == DIGITS_MODEL and config.regime == "pretrained-conversion":
            raise UsageError(f"{DIGITS_MODEL} has no pretrained weights: use finetuned-conversion, or scratch")
        if config.dataset == "digits":
            return _digits(config)
        if config.model == DIGITS_MODEL:
            raise UsageError(f"{DIGITS_MODEL} takes images of 8x8 pixels: name another model with --model")
        return _images(config)

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        classes = data.facts["num_classes"]
        if config.model == DIGITS_MODEL:
            arguments = DIGITS_ARGUMENTS | {"num_classes": classes, "drop_rate": config.dropout}
            model = models.TimmRecipe("vit_tiny_patch16_224", arguments).build()
            # Single pixels say nothing without their place: timm's 0.02 would leave it a whisper.
            nn.init.normal_(model.pos_embed, std=0.5)  # type: ignore[arg-type]
            return model
        if is_of_transformers(str(config.model)):
            from transformers import AutoModelForImageClassification

            return models.transformers_model(
                AutoModelForImageClassification,
                str(config.model),
                pretrained=config.regime != "scratch",
                dropout=float(config.dropout or 0),
                num_labels=classes,
            )
        return models.timm_model(
            str(config.model),
            pretrained=config.regime != "scratch",
            num_classes=classes,
            drop_rate=config.dropout,
        )

    def weights(self, config: RunConfig) -> dict[str, str]:
        if config.model == DIGITS_MODEL or config.regime == "scratch":
            return {}
        if is_of_transformers(str(config.model)):
            return models.weights_hash(str(config.model))
        return models.timm_weights_hash(str(config.model))

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        output = model(**batch["inputs"])
        logits: Tensor = (output if isinstance(output, Tensor) else output.logits).float()
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
        collate=Collate(num_tokens, "x"),
        hashes={"digits": digest},
        facts={"num_classes": 10},
    )


def is_of_transformers(model: str) -> bool:
    """Whether a model is one of transformers: packaged, a folder, or OWNER/NAME on the hub. timm's names have no /."""
    return model in pretrained.PRETRAINED or "/" in model or Path(model).is_dir()


@dataclass(frozen=True)
class Collate:
    """Examples (image, label) to a batch.

    Attributes:
        num_tokens: to the model, of each image.
        name: of the model's argument that takes the images.
        stack: a batch's images to that argument, [B, C, H, W].
        extra: other arguments of every call.
    """

    num_tokens: int
    name: str
    stack: Callable[[Any], Tensor] = torch.stack
    extra: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, examples: Sequence[Example]) -> Batch:
        images, labels = zip(*examples, strict=True)
        return {
            "inputs": {self.name: self.stack(images), **self.extra},
            "labels": torch.tensor(labels),
            "num_tokens": self.num_tokens * len(examples),
        }


@dataclass(frozen=True)
class Inputs:
    """What a model takes.

    Attributes:
        train, test: a PIL image to what `collate` stacks.
        collate: examples to the model's arguments.
        processor: the image processor that `test` is, of a model of transformers.
        transforms: what timm's transforms are made from, of a model of timm.
    """

    train: Callable[[Any], Any]
    test: Callable[[Any], Any]
    collate: Collate
    processor: Any = None
    transforms: Mapping[str, Any] | None = None

    def split(self, rows: Any, indices: list[int], limit: int | None, *, training: bool = False) -> Split:
        """Rows (PIL image, label), the first `limit` of those indices or, for 0, all; read when they are asked for."""
        indices = indices[: limit or None]
        images = Transformed(rows, indices, self.train if training else self.test)
        return Split(images, [self.collate.num_tokens] * len(indices), draws=training, costly=True)


def inputs_of(config: RunConfig) -> Inputs:
    """What the config's model takes."""
    return (_transformers_inputs if is_of_transformers(str(config.model)) else _timm_inputs)(config)


def _timm_inputs(config: RunConfig) -> Inputs:
    """timm's own transforms for the model, with its augmentation in training, and what its loader makes of them."""
    from timm.data import create_transform, resolve_data_config

    arguments = resolve_data_config(model=models.timm_model(str(config.model), pretrained=False))
    train, test = (create_transform(**arguments, is_training=t, use_prefetcher=True) for t in (True, False))
    stack = _Normalise(arguments["mean"], arguments["std"])
    return Inputs(train, test, Collate(int(config.max_len or 0), "x", stack), transforms=arguments)


class _Normalise:
    """Images of bytes [3, H, W] to a normalised batch, at once: image by image that is much of a loader's time."""

    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (255 * torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, images: Sequence[Any]) -> Tensor:
        from timm.data.loader import fast_collate

        pixels: Tensor
        pixels, _ = fast_collate([(image, 0) for image in images])
        return pixels.float().sub_(self.mean).div_(self.std)


def _transformers_inputs(config: RunConfig) -> Inputs:
    """The model's own image processor, at a size that gives `max_len` tokens at most; in training with random flips.

    Raises:
        UsageError: the model has no patches, or takes no images of that size.
        DataError: its image processor can't be had.
    """
    from torchvision.transforms.functional import hflip
    from transformers import AutoImageProcessor, AutoModelForImageClassification

    name, source = str(config.model), pretrained.source(str(config.model))
    with models.clear_errors(source):
        host = models.config_of(source)
        processor = AutoImageProcessor.from_pretrained(source, local_files_only=data.offline(), trust_remote_code=False)
    patch, most = getattr(host, "patch_size", None), getattr(host, "image_size", None)
    if not (isinstance(patch, int) and isinstance(most, int)):
        raise UsageError(f"{name} ({host.model_type}) doesn't cut square images into patches")
    special = 1 + int(getattr(host, "num_register_tokens", 0))
    side = min(most // patch, math.isqrt(max(0, int(config.max_len or 0) - special)))
    if not side:
        raise UsageError(f"--max-len {config.max_len} leaves no patch: {special} tokens are no part of the image")
    extra = {}
    if side != most // patch and not host.model_type.startswith("dinov"):  # those stretch their positions unasked
        with torch.device("meta"):
            forward = AutoModelForImageClassification.from_config(host).forward
        if "interpolate_pos_encoding" not in inspect.signature(forward).parameters:
            raise UsageError(f"{name} takes images of {most} pixels alone: --max-len {special + (most // patch) ** 2}")
        extra["interpolate_pos_encoding"] = True
    square = {"height": side * patch, "width": side * patch}
    processor.size = type(processor.size)(
        **({"shortest_edge": side * patch} if "shortest_edge" in processor.size else square)
    )
    processor.crop_size = square

    def test(image: Any) -> Tensor:
        pixels: Tensor = processor(image, return_tensors="pt")["pixel_values"][0]
        return pixels

    def train(image: Any) -> Tensor:
        return test(hflip(image) if torch.rand(()) < 0.5 else image)

    return Inputs(train, test, Collate(special + side**2, "pixel_values", extra=extra), processor)


def _images(config: RunConfig) -> TaskData:
    """Fashion-MNIST, an image folder (`train/CLASS/*.jpg`, and `validation`, `val` or `test`), or a set of the hub."""
    name = str(config.dataset)
    train_rows: Any
    test_rows: Any
    inputs = inputs_of(config)
    if name == "fashion-mnist":
        train_rows, test_rows = _fashion_mnist("train"), _fashion_mnist("t10k")
        classes, hashes = 10, {FASHION_MNIST.name: FASHION_MNIST.sha256}
    elif Path(name).is_dir():
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

    return TaskData(
        train=inputs.split(train_rows, order[held:], config.train_examples, training=True),
        validation=inputs.split(train_rows, order[:held], config.test_examples),
        tests={"test": inputs.split(test_rows, list(range(len(test_rows))), config.test_examples)},
        collate=inputs.collate,
        hashes=hashes,
        facts={"num_classes": classes, "processor": inputs.processor, "transforms": inputs.transforms},
    )


def _fashion_mnist(part: str) -> "_ArrayRows":
    """The official training (`train`) or test set (`t10k`), read from IDX files: a header of 16 bytes is ahead of the
    pixels, one of 8 ahead of the labels.
    """

    def numbers(kind: str, start: int) -> Any:
        packed = data.read(FASHION_MNIST, f"usr/share/datasets/fashion-mnist/{part}-{kind}-ubyte.gz")
        return np.frombuffer(gzip.decompress(packed), np.uint8, offset=start)

    return _ArrayRows(numbers("images-idx3", 16).reshape(-1, 28, 28), numbers("labels-idx1", 8))


def _folder(path: Path) -> tuple[Any, Any, int, dict[str, str]]:
    from torchvision.datasets import ImageFolder

    test = next((path / s for s in ("test", "validation", "val") if (path / s).is_dir()), None)
    if not (path / "train").is_dir() or test is None:
        raise DataError(f"{path} {LAYOUT}")
    try:
        train, held = ImageFolder(path / "train"), ImageFolder(test)
    except (FileNotFoundError, OSError) as error:
        raise DataError(f"{path}: {error}") from error
    if train.classes != held.classes:
        raise DataError(
            f"{path}: train has the classes {train.classes[:5]} ..., {test.name} has {held.classes[:5]} ..."
        )
    files = [Path(file) for file, _ in (*train.samples, *held.samples)]
    return train, held, len(train.classes), {path.name: remembered_hash(files, path)}


class _ArrayRows:
    """Grey images [N, H, W] of bytes and labels [N], as (PIL image, label)."""

    def __init__(self, images: Any, labels: Any) -> None:
        self.images, self.labels = images, labels

    def __getitem__(self, index: int) -> tuple[Any, int]:
        from PIL import Image

        return Image.fromarray(self.images[index]), int(self.labels[index])

    def __len__(self) -> int:
        return len(self.labels)


class _HubRows:
    """Rows of a hub's set as (image, label)."""

    def __init__(self, table: Any, image: str, label: str) -> None:
        self.table, self.image, self.label = table, image, label

    def __getitem__(self, index: int) -> tuple[Any, int]:
        row = self.table[index]
        return row[self.image], int(row[self.label])

    def __len__(self) -> int:
        return len(self.table)


class Transformed(Sequence[Example]):
    """Images read and transformed when a batch asks for them."""

    def __init__(self, rows: Any, indices: list[int], transform: Any) -> None:
        self.rows, self.indices, self.transform = rows, indices, transform

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Transformed(self.rows, self.indices[index], self.transform)
        image, label = self.rows[self.indices[index]]
        return self.transform(image.convert("RGB")), label

    def __len__(self) -> int:
        return len(self.indices)
