"""Hosts: with softmax they stay the library's models, padding changes nothing, and what can't be hosted is named."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import timm
import tiny
import torch
import transformers as tf
from timm.layers import Attention as TimmAttention
from tiny import GROUPED, IMAGE, TIMM, VOCAB
from torch import Tensor, nn

from hhbench import hosts
from hhbench.attention import ATTENTIONS, MixerShape, OptimizerSettings, SequenceMixer, _spec
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import interface, probe

PAD = 1
TEXT = tiny.TEXT | {"pad_token_id": PAD}
DECODER = TEXT | GROUPED


def distilbert(**settings: Any) -> nn.Module:
    return tf.DistilBertForMaskedLM(
        tf.DistilBertConfig(
            vocab_size=VOCAB,
            dim=32,
            n_layers=2,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=64,
            pad_token_id=PAD,
            **settings,
        )
    )


def gpt2(**settings: Any) -> nn.Module:
    return tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCAB,
            n_positions=64,
            n_layer=2,
            n_embd=32,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            **settings,
        )
    )


def llama(**settings: Any) -> nn.Module:
    return tf.LlamaForCausalLM(tf.LlamaConfig(**DECODER | settings))


def bert(**settings: Any) -> nn.Module:
    return tf.BertForMaskedLM(tf.BertConfig(**TEXT | settings))


def mistral(**settings: Any) -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**DECODER | settings))


SHAPE = MixerShape(dim=32, num_heads=4, num_kv_heads=4, head_dim=8, scale=8**-0.5, max_len=64, causal=False)
ENCODERS: dict[str, Callable[[], nn.Module]] = {
    "bert": bert,
    "roberta": lambda: tf.RobertaForMaskedLM(tf.RobertaConfig(**TEXT)),
    "distilbert": distilbert,
}
DECODERS: dict[str, Callable[[], nn.Module]] = {
    "gpt2": gpt2,
    "llama": llama,
    "qwen3": lambda: tf.Qwen3ForCausalLM(tf.Qwen3Config(**DECODER, head_dim=16)),
    "mistral": lambda: mistral(sliding_window=64),
}
IMAGES: dict[str, Callable[[], nn.Module]] = {
    "vit": lambda: tf.ViTForImageClassification(tf.ViTConfig(**IMAGE)),
    "dinov2": lambda: tf.Dinov2ForImageClassification(tf.Dinov2Config(**IMAGE)),
    "timm-vit": lambda: timm.create_model("vit_tiny_patch16_224", **TIMM),
    "timm-deit": lambda: timm.create_model("deit_tiny_distilled_patch16_224", **TIMM),
}
HOSTS = ENCODERS | DECODERS | IMAGES
SHAPES = {
    "bert": replace(SHAPE, dropout=0.1),
    "roberta": replace(SHAPE, dropout=0.1),
    "distilbert": replace(SHAPE, dropout=0.1),
    "gpt2": replace(SHAPE, causal=True, dropout=0.1),
    "llama": replace(SHAPE, causal=True, num_kv_heads=2),
    "qwen3": replace(SHAPE, causal=True, num_kv_heads=2, head_dim=16, scale=0.25),
    "mistral": replace(SHAPE, causal=True, num_kv_heads=2),
    "vit": replace(SHAPE, max_len=17),
    "dinov2": replace(SHAPE, max_len=17),
    "timm-vit": replace(SHAPE, max_len=17),
    "timm-deit": replace(SHAPE, max_len=18),
}

every_host = pytest.mark.parametrize("host", HOSTS)


def images(name: str, batch: int = 2) -> Tensor:
    size = TIMM["img_size"] if name.startswith("timm") else IMAGE["image_size"]
    return torch.randn(batch, 3, size, size)


def logits(model: nn.Module, *args: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        out = model(*args, **inputs)
    return out if isinstance(out, Tensor) else out.logits


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform, and maps that are no identity."""
    added = {id(p) for p in hosts.attention_parameters(model)}
    with torch.no_grad():
        for parameter in model.parameters():
            if id(parameter) in added:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif parameter.ndim == 2:
                parameter.mul_(6)
    return model


