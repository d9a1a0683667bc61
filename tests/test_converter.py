"""`hhbench convert` as a user meets it: what it leaves behind, going on after an interruption, and what it refuses."""

import functools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers as tf
import yaml
from safetensors.torch import load_file
from tokenizers import BertWordPieceTokenizer, ByteLevelBPETokenizer

import hhbench
from hhbench import hosts, models, result
from hhbench.cli import main
from hhbench.config import RunConfig
from hhbench.converter import config_of
from hhbench.errors import UsageError
from hhbench.result import Result
from hhbench.runner import _Run, prepare
from hhbench.train import TrainStage, TransferStage

WORDS = ["hedgehog", "attention", "linear", "softmax", "keeps", "what", "it", "knew", "a", "spiky", "map", "mimics"]
TINY = ("--max-len", "16", "--train-examples", "32", "--test-examples", "8", "--batch-size", "4", "--logger", "none")
WIDTHS = {
    "vocab_size": 280, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "initializer_range": 0.1,
}  # fmt: skip
LLAMA = WIDTHS | {
    "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": None, "eos_token_id": 0,
    "pad_token_id": None,
}  # fmt: skip
BERT = WIDTHS | {"max_position_embeddings": 48, "num_labels": 3}


def sentences(count: int, *, words: int = 10) -> list[str]:
    draw = random.Random(0)
    return [" ".join(draw.choice(WORDS) for _ in range(words)) for _ in range(count)]


def reads_bytes() -> tf.PreTrainedTokenizerFast:
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(sentences(60), vocab_size=280, special_tokens=["<e>"], show_progress=False)
    return tf.PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, eos_token="<e>")


def reads_words() -> tf.PreTrainedTokenizerFast:
    pieces = BertWordPieceTokenizer()
    pieces.train_from_iterator(sentences(60), vocab_size=200, show_progress=False)
    special = {f"{name.lower()}_token": f"[{name}]" for name in ("PAD", "CLS", "SEP", "MASK", "UNK")}
    return tf.PreTrainedTokenizerFast(tokenizer_object=pieces._tokenizer, **special)


def write(folder: Path, model: tf.PreTrainedModel, reader: tf.PreTrainedTokenizerFast | None) -> Path:
    model.save_pretrained(folder)
    if reader is not None:
        reader.save_pretrained(folder)
    return folder


def llama(**changes) -> tf.LlamaForCausalLM:
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**(LLAMA | changes)))


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A user's folder: `llama`, `gpt2`, three Berts, text and a table. Tests leave it as it is."""
    folder = tmp_path_factory.mktemp("home")
    torch.manual_seed(0)
    write(folder / "llama", llama(), reads_bytes())
    small = {"vocab_size": 280, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 32, "bos_token_id": None}
    write(folder / "gpt2", tf.GPT2LMHeadModel(tf.GPT2Config(**small, eos_token_id=0)), reads_bytes())
    for name, cls in {
        "bert": tf.BertModel,
        "bert-mlm": tf.BertForMaskedLM,
        "bert-cls": tf.BertForSequenceClassification,
    }.items():
        write(folder / name, cls(tf.BertConfig(**BERT)), reads_words())
    (folder / "text.txt").write_text("\n".join(sentences(120)))
    parts = ["train"] * 60 + ["validation"] * 6 + ["test"] * 6
    for name, labels in {"two.csv": ("good", "bad"), "three.csv": ("good", "bad", "odd")}.items():
        rows = [
            f"{text},{labels[i % len(labels)]},{part}"
            for i, (text, part) in enumerate(zip(sentences(72), parts, strict=True))
        ]
        (folder / name).write_text("\n".join(["text,label,split", *rows]))
    return folder


@pytest.fixture
def convert(home, tmp_path, monkeypatch, capfd, caplog):
    """`hhbench convert` in the user's folder, results and models below `tmp_path`: code, stdout, what else it says."""
    monkeypatch.chdir(home)

    def call(*arguments: object, tiny: bool = True, command: str = "convert") -> tuple[int, str, str]:
        given = [str(argument) for argument in arguments]
        if command == "convert":
            given += [*(TINY if tiny else ()), "--out", str(tmp_path / "runs")]
            if "--to" not in given:
                given += ["--to", str(tmp_path / "model")]
        capfd.readouterr()
        caplog.clear()
        try:
            code = main([command, *given])
        except SystemExit as stop:
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        said = [one.getMessage() for one in caplog.records if one.name.startswith("hhbench")]  # pytest has the log
        return code, out, "\n".join([*said, err])

    return call


