"""Tiny runs through the Python API: stages, teachers, keys, records."""

import dataclasses
import hashlib
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch

import hhbench
from hhbench import hosts, models, result, runner
from hhbench.attention import ATTENTIONS
from hhbench.config import RECIPES, RunConfig
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import attention_parameters
from hhbench.runner import OPTIONAL, _Run, execute, expand, prepare
from hhbench.task import TASKS
from hhbench.train import TrainStage

RECALL = {
    "task": "recall", "dataset": "ar", "attn": "hedgehog", "model": "gpt2-1x16x2", "max_len": 16, "batch_size": 32,
    "train_examples": 128, "test_examples": 48, "epochs": 1.0, "teacher_epochs": 1.0, "transfer_epochs": 1.0,
    "accelerator": "cpu", "logger": "none",
}  # fmt: skip
DIGITS = {
    "task": "imagenet", "dataset": "digits", "attn": "hedgehog", "batch_size": 32, "train_examples": 96,
    "test_examples": 48, "epochs": 1.0, "teacher_epochs": 1.0, "transfer_epochs": 1.0, "accelerator": "cpu",
    "logger": "none",
}  # fmt: skip
CONVERSION = "finetuned-conversion"
SQUARE = """
from hhbench.attention import FeatureMap

class Square(FeatureMap):
    def forward(self, x):
        return x * x + 0.1
"""


@pytest.fixture(scope="module")
def out(tmp_path_factory) -> Path:
    """One folder for the tests that may share teachers and results."""
    return tmp_path_factory.mktemp("runs")


def recall(out: Path, **changes) -> RunConfig:
    return RunConfig(**(RECALL | {"out": out} | changes))


def digits(out: Path, **changes) -> RunConfig:
    return RunConfig(**(DIGITS | {"out": out} | changes))


def teachers(out: Path) -> dict[str, int]:
    """Every teacher's weights below the folder, with the time when they were written."""
    return {path.parents[1].name: path.stat().st_mtime_ns for path in out.glob("teachers/*/model/*.safetensors")}


def key(config: RunConfig) -> str:
    return _Run(prepare(config)).key


@pytest.fixture
def last_model(monkeypatch) -> list[torch.nn.Module]:
    """The model that recall was asked to score last: at the end of a run it is the run's own."""
    task, seen = TASKS.get("recall").part, []
    step = task.step

    def spy(self, model, batch):
        seen[:] = [model]
        return step(self, model, batch)

    monkeypatch.setattr(task, "step", spy)
    return seen


# --- regimes and recipes ---


def check_complete(made: result.Result, path: Path) -> None:
    """A result is whole, the file says the same, and its parts agree with each other."""
    assert result.load(path) == made
    assert made.key == result.key_of(made.identity)
    again = RunConfig.from_dict(made.config)
    assert again.identity() == {name: made.config[name] for name in again.identity()}, (
        "the settings in a result make the config again"
    )
    blank = {name for name, value in made.config.items() if value is None}
    assert blank <= OPTIONAL
    assert made.metrics[made.score.name] == made.score.value
    examples = np.load(path.parent / "examples.npz")
    assert examples["index"].tolist() == list(range(made.score.num_examples))
    assert np.isfinite(examples["score"]).all()
    assert made.score.num_examples == made.config["test_examples"]
    assert made.score.value == pytest.approx(examples["score"].mean(), abs=1e-6)
    assert made.cost["params"] > made.cost["params_added"] == made.attention["params_added"]
    assert made.environment["world_size"] == 1
    assert made.environment["versions"]["torch"]


both_tasks = pytest.mark.parametrize("settings", [RECALL, DIGITS], ids=["recall", "imagenet"])
every_attention = pytest.mark.parametrize("attn", ATTENTIONS.names())


@both_tasks
@every_attention
def test_scratch(out, settings, attn):
    config = RunConfig(**(settings | {"attn": attn, "regime": "scratch", "out": out}))
    made, path = execute(config)
    check_complete(made, path)
    assert made.teacher is made.after_swap is made.after_transfer is made.fidelity is None
    assert made.attention["recipe"] is None
    assert made.cost["train_tokens"] > 0
    assert made.cost["state_bytes"] is None or settings is RECALL