def padded_batch(lengths: list[int], side: str, *, garbage: bool = False) -> tuple[list[Tensor], Tensor, Tensor]:
    """Sequences, the same padded on a side [B, N], and the mask int64 [B, N]."""
    sequences = [torch.randint(2, VOCAB, (length,)) for length in lengths]
    N = max(lengths) + 2
    ids, mask = torch.full((len(lengths), N), PAD), torch.zeros(len(lengths), N, dtype=torch.long)
    if garbage:
        ids = torch.randint(0, VOCAB, ids.shape)
    for row, sequence in enumerate(sequences):
        tokens = slice(N - len(sequence), N) if side == "left" else slice(0, len(sequence))
        ids[row, tokens], mask[row, tokens] = sequence, 1
    return sequences, ids, mask


# --- softmax changes nothing ---


@pytest.mark.parametrize("host", ENCODERS | DECODERS)
@pytest.mark.parametrize("side", ["none", "right", "left"])
def test_with_softmax_a_text_model_is_the_library_s_own(host, side):
    model = spread(HOSTS[host]()).eval()
    if side == "none":
        ids = torch.randint(2, VOCAB, (2, 9))
        inputs, mask = {"input_ids": ids}, torch.ones_like(ids)
    else:
        _, ids, mask = padded_batch([5, 9, 2], side)
        inputs = {"input_ids": ids, "attention_mask": mask}
        if host in DECODERS:
            inputs["position_ids"] = hosts.position_ids(mask)
    expected = logits(model, **inputs)
    found = logits(hosts.convert(model, "softmax"), **inputs)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert found.isfinite().all()
    assert expected.std() > 0.1  # not a comparison of zeros


@pytest.mark.parametrize("host", IMAGES)
def test_with_softmax_an_image_model_is_the_library_s_own(host):
    model, x = spread(IMAGES[host]()).eval(), images(host)
    expected = logits(model, x)
    torch.testing.assert_close(logits(hosts.convert(model, "softmax"), x), expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1


def test_a_timm_block_keeps_its_norms_and_its_gate():
    model = timm.create_model("vit_tiny_patch16_224", **TIMM, qk_norm=True, scale_attn_norm=True)
    for block in model.blocks:
        block.attn.gate = nn.Linear(32, 32)
    spread(model).eval()
    x = images("timm-vit")
    expected = logits(model, x)
    torch.testing.assert_close(logits(hosts.convert(model, "softmax"), x), expected, atol=1e-5, rtol=0)


@every_host
def test_another_attention_gives_another_output_and_gradients(host):
    """The comparisons above would pass for a conversion that does nothing."""
    model = spread(HOSTS[host]()).eval()
    inputs = {} if host in IMAGES else {"input_ids": torch.randint(2, VOCAB, (2, 9))}
    args = [images(host)] if host in IMAGES else []
    before = logits(model, *args, **inputs)
    hosts.convert(model, "hedgehog")
    out = model(*args, **inputs)
    out = out if isinstance(out, Tensor) else out.logits
    assert (out - before).abs().max() > 1e-3
    (out * torch.randn_like(out)).sum().backward()
    added = hosts.attention_parameters(model)
    assert len(added) == 2 * len(hosts.slots(model)) == 4
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in added)


# --- what is read off a host ---


@every_host
def test_the_shape_is_read_off_the_layers(host):
    model = HOSTS[host]()
    layers = hosts.host_layers(model)
    assert [layer.shape for layer in layers] == [SHAPES[host]] * 2
    modules = dict(model.named_modules())
    assert all(modules[layer.name] is layer.module for layer in layers)
    hosts.convert(model, "softmax")
    assert [layer.name for layer in hosts.host_layers(model)] == list(hosts.slots(model)) == [x.name for x in layers]
    assert [layer.shape for layer in hosts.host_layers(model)] == [SHAPES[host]] * 2


def test_scale_and_dropout_come_from_the_layer():
    unscaled = hosts.host_layers(gpt2(scale_attn_weights=False, attn_pdrop=0.3))[0].shape
    assert (unscaled.scale, unscaled.dropout) == (1.0, 0.3)
    by_layer = hosts.host_layers(gpt2(scale_attn_by_inverse_layer_idx=True))
    assert [layer.shape.scale for layer in by_layer] == pytest.approx([8**-0.5, 8**-0.5 / 2])
    vit = timm.create_model("vit_tiny_patch16_224", **TIMM, attn_drop_rate=0.2)
    assert hosts.host_layers(vit)[0].shape.dropout == 0.2