def made_by(out: str) -> tuple[Result, Path]:
    """The result and the model's folder that the last two lines name."""
    told = dict(line.split(": ", 1) for line in out.splitlines()[-2:])
    return result.load(Path(told["result"])), Path(told["model"])


def check_done(called: tuple[int, str, str]) -> tuple[Result, Path]:
    code, out, err = called
    assert code == 0, err
    return made_by(out)


def refused(called: tuple[int, str, str], code: int, *words: str) -> None:
    """One clear line, after the plan's at most; and nothing has begun to train."""
    found, out, err = called
    assert found == code, err
    (line,) = [line for line in err.splitlines() if line.startswith("hhbench")]
    assert line == err.splitlines()[-1]
    for word in words:
        assert word in line
    assert out == ""
    assert "Traceback" not in err
    assert "KL from softmax" not in err


def answer(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12).view(2, 6) + 5)[0]


# --- what is left behind ---


def test_a_decoder_becomes_a_folder(convert, home):
    code, out, err = convert("llama", "--attn", "hedgehog", "--data", "text.txt")
    made, folder = check_done((code, out, err))
    assert "layers 0-1 of 2 get hedgehog: 4 heads on 2 key-value heads" in err
    assert {"config.json", "model.safetensors", "tokenizer.json", "hhbench.json"} <= {p.name for p in folder.iterdir()}
    assert not list(folder.parent.glob(".*"))
    run = models.manifest(folder)["run"]
    assert run["key"] == made.key
    assert run["scores"] == {
        "name": "word_perplexity", "after_swap": made.after_swap, "after_transfer": made.after_transfer,
        "final": made.score.value,
    }  # fmt: skip
    assert run["teacher"]["score"] == made.teacher["score"]
    assert run["weights"] == {"llama": models.weights_hash(str(home / "llama"))["llama"]}
    assert run["data"].keys() == {"text.txt"}
    assert run["commit"] == made.environment["commit"]
    assert (run["config"]["model"], run["config"]["dataset"]) == (str(home / "llama"), str(home / "text.txt"))
    fell = [after < before for before, after in zip(made.fidelity["kl_before"], made.fidelity["kl_after"], strict=True)]
    assert fell == [True, True]
    for label, value in {
        "teacher": made.teacher["score"], "after the swap": made.after_swap, "after transfer": made.after_transfer,
        "after finetuning": made.score.value,
    }.items():  # fmt: skip
        (row,) = [line for line in out.splitlines() if line.startswith(label)]
        assert row.split()[len(label.split())] == f"{value:.4g}"
    # The folder holds the model that was tested, and the Auto class reads the same one.
    loaded = hhbench.load(folder)
    assert isinstance(loaded, tf.LlamaForCausalLM)
    assert torch.equal(answer(loaded), answer(tf.AutoModelForCausalLM.from_pretrained(folder)))
    code, out, err = convert(folder, "--prompt", "the hedgehog", "--max-new-tokens", "6", command="generate")
    assert (code, err.count("constant state")) == (0, 1), err
    code, out, err = convert(folder, "--examples", "4", "--lengths", "1", "--json", command="fidelity")
    assert code == 0, err
    report = json.loads(out)
    assert report["max_len"] == 16
    assert [layer["end_to_end"]["kl"] is not None for layer in report["layers"]] == [True, True]


def test_the_model_that_is_kept_is_the_one_that_was_scored(convert):
    made, folder = check_done(convert("llama", "--attn", "hedgehog", "--data", "text.txt"))
    config = RunConfig.from_dict(models.manifest(folder)["run"]["config"])
    assert _Run(prepare(config))._test(hhbench.load(folder), "test")[0] == pytest.approx(made.score.value, rel=1e-6)