@both_tasks
@every_attention
def test_every_attention_enters_a_trained_model_by_its_default_recipe(out, settings, attn):
    made, path = execute(RunConfig(**(settings | {"attn": attn, "regime": CONVERSION, "out": out})))
    check_complete(made, path)
    spec = ATTENTIONS.get(attn)
    assert made.attention["recipe"] == spec.recipe
    assert (spec.recipe == "replacement") == (not spec.convertible)
    assert made.after_swap is not None
    assert made.cost["seconds"]["train"] > 0
    if attn == "softmax":
        assert made.fidelity is None
    else:
        assert len(made.fidelity["kl_before"]) == (len(made.fidelity["teacher_entropy"]) or 0)
        assert bool(made.fidelity["kl_before"]) == made.attention["has_weights"]


def test_a_mixer_replaces_blocks_and_teaches_nothing(out):
    with pytest.raises(UsageError, match="hedgehog doesn't fit hyena, which replaces whole blocks"):
        prepare(recall(out, attn="hyena", regime=CONVERSION, recipe="hedgehog"))
    with pytest.raises(UsageError, match="replacement doesn't fit hedgehog"):
        prepare(recall(out, regime=CONVERSION, recipe="replacement"))


def test_a_frozen_map_stays_as_it_was(out, last_model):
    execute(recall(out, regime=CONVERSION, recipe="frozen-map"))
    (attention,) = hosts.attentions(last_model[0])
    for feature_map in (attention.query_map, attention.key_map):
        assert torch.equal(feature_map.weight, torch.eye(8).expand_as(feature_map.weight))
    assert all(p.requires_grad for p in last_model[0].parameters())


def test_maps_may_stay_as_transfer_taught_them(out, last_model):
    def maps(**settings) -> list[torch.Tensor]:
        execute(recall(out, regime=CONVERSION, force=True, **settings))
        return [p.detach().clone() for p in hosts.attention_parameters(last_model[0])]

    taught, frozen = maps(recipe="transfer-only"), maps(recipe="hedgehog", freeze_maps=True)
    assert all(torch.equal(one, other) for one, other in zip(taught, frozen, strict=True))
    finetuned = maps(recipe="hedgehog")
    assert not any(torch.equal(one, other) for one, other in zip(taught, finetuned, strict=True))


@both_tasks
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name != "replacement"])
def test_every_recipe(out, settings, recipe):
    config = RunConfig(**(settings | {"regime": CONVERSION, "recipe": recipe, "out": out}))
    made, path = execute(config)
    check_complete(made, path)
    stages = RECIPES[recipe]
    assert made.attention["recipe"] == recipe
    assert set(made.cost["seconds"]) == {
        name for name, there in [("transfer", stages.transfer), ("train", stages.finetune)] if there
    }
    assert made.after_swap is not None
    assert (made.after_transfer is not None) == stages.transfer
    notes = models.manifest(next(out.glob(f"teachers/*{made.teacher['key'][:8]}")))["teacher"]
    assert made.teacher == {"key": notes["key"], "score": notes["score"]}
    teacher = hhbench.load(next(out.glob(f"teachers/*{made.teacher['key'][:8]}")))
    layers, fidelity = len(hosts.slots(teacher)), made.fidelity
    assert len(fidelity["kl_before"]) == len(fidelity["teacher_entropy"]) == layers
    assert len(fidelity["kl_after"]) == (layers if stages.transfer else 0)
    assert all(kl >= 0 for kl in fidelity["kl_before"] + fidelity["kl_after"])
    if not stages.finetune:
        assert made.score.value == (made.after_transfer if stages.transfer else made.after_swap)


@pytest.mark.parametrize(
    "recipe,tests",
    [
        ("untrained", ["test after the swap"]),
        ("transfer-only", ["test after the swap", "test after transfer"]),
        ("hedgehog", ["test after the swap", "test after transfer", "test"]),
    ],
)
def test_a_model_is_tested_once_as_it_is(out, monkeypatch, recipe, tests):
    titles, evaluate = [], runner.evaluate

    def watched(*args, title, **kwargs):
        titles.append(title)
        return evaluate(*args, title=title, **kwargs)

    monkeypatch.setattr(runner, "evaluate", watched)
    check_complete(*execute(recall(out, regime=CONVERSION, recipe=recipe, seed=7)))
    assert [title for title in titles if title != "test the teacher"] == tests


