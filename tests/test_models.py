"""Models kept as folders: what comes back is what was saved, whole or not at all, and nothing runs unasked."""

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import transformers as tf
from tiny import GROUPED, TEXT, TIMM, VOCAB
from torch import Tensor, nn

from hhbench import hosts, models
from hhbench.attention import ATTENTIONS
from hhbench.errors import DataError, HHBenchError, UsageError

DECODER = TEXT | GROUPED


def llama() -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER))


def timm_vit() -> nn.Module:
    return models.timm_model("vit_tiny_patch16_224", pretrained=False, **TIMM)


HOSTS: dict[str, Callable[[], nn.Module]] = {"llama": llama, "timm": timm_vit}
every_host = pytest.mark.parametrize("host", HOSTS)


def saved(folder: Path, host: str = "llama", attn: str = "hedgehog", **options: Any) -> nn.Module:
    """A converted model whose maps are no identities, and its folder."""
    model = hosts.convert(HOSTS[host](), attn, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    models.save(model, folder)
    return model


def answer(model: nn.Module) -> Tensor:
    """Logits on an input that is the same every time."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        if isinstance(model, tf.PreTrainedModel):
            return model(input_ids=torch.randint(0, VOCAB, (2, 9), generator=generator)).logits
        return model(torch.randn(2, 3, 32, 32, generator=generator))


def edit(folder: Path, **changes: Any) -> None:
    path = folder / "hhbench.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


WHOLE = {"hhbench.json", "model.safetensors", "config.json", "generation_config.json"}


# --- saving and loading ---


@every_host
def test_a_loaded_model_is_the_saved_one(host, tmp_path):
    model = saved(tmp_path / "model", host, bias=True)
    other = models.load(tmp_path / "model")
    assert type(other) is type(model)
    assert not other.training
    assert torch.equal(answer(other), answer(model))
    assert torch.equal(answer(models.load(tmp_path)), answer(model))  # a run's folder
    assert models.manifest(tmp_path) == models.manifest(tmp_path / "model")
    assert models.is_converted(tmp_path)
    for one, two in zip(hosts.placements(model), hosts.placements(other), strict=True):
        assert one == two
        assert one.options == {"bias": True}


@pytest.mark.parametrize("attn", ATTENTIONS.names())
def test_a_saved_model_comes_back_with_any_attention(attn, tmp_path):
    model = hosts.convert(models.gpt2("gpt2-2x32x2", vocab=VOCAB, max_len=16, dropout=0.0), attn).eval()
    expected = answer(model)
    models.save(model, tmp_path / "model")
    assert torch.equal(answer(models.load(tmp_path / "model")), expected)


@every_host
def test_layers_may_differ(host, tmp_path):
    model = hosts.convert(
        HOSTS[host](), "t2r", layers={0: ("hedgehog", {"activation": "exp"})}, keep_layers=[-1]
    ).eval()
    models.save(model, tmp_path / "model")
    other = models.load(tmp_path / "model")
    assert [p.attention for p in hosts.placements(other)] == ["hedgehog", "softmax"]
    assert torch.equal(answer(other), answer(model))


def test_the_manifest_says_what_is_there(tmp_path):
    model = saved(tmp_path / "model")
    models.save(model, tmp_path / "model", notes={"teacher": {"score": 0.5}})
    found = models.manifest(tmp_path / "model")
    assert found["teacher"] == {"score": 0.5}
    assert found["host"] == {"library": "transformers", "name": "LlamaForCausalLM"}
    assert [layer["layer"] for layer in found["layers"]] == ["layers.0.self_attn", "layers.1.self_attn"]
    assert found["layers"] == json.loads((tmp_path / "model" / "config.json").read_text())["hhbench"]["layers"]
    model = saved(tmp_path / "vit", "timm")
    assert models.manifest(tmp_path / "vit")["host"] == {
        "library": "timm",
        "name": "vit_tiny_patch16_224",
        "arguments": TIMM,
    }


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("whole", [True, False])
@every_host
def test_half_precision_comes_back_as_it_was(host, whole, dtype, tmp_path):
    """Of the whole model, or of all but the maps, which a conversion leaves in single precision."""
    model = hosts.convert(HOSTS[host](), "hedgehog").eval()
    added = {id(parameter) for parameter in hosts.attention_parameters(model)}
    for parameter in model.parameters():
        if whole or id(parameter) not in added:
            parameter.data = parameter.data.to(dtype)
    models.save(model, tmp_path / "model")
    other = models.load(tmp_path / "model")
    assert {p.dtype for p in other.parameters()} == ({dtype} if whole else {dtype, torch.float32})
    for (name, one), (_, two) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert one.dtype == two.dtype, name
        assert torch.equal(one, two), name
    if whole and host == "llama":
        assert torch.equal(answer(other), answer(model))


def test_a_tokenizer_comes_with_the_model(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    model = hosts.convert(llama(), "elu")
    models.save(
        model, tmp_path / "model", processor=tf.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    )
    models.load(tmp_path / "model")
    assert models.tokenizer(str(tmp_path / "model"))("b a c")["input_ids"] == [2, 1, 0]


def test_transforms_come_with_the_model(tmp_path):
    model = hosts.convert(tf.ViTForImageClassification(tf.ViTConfig(hidden_size=32, num_hidden_layers=1)), "elu")
    models.save(model, tmp_path / "model", processor=tf.ViTImageProcessor(size={"height": 20, "width": 20}))
    models.load(tmp_path / "model")
    found = tf.AutoImageProcessor.from_pretrained(tmp_path / "model")
    assert (found.size["height"], found.size["width"]) == (20, 20)


def test_what_is_not_converted_or_not_known_is_not_saved(tmp_path):
    with pytest.raises(UsageError, match="LlamaForCausalLM wasn't converted"):
        models.save(llama(), tmp_path / "model")
    unknown = hosts.convert(timm.create_model("vit_tiny_patch16_224", **TIMM), "softmax")
    with pytest.raises(UsageError, match="VisionTransformer can't be saved"):
        models.save(unknown, tmp_path / "model")

    class Mine(tf.LlamaForCausalLM):
        pass

    with pytest.raises(UsageError, match="HHBenchMine can't be saved"):
        models.save(hosts.convert(Mine(tf.LlamaConfig(**DECODER)), "softmax"), tmp_path / "model")
    assert not (tmp_path / "model").exists()


# --- whole or not at all ---


@every_host
def test_saving_twice_leaves_the_last(host, tmp_path):
    saved(tmp_path / "model", host)
    (tmp_path / "model" / "left.over").touch()
    model = saved(tmp_path / "model", host, attn="t2r")
    assert torch.equal(answer(models.load(tmp_path / "model")), answer(model))
    assert names(tmp_path / "model") == (WHOLE if host == "llama" else {"hhbench.json", "model.safetensors"})
    assert names(tmp_path) == {"model"}


FULL_DISK = """
import resource, signal, sys, torch
from pathlib import Path
sys.path.insert(0, str(Path(sys.argv[1])))
from test_models import HOSTS, hosts, models
model = hosts.convert(HOSTS[sys.argv[2]](), "t2r")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # writing more is an error then, as on a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[4]), int(sys.argv[4])))
try:
    models.save(model, sys.argv[3])
except models.HHBenchError as error:
    print(error)
"""


def fill_disk(host: str, folder: Path, limit: int) -> str:
    run = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(Path(__file__).parent), host, str(folder), str(limit)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(models.__file__).parents[1],
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


@every_host
def test_a_full_disk_leaves_what_was_there(host, tmp_path):
    model = saved(tmp_path / "model", host)
    said = fill_disk(host, tmp_path / "model", 10_000)  # less than the weights
    assert said.startswith(f"{tmp_path / 'model'} couldn't be written: ")
    assert said.count("\n") == 1
    assert torch.equal(answer(models.load(tmp_path / "model")), answer(model))
    assert names(tmp_path) == {"model"}


def test_what_killed_processes_left_aside_is_cleared(tmp_path):
    folder = tmp_path / "my [model]"
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom hhbench import models\n"
        "with models._written_aside(Path(sys.argv[1])) as aside:\n"
        "    (aside / 'half').write_text('of it')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    # Two that were killed, the first of them long ago; and of a process that has been at work for long.
    for _ in range(2):
        assert subprocess.run([sys.executable, "-c", code, str(folder)], check=False).returncode == -signal.SIGKILL
    first, second = sorted(tmp_path.iterdir(), key=lambda path: path.stat().st_mtime)
    machine = first.name.split(".", 2)[2].rsplit(".", 2)[0]
    working = tmp_path / f".{folder.name}.{machine}.{os.getppid()}.new"
    other = tmp_path / f".{folder.name}.elsewhere.999999999.new"  # of another machine
    for path in (working, other):
        path.mkdir()
    long_ago = time.time() - 2 * models.SECONDS_TO_WRITE
    for path in (first, working, other):
        os.utime(path, (long_ago, long_ago))
    saved(folder)
    assert set(tmp_path.iterdir()) == {folder, second, working, other}
    models.load(folder)


def test_a_full_disk_leaves_no_half_folder(tmp_path):
    assert "couldn't be written" in fill_disk("llama", tmp_path / "new", 500)  # less than the config
    assert "couldn't be written" in fill_disk("llama", tmp_path / "new", 10_000)
    assert names(tmp_path) == set()


def test_notes_that_are_no_json_leave_what_was_there(tmp_path):
    model = saved(tmp_path / "model")
    with pytest.raises(HHBenchError, match="couldn't be written: TypeError"):
        models.save(model, tmp_path / "model", notes={"bad": object()})
    assert torch.equal(answer(models.load(tmp_path / "model")), answer(model))
    assert names(tmp_path) == {"model"}


# --- bad folders ---


@every_host
def test_damaged_weights_are_noticed(host, tmp_path):
    saved(tmp_path, host)
    weights = tmp_path / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(HHBenchError, match="are missing or damaged"):
        models.load(tmp_path)
    weights.write_bytes(content[:1000])
    with pytest.raises(HHBenchError, match="missing or damaged"):
        models.load(tmp_path)
    weights.unlink()
    with pytest.raises(HHBenchError, match="missing or damaged"):
        models.load(tmp_path)


def test_a_folder_without_a_manifest_is_no_model(tmp_path):
    with pytest.raises(HHBenchError, match=r"hhbench\.json is missing"):
        models.load(tmp_path / "nothing")
    assert not models.is_converted(tmp_path / "nothing")
    saved(tmp_path)
    (tmp_path / "hhbench.json").unlink()
    with pytest.raises(HHBenchError, match=r"hhbench\.json is missing"):
        models.load(tmp_path)
    assert models.is_converted(tmp_path)  # its config says so


TEXTS = ["", "{", "[]", "7", "null", '{"schema": 1}', '{"schema": 3}', "{}", '{"schema": 2}', "\xff"]


@pytest.mark.parametrize("text", TEXTS)
def test_a_manifest_that_can_t_be_read_is_named(text, tmp_path):
    saved(tmp_path)
    (tmp_path / "hhbench.json").write_bytes(text.encode("latin-1"))
    with pytest.raises(HHBenchError, match=r"hhbench\.json"):
        models.load(tmp_path)


def test_a_folder_of_an_earlier_hhbench_says_what_to_do(tmp_path):
    saved(tmp_path)
    edit(tmp_path, schema=1)
    with pytest.raises(HHBenchError, match="schema 1, and this hhbench reads 2: delete that folder and make it again"):
        models.load(tmp_path)


@pytest.mark.parametrize("host", [{}, [], {"library": "jax", "name": "x"}, {"name": "LlamaForCausalLM"}])
def test_a_manifest_of_a_host_that_can_t_be_built(host, tmp_path):
    saved(tmp_path)
    edit(tmp_path, host=host)
    with pytest.raises(HHBenchError):
        models.load(tmp_path)


@pytest.mark.parametrize("name", ["LlamaConfig", "NoSuchModel", "pipeline"])
def test_a_manifest_builds_nothing_but_models(name, tmp_path):
    saved(tmp_path)
    edit(tmp_path, host={"library": "transformers", "name": name})
    with pytest.raises(UsageError, match=f"no model class '{name}'"):
        models.load(tmp_path)


@pytest.mark.parametrize("arguments", [{"checkpoint_path": "/tmp/x.pth"}, {"pretrained": True}])
def test_a_manifest_of_timm_loads_nothing_else(arguments, tmp_path):
    saved(tmp_path, "timm")
    host = models.manifest(tmp_path)["host"]
    edit(tmp_path, host=host | {"arguments": host["arguments"] | arguments})
    with pytest.raises(UsageError, match="is not taken from a manifest"):
        models.load(tmp_path)


@every_host
def test_weights_that_don_t_fit_are_named(host, tmp_path):
    saved(tmp_path, host)
    path = tmp_path / ("config.json" if host == "llama" else "hhbench.json")
    for old, new in (
        ('"hedgehog"', '"t2r"'),
        ('"num_hidden_layers": 2', '"num_hidden_layers": 3'),
        ('"depth": 2', '"depth": 3'),
    ):
        said = path.read_text()
        if old in said:
            path.write_text(said.replace(old, new))
            with pytest.raises(HHBenchError, match="doesn't fit the model") as caught:
                models.load(tmp_path)
            assert "\n" not in str(caught.value)
            path.write_text(said)


# --- users' own attentions ---

MINE = """
from hhbench.attention import FeatureMap
class Mine(FeatureMap):
    def forward(self, x):
        return x.exp()
class Other(FeatureMap):
    def forward(self, x):
        return x.square() + 0.1
"""


@every_host
def test_a_folder_does_not_decide_what_code_runs(host, tmp_path, caplog):
    source = tmp_path / "mine.py"
    source.write_text(MINE)
    attn = f"{source}:Mine"
    model = saved(tmp_path / "model", host, attn=attn)
    with pytest.raises(UsageError, match=r"hhbench\.load\(folder, attn=") as caught:
        models.load(tmp_path / "model")
    assert "\n" not in str(caught.value)
    if host == "llama":
        with pytest.raises(UsageError, match=r"hhbench\.load\(folder, attn="):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        assert torch.equal(answer(models.load(tmp_path / "model", attn=attn)), answer(model))
    assert not caplog.records
    layer = models.manifest(tmp_path / "model")["layers"][0]
    assert layer["own"]["class"] == "mine.py:Mine"
    assert len(layer["own"]["sha256"]) == 64


@every_host
def test_another_source_than_it_was_converted_with_is_a_warning(host, tmp_path, caplog):
    (tmp_path / "mine.py").write_text(MINE)
    (tmp_path / "changed.py").write_text(MINE + "# changed\n")
    model = saved(tmp_path / "model", host, attn=f"{tmp_path / 'mine.py'}:Mine")
    with caplog.at_level(logging.WARNING):
        other = models.load(tmp_path / "model", attn=f"{tmp_path / 'changed.py'}:Mine")
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "mine.py:Mine has changed" in caplog.text
    assert torch.equal(answer(other), answer(model))


def test_several_attentions_of_a_user_are_told_apart(tmp_path):
    source = tmp_path / "mine.py"
    source.write_text(MINE)
    model = hosts.convert(llama(), f"{source}:Mine", layers={1: (f"{source}:Other", {})}).eval()
    models.save(model, tmp_path / "model")
    with pytest.raises(UsageError, match=r"\['mine.py:Mine', 'mine.py:Other'\]"):
        models.load(tmp_path / "model", attn=f"{source}:Mine")
    given = {name: f"{source}:{name.split(':')[1]}" for name in ("mine.py:Mine", "mine.py:Other")}
    assert torch.equal(answer(models.load(tmp_path / "model", attn=given)), answer(model))


def test_attn_is_for_users_own_alone(tmp_path):
    saved(tmp_path)
    with pytest.raises(UsageError, match="leave attn='t2r' out"):
        models.load(tmp_path, attn="t2r")


@pytest.mark.parametrize("name", ["os.path:join", "/tmp/evil.py:Evil", "evil.Evil"])
def test_a_name_in_a_config_imports_nothing(name, tmp_path):
    saved(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(path.read_text().replace('"hedgehog"', json.dumps(name)))
    with pytest.raises(UsageError, match="which a folder may not import"):
        tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    with pytest.raises(UsageError, match="which a folder may not import"):
        models.load(tmp_path)


# --- building ---


def test_gpt2_by_its_measures():
    model = models.gpt2("gpt2-3x24x2", vocab=11, max_len=16, dropout=0.25)
    config = model.config
    assert (config.n_layer, config.n_embd, config.n_head, config.vocab_size, config.n_positions) == (3, 24, 2, 11, 16)
    assert {layer.shape.dropout for layer in hosts.host_layers(model)} == {0.25}
    for name in ("gpt2-2x64", "gpt2-2x64x2x1", "gpt3-2x64x2", "gpt2-2x64x3", "gpt2-0x64x2", "gpt2-2x64x0"):
        with pytest.raises(UsageError, match=name):
            models.gpt2(name, vocab=11, max_len=16, dropout=0.0)


def test_a_transformers_model_of_a_folder(tmp_path):
    original = tf.BertForMaskedLM(tf.BertConfig(**TEXT)).eval()
    original.save_pretrained(tmp_path)
    model = models.transformers_model(tf.AutoModelForMaskedLM, str(tmp_path), pretrained=True, dropout=0.3).eval()
    assert torch.equal(answer(model), answer(original))
    assert (model.config.hidden_dropout_prob, model.config.attention_probs_dropout_prob) == (0.3, 0.3)
    fresh = models.transformers_model(
        tf.AutoModelForMaskedLM, str(tmp_path), pretrained=False, dropout=0.0, num_hidden_layers=1
    ).eval()
    assert len(hosts.host_layers(fresh)) == 1
    assert not torch.equal(answer(fresh), answer(original))
    assert models.weights_hash(str(tmp_path.rename(tmp_path.with_name("mine")))).keys() == {"mine"}


def load_as_teacher(folder: Path) -> nn.Module:
    return models.transformers_model(tf.AutoModelForMaskedLM, str(folder), pretrained=True, dropout=0.0)


def test_pickled_weights_are_not_read(tmp_path):
    model = tf.BertForMaskedLM(tf.BertConfig(**TEXT))
    model.config.save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"has no weights: there is no \.safetensors"):
        load_as_teacher(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(DataError, match=r"pickled weights alone \(pytorch_model\.bin\), which can run code"):
        load_as_teacher(tmp_path)


def test_a_folder_without_a_config_is_no_teacher(tmp_path):
    tf.BertForMaskedLM(tf.BertConfig(**TEXT)).save_pretrained(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(DataError, match=r"holds no model: it has no config\.json"):
        load_as_teacher(tmp_path)


@every_host
def test_a_converted_folder_is_no_teacher(host, tmp_path):
    saved(tmp_path, host)
    with pytest.raises(UsageError, match="holds a converted model"):
        load_as_teacher(tmp_path)


def test_a_model_that_isn_t_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    with pytest.raises(DataError, match="can't be loaded") as caught:
        load_as_teacher(tmp_path / "nothing")
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match="Did you mean 'vit_tiny_patch16_224'"):
        models.timm_model("vit_tiny_patch16_225", pretrained=False)


@every_host
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_aren_t_finite_are_named(host, value):
    model = HOSTS[host]()
    models.check_finite(model)
    name, parameter = list(model.named_parameters())[3]
    with torch.no_grad():
        parameter.view(-1)[1] = value
    with pytest.raises(HHBenchError, match=f"^{name} of .* isn't finite"):
        models.check_finite(model)