@pytest.mark.parametrize("model", ["bert", "bert-mlm", "bert-cls"])
def test_an_encoder_learns_from_text_without_labels(convert, model):
    code, out, err = convert(model, "--attn", "hedgehog", "--data", "text.txt")
    made, folder = check_done((code, out, err))
    assert "unlabelled / text.txt" in err
    assert made.attention["recipe"] == "transfer-only"
    assert made.score.name == "kl"
    assert made.score.value == made.after_transfer < made.after_swap
    assert "train" not in made.cost["seconds"]
    # Nothing but the maps is new: every other weight is the pretrained model's, its head's too.
    before, after = (load_file(path / "model.safetensors") for path in (Path(model), folder))
    assert before.keys() < after.keys()
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("model", ["bert", "bert-cls"])
def test_an_encoder_learns_from_labels(convert, model):
    made, folder = check_done(convert(model, "--attn", "hedgehog", "--data", "three.csv"))
    assert (made.task["name"], made.score.name, made.score.num_examples) == ("glue", "accuracy", 6)
    assert made.teacher is made.after_swap is made.after_transfer is None
    assert made.cost["seconds"]["train"] > 0
    assert answer(hhbench.load(folder)).shape == (2, 3)


# --- how it is converted ---


def attentions_in(folder: Path) -> list[str]:
    return [placement.attention for placement in hosts.placements(hhbench.load(folder))]


def test_lora_a_window_and_a_kept_layer(convert):
    options = ("--lora", "r=2", "--window", "4", "--keep-layers", "0")
    code, out, err = convert("llama", "--attn", "hedgehog", "--data", "text.txt", *options)
    made, folder = check_done((code, out, err))
    assert "layer 0: --keep-layers: kept as softmax" in err
    assert "LoRA r=2,alpha=4,targets=qkvo adapts 8 modules" in err
    assert made.attention["label"] == "hedgehog-window[window=4]"
    assert attentions_in(folder) == ["softmax", "hedgehog-window"]
    before, after = (load_file(path / "model.safetensors") for path in (Path("llama"), folder))
    changed = {name.split(".")[-2] for name, tensor in before.items() if not torch.equal(after[name], tensor)}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj"}  # the adapters are merged; nothing else was trained


def test_layers_to_keep_are_chosen_and_their_curve_is_told(convert):
    code, out, err = convert("llama", "--attn", "hedgehog", "--data", "text.txt", "--keep-layers", "auto:1")
    made, folder = check_done((code, out, err))
    choice = made.layer_choice
    worst = max(range(2), key=lambda layer: made.fidelity["kl_after"][layer])
    assert choice["layers"] == [worst]
    assert choice["scores"][0] == made.after_transfer
    (row,) = [line for line in out.splitlines() if line.startswith("with layer")]
    assert row.split() == ["with", "layer", str(worst), "kept", f"{choice['scores'][1]:.4g}"]
    assert models.manifest(folder)["run"]["layer_choice"] == choice
    assert [name == "softmax" for name in attentions_in(folder)] == [layer == worst for layer in range(2)]


def test_attentions_by_layer_and_what_transfer_compares(convert):
    options = ("--layers", "0=softmax,1=t2r", "--transfer-loss", "both", "--queries", "8", "--recipe", "transfer-only")
    made, folder = check_done(convert("llama", "--attn", "hedgehog", "--data", "text.txt", *options))
    assert attentions_in(folder) == ["softmax", "t2r"]
    settings = made.identity["settings"]
    assert (settings["transfer_loss"], settings["queries"]) == ("both", 8)
    assert len(made.fidelity["kl_after"]) == 1
    assert made.fidelity["kl_after"][0] < made.fidelity["kl_before"][0]
    assert "train" not in made.cost["seconds"]
    before, after = (load_file(path / "model.safetensors") for path in (Path("llama"), folder))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


def test_a_file_of_settings(convert, tmp_path):
    file = tmp_path / "conversion.yaml"
    layers = {"0": "taylor[project_to=2]", "1": "elu"}
    file.write_text(yaml.safe_dump({"attn": "hedgehog", "recipe": "untrained", "layers": layers}))
    made, folder = check_done(convert("llama", "--data", "text.txt", "--config", file))
    assert attentions_in(folder) == ["taylor", "elu"]
    assert made.score.value == made.after_swap
    assert made.after_transfer is None