def test_layers_that_differ_keep_their_own_scale():
    model = spread(gpt2(scale_attn_by_inverse_layer_idx=True)).eval()
    ids = torch.randint(2, VOCAB, (2, 9))
    expected = logits(model, input_ids=ids)
    torch.testing.assert_close(logits(hosts.convert(model, "softmax"), input_ids=ids), expected, atol=1e-5, rtol=0)


# --- conversion leaves the rest alone ---


@every_host
@pytest.mark.parametrize("training", [True, False])
def test_looking_at_a_host_changes_nothing(host, training):
    model = HOSTS[host]().train(training)
    list(model.modules())[-1].train(not training)
    modes = [module.training for module in model.modules()]
    implementation = getattr(getattr(model, "config", None), "_attn_implementation", None)
    state = torch.get_rng_state()
    hosts.host_layers(model)
    assert torch.equal(torch.get_rng_state(), state)
    assert getattr(getattr(model, "config", None), "_attn_implementation", None) == implementation
    assert not hosts.slots(model)
    assert all(p.grad is None for p in model.parameters())
    assert [module.training for module in model.modules()] == modes


@every_host
@pytest.mark.parametrize("training", [True, False])
def test_conversion_draws_nothing_and_keeps_the_mode(host, training):
    model = HOSTS[host]().train(training)
    state = torch.get_rng_state()
    hosts.convert(model, "hedgehog")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(module.training == training for module in model.modules())


@pytest.mark.parametrize("host", ["deberta", "gemma2"])
def test_a_refused_model_is_left_as_it_was(host):
    model = REFUSED[host][0]().train()
    implementation, names = model.config._attn_implementation, dict(model.named_modules()).keys()
    with pytest.raises(UsageError):
        hosts.convert(model, "softmax")
    assert model.config._attn_implementation == implementation != probe.PROBE
    assert dict(model.named_modules()).keys() == names
    assert model.training
    model(input_ids=torch.randint(2, VOCAB, (1, 5)))


def test_a_conversion_that_fails_midway_changes_nothing(monkeypatch):
    model = bert()
    spec, built = ATTENTIONS.get("hedgehog"), []

    def build(self: Any, shape: MixerShape, **options: Any) -> nn.Module:
        built.append(shape)
        if len(built) == 2:
            raise UsageError("the second layer doesn't suit me")
        return original(self, shape, **options)

    original = type(spec).build
    monkeypatch.setattr(type(spec), "build", build)
    with pytest.raises(UsageError, match="second layer"):
        hosts.convert(model, "hedgehog")
    assert not hosts.slots(model)


def test_kept_layers_stay_softmax():
    ids = torch.randint(2, VOCAB, (2, 9))
    model = spread(bert(num_hidden_layers=3)).eval()
    expected = logits(model, input_ids=ids)
    kept = hosts.convert(copy.deepcopy(model), "hedgehog", keep_layers=[0, 1, -1])
    torch.testing.assert_close(logits(kept, input_ids=ids), expected, atol=1e-5, rtol=0)
    some = hosts.convert(copy.deepcopy(model), "hedgehog", keep_layers=[0, -1])
    names = [type(slot.attention).__name__ for slot in hosts.slots(some).values()]
    assert names == ["Softmax", "LinearAttention", "Softmax"]
    assert (logits(some, input_ids=ids) - expected).abs().max() > 1e-3
    for index in (3, -4):
        with pytest.raises(UsageError, match=f"no layer {index} to keep: the model has 3"):
            hosts.convert(bert(num_hidden_layers=3), "hedgehog", keep_layers=[index])


def test_a_converted_model_can_be_converted_again():
    ids = torch.randint(2, VOCAB, (2, 9))
    for build in (llama, IMAGES["timm-vit"]):
        model = spread(build()).eval()
        inputs = {"input_ids": ids} if build is llama else {"x": images("timm-vit")}
        expected = logits(model, **inputs)
        hosts.convert(model, "hedgehog")
        hosts.convert(model, "softmax")
        torch.testing.assert_close(logits(model, **inputs), expected, atol=1e-5, rtol=0)
        assert not hosts.attention_parameters(model)


