"""ROUGE by hand, prompts and their padding, what is learned, what is written, and where pairs come from."""

import csv
import json
import math

import pytest
import torch
from tokenizers import ByteLevelBPETokenizer
from tokenizers.processors import TemplateProcessing
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hhbench import data, hosts
from hhbench.cli import main
from hhbench.config import RunConfig
from hhbench.errors import DataError, UsageError
from hhbench.runner import execute, prepare
from hhbench.task import Split
from hhbench.tasks import summarization
from hhbench.tasks.summarization import CUE, NO_TARGET, Summarization, rouge_of

END = "<|end|>"  # token 0
PAIRS = [
    (
        f"{who}: did you {what} the {thing}? {other}: yes, {when}. " * (1 + i % 4),
        f"{other} {what}ed the {thing} {when}.",
    )
    for i, (who, other, what, thing, when) in enumerate(
        (who, other, what, thing, when)
        for who, other in [("Ann", "Bob"), ("Cleo", "Dan")]
        for what in ["paint", "clean", "open"]
        for thing in ["door", "house"]
        for when in ["today", "on Monday"]
    )
]


def tokenizer_of(*, bos: bool = False) -> PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    texts = [text for pair in PAIRS for text in pair] + [CUE]
    bpe.train_from_iterator(texts, vocab_size=320, special_tokens=[END, "<s>"], show_progress=False)
    if bos:
        bpe._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, eos_token=END, **({"bos_token": "<s>"} if bos else {})
    )


def llama(**changes) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "vocab_size": 320, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None,
        "eos_token_id": 0, "pad_token_id": None,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


def gpt2() -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=320, n_embd=16, n_layer=2, n_head=2, n_positions=128, initializer_range=0.3, bos_token_id=None,
        eos_token_id=0, attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A folder of a random Llama and a tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny"
    llama().save_pretrained(folder)
    tokenizer_of().save_pretrained(folder)
    return folder