def test_the_default_folder_bears_both_names(home, monkeypatch):
    monkeypatch.chdir(home)
    for model in ("llama", "./llama/", str(home / "llama")):
        config = config_of(model, {"attn": "elu", "dataset": "text.txt"})
        assert config.model_folder == Path("converted/llama-elu")
    config = config_of("llama", {"attn": "hedgehog", "dataset": "text.txt", "window": 4})
    assert config.model_folder == Path("converted/llama-hedgehog-window")


def test_a_dry_run_does_nothing(convert, tmp_path):
    code, out, err = convert("llama", "--attn", "hedgehog", "--data", "text.txt", "--dry-run")
    assert (code, out) == (0, "")
    kept, replaced, end = err.splitlines()[-3:]
    assert (kept, end) == (f"  kept in: {tmp_path / 'model'}", "dry run: nothing done")
    assert replaced.startswith("layers 0-1 of 2 get hedgehog")
    assert not list(tmp_path.iterdir())


# --- again ---


def test_a_finished_conversion_is_not_run_again(convert, tmp_path, home):
    command = ("llama", "--attn", "hedgehog", "--data", "text.txt", "--recipe", "untrained")
    first, folder = check_done(convert(*command))
    weights = (folder / "model.safetensors").stat().st_mtime_ns
    # However the folder is spelled: it is the same model.
    for model in ("llama", "./llama", str(home / "llama")):
        _, out, err = convert(model, *command[1:])
        assert made_by(out)[0] == first
        assert "done already" in err
    assert (folder / "model.safetensors").stat().st_mtime_ns == weights
    # Without its model a result is half of what was asked for.
    shutil.rmtree(folder)
    _, out, err = convert(*command)
    assert "done already" not in err
    assert made_by(out)[1].is_dir()


def test_two_conversions_do_not_share_a_folder(convert):
    command = ("llama", "--data", "text.txt", "--recipe", "untrained", "--attn")
    check_done(convert(*command, "elu"))
    refused(convert(*command, "relu"), 2, "holds another model", "--force")
    _, folder = check_done(convert(*command, "relu", "--force"))
    assert attentions_in(folder) == ["relu", "relu"]