@pytest.mark.parametrize("host", ["bert", "llama", "timm-vit"])
def test_a_deep_copy_is_independent(host):
    model = hosts.convert(HOSTS[host](), "hedgehog").eval()
    inputs = {"x": images(host)} if host in IMAGES else {"input_ids": torch.randint(2, VOCAB, (2, 9))}
    expected = logits(model, **inputs)
    other = copy.deepcopy(model)
    assert torch.equal(logits(other, **inputs), expected)
    with torch.no_grad():
        for parameter in hosts.attention_parameters(other):
            parameter.add_(torch.randn_like(parameter))
    for slot in hosts.slots(other).values():
        slot.interceptor = lambda slot, q, k, v, key_mask: torch.zeros_like(q)
    assert torch.equal(logits(model, **inputs), expected)
    assert (logits(other, **inputs) - expected).abs().max() > 1e-4
    hosts.convert(other, "softmax")
    assert [type(s.attention).__name__ for s in hosts.slots(model).values()] == ["LinearAttention"] * 2
    assert torch.equal(logits(model, **inputs), expected)


def test_new_layers_follow_the_host_s_training_mode():
    """Softmax's dropout is the host's: on in training, off in evaluation."""
    model = hosts.convert(bert(attention_probs_dropout_prob=0.5, hidden_dropout_prob=0.0), "softmax")
    ids = torch.randint(2, VOCAB, (2, 9))
    model.train()
    assert not torch.equal(logits(model, input_ids=ids), logits(model, input_ids=ids))
    model.eval()
    assert torch.equal(logits(model, input_ids=ids), logits(model, input_ids=ids))


# --- padding ---


@pytest.mark.parametrize("name", [name for name in ATTENTIONS.names() if ATTENTIONS.get(name).convertible])
@pytest.mark.parametrize("host", ["bert", "gpt2", "llama"])
def test_padding_changes_nothing_through_a_host(name, host):
    direction = "bidirectional" if host in ENCODERS else "causal"
    if direction not in ATTENTIONS.get(name).directions:
        pytest.skip(f"it has no {direction} form")
    model = spread(hosts.convert(HOSTS[host](), name)).double().eval()
    for lengths in ([5, 9, 1], [6]):
        for side in ("left", "right"):
            sequences, ids, mask = padded_batch(lengths, side, garbage=True)
            out = logits(model, input_ids=ids, attention_mask=mask, position_ids=hosts.position_ids(mask))
            assert out.isfinite().all()
            for row, sequence in enumerate(sequences):
                alone = logits(model, input_ids=sequence[None])[0]
                torch.testing.assert_close(out[row][mask[row].bool()], alone, atol=1e-10, rtol=1e-10)


def test_position_ids_count_attended_tokens():
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    expected = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 0, 1, 1], [0, 0, 0, 0]])
    assert torch.equal(hosts.position_ids(mask), expected)
    assert torch.equal(hosts.position_ids(mask.bool()), expected)


# --- refusals ---

REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "mpnet": (lambda: tf.MPNetModel(tf.MPNetConfig(**TEXT)), "MPNetModel .* computes its attention itself"),
    "deberta": (
        lambda: tf.DebertaV2Model(tf.DebertaV2Config(**TEXT)),
        "DebertaV2Model .* computes its attention itself",
    ),
    "gpt-neo": (
        lambda: tf.GPTNeoForCausalLM(
            tf.GPTNeoConfig(
                vocab_size=VOCAB,
                hidden_size=32,
                num_layers=2,
                attention_types=[[["global", "local"], 1]],
                num_heads=4,
                max_position_embeddings=64,
                bos_token_id=None,
                eos_token_id=None,
            )
        ),
        "GPTNeoForCausalLM .* computes its attention itself",
    ),
    "bloom": (
        lambda: tf.BloomForCausalLM(tf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=2, n_head=4)),
        "BloomForCausalLM .* computes its attention itself",
    ),
    "t5": (
        lambda: tf.T5ForConditionalGeneration(
            tf.T5Config(vocab_size=VOCAB, d_model=32, d_kv=8, d_ff=48, num_layers=1, num_heads=4)
        ),
        "T5ForConditionalGeneration .* bias on (the|its) scores",  # before 5.24 it computed its attention itself
    ),
    "gemma2": (lambda: tf.Gemma2ForCausalLM(tf.Gemma2Config(**DECODER, head_dim=8)), "Gemma2.* softcap"),
    "resnet": (lambda: timm.create_model("resnet10t"), "ResNet can't be a host.* no timm Attention layer"),
    "swin": (
        lambda: timm.create_model(
            "swin_tiny_patch4_window7_224",
            img_size=32,
            window_size=4,
            depths=(1, 1, 1, 1),
            embed_dim=16,
            num_heads=(1, 1, 1, 1),
        ),
        "SwinTransformer can't be a host",
    ),
    "plain module": (lambda: nn.Linear(3, 3), "Linear can't be a host"),
}


