"""Decoding from states: the library's own `generate`, the uncached forward's logits, and bytes that don't grow."""

import copy
import inspect
import itertools
import statistics
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor

from hhbench import hosts
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts.cache import StateCache, StateLayer

VOCAB, PAD, STEPS = 40, 0, 64
CACHE = "cache" if "cache" in inspect.signature(tf.LlamaForCausalLM.forward).parameters else "past_key_values"
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
GPT2 = {
    "vocab_size": VOCAB,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.3,
    "pad_token_id": PAD,
    "bos_token_id": None,
    "eos_token_id": None,
}
FAMILIES: dict[str, tuple[type, type, dict[str, Any]]] = {
    "gpt2": (tf.GPT2LMHeadModel, tf.GPT2Config, GPT2),
    "llama": (tf.LlamaForCausalLM, tf.LlamaConfig, SIZES),
    "qwen2": (tf.Qwen2ForCausalLM, tf.Qwen2Config, SIZES),
    "qwen3": (tf.Qwen3ForCausalLM, tf.Qwen3Config, SIZES | {"head_dim": 16}),
    "mistral": (tf.MistralForCausalLM, tf.MistralConfig, SIZES | {"sliding_window": 4096}),
}
ATTENTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "hedgehog": ("hedgehog", {}),
    "taylor": ("taylor", {"project_to": 4}),
    "hedgehog-window": ("hedgehog-window", {"window": 5}),
    "softmax-window": ("softmax-window", {"window": 5}),
    "cosformer": ("cosformer", {}),
    "performer": ("performer", {}),
    "aft": ("aft", {}),
    "aft-full": ("aft", {"variant": "full"}),
    "h3": ("h3", {}),
    "softmax": ("softmax", {}),
    "hybrid": ("hedgehog", {"keep_layers": [1]}),
    "hybrid-first": ("hedgehog-window", {"window": 5, "keep_layers": [0]}),
}
MODES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 0},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
}


def decoder(family: str = "llama", attn: str | None = "hedgehog", **settings: Any) -> Any:
    """A model with random weights, and converted unless `attn` is None."""
    model_class, config_class, sizes = FAMILIES[family]
    model = model_class(config_class(**sizes | settings)).eval()
    if attn is None:
        return model
    name, options = ATTENTIONS[attn]
    return hosts.convert(model, name, **options).eval()


