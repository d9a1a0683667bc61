"""Digits, a user's image folder, models of transformers, Fashion-MNIST."""

import random

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from timm.data import create_loader, create_transform
from torchvision.datasets import ImageFolder
from transformers import (
    BitImageProcessor,
    Dinov2Config,
    Dinov2ForImageClassification,
    Dinov2Model,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
)

from hhbench import data, pretrained
from hhbench.config import RunConfig
from hhbench.errors import DataError, UsageError
from hhbench.runner import execute, prepare
from hhbench.tasks import imagenet
from hhbench.tasks.imagenet import DIGITS_MODEL, FASHION_MNIST, ImageNet

SETTINGS = {
    "task": "imagenet", "attn": "softmax", "dataset": "digits", "model": DIGITS_MODEL, "regime": "scratch",
    "max_len": 65, "dropout": 0.0, "train_examples": 0, "test_examples": 0,
}  # fmt: skip


def load(**changes):
    return ImageNet().load_data(RunConfig(**(SETTINGS | changes)))


@pytest.fixture(scope="module")
def digits():
    return load()


# --- digits ---


def test_digits_are_all_used_once(digits):
    splits = {"train": digits.train, "validation": digits.validation, "test": digits.tests["test"]}
    assert {name: len(split) for name, split in splits.items()} == {"train": 900, "validation": 297, "test": 600}
    bunch = load_digits()

    def rows(images, labels):
        return sorted((image.tobytes(), int(label)) for image, label in zip(images, labels, strict=True))

    found = [((image[0].numpy() + 1) * 8, label) for split in splits.values() for image, label in split.examples]
    assert rows([np.round(image).astype(np.uint8) for image, _ in found], [label for _, label in found]) == rows(
        bunch.images.astype(np.uint8), bunch.target
    )


def test_digits_splits_are_disjoint(digits):
    def images(split):
        return {image.numpy().tobytes() for image, _ in split.examples}

    train, validation, test = images(digits.train), images(digits.validation), images(digits.tests["test"])
    assert len(train) + len(validation) + len(test) == 1797  # no image stands there twice
    assert not (train & test or train & validation or validation & test)


def test_digits_come_again_and_can_be_fewer(digits):
    again = load(train_examples=10, test_examples=20)
    assert (len(again.train), len(again.validation), len(again.tests["test"])) == (10, 20, 20)
    assert again.hashes == digits.hashes
    for (a, label), (b, other) in zip(again.train.examples, digits.train.examples[:10], strict=True):
        assert torch.equal(a, b)
        assert label == other


def test_every_pixel_is_a_token(digits):
    model = ImageNet().build_model(RunConfig(**SETTINGS), digits)
    batch = digits.collate(digits.train.examples[:3])
    assert batch["inputs"]["x"].shape == (3, 1, 8, 8)
    assert model.patch_embed(batch["inputs"]["x"]).shape[1] == 64
    assert batch["num_tokens"] == 3 * 65
    out = ImageNet().step(model, batch)
    assert (out.count, out.scores.shape) == (3, (3,))
    assert float(out.loss.detach()) == pytest.approx(3 * np.log(10), rel=0.3)


def test_metrics_are_sklearns(digits):
    torch.manual_seed(1)
    logits, labels = torch.randn(500, 10), torch.randint(0, 10, (500,))
    metrics = ImageNet().metrics(digits, RunConfig(**SETTINGS))
    for start in range(0, 500, 77):
        metrics.update(logits[start : start + 77], labels[start : start + 77])
    found = {name: float(value) for name, value in metrics.compute().items()}
    assert found["top1"] == pytest.approx(accuracy_score(labels, logits.argmax(-1)))
    assert found["top5"] == pytest.approx(top_k_accuracy_score(labels, logits.numpy(), k=5))


# --- an image folder ---


@pytest.fixture
def folder(tmp_path):
    """Three classes of one colour each, eight images a class to train on and two to test on."""
    root = tmp_path / "flags"
    noise = np.random.default_rng(0)
    for split, count in [("train", 8), ("test", 2)]:
        for place, name in enumerate(["blue", "green", "red"]):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 60, (24, 24, 3), dtype=np.uint8)
                pixels[..., 2 - place] += 180
                Image.fromarray(pixels).save(root / split / name / f"{i}.png")
    return root


