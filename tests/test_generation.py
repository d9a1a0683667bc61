"""`hhbench generate`: what it says it keeps is what is kept, and what it writes is what the library would."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from hhbench import cli, hosts
from hhbench.errors import DataError, HHBenchError, UsageError
from hhbench.generation import Writer
from hhbench.models import load, save

TEXT = "The hedgehog is a spiny mammal. It sleeps in winter and eats beetles, worms and slugs at night. "
PROMPT = "The hedgehog eats"


def tokenizer() -> Any:
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet())  # fmt: skip
    made.train_from_iterator([TEXT], trainer)
    return tf.PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>", pad_token="<end>")


def llama(**settings: Any) -> Any:
    sizes = {
        "vocab_size": 300,
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 128,
        "initializer_range": 0.3,
        "eos_token_id": None,
    }
    return tf.LlamaForCausalLM(tf.LlamaConfig(**sizes | settings)).eval()


def folder(path: Path, model: Any, attn: str = "hedgehog", *, processor: Any = None, **options: Any) -> Path:
    save(hosts.convert(model, attn, **options), path, processor=processor)
    return path


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid: two layers of Hedgehog around one of softmax."""
    torch.manual_seed(0)
    return folder(tmp_path_factory.mktemp("converted") / "llama", llama(), keep_layers=[1], processor=tokenizer())


def test_the_command_says_what_is_kept_streams_the_text_and_counts(
    converted: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="hhbench")
    assert cli.main(["generate", str(converted), "--prompt", PROMPT, "--max-new-tokens", "24"]) == 0
    ids = tokenizer()(PROMPT, return_tensors="pt")["input_ids"]
    model = load(converted)
    expected = model.generate(ids, max_new_tokens=24, do_sample=False, use_cache=False, pad_token_id=0)[0]
    count = expected.shape[0] - ids.shape[1]
    text = tokenizer().decode(expected[ids.shape[1] :], skip_special_tokens=True)
    assert capsys.readouterr().out.removesuffix("\n") == text and text
    kept, numbers = (record.message for record in caplog.records)
    states = [a.state_bytes(1) for a in hosts.attentions(model) if a.has_state]
    assert kept == f"2 layers hold a constant state: {sum(states):,} bytes; " + (
        "1 layer keeps every key and value: 128 bytes per token"  # 2 heads of width 8, keys and values, 4 bytes each
    )
    assert numbers.startswith(f"{count} tokens after {ids.shape[1]} of the prompt in ") and "tokens/s" in numbers
    assert numbers.endswith(f"the cache holds {sum(states) + 128 * (expected.shape[0] - 1):,} bytes")


