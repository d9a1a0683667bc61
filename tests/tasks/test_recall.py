"""The generators of associative recall: what is asked was shown, and what is right follows from it."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.functional import one_hot

from hhbench.config import RunConfig
from hhbench.errors import UsageError
from hhbench.tasks.recall import NO_TARGET, Recall, associative_recall, multi_query_recall

seeds = st.integers(0, 2**32 - 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def config(dataset: str, **changes) -> RunConfig:
    settings = {
        "task": "recall", "attn": "softmax", "regime": "scratch", "dataset": dataset, "max_len": 32, "dropout": 0.0,
        "model": "gpt2-1x16x2", "train_examples": 200, "test_examples": 100,
    }  # fmt: skip
    return RunConfig(**(settings | changes))


def load(dataset: str, **changes):
    return Recall().load_data(config(dataset, **changes))


# --- ar ---


@given(seed=seeds, length=st.integers(4, 70), keys=st.integers(2, 30))
def test_ar_asks_for_a_key_that_was_shown(seed, length, keys):
    tokens, targets = associative_recall(5, length=length, vocab=2 * keys, generator=generator(seed))
    assert tokens.shape == targets.shape
    assert len(tokens) == 5
    assert length - 2 <= tokens.shape[1] <= length
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown, values = row[::2], row[1::2]
        assert all(0 <= key < keys for key in shown)
        assert all(keys <= value < 2 * keys for value in values)
        assert shown[-1] in shown[:-1]  # the last key is the one that is asked
        mapped = {}
        for place, key in enumerate(shown):
            # A key that stood before has its value as its target, and no other token has one.
            assert target[2 * place] == mapped.get(key, NO_TARGET)
            if place < len(values):
                assert target[2 * place + 1] == NO_TARGET
                assert mapped.setdefault(key, values[place]) == values[place]  # one value a key
        assert target[-1] == mapped[shown[-1]]


def test_ar_maps_differ_between_sequences():
    tokens, _ = associative_recall(400, length=64, vocab=40, generator=generator(0))
    values = {row[2 * row[:-1:2].index(0) + 1] for row in tokens.tolist() if 0 in row[:-1:2]}
    assert len(values) == 20  # key 0 meant every value somewhere


# --- mqar ---


@given(seed=seeds, pairs=st.integers(1, 16), rest=st.integers(0, 5), spare=st.integers(0, 8))
def test_mqar_asks_for_keys_that_were_shown(seed, pairs, rest, spare):
    keys = pairs + spare
    tokens, targets = multi_query_recall(5, length=6 * pairs + rest, vocab=2 * keys, generator=generator(seed))
    assert tokens.shape == targets.shape
    assert len(tokens) == 5
    for row, target in zip(tokens.tolist(), targets.tolist(), strict=True):
        shown, values = row[: 2 * pairs : 2], row[1 : 2 * pairs : 2]
        asked, answers = row[2 * pairs :: 2], row[2 * pairs + 1 :: 2]
        assert all(0 <= key < keys for key in shown)
        assert all(keys <= value < 2 * keys for value in values)
        assert len(set(shown)) == pairs
        assert set(asked) <= set(shown)
        mapped = dict(zip(shown, values, strict=True))
        right = [mapped[key] for key in asked]
        assert right[: len(answers)] == answers
        # The answer is what follows an asked key; nothing else is a target.
        assert target[: 2 * pairs] == [NO_TARGET] * 2 * pairs
        assert target[2 * pairs :: 2] == right
        assert target[2 * pairs + 1 :: 2] == [NO_TARGET] * len(answers)


@pytest.mark.parametrize("length", [6, 7, 64, 100])
@pytest.mark.parametrize("dataset", ["ar", "mqar"])
def test_tokens_are_in_the_vocabulary(dataset, length):
    data = load(dataset, max_len=length, train_examples=9, test_examples=3)
    model = Recall().build_model(config(dataset, max_len=length), data)
    for tokens, _ in data.train.examples:
        assert int(tokens.max()) < data.facts["vocab"] == model.config.vocab_size
        assert len(tokens) <= length == model.config.n_positions


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


@pytest.mark.parametrize(
    ("dataset", "changes"),
    [("ar", {"train_examples": 0}), ("ar", {"test_examples": 0}), ("ar", {"max_len": 3}), ("mqar", {"max_len": 5}),
     ("mqar", {"max_len": 5000})],
)  # fmt: skip
def test_what_can_not_be_generated(dataset, changes):
    with pytest.raises(UsageError, match=f"--{next(iter(changes)).replace('_', '-')}"):
        load(dataset, **changes)


# --- scoring ---


class Oracle(nn.Module):
    """Answers with given logits."""

    def __init__(self, answers: torch.Tensor, vocab: int) -> None:
        super().__init__()
        self.logits = one_hot(answers.clamp_min(0), vocab).float() * 50

    def forward(self, input_ids, **_):
        return self


@pytest.mark.parametrize("dataset", ["ar", "mqar"])
def test_accuracy_counts_the_asked_positions_alone(dataset):
    data = load(dataset)
    batch = data.collate(data.train.examples[:4])
    vocab, labels = data.facts["vocab"], batch["labels"]
    assert batch["num_tokens"] == batch["inputs"]["input_ids"].numel()
    perfect = Recall().step(Oracle(labels, vocab), batch)
    assert perfect.count == int((labels != NO_TARGET).sum())  # the loss counts all that is determined
    assert perfect.scores.tolist() == [1.0] * 4
    assert float(perfect.loss) < 1e-3
    answers = labels.clone()
    answers[0] = (labels[0].clamp_min(0) + 1) % vocab  # all of the first sequence is wrong,
    answers[1, -1] = (labels[1, -1] + 1) % vocab  # the last answer of the second,
    first = int((labels[2] != NO_TARGET).nonzero()[0])
    answers[2, first] = (labels[2, first] + 1) % vocab  # and the first target of the third
    asked = int((labels[3] != NO_TARGET).sum())
    last_only = [0.0, 0.0, float(first != labels.shape[1] - 1), 1.0]
    expected = last_only if dataset == "ar" else [0.0, 1 - 1 / asked, 1 - 1 / asked, 1.0]
    step = Recall().step(Oracle(answers, vocab), batch)
    assert step.scores.tolist() == pytest.approx(expected)
    metrics = Recall().metrics(data, None)
    metrics.update(*step.metric_inputs)
    assert float(metrics.compute()["accuracy"]) == pytest.approx(sum(expected) / 4)