def folder_settings(folder, **changes) -> dict:
    return SETTINGS | {"dataset": str(folder), "model": "vit_tiny_patch16_224", "max_len": 197} | changes


def test_an_image_folder_becomes_splits(folder):
    data = load(**folder_settings(folder))
    assert (len(data.train), len(data.validation), len(data.tests["test"])) == (22, 2, 6)
    assert data.facts["num_classes"] == 3
    assert sorted(label for _, label in data.tests["test"].examples[:]) == [0, 0, 1, 1, 2, 2]
    image, _ = data.tests["test"].examples[0]
    assert image.shape == (3, 224, 224)
    fewer = load(**folder_settings(folder, train_examples=5, test_examples=1))
    assert (len(fewer.train), len(fewer.validation), len(fewer.tests["test"])) == (5, 1, 1)
    (hash_,) = data.hashes.values()
    (folder / "train" / "red" / "0.png").rename(folder / "train" / "blue" / "8.png")  # another label
    (moved,) = load(**folder_settings(folder)).hashes.values()
    (folder / "train" / "blue" / "8.png").rename(folder / "train" / "green" / "8.png")
    assert load(**folder_settings(folder)).hashes != {"flags": moved}
    assert moved != hash_


def test_batches_are_those_of_timms_loader(folder):
    """Tested on, as its loader with its prefetcher makes them; trained on, with its augmentation's own draws."""
    loaded = load(**folder_settings(folder))
    settings = loaded.facts["transforms"]
    rows = ImageFolder(folder / "test")
    (theirs, labels), = create_loader(
        rows, batch_size=6, num_workers=0, persistent_workers=False, device=torch.device("cpu"), **settings
    )  # fmt: skip
    ours = loaded.collate(loaded.tests["test"].examples[:])
    assert torch.equal(ours["labels"], labels)
    torch.testing.assert_close(ours["inputs"]["x"], theirs, rtol=0, atol=1e-6)
    train = loaded.train.examples
    augment = create_transform(**settings, is_training=True)
    for index in (0, 7):
        augmented = []
        for read in (lambda i: loaded.collate([train[i]])["inputs"]["x"][0], lambda i: augment(raw(train, i))):
            torch.manual_seed(index)
            random.seed(index)
            augmented.append(read(index))
        torch.testing.assert_close(*augmented, rtol=0, atol=1e-6)
    assert ours["inputs"]["x"].dtype == torch.float32


def raw(images, index):
    return images.rows[images.indices[index]][0].convert("RGB")


def test_an_image_folder_end_to_end(folder, tmp_path):
    config = RunConfig(
        **folder_settings(
            folder, attn="hedgehog", batch_size=2, train_examples=2, test_examples=3, epochs=1.0, accelerator="cpu",
            logger="none", out=tmp_path / "runs",
        )
    )  # fmt: skip
    made, path = execute(config)
    assert made.task["dataset"] == "flags"
    assert path.parent.parent.name == "flags"
    assert (made.score.name, made.score.num_examples) == ("top1", 3)
    assert made.metrics["top5"] == 1.0  # of three classes
    assert made.cost["train_tokens"] == 2 * 197
    assert list(made.identity["data"]) == ["flags"]


def test_what_is_wrong_with_a_folder_is_said(folder):
    with pytest.raises(UsageError, match="8x8"):
        load(**folder_settings(folder, model=DIGITS_MODEL))
    with pytest.raises(UsageError, match="Did you mean 'vit_tiny_patch16_224'"):
        load(**folder_settings(folder, model="vit_tiny_patch16_225"))
    (folder / "test" / "red").rename(folder / "test" / "rouge")
    with pytest.raises(DataError, match="rouge"):
        load(**folder_settings(folder))
    (folder / "test").rename(folder / "unknown")
    with pytest.raises(DataError, match="test, validation and val"):
        load(**folder_settings(folder))


