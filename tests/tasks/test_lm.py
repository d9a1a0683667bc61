"""Perplexities by hand, windows, and where text comes from."""

import itertools
import math
import random

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from hhbench import data, pretrained
from hhbench.config import RunConfig
from hhbench.errors import DataError, HHBenchError, UsageError
from hhbench.runner import execute, prepare
from hhbench.task import Split
from hhbench.tasks import lm
from hhbench.tasks.lm import NO_TARGET, WIKIPEDIA, LanguageModelling

WORDS = ["the", "cat", "sat", "naïve", "dogs", "—", "日本語", "ran", "home,", "slept.", "Then\n\n=", "Title", "=\n"]


def text_of(count: int, seed: int) -> str:
    """Lines of words, with blank lines and wide gaps."""
    rng = random.Random(seed)
    words = [rng.choice(WORDS) + rng.choice(["", "", "s", ", ", "\n", "  "]) for _ in range(count)]
    return " ".join(words) + "\n"


def config(dataset, **changes) -> RunConfig:
    settings = {
        "task": "lm", "attn": "softmax", "dataset": str(dataset), "regime": "scratch", "model": "gpt2-1x16x2",
        "max_len": 16, "dropout": 0.0, "batch_size": 4, "train_examples": 0, "test_examples": 0,
    }  # fmt: skip
    return RunConfig(**(settings | changes))


def load(dataset, **changes):
    return LanguageModelling().load_data(config(dataset, **changes))


@pytest.fixture
def folder(tmp_path):
    """Three text files, one a split."""
    root = tmp_path / "corpus"
    root.mkdir()
    for seed, (name, count) in enumerate([("train", 600), ("validation", 60), ("test", 97)]):
        (root / f"{name}.txt").write_text(text_of(count, seed), encoding="utf-8")
    return root


class Bigram(nn.Module):
    """Logits that depend on the token alone, so that no window boundary matters."""

    def __init__(self, vocab: int) -> None:
        super().__init__()
        self.table = torch.randn(vocab, vocab, generator=torch.Generator().manual_seed(0))

    def forward(self, input_ids, **_):
        self.logits = self.table[input_ids]
        return self


def batches(found, split: Split, size: int):
    return [found.collate(split.examples[i : i + size]) for i in range(0, len(split), size)]


def measured(found, split: Split, model: nn.Module, *, size: int) -> dict[str, float]:
    task = LanguageModelling()
    metrics = task.metrics(found, None)
    for batch in batches(found, split, size):
        metrics.update(*task.step(model, batch).metric_inputs)
    return {name: float(value) for name, value in metrics.compute().items()}


def plain(split: Split) -> list[tuple[list[int], list[int], int]]:
    return [(list(map(int, tokens)), list(map(int, targets)), words) for tokens, targets, words in split.examples]


def encoded(folder) -> tuple[list[int], int]:
    """The test text's tokens, and the number of its words that don't start in the first token."""
    text = (folder / "test.txt").read_text(encoding="utf-8")
    tokens = lm._bpe((folder / "train.txt").read_text(encoding="utf-8")).encode(text)
    first = text[: tokens.offsets[1][0]]
    return tokens.ids, len(text.split()) - len(first.split())


# --- perplexity ---


@pytest.mark.parametrize("max_len", [5, 16, 512])
@pytest.mark.parametrize("size", [1, 3, 8])
def test_perplexity_is_what_a_hand_computes(folder, max_len, size):
    found = load(folder, max_len=max_len)
    ids, words = encoded(folder)
    model = Bigram(found.facts["vocab"])
    log_p = model.table.double().log_softmax(-1)
    total = -sum(float(log_p[a, b]) for a, b in itertools.pairwise(ids))
    metrics = measured(found, found.tests["test"], model, size=size)
    assert metrics["token_perplexity"] == pytest.approx(math.exp(total / (len(ids) - 1)), rel=1e-5)
    assert metrics["word_perplexity"] == pytest.approx(math.exp(total / words), rel=1e-5)


