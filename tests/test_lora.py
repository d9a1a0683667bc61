"""Low-rank finetuning: which weights it trains in which family, and that merging leaves the model that was trained."""

import copy
import logging
import sys
from collections.abc import Callable
from typing import Any

import pytest
import timm
import tiny
import torch
import transformers as tf
from tiny import GROUPED, TIMM, VOCAB
from torch import Tensor, nn

from hhbench import hosts, models
from hhbench.config import RunConfig
from hhbench.errors import HHBenchError, UsageError
from hhbench.lora import LoraSettings, inject, merge
from hhbench.task import TASKS
from hhbench.train import Schedule, TrainStage, fit, loader, parameter_groups

TEXT = tiny.TEXT | {"pad_token_id": 0}
DECODER = TEXT | GROUPED
DISTILBERT = {"vocab_size": VOCAB, "dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 48, "pad_token_id": 0}
GPT2 = {
    "vocab_size": VOCAB, "n_positions": 64, "n_layer": 2, "n_embd": 32, "n_head": 4, "bos_token_id": None,
    "eos_token_id": None,
}  # fmt: skip
IMAGE = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "mlp_ratio": 2, "image_size": 32,
    "patch_size": 8,
}  # fmt: skip
SETTINGS = LoraSettings.parse("r=4,targets=qkvo")
SCHEDULE = Schedule(lr=1e-2, epochs=1.0, weight_decay=0.1, beta2=0.999, warmup=0.1, clip=0.0)


def llama(**settings: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | settings))


def vit() -> nn.Module:
    model: nn.Module = models.timm_model("vit_tiny_patch16_224", pretrained=False, **TIMM)
    return model


FAMILIES: dict[str, Callable[[], nn.Module]] = {
    "bert": lambda: tf.BertForSequenceClassification(tf.BertConfig(**TEXT, num_labels=3)),
    "bert-mlm": lambda: tf.BertForMaskedLM(tf.BertConfig(**TEXT)),
    "roberta": lambda: tf.RobertaForSequenceClassification(tf.RobertaConfig(**TEXT, num_labels=3)),
    "distilbert": lambda: tf.DistilBertForSequenceClassification(tf.DistilBertConfig(**DISTILBERT, num_labels=3)),
    "gpt2": lambda: tf.GPT2LMHeadModel(tf.GPT2Config(**GPT2)),
    "llama": llama,
    "llama-tied": lambda: llama(tie_word_embeddings=True),
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=16)),
    "mistral": lambda: tf.MistralForCausalLM(tf.MistralConfig(**DECODER)),
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE, intermediate_size=48, num_labels=3)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE, num_labels=3)),
    "timm": vit,
}
HEADS = {  # the parameters of new heads, by the beginning of their names
    "bert": "classifier.",
    "roberta": "classifier.",
    "distilbert": ("pre_classifier.", "classifier."),
    "vit": "classifier.",
    "dinov2": "classifier.",
    "timm": "head.",
}
INPUT = torch.Generator().manual_seed(7)
IDS, PIXELS = torch.randint(1, VOCAB, (3, 9), generator=INPUT), torch.randn(3, 3, 32, 32, generator=INPUT)


def make(family: str, attn: str = "hedgehog", **options: Any) -> nn.Module:
    model = FAMILIES[family]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(4)  # random models barely attend
    return hosts.convert(model, attn, **options).eval()


def logits(model: nn.Module) -> Tensor:
    vision = not isinstance(model, tf.PreTrainedModel) or model.main_input_name == "pixel_values"
    out = model(PIXELS if vision else IDS)
    return out if isinstance(out, Tensor) else out.logits