def test_the_untrained_recipe_changes_nothing_but_the_attention(out):
    one = execute(recall(out, regime=CONVERSION, recipe="untrained"))[0]
    assert one.score.value == one.after_swap
    assert one.cost["train_tokens"] == 0


def test_each_attention_has_a_default_recipe(out):
    for attn, recipe in {"hedgehog": "hedgehog", "t2r": "t2r", "elu": "no-transfer"}.items():
        assert prepare(recall(out, attn=attn, regime=CONVERSION)).config.recipe == recipe


def test_transfer_lowers_the_divergence(out):
    made = execute(recall(out, regime=CONVERSION, recipe="transfer-only", train_examples=512, transfer_epochs=4.0))[0]
    assert sum(made.fidelity["kl_after"]) < sum(made.fidelity["kl_before"])


def test_pretrained_conversion_needs_pretrained_weights(out):
    with pytest.raises(UsageError, match=r"regime|pretrained"):
        execute(recall(out, regime="pretrained-conversion"))
    with pytest.raises(UsageError, match="pretrained weights"):
        execute(digits(out, regime="pretrained-conversion"))


def test_frozen_weights_are_bit_identical_after_transfer(out, last_model):
    made, _ = execute(recall(out, regime=CONVERSION, recipe="transfer-only", transfer_epochs=2.0))
    student = last_model[0]
    teacher = hhbench.load(next(out.glob(f"teachers/*{made.teacher['key'][:8]}"))).state_dict()
    learned = {id(p) for p in attention_parameters(student)}
    compared = 0
    for name, tensor in student.named_parameters():
        if id(tensor) not in learned:
            assert torch.equal(tensor, teacher[name]), name
            compared += 1
    assert compared == len([name for name in teacher if name in dict(student.named_parameters())]) > 10
    assert not any(torch.equal(p.detach(), torch.eye(8).expand_as(p)) for p in attention_parameters(student))


def test_softmax_gets_the_same_second_stage(out):
    """In conversion the softmax row is finetuned as long, on the same data, as any other."""
    softmax, elu = (execute(recall(out, attn=attn, regime=CONVERSION))[0] for attn in ("softmax", "elu"))
    assert softmax.cost["train_tokens"] == elu.cost["train_tokens"] > 0
    assert softmax.task["train_tokens"] == elu.task["train_tokens"]
    assert softmax.teacher == elu.teacher
    assert softmax.after_swap == softmax.teacher["score"]
    assert "train" in softmax.cost["seconds"]
    assert softmax.fidelity is None


def test_task_train_tokens_are_the_regimes_not_the_recipes(out):
    tokens = {
        execute(recall(out, regime=CONVERSION, recipe=recipe))[0].task["train_tokens"]
        for recipe in ("hedgehog", "no-transfer", "untrained")
    }
    assert len(tokens) == 1


# --- done is done ---


def test_a_finished_key_is_not_run_again(tmp_path):
    config = recall(tmp_path, attn="elu", regime="scratch")
    first, path = execute(config)
    before = path.stat().st_mtime_ns
    again, same = execute(config)
    assert (again, same) == (first, path)
    assert path.stat().st_mtime_ns == before
    forced, same = execute(dataclasses.replace(config, force=True))
    assert same == path
    assert path.stat().st_mtime_ns > before
    assert forced.score == first.score  # the same config gives the same number
    assert forced.metrics == first.metrics


@pytest.mark.parametrize("make", [recall, digits])
def test_a_conversion_is_reproducible(tmp_path, make):
    """Teacher, transfer and finetuning once more, in another folder."""
    runs = [execute(make(tmp_path / name, regime=CONVERSION, recipe="hedgehog")) for name in "ab"]
    (a, path_a), (b, path_b) = runs
    assert a.key == b.key
    assert a.score == b.score
    assert a.teacher == b.teacher
    assert a.fidelity == b.fidelity
    scores = [np.load(path.parent / "examples.npz")["score"] for path in (path_a, path_b)]
    assert np.array_equal(*scores)


