"""Converted models as model classes of transformers: the Auto classes give back the same model, or none."""

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from hhbench import hosts, models
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import families
from hhbench.hosts.cache import StateCache

VOCAB = 30
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "initializer_range": 0.3,
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
GROUPED = TEXT | {"num_key_value_heads": 2}
SMOL = TEXT | {"num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True}  # SmolLM2's heads
IMAGE = {
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 4,
    "initializer_range": 0.3,
}
TIMM = {"img_size": 32, "patch_size": 8, "depth": 5, "embed_dim": 36, "num_heads": 6, "num_classes": 5}
ALBERT_LIKE = {"vocab_size": VOCAB, "dim": 36, "n_layers": 5, "n_heads": 6, "hidden_dim": 48, "initializer_range": 0.3}
GPT2 = {"vocab_size": VOCAB, "n_embd": 36, "n_layer": 5, "n_head": 6, "n_positions": 64, "initializer_range": 0.3} | {
    "pad_token_id": 1,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS: dict[str, tf.PreTrainedConfig] = {
    "Bert": tf.BertConfig(**TEXT),  # MiniLM's family, too
    "Roberta": tf.RobertaConfig(**TEXT),
    "DistilBert": tf.DistilBertConfig(**ALBERT_LIKE),
    "GPT2": tf.GPT2Config(**GPT2),
    "Llama": tf.LlamaConfig(**SMOL),
    "Qwen2": tf.Qwen2Config(**GROUPED),
    "Qwen3": tf.Qwen3Config(**GROUPED, head_dim=16),
    "Mistral": tf.MistralConfig(**GROUPED, sliding_window=64),
    "ViT": tf.ViTConfig(**IMAGE),
    "DeiT": tf.DeiTConfig(**IMAGE, architectures=["DeiTForImageClassification"]),  # of two, the library asks
    "Dinov2": tf.Dinov2Config(**IMAGE),
}
DECODERS = ("GPT2", "Llama", "Qwen2", "Qwen3", "Mistral")
HEADS = {
    **dict.fromkeys(("Bert", "Roberta", "DistilBert"), "AutoModelForMaskedLM"),
    **dict.fromkeys(DECODERS, "AutoModelForCausalLM"),
    **dict.fromkeys(("ViT", "DeiT", "Dinov2"), "AutoModelForImageClassification"),
}
EACH_KIND = {  # learned maps, buffers, a window, softmax, a mixer
    0: ("hedgehog", {}),
    1: ("performer", {"num_features": 8}),
    2: ("hedgehog-window", {"window": 3}),
    3: ("softmax", {}),
    4: ("h3", {}),
}
WITHOUT_MIXER = EACH_KIND | {4: ("t2r", {})}


def build(family: str, auto: str | None = None, **settings: Any) -> nn.Module:
    config = copy.deepcopy(CONFIGS[family])
    for name, value in settings.items():
        setattr(config, name, value)
    return getattr(tf, auto or HEADS[family]).from_config(config).eval()


def converted(family: str, auto: str | None = None, layers: Any = WITHOUT_MIXER, **settings: Any) -> nn.Module:
    model = hosts.convert(build(family, auto, **settings), "hedgehog", layers=layers)
    return spread(model)


def spread(model: nn.Module) -> nn.Module:
    """Maps that are no identities any more."""
    with torch.no_grad():
        for parameter in hosts.attention_parameters(model):
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """The same every time."""
    generator = torch.Generator().manual_seed(3)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    shape = (2, 3, 8) if type(model).__name__.endswith("MultipleChoice") else (2, 8)
    return {"input_ids": torch.randint(2, VOCAB, shape, generator=generator)}


def answer(model: nn.Module, **more: Any) -> list[Tensor]:
    """Every tensor that a model says."""

    def tensors(said: Any) -> list[Tensor]:
        if isinstance(said, Tensor):
            return [said]
        return [t for one in said for t in tensors(one)] if isinstance(said, list | tuple) else []

    more = {"use_cache": False} | more if model.main_input_name == "input_ids" and _caches(model) else more
    with torch.no_grad():
        found = tensors(model(**inputs(model), **more).to_tuple())
    assert found and all(t.isfinite().all() for t in found)
    return found


def _caches(model: nn.Module) -> bool:
    return (
        hasattr(model.config, "use_cache")
        and not model.config.is_encoder_decoder
        and model.config.model_type in {f"{prefix}{name.lower()}" for name in DECODERS for prefix in ("", "hhbench-")}
    )


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return len(one) == len(other) and all(map(torch.equal, one, other))


# --- a fresh process ---

FRESH = """
import json, sys, torch, transformers
import hhbench.hosts, hhbench
from hhbench.hosts.cache import StateCache
torch.set_num_threads(int(sys.argv[2]))
for line in open(sys.argv[1] + "/list.jsonl"):
    name, auto = json.loads(line)
    folder = f"{sys.argv[1]}/{name}"
    expected = torch.load(folder + ".pt", weights_only=True)
    loaded = [hhbench.load(folder)]
    if auto is not None:
        loaded.append(getattr(transformers, auto).from_pretrained(folder))
    for model in loaded:
        with torch.no_grad():
            out = model(**expected["inputs"]) if auto else model(expected["inputs"])
        out = getattr(out, "logits", out)
        if not torch.equal(out, expected["logits"]):
            print(name, "differs by", (out - expected["logits"]).abs().max().item())
        if "generated" in expected:
            out = model.generate(
                expected["inputs"]["input_ids"], max_new_tokens=6, do_sample=False, return_dict_in_generate=True
            )
            if not (torch.equal(out.sequences, expected["generated"]) and isinstance(out.past_key_values, StateCache)):
                print(name, "generates something else")
    print(name, type(loaded[-1]).__name__)
"""


def run(program: str, *args: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", program, *map(str, args)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(models.__file__).parents[1],
    )


def test_a_fresh_process_loads_every_family_bit_for_bit(tmp_path):
    """With all kinds of attention in one model; decoders also generate, from a constant state where there is one."""
    listed, expected_names = [], []

    def keep(name: str, model: nn.Module, auto: str | None, given: Any, generates: bool = False) -> None:
        models.save(model, tmp_path / name)
        with torch.no_grad():
            out = model(**given) if auto else model(given)
        kept = {"inputs": given, "logits": getattr(out, "logits", out)}
        assert kept["logits"].std() > 0.01
        if generates:
            kept["generated"] = model.generate(given["input_ids"], max_new_tokens=6, do_sample=False)
        torch.save(kept, tmp_path / f"{name}.pt")
        listed.append(json.dumps([name, auto]))
        expected_names.append(f"{name} {type(model).__name__}")

    for family, auto in HEADS.items():
        model = converted(family, layers=EACH_KIND)
        keep(f"{family}-mixer", model, auto, inputs(model))
        model = converted(family)
        keep(family, model, auto, inputs(model), generates=family in DECODERS)
    for name in ("vit_tiny_patch16_224", "deit_tiny_distilled_patch16_224"):
        for layers in (EACH_KIND, WITHOUT_MIXER):
            model = models.timm_model(name, pretrained=False, **TIMM).eval()
            spread(hosts.convert(model, "hedgehog", layers=layers))
            keep(f"{name}-{layers[4][0]}", model, None, torch.randn(2, 3, 32, 32))
    (tmp_path / "list.jsonl").write_text("\n".join(listed))
    done = run(FRESH, tmp_path, torch.get_num_threads())
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == expected_names


WITHOUT = """
import sys, transformers
for auto in ("AutoConfig", "AutoModel", sys.argv[2]):
    try:
        print(type(getattr(transformers, auto).from_pretrained(sys.argv[1])))
    except ValueError as error:
        print("unknown" if "hhbench-" in str(error) and "does not recognize" in str(error) else error)
"""


@pytest.mark.parametrize("family", ["Llama", "ViT"])
def test_without_the_import_loading_fails(family, tmp_path):
    models.save(converted(family), tmp_path / "model")
    done = run(WITHOUT, tmp_path / "model", HEADS[family])
    assert done.stdout.splitlines() == ["unknown"] * 3, done.stderr


ON_DEMAND = """
import sys, transformers, hhbench.hosts, hhbench
try:
    transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print("unknown" if "hhbench-gpt_neox" in str(error) else error)
print(type(hhbench.load(sys.argv[1])).__name__)
print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""


def test_other_families_are_registered_on_demand(tmp_path):
    config = tf.GPTNeoXConfig(**TEXT | {"num_hidden_layers": 2})
    model = spread(hosts.convert(tf.GPTNeoXForCausalLM(config).eval(), "hedgehog"))
    models.save(model, tmp_path / "model")
    assert same(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path / "model")), answer(model))
    done = run(ON_DEMAND, tmp_path / "model")
    assert done.stdout.splitlines() == ["unknown"] + ["HHBenchGPTNeoXForCausalLM"] * 2, done.stderr


# --- every head ---


def heads() -> dict[str, tuple[str, str]]:
    """Every class of the families' that an Auto class maps: its name to its family and the first such Auto class."""
    found: dict[str, tuple[str, str]] = {}
    for auto in vars(modeling_auto).values():
        for family, config in CONFIGS.items():
            mapping = getattr(auto, "_model_mapping", None) if isinstance(auto, type) else None
            if mapping is not None and type(config) in mapping:
                classes = mapping[type(config)]
                for cls in classes if isinstance(classes, tuple) else (classes,):
                    if cls.config_class is not type(config):
                        continue  # a composite model, by the config of its text model
                    found.setdefault(cls.__name__, (family, auto.__name__))
    return found


@pytest.mark.parametrize("head", heads())
def test_every_head_class_comes_back(head, tmp_path):
    family, auto = heads()[head]
    cls = getattr(tf, head)
    model = spread(hosts.convert(cls(copy.deepcopy(CONFIGS[family])).eval(), "hedgehog"))
    assert isinstance(model, cls)
    model.save_pretrained(tmp_path)
    # The class for backbones looks on the hub alone; of a tuple of classes, the config's architecture decides.
    loader = type(model) if auto == "AutoBackbone" else getattr(modeling_auto, auto)
    other = loader.from_pretrained(tmp_path)
    assert type(other) is type(model)
    assert type(model).__name__ == f"HHBench{head}"
    assert same(answer(other), answer(model))


def test_the_families_are_registered():
    for family, config in CONFIGS.items():
        assert family in families.FAMILIES
        assert tf.AutoConfig.for_model(f"hhbench-{config.model_type}").hhbench is None
    assert len(families.FAMILIES) == len(CONFIGS)
    assert len(heads()) > 50


# --- one folder, several classes ---


@pytest.mark.parametrize("family", ["Bert", "Llama", "GPT2", "ViT"])
def test_the_base_model_loads_the_same_folder(family, tmp_path):
    model = converted(family)
    model.save_pretrained(tmp_path)
    base = tf.AutoModel.from_pretrained(tmp_path, output_hidden_states=True)
    found = answer(base)
    assert found[0].shape[-1] == 36
    with torch.no_grad():
        expected = model(**inputs(model), output_hidden_states=True).hidden_states
    assert torch.equal(base(**inputs(base), output_hidden_states=True).hidden_states[-2], expected[-2])
    base.save_pretrained(tmp_path / "base")
    assert same(answer(tf.AutoModel.from_pretrained(tmp_path / "base", output_hidden_states=True)), found)
    inner = model.base_model
    inner.save_pretrained(tmp_path / "inner")
    again = tf.AutoModel.from_pretrained(tmp_path / "inner", output_hidden_states=True)
    assert torch.equal(again(**inputs(again)).hidden_states[-2], expected[-2])


def test_another_head_keeps_the_attentions(tmp_path):
    model = converted("Bert")
    model.save_pretrained(tmp_path)
    other = tf.AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3)
    assert answer(other)[0].shape == (2, 3)
    for one, two in zip(hosts.attentions(model), hosts.attentions(other), strict=True):
        for name, tensor in one.state_dict().items():
            assert torch.equal(tensor, two.state_dict()[name]), name


def test_weights_in_several_files_come_back(tmp_path):
    model = converted("Llama")
    model.save_pretrained(tmp_path, max_shard_size="40KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 2
    assert same(answer(tf.AutoModelForCausalLM.from_pretrained(tmp_path)), answer(model))


def test_the_config_names_no_code(tmp_path):
    converted("Bert").save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    assert said["model_type"] == "hhbench-bert"
    assert "auto_map" not in said
    assert [layer["attention"] for layer in said["hhbench"]["layers"]] == [name for name, _ in WITHOUT_MIXER.values()]
    assert said["hhbench"]["layers"][2]["options"] == {"window": 3}
    assert not list(tmp_path.glob("*.py"))


# --- what is loaded ---


def test_missing_weights_of_an_attention_are_an_error(tmp_path):
    model = converted("Llama")
    model.save_pretrained(tmp_path)
    state = load_file(tmp_path / "model.safetensors")
    for names in (
        ["model.layers.0.self_attn.hhbench_slot.attention.key_map.weight"],
        [f"model.layers.1.self_attn.hhbench_slot.attention.{one}_map.projection" for one in ("key", "query")],
    ):
        kept = {key: tensor for key, tensor in state.items() if key not in names}
        assert len(kept) == len(state) - len(names)
        save_file(kept, tmp_path / "model.safetensors", {"format": "pt"})
        with pytest.raises(HHBenchError, match=f"lacks {len(names)} weights of its attentions, {names[0]}"):
            tf.AutoModelForCausalLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["Bert", "Llama"])
def test_buffers_that_aren_t_saved_begin_anew(family, tmp_path):
    """transformers leaves whatever lies in memory in the buffers that it doesn't know."""
    model = converted(family)
    for slot in hosts.slots(model).values():
        if hasattr(slot.attention, "floored_rows"):
            slot.attention.floored_rows += 7
    model.save_pretrained(tmp_path)
    filler = [torch.full((n,), 77) for n in range(1, 200)]  # what is freed is what is handed out again
    del filler
    other = tf.AutoModel.from_pretrained(tmp_path)
    counters = [s.attention.floored_rows for s in hosts.slots(other).values() if hasattr(s.attention, "floored_rows")]
    assert len(counters) == 3
    assert all(counter.device.type == "cpu" and int(counter) == 0 for counter in counters)


def test_loading_draws_nothing(tmp_path):
    converted("Llama", layers=EACH_KIND).save_pretrained(tmp_path)
    state = torch.get_rng_state()
    tf.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("saved_as", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("asked", [None, torch.float32, torch.bfloat16])
def test_dtypes(saved_as, asked, tmp_path):
    """As asked; else as saved. Performer's random features are drawn in single precision under any."""
    model = converted("Llama").to(saved_as)
    model.save_pretrained(tmp_path)
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path, **({} if asked is None else {"dtype": asked}))
    assert {t.dtype for t in other.state_dict().values() if t.is_floating_point()} == {asked or saved_as}
    if asked is None:
        assert all(torch.equal(t, other.state_dict()[name]) for name, t in model.state_dict().items())


def test_a_config_gives_a_new_model(tmp_path):
    model = converted("Llama")
    fresh = tf.AutoModelForCausalLM.from_config(model.config)
    assert type(fresh) is type(model)
    assert [type(a) for a in hosts.attentions(fresh)] == [type(a) for a in hosts.attentions(model)]
    assert hosts.placements(fresh) == hosts.placements(model)
    with pytest.raises(UsageError, match=r"has nothing to put into its layers: make it by hhbench\.convert"):
        tf.AutoModelForCausalLM.from_config(tf.AutoConfig.for_model("hhbench-llama"))


def test_softmax_does_not_come_back_in_silence(tmp_path):
    model = converted("Llama")
    with pytest.raises(UsageError, match="'sdpa' would bring softmax back"):
        model.set_attn_implementation("sdpa")
    model.save_pretrained(tmp_path)
    other = tf.AutoModelForCausalLM.from_pretrained(tmp_path, attn_implementation="sdpa")
    assert other.config._attn_implementation == hosts.INTERFACE
    assert same(answer(other), answer(model))


# --- in place ---


@pytest.mark.parametrize("family", HEADS)
def test_a_converted_model_is_still_the_library_s(family):
    plain = build(family)
    cls, config = type(plain), type(plain.config)
    model = hosts.convert(plain, "softmax")
    assert model is plain
    assert isinstance(model, cls)
    assert isinstance(model.config, config)
    assert type(model).__name__ == f"HHBench{cls.__name__}"
    assert type(model.config).__name__ == f"HHBench{config.__name__}"
    assert isinstance(model, tf.GenerationMixin) == (family in DECODERS) == model.can_generate()


def test_a_converted_model_can_be_converted_again_and_saved(tmp_path):
    model = converted("Llama", layers={})
    hosts.convert(model, "softmax")
    hosts.convert(model, "performer")
    models.save(model, tmp_path / "model")
    other = models.load(tmp_path / "model")
    assert {p.attention for p in hosts.placements(other)} == {"performer"}
    assert same(answer(other), answer(model))


def test_a_loaded_model_can_be_converted_again(tmp_path):
    model = spread(hosts.convert(build("Llama"), "softmax"))
    models.save(model, tmp_path / "model")
    other = models.load(tmp_path / "model")
    assert same(answer(other), answer(model))
    spread(hosts.convert(other, "hedgehog"))
    models.save(other, tmp_path / "other")
    assert same(answer(models.load(tmp_path / "other")), answer(other))


def test_copies_are_models_of_their_own():
    model = converted("Llama")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert type(other) is type(model)
        assert same(answer(other), answer(model))
        hosts.convert(other, "softmax")
        assert not same(answer(other), answer(model))


def test_what_a_model_records_is_there(tmp_path):
    model = converted("Llama")
    model.save_pretrained(tmp_path)
    for one in (model, tf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        out = one(**inputs(one), output_attentions=True, output_hidden_states=True)
        assert len(out.attentions) == 5
        assert len(out.hidden_states) == 6


def test_a_decoder_s_cache_is_its_own(tmp_path):
    model = converted("GPT2")
    model.save_pretrained(tmp_path)
    for one in (model, tf.AutoModelForCausalLM.from_pretrained(tmp_path)):
        out = one.generate(**inputs(one), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        assert isinstance(out.past_key_values, StateCache)


def test_a_pipeline_takes_a_converted_folder(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace

    words = Tokenizer(WordLevel({"[UNK]": 0, "[PAD]": 1, "[MASK]": 2, "good": 3, "bad": 4}, unk_token="[UNK]"))
    words.pre_tokenizer = Whitespace()
    tokenizer = tf.PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", pad_token="[PAD]", mask_token="[MASK]"
    )
    models.save(converted("Bert"), tmp_path / "mlm", processor=tokenizer)
    fill = tf.pipeline("fill-mask", model=str(tmp_path / "mlm"), device="cpu")
    assert type(fill.model).__name__ == "HHBenchBertForMaskedLM"
    assert len(fill("good [MASK] bad")) == 5
    models.save(converted("GPT2"), tmp_path / "lm", processor=tokenizer)
    write = tf.pipeline("text-generation", model=str(tmp_path / "lm"), device="cpu")
    assert write("good bad", max_new_tokens=3, do_sample=False)[0]["generated_text"].startswith("good bad")