def train(model: nn.Module, *, steps: int = 2) -> None:
    """Some steps towards other logits. The first leaves the adapters' random half where it is: the other is zero."""
    optimizer = torch.optim.AdamW(parameter_groups(model, model.parameters(), SCHEDULE))
    model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (logits(model) - 1).square().mean().backward()
        optimizer.step()
    model.eval()


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def shape_of(model: nn.Module) -> Any:
    """What merging must give back."""
    return (
        type(model),
        [(name, type(module), module.training) for name, module in model.named_modules()],
        [(name, tensor.shape) for name, tensor in model.state_dict().items()],
        [(name, parameter.requires_grad) for name, parameter in model.named_parameters()],
        set(model.__dict__),
    )


@pytest.mark.parametrize("text, canonical", [
    ("r=8,alpha=16,targets=qkvo", "r=8,alpha=16,targets=qkvo"),
    ("r=4", "r=4,alpha=8,targets=qkvo"),
    ("targets=vq", "r=8,alpha=16,targets=qv"),
    ("dropout=0.1, alpha=0.5,r=2,targets=mo", "r=2,alpha=0.5,targets=om,dropout=0.1"),
    ("alpha=32", "r=8,alpha=32,targets=qkvo"),
])  # fmt: skip
def test_settings_are_read_and_written(text, canonical):
    settings = LoraSettings.parse(text)
    assert str(settings) == canonical
    assert LoraSettings.parse(canonical) == settings


@pytest.mark.parametrize("text, complaint", [
    ("", "'' is not a part of that"),
    ("rank=8", "'rank=8' is not a part of that"),
    ("r=8,r=4", "'r=4' is not a part of that"),
    ("r=", "'r=' is not a part of that"),
    ("r=big", "'big' is no number for r"),
    ("r=1.5", "'1.5' is no number for r"),
    ("r=0", "r of 1 or more"),
    ("alpha=nan", "alpha above 0"),
    ("alpha=-1", "alpha above 0"),
    ("dropout=1", "dropout from 0 to below 1"),
    ("targets=qx", "letters of qkvom, not 'qx'"),
])  # fmt: skip
def test_bad_settings_are_refused(text, complaint):
    with pytest.raises(UsageError, match=complaint):
        LoraSettings.parse(text)