def test_a_damaged_result_is_run_again_or_named(tmp_path):
    config = recall(tmp_path, attn="elu", regime="scratch")
    _, path = execute(config)
    path.write_text(path.read_text()[:100])
    with pytest.raises(HHBenchError, match=r"result\.json: not whole JSON"):
        execute(config)
    assert execute(dataclasses.replace(config, force=True))[0] == result.load(path)


# --- teachers ---


def test_a_teacher_is_trained_once_for_all_attentions_and_seeds(tmp_path):
    first = execute(recall(tmp_path, regime=CONVERSION, attn="hedgehog"))[0]
    before = teachers(tmp_path)
    assert len(before) == 1
    others = [
        execute(recall(tmp_path, regime=CONVERSION, attn=attn, seed=seed))[0]
        for attn, seed in [("elu", 0), ("t2r", 1), ("softmax", 1)]
    ]
    assert teachers(tmp_path) == before
    assert all(other.teacher == first.teacher for other in others)
    other = execute(recall(tmp_path, regime=CONVERSION, attn="elu", teacher_seed=1))[0]
    assert other.teacher["key"] != first.teacher["key"]
    assert before.items() < teachers(tmp_path).items()


def test_a_teacher_does_not_depend_on_the_seed_that_asks_first(tmp_path):
    weights = []
    for seed in (0, 3):
        execute(recall(tmp_path / str(seed), regime=CONVERSION, attn="elu", recipe="untrained", seed=seed))
        folder = next(tmp_path.glob(f"{seed}/teachers/*/model"))
        weights.append(hhbench.load(folder).state_dict())
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_teacher_is_loaded_from_its_folder(out):
    execute(recall(out, regime=CONVERSION, attn="elu"))
    folder = next(path.parents[1] for path in out.glob("teachers/recall-*/model/hhbench.json"))
    model = hhbench.load(folder)
    assert not model.training
    vocab = model.config.vocab_size
    assert model(input_ids=torch.randint(0, vocab, (2, 15)), use_cache=False).logits.shape == (2, 15, vocab)
    assert [type(slot.attention).__name__ for slot in hosts.slots(model).values()] == ["Softmax"]
    notes = models.manifest(folder)["teacher"]
    assert notes["key"].startswith(folder.name.rpartition("-")[2])