def prompt(width: int = 9) -> dict[str, Tensor]:
    """Two rows, the second padded on its left."""
    ids = torch.randint(3, VOCAB, (2, width))
    mask = torch.ones_like(ids)
    mask[1, : width // 2] = 0
    return {"input_ids": ids.where(mask.bool(), PAD), "attention_mask": mask}


def uncached(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=hosts.position_ids(mask), use_cache=False)
    logits: Tensor = out.logits
    return logits


def step(model: Any, cache: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """The logits of these tokens, which come after those in the cache; the mask covers all of them."""
    positions = hosts.position_ids(mask)[:, -ids.shape[1] :]
    with torch.no_grad():
        out = model(ids, attention_mask=mask, position_ids=positions, use_cache=True, **{CACHE: cache})
    logits: Tensor = out.logits
    return logits


def check_claim(model: Any, cache: StateCache, num_tokens: int, batch_size: int) -> None:
    """Every layer holds the bytes that its attention says it does, and has counted the tokens."""
    for held, layer in zip(hosts.attentions(model), cache.layers, strict=True):
        said = held.state_bytes(num_tokens, batch_size=batch_size)
        if isinstance(layer, StateLayer):
            assert held.has_state and layer.nbytes == said
        else:
            assert not held.has_state and layer.keys.nbytes + layer.values.nbytes == said
        assert layer.get_seq_length() == num_tokens
    assert cache.nbytes == sum(a.state_bytes(num_tokens, batch_size=batch_size) for a in hosts.attentions(model))


@pytest.mark.parametrize(
    ("family", "attn"),
    [("llama", name) for name in ATTENTIONS]
    + [(name, attn) for name in FAMILIES if name != "llama" for attn in ("hedgehog", "hybrid-first", "h3")],
)
def test_each_of_64_steps_has_the_uncached_logits_and_the_bytes_claimed(family: str, attn: str) -> None:
    """A left-padded prompt in two pieces, then one token at a time."""
    model = decoder(family, attn)
    tokens = torch.randint(3, VOCAB, (2, 9 + STEPS))
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    expected = uncached(model, tokens, mask)
    cache = StateCache(model)
    assert cache.nbytes == 0
    pieces = [(0, 5), (5, 9), *((n, n + 1) for n in range(9, 9 + STEPS))]
    for start, stop in pieces:
        logits = step(model, cache, tokens[:, start:stop], mask[:, :stop])
        attended = mask[:, start:stop].bool()
        assert (logits - expected[:, start:stop])[attended].abs().max() < 1e-4
        check_claim(model, cache, stop, 2)


def test_a_layer_with_a_window_keeps_a_ring() -> None:
    layer_types = ["sliding_attention", "full_attention"]
    model = decoder("qwen3", "hedgehog", sliding_window=5, use_sliding_window=True, layer_types=layer_types)
    assert [p.attention for p in hosts.placements(model)] == ["softmax-window", "hedgehog"]
    tokens, mask = torch.randint(3, VOCAB, (2, 9 + STEPS)), torch.ones(2, 9 + STEPS, dtype=torch.long)
    mask[1, :4] = 0
    expected, cache = uncached(model, tokens, mask), StateCache(model)
    for start, stop in [(0, 9), *((n, n + 1) for n in range(9, 9 + STEPS))]:
        logits = step(model, cache, tokens[:, start:stop], mask[:, :stop])
        assert (logits - expected[:, start:stop])[mask[:, start:stop].bool()].abs().max() < 1e-4
        check_claim(model, cache, stop, 2)
    assert cache.states[0].state.ring_keys.shape == (2, 2, 5, 16)


@pytest.mark.parametrize("mode", ["greedy", "beams"])
def test_an_encoder_decoder_decodes_from_states_beside_its_cross_attention(mode: str) -> None:
    sizes = {f"{part}_{what}": 2 for part in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    config = tf.BartConfig(
        vocab_size=VOCAB, d_model=32, encoder_ffn_dim=48, decoder_ffn_dim=48, init_std=0.3, pad_token_id=PAD,
        bos_token_id=1, eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=2, **sizes,
    )  # fmt: skip
    model = hosts.convert(tf.BartForConditionalGeneration(config).eval(), "hedgehog").eval()
    given = prompt()
    kwargs = {"max_new_tokens": 24, "return_dict_in_generate": True, "output_logits": True, **MODES[mode]}
    ours, plain = model.generate(**given, **kwargs), model.generate(**given, use_cache=False, **kwargs)
    assert isinstance(ours[CACHE].self_attention_cache, StateCache)
    assert torch.equal(ours.sequences, plain.sequences)
    assert max((a - b).abs().max() for a, b in zip(ours.logits, plain.logits, strict=True)) < 1e-4


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("family", "attn"),
    [("llama", name) for name in ATTENTIONS if name not in ("aft-full", "softmax")]
    + [(name, "hybrid") for name in FAMILIES if name != "llama"],
)
def test_generate_with_no_argument_decodes_from_states(family: str, attn: str, mode: str) -> None:
    model, given = decoder(family, attn), prompt()

    def generate(**kwargs: Any) -> Any:
        torch.manual_seed(1)
        return model.generate(
            **given, max_new_tokens=STEPS, return_dict_in_generate=True, output_logits=True, **MODES[mode], **kwargs
        )

    ours, plain = generate(), generate(use_cache=False)
    cache = ours[CACHE]
    assert isinstance(cache, StateCache) and cache.states
    assert len(ours.logits) == len(plain.logits) == STEPS
    for with_states, without in zip(ours.logits, plain.logits, strict=True):
        assert (with_states - without).abs().max() < 1e-4
    assert torch.equal(ours.sequences, plain.sequences)
    check_claim(model, cache, 9 + STEPS - 1, 2 * MODES[mode].get("num_beams", 1))  # the last token is not read


def test_softmax_everywhere_keeps_the_librarys_cache() -> None:
    model, given = decoder(attn="softmax"), prompt()
    ours = model.generate(**given, max_new_tokens=8, return_dict_in_generate=True)
    assert type(ours[CACHE]) is tf.DynamicCache
    assert torch.equal(ours.sequences, model.generate(**given, max_new_tokens=8, use_cache=False))
    assert model.generate(**given | {"input_ids": given["input_ids"][:1], "attention_mask": None}, max_new_tokens=8,
                          prompt_lookup_num_tokens=2).shape[1] == 17  # fmt: skip


def test_a_mixer_without_a_state_sees_every_token_again() -> None:
    model = hosts.convert(decoder(attn=None), "hyena").eval()
    made = model.generate(**prompt(), max_new_tokens=8, return_dict_in_generate=True)
    assert made.sequences.shape == (2, 17) and made.get(CACHE) is None


def test_use_cache_false_is_honoured() -> None:
    for attn in ("hedgehog", "h3"):
        made = decoder(attn=attn).generate(**prompt(), max_new_tokens=3, use_cache=False, return_dict_in_generate=True)
        assert made.get(CACHE) is None


def test_a_prompt_is_fed_in_chunks_by_generate() -> None:
    model, given = decoder(attn="hedgehog-window"), prompt(11)
    whole = model.generate(**given, max_new_tokens=16)
    assert torch.equal(whole, model.generate(**given, max_new_tokens=16, prefill_chunk_size=4))


def test_generation_goes_on_from_a_cache() -> None:
    model, given = decoder(attn="hybrid"), prompt()
    whole = model.generate(**given, max_new_tokens=16)
    cache = StateCache(model)
    first = model.generate(**given, max_new_tokens=6, **{CACHE: cache})
    mask = torch.cat([given["attention_mask"], torch.ones(2, 6, dtype=torch.long)], 1)
    copied = copy.deepcopy(cache)
    for one in (cache, copied):  # a copy is a cache of its own, of the same model
        assert torch.equal(whole, model.generate(first, attention_mask=mask, max_new_tokens=10, **{CACHE: one}))
    assert cache.states[0].slot is copied.states[0].slot


def test_rows_are_repeated_selected_and_forgotten() -> None:
    model, given = decoder(attn="hybrid-first"), prompt()
    ids, mask = given["input_ids"], given["attention_mask"]
    cache = StateCache(model)
    step(model, cache, ids, mask)
    cache.batch_repeat_interleave(2)  # rows 0 0 1 1
    cache.batch_select_indices(torch.tensor([3, 0, 2]))  # 1 0 1
    cache.reorder_cache(torch.tensor([1, 0, 0]))  # 0 1 1
    rows = torch.tensor([0, 1, 1])
    new = torch.randint(3, VOCAB, (3, 1))
    every, every_mask = torch.cat([ids[rows], new], 1), torch.cat([mask[rows], torch.ones(3, 1, dtype=torch.long)], 1)
    expected = uncached(model, every, every_mask)
    assert (step(model, cache, new, every_mask)[:, 0] - expected[:, -1]).abs().max() < 1e-4
    cache.reset()
    assert cache.nbytes == 0 and cache.get_seq_length() == 0
    again = step(model, cache, every, every_mask)
    assert (again - expected)[every_mask.bool()].abs().max() < 1e-4


def test_half_precision_decodes() -> None:
    model = decoder(attn="hedgehog").bfloat16()
    made = model.generate(**prompt(), max_new_tokens=8, return_dict_in_generate=True)
    assert made.sequences.shape == (2, 17)
    assert {t.dtype for t in made[CACHE].states[0].state._tensors().values()} == {torch.float32, torch.int64}


# ---- what is refused -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "word"),
    [
        ({"prompt_lookup_num_tokens": 3}, "prompt lookup"),
        ({"penalty_alpha": 0.6, "top_k": 4}, "contrastive search"),
        ({"dola_layers": "low"}, "DoLa"),
        ({"assistant_early_exit": 1}, "assisted generation"),
        ({"cache_implementation": "static"}, "cache_implementation='static'"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "offloaded"}, "cache_implementation='offloaded'"),
    ],
)
def test_modes_that_rewind_and_other_caches_are_refused(asked: dict[str, Any], word: str) -> None:
    model, given = decoder(), prompt()
    with pytest.raises(UsageError, match=word) as caught:
        model.generate(**given, max_new_tokens=4, **asked)
    assert "\n" not in str(caught.value)
    with pytest.raises(UsageError, match=word):  # the same in a config of generation
        model.generate(**given, generation_config=tf.GenerationConfig(max_new_tokens=4, **asked))