def test_scores_are_the_windows_losses(folder):
    """What is kept for each example sums up to the perplexity."""
    found = load(folder)
    model = Bigram(found.facts["vocab"])
    test = found.tests["test"]
    steps = [LanguageModelling().step(model, batch) for batch in batches(found, test, 4)]
    losses = torch.cat([step.scores for step in steps]).double()
    assert len(losses) == len(test)
    words = sum(words for _, _, words in test.examples)
    metrics = measured(found, test, model, size=4)
    assert math.exp(float(losses.sum()) / words) == pytest.approx(metrics["word_perplexity"], rel=1e-5)
    assert sum(step.count for step in steps) == sum(len(targets) for _, targets, _ in test.examples)


def test_a_padded_last_window_changes_nothing(folder):
    """Through a real model: a window gives the same loss alone and padded beside longer ones."""
    found = load(folder, max_len=32)
    test = found.tests["test"]
    assert len(test.examples[-1][0]) < 32
    torch.manual_seed(0)
    model = LanguageModelling().build_model(config(folder, max_len=32), found).eval()
    rows = [test.examples[0], test.examples[-1]]
    with torch.no_grad():
        together = LanguageModelling().step(model, found.collate(rows)).scores
        apart = [LanguageModelling().step(model, found.collate([row])).scores for row in rows]
    assert torch.allclose(together, torch.cat(apart), rtol=1e-5)
    batch = found.collate(rows)
    mask = batch["inputs"]["attention_mask"]
    assert batch["num_tokens"] == int(mask.sum()) == sum(len(tokens) for tokens, _, _ in rows)
    assert (batch["labels"][~mask] == NO_TARGET).all()


# --- windows ---


@given(seed=st.integers(0, 1000), length=st.integers(1, 40), count=st.integers(1, 80))
def test_every_token_but_the_first_is_predicted_once(seed, length, count):
    text = text_of(count, seed)
    tokenizer = lm._bpe("".join(text_of(200, 3)))
    ids = tokenizer.encode(text).ids
    split = lm._windows(text, tokenizer, length)
    assert [token for _, targets, _ in split.examples for token in targets] == ids[1:]
    assert [token for tokens, _, _ in split.examples for token in tokens] == ids[:-1]
    assert all(len(tokens) == length for tokens, _, _ in split.examples[:-1])
    assert split.lengths == [len(tokens) for tokens, _, _ in split.examples]
    first = text[: tokenizer.encode(text).offsets[1][0]] if len(ids) > 1 else text
    assert sum(words for _, _, words in split.examples) == len(text.split()) - len(first.split())
    whole = lm._windows(text, tokenizer, length, whole=True)
    assert plain(whole) == [row for row in plain(split) if len(row[0]) == length]
    assert plain(lm._windows(text, tokenizer, length, limit=2)) == plain(split)[:2]


def test_words_are_whitespace_separated_and_each_counts_where_it_starts():
    text = "one two  three\n\nfour—five six"
    tokenizer = lm._bpe("one two three four five six\n")
    encoding = tokenizer.encode(text)
    split = lm._windows(text, tokenizer, 1)
    counted = [words for _, _, words in split.examples]
    assert sum(counted) == 4  # one starts in the first token, which nothing predicts
    starts = {text.index(word) for word in ("two", "three", "four—five", "six")}
    spans = [range(*offsets) for offsets in encoding.offsets[1:]]
    assert [sum(start in span for start in starts) for span in spans][: len(counted)] == counted