@pytest.fixture
def own(tmp_path):
    """A user's JSON lines."""
    path = tmp_path / "own.jsonl"
    splits = ["train"] * 16 + ["validation"] * 3 + ["test"] * 5
    rows = [{"dialogue": d, "summary": s, "split": w} for (d, s), w in zip(PAIRS, splits, strict=True)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config(model, dataset, **changes) -> RunConfig:
    settings = {
        "task": "summarization", "attn": "softmax", "model": str(model), "dataset": str(dataset), "max_len": 64,
        "batch_size": 4, "train_examples": 0, "test_examples": 0,
    }  # fmt: skip
    return prepare(RunConfig(**(settings | changes))).config


def loaded(model, dataset, **changes):
    task = Summarization()
    return task, task.load_data(config(model, dataset, **changes))


# --- ROUGE ---


@pytest.mark.parametrize(
    ("summary", "reference", "expected"),
    [
        ("the cat sat on the mat", "the cat lay on the mat", (5 / 6, 3 / 5, 5 / 6)),
        ("police killed the gunman", "the gunman killed police", (1, 1 / 3, 1 / 2)),
        ("a b", "a b c d", (2 / 3, 1 / 2, 2 / 3)),
        ("the the the the", "the cat", (1 / 3, 0, 1 / 3)),  # a word counts as often as the reference has it
        (" The CAT, sat!\n", "the cat sat", (1, 1, 1)),
        ("one", "one", (1, 0, 1)),  # a single word has no pair
        ("", "the cat", (0, 0, 0)),
        ("...", "the cat", (0, 0, 0)),
        ("the cat", "", (0, 0, 0)),
    ],
)
def test_rouge_is_what_a_hand_computes(summary, reference, expected):
    assert rouge_of(summary, reference) == pytest.approx(expected, abs=1e-6)


def test_metrics_average_examples_not_batches(tiny, own):
    task, found = loaded(tiny, own)
    metrics = task.metrics(found, None)
    metrics.update(torch.tensor([[1.0, 0.5, 0.25]]), torch.tensor([6.0]), torch.tensor([2]))
    metrics.update(torch.tensor([[0.0, 0.0, 0.0], [0.5, 0.25, 0.5]]), torch.tensor([1.0, 5.0]), torch.tensor([1, 3]))
    values = {name: float(value) for name, value in metrics.compute().items()}
    assert values == pytest.approx(
        {"rouge1": 0.5, "rouge2": 0.25, "rougeL": 0.25, "token_perplexity": math.exp(12 / 6)}, rel=1e-6
    )
    assert task.dataset("xsum-1000").score in values


# --- prompts ---


def test_prompts_end_on_the_cue_however_long_the_document(tiny, own):
    _, found = loaded(tiny, own, max_len=48)
    tokenizer = found.facts["processor"]
    lengths = set()
    texts = dict(zip((s for _, s in PAIRS), (d for d, _ in PAIRS), strict=True))
    for example in found.train.examples:
        document, cue, rest = tokenizer.decode(example["prompt"]).partition(CUE)
        assert (cue, rest) == (CUE, "")
        assert document and texts[example["summary"]].startswith(document)
        lengths.add(len(example["prompt"]))
    assert max(lengths) == 36  # three quarters
    assert min(lengths) < 36


def test_a_summary_ends_unless_it_is_cut(tiny, own):
    for max_len, whole in [(128, True), (24, False)]:
        _, found = loaded(tiny, own, max_len=max_len)
        tokenizer = found.facts["processor"]
        for example in found.train.examples:
            full = [*tokenizer(f" {example['summary']}")["input_ids"], 0]
            assert example["target"] == full[: max_len // 4]
            assert (example["target"][-1] == 0) == whole


def test_a_first_token_that_the_tokenizer_adds_is_kept(tmp_path, own):
    llama().save_pretrained(tmp_path / "model")
    tokenizer_of(bos=True).save_pretrained(tmp_path / "model")
    _, found = loaded(tmp_path / "model", own, max_len=48)
    for example in found.train.examples:
        assert example["prompt"].count(1) == 1 and example["prompt"][0] == 1
        assert 1 not in example["target"]
    assert max(len(e["prompt"]) for e in found.train.examples) == 36


def test_the_loss_is_padded_right_and_decoding_left(tiny, own):
    _, found = loaded(tiny, own)
    rows = sorted(found.train.examples, key=lambda e: len(e["prompt"]))
    rows = [rows[0], rows[-1]]
    batch = found.collate(rows)
    ids, mask = batch["inputs"]["input_ids"], batch["inputs"]["attention_mask"]
    for row, example in enumerate(rows):
        size = len(example["prompt"]) + len(example["target"]) - 1
        assert mask[row].tolist() == [i < size for i in range(mask.shape[1])]
        assert [*ids[row, :size].tolist(), example["target"][-1]] == example["prompt"] + example["target"]
        labels = batch["labels"][row]
        assert labels[labels != NO_TARGET].tolist() == example["target"]
        first = len(example["prompt"]) - 1  # the position of the prompt's last token predicts the first
        assert (labels[:first] == NO_TARGET).all() and labels[first] == example["target"][0]
        length = len(example["prompt"])
        assert batch["prompt"][row, -length:].tolist() == example["prompt"]
        assert batch["prompt_mask"][row].tolist() == [False] * (batch["prompt"].shape[1] - length) + [True] * length
    assert not mask.all() and not batch["prompt_mask"].all()
    assert batch["num_tokens"] == int(mask.sum())


# --- what is learned and written ---


@pytest.mark.parametrize("make", [llama, gpt2])
def test_the_loss_counts_the_summaries_alone(tiny, own, make):
    task, found = loaded(tiny, own)
    model = hosts.convert(make(), "softmax").train()
    rows = found.train.examples[:3]
    out = task.step(model, found.collate(rows))
    total = 0.0
    for example in rows:
        ids = torch.tensor([example["prompt"] + example["target"]])
        log_p = model(ids).logits.detach().log_softmax(-1)[0]
        start = ids.shape[1] - len(example["target"])
        total -= sum(float(log_p[i - 1, ids[0, i]]) for i in range(start, ids.shape[1]))
    assert float(out.loss.detach()) == pytest.approx(total, rel=1e-5)
    assert out.count == sum(len(e["target"]) for e in rows)
    assert out.scores.shape == (3,)


@pytest.mark.parametrize("attn", ["softmax", "hedgehog"])
@pytest.mark.parametrize("make", [llama, gpt2])
def test_what_is_written_is_the_likeliest_token_each_time(tiny, own, make, attn):
    """Against a loop without cache or padding."""
    task, found = loaded(tiny, own)
    model = hosts.convert(make(), attn).eval()
    model.generation_config.update(do_sample=True, repetition_penalty=5.0)  # the model's own taste doesn't count
    rows = found.tests["test"].examples
    assert len({len(e["prompt"]) for e in rows}) > 1
    batch = found.collate(rows)
    expected = []
    for example in rows:
        ids = list(example["prompt"])
        for _ in range(16):
            with torch.no_grad():
                ids.append(int(model(torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == 0:
                break
        expected.append(found.facts["processor"].decode(ids[len(example["prompt"]) :], skip_special_tokens=True))
    assert task._format.write(model, batch["prompt"], batch["prompt_mask"]) == expected
    assert any(expected)
    with torch.inference_mode():
        out = task.step(model, batch)
    rouge = torch.tensor([rouge_of(text, e["summary"]) for text, e in zip(expected, rows, strict=True)])
    assert torch.equal(out.metric_inputs[0], rouge)
    assert torch.equal(out.scores, rouge[:, 0])


def test_a_model_that_writes_nothing_scores_nothing(tiny, own):
    task, found = loaded(tiny, own)
    model = hosts.convert(llama(), "softmax").eval()
    model.lm_head.weight.data.zero_()  # the first of equals is token 0, the end
    batch = found.collate(found.tests["test"].examples)
    assert set(task._format.write(model, batch["prompt"], batch["prompt_mask"])) == {""}
    with torch.inference_mode():
        out = task.step(model, batch)
    assert out.scores.tolist() == [0.0] * 5
    assert float(out.loss) / out.count == pytest.approx(math.log(320), rel=1e-5)


# --- where pairs come from ---


def test_a_users_table(tiny, own, tmp_path):
    _, found = loaded(tiny, own)
    assert [len(s) for s in (found.train, found.validation, found.tests["test"])] == [16, 3, 5]
    assert list(found.hashes) == ["own.jsonl"]
    assert Summarization().dataset(str(own)).title == "own.jsonl"
    with (tmp_path / "own.csv").open("w", newline="") as file:
        rows = [("document", "summary", "split"), *((d, s, "train" if i else "test") for i, (d, s) in enumerate(PAIRS))]
        csv.writer(file).writerows(rows)
    _, found = loaded(tiny, tmp_path / "own.csv", train_examples=7)
    assert [len(s) for s in (found.train, found.validation, found.tests["test"])] == [7, 2, 1]
    assert found.tests["test"].examples[0]["summary"] == PAIRS[0][1]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"text": "a", "summary": "b", "split": "train"}', "line 1: no column document"),
        ('{"document": "a", "split": "train"}', "line 1: no column summary"),
        ('{"document": "a", "summary": " ", "split": "train"}', "line 1: empty summary"),
        ('{"document": 3, "summary": "b", "split": "train"}', "line 1: document is not text: 3"),
        ('{"document": "a", "summary": "b"}', "no column split"),
        ('{"document": "a", "summary": "b", "split": "train"}', "neither a validation nor a test split"),
        (
            '{"document": "a", "summary": "b", "split": "train"}\n{"document": "c", "summary": "d", "split": "test"}',
            "too few rows",
        ),
        (
            '{"document": "a", "summary": "b", "split": "train"}\n' * 3
            + '{"document": "ö", "summary": "日本語", "split": "test"}',
            "words of a-z and 0-9",
        ),
    ],
)
def test_tables_that_cannot_be_used(tiny, tmp_path, text, message):
    path = tmp_path / "bad.jsonl"
    path.write_text(text + "\n")
    with pytest.raises(DataError, match=message):
        loaded(tiny, path)


def test_settings_that_cannot_be_used(tiny, own, tmp_path):
    with pytest.raises(UsageError, match="leaves no room"):
        loaded(tiny, own, max_len=7)
    task, found = loaded(tiny, own, max_len=200)
    with pytest.raises(UsageError, match="has 128 positions: --max-len 200 is too long"):
        task.build_model(config(tiny, own, max_len=200), found)
    endless = tokenizer_of()
    endless.eos_token = None
    llama().save_pretrained(tmp_path / "endless")
    endless.save_pretrained(tmp_path / "endless")
    with pytest.raises(UsageError, match="no end-of-text token"):
        loaded(tmp_path / "endless", own)
    with pytest.raises(UsageError, match="Did you mean 'samsum'"):
        config(tiny, "samsun")


def test_samsum_comes_from_the_hub_or_a_folder(tiny, tmp_path, monkeypatch):
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path / "empty"))
    with pytest.raises(DataError, match="name a folder that holds its files"):
        loaded(tiny, "samsum")
    folder = tmp_path / "samsum"
    folder.mkdir()
    for name, pairs in [("train", PAIRS[:8]), ("validation", PAIRS[8:10]), ("test", [*PAIRS[10:13], ("", "nothing")])]:
        with (folder / f"{name}.csv").open("w", newline="") as file:
            csv.writer(file).writerows([("id", "dialogue", "summary"), *((i, *pair) for i, pair in enumerate(pairs))])
    _, found = loaded(tiny, "samsum", data_folder=folder)
    assert [len(s) for s in (found.train, found.validation, found.tests["test"])] == [8, 2, 3]
    assert found.tests["test"].examples[0]["summary"] == PAIRS[10][1]
    (folder / "test.csv").unlink()
    with pytest.raises(DataError, match="no split 'test'"):
        loaded(tiny, "samsum", data_folder=folder)