BERT_PARTS = "attention.self.query attention.self.key attention.self.value attention.output.dense"
BERT_MLP = "intermediate.dense output.dense"
LLAMA_PARTS = "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
LLAMA_MLP = "mlp.gate_proj mlp.up_proj mlp.down_proj"
VIT_PARTS = LLAMA_PARTS.replace("self_attn", "attention")
PARTS = {
    "bert": {f"{BERT_PARTS} {BERT_MLP}"},
    "bert-mlm": {f"{BERT_PARTS} {BERT_MLP}"},
    "roberta": {f"{BERT_PARTS} {BERT_MLP}"},
    "distilbert": {"attention.q_lin attention.k_lin attention.v_lin attention.out_lin ffn.lin1 ffn.lin2"},
    "gpt2": {"attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"},
    "llama": {f"{LLAMA_PARTS} {LLAMA_MLP}"},
    "llama-tied": {f"{LLAMA_PARTS} {LLAMA_MLP}"},
    "qwen3": {f"{LLAMA_PARTS} {LLAMA_MLP}"},
    "mistral": {f"{LLAMA_PARTS} {LLAMA_MLP}"},
    "vit": {f"{VIT_PARTS} mlp.fc1 mlp.fc2"},
    # transformers before 5.24 writes it as BERT
    "dinov2": {f"{VIT_PARTS} mlp.fc1 mlp.fc2", f"{BERT_PARTS} mlp.fc1 mlp.fc2".replace(".self", ".attention")},
    "timm": {"attn.qkv attn.proj mlp.fc1 mlp.fc2"},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_projections_of_every_family_are_found(family):
    adapted = inject(make(family), LoraSettings.parse("targets=qkvom"), train_maps=False)
    for layer in range(2):
        within = {name.split(f".{layer}.", 1)[1] for name in adapted if f".{layer}." in name}
        assert within in [set(parts.split()) for parts in PARTS[family]]
    assert len(adapted) == 2 * len(within)


@pytest.mark.parametrize("train_maps", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_training_changes_what_it_should(family, train_maps):
    model = make(family)
    expected = logits(model)
    adapted = inject(model, SETTINGS, train_maps=train_maps)
    assert torch.equal(logits(model), expected)  # adapters start as nothing
    before = weights(model)
    train(model)
    changed = {name for name, tensor in weights(model).items() if not torch.equal(tensor, before[name])}
    wanted = {f"{name}.lora_{half}.default.weight" for name in adapted for half in "AB"}
    wanted |= {name for name in before if name.startswith(HEADS.get(family, ()))}
    wanted |= {name for name in before if train_maps and ".hhbench_slot." in name}
    assert changed == wanted
    assert len(adapted) == 2 * (2 if family in ("gpt2", "timm") else 4)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_model_is_the_trained_one_and_comes_back(family, tmp_path):
    model = make(family)
    whole = shape_of(model)
    untrained = logits(model)
    inject(model, SETTINGS, train_maps=True)
    train(model, steps=5)
    unmerged = logits(model)
    assert (unmerged - untrained).abs().max() > 0.1
    merge(model)
    merged = logits(model)
    assert (merged - unmerged).abs().max() < 1e-4
    assert shape_of(model) == whole
    models.save(model, tmp_path / "model")
    back = models.load(tmp_path / "model")
    assert torch.equal(logits(back), merged)


def test_tied_embeddings_stay_tied_and_untouched():
    model = make("llama-tied")
    before = model.get_input_embeddings().weight.detach().clone()
    inject(model, SETTINGS, train_maps=True)
    train(model)
    merge(model)
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert torch.equal(model.lm_head.weight, before)
    assert model.config.tie_word_embeddings


def test_kept_layers_are_adapted_too_and_a_softmax_model():
    model = make("llama", keep_layers=[0])
    assert len(inject(model, LoraSettings.parse("targets=qv"), train_maps=True)) == 4
    softmax = make("llama", "softmax")
    assert inject(softmax, LoraSettings.parse("targets=o"), train_maps=True) == [
        "model.layers.0.self_attn.o_proj",
        "model.layers.1.self_attn.o_proj",
    ]


def test_what_was_frozen_stays_frozen():
    model = make("bert")
    for parameter in model.classifier.parameters():
        parameter.requires_grad_(False)
    whole = shape_of(model)
    inject(model, SETTINGS, train_maps=True)
    before = weights(model)
    train(model)
    assert torch.equal(model.classifier.weight, before["classifier.weight"])
    merge(model)
    assert shape_of(model) == whole


def test_trials_start_alike_from_a_copy_of_the_weights():
    """What --tune does: the same start for every learning rate, and the best trial's weights at the end."""
    model = make("llama")
    inject(model, SETTINGS, train_maps=True)
    start = copy.deepcopy(model.state_dict())
    train(model)
    first, best = logits(model), copy.deepcopy(model.state_dict())
    model.load_state_dict(start)
    train(model)
    assert torch.equal(logits(model), first)
    train(model)
    model.load_state_dict(best)
    assert torch.equal(logits(model), first)


def test_a_copy_merges_by_itself():
    model = make("timm")
    inject(model, SETTINGS, train_maps=True)
    train(model)
    trained = logits(model)
    twin = copy.deepcopy(model)
    merge(twin)
    assert torch.equal(logits(model), trained)
    assert (logits(twin) - trained).abs().max() < 1e-4
    with pytest.raises(UsageError, match="has no adapters to merge"):
        merge(twin)
    merge(model)
    assert torch.equal(logits(model), logits(twin))


def test_adapters_are_a_function_of_the_seed_alone():
    def adapters(seed: int, drawn: int) -> Tensor:
        model = make("llama")
        torch.manual_seed(seed)
        torch.rand(drawn)
        state = torch.get_rng_state()
        inject(model, SETTINGS, train_maps=False)
        assert torch.equal(torch.get_rng_state(), state)
        return model.model.layers[0].self_attn.q_proj.lora_A["default"].weight

    assert torch.equal(adapters(3, 0), adapters(3, 5))
    assert not torch.equal(adapters(3, 0), adapters(4, 0))


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_lightning_trains_adapters(precision, tmp_path, caplog):
    task = TASKS.get("imagenet").build()
    config = RunConfig(
        task="imagenet", dataset="digits", attn="hedgehog", accelerator="cpu", logger="none", precision=precision,
        train_examples=64, test_examples=32, batch_size=16, regime="scratch",
    )  # fmt: skip
    config = config.filled(task.settings(config))
    data = task.load_data(config)
    model = hosts.convert(task.build_model(config, data), "hedgehog")
    whole = shape_of(model)
    with caplog.at_level(logging.INFO, "hhbench"):
        inject(model, LoraSettings.parse("r=2,dropout=0.1"), train_maps=True)
    assert "LoRA r=2,alpha=4,targets=qkvo,dropout=0.1 adapts 6 modules" in caplog.text
    before = weights(model)
    stage = TrainStage(task, model, data, config, SCHEDULE)
    report = fit(
        stage, loader(data.train, data, config, train=True), loader(data.validation, data, config, train=False),
        config, folder=tmp_path, title="LoRA",
    )  # fmt: skip
    assert report.steps >= 4
    trained = {name: not torch.equal(tensor, before[name]) for name, tensor in weights(model).items()}
    assert trained["blocks.0.attn.qkv.lora_B.default.weight"] and trained["head.weight"]
    assert not trained["blocks.0.attn.qkv.base_layer.weight"] and not trained["blocks.0.mlp.fc1.weight"]
    inputs = data.collate([data.train.examples[0]])["inputs"]
    with torch.no_grad():
        unmerged = model.eval()(**inputs)
        merge(model)
        assert (model(**inputs) - unmerged).abs().max() < 1e-4
    assert shape_of(model.train()) == whole


@pytest.mark.parametrize("family, text, complaint", [
    ("gpt2", "targets=qv", "projects q, k and v by one module, c_attn"),
    ("timm", "targets=ko", "projects q, k and v by one module, qkv"),
])  # fmt: skip
def test_a_part_of_a_fused_projection_is_refused(family, text, complaint):
    model = make(family)
    with pytest.raises(UsageError, match=complaint):
        inject(model, LoraSettings.parse(text), train_maps=True)
    assert inject(model, LoraSettings.parse("targets=o"), train_maps=True)


def test_what_is_missing_is_named(monkeypatch):
    model = make("bert")
    model.bert.encoder.layer[1].attention.output.dense = nn.Identity()
    before = shape_of(model)
    with pytest.raises(UsageError, match=r"encoder\.layer\.1\.attention\.self has no projection o that LoRA knows"):
        inject(model, SETTINGS, train_maps=True)
    assert shape_of(model) == before
    with pytest.raises(UsageError, match="no attention of hhbench"):
        inject(FAMILIES["bert"](), SETTINGS, train_maps=True)
    with pytest.raises(UsageError, match="no attention of hhbench"):
        inject(hosts.convert(timm.create_model("vit_tiny_patch16_224", **TIMM), "hyena"), SETTINGS, train_maps=True)
    with pytest.raises(UsageError, match="has no adapters to merge"):
        merge(model)
    inject(model, LoraSettings.parse("targets=qkv"), train_maps=True)
    with pytest.raises(UsageError, match="has adapters already"):
        inject(model, SETTINGS, train_maps=True)
    monkeypatch.setitem(sys.modules, "peft", None)  # what an absent package looks like
    with pytest.raises(UsageError, match=r"pip install 'hhbench\[convert\]'"):
        inject(make("bert"), SETTINGS, train_maps=True)


def test_a_broken_adapter_is_not_merged():
    model = make("llama")
    inject(model, SETTINGS, train_maps=True)
    model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data.fill_(float("nan"))
    with pytest.raises(HHBenchError, match=r"the adapter of model\.layers\.0\.self_attn\.q_proj can't be merged"):
        merge(model)