def test_an_assistant_is_refused_on_either_side() -> None:
    model, plain = decoder(), decoder(attn=None)
    given = {"input_ids": torch.randint(3, VOCAB, (1, 9)), "max_new_tokens": 4}
    with pytest.raises(UsageError, match="assisted generation"):
        model.generate(**given, assistant_model=plain)
    with pytest.raises(UsageError, match="rewound"):
        plain.generate(**given, assistant_model=model)


def test_a_state_is_not_rewound() -> None:
    model = decoder()
    cache = StateCache(model)
    step(model, cache, **{k.replace("input_", "").replace("attention_", ""): v for k, v in prompt().items()})
    with pytest.raises(UsageError, match="can't be rewound"):
        cache.crop(-1)


def test_learned_positions_end_with_a_clear_error_before_anything_is_generated() -> None:
    model, ids = decoder("gpt2", n_positions=16), torch.randint(3, VOCAB, (1, 9))
    assert model.generate(ids, max_new_tokens=8).shape == (1, 17)  # the last token needs no position
    for kwargs in ({}, {"use_cache": False}, {"num_beams": 2}):
        with pytest.raises(UsageError, match="learned 16 positions, and prompt and new tokens are 18"):
            model.generate(ids, max_new_tokens=9, **kwargs)


def test_rotary_positions_go_on() -> None:
    model, ids = decoder(max_position_embeddings=16), torch.randint(3, VOCAB, (1, 9))
    assert model.generate(ids, max_new_tokens=20).shape == (1, 29)


