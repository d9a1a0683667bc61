"""Language modelling: predict the next token of running text.

The mini preset is full Wikipedia articles, cut into train, validation and test by article, with a byte-level BPE
trained on the training articles alone, and a small GPT-2; a pretrained-conversion takes SmolLM2 and its tokenizer in
their place. The paper preset is WikiText-103 on GPT-2 (125M).
"""

import logging
import random
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torchmetrics import Metric, MetricCollection
from torchmetrics.utilities import dim_zero_cat

from hhbench import data, hosts, models, pretrained
from hhbench.config import RunConfig
from hhbench.data import PackageFile
from hhbench.errors import DataError, UsageError
from hhbench.task import Batch, Dataset, Example, Split, StepOutput, Task, TaskData, key_mask_of, padded, register_task

log = logging.getLogger("hhbench")

WIKIPEDIA = PackageFile(
    name="wikipedia",
    package="gensim",
    version="4.4.0",
    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
    megabytes=27.8,
    licence="CC BY-SA 3.0 (text)",
    holds="a piece of a Wikipedia dump: 107 full articles, from Anarchism to Autism",
)
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
NO_TARGET = -100


@dataclass(frozen=True)
class Texts:
    train: str
    validation: str
    test: str
    hashes: Mapping[str, str]


@register_task
class LanguageModelling(Task):
    """Score: word perplexity, exp(total loss / whitespace-separated words), which doesn't depend on the tokenizer.

    Text is cut into windows that don't overlap; every token but the first is predicted once. Windows carry no state
    over. Losses are summed in float64 over all ranks and the exponential is taken last: a mean of perplexities, or
    of ranks' means, would be another number.
    """

    name = "lm"
    title = "Language modelling"
    causal = True
    scores_pretrained = True
    teaches = {"decoder": "wikipedia"}
    regimes = ("scratch", "finetuned-conversion", "pretrained-conversion")
    datasets = {
        "wikipedia": Dataset("wikipedia", "word_perplexity", higher_is_better=False, files=(WIKIPEDIA,)),
        "wikitext103": Dataset("wikitext103", "word_perplexity", higher_is_better=False),
    }
    suites = {"mini": ("wikipedia",), "paper": ("wikitext103",)}

    def settings(self, config: RunConfig) -> dict[str, Any]:
        converts = config.regime != "scratch"
        if config.preset == "paper":
            # From scratch: the recipe of the H3 and Hyena papers, from which the baselines' numbers come.
            return {
                "model": "gpt2",
                "max_len": 1024,
                "dropout": 0.1,
                "train_examples": 0,
                "test_examples": 0,
                "batch_size": 8 if converts else 512,
                "epochs": 2.0 if converts else 100.0,  # of finetuning: unverified
                "lr": 6e-4,
                "teacher_epochs": 2.0,  # unverified
                "teacher_lr": 6e-4,
                "transfer_epochs": 2.0,
                "transfer_lr": 1e-2,  # unverified
                "weight_decay": 0.1,
                "beta2": 0.999,
                "warmup": 0.01,
                "clip": 1.0,
            }
        if config.regime == "pretrained-conversion":
            # A step of 2 x 256 tokens of SmolLM2 takes seconds on a CPU: 100 of transfer, 60 of finetuning.
            return {
                "model": "smollm2",
                "max_len": 256,
                "dropout": 0.0,
                "train_examples": 400,
                "test_examples": 64,
                "batch_size": 2,
                "epochs": 0.3,
                "lr": 1e-4,
                "teacher_epochs": 0.0,  # the pretrained model is the teacher
                "teacher_lr": 1e-4,
                "transfer_epochs": 0.5,
                "transfer_lr": 1e-2,
                "weight_decay": 0.0,
                "beta2": 0.999,
                "warmup": 0.1,
                "clip": 1.0,
            }
        return {
            "model": "gpt2-4x96x4",
            "max_len": 128,
            "dropout": 0.0,
            "train_examples": 0,
            "test_examples": 0,
            "batch_size": 8,
            "epochs": 1.35 if not converts else 0.2,
            "lr": 3e-3 if not converts else 1e-3,
            "teacher_epochs": 1.0,
            "teacher_lr": 3e-3,
            "transfer_epochs": 0.1,
            "transfer_lr": 1e-2,
            "weight_decay": 0.1,
            "beta2": 0.99,
            "warmup": 0.07,
            "clip": 1.0,
        }

    def dataset(self, name: str) -> Dataset:
        if name not in self.datasets and Path(name).exists():
            return Dataset(Path(name).name, "word_perplexity", higher_is_better=False)
        return super().dataset(name)

    def files(self, config: RunConfig) -> tuple[PackageFile, ...]:
        return (*super().files(config), *pretrained.files(str(config.model)))

    def load_data(self, config: RunConfig) -> TaskData:
        texts = load_texts(str(config.dataset), config.data_folder)
        if _is_small(config):
            if config.regime == "pretrained-conversion":
                raise UsageError(f"{config.model} has no pretrained weights: name a model that has with --model")
            processor, tokenizer = None, _bpe(texts.train)
        else:
            processor = models.tokenizer(str(config.model))
            tokenizer = processor.backend_tokenizer
        length = int(config.max_len or 0)
        train = _windows(texts.train, tokenizer, length, whole=True, limit=int(config.train_examples or 0))
        if not len(train):
            raise DataError(f"{config.dataset} is shorter than one window of {length} tokens: lower --max-len")
        limit = int(config.test_examples or 0)
        validation, test = (_windows(text, tokenizer, length, limit=limit) for text in (texts.validation, texts.test))
        if not (len(validation) and len(test)):
            raise DataError(f"{config.dataset} has no text to {'test' if len(validation) else 'validate'} on")
        return TaskData(
            train=train,
            validation=validation,
            tests={"test": test},
            collate=_collate,
            hashes=texts.hashes,
            facts={"vocab": tokenizer.get_vocab_size(), "processor": processor},
        )

    def weights(self, config: RunConfig) -> dict[str, str]:
        if _is_small(config) or config.regime == "scratch":
            return {}
        return models.weights_hash(str(config.model))

    def build_model(self, config: RunConfig, data: TaskData) -> nn.Module:
        from transformers import AutoModelForCausalLM

        length, dropout = int(config.max_len or 0), float(config.dropout or 0)
        if _is_small(config):
            return models.gpt2(
                str(config.model),
                vocab=data.facts["vocab"],
                max_len=length,
                dropout=dropout,
                initializer_range=0.05,
                sinusoidal=0.05,
            )
        model = models.transformers_model(
            AutoModelForCausalLM,
            str(config.model),
            pretrained=config.regime != "scratch",
            dropout=dropout,
        )
        pretrained.check_fit(str(config.model), model.config, vocab=data.facts["vocab"], max_len=length)
        return model

    def step(self, model: nn.Module, batch: Batch) -> StepOutput:
        logits: Tensor = model(**batch["inputs"]).logits.float()
        targets = batch["labels"]
        # Flattened: across the vocabulary of [B, V, N] the loss would take several times as long.
        losses = cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="none")
        losses = losses.view_as(targets)
        count = (targets != NO_TARGET).sum()
        per_window = losses.detach().sum(-1)
        return StepOutput(losses.sum(), int(count), (per_window.sum(), count, batch["num_words"]), per_window)

    def metrics(self, data: TaskData, config: RunConfig) -> MetricCollection:
        return MetricCollection(
            {"word_perplexity": _Perplexity("words"), "token_perplexity": _Perplexity("tokens")},
            compute_groups=False,
        )