def test_a_converted_folder_stands_for_what_it_was_made_from(convert, home, tmp_path, monkeypatch):
    original = tmp_path / "original"
    shutil.copytree(home / "llama", original)
    common = ("--data", "text.txt", "--recipe", "untrained", "--attn")
    _, first = check_done(convert(original, *common, "elu", "--to", tmp_path / "first"))
    made, _ = check_done(convert(first, *common, "relu", "--to", tmp_path / "again"))
    direct, _ = check_done(convert(original, *common, "relu", "--to", tmp_path / "again"))
    assert made == direct
    assert made.identity["settings"]["model"] == "original"
    # A teacher that has changed or is gone isn't one.
    llama(initializer_range=0.2).save_pretrained(original)
    refused(convert(first, *common, "relu", "--to", tmp_path / "third"), 2, str(original), "changed")
    shutil.rmtree(original)
    refused(convert(first, *common, "relu", "--to", tmp_path / "third"), 2, str(original), "gone")
    manifest = json.loads((first / "hhbench.json").read_text())
    (first / "hhbench.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "run"}))
    refused(convert(first, *common, "relu", "--to", tmp_path / "third"), 2, "doesn't say what from")


# --- interrupted ---

STAGES = {"transfer": TransferStage, "finetuning": TrainStage}


@pytest.mark.parametrize("stage", STAGES)
def test_an_interrupted_conversion_ends_where_an_undisturbed_one_does(convert, tmp_path, monkeypatch, stage):
    command = ("llama", "--attn", "hedgehog", "--data", "text.txt", "--transfer-epochs", "1", "--epochs", "1")
    whole, folder = check_done(convert(*command, "--to", tmp_path / "whole"))
    shutil.rmtree(tmp_path / "runs")
    step, left = STAGES[stage].training_step, [4]

    def counting(self, batch, batch_idx):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(STAGES[stage], "training_step", counting)
    code, out, err = convert(*command, "--to", tmp_path / "cut")
    assert (code, out) == (130, "")
    assert err.splitlines()[-1].endswith("run the same command to go on.")
    assert not (tmp_path / "cut").exists()
    assert len(list((tmp_path / "runs").rglob("step-*.ckpt"))) == 1
    code, out, err = convert(*command, "--to", tmp_path / "cut")
    made, resumed = check_done((code, out, err))
    assert ("transfer was finished" in err) == (stage == "finetuning")
    assert "continuing" in err
    assert (made.key, made.score, made.fidelity) == (whole.key, whole.score, whole.fidelity)
    before, after = (load_file(path / "model.safetensors") for path in (folder, resumed))
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert not list((tmp_path / "runs").rglob("*.ckpt"))


def process(home: Path, *arguments: object, launcher: Sequence[str] = (), preexec_fn=None) -> subprocess.Popen[str]:
    command = [sys.executable, *launcher, "-m", "hhbench", "convert", *map(str, arguments)]
    return subprocess.Popen(
        command, cwd=home, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=preexec_fn
    )


TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", [(), TORCHRUN], ids=["started by itself", "started by torchrun"])
def test_two_devices_make_the_model_that_one_makes(launcher, convert, home, tmp_path):
    command = ("llama", "--attn", "hedgehog", "--data", "text.txt", "--accelerator", "cpu")
    one, alone = check_done(convert(*command, "--to", tmp_path / "alone"))
    places = ("--out", tmp_path / "shared", "--to", tmp_path / "model")
    with process(home, *command, *TINY, "--devices", 2, *places, launcher=launcher) as running:
        out, err = running.communicate(timeout=400)
    two, folder = check_done((running.returncode, out, err))
    assert (one.environment["world_size"], two.environment["world_size"]) == (1, 2)
    assert two.key == one.key
    assert err.count("lm / text.txt with hedgehog") == 1  # one of the processes speaks
    assert two.score.value == pytest.approx(one.score.value, rel=1e-3)
    before, after = (load_file(path / "model.safetensors") for path in (alone, folder))
    for name, tensor in before.items():
        torch.testing.assert_close(after[name], tensor, rtol=1e-3, atol=1e-4)
    start = load_file(home / "llama" / "model.safetensors")
    trained = [name for name in start if name in after and not torch.equal(after[name], start[name])]
    assert trained  # finetuned, not only taught
    assert folder == tmp_path / "model"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGINT to another process")
def test_ctrl_c_in_a_process_of_its_own(convert, home, tmp_path):
    command = (
        "llama", "--attn", "hedgehog", "--data", "text.txt", *TINY[:-1], "csv", "--transfer-epochs", "400",
        "--recipe", "transfer-only", "--out", tmp_path / "runs", "--to", tmp_path / "model",
    )  # fmt: skip
    heed = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    with process(home, *command, preexec_fn=heed) as running:
        deadline = time.monotonic() + 120
        while not list(tmp_path.rglob("metrics.csv")) and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (130, ""), err
    assert "Traceback" not in err
    assert err.splitlines()[-1] == ("hhbench: interrupted. What is done is kept: run the same command to go on.")
    assert len(list((tmp_path / "runs").rglob("step-*.ckpt"))) == 1
    assert not (tmp_path / "model").exists()


@pytest.mark.skipif(sys.platform == "win32", reason="no RLIMIT_FSIZE")
def test_a_disk_that_fills_leaves_no_half_folder(convert, home, tmp_path):
    command = ("llama", "--attn", "hedgehog", "--data", "text.txt", "--recipe", "untrained", *TINY)
    places = ("--out", tmp_path / "runs", "--to", tmp_path / "model")
    _, old = check_done(convert("llama", "--attn", "elu", "--data", "text.txt", "--recipe", "untrained"))
    before = {path.name: path.read_bytes() for path in old.iterdir()}

    def full() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))  # the weights take 60 kB

    with process(home, *command, *places, "--force", preexec_fn=full) as running:
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (1, ""), err
    assert err.splitlines()[-1].startswith(f"hhbench: {tmp_path / 'model'} couldn't be written: ")
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir() if path.name != "runs"] == ["model"]
    assert {path.name: path.read_bytes() for path in old.iterdir()} == before
    assert not [path for path in (tmp_path / "runs").rglob("result.json") if "hedgehog" in str(path)]
    # With room again the same command ends.
    _, folder = check_done(convert(*command[: -len(TINY)], "--force"))
    assert attentions_in(folder) == ["hedgehog", "hedgehog"]