@pytest.mark.parametrize("name", ["val", "validation"])
def test_the_test_folder_has_several_names(folder, name):
    (folder / "test").rename(folder / name)
    assert len(load(**folder_settings(folder)).tests["test"]) == 6


# --- a model of transformers ---

VIT = {
    "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 56,
    "patch_size": 14, "num_labels": 3,
}  # fmt: skip


@pytest.fixture
def vit(tmp_path):
    """A ViT for 56 x 56 pixels, 16 patches and a class token."""
    ViTForImageClassification(ViTConfig(**VIT)).save_pretrained(tmp_path / "vit")
    size = {"height": 56, "width": 56}
    ViTImageProcessor(size=size, image_mean=[0.5] * 3, image_std=[0.25] * 3).save_pretrained(tmp_path / "vit")
    return str(tmp_path / "vit")


@pytest.fixture
def dinov2(tmp_path):
    """A backbone without a head, larger in the file than in use."""
    Dinov2Model(Dinov2Config(**VIT | {"mlp_ratio": 2, "image_size": 84})).save_pretrained(tmp_path / "dino")
    BitImageProcessor(size={"shortest_edge": 99}, crop_size={"height": 84, "width": 84}).save_pretrained(
        tmp_path / "dino"
    )
    return str(tmp_path / "dino")


def test_the_image_processor_makes_the_images(folder, vit):
    loaded = load(**folder_settings(folder, model=vit, max_len=17))
    image, label = loaded.tests["test"].examples[0]
    assert image.shape == (3, 56, 56)
    assert label == 0
    raw = np.asarray(Image.open(folder / "test" / "blue" / "0.png").resize((56, 56), Image.Resampling.BILINEAR))
    expected = (torch.tensor(raw.copy()).permute(2, 0, 1) / 255 - 0.5) / 0.25
    assert float((image - expected).abs().max()) < 0.1
    # In training half of the images are mirrored.
    torch.manual_seed(0)
    views = [loaded.train.examples[0][0] for _ in range(20)]
    assert all(torch.equal(view, views[0]) or torch.equal(view, views[0].flip(-1)) for view in views)
    assert 4 < sum(torch.equal(view, views[0]) for view in views) < 16
    batch = loaded.collate(loaded.tests["test"].examples[:])
    assert set(batch["inputs"]) == {"pixel_values"}
    assert batch["num_tokens"] == 6 * 17


def test_logits_and_loss_are_the_models(folder, vit):
    loaded = load(**folder_settings(folder, model=vit, max_len=17))
    config = RunConfig(**folder_settings(folder, model=vit, max_len=17, regime="pretrained-conversion"))
    model = ImageNet().build_model(config, loaded).eval()
    batch = loaded.collate(loaded.tests["test"].examples[:])
    out = ImageNet().step(model, batch)
    saved = ViTForImageClassification.from_pretrained(vit).eval()(
        batch["inputs"]["pixel_values"], labels=batch["labels"]
    )
    assert float(out.loss.detach()) / 6 == pytest.approx(float(saved.loss.detach()), rel=1e-5)
    assert ImageNet().weights(config).keys() == {"vit"}


def test_max_len_sets_the_size(folder, vit, dinov2):
    """Of a model that stretches its positions, whether it has to be told so (ViT) or not (DINOv2)."""
    for model, max_len, side, tokens, extra in [
        (vit, 17, 56, 17, set()), (vit, 400, 56, 17, set()), (vit, 12, 42, 10, {"interpolate_pos_encoding"}),
        (dinov2, 37, 84, 37, set()), (dinov2, 27, 70, 26, set()), (dinov2, 5, 28, 5, set()),
    ]:  # fmt: skip
        settings = folder_settings(folder, model=model, max_len=max_len)
        loaded = load(**settings)
        batch = loaded.collate(loaded.tests["test"].examples[:2])
        assert batch["inputs"]["pixel_values"].shape == (2, 3, side, side)
        assert batch["inputs"].keys() == {"pixel_values"} | extra
        assert batch["num_tokens"] == 2 * tokens
        host = ImageNet().build_model(RunConfig(**settings), loaded)
        widths = []
        layers = [m for name, m in host.named_modules() if name.endswith(("layer.0", "layers.0"))]
        layers[0].register_forward_hook(lambda _, inputs, __, widths=widths: widths.append(inputs[0].shape[1]))
        ImageNet().step(host, batch)
        assert widths == [tokens]
    with pytest.raises(UsageError, match="leaves no patch"):
        load(**folder_settings(folder, model=vit, max_len=1))