@pytest.mark.parametrize("host", REFUSED)
def test_what_cannot_be_a_host_is_named_with_the_reason(host):
    build, message = REFUSED[host]
    with pytest.raises(UsageError, match=message) as caught:
        hosts.convert(build(), "softmax")
    assert "\n" not in str(caught.value)


def test_a_subclass_of_timm_s_attention_is_refused():
    class Talking(TimmAttention):
        pass

    model = IMAGES["timm-vit"]()
    model.blocks[1].attn.__class__ = Talking
    with pytest.raises(UsageError, match=r"blocks\.1\.attn is a Talking"):
        hosts.convert(model, "softmax")
    assert not hosts.slots(model)


class Int8Linear(nn.Module):
    """As quantisers make them: int8 weights that are scaled while they are used."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.scale = float(linear.weight.detach().abs().max()) / 127
        self.weight = nn.Parameter((linear.weight.detach() / self.scale).round().to(torch.int8), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight.to(x.dtype) * self.scale).T


def test_quantised_weights_are_refused():
    model = llama()
    model.model.layers[1].self_attn.q_proj = Int8Linear(model.model.layers[1].self_attn.q_proj)
    with pytest.raises(UsageError, match=r"layers\.1\.self_attn has quantised weights \(torch\.int8\)"):
        hosts.convert(model, "hedgehog")
    assert not hosts.slots(model)


def test_a_layer_that_shows_no_weights_is_refused():
    """torch's own dynamic quantisation packs the weights out of sight."""

    class Packed(nn.Module):
        def __init__(self, linear: nn.Linear) -> None:
            super().__init__()
            self.packed = [linear.weight.detach()]

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.packed[0].T

    model = llama()
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(layer.self_attn, name, Packed(getattr(layer.self_attn, name)))
    with pytest.raises(UsageError, match="load the model unquantised"):
        hosts.convert(model, "hedgehog")


def test_more_tokens_than_a_window_that_was_converted_are_refused():
    model = hosts.convert(mistral(sliding_window=8), "softmax", context=8).eval()
    logits(model, input_ids=torch.randint(2, VOCAB, (1, 8)))
    for inputs in ({}, {"attention_mask": torch.tensor([[0] * 2 + [1] * 7])}, {"use_cache": False}):
        with pytest.raises(UsageError, match="window of 8 tokens"):
            logits(model, input_ids=torch.randint(2, VOCAB, (1, 9)), **inputs)


def test_decoding_past_a_window_that_was_converted_is_refused():
    model = hosts.convert(mistral(sliding_window=8), "hedgehog", context=8).eval()
    with pytest.raises(UsageError, match="window of 8 tokens"):
        model.generate(torch.randint(2, VOCAB, (1, 5)), max_new_tokens=8, do_sample=False)


@pytest.mark.parametrize("host", ["bert", "gpt2", "llama"])
def test_masks_that_are_no_padding_masks_are_refused(host):
    model = hosts.convert(HOSTS[host](), "softmax").eval()
    ids = torch.randint(2, VOCAB, (2, 5))
    with pytest.raises(UsageError, match=r"4-D mask \[2, 1, 5, 5\]"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 5, 5))


@pytest.mark.parametrize("host", ["gpt2", "llama"])
def test_packed_sequences_are_refused(host):
    model = hosts.convert(HOSTS[host](), "softmax").eval()
    ids, positions = torch.randint(2, VOCAB, (1, 5)), torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(UsageError, match="packed sequences"):
        model(input_ids=ids, position_ids=positions, use_cache=False)
    model(input_ids=ids, position_ids=torch.arange(5)[None], use_cache=False)