def test_the_presets():
    paper, mini = (
        prepare(RunConfig(task="summarization", attn="hedgehog", dataset=name, preset=preset)).config
        for name, preset in [("samsum", "paper"), ("xsum-1000", "mini")]
    )
    assert (paper.model, paper.lora, paper.epochs) == ("meta-llama/Llama-2-7b-hf", "r=8,alpha=16,targets=qkvo", 2.0)
    assert mini.regime == "pretrained-conversion"
    assert config("tiny", "xsum-1000", recipe="untrained").lora is None  # nothing is finetuned
    assert [f.name for f in Summarization().files(mini)] == ["xsum-1000", "smollm2"]


@pytest.mark.network
def test_xsum(tiny):
    texts = summarization._load("xsum-1000", None)
    assert [len(s) for s in (texts.train, texts.validation, texts.test)] == [699, 100, 200]  # one article is empty
    every = [*texts.train, *texts.validation, *texts.test]
    assert len({document for document, _ in every}) == len({summary for _, summary in every}) == 999
    words = sorted(len(summary.split()) for _, summary in every)
    assert words[len(words) // 2] == 21
    assert texts.hashes == {"xsum-1000": summarization.XSUM.sha256}
    assert data.status(summarization.XSUM) == "ready"


# --- a whole run ---


def run_of(tmp_path, *arguments: str) -> dict:
    assert main(["run", "--task", "summarization", "--out", str(tmp_path / "runs"), *arguments]) == 0
    (path,) = (tmp_path / "runs" / "summarization").rglob("result.json")
    return json.loads(path.read_text())


@pytest.mark.parametrize("attn", ["softmax", "hedgehog"])
def test_end_to_end(tiny, own, tmp_path, attn):
    found = run_of(
        tmp_path, "--attn", attn, "--model", str(tiny), "--dataset", str(own), "--max-len", "64", "--batch-size", "4",
        "--accelerator", "cpu", "--transfer-epochs", "1", "--epochs", "8", "--lr", "2e-2", "--lora", "",
    )  # fmt: skip
    assert found["score"]["name"] == "rouge1"
    assert found["score"]["num_examples"] == 5
    assert {"rouge1", "rouge2", "rougeL", "token_perplexity"} <= found["metrics"].keys()
    assert all(0 <= found["metrics"][key] <= 1 for key in ("rouge1", "rouge2", "rougeL"))
    # Summaries of five words over and over: what was random has learned some of them.
    assert found["score"]["value"] > found["teacher"]["score"] + 0.1
    assert found["metrics"]["token_perplexity"] < 150
    assert (found["after_transfer"] is not None) == (attn == "hedgehog")


@pytest.mark.slow
def test_two_processes_test_as_one_does(tiny, own, tmp_path):
    """Unequal numbers of examples on the ranks: five test summaries in batches of four."""
    values = []
    for devices in (1, 2):
        result, _ = execute(
            config(
                tiny,
                own,
                out=tmp_path / str(devices),
                devices=devices,
                accelerator="cpu",
                epochs=0.5,
                recipe="untrained",
                micro_batch_size=1,
            )
        )
        values.append(result.metrics)
    assert values[0] == pytest.approx(values[1], rel=1e-6)


def test_lengths_are_those_of_the_input(tiny, own):
    _, found = loaded(tiny, own)
    split: Split = found.train
    assert split.lengths == [int(found.collate([e])["inputs"]["attention_mask"].sum()) for e in split.examples]
