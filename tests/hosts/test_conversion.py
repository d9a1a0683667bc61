"""The plan of a conversion: what is replaced, what is kept and why, what is refused before anything changes."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import timm
import tiny
import torch
import transformers as tf
from tiny import GROUPED, IMAGE, VOCAB
from torch import Tensor, nn

from hhbench import hosts
from hhbench.attention import ATTENTIONS, FeatureMap, _spec
from hhbench.errors import UsageError

PAD = 1
TEXT = tiny.TEXT | {"num_hidden_layers": 4, "max_position_embeddings": 4096, "pad_token_id": PAD}
DECODER = TEXT | GROUPED
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 8,
    "q_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 2,
    "num_experts_per_tok": 1,
}
HEDGEHOG = 2 * 4 * 8 * 8  # parameters of one layer: two maps of 4 heads, 8 x 8 each


def llama(**settings: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | settings))


def mistral(window: int, **settings: Any) -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**DECODER | settings, sliding_window=window))


def qwen2() -> nn.Module:
    """A model of two kinds of layers: the first sees everything, the others 16 tokens."""
    return tf.Qwen2ForCausalLM(
        tf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=16, max_window_layers=1)
    )


def bart() -> nn.Module:
    return tf.BartForConditionalGeneration(
        tf.BartConfig(
            vocab_size=VOCAB,
            d_model=32,
            encoder_layers=2,
            decoder_layers=3,
            encoder_attention_heads=4,
            decoder_attention_heads=4,
            encoder_ffn_dim=48,
            decoder_ffn_dim=48,
            max_position_embeddings=64,
        )
    )


def given(model: nn.Module) -> list[str]:
    return [slot.placement.attention for slot in hosts.slots(model).values()]


def logits(model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(*args, **inputs)
    return out if isinstance(out, Tensor) else out.logits


# --- the plan ---


def test_a_plan_says_what_a_conversion_does():
    model = llama()
    before = sum(parameter.numel() for parameter in model.parameters())
    plan = hosts.plan_conversion(model, "hedgehog", keep_layers=[0, -1], layers={1: ("t2r", {})})
    assert [layer.spec.name for layer in plan.layers] == ["softmax", "t2r", "hedgehog", "softmax"]
    assert [layer.kept for layer in plan.layers] == ["--keep-layers", "", "", "--keep-layers"]
    assert [layer.layer.name for layer in plan.layers] == [f"model.layers.{i}.self_attn" for i in range(4)]
    assert plan.carry_out() is model
    assert given(model) == ["softmax", "t2r", "hedgehog", "softmax"]
    assert sum(parameter.numel() for parameter in model.parameters()) - before == plan.params > HEDGEHOG


def test_a_plan_in_words():
    shape = "4 heads on 2 key-value heads of width 8, causal"
    plan = hosts.plan_conversion(llama(), "hedgehog", keep_layers=[0, 1])
    assert plan.lines() == [
        f"layers 2-3 of 4 get hedgehog: {shape}; adds {2 * HEDGEHOG:,} parameters",
        "layers 0-1: --keep-layers: kept as softmax",
    ]
    plan = hosts.plan_conversion(qwen2(), "elu", layers={0: ("hedgehog", {"activation": "exp"})})
    assert plan.lines() == [
        f"layer 0 of 4 gets hedgehog[activation=exp]: {shape}; adds {HEDGEHOG:,} parameters",
        "layers 1-3: a sliding window of 16 tokens, shorter than the 4,096 in use: kept as softmax",
    ]
    plan = hosts.plan_conversion(qwen2(), "elu", keep_layers=[2], context=16)
    assert plan.lines() == [
        f"layers 0-1, 3 of 4 get elu: {shape}; adds no parameters",
        "layer 2: --keep-layers: kept as softmax",
    ]
    plan = hosts.plan_conversion(bart(), "hedgehog")
    assert plan.lines() == [
        f"layers 0-1 of 5 get hedgehog: 4 heads of width 8, bidirectional; adds {2 * HEDGEHOG:,} parameters",
        f"layers 2-4 of 5 get hedgehog: 4 heads of width 8, causal; adds {3 * HEDGEHOG:,} parameters",
        "cross-attention in 3 layers: kept as the library's softmax",
    ]
    assert "a mixer in place of the whole block of width 32" in hosts.plan_conversion(llama(), "hyena").lines()[0]


@pytest.mark.parametrize("build", [llama, qwen2, bart, lambda: timm.create_model("vit_tiny_patch16_224", depth=1)])
def test_making_a_plan_changes_nothing(build):
    model = build().train()
    list(model.modules())[-1].eval()
    modes, names = [module.training for module in model.modules()], list(dict(model.named_modules()))
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    hosts.plan_conversion(model, "performer").lines()
    assert torch.equal(torch.get_rng_state(), random)
    assert list(dict(model.named_modules())) == names
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert getattr(model.config, "_attn_implementation", "sdpa") == "sdpa" if hasattr(model, "config") else True


# --- layers of their own ---


def test_layers_may_take_other_attentions_with_options():
    class Half(FeatureMap):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., :4].exp()

    spec = _spec(Half, name="half", paper="none", cost="N F E")
    layers = {0: ("hedgehog-window", {"window": 3}), -1: (spec, {"share_kv_heads": True})}
    model = hosts.convert(llama(), "hedgehog", layers=layers, activation="exp")
    assert given(model) == ["hedgehog-window", "hedgehog", "hedgehog", "half"]
    options = [slot.placement.options for slot in hosts.slots(model).values()]
    assert options == [{"window": 3}, {"activation": "exp"}, {"activation": "exp"}, {"share_kv_heads": True}]
    assert logits(model, input_ids=torch.randint(2, VOCAB, (2, 9))).isfinite().all()


REFUSED_ARGUMENTS: dict[str, tuple[dict[str, Any], str]] = {
    "a layer too many": ({"layers": {4: ("elu", {})}}, "no layer 4 to give another attention: the model has 4"),
    "kept, and too many": ({"keep_layers": [-5]}, "no layer -5 to keep: the model has 4"),
    "given and kept": ({"layers": {1: ("elu", {})}, "keep_layers": [-3]}, "layer 1 is given an attention twice"),
    "given twice": ({"layers": {1: ("elu", {}), -3: ("relu", {})}}, "layer 1 is given an attention twice"),
    "an unknown name": ({"layers": {1: ("hedge", {})}}, "hedge"),
    "an unknown option": ({"layers": {1: ("elu", {"colour": 1})}}, "colour"),
    "an option that is none of it": ({"colour": 1}, "colour"),
}


@pytest.mark.parametrize("case", REFUSED_ARGUMENTS)
def test_what_cannot_be_planned_is_refused_before_anything_changes(case):
    arguments, message = REFUSED_ARGUMENTS[case]
    model = llama()
    for action in (hosts.plan_conversion, hosts.convert):
        with pytest.raises(UsageError, match=message) as caught:
            action(model, "hedgehog", **arguments)
        assert "\n" not in str(caught.value)
    assert not hosts.placements(model)
    assert model.config._attn_implementation == "sdpa"


# --- windows and the context ---


@pytest.mark.parametrize(("context", "kept"), [(None, True), (17, True), (16, False), (3, False)])
def test_a_window_is_kept_where_it_is_shorter_than_the_context(context, kept):
    model = hosts.convert(qwen2(), "hedgehog", context=context)
    assert given(model) == ["hedgehog"] + (["softmax-window"] * 3 if kept else ["hedgehog"] * 3)
    if kept:
        assert [slot.placement.options for slot in hosts.slots(model).values()] == [{}] + [{"window": 16}] * 3
        # Known again, and converted after all where fewer tokens are in use.
        assert [layer.window for layer in hosts.host_layers(model)] == [None, 16, 16, 16]
        assert given(hosts.convert(model, "t2r", context=16)) == ["t2r"] * 4
    assert [layer.window for layer in hosts.host_layers(model)] == [None, 16, 16, 16]


def test_a_window_as_long_as_the_model_can_take_is_an_ordinary_layer():
    assert given(hosts.convert(mistral(64, max_position_embeddings=64), "hedgehog")) == ["hedgehog"] * 4


def test_nothing_but_short_windows_leaves_nothing_to_convert():
    with pytest.raises(UsageError, match=r"nothing to convert: each layer has a sliding window of 16 .* the 4,096"):
        hosts.convert(mistral(16), "hedgehog")
    assert given(hosts.convert(mistral(16), "softmax")) == ["softmax-window"] * 4
    assert given(hosts.convert(mistral(16), "hedgehog", context=16)) == ["hedgehog"] * 4


def test_a_short_window_takes_nothing_but_softmax():
    with pytest.raises(UsageError, match="layer 2 can't take elu: it has a sliding window of 16 tokens"):
        hosts.convert(qwen2(), "hedgehog", layers={2: ("elu", {})})
    assert given(hosts.convert(qwen2(), "hedgehog", keep_layers=[2])) == ["hedgehog"] + ["softmax-window"] * 3


# --- what a model may not have ---

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "soft cap": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8)), "a soft cap on the scores"),
    "sinks": (
        lambda: tf.GptOssForCausalLM(tf.GptOssConfig(**DECODER, head_dim=8, num_local_experts=2)),
        "attention sinks",
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "bias on (the|its) scores",
    ),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        "with a bias on its scores",
    ),
    "mpt": (
        lambda: tf.MptForCausalLM(tf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=2, n_heads=4)),
        "with a bias on its scores",
    ),
    "falcon": (
        lambda: tf.FalconForCausalLM(
            tf.FalconConfig(vocab_size=VOCAB, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=True)
        ),
        "with a bias on its scores",
    ),
    "deepseek v3": (
        lambda: tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DECODER | MLA, n_group=1, topk_group=1)),
        r"latent attention \(kv_lora_rank=8\)",
    ),
    "qwen3-next": (
        lambda: tf.Qwen3NextForCausalLM(
            tf.Qwen3NextConfig(**DECODER, head_dim=8, num_experts=2, num_experts_per_tok=1)
        ),
        r"hybrid with layers of linear_attention \(0-2\)",
    ),
    "lfm2": (
        lambda: tf.Lfm2ForCausalLM(
            tf.Lfm2Config(**DECODER, layer_types=["conv", "full_attention", "conv", "full_attention"])
        ),
        r"hybrid with layers of conv \(0, 2\)",
    ),
    "jamba": (
        lambda: tf.JambaForCausalLM(
            tf.JambaConfig(**DECODER, num_experts=2, attn_layer_period=2, attn_layer_offset=1, use_mamba_kernels=False)
        ),
        r"hybrid with layers of \w+ \(0, 2\)",
    ),
    "granite": (
        lambda: tf.GraniteMoeHybridForCausalLM(
            tf.GraniteMoeHybridConfig(**DECODER | MAMBA, layer_types=["mamba", "attention"] * 2, num_local_experts=2)
        ),
        r"hybrid with layers of \w+ \(0, 2\)",
    ),
    "recurrent gemma": (
        lambda: tf.RecurrentGemmaForCausalLM(tf.RecurrentGemmaConfig(**TEXT)),
        r"hybrid with layers of \w+ \(0-1, 3\)",
    ),
    "llama 4": (
        lambda: tf.Llama4ForCausalLM(
            tf.Llama4TextConfig(
                **DECODER, head_dim=8, attention_chunk_size=8, num_local_experts=2, intermediate_size_mlp=48
            )
        ),
        "chunks or blocks of 8 tokens",
    ),
    "phi-moe": (
        lambda: tf.PhimoeForCausalLM(tf.PhimoeConfig(**DECODER, sliding_window=6, num_local_experts=2)),
        "PhimoeAttention says that it is causal, and its mask is causal with a window of 6 tokens",
    ),
    "albert": (
        lambda: tf.AlbertForMaskedLM(tf.AlbertConfig(**TEXT, embedding_size=32)),
        "runs one attention layer several times",
    ),
}


@pytest.mark.parametrize("host", REFUSED)
def test_what_cannot_be_a_host_is_refused_with_the_reason(host):
    build, message = REFUSED[host]
    model = build().train()
    implementation, names = model.config._attn_implementation, list(dict(model.named_modules()))
    with pytest.raises(UsageError, match=message) as caught:
        hosts.convert(model, "hedgehog")
    assert str(caught.value).startswith(f"{type(model).__name__} can't be a host: ")
    assert "\n" not in str(caught.value)
    assert model.config._attn_implementation == implementation
    assert list(dict(model.named_modules())) == names
    assert all(module.training for module in model.modules())


def test_values_of_another_width_than_keys_are_refused_whatever_the_config_says():
    model = tf.DeepseekV3ForCausalLM(tf.DeepseekV3Config(**DECODER | MLA, n_group=1, topk_group=1))
    model.config.kv_lora_rank = 0
    with pytest.raises(UsageError, match="latent attention, or the like: keys of width 8 and values of 6"):
        hosts.convert(model, "hedgehog")


# --- vision ---

IMAGES: dict[str, tuple[Callable[[], nn.Module], int, int]] = {  # the model, pixels on a side, tokens
    "vit": (lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)), 16, 17),
    "deit": (lambda: tf.DeiTForImageClassification(tf.DeiTConfig(**IMAGE)), 16, 18),
    "dinov2": (lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE)), 16, 17),
    "dinov2 with registers": (
        lambda: tf.Dinov2WithRegistersForImageClassification(tf.Dinov2WithRegistersConfig(**IMAGE)),
        16,
        21,
    ),
    "timm vit": (lambda: _timm("vit_tiny_patch16_224"), 32, 17),
    "timm deit": (lambda: _timm("deit_tiny_patch16_224"), 32, 17),
    "timm distilled deit": (lambda: _timm("deit_tiny_distilled_patch16_224"), 32, 18),
    "timm dinov2": (lambda: _timm("vit_small_patch14_dinov2"), 32, 17),
    "timm dinov2 with registers": (lambda: _timm("vit_small_patch14_reg4_dinov2"), 32, 21),
}


def _timm(name: str) -> nn.Module:
    return timm.create_model(name, img_size=32, patch_size=8, depth=2, embed_dim=32, num_heads=4, num_classes=5)


@pytest.mark.parametrize("host", IMAGES)
def test_an_image_model_is_a_host(host):
    build, side, num_tokens = IMAGES[host]
    model = build().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
            elif parameter.ndim == 1 and float(parameter.abs().max()) < 1e-3:  # a layer scale that hides its block
                parameter.add_(0.5)
    x = torch.randn(2, 3, side, side)
    expected = logits(model, x)
    assert expected.std() > 0.01
    assert [layer.shape.max_len for layer in hosts.host_layers(model)] == [num_tokens] * 2
    softmax = hosts.convert(copy.deepcopy(model), "softmax")
    torch.testing.assert_close(logits(softmax, x), expected, atol=1e-5, rtol=0)
    assert (logits(hosts.convert(model, "hedgehog"), x) - expected).abs().max() > 1e-3
    assert given(model) == ["hedgehog"] * 2


def test_all_attentions_of_the_registry_can_be_planned():
    model = llama()
    for name in ATTENTIONS.names():
        plan = hosts.plan_conversion(model, name, context=64)
        assert len(plan.layers) == 4
        assert plan.lines()[0].startswith(f"layers 0-3 of 4 get {name}: ")


def test_a_placement_knows_whether_its_layer_is_what_it_was():
    def told(model: nn.Module) -> list[bool]:
        return [placement.is_softmax for placement in hosts.placements(model)]

    assert told(hosts.convert(qwen2(), "softmax")) == [True] * 4
    assert told(hosts.convert(qwen2(), "hedgehog")) == [False, True, True, True]
    # A window that the host didn't have is another attention.
    assert told(hosts.convert(llama(), "softmax-window", window=8)) == [False] * 4
    assert told(hosts.convert(llama(), "softmax-window")) == [False] * 4
    assert told(hosts.convert(qwen2(), "softmax-window", window=8, context=16)) == [False] * 4
    assert told(hosts.convert(bart(), "elu")) == [False, False] + [False, True] * 3