# --- refused ---


def test_a_folder_that_is_no_model(convert, tmp_path, home):
    broken = tmp_path / "broken"
    shutil.copytree(home / "llama", broken)
    command = (broken, "--attn", "hedgehog", "--data", "text.txt")
    (broken / "model.safetensors").rename(broken / "pytorch_model.bin")
    refused(convert(*command), 1, "pickled weights alone (pytorch_model.bin)", "safetensors")
    (broken / "pytorch_model.bin").unlink()
    refused(convert(*command), 1, "there is no .safetensors file")
    (broken / "config.json").unlink()
    refused(convert(*command), 1, "it has no config.json")
    refused(convert("text.txt", "--attn", "hedgehog"), 2, "text.txt is a file", "config.json")
    refused(convert("./lama", "--attn", "hedgehog"), 2, "there is no folder ./lama")
    refused(convert("smolm2", "--attn", "hedgehog"), 2, "Did you mean 'smollm2'?")


def test_a_folder_without_a_tokenizer(convert, tmp_path):
    write(tmp_path / "mute", llama(), None)
    refused(convert(tmp_path / "mute", "--attn", "hedgehog", "--data", "text.txt"), 1, "holds no tokenizer")


@pytest.mark.parametrize(
    "model",
    [
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=280, hidden_size=16, n_layer=2, n_head=2)),
        lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                vocab_size=280, hidden_size=16, num_layers=2, num_heads=2, attention_types=[[["global"], 2]],
                max_position_embeddings=64,
            )
        ),
    ],
    ids=["Bloom", "GPT-Neo"],
)  # fmt: skip
def test_attention_that_is_not_the_interfaces(convert, tmp_path, model):
    write(tmp_path / "other", model(), reads_bytes())
    called = convert(tmp_path / "other", "--attn", "hedgehog", "--data", "text.txt")
    refused(called, 2, "ForCausalLM can't be a host: it computes its attention itself")


def test_not_a_number_in_a_teacher(convert, tmp_path, home):
    sick = llama()
    sick.model.layers[1].mlp.up_proj.weight.data[0, 0] = float("nan")
    write(tmp_path / "sick", sick, reads_bytes())
    called = convert(tmp_path / "sick", "--attn", "hedgehog", "--data", "text.txt")
    refused(called, 1, "model.layers.1.mlp.up_proj.weight of LlamaForCausalLM isn't finite")
    # An encoder without labels would never notice: the NaN lies in the embedding of a word that the text hasn't.
    sick = tf.BertModel(tf.BertConfig(**BERT))
    sick.embeddings.word_embeddings.weight.data[279, 0] = float("inf")
    write(tmp_path / "sicker", sick, reads_words())
    called = convert(tmp_path / "sicker", "--attn", "hedgehog", "--data", "text.txt")
    refused(called, 1, "embeddings.word_embeddings.weight")


def test_vocabulary_head_and_positions_that_do_not_fit(convert, tmp_path):
    write(tmp_path / "small", llama(vocab_size=100), reads_bytes())
    common = ("--attn", "hedgehog", "--data")
    refused(convert(tmp_path / "small", *common, "text.txt"), 2, "tokenizer has 280 tokens", "embeds 100")
    refused(convert("bert-cls", *common, "two.csv"), 2, "bert-cls has a head for 3 labels, and the data have 2")
    for model, positions in {"gpt2": 32, "bert": 48, "llama": 64}.items():
        called = convert(model, *common, "text.txt", "--max-len", positions + 1, "--batch-size", 2, tiny=False)
        refused(called, 2, f"{model} has {positions} positions", f"--max-len {positions + 1}")