def test_a_damaged_teacher_is_named(tmp_path):
    execute(recall(tmp_path, regime=CONVERSION, attn="elu"))
    weights = next(tmp_path.glob("teachers/*/model/*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    with pytest.raises(HHBenchError, match="missing or damaged"):
        execute(recall(tmp_path, regime=CONVERSION, attn="elu", seed=1))


# --- the key ---

CHANGES = {
    "task": {"task": "imagenet", "dataset": "digits", "model": "vit-digits"},
    "attn": {"attn": "t2r"},
    "dataset": {"dataset": "mqar"},
    "preset": {"preset": "paper"},
    "regime": {"regime": "scratch", "recipe": None},
    "recipe": {"recipe": "t2r"},
    "option": {"option": (("activation", "exp"),)},
    "window": {"window": 8},
    "layers": {"layers": (("0", "softmax"),)},
    "keep_layers": {"keep_layers": "0"},
    "transfer_loss": {"transfer_loss": "both"},
    "queries": {"queries": 8},
    "lora": {"lora": "r=2"},
    "freeze_maps": {"freeze_maps": True},
    "seed": {"seed": 1},
    "teacher_seed": {"teacher_seed": 1},
    "model": {"model": "gpt2-1x16x1"},
    "max_len": {"max_len": 18},
    "dropout": {"dropout": 0.1},
    "train_examples": {"train_examples": 96},
    "test_examples": {"test_examples": 40},
    "batch_size": {"batch_size": 16},
    "micro_batch_size": {"micro_batch_size": 8},
    "epochs": {"epochs": 2.0},
    "lr": {"lr": 1e-4},
    "teacher_epochs": {"teacher_epochs": 2.0},
    "teacher_lr": {"teacher_lr": 1e-4},
    "transfer_epochs": {"transfer_epochs": 2.0},
    "transfer_lr": {"transfer_lr": 1e-4},
    "weight_decay": {"weight_decay": 0.3},
    "beta2": {"beta2": 0.9},
    "warmup": {"warmup": 0.3},
    "clip": {"clip": 0.3},
    "tune": {"tune": (1e-3, 1e-2)},
    "precision": {"precision": "bf16-mixed"},
}
SAME = {
    "accelerator": "auto",
    "devices": 2,
    "num_nodes": 2,
    "workers": 1,
    "logger": "csv",
    "data_folder": "elsewhere",
    "out": "elsewhere",
    "resume": True,
    "force": True,
    "allow_code": True,
    "save_model": True,
    "model_folder": "elsewhere",
    "find_unused_parameters": True,
    "strategy": "fsdp",
    "checkpoint_minutes": 1.0,
}


def test_every_setting_is_in_the_key_or_known_not_to_matter():
    fields = {field.name: field.metadata["changes_result"] for field in dataclasses.fields(RunConfig)}
    assert {name for name, changes in fields.items() if changes} == CHANGES.keys()
    assert {name for name, changes in fields.items() if not changes} == SAME.keys()


@pytest.fixture(scope="module")
def base_key(out) -> str:
    return key(recall(out, regime=CONVERSION, recipe="hedgehog"))


@pytest.mark.parametrize("name", CHANGES)
def test_key_changes(out, base_key, name):
    settings = {"regime": CONVERSION, "recipe": "hedgehog"} | CHANGES[name]
    assert key(recall(out, **settings)) != base_key


@pytest.mark.parametrize("name", SAME)
def test_key_stays(out, base_key, name):
    value = out / "elsewhere" if name in ("out", "data_folder", "model_folder") else SAME[name]
    needed = {"devices": 2} if name == "strategy" else {}
    changes = {"out": out, "regime": CONVERSION, "recipe": "hedgehog"} | needed | {name: value}
    assert key(recall(**changes)) == base_key


def test_versions_are_in_the_key(out, base_key, monkeypatch):
    config = recall(out, regime=CONVERSION, recipe="hedgehog")
    monkeypatch.setattr(TASKS.get("recall").part, "version", 99)
    assert key(config) != base_key


def test_spelled_out_defaults_give_the_same_key(out, base_key):
    plan = prepare(recall(out, regime=CONVERSION, recipe="hedgehog"))
    assert key(dataclasses.replace(plan.config)) == base_key


# --- checks before anything starts ---


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"attn": "hedgehod"}, "Did you mean 'hedgehog'"),
        ({"task": "recal"}, "Did you mean 'recall'"),
        ({"dataset": "mqra"}, "Did you mean 'mqar'"),
        ({"option": (("activatoin", "exp"),)}, "Did you mean 'activation'"),
        ({"option": (("activation", "tanh"),)}, "softmax, exp or joint"),
        ({"regime": "scratch", "recipe": "t2r"}, "for conversions"),
        ({"devices": 3}, "divided over 3 devices"),
        ({"accelerator": "gpuu"}, "no accelerator named 'gpuu'"),
        ({"model": "gpt2-1x15x2"}, "heads"),
        ({"model": "bert"}, "gpt2-LAYERSxWIDTHxHEADS"),
        ({"max_len": 2}, "max-len"),
        ({"train_examples": 0}, "train-examples"),
        ({"test_examples": 0}, "test-examples"),
        ({"tune": (1e-3,), "epochs": 0.0}, r"tune|epochs"),
        ({"attn": "t2r", "window": 8}, "t2r has no form with a window; these have: hedgehog, softmax"),
        ({"layers": (("0", "hedgehod"),)}, "Did you mean 'hedgehog'"),
        ({"layers": (("0", "hedgehog[activatoin=exp]"),)}, "Did you mean 'activation'"),
        ({"layers": (("9", "softmax"),)}, "no layer 9"),
        ({"keep_layers": "9"}, "no layer 9"),
        ({"keep_layers": "auto:1"}, "name the layers"),
        ({"lora": "r=2"}, "--lora needs a conversion that finetunes"),
        ({"lora": "r=two", "regime": "finetuned-conversion"}, "r=8"),
        ({"lora": "r=2", "regime": "finetuned-conversion", "recipe": "transfer-only"}, "--lora needs a conversion"),
    ],
)
def test_what_can_not_be_is_refused(tmp_path, changes, message):
    with pytest.raises(UsageError, match=message):
        execute(recall(tmp_path, **changes))
    assert not list(tmp_path.rglob("*.safetensors"))