def test_a_backbone_gets_a_new_head(folder, dinov2):
    settings = folder_settings(folder, model=dinov2, max_len=26, regime="finetuned-conversion")
    model = ImageNet().build_model(RunConfig(**settings), load(**settings))
    assert isinstance(model, Dinov2ForImageClassification)
    assert model.classifier.out_features == 3
    backbone = Dinov2Model.from_pretrained(dinov2)
    assert torch.equal(model.dinov2.embeddings.cls_token, backbone.embeddings.cls_token)


def test_what_is_wrong_with_a_model_is_said(folder, vit, tmp_path):
    with pytest.raises(DataError, match="no-such"):
        load(**folder_settings(folder, model=str(tmp_path / "no-such")))
    (tmp_path / "vit" / "preprocessor_config.json").unlink()
    with pytest.raises(DataError, match="vit"):
        load(**folder_settings(folder, model=vit))


def test_a_vision_model_end_to_end(folder, dinov2, tmp_path):
    settings = folder_settings(
        folder, attn="hedgehog", model=dinov2, max_len=26, regime="finetuned-conversion", batch_size=4, epochs=1.0,
        teacher_epochs=1.0, transfer_epochs=1.0, accelerator="cpu", logger="none", out=tmp_path / "runs",
    )  # fmt: skip
    made, _ = execute(RunConfig(**settings))
    assert made.fidelity is not None and len(made.fidelity["kl_after"]) == 2
    assert made.teacher is not None and made.after_swap is not None and made.after_transfer is not None
    assert list(made.identity["weights"]) == ["dino"]


# --- Fashion-MNIST ---


@pytest.mark.network
@pytest.mark.skipif(
    data.offline() and data.status(FASHION_MNIST) != "ready", reason="fashion-mnist is not cached, and offline"
)
def test_fashion_mnist_is_read_whole(vit):
    loaded = load(dataset="fashion-mnist", model=vit, max_len=17)
    assert (len(loaded.train), len(loaded.validation), len(loaded.tests["test"])) == (54_000, 6_000, 10_000)
    train, test = imagenet._fashion_mnist("train"), imagenet._fashion_mnist("t10k")
    for rows, each in [(train, 6000), (test, 1000)]:
        assert np.bincount(rows.labels).tolist() == [each] * 10
        assert rows.images.shape == (10 * each, 28, 28)
    # The published mean and deviation of the training pixels, in 0 .. 1.
    assert float(train.images.mean()) / 255 == pytest.approx(0.2860, abs=1e-4)
    assert float(train.images.std()) / 255 == pytest.approx(0.3530, abs=1e-4)
    split = loaded.train.examples
    assert not set(split.indices) & set(loaded.validation.examples.indices)
    image, label = loaded.tests["test"].examples[0]
    assert label == int(test.labels[0])
    assert torch.equal(image[0], image[1])  # grey in three channels, which this model's processor treats alike
    assert list(loaded.hashes.values()) == [FASHION_MNIST.sha256]
    assert loaded.facts["num_classes"] == 10


def test_fashion_mnist_takes_dinov2_by_itself():
    config = prepare(RunConfig(task="imagenet", attn="hedgehog", dataset="fashion-mnist")).config
    assert (config.regime, config.model, config.max_len) == ("finetuned-conversion", "dinov2", 26)
    assert ImageNet().files(config) == (FASHION_MNIST, pretrained.DINOV2)
    assert ImageNet().files(prepare(RunConfig(task="imagenet", attn="hedgehog", dataset="digits")).config) == ()


def test_unknown_data_sets():
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        ImageNet().dataset("digit")