def test_data_that_are_too_short_or_of_another_kind_or_not_there(convert, tmp_path):
    common = ("--attn", "hedgehog", "--data")
    called = convert("llama", *common, "text.txt", "--batch-size", 64)
    assert called[0] == 0 or called[0] == 2
    (tmp_path / "short.txt").write_text("\n".join(sentences(9)))
    called = convert("llama", *common, tmp_path / "short.txt", "--max-len", 16, "--batch-size", 32, tiny=False)
    refused(called, 2, "training examples, fewer than one batch of 32: lower --batch-size")
    called = convert("bert", *common, tmp_path / "short.txt", "--max-len", 32, "--batch-size", 32, tiny=False)
    refused(called, 2, "fewer than one batch of 32: lower --batch-size")
    (tmp_path / "shorter.txt").write_text("a hedgehog\nkeeps\nit\n")
    refused(convert("llama", *common, tmp_path / "shorter.txt"), 1, "shorter than one window of 16 tokens")
    refused(convert("llama", *common, "nowhere.txt"), 2, "there is no file or folder nowhere.txt")
    refused(convert("llama", *common, "wikipedea"), 2, "can't teach llama (decoder)", "'wikipedia'")
    (tmp_path / "pictures").mkdir()
    (tmp_path / "pictures" / "one.png").touch()
    refused(convert("bert", *common, tmp_path / "pictures"), 2, "holds images, and bert (encoder) takes text")


def test_folders_that_can_not_be_the_models(convert, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    common = ("llama", "--attn", "hedgehog", "--data", "text.txt", "--to")
    refused(convert(*common, tmp_path / "mine"), 2, "holds no model of hhbench's: name another folder")
    assert [path.name for path in (tmp_path / "mine").iterdir()] == ["notes.txt"]
    refused(convert(*common, tmp_path / "mine" / "notes.txt"), 2, "name another folder")
    refused(convert(*common, tmp_path / "mine" / "notes.txt" / "x"), 2, "notes.txt is a file")
    (tmp_path / "empty").mkdir()
    check_done(convert(*common, tmp_path / "empty", "--recipe", "untrained"))


def test_layers_that_are_not_there(convert):
    common = ("llama", "--attn", "hedgehog", "--data", "text.txt")
    refused(convert(*common, "--keep-layers", "7"), 2, "no layer 7 to keep: the model has 2")
    refused(convert(*common, "--layers", "7=elu"), 2, "no layer 7")
    refused(convert(*common, "--keep-layers", "auto:3"), 2, "auto:3", "2 layers")
    refused(convert(*common, "--keep-layers", "some"), 2, "--keep-layers takes layers as 0,1 or auto:COUNT")


def test_words_that_are_wrong_or_missing(convert):
    common = ("--data", "text.txt")
    refused(convert("llama", *common), 2, "--attn is needed", "hhbench list attentions")
    refused(convert("llama", *common, "--attn", "hedgehogg"), 2, "Did you mean 'hedgehog'?")
    refused(convert("llama", *common, "--atn", "elu"), 2, "Did you mean '--attn'?")
    refused(convert("llama", *common, "--attn", "elu", "--recipe", "transfr-only"), 2, "Did you mean 'transfer-only'?")
    refused(convert("--attn", "hedgehog"), 2, "required: model")
    refused(convert("llama", *common, "--attn", "elu", "--task", "glue,lm"), 2, "on one task")
    refused(convert("bert", *common, "--attn", "hedgehog", "--recipe", "t2r"), 2, "no labels: use transfer-only")
    refused(convert("bert", *common, "--attn", "hedgehog", "--lora", "r=2"), 2, "--lora needs")
    refused(convert("bert", *common, "--attn", "aft"), 2, "no weights to compare")


def test_every_option_of_convert_has_a_meaning_there(capsys):
    with pytest.raises(SystemExit):
        main(["convert", "--help"])
    told = capsys.readouterr().out
    assert "--to FOLDER" in told
    assert "--teacher" not in told  # its teacher is there already
    assert main(["list", "models"]) == 0
    assert "smollm2" in capsys.readouterr().out


def test_a_model_of_no_known_kind_is_refused(tmp_path, home, monkeypatch):
    monkeypatch.chdir(home)
    torch.manual_seed(0)
    tf.Wav2Vec2Model(
        tf.Wav2Vec2Config(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(4,),
            conv_stride=(2,), conv_kernel=(3,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    ).save_pretrained(tmp_path / "hears")  # fmt: skip
    with pytest.raises(UsageError, match="is no decoder, encoder or vision transformer"):
        config_of(str(tmp_path / "hears"), {"attn": "elu", "dataset": "text.txt"})