def test_a_step_that_fails_half_way_is_not_continued() -> None:
    model, given = decoder(), prompt()
    ids, mask = given["input_ids"], given["attention_mask"]
    cache = StateCache(model)
    step(model, cache, ids, mask)

    def fail(*args: Any) -> Tensor:
        raise HHBenchError("on purpose")

    last = list(hosts.slots(model).values())[-1]
    last.interceptor = fail
    one, longer = ids[:, :1] + 3, torch.cat([mask, mask[:, -1:]], 1)
    with pytest.raises(HHBenchError, match="on purpose"):
        step(model, cache, one, longer)
    last.interceptor = None
    with pytest.raises(HHBenchError, match="begin with a new cache"):
        step(model, cache, one, longer)
    assert (step(model, StateCache(model), ids, mask) - uncached(model, ids, mask))[mask.bool()].abs().max() < 1e-4


def test_weights_over_what_a_state_has_summed_up_are_refused() -> None:
    model, given = decoder(), prompt()
    with pytest.raises(UsageError, match="use_cache=False"):
        model.generate(**given, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True)
    made = model.generate(
        **given, max_new_tokens=3, output_attentions=True, return_dict_in_generate=True, use_cache=False
    )
    assert made.attentions[0][0].shape == (2, 4, 9, 9)


# ---- many tokens -----------------------------------------------------------------------------------------------


class Clock(tf.generation.streamers.BaseStreamer):
    """Called by `generate` with every token: the time, and the memory that the process has."""

    def __init__(self) -> None:
        self.wall: list[float] = []
        self.cpu: list[float] = []
        self.resident: list[int] = []

    def put(self, value: Tensor) -> None:
        self.wall.append(time.perf_counter())
        self.cpu.append(time.process_time())
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * 4096)

    def end(self) -> None: ...


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["hedgehog", "hedgehog-window"])
def test_8192_tokens_take_the_state_and_the_time_of_the_first_ones(attn: str) -> None:
    """Processor time is judged: others may keep the machine busy."""
    model = decoder(attn=attn, max_position_embeddings=16_384)
    given = {name: rows[:1] for name, rows in prompt(16).items()}

    def generate(count: int, clock: Clock | None = None) -> StateCache:
        made = model.generate(**given, max_new_tokens=count, streamer=clock, return_dict_in_generate=True)
        cache: StateCache = made[CACHE]
        return cache

    short = generate(16)
    clock = Clock()
    long = generate(8192, clock)
    assert long.nbytes == short.nbytes
    grown = clock.resident[-1] - clock.resident[16]
    print(f"{attn}: {long.nbytes:,} bytes, resident memory grown by {grown / 2**20:.1f} MiB")
    for what, times in (("wall", clock.wall), ("processor", clock.cpu)):
        steps = [b - a for a, b in itertools.pairwise(times[1:])]
        first, last = statistics.median(steps[:1000]), statistics.median(steps[-1000:])
        print(f"{what} time of the first and last 1,000 steps: {1e3 * first:.3f} and {1e3 * last:.3f} ms")
    assert grown < 32 * 10**6
    assert last <= 1.15 * first


@pytest.mark.slow
@pytest.mark.parametrize("attn", ["hedgehog", "hedgehog-window"])
def test_a_mask_of_8192_tokens_slows_no_step_down(attn: str) -> None:
    """Padded, a step is given a mask with a column for each token so far. Short and long take turns."""
    model = decoder(attn=attn, max_position_embeddings=16_384)
    tokens, steps = torch.randint(3, VOCAB, (1, 8192)), 500
    mask = torch.ones(1, 8192 + steps, dtype=torch.long)
    mask[0, :8] = 0
    caches, times = {}, {}
    for length in (16, 8192):
        caches[length], times[length] = StateCache(model), []
        step(model, caches[length], tokens[:, :length], mask[:, :length])
    for n in range(steps):
        for length, cache in caches.items():
            start = time.process_time()
            step(model, cache, tokens[:, n : n + 1], mask[:, : length + n + 1])
            times[length].append(time.process_time() - start)
    assert caches[16].nbytes == caches[8192].nbytes
    short, long = (statistics.median(times[length]) for length in (16, 8192))
    print(f"{attn}: {1e3 * short:.3f} ms after 16 tokens, {1e3 * long:.3f} ms after 8192")
    assert long <= 1.15 * short