def test_a_run_is_one_data_set(out):
    config = RunConfig(task="recall", attn="elu", out=out)
    assert [one.dataset for one in expand(config)] == list(TASKS.get("recall").build().suites["mini"])
    assert expand(dataclasses.replace(config, dataset="ar")) == [dataclasses.replace(config, dataset="ar")]
    with pytest.raises(UsageError, match="ar, mqar"):
        hhbench.run(config)


def test_preparing_writes_nothing(tmp_path):
    prepare(recall(tmp_path / "new" / "folder"))
    assert not (tmp_path / "new").exists()


# --- the four calls ---


def test_the_four_calls(tmp_path, make_shape):
    assert set(hhbench.__all__) == {"build_attention", "convert", "run", "load"}
    attention = hhbench.build_attention("hedgehog", make_shape())
    q = torch.randn(1, 2, 5, 4)
    assert attention(q, q, q).shape == q.shape
    model = models.gpt2("gpt2-2x16x2", vocab=11, max_len=16, dropout=0.0)
    assert hhbench.convert(model, "hedgehog", activation="exp") is model
    assert all(slot.attention.shape.causal for slot in hosts.slots(model).values())
    models.save(model, tmp_path / "saved")
    ids = torch.randint(0, 11, (2, 7))
    loaded = hhbench.load(tmp_path / "saved")
    assert torch.equal(loaded(input_ids=ids).logits, model.eval()(input_ids=ids).logits)
    made = hhbench.run(recall(tmp_path, attn="elu", regime="scratch"))
    assert isinstance(made, result.Result)


def test_a_saved_model_is_the_one_that_was_tested(tmp_path, last_model):
    made, path = execute(recall(tmp_path, attn="hedgehog", regime="scratch", save_model=True))
    tested = last_model[0]
    loaded = hhbench.load(path.parent)
    assert not loaded.training
    ids = torch.randint(0, tested.config.vocab_size, (3, 15))
    assert torch.equal(loaded(input_ids=ids).logits, tested.eval()(input_ids=ids).logits)
    assert sum(p.numel() for p in loaded.parameters()) == made.cost["params"]


def test_a_saved_model_of_a_users_attention_does_not_say_what_to_import(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SQUARE)
    _, path = execute(recall(tmp_path, attn=f"{file}:Square", regime="scratch", save_model=True))
    with pytest.raises(UsageError, match="a folder may not import"):
        hhbench.load(path.parent)
    assert hosts.slots(hhbench.load(path.parent, attn=f"{file}:Square"))


# --- tuning ---


def test_the_validation_split_picks_the_learning_rate(out):
    rates = (1e-5, 3e-2, 1e-3)
    made = execute(digits(out, attn="softmax", regime="scratch", tune=rates, epochs=2.0))[0]
    trials = made.tuning["trials"]
    assert [trial["lr"] for trial in trials] == list(rates)
    best = max(trial["validation"] for trial in trials)
    assert made.tuning["picked"] == next(t["lr"] for t in trials if t["validation"] == best)
    assert made.cost["train_tokens"] == 3 * made.task["train_tokens"]
    # The picked rate alone gives the same model: no trial leans on the one before.
    alone = execute(digits(out, attn="softmax", regime="scratch", lr=made.tuning["picked"], epochs=2.0))[0]
    assert alone.score == made.score
    assert alone.tuning is None


# --- interrupted and resumed ---


@pytest.fixture
def interrupt_at(monkeypatch):
    """Ctrl-C at the given training step, counted over all stages; never again after it."""
    step, left = TrainStage.training_step, [0]

    def counting(self, batch, batch_idx):
        left[0] -= 1
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(TrainStage, "training_step", counting)
    return lambda count: left.__setitem__(0, count)