def test_a_prompt_comes_from_stdin(
    converted: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["generate", str(converted), "--max-new-tokens", "8", "--prompt"]
    assert cli.main([*command, PROMPT]) == 0
    given = capsys.readouterr().out
    monkeypatch.setattr(sys, "stdin", io.StringIO(PROMPT + "\n"))
    assert cli.main([*command, "-"]) == 0
    assert capsys.readouterr().out == given


def test_samples_follow_the_seed_and_beams_are_the_librarys(converted: Path) -> None:
    writer = Writer(converted)
    sampling = {"max_new_tokens": 32, "temperature": 1.5, "top_p": 0.95}
    first = writer.write(PROMPT, **sampling, seed=3)
    assert first.text == writer.write(PROMPT, **sampling, seed=3).text
    assert first.text != writer.write(PROMPT, **sampling, seed=4).text
    assert first.text != writer.write(PROMPT, max_new_tokens=32).text
    cold = writer.write(PROMPT, max_new_tokens=32, temperature=1e-4, seed=5)
    assert cold.text == writer.write(PROMPT, max_new_tokens=32).text
    beams = writer.write(PROMPT, max_new_tokens=12, num_beams=3)
    ids = writer.tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    plain = writer.model.generate(ids, max_new_tokens=12, num_beams=3, use_cache=False, eos_token_id=0, pad_token_id=0)
    assert beams.text == writer.tokenizer.decode(plain[0, ids.shape[1] :], skip_special_tokens=True)
    one, three = writer.kept(), writer.kept(num_beams=3)
    assert three.constant_bytes == 3 * one.constant_bytes and three.token_bytes == 3 * one.token_bytes


def test_the_model_ends_a_text(tmp_path: Path) -> None:
    model = llama(tie_word_embeddings=False)
    torch.nn.init.zeros_(model.lm_head.weight)  # every logit is 0, and the first token, <end>, is the likeliest
    written = Writer(folder(tmp_path / "model", model, processor=tokenizer())).write(PROMPT)
    assert (written.num_tokens, written.text) == (1, "")


@pytest.mark.parametrize(
    ("attn", "line"),
    [
        ("hedgehog", "3 layers hold a constant state: "),
        ("softmax", "3 layers keep every key and value: 384 bytes per token"),
        ("h3", "3 layers hold a constant state: "),
        ("hyena", "nothing is kept: every token is read again at each step"),
    ],
)
def test_what_is_kept_is_said_of_every_kind(tmp_path: Path, attn: str, line: str) -> None:
    writer = Writer(folder(tmp_path / "model", llama(), attn, processor=tokenizer()))
    said = writer.kept().line()
    assert said.startswith(line)
    written = writer.write(PROMPT, max_new_tokens=4)
    if attn in ("hedgehog", "h3"):
        assert said == f"{line}{written.cache_bytes:,} bytes"


# ---- what is refused -------------------------------------------------------------------------------------------


def exit_of(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    code = cli.main(["generate", *args])
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith("hhbench: ")
    return code, said[0]


def test_an_encoder_writes_no_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
    bert = tf.BertForMaskedLM(tf.BertConfig(vocab_size=300, **sizes))
    code, said = exit_of(capsys, str(folder(tmp_path / "bert", bert)), "--prompt", PROMPT)
    assert code == 2 and "BertForMaskedLM writes no text" in said


def test_a_decoder_without_a_head_writes_no_text(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="LlamaModel writes no text"):
        Writer(folder(tmp_path / "llama", llama().model))


def test_a_folder_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = exit_of(capsys, str(folder(tmp_path / "llama", llama())), "--prompt", PROMPT)
    assert code == 1 and "holds no tokenizer" in said


def test_a_damaged_tokenizer(tmp_path: Path) -> None:
    path = folder(tmp_path / "llama", llama(), processor=tokenizer())
    (path / "tokenizer.json").write_text("{")
    with pytest.raises(DataError, match="can't be read"):
        Writer(path)


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    path = folder(tmp_path / "llama", llama(vocab_size=200), processor=tokenizer())
    with pytest.raises(DataError, match="it isn't the model's"):
        Writer(path).write(PROMPT)


def test_a_folder_that_holds_no_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, said = exit_of(capsys, str(tmp_path), "--prompt", PROMPT)
    assert code == 1 and "holds no hhbench model" in said


def test_an_empty_prompt(converted: Path) -> None:
    for prompt in ("", " \n"):
        with pytest.raises(UsageError, match="the prompt is empty"):
            Writer(converted).write(prompt)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"max_new_tokens": 0}, "--max-new-tokens must be at least 1"),
        ({"num_beams": 0}, "--num-beams must be at least 1"),
        ({"temperature": 0.0}, "--temperature must be above 0"),
        ({"top_p": 1.5}, "--top-p must be above 0 and at most 1"),
    ],
)
def test_settings_out_of_range(converted: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Writer(converted).write(PROMPT, **settings)


def test_learned_positions_end_before_anything_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpt2 = tf.GPT2LMHeadModel(tf.GPT2Config(vocab_size=300, n_embd=32, n_layer=1, n_head=4, n_positions=32))
    path = folder(tmp_path / "gpt2", gpt2, processor=tokenizer())
    assert cli.main(["generate", str(path), "--prompt", PROMPT, "--max-new-tokens", "64"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and "learned 32 positions" in err


def test_a_users_own_attention_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "squared.py").write_text(
        "from hhbench.attention import FeatureMap\n\n\nclass Squared(FeatureMap):\n"
        "    def forward(self, x):\n        return x.relu().square() + 1e-6\n"
    )
    monkeypatch.chdir(tmp_path)
    path = folder(tmp_path / "own", llama(), "squared.py:Squared", processor=tokenizer())
    with pytest.raises(HHBenchError, match="attn"):
        Writer(path)
    assert Writer(path, attn="squared.py:Squared").write(PROMPT, max_new_tokens=2).num_tokens == 2


def test_the_command_in_a_process_of_its_own(converted: Path) -> None:
    """Nothing but what was asked for goes to stdout, and no library says a word."""
    command = [sys.executable, "-m", "hhbench", "generate", str(converted), "--prompt", PROMPT, "--max-new-tokens", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout == Writer(converted).write(PROMPT, max_new_tokens=8).text + "\n"
    kept, numbers = done.stderr.splitlines()
    assert kept.startswith("2 layers hold") and numbers.startswith("8 tokens after")
