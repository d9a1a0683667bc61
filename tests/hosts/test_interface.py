"""What runs under transformers' interface: windows and cross-attention as the library has them, all else refused."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import tiny
import torch
import transformers as tf
from tiny import GROUPED, VOCAB
from torch import Tensor, nn
from transformers.masking_utils import (
    and_masks,
    causal_mask_function,
    chunked_causal_mask_function,
    packed_sequence_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from hhbench import hosts
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.interface import patterns

PAD, N = 1, 20
TEXT = tiny.TEXT | {"num_hidden_layers": 3, "pad_token_id": PAD}
DECODER = TEXT | GROUPED
SEQ2SEQ = {
    "vocab_size": VOCAB,
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "pad_token_id": PAD,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
BART = SEQ2SEQ | {"max_position_embeddings": 64, "forced_eos_token_id": None}
GEMMA3 = DECODER | {"head_dim": 8, "layer_types": ["sliding_attention", "sliding_attention", "full_attention"]}


def mistral(**settings: Any) -> nn.Module:
    return tf.MistralForCausalLM(tf.MistralConfig(**DECODER | {"sliding_window": 6} | settings))


def gemma3(**settings: Any) -> nn.Module:
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**GEMMA3 | settings))


def qwen2() -> nn.Module:
    config = tf.Qwen2Config(**DECODER, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    return tf.Qwen2ForCausalLM(config)


def modernbert() -> nn.Module:
    ends = {"cls_token_id": 2, "bos_token_id": 2, "sep_token_id": 3, "eos_token_id": 3}
    return tf.ModernBertForMaskedLM(tf.ModernBertConfig(**TEXT, **ends, local_attention=8))


def bart(**settings: Any) -> nn.Module:
    return tf.BartForConditionalGeneration(tf.BartConfig(**BART | settings))


def whisper() -> nn.Module:
    own = {"num_mel_bins": 8, "max_source_positions": 10, "max_target_positions": 24}
    return tf.WhisperForConditionalGeneration(tf.WhisperConfig(**SEQ2SEQ, **own))


# The model, and the window of each layer as `softmax-window` counts it.
WINDOWED: dict[str, tuple[Callable[[], nn.Module], list[int | None]]] = {
    "mistral": (mistral, [6, 6, 6]),
    "a window of one": (lambda: mistral(sliding_window=1), [1, 1, 1]),
    "qwen2": (qwen2, [None, 5, 5]),
    "gemma3": (lambda: gemma3(sliding_window=7), [7, 7, None]),
    "mixtral": (
        lambda: tf.MixtralForCausalLM(tf.MixtralConfig(**DECODER, sliding_window=6, num_local_experts=2)),
        [6, 6, 6],
    ),
    "modernbert": (modernbert, [None, 5, 5]),  # half of 8 on either side, and the token itself
    "gemma3 both ways": (lambda: gemma3(sliding_window=6, use_bidirectional_attention=True), [4, 4, None]),
}
ENCODER_DECODERS: dict[str, Callable[[], nn.Module]] = {
    "bart": bart,
    "mbart": lambda: tf.MBartForConditionalGeneration(tf.MBartConfig(**BART)),
    "marian": lambda: tf.MarianMTModel(tf.MarianConfig(**BART)),
    "whisper": whisper,
}


def spread(model: nn.Module) -> nn.Module:
    """Weights large enough that attention is far from uniform."""
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(6)
    return model.eval()


def padded(side: str) -> tuple[Tensor, Tensor]:
    """ids [3, N] and a mask of as many, padded on a side, or of ones."""
    ids, mask = torch.randint(2, VOCAB, (3, N)), torch.ones(3, N, dtype=torch.long)
    for row, length in enumerate((N, 12, 3)):
        if side == "right":
            mask[row, length:] = 0
        if side == "left":
            mask[row, : N - length] = 0
    return ids, mask


def logits(model: nn.Module, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs).logits


def seq2seq_inputs(name: str, side: str) -> dict[str, Tensor]:
    ids, mask = padded(side)
    targets = torch.randint(3, VOCAB, (3, 7))
    if name == "whisper":
        return {"input_features": torch.randn(3, 8, 20), "decoder_input_ids": targets}
    return {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": targets}


# --- windows ---


@pytest.mark.parametrize("host", WINDOWED)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_a_kept_window_is_the_library_s_own(host, side):
    build, windows = WINDOWED[host]
    model = spread(build())
    ids, mask = padded(side)
    inputs = {"input_ids": ids} if side == "none" else {"input_ids": ids, "attention_mask": mask}
    if host != "modernbert":
        inputs["position_ids"] = hosts.position_ids(mask)
        if side == "none":
            del inputs["position_ids"]
    expected = logits(model, **inputs)
    assert [layer.window for layer in hosts.host_layers(model)] == windows
    converted = hosts.convert(copy.deepcopy(model), "softmax")
    found = logits(converted, **inputs)
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    for slot, window in zip(hosts.slots(converted).values(), windows, strict=True):
        if window is not None:
            assert slot.attention.window == window
            slot.attention.window = 64
    assert (logits(converted, **inputs) - expected).abs().max() > 1e-3  # the windows did cut something off


@pytest.mark.parametrize("host", ["mistral", "qwen2", "gemma3"])
@pytest.mark.parametrize("use_cache", [True, False])
def test_a_kept_window_generates_what_the_library_generates(host, use_cache):
    model = spread(WINDOWED[host][0]()).double()
    ids, mask = padded("left")
    ids, mask = ids[:, -9:], mask[:, -9:]
    settings = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False, "pad_token_id": PAD}
    expected = model.generate(ids, **settings)
    found = hosts.convert(model, "softmax").generate(ids, **settings, use_cache=use_cache)
    assert torch.equal(found, expected)
    assert len(found[:, -12:].unique()) > 3


def test_a_kept_window_takes_the_library_s_own_cache():
    """It gives back the keys of a window alone, and a mask for all tokens."""
    model = spread(mistral()).double()
    ids, mask = padded("left")
    expected = logits(model, input_ids=ids, attention_mask=mask, position_ids=hosts.position_ids(mask))
    hosts.convert(model, "softmax")
    cache = tf.DynamicCache(config=model.config)
    name = "cache" if int(tf.__version__.split(".")[1]) >= 24 else "past_key_values"
    pieces = []
    for start, stop in ((0, 4), (4, 15), (15, 16), (16, N)):
        position_ids = hosts.position_ids(mask)[:, start:stop]
        inputs = {"input_ids": ids[:, start:stop], "attention_mask": mask[:, :stop], "position_ids": position_ids}
        pieces.append(logits(model, **inputs, **{name: cache}))
    torch.testing.assert_close(torch.cat(pieces, 1)[mask.bool()], expected[mask.bool()], atol=1e-9, rtol=0)


@pytest.mark.parametrize("host", ["mistral", "qwen2", "gemma3", "modernbert"])
def test_layers_without_a_short_window_are_converted_beside_it(host):
    build, windows = WINDOWED[host]
    model = spread(build())
    ids, _ = padded("none")
    expected = logits(model, input_ids=ids)
    context = 5 if host == "mistral" else None
    hosts.convert(model, "hedgehog", context=context)
    names = [slot.placement.attention for slot in hosts.slots(model).values()]
    assert names == ["hedgehog" if w is None or context else "softmax-window" for w in windows]
    if context is None:
        assert (logits(model, input_ids=ids) - expected).abs().max() > 1e-3


def test_a_mask_with_gaps_is_refused_where_a_window_would_count_them():
    model = hosts.convert(mistral(), "softmax").eval()
    ids, mask = torch.randint(2, VOCAB, (1, N)), torch.ones(1, N, dtype=torch.long)
    mask[0, 3] = 0
    with pytest.raises(UsageError, match="leaves out tokens between attended ones"):
        model(input_ids=ids, attention_mask=mask)
    model(input_ids=ids[:, :6], attention_mask=mask[:, :6])  # where no window is full, nothing is counted


@pytest.mark.parametrize("position_ids", [[0, 1, 2, 0, 1, 2, 3, 4, 5, 6], [*range(9), 0], [0, *range(9)]])
def test_packed_sequences_are_refused_in_a_window_too(position_ids):
    model = hosts.convert(mistral(), "softmax").eval()
    ids = torch.randint(2, VOCAB, (1, 10))
    with pytest.raises(UsageError, match="packed sequences"):
        model(input_ids=ids, position_ids=torch.tensor([position_ids]), use_cache=False)
    model(input_ids=ids, position_ids=torch.arange(10)[None], use_cache=False)


def test_a_mask_function_is_known_by_what_it_lets_a_query_see():
    where = {"queries": torch.arange(12), "num_tokens": 12}
    assert patterns(causal_mask_function, local_size=None, **where) == [(True, None)]
    assert patterns(sliding_window_causal_mask_function(1), local_size=1, **where) == [(True, 1), (False, 1)]
    for w in (2, 5):
        assert patterns(sliding_window_causal_mask_function(w), local_size=w, **where) == [(True, w)]
        assert patterns(sliding_window_bidirectional_mask_function(w), local_size=w, **where) == [(False, w + 1)]
    chunks = chunked_causal_mask_function(5, torch.zeros(1, dtype=torch.long))
    assert patterns(chunks, local_size=5, **where) == []
    assert patterns(chunks, torch.arange(5), 5, num_tokens=5) != []  # within the first chunk, it is plain
    packed = packed_sequence_mask_function(torch.tensor([[0] * 7 + [1] * 5]))
    assert patterns(and_masks(causal_mask_function, packed), local_size=None, **where) == []
    assert patterns(and_masks(sliding_window_causal_mask_function(4), packed), local_size=4, **where) == []
    assert patterns(lambda *_: 1 / 0, local_size=None, **where) == []


def test_a_mask_of_the_user_s_own_is_refused():
    model = hosts.convert(mistral(), "softmax").eval()
    with pytest.raises(UsageError, match=r"4-D mask \[1, 1, 5, 5\]"):
        model(input_ids=torch.randint(2, VOCAB, (1, 5)), attention_mask=torch.zeros(1, 1, 5, 5))


@pytest.mark.parametrize("host", ["mistral", "qwen2"])
def test_a_cache_of_fixed_size_is_refused(host):
    model = hosts.convert(WINDOWED[host][0](), "softmax").eval()
    ids = torch.randint(2, VOCAB, (1, 4))
    with pytest.raises(UsageError, match="cache"):
        model.generate(ids, max_new_tokens=4, do_sample=False, cache_implementation="static")


# --- cross-attention ---


@pytest.mark.parametrize("host", ENCODER_DECODERS)
@pytest.mark.parametrize("side", ["none", "left", "right"])
def test_cross_attention_is_kept_as_the_library_s_own(host, side):
    if host == "whisper" and side != "none":
        pytest.skip("its input has one length")
    model = spread(ENCODER_DECODERS[host]())
    inputs = seq2seq_inputs(host, side)
    expected = logits(model, **inputs)
    found = logits(hosts.convert(copy.deepcopy(model), "softmax"), **inputs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert expected.std() > 0.1
    hosts.convert(model, "hedgehog")
    assert (logits(model, **inputs) - expected).abs().max() > 1e-3
    shapes = [slot.attention.shape for slot in hosts.slots(model).values()]
    assert [shape.causal for shape in shapes] == [False, False, True, True]
    assert len(hosts.attention_parameters(model)) == 8
    cross = [placement for placement in hosts.placements(model) if placement.cross]
    assert len(cross) == 2
    assert all("encoder_attn" in placement.layer for placement in cross)
    assert [layer.name for layer in hosts.host_layers(model)] == list(hosts.slots(model))


def test_an_encoder_decoder_generates_what_the_library_generates():
    model = spread(bart(eos_token_id=None)).double()
    ids, mask = padded("right")
    settings = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": 12}
    for mode in ({"do_sample": False}, {"do_sample": False, "num_beams": 3}):
        expected = model.generate(**settings, **mode)
        assert torch.equal(hosts.convert(copy.deepcopy(model), "softmax").generate(**settings, **mode), expected)
    linear = hosts.convert(model, "hedgehog")
    cached, uncached = (linear.generate(**settings, do_sample=False, use_cache=use) for use in (True, False))
    assert torch.equal(cached, uncached)


def test_cross_attention_shows_its_weights():
    model = spread(bart())
    inputs = seq2seq_inputs("bart", "right") | {"output_attentions": True}
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    expected = eager(**inputs).cross_attentions
    found = hosts.convert(model, "softmax")(**inputs).cross_attentions
    assert len(found) == len(expected) == 2
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)


def test_cross_attention_drops_out_as_the_library_does():
    model = hosts.convert(bart(attention_dropout=0.5, dropout=0.0), "elu")  # elu has no weights to drop
    inputs = seq2seq_inputs("bart", "none")
    model.train()
    assert not torch.equal(logits(model, **inputs), logits(model, **inputs))
    model.eval()
    assert torch.equal(logits(model, **inputs), logits(model, **inputs))


def test_cross_attention_never_falls_back_to_softmax_in_silence():
    model = bart()
    model.set_attn_implementation(hosts.INTERFACE)
    with pytest.raises(HHBenchError, match=r"use hhbench\.convert"):
        model(**seq2seq_inputs("bart", "none"))


def test_layers_that_training_drops_are_found():
    assert len(hosts.host_layers(bart(encoder_layerdrop=0.99, decoder_layerdrop=0.99).train())) == 4


def test_a_converted_encoder_decoder_can_be_converted_again():
    model = spread(bart())
    inputs = seq2seq_inputs("bart", "right")
    expected = logits(model, **inputs)
    hosts.convert(model, "hedgehog")
    torch.testing.assert_close(logits(hosts.convert(model, "softmax"), **inputs), expected, atol=1e-5, rtol=0)