@pytest.mark.parametrize(
    ("changes", "step"),
    [
        ({"attn": "elu", "regime": "scratch", "epochs": 3.0}, 7),  # four steps an epoch: within the second
        ({"attn": "elu", "regime": "scratch", "epochs": 3.0}, 9),  # at the start of the third
        ({"regime": CONVERSION, "recipe": "hedgehog", "teacher_epochs": 2.0}, 6),  # in the teacher
        ({"regime": CONVERSION, "recipe": "hedgehog", "epochs": 2.0}, 10),  # in finetuning, after the transfer
        ({"attn": "elu", "regime": "scratch", "tune": (1e-2, 1e-4), "epochs": 2.0}, 11),  # in the second trial
    ],
    ids=["within an epoch", "between epochs", "teacher", "finetuning", "tuning"],
)
def test_a_resumed_run_ends_where_an_undisturbed_one_does(tmp_path, interrupt_at, last_model, changes, step):
    whole = execute(recall(tmp_path / "whole", **changes))[0]
    weights = {name: tensor.clone() for name, tensor in last_model[0].state_dict().items()}
    interrupt_at(step)
    config = recall(tmp_path / "cut", **changes)
    with pytest.raises(KeyboardInterrupt):
        execute(config)
    assert not list((tmp_path / "cut").rglob("result.json"))
    assert len(list((tmp_path / "cut").rglob("step-*.ckpt"))) == 1
    made = execute(dataclasses.replace(config, resume=True))[0]
    assert made.key == whole.key
    assert made.teacher == whole.teacher
    assert made.fidelity == whole.fidelity
    assert made.tuning == whole.tuning
    assert made.score == whole.score
    assert made.metrics == whole.metrics
    for name, tensor in last_model[0].state_dict().items():
        torch.testing.assert_close(tensor, weights[name], msg=lambda text, name=name: f"{name}: {text}")
    assert not list((tmp_path / "cut").rglob("*.ckpt"))


# --- a user's own attention ---


def test_a_users_attention_runs_and_its_source_is_in_the_key(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(SQUARE)
    config = recall(tmp_path / "runs", attn=f"{file}:Square", regime="scratch")
    made, path = execute(config)
    check_complete(made, path)
    assert made.identity["attention"]["source_sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    assert made.attention["name"] == "mine.py:Square"
    assert key(config) == made.key
    file.write_text(SQUARE + "# changed\n")
    assert key(config) != made.key


def test_a_users_task_has_its_source_in_the_key(tmp_path):
    file = tmp_path / "mine.py"
    source = "from hhbench.tasks.recall import Recall\n\nclass Mine(Recall):\n    name = 'mine'\n"
    file.write_text(source)
    config = recall(tmp_path / "runs", task=f"{file}:Mine", regime="scratch", attn="elu")
    first = key(config)
    assert key(config) == first
    file.write_text(source + "# changed\n")
    assert key(config) != first


def test_a_users_attention_has_one_key_wherever_its_file_lies(tmp_path):
    keys = set()
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine.py").write_text(SQUARE)
        keys.add(key(recall(tmp_path, attn=f"{tmp_path / name / 'mine.py'}:Square", regime="scratch")))
    assert len(keys) == 1


def test_a_users_attention_is_converted_to(out, tmp_path):
    (tmp_path / "mine.py").write_text(SQUARE)
    made = execute(recall(out, attn=f"{tmp_path / 'mine.py'}:Square", regime=CONVERSION, recipe="no-transfer"))[0]
    assert made.fidelity["kl_before"]


# --- more than one device ---


def test_two_devices(tmp_path, monkeypatch):
    """Real processes: every test example counts once, and the numbers are those of one process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = {"regime": CONVERSION, "recipe": "hedgehog", "test_examples": 301, "batch_size": 32}
    made = hhbench.run(recall(tmp_path / "two", devices=2, **settings))
    assert made.environment["world_size"] == 2
    path = next((tmp_path / "two" / "recall").rglob("result.json"))
    examples = np.load(path.parent / "examples.npz")
    assert examples["index"].tolist() == list(range(301))
    assert made.score.num_examples == 301
    assert made.score.value == pytest.approx(examples["score"].mean(), abs=1e-6)
    one = hhbench.run(recall(tmp_path / "one", **settings))
    assert one.key == made.key
    assert one.cost["train_tokens"] == made.cost["train_tokens"]
    assert made.teacher["score"] == pytest.approx(one.teacher["score"], abs=0.02)
    assert made.fidelity["kl_after"] == pytest.approx(one.fidelity["kl_after"], rel=0.05)
    assert made.score.value == pytest.approx(one.score.value, abs=0.03)