class _Perplexity(Metric):
    """exp(total loss / units), summed over batches and ranks before the exponential.

    Batches' sums are kept apart and added up in float64 on the CPU: Apple's MPS has no float64.
    """

    loss: list[Tensor]
    count: list[Tensor]

    def __init__(self, unit: str) -> None:
        super().__init__()
        self.unit = unit
        self.add_state("loss", [], dist_reduce_fx="cat")
        self.add_state("count", [], dist_reduce_fx="cat")

    def update(self, loss: Tensor, tokens: Tensor, words: Tensor) -> None:
        self.loss.append(loss)
        self.count.append(tokens if self.unit == "tokens" else words)

    def compute(self) -> Tensor:
        loss, count = dim_zero_cat(self.loss).cpu().double().sum(), dim_zero_cat(self.count).cpu().sum()
        return (loss / count).exp()


def _is_small(config: RunConfig) -> bool:
    return str(config.model).startswith("gpt2-") and "x" in str(config.model)


# ---- text ------------------------------------------------------------------------------------------------------


def load_texts(name: str, folder: Path | None) -> Texts:
    """The splits of a data set of this task, or of a user's own file or folder."""
    if name == "wikipedia":
        return _wikipedia_splits()
    if name == "wikitext103":
        splits = data.hub_table("Salesforce/wikitext", "wikitext-103-raw-v1", folder=folder)
        text = {split: "".join(splits[split]["text"]) for split in ("train", "validation", "test")}
        return Texts(**text, hashes={name: data.hash_text("".join(text.values()))})
    return _users(Path(name))


