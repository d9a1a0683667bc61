"""Text and images without labels: how they are cut and held out, what their score is, and a conversion on each."""

import random
import time
from pathlib import Path
from statistics import fmean

import numpy as np
import pytest
import torch
import transformers as tf
from PIL import Image
from tokenizers import BertWordPieceTokenizer
from torchvision.transforms.functional import hflip

import hhbench
from hhbench import hosts, models, result
from hhbench.cli import main
from hhbench.config import RunConfig
from hhbench.errors import DataError, HHBenchError, UsageError
from hhbench.fidelity import measure
from hhbench.runner import execute, prepare
from hhbench.tasks.unlabelled import Unlabelled
from hhbench.train import loader

WORDS = ["hedgehog", "attention", "linear", "softmax", "keeps", "what", "it", "knew", "a", "spiky", "map", "mimics"]
SMALL = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "initializer_range": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """`bert`, `vit`, text, a flat folder of images and one with classes. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("home")
    draw = random.Random(0)
    lines = [" ".join(draw.choice(WORDS) for _ in range(9)) for _ in range(100)]
    (folder / "text.txt").write_text("\n".join(lines))
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(lines, vocab_size=200, show_progress=False)
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "SEP", "MASK", "UNK")}
    torch.manual_seed(0)
    tf.BertModel(tf.BertConfig(vocab_size=200, max_position_embeddings=32, **SMALL)).save_pretrained(folder / "bert")
    tf.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special).save_pretrained(folder / "bert")
    tf.ViTModel(tf.ViTConfig(image_size=32, patch_size=8, **SMALL)).save_pretrained(folder / "vit")
    tf.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder / "vit")
    pixels = np.random.default_rng(0)
    for i in range(30):
        image = Image.fromarray(pixels.integers(0, 256, (32, 32, 3), dtype=np.uint8))
        part = "train" if i < 20 else "test"
        for path in (folder / "flat" / f"{i % 3}", folder / "classes" / part / "ab"[i % 2]):
            path.mkdir(parents=True, exist_ok=True)
            image.save(path / f"{i}.png")
    return folder


def config(home: Path, model: str, data: str, **changes) -> RunConfig:
    own = home / model
    settings = {
        "task": "unlabelled", "attn": "hedgehog", "model": str(own) if own.is_dir() else model,
        "dataset": str(home / data), "train_examples": 0, "test_examples": 0, "batch_size": 4, "logger": "none",
    }  # fmt: skip
    return prepare(RunConfig(**(settings | changes))).config


def loaded(home: Path, model: str, data: str, **changes):
    return Unlabelled().load_data(config(home, model, data, **changes))


# --- text ---


def test_windows_cover_the_text_once_between_the_models_ends(home):
    found = loaded(home, "bert", "text.txt", max_len=20)
    tokenizer = found.facts["processor"]
    cls, sep = tokenizer.cls_token_id, tokenizer.sep_token_id
    lines = (home / "text.txt").read_text().splitlines(keepends=True)
    parts = {"train": lines[:90], "validation": lines[90:95], "test": lines[95:]}
    for name, split in {"train": found.train, "validation": found.validation, **found.tests}.items():
        windows = [example["input_ids"] for example in split.examples]
        assert all(window[0] == cls and window[-1] == sep for window in windows)
        assert [len(window) for window in windows] == list(split.lengths)
        assert {len(window) for window in windows[:-1]} == {20}
        inner = [token for window in windows for token in window[1:-1]]
        assert inner == tokenizer("".join(parts[name]), add_special_tokens=False)["input_ids"]
    batch = found.collate([found.train.examples[0], found.train.examples[-1]])
    assert batch["num_tokens"] == int(batch["inputs"]["attention_mask"].sum()) == 20 + found.train.lengths[-1]


def test_limits_hold_for_each_split(home):
    found = loaded(home, "bert", "text.txt", max_len=20, train_examples=5, test_examples=2)
    assert [len(split) for split in (found.train, found.validation, found.tests["test"])] == [5, 2, 2]
    with pytest.raises(UsageError, match="--max-len 2 leaves no room for text"):
        loaded(home, "bert", "text.txt", max_len=2)


# --- images ---


def test_images_are_held_out_by_one_seed(home):
    first, again = (loaded(home, "vit", "flat") for _ in range(2))
    parts = [first.train, first.validation, first.tests["test"]]
    assert [len(split) for split in parts] == [24, 3, 3]
    pixels = [{tuple(np.array(split.examples[i][0]).ravel()[:64]) for i in range(len(split))} for split in parts[1:]]
    assert len(pixels[0] | pixels[1]) == 6
    # Training flips at random; every image is in one split alone.
    trained = {tuple(np.array(side).ravel()[:64]) for x, _ in _all(first.train) for side in (x, hflip(x))}
    assert not trained & (pixels[0] | pixels[1])
    assert all(
        torch.equal(x, y) for (x, _), (y, _) in zip(_all(first.tests["test"]), _all(again.tests["test"]), strict=True)
    )
    assert first.hashes == again.hashes
    assert first.hashes.keys() == {"flat"}
    batch = first.collate([first.train.examples[0], first.train.examples[1]])
    assert batch["inputs"]["pixel_values"].shape == (2, 3, 32, 32)
    assert batch["num_tokens"] == 2 * (4 * 4 + 1)


def test_what_flips_an_image_is_its_place_the_runs_seed_and_its_epoch(home):
    c = config(home, "vit", "flat")
    found = loaded(home, "vit", "flat")

    def epoch(seed: int, state: int, number: int = 0) -> dict[int, torch.Tensor]:
        torch.manual_seed(state)
        batches = loader(found.train, found, c, train=True, seed=seed)
        batches.batch_sampler.set_epoch(number)
        return {int(i): x for b in batches for i, x in zip(b["index"], b["inputs"]["pixel_values"], strict=True)}

    first = epoch(0, 1)
    for again, same in ((epoch(0, 2), True), (epoch(1, 1), False), (epoch(0, 1, number=1), False)):
        assert all(torch.equal(first[i], again[i]) for i in first) is same


def _all(split):
    return [split.examples[i] for i in range(len(split))]


def test_images_that_are_too_few_or_damaged(home, tmp_path):
    for i in range(3):
        Image.new("RGB", (32, 32), (i, i, i)).save(tmp_path / f"{i}.png")
    found = loaded(home, "vit", str(tmp_path))
    (tmp_path / "2.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"2\.png can't be read as an image"):
        [_all(split) for split in (found.train, found.validation, found.tests["test"])]
    (tmp_path / "2.png").unlink()
    with pytest.raises(DataError, match="holds 2 images: too few"):
        loaded(home, "vit", str(tmp_path))


def test_a_timm_model_is_asked_for_all_of_its_tokens(home):
    """Its positions are learned for 224 pixels: a class token and 14 x 14 patches."""
    c = config(home, "vit_tiny_patch16_224", "flat")
    assert c.max_len == 197
    (batch,) = [Unlabelled().load_data(c).collate([pair]) for pair in [(torch.zeros(3, 224, 224), 0)]]
    assert batch["num_tokens"] == 197


def test_weights_of_timm_that_are_not_there_are_named_at_once(home, monkeypatch, tmp_path):
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    began = time.monotonic()
    c = config(home, "vit_tiny_patch16_384", "flat", out=tmp_path)
    with pytest.raises(DataError, match="aren't in the hub's cache, and the network is switched off"):
        execute(c)
    assert time.monotonic() - began < 20


# --- the score ---


@pytest.mark.parametrize(("model", "data"), [("bert", "text.txt"), ("vit", "flat")])
def test_the_score_is_the_divergence_of_all_layers_on_the_test_split(home, tmp_path, model, data):
    c = config(
        home, model, data, recipe="transfer-only", save_model=True, max_len=20, out=tmp_path, transfer_epochs=2.0
    )
    made, path = execute(c)
    assert (made.score.name, made.score.higher_is_better) == ("kl", False)
    assert made.metrics == {"kl": made.score.value}
    assert made.score.value == made.after_transfer < made.after_swap
    found = Unlabelled().load_data(c)
    batches = [found.collate([example])["inputs"] for example in _all(found.tests["test"])]
    kl = [fmean(layer.local.kl) for layer in measure(hhbench.load(path.parent / "model"), batches).layers]
    assert made.score.value == pytest.approx(fmean(kl), rel=1e-4)
    assert made.score.num_examples == len(batches)


def test_there_is_nothing_to_finetune_on(home, tmp_path):
    with pytest.raises(UsageError, match="no labels: use transfer-only"):
        config(home, "bert", "text.txt", recipe="hedgehog")
    with pytest.raises(UsageError, match="aft has no weights to compare"):
        config(home, "bert", "text.txt", attn="aft")
    assert config(home, "bert", "text.txt", attn="elu").recipe == "untrained"
    with pytest.raises(HHBenchError, match="no labels"):
        Unlabelled().step(torch.nn.Module(), {})
    with pytest.raises(UsageError, match="no data set of unlabelled named"):
        config(home, "bert", "nowhere.txt")
    # Softmax itself diverges from nothing.
    made, _ = execute(config(home, "bert", "text.txt", attn="softmax", max_len=20, out=tmp_path))
    assert made.score.value == 0.0


# --- vision transformers through the command ---


def convert(capfd, *arguments: object) -> tuple[int, str, str]:
    capfd.readouterr()
    code = main(["convert", *map(str, arguments)])
    return code, *capfd.readouterr()


def test_a_flat_folder_of_images_teaches_maps_alone(home, tmp_path, capfd):
    places = ("--out", tmp_path / "runs", "--to", tmp_path / "model")
    code, out, err = convert(
        capfd, home / "vit", "--attn", "hedgehog", "--data", home / "flat", "--batch-size", 4, *places
    )
    assert code == 0, err
    made = result.load(Path(out.splitlines()[-2].removeprefix("result: ")))
    assert made.task["name"] == "unlabelled"
    assert made.score.value < made.after_swap
    model = hhbench.load(tmp_path / "model")
    assert isinstance(model, tf.ViTModel)
    assert [placement.attention for placement in hosts.placements(model)] == ["hedgehog"] * 2
    # transformers' own classes read the same model and its image processor.
    pixels = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        same = tf.AutoModel.from_pretrained(tmp_path / "model").eval()(pixels).last_hidden_state
        assert torch.equal(model(pixels).last_hidden_state, same)
    assert tf.AutoImageProcessor.from_pretrained(tmp_path / "model").size["height"] == 32


def test_a_folder_with_classes_is_finetuned_on(home, tmp_path, capfd):
    places = ("--out", tmp_path / "runs", "--to", tmp_path / "model")
    code, out, err = convert(
        capfd, home / "vit", "--attn", "hedgehog", "--data", home / "classes", "--batch-size", 4, *places
    )
    assert code == 0, err
    made = result.load(Path(out.splitlines()[-2].removeprefix("result: ")))
    assert (made.task["name"], made.score.name, made.score.num_examples) == ("imagenet", "top1", 10)
    assert made.cost["seconds"]["train"] > 0
    assert models.manifest(tmp_path / "model")["run"]["data"].keys() == {"classes"}
    assert isinstance(hhbench.load(tmp_path / "model"), tf.ViTForImageClassification)


def test_text_is_nothing_for_a_vision_transformer(home, tmp_path, capfd):
    code, out, err = convert(capfd, home / "vit", "--attn", "hedgehog", "--data", home / "text.txt", "--to", tmp_path)
    assert (code, out) == (2, "")
    assert "takes a folder of images" in err.splitlines()[-1]
