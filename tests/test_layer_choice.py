"""Which layers are given their softmax back: a spoiled one first; all of them make the softmax model."""

import copy
from statistics import mean
from typing import Any

import pytest
import torch
import transformers as tf
from torch import Tensor, nn

from hhbench import hosts
from hhbench.errors import HHBenchError, UsageError
from hhbench.fidelity import measure
from hhbench.layer_choice import Step, keep_worst

VOCAB, LAYERS, SPOILED = 30, 4, "transformer.h.2.attn"
IDS = torch.randint(VOCAB, (8, 16), generator=torch.Generator().manual_seed(5))


def make_gpt2() -> nn.Module:
    """A GPT-2 that attends: random weights alone are all but uniform."""
    model: nn.Module = tf.GPT2LMHeadModel(
        tf.GPT2Config(
            vocab_size=VOCAB, n_positions=32, n_layer=LAYERS, n_embd=32, n_head=4, bos_token_id=None, eos_token_id=None
        )
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.mul_(5)
    return model


@torch.no_grad()
def loss(model: nn.Module) -> float:
    return float(model(IDS, labels=IDS).loss)


def divergences(model: nn.Module) -> dict[str, float]:
    layers = measure(model, [{"input_ids": IDS}], order=False).layers
    return {layer.name: mean(layer.local.kl) for layer in layers}


def make_spoiled(attn: str = "hedgehog", **options: Any) -> tuple[nn.Module, nn.Module]:
    """A GPT-2 and its conversion, in which one layer's maps attend to what they shouldn't."""
    teacher = make_gpt2()
    model = hosts.convert(copy.deepcopy(teacher), attn, **options)
    with torch.no_grad():
        for parameter in hosts.slots(model)[SPOILED].attention.parameters():
            parameter.mul_(-8)
    return teacher, model


def test_the_spoiled_layer_is_kept_first_and_all_of_them_make_the_softmax_model():
    teacher, model = make_spoiled()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    report, converted = divergences(model), loss(model)
    steps = keep_worst(model, report, LAYERS, lambda: loss(model))
    assert [steps[0].layer, steps[1].layer] == [None, SPOILED]
    assert [step.layer for step in steps[1:]] == sorted(report, key=report.__getitem__, reverse=True)
    assert steps[0].score == converted
    assert steps[-1].score == pytest.approx(loss(teacher), abs=1e-5)
    assert abs(converted - loss(teacher)) > 1e-3  # there was something to win
    assert len({step.score for step in steps}) == LAYERS + 1  # every swap was in force when it was scored
    assert [placement.attention for placement in hosts.placements(model)] == ["softmax"] * LAYERS
    for name, tensor in model.state_dict().items():  # the host's own weights stay
        assert torch.equal(tensor, before[name])
    assert not hosts.attention_parameters(model)


def test_only_so_many_are_kept_and_the_rest_stay_as_they_were():
    teacher, model = make_spoiled()
    maps = {name: [p.clone() for p in slot.attention.parameters()] for name, slot in hosts.slots(model).items()}
    steps = keep_worst(model, divergences(model), 1, lambda: None)
    assert steps == [Step(None, None), Step(SPOILED, None)]
    kept = {placement.layer: placement.attention for placement in hosts.placements(model)}
    assert kept == {name: "softmax" if name == SPOILED else "hedgehog" for name in hosts.slots(model)}
    for name, slot in hosts.slots(model).items():
        learned: list[Tensor] = list(slot.attention.parameters())
        assert name == SPOILED or all(map(torch.equal, learned, maps[name]))
    # The one kept layer is what the conversion with that layer kept would have been.
    named = hosts.convert(copy.deepcopy(teacher), "hedgehog", keep_layers=[2])
    for name, slot in hosts.slots(named).items():
        slot.attention.load_state_dict(hosts.slots(model)[name].attention.state_dict())
    assert loss(named) == loss(model)


def test_layers_that_are_softmax_already_are_no_candidates_and_equals_go_by_depth():
    _, model = make_spoiled(keep_layers=[0])
    first, second = "transformer.h.1.attn", SPOILED
    steps = keep_worst(model, dict.fromkeys(hosts.slots(model), 1.0), 2, lambda: None)
    assert [step.layer for step in steps] == [None, first, second]


def test_what_can_not_be_chosen_is_refused():
    _, model = make_spoiled(keep_layers=[0])
    report = divergences(model)
    for count in (0, LAYERS):
        with pytest.raises(UsageError, match=f"can't keep {count} layers as softmax: 3 are something else"):
            keep_worst(model, report, count, lambda: None)
    for bad in ({name: kl for name, kl in report.items() if name != SPOILED}, report | {SPOILED: float("nan")}):
        with pytest.raises(HHBenchError, match=rf"{SPOILED} has no divergence from softmax"):
            keep_worst(model, bad, 1, lambda: None)
    assert [placement.attention for placement in hosts.placements(model)] == ["softmax"] + ["hedgehog"] * 3


def test_a_layer_in_its_own_short_window_is_no_candidate():
    settings = {
        "vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "intermediate_size": 48, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": None,
        "eos_token_id": None, "sliding_window": 4, "use_sliding_window": True, "max_window_layers": 1,
        "layer_types": ["full_attention", "sliding_attention"], "num_key_value_heads": 2,
    }  # fmt: skip
    model = hosts.convert(tf.Qwen2ForCausalLM(tf.Qwen2Config(**settings)).eval(), "hedgehog")
    with pytest.raises(UsageError, match="can't keep 2 layers as softmax: 1 are something else"):
        keep_worst(model, divergences(model), 2, lambda: None)
    (_, step) = keep_worst(model, divergences(model), 1, lambda: None)
    assert step.layer == "model.layers.0.self_attn"
    assert torch.isfinite(torch.tensor(loss(model)))
