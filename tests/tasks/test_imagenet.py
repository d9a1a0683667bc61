"""Digits, and a user's image folder."""

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, top_k_accuracy_score

from hhbench.config import RunConfig
from hhbench.errors import DataError, UsageError
from hhbench.runner import execute
from hhbench.tasks.imagenet import DIGITS_MODEL, ImageNet

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
    (folder / "train" / "red" / "0.png").unlink()
    assert load(**folder_settings(folder)).hashes != {"flags": hash_}


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


def test_unknown_data_sets():
    with pytest.raises(UsageError, match="Did you mean 'digits'"):
        ImageNet().dataset("digit")