def test_training_windows_are_whole(folder):
    found = load(folder)
    assert {len(tokens) for tokens, _, _ in found.train.examples} == {16}
    assert len(load(folder, train_examples=3).train) == 3
    limited = load(folder, test_examples=2)
    assert len(limited.tests["test"]) == len(limited.validation) == 2


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache that keeps the shortest text."""
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(lm, "CACHED_CHARACTERS", 0)
    lm._bpe.cache_clear()
    yield tmp_path / "cache"
    lm._bpe.cache_clear()


def test_tokens_are_kept_in_the_cache(folder, cache, monkeypatch):
    first = load(folder)
    kept = sorted(cache.glob("made/tokens-*/files/tokens.npy"))
    assert len(kept) == 3  # of each split
    assert isinstance(first.train.examples.stream.tokens, np.memmap)
    with monkeypatch.context() as patch:  # from now on nothing is tokenised
        patch.delattr(lm, "_encoded")
        assert plain(load(folder).train) == plain(first.train)
        wider = load(folder, max_len=32)
    assert sorted(cache.glob("made/tokens-*/files/tokens.npy")) == kept  # of any length
    assert plain(wider.train)[0][0][:16] == plain(first.train)[0][0]
    monkeypatch.setattr(lm, "CACHED_CHARACTERS", 10**9)
    assert plain(load(folder).train) == plain(first.train)


def test_damaged_tokens_are_made_again(folder, cache, caplog):
    before = plain(load(folder).train)
    for path in cache.glob("made/tokens-*/files/tokens.npy"):
        path.write_bytes(path.read_bytes()[:-4] + b"oops")
    assert plain(load(folder).train) == before
    assert "tokens.npy has changed: making it again" in caplog.text


def test_other_texts_and_tokenizers_have_tokens_of_their_own(folder, cache):
    text = text_of(50, 9)
    found = [lm.stream_of(text, lm._bpe(text_of(200, seed))).tokens.tolist() for seed in (1, 2)]
    found.append(lm.stream_of(text + "x", lm._bpe(text_of(200, 1))).tokens.tolist())
    assert [lm._bpe(text_of(200, s)).decode(ids) for s, ids in zip((1, 2, 1), found, strict=True)] == [
        text, text, text + "x"
    ]  # fmt: skip
    assert len(list(cache.glob("made/tokens-*"))) == 3


def test_without_room_in_the_cache_tokens_are_made_in_memory(folder, cache, monkeypatch):
    expected = plain(load(folder).train)
    (cache.parent / "file").touch()
    monkeypatch.setenv("HHBENCH_CACHE", str(cache.parent / "file"))
    lm._bpe.cache_clear()
    found = load(folder)
    assert plain(found.train) == expected
    assert not isinstance(found.train.examples.stream.tokens, np.memmap)


# --- the tokenizer ---


def test_bpe_is_deterministic_and_from_training_text_alone(folder):
    text = (folder / "train.txt").read_text(encoding="utf-8")
    lm._bpe.cache_clear()
    one = lm._bpe(text)
    lm._bpe.cache_clear()
    two = lm._bpe(text)
    assert one is not two
    assert one.get_vocab() == two.get_vocab()
    assert one.get_vocab_size() <= lm.VOCAB
    odd = "Zürich 🦔 \t\n日本"
    assert one.decode(one.encode(odd).ids) == odd
    before = plain(load(folder).train)
    (folder / "test.txt").write_text("something else entirely, quite " * 20)
    assert plain(load(folder).train) == before


# --- a user's own text ---


def test_a_users_folder(folder):
    found = load(folder)
    assert LanguageModelling().dataset(str(folder)).title == "corpus"
    assert list(found.hashes) == ["corpus"]
    assert load(folder).hashes == found.hashes
    (folder / "test.txt").write_text("changed " * 30)
    assert load(folder).hashes != found.hashes


def test_a_users_file_is_cut_in_order(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line number {i} of this book\n" for i in range(200)))
    found = load(path)
    tokenizer = lm._bpe("".join(f"line number {i} of this book\n" for i in range(180)))

    def text(split):
        ids = [split.examples[0][0][0], *(t for _, targets, _ in split.examples for t in targets)]
        return tokenizer.decode(ids)

    assert text(found.train).startswith("line number 0 of")
    assert text(found.validation) == "".join(f"line number {i} of this book\n" for i in range(180, 190))
    assert text(found.tests["test"]) == "".join(f"line number {i} of this book\n" for i in range(190, 200))


def test_a_folder_of_any_texts_is_read_by_name(tmp_path):
    for name in ("b", "a"):
        (tmp_path / f"{name}.txt").write_text("".join(f"{name} says {i} things here\n" for i in range(40)))
    found = load(tmp_path)
    assert len(found.train) > 0
    texts = lm._users(tmp_path)
    assert texts.train.startswith("a says 0")
    assert texts.test.endswith("b says 39 things here\n")


def test_what_is_wrong_with_a_text_is_said(tmp_path, folder):
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.txt file"):
        load(tmp_path / "empty")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00" * 50)
    with pytest.raises(DataError, match="UTF-8"):
        load(tmp_path / "binary.txt")
    (tmp_path / "short.txt").write_text("one line\n")
    with pytest.raises(DataError, match="lines"):
        load(tmp_path / "short.txt")
    with pytest.raises(DataError, match="--max-len"):
        load(folder, max_len=100_000)
    with pytest.raises(UsageError, match="pretrained"):
        load(folder, regime="pretrained-conversion")
    for name in ("validation", "test"):
        (folder / f"{name}.txt").write_text("")
        with pytest.raises(HHBenchError):
            load(folder)
        (folder / f"{name}.txt").write_text("some words stand here\n" * 9)


def test_end_to_end(folder, tmp_path):
    settings = {
        "attn": "hedgehog", "regime": "finetuned-conversion", "epochs": 1.0, "teacher_epochs": 1.0,
        "transfer_epochs": 1.0, "accelerator": "cpu", "logger": "none", "out": tmp_path / "runs",
    }  # fmt: skip
    made, _ = execute(config(folder, **settings))
    score = made.score
    assert (score.name, score.higher_is_better) == ("word_perplexity", False)
    assert score.num_examples == len(load(folder).tests["test"])
    assert made.metrics["word_perplexity"] > made.metrics["token_perplexity"] > 1
    assert made.teacher["score"] < made.after_swap or made.after_swap > 1
    assert made.task["train_tokens"] == 16 * len(load(folder).train)
    assert made.cost["state_bytes"] > 0


# --- Wikipedia ---


@pytest.mark.network
@pytest.mark.skipif(data.offline() and data.status(WIKIPEDIA) != "ready", reason="wikipedia is not cached, and offline")
def test_wikipedia_is_cut_by_article():
    texts = lm._wikipedia_splits()

    def titles(text):
        return {line for line in text.splitlines() if line.startswith(" = ") and not line.startswith(" = = ")}

    parts = [titles(text) for text in (texts.train, texts.validation, texts.test)]
    assert sum(map(len, parts)) == len(set().union(*parts)) > 90
    assert all(len(part) >= 5 for part in parts)
    assert len(texts.train.split()) > 8 * len(texts.test.split())
    lines = [set(text.splitlines()) for text in (texts.train, texts.test)]
    shared = {line for line in lines[0] & lines[1] if len(line.split()) > 12}
    assert not shared  # no paragraph is in both
    assert list(texts.hashes) == ["wikipedia"]


FOX = "the quick brown fox jumps over the lazy dog and runs away again\n" * 400


@pytest.fixture
def gpt2(tmp_path):
    """A text and a folder with a GPT-2 of random weights and 64 positions, and its tokenizer."""
    from tokenizers import ByteLevelBPETokenizer

    (tmp_path / "text.txt").write_text(FOX)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(FOX.splitlines(), vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(tmp_path / "gpt2")
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(
        tmp_path / "gpt2"
    )
    return tmp_path / "gpt2"


def test_a_model_that_does_not_fit_is_refused(gpt2, tmp_path):
    def build(max_len):
        settings = config(
            tmp_path / "text.txt", model=str(gpt2), regime="pretrained-conversion", max_len=max_len, dropout=0.0
        )
        task = LanguageModelling()
        return task.build_model(settings, task.load_data(settings))

    assert build(64).config.n_positions == 64
    with pytest.raises(UsageError, match="has 64 positions: --max-len 65 is too long"):
        build(65)
    GPT2LMHeadModel(GPT2Config(vocab_size=30, n_embd=32, n_layer=2, n_head=2, n_positions=64)).save_pretrained(gpt2)
    with pytest.raises(UsageError, match=r"its tokenizer has \d+ tokens, and the model embeds 30"):
        build(64)


def test_the_converted_model_is_smollm2_unless_another_is_named():
    chosen = prepare(RunConfig(task="lm", attn="hedgehog", dataset="wikipedia", regime="pretrained-conversion")).config
    assert (chosen.model, chosen.max_len, chosen.recipe) == ("smollm2", 256, "hedgehog")
    # Steps: what makes a conversion last minutes on a laptop.
    assert chosen.train_examples * chosen.transfer_epochs / chosen.batch_size == 100
    assert chosen.train_examples * chosen.epochs / chosen.batch_size == 60
    task = LanguageModelling()
    assert task.files(chosen) == (WIKIPEDIA, pretrained.SMOLLM2)
    small = prepare(RunConfig(task="lm", attn="hedgehog", dataset="wikipedia")).config
    assert (small.model, task.files(small)) == ("gpt2-4x96x4", (WIKIPEDIA,))


@pytest.mark.network
@pytest.mark.skipif(
    data.offline() and "missing" in (data.status(WIKIPEDIA), data.status(pretrained.SMOLLM2)),
    reason="wikipedia or smollm2 is not cached, and offline",
)
def test_smollm2_knows_wikipedia():
    """Its own tokens; words are whitespace's; the perplexity of a held-out article is an English model's."""
    pytest.importorskip("gguf")
    settings = prepare(
        RunConfig(task="lm", attn="hedgehog", dataset="wikipedia", regime="pretrained-conversion", test_examples=2)
    ).config
    task = LanguageModelling()
    loaded = task.load_data(settings)
    assert len(loaded.train) == 400
    assert set(loaded.train.lengths) == {256}
    assert loaded.facts["vocab"] == 49152
    text = lm._wikipedia_splits().test
    windows = loaded.tests["test"].examples
    seen = loaded.facts["processor"].decode([t for tokens, _, _ in windows for t in tokens] + [windows[-1][1][-1]])
    assert text.startswith(seen)
    assert sum(words for _, _, words in windows) == pytest.approx(len(seen.split()), abs=2)
    model = task.build_model(settings, loaded).eval()
    with torch.no_grad():
        out = task.step(model, loaded.collate(windows[:]))
    assert 5 < math.exp(float(out.loss) / out.count) < 60
    assert task.weights(settings).keys() == {"smollm2"}


def test_a_pretrained_model_of_a_folder_is_converted_end_to_end(gpt2, tmp_path):
    """Zero-shot score, swap, transfer, finetuning: each is recorded, and finetuning on the text helps."""
    settings = {"task": "lm", "attn": "hedgehog", "regime": "pretrained-conversion", "max_len": 64, "logger": "none"}
    paths = {"dataset": str(tmp_path / "text.txt"), "model": str(gpt2), "out": str(tmp_path / "runs")}
    made, _ = execute(RunConfig.from_dict({**settings, **paths, "epochs": 2}))
    assert made.teacher is not None and made.after_swap is not None and made.after_transfer is not None
    assert made.fidelity is not None and len(made.fidelity["kl_after"]) == 2
    assert made.score.value < made.teacher["score"]
    assert set(made.identity["weights"]) == {"gpt2"}