def test_an_unknown_keyword_is_refused_unless_it_is_none():
    model = hosts.convert(llama(), "softmax").eval()
    ids = torch.randint(2, VOCAB, (1, 5))
    with pytest.raises(UsageError, match="LlamaAttention passes alibi_slopes, which no attention"):
        model(input_ids=ids, alibi_slopes=torch.ones(4))
    layer = next(iter(hosts.host_layers(model))).module
    q, kv = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    for keyword in ("softcap", "s_aux", "head_mask", "anything"):
        with pytest.raises(UsageError, match=keyword):
            interface._attend(layer, q, kv, kv, None, **{keyword: 1.0})
        assert interface._attend(layer, q, kv, kv, None, **{keyword: None})[0].shape == (1, 5, 4, 8)


@pytest.mark.parametrize("host", ENCODERS | DECODERS)
def test_keywords_that_change_no_attention_are_taken(host):
    model = hosts.convert(HOSTS[host](), "softmax").eval()
    ids = torch.randint(2, VOCAB, (1, 5))
    out = model(input_ids=ids, output_hidden_states=True, output_attentions=True, return_dict=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.logits, model(input_ids=ids).logits)


def test_a_layer_called_otherwise_than_when_converted_is_refused():
    model = hosts.convert(llama(), "softmax").eval()
    layer = hosts.host_layers(model)[0].module
    q, kv = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    with pytest.raises(HHBenchError, match="is_causal=False"):
        interface._attend(layer, q, kv, kv, None, is_causal=False)
    with pytest.raises(HHBenchError, match="scales by 1"):
        interface._attend(layer, q, kv, kv, None, scaling=1.0)
    bare = llama()
    bare.set_attn_implementation(hosts.INTERFACE)
    with pytest.raises(HHBenchError, match=r"use hhbench\.convert"):
        bare(input_ids=torch.randint(2, VOCAB, (1, 5)))
    vit = hosts.convert(IMAGES["timm-vit"](), "softmax")
    with pytest.raises(UsageError, match="without a mask"):
        vit.blocks[0].attn(torch.randn(1, 4, 32), is_causal=True)


# --- decoding ---