@cache
def _wikipedia_splits() -> Texts:
    """Whole articles: every tenth in an order of one seed to validate or to test on, in turn."""
    articles = _articles()
    random.Random(0).shuffle(articles)
    parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
    for index, article in enumerate(articles):
        part = {0: "test", 10: "validation"}.get(index % 20, "train")
        parts[part].append(article)
    texts = {part: "\n".join(chosen) for part, chosen in parts.items()}
    return Texts(**texts, hashes={WIKIPEDIA.name: data.hash_text("\n".join(articles))})


def _articles() -> list[str]:
    """The articles as plain text. Reading the markup takes a while: the text is kept in the cache."""
    from hhbench.tasks import _wikipedia

    separator = "\x1e"
    text = data.cached_text(
        f"wikipedia-{WIKIPEDIA.sha256[:8]}-{_wikipedia.VERSION}.txt",
        lambda: separator.join(text for _, text in _wikipedia.clean_articles(data.read(WIKIPEDIA, DUMP))),
    )
    return text.split(separator)


def _users(path: Path) -> Texts:
    """A text file, cut 90 / 5 / 5 in its own order; or a folder with train, validation and test `.txt` files, or
    with any `.txt` files, which are read in the order of their names and cut likewise.
    """
    files = sorted(path.glob("*.txt")) if path.is_dir() else [path]
    if not files:
        raise DataError(f"{path} holds no .txt file")
    try:
        texts = {file.stem: file.read_text(encoding="utf-8") for file in files}
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{path} can't be read as UTF-8 text: {error}") from error
    hashes = {path.name: data.hash_files(files)}
    if {"train", "validation", "test"} <= texts.keys():
        return Texts(texts["train"], texts["validation"], texts["test"], hashes)
    lines = "\n".join(texts.values()).splitlines(keepends=True)
    held = max(1, len(lines) // 20)
    if len(lines) < 3:
        raise DataError(f"{path} has {len(lines)} lines: too few to hold some out for validation and test")
    parts = lines[: -2 * held], lines[-2 * held : -held], lines[-held:]
    train, validation, test = ("".join(part) for part in parts)
    return Texts(train, validation, test, hashes)


# ---- tokens ----------------------------------------------------------------------------------------------------

VOCAB = 512  # small, so that a few minutes suffice to get past the frequencies of tokens


# Texts shorter than this, in characters, are tokenised sooner than they would be read from the cache.
CACHED_CHARACTERS = 100_000
CACHE_VERSION = 1  # raised whenever what is kept there changes


@cache
def _bpe(text: str) -> Any:
    """A byte-level BPE of the training text. The same text gives the same tokenizer."""
    import tokenizers

    def train() -> str:
        tokenizer = tokenizers.ByteLevelBPETokenizer()
        tokenizer.train_from_iterator(text.splitlines(keepends=True), vocab_size=VOCAB, show_progress=False)
        made: str = tokenizer.to_str()
        return made

    def make(folder: Path) -> None:
        (folder / "tokenizer.json").write_text(train(), encoding="utf-8")

    name = data.hash_text(f"{CACHE_VERSION} {VOCAB} {tokenizers.__version__} {data.hash_text(text)}")
    made = _made(f"bpe-{name[:16]}", text, make)
    return tokenizers.Tokenizer.from_str(
        train() if made is None else (made / "tokenizer.json").read_text(encoding="utf-8")
    )


def _made(name: str, text: str, make: Callable[[Path], None]) -> Path | None:
    """What was made of a text, in a folder of the cache; None where it is short, or the cache can't be written."""
    if len(text) < CACHED_CHARACTERS:
        return None
    try:
        return data.made_folder(name, make)
    except DataError as error:
        log.info("%s: going on without", error)
        return None


@dataclass(frozen=True)
class Stream:
    """A text in tokens.

    Attributes:
        tokens: int32 [N].
        words: int64 [N + 1]: how many whitespace-separated words start before each token, and in the end all. A word
            belongs to the token in which it starts.
    """

    tokens: Any
    words: Any


def stream_of(text: str, tokenizer: Any, *, special: bool = True) -> Stream:
    """A text in tokens: one that isn't short is tokenised once, and from then on mapped into memory from the cache.

    Args:
        tokenizer: of the package tokenizers.
        special: put in what the tokenizer puts around a text.
    """

    def make(folder: Path) -> None:
        made = _encoded(text, tokenizer, special=special)
        np.save(folder / "tokens.npy", made.tokens)
        np.save(folder / "words.npy", made.words)

    name = data.hash_text(f"{CACHE_VERSION} {special} {data.hash_text(text)} {data.hash_text(tokenizer.to_str())}")
    folder = _made(f"tokens-{name[:16]}", text, make)
    if folder is None:
        return _encoded(text, tokenizer, special=special)
    return Stream(*(np.load(folder / f"{part}.npy", mmap_mode="r") for part in ("tokens", "words")))


def _encoded(text: str, tokenizer: Any, *, special: bool) -> Stream:
    encoded = tokenizer.encode(text, add_special_tokens=special)
    starts = np.array([start for start, _ in encoded.offsets], np.int64)
    words = np.array([match.start() for match in re.finditer(r"\S+", text)], np.int64)
    owners = np.searchsorted(starts, words, side="right") - 1  # of tokens that start together the last
    counts = np.bincount(owners.clip(0), minlength=len(starts))
    return Stream(np.array(encoded.ids, np.int32), np.concatenate([[0], counts.cumsum()]))


class Windows(Sequence[Example]):
    """Windows of a stream that don't overlap: (tokens, targets, words), `length` inputs and the tokens that follow.

    They are cut when they are asked for. The last one may be shorter.
    """

    def __init__(self, stream: Stream, length: int, count: int) -> None:
        self.stream, self.length, self._count = stream, length, count

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        if not -self._count <= index < self._count:
            raise IndexError(index)
        start = index % self._count * self.length
        window = self.stream.tokens[start : start + self.length + 1]
        words = self.stream.words[start + len(window)] - self.stream.words[start + 1]
        return window[:-1], window[1:], int(words)

    def __len__(self) -> int:
        return self._count


def _windows(text: str, tokenizer: Any, length: int, *, whole: bool = False, limit: int = 0) -> Split:
    """At most `limit` windows, 0 for all. `whole` leaves out the last, shorter one."""
    stream = stream_of(text, tokenizer)
    predicted = len(stream.tokens) - 1
    count = max(0, predicted // length if whole else -(-predicted // length))
    count = min(count, limit or count)
    lengths = [min(length, predicted - i * length) for i in range(count)]
    return Split(Windows(stream, length, count), lengths)


def _collate(examples: Sequence[Example]) -> Batch:
    tokens, targets, words = zip(*examples, strict=True)
    mask = key_mask_of(tokens)
    inputs = {"input_ids": padded(tokens, 0), "position_ids": hosts.position_ids(mask), "use_cache": False}
    if not mask.all():
        inputs["attention_mask"] = mask
    return {
        "inputs": inputs,
        "labels": padded(targets, NO_TARGET),
        "num_words": torch.tensor(sum(words)),
        "num_tokens": int(mask.sum()),
    }
