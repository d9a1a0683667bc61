"""The generators of associative recall: what is asked was shown, and what is right follows from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot

from hhbench.config import RunConfig
from hhbench.errors import UsageError
from hhbench.tasks.recall import NO_TARGET, Recall, associative_recall, multi_query_recall, vocabulary

seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(dataset: str, **changes):
    config = {
        "task": "recall", "attn": "softmax", "regime": "scratch", "dataset": dataset, "max_len": 32, "dropout": 0.0,
        "model": "gpt2-1x16x2", "train_examples": 200, "test_examples": 100,
    } | changes  # fmt: skip
    return Recall().load_data(RunConfig(**config))


# --- ar ---


@given(seed=seeds, length=st.integers(4, 70), keys=st.integers(2, 30))
def test_ar_asks_for_a_key_that_was_shown(seed, length, keys):
    tokens, targets = associative_recall(5, length=length, vocab=2 * keys, generator=generator(seed))
    assert tokens.shape == targets.shape == (5, 2 * ((length - 1) // 2) + 1)
    assert tokens.shape[1] in (length, length - 1)
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown, values, asked = row[:-1:2], row[1::2], row[-1]
        assert all(0 <= key < keys for key in shown)
        assert all(keys <= value < 2 * keys for value in values)
        assert asked in shown
        map_ = {}
        for key, value in zip(shown, values, strict=True):
            assert map_.setdefault(key, value) == value  # one value a key: the answer is determined
        assert target == [NO_TARGET] * (len(row) - 1) + [map_[asked]]


def test_ar_maps_differ_between_sequences():
    tokens, _ = associative_recall(200, length=64, vocab=40, generator=generator(0))
    values = {row[row[:-1].index(0) + 1] for row in tokens.tolist() if 0 in row[:-1:2]}
    assert len(values) == 20  # key 0 meant every value somewhere


# --- mqar ---


@given(seed=seeds, pairs=st.integers(1, 16), rest=st.integers(0, 3), spare=st.integers(0, 8))
def test_mqar_asks_for_every_key_once(seed, pairs, rest, spare):
    keys = pairs + spare
    tokens, targets = multi_query_recall(5, length=4 * pairs + rest, vocab=2 * keys, generator=generator(seed))
    assert tokens.shape == targets.shape == (5, 4 * pairs)
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        asked, answers = row[2 * pairs :: 2], row[2 * pairs + 1 :: 2]
        assert all(0 <= key < keys for key in shown)
        assert all(keys <= value < 2 * keys for value in values)
        assert len(set(shown)) == pairs
        assert sorted(asked) == sorted(shown)
        map_ = dict(zip(shown, values, strict=True))
        assert answers == [map_[key] for key in asked]
        # The answer is what follows the repeated key; nothing else is a target.
        assert target[: 2 * pairs] == [NO_TARGET] * 2 * pairs
        assert target[2 * pairs :: 2] == answers
        assert target[2 * pairs + 1 :: 2] == [NO_TARGET] * pairs


@pytest.mark.parametrize("length", [4, 64, 128, 132, 256, 1000])
@pytest.mark.parametrize("dataset", ["ar", "mqar"])
def test_there_are_keys_enough_for_any_length(dataset, length):
    data = load(dataset, max_len=length, train_examples=3, test_examples=3)
    vocab = vocabulary(RunConfig(task="recall", attn="elu", dataset=dataset, max_len=length))
    assert data.facts["vocab"] == vocab
    assert all(int(tokens.max()) < vocab for tokens, _ in data.train.examples)
    assert all(len(tokens) <= length for tokens, _ in data.train.examples)


# --- splits ---


@pytest.mark.parametrize("dataset", ["ar", "mqar"])
def test_splits_differ_and_come_again(dataset):
    one, two = load(dataset), load(dataset, seed=5)
    rows = {
        name: {tuple(tokens.tolist()) for tokens, _ in split.examples}
        for name, split in [("train", one.train), ("validation", one.validation), ("test", one.tests["test"])]
    }
    assert [len(found) for found in rows.values()] == [200, 100, 100]
    assert not rows["train"] & rows["test"]
    assert not rows["train"] & rows["validation"]
    assert not rows["validation"] & rows["test"]
    # Seeds of a run share their data, and so their teacher.
    for a, b in [(one.train, two.train), (one.validation, two.validation), (one.tests["test"], two.tests["test"])]:
        for (tokens, targets), (others, other_targets) in zip(a.examples, b.examples, strict=True):
            assert torch.equal(tokens, others)
            assert torch.equal(targets, other_targets)
    assert one.hashes == two.hashes


def test_the_hash_says_what_the_data_is():
    hashes = [load(name, max_len=length).hashes[name] for name in ("ar", "mqar") for length in (32, 34)]
    assert len(set(hashes)) == 4


@pytest.mark.parametrize("changes", [{"train_examples": 0}, {"test_examples": 0}, {"max_len": 3}], ids=str)
def test_what_can_not_be_generated(changes):
    with pytest.raises(UsageError, match=f"--{next(iter(changes)).replace('_', '-')}"):
        load("ar", **changes)


# --- scoring ---


class Oracle(nn.Module):
    """Answers with given logits."""

    def __init__(self, answers: torch.Tensor, vocab: int) -> None:
        super().__init__()
        self.logits = one_hot(answers.clamp_min(0), vocab).float() * 50

    def forward(self, input_ids, **_):
        return self


@pytest.mark.parametrize(("dataset", "asked"), [("ar", 1), ("mqar", 8)])
def test_accuracy_counts_the_asked_positions_alone(dataset, asked):
    data = load(dataset)
    batch = data.collate(data.train.examples[:4])
    vocab = data.facts["vocab"]
    assert batch["num_tokens"] == batch["inputs"]["input_ids"].numel()
    perfect = Recall().step(Oracle(batch["labels"], vocab), batch)
    assert perfect.count == 4 * asked
    assert perfect.scores.tolist() == [1.0] * 4
    assert float(perfect.loss) < 1e-3
    wrong = batch["labels"].clone()
    wrong[0] = (wrong[0].clamp_min(0) + 1) % vocab  # the whole first sequence
    half = wrong.clone()
    if dataset == "mqar":
        half[1, -2] = (half[1, -2] + 1) % vocab  # one answer of the second
    step = Recall().step(Oracle(half, vocab), batch)
    expected = [0.0, 1.0 if dataset == "ar" else 7 / 8, 1.0, 1.0]
    assert step.scores.tolist() == expected
    metrics = Recall().metrics(data, None)
    metrics.update(*step.metric_inputs)
    assert float(metrics.compute()["accuracy"]) == pytest.approx(sum(expected) / 4)
