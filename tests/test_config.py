"""RunConfig: every setting is checked in one place, and comes back from a file as it went in."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from hhbench.config import PRESETS, RECIPES, REGIMES, RunConfig, option_value, split_label
from hhbench.errors import UsageError

FIELDS = {field.name: field for field in dataclasses.fields(RunConfig)}
BASE = {"task": "recall", "attn": "elu"}


@pytest.mark.parametrize("name", FIELDS)
def test_every_setting_says_what_it_is(name):
    meta = FIELDS[name].metadata
    assert meta["help"]
    assert callable(meta["type"])
    assert isinstance(meta["changes_result"], bool)
    assert meta["group"] in ("what to run", "model and data", "training", "machine")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"preset": "minni"}, "Did you mean 'mini'"), ({"regime": "scrath"}, "Did you mean 'scratch'"),
        ({"recipe": "hedgehogg"}, "Did you mean 'hedgehog'"), ({"precision": "16"}, "no precision named '16'"),
        ({"logger": "cvs"}, "Did you mean 'csv'"), ({"seed": -1}, "--seed"), ({"seed": 2**70}, "--seed"),
        ({"teacher_seed": -1}, "--teacher-seed"), ({"epochs": -1.0}, "--epochs"),
        ({"epochs": float("inf")}, "--epochs"),
        ({"lr": 0.0}, "--lr"), ({"lr": float("nan")}, "--lr"), ({"lr": float("inf")}, "--lr"),
        ({"batch_size": 0}, "--batch-size"), ({"micro_batch_size": 0}, "--micro-batch-size"),
        ({"max_len": 0}, "--max-len"), ({"dropout": 1.0}, "--dropout"), ({"warmup": -0.1}, "--warmup"),
        ({"devices": 0}, "--devices"), ({"workers": -1}, "--workers"), ({"task": ""}, "--task is needed"),
        ({"keep_layers": "auto"}, "--keep-layers"), ({"keep_layers": "auto:0"}, "--keep-layers"),
        ({"keep_layers": "0;1"}, "--keep-layers"), ({"window": 0}, "--window"), ({"queries": -1}, "--queries"),
        ({"transfer_loss": "wieghts"}, "Did you mean 'weights'"),
        ({"attn": ""}, "--attn is needed"), ({"tune": (-1.0,)}, "--tune"), ({"tune": (float("nan"),)}, "--tune"),
    ],
    ids=str,
)  # fmt: skip
def test_a_config_checks_itself(changes, words):
    with pytest.raises(UsageError) as caught:
        RunConfig(**(BASE | changes))
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_at_the_edge_is_allowed():
    RunConfig(**BASE, seed=2**32 - 1, epochs=0.0, dropout=0.0, clip=0.0, train_examples=0, warmup=0.0, workers=0)


settings = st.fixed_dictionaries(
    {"task": st.just("recall"), "attn": st.sampled_from(["elu", "a/b.py:C"])},
    optional={
        "preset": st.sampled_from(PRESETS),
        "regime": st.sampled_from(REGIMES),
        "recipe": st.sampled_from(sorted(RECIPES)),
        "seed": st.integers(0, 2**32 - 1),
        "lr": st.floats(1e-12, 1e3),
        "epochs": st.floats(0, 1e3),
        "batch_size": st.integers(1, 10**6),
        "option": st.dictionaries(
            st.sampled_from("abc"), st.one_of(st.booleans(), st.integers(), st.text(max_size=5), st.none())
        ).map(lambda d: tuple(sorted(d.items()))),
        "tune": st.lists(st.floats(1e-9, 1), max_size=3).map(tuple),
        "out": st.sampled_from([Path("runs"), Path("/somewhere/else")]),
        "data_folder": st.sampled_from([None, Path("here")]),
        "force": st.booleans(),
        "layers": st.sampled_from([(), (("0", "softmax"), ("2-5", "taylor[project_to=16]")), (("-1", "a[b=1,c=x]"),)]),
        "keep_layers": st.sampled_from([None, "0", "0,-1", "auto:3"]),
        "window": st.sampled_from([None, 8]),
        "queries": st.sampled_from([0, 64]),
        "model_folder": st.sampled_from([None, Path("kept")]),
    },
)


@given(values=settings)
def test_a_config_comes_back_from_json_and_yaml(values):
    config = RunConfig(**values)
    assert RunConfig.from_dict(json.loads(json.dumps(config.as_dict()))) == config
    assert RunConfig.from_dict(yaml.safe_load(yaml.safe_dump(config.as_dict()))) == config


def test_yaml_spells_numbers_in_several_ways():
    config = RunConfig.from_dict(
        BASE
        | {"lr": "1e-3", "batch-size": "8", "epochs": 2, "tune": [1e-3, "1e-2"], "out": "x", "option": {"b": 1, "a": 2}}
    )
    assert (config.lr, config.batch_size, config.epochs, config.tune) == (1e-3, 8, 2.0, (1e-3, 1e-2))
    assert config.out == Path("x")
    assert config.options == {"a": 2, "b": 1}
    assert RunConfig.from_dict(BASE | {"tune": "lr=1e-3,3e-3"}).tune == (1e-3, 3e-3)
    assert RunConfig.from_dict(BASE | {"tune": 0.001}).tune == (1e-3,)
    assert RunConfig.from_dict(BASE | {"option": "activation=exp,bias=true"}).options == {
        "activation": "exp",
        "bias": True,
    }
    assert RunConfig.from_dict(BASE | {"lr": None}).lr is None
    layers = (("0", "softmax"), ("3-5", "taylor[project_to=16,tie_qk=true]"))
    assert RunConfig.from_dict(BASE | {"layers": dict(layers)}).layers == layers
    assert RunConfig.from_dict(BASE | {"layers": "0=softmax,3-5=taylor[project_to=16,tie_qk=true]"}).layers == layers
    assert RunConfig.from_dict(BASE | {"layers": {0: "softmax"}}).layers == (("0", "softmax"),)
    assert RunConfig.from_dict(BASE | {"keep_layers": [0, -1]}).keep_layers == "0,-1"
    assert RunConfig.from_dict(BASE | {"keep-layers": 3}).keep_layers == "3"


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": "fast"}, {"seed": 1.5}, {"seed": "one"}, {"tune": ["a"]}, {"tune": "a"}, {"option": "activation"},
        {"option": [1]}, {"layers": "softmax"}, {"layers": {"a": "softmax"}}, {"layers": "0="},
        {"bach_size": 8}, {"force": "no"}, {"lr": [1]}, {"batch_size": float("inf")},
    ],
    ids=str,
)  # fmt: skip
def test_yaml_values_of_a_wrong_kind_are_refused(wrong):
    with pytest.raises(UsageError) as caught:
        RunConfig.from_dict(BASE | wrong)
    assert next(iter(wrong)) in str(caught.value)


@pytest.mark.parametrize(
    ("text", "value"),
    [("true", True), ("False", False), ("none", None), ("3", 3), ("-3", -3), ("0.5", 0.5), ("1e-3", 1e-3),
     ("exp", "exp"), ("", "")],
)  # fmt: skip
def test_option_values_are_what_they_look_like(text, value):
    found = option_value(text)
    assert found == value
    assert type(found) is type(value)


def test_a_label_is_a_name_and_its_options():
    assert split_label("elu") == ("elu", {})
    assert split_label("hedgehog[activation=exp,bias=true]") == ("hedgehog", {"activation": "exp", "bias": True})
    for wrong in ("hedgehog[bias", "[bias=true]", "hedgehog[]", "hedgehog[bias]"):
        with pytest.raises(UsageError):
            split_label(wrong)


def test_a_newer_setting_is_in_the_identity_only_when_it_is_used():
    """Results from before it was there keep their keys."""
    newer = {"window": 8, "layers": (("0", "softmax"),), "keep_layers": "0", "lora": "r=4", "queries": 8,
             "transfer_loss": "both", "freeze_maps": True}  # fmt: skip
    assert {name for name, field in FIELDS.items() if field.metadata["silent"]} == newer.keys()
    assert not newer.keys() & RunConfig(**BASE).identity().keys()
    for name, value in newer.items():
        assert newer.keys() & RunConfig(**BASE, **{name: value}).identity().keys() == {name}


def test_identity_holds_what_changes_a_number_and_nothing_else():
    config = RunConfig(**BASE)
    expected = {n for n, f in FIELDS.items() if f.metadata["changes_result"] and not f.metadata["silent"]}
    assert set(config.identity()) == expected
    assert not {"devices", "num_nodes", "workers", "out", "logger", "resume", "force", "accelerator"} & set(
        config.identity()
    )
    assert json.dumps(config.identity())


def test_blanks_are_filled_and_nothing_else():
    config = RunConfig(**BASE, lr=0.5).filled({"lr": 1.0, "epochs": 2.0})
    assert (config.lr, config.epochs) == (0.5, 2.0)