@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
@pytest.mark.parametrize("host", ["llama", "gpt2"])
def test_generating_with_the_library_s_cache_changes_nothing(name, host):
    model = spread(hosts.convert(HOSTS[host](), name)).double().eval()
    _, ids, mask = padded_batch([5, 7, 2], "left")
    settings = {
        "max_new_tokens": 12,
        "do_sample": False,
        "pad_token_id": PAD,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    for inputs in ({"input_ids": ids, "attention_mask": mask}, {"input_ids": torch.randint(2, VOCAB, (2, 6))}):
        cached = model.generate(**inputs, **settings, use_cache=True)
        uncached = model.generate(**inputs, **settings, use_cache=False)
        assert torch.equal(cached.sequences, uncached.sequences)
        torch.testing.assert_close(torch.stack(cached.logits), torch.stack(uncached.logits), atol=1e-6, rtol=0)
        assert len(cached.sequences[:, -12:].unique()) > 3


def test_softmax_generates_what_the_library_generates():
    model = spread(llama()).double().eval()
    _, ids, mask = padded_batch([5, 7, 2], "left")
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(ids, **settings)
    assert torch.equal(hosts.convert(model, "softmax").generate(ids, **settings), expected)


def test_a_cache_of_fixed_size_is_refused():
    """Its keys reach past the last token: attending to them would be wrong in silence."""
    model = hosts.convert(llama(), "softmax").eval()
    with pytest.raises(UsageError, match="cache"):
        model.generate(
            torch.randint(2, VOCAB, (1, 5)), max_new_tokens=4, do_sample=False, cache_implementation="static"
        )


@pytest.mark.parametrize("host", ["bert", "llama"])
@pytest.mark.parametrize("name", ["softmax", "hedgehog"])
def test_output_attentions_are_the_attention_s_weights(host, name):
    model = spread(hosts.convert(HOSTS[host](), name)).eval()
    _, ids, mask = padded_batch([5, 7], "right")
    expected = []

    def watch(slot: hosts.AttentionSlot, q: Tensor, k: Tensor, v: Tensor, key_mask: Tensor | None) -> Tensor:
        expected.append(slot.attention.weights(q, k, key_mask=key_mask))
        return slot.attention(q, k, v, key_mask=key_mask)

    for slot in hosts.slots(model).values():
        slot.interceptor = watch
    with torch.no_grad():
        found = model(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(found) == 2
    for one, other in zip(found, expected, strict=True):
        assert one.shape == (2, 4, 9, 9)
        assert torch.equal(one, other)


# --- mixers replace whole blocks ---


class Mean(SequenceMixer):
    """The mean of the tokens that each may see, projected."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        self.projection = nn.Linear(shape.dim, shape.dim)
        self.optimizer_settings = {"bias": OptimizerSettings(max_lr=1e-3)}

    def forward(self, x: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
        seen = torch.ones(x.shape[:2], dtype=x.dtype, device=x.device) if key_mask is None else key_mask.to(x.dtype)
        x = x.masked_fill(seen[..., None] == 0, 0.0)
        if self.shape.causal:
            return self.projection(x.cumsum(1) / seen.cumsum(1).clamp_min(1)[..., None])
        return self.projection(x.sum(1, keepdim=True) / seen.sum(1).clamp_min(1)[:, None, None]).expand_as(x)


MEAN = _spec(Mean, name="mean", paper="none", cost="N C")


@every_host
def test_a_mixer_takes_the_place_of_every_block(host):
    model = HOSTS[host]().eval()
    layers = hosts.host_layers(model)
    before = {id(p) for p in model.parameters()}
    hosts.convert(model, MEAN)
    mixers = hosts.attentions(model)
    assert [type(m) for m in mixers] == [Mean, Mean]
    assert [m.shape for m in mixers] == [layer.shape for layer in layers]
    gone = before - {id(p) for p in model.parameters()}
    assert {id(p) for layer in layers for p in layer.module.parameters()} == gone
    inputs = (images(host),) if host in IMAGES else ()
    named = {} if host in IMAGES else {"input_ids": torch.randint(2, VOCAB, (2, 9))}
    calls = []
    mixers[0].register_forward_hook(lambda *_: calls.append(1))
    assert logits(model, *inputs, **named).isfinite().all()
    assert calls == [1]


@pytest.mark.parametrize("host", ENCODERS | DECODERS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing_for_a_mixer(host, side):
    if side == "left" and host in ENCODERS:
        pytest.skip("encoders number their positions from the left")
    model = hosts.convert(spread(HOSTS[host]()).eval(), MEAN)
    ids = torch.randint(2, VOCAB, (1, 9))
    padding = torch.full((1, 3), PAD)
    padded = torch.cat([padding, ids] if side == "left" else [ids, padding], 1)
    mask = (padded != PAD).long()
    extra = {"position_ids": hosts.position_ids(mask)} if host in DECODERS else {}
    found = logits(model, input_ids=padded, attention_mask=mask, **extra)
    found = found[:, 3:] if side == "left" else found[:, :9]
    torch.testing.assert_close(found, logits(model, input_ids=ids), atol=1e-5, rtol=0)


@pytest.mark.parametrize("host", DECODERS)
def test_a_mixer_generates_without_a_cache(host):
    model = hosts.convert(spread(HOSTS[host]()).eval(), MEAN)
    ids = torch.randint(2, VOCAB, (2, 5))
    made = model.generate(ids, max_new_tokens=4, do_sample=False, pad_token_id=PAD)
    tokens = ids
    for _ in range(4):
        tokens = torch.cat([tokens, logits(model, input_ids=tokens)[:, -1:].argmax(-1)], 1)
    assert torch.equal(made, tokens)
    with pytest.raises(UsageError, match="use_cache=False"):
        model(input_ids=ids, use_cache=True)


def test_some_layers_may_stay_softmax_beside_a_mixer():
    model = hosts.convert(bert(num_hidden_layers=3).eval(), MEAN, keep_layers=[1])
    assert [type(a).__name__ for a in hosts.attentions(model)] == ["Mean", "Softmax", "Mean"]
    assert logits(model, input_ids=torch.randint(2, VOCAB, (2, 9))).isfinite().all()


def test_what_a_mixer_replaced_does_not_come_back():
    model = hosts.convert(bert(), MEAN)
    with pytest.raises(UsageError, match="lost its attention to a mixer"):
        hosts.convert(model, "softmax")


@pytest.mark.parametrize("host", ["bert", "timm-vit"])
def test_a_teacher_takes_a_mixer(host):
    """A model that runs under hhbench's softmax already, as a run's teacher does."""
    model = hosts.convert(HOSTS[host]().eval(), "softmax")
    fresh = HOSTS[host]().eval()
    assert not hosts.slots(hosts.convert(model, MEAN))
    assert hosts.convert(fresh, MEAN).state_dict().keys() == model.state_dict().keys()
