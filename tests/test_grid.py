"""Grids: what lists and flags come to, what is left out and what is refused, and what is known to be done."""

import argparse
import re
from pathlib import Path

import pytest
import yaml
from hypothesis import example, given
from hypothesis import strategies as st

from hhbench import grid
from hhbench.attention import ATTENTIONS
from hhbench.config import RunConfig
from hhbench.errors import UsageError
from hhbench.grid import Earlier, product, seeds_of, teachers_of
from hhbench.runner import execute, run, train_teacher

AR = {"task": "recall", "dataset": "ar"}
TINY = AR | {
    "model": "gpt2-1x16x2", "max_len": 16, "train_examples": 64, "test_examples": 16, "batch_size": 16, "epochs": 1,
    "teacher_epochs": 1, "accelerator": "cpu", "logger": "none",
}  # fmt: skip
ATTENTION = "from hhbench.attention import FeatureMap, register_attention\n"
CAUSAL = """@register_attention(paper="mine", cost="N", directions=("causal",))
class OnlyForward(FeatureMap):
    def forward(self, x):
        return x.exp()
"""


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    ATTENTIONS._specs.pop("OnlyForward", None)  # what a test's own file registers, the next one's may


def titles(settings):
    return [trial.title for trial in product(settings).trials]


def parsed(*flags):
    parser = argparse.ArgumentParser()
    grid.add_arguments(parser)
    return grid.grid_of(parser.parse_args([str(flag) for flag in flags]))


# --- what a product holds ---


def test_every_combination_is_a_run_and_a_whole_table_of_one_seed_comes_first():
    assert titles(AR | {"attn": ["elu", "relu"], "seed": "0:2"}) == [
        "recall/ar elu s0", "recall/ar relu s0", "recall/ar elu s1", "recall/ar relu s1",
    ]  # fmt: skip


def test_a_task_without_data_sets_stands_for_its_suite():
    assert titles({"task": "recall", "attn": "elu"}) == ["recall/ar elu s0", "recall/mqar elu s0"]


def test_all_is_every_attention():
    found = {trial.plan.spec.name for trial in product(AR | {"attn": "all"}).trials}
    assert {"softmax", "hedgehog", "hyena", "taylor"} <= found


def test_names_are_safe_and_unique_and_the_same_each_time():
    settings = AR | {"attn": ["hedgehog[activation=exp]", "elu"], "lr": [1e-3, 3e-3], "seed": [0, 1]}
    names = [trial.name for trial in product(settings).trials]
    assert len(set(names)) == len(names) == 8
    assert all(re.fullmatch(r"[A-Za-z0-9_.=,+-]+", name) for name in names)
    assert names == [trial.name for trial in product(settings).trials]


def test_what_comes_to_the_same_run_is_run_once():
    assert len(product(AR | {"attn": ["elu", "elu"], "seed": [0, 0]}).trials) == 1
    # The same attention, written in two ways.
    labels = ["hedgehog-window[window=4]", "hedgehog-window"]
    assert len(product(AR | {"attn": labels, "option": {"window": 4}}).trials) == 1


def test_lists_of_any_setting_and_of_options_multiply():
    grid = product(AR | {"attn": "hedgehog", "lr": [1e-3, 3e-3], "option": {"activation": ["softmax", "exp"]}})
    assert {(trial.config.lr, trial.config.options["activation"]) for trial in grid.trials} == {
        (1e-3, "softmax"), (1e-3, "exp"), (3e-3, "softmax"), (3e-3, "exp"),
    }  # fmt: skip
    assert "lr=0.003" in grid.trials[-1].title


def test_settings_that_are_lists_themselves_need_a_list_of_lists():
    def configs(**settings):
        return [trial.config for trial in product(AR | {"attn": "hedgehog"} | settings).trials]

    assert [c.tune for c in configs(tune=[1e-3, 3e-3])] == [(1e-3, 3e-3)]
    assert [c.tune for c in configs(tune=[[1e-3, 3e-3], [1e-4]])] == [(1e-3, 3e-3), (1e-4,)]
    assert [c.keep_layers for c in configs(keep_layers=[0, 1])] == ["0,1"]
    assert [c.keep_layers for c in configs(keep_layers=[[0, 1], [1]])] == ["0,1", "1"]
    assert [c.layers for c in configs(layers=[{0: "softmax"}, {1: "elu"}])] == [
        (("0", "softmax"),), (("1", "elu"),),
    ]  # fmt: skip


# --- what can't be ---


def test_devices_that_this_machine_lacks_are_for_another_one():
    settings = TINY | {"attn": "elu", "accelerator": "cuda", "devices": 512, "batch_size": 512}
    with pytest.raises(UsageError, match="this machine has"):
        product(settings)
    (there,) = product(settings, elsewhere=True).trials
    (here,) = product(settings | {"accelerator": "cpu"}).trials
    assert (there.config.accelerator, there.config.devices) == ("cuda", 512)
    assert there.name == here.name
    with pytest.raises(UsageError, match="Did you mean 'cuda'"):
        product(settings | {"accelerator": "cdua"}, elsewhere=True)


def test_an_attention_that_does_not_serve_a_direction_is_left_out_by_name(tmp_path):
    (tmp_path / "mine.py").write_text(ATTENTION + CAUSAL)
    made = product({
        "task": ["glue", "recall"], "dataset": ["snli", "ar"], "attn": ["elu", "mine.py:OnlyForward"], "seed": [0, 1],
    })  # fmt: skip
    assert {(t.plan.task.name, t.plan.config.dataset, t.config.attn) for t in made.trials} == {
        ("glue", "snli", "elu"), ("recall", "ar", "elu"), ("recall", "ar", "mine.py:OnlyForward"),
    }  # fmt: skip
    lines = [each.line() for each in made.left_out]
    assert any("glue/snli mine.py:OnlyForward (2 runs)" in line and "bidirectional" in line for line in lines), lines
    assert sum(each.runs for each in made.left_out) + len(made.trials) == 16


def test_a_recipe_that_does_not_fit_is_left_out():
    settings = {"task": "glue", "dataset": "snli", "attn": ["hedgehog", "hyena"], "recipe": ["replacement", "hedgehog"]}
    made = product(settings)
    assert [(t.config.attn, t.config.recipe) for t in made.trials] == [
        ("hedgehog", "hedgehog"), ("hyena", "replacement"),
    ]  # fmt: skip
    assert [each.names for each in made.left_out] == [
        ("glue/snli hedgehog (replacement)",), ("glue/snli hyena (hedgehog)",),
    ]  # fmt: skip


def test_where_nothing_is_left_the_reason_is_the_error():
    with pytest.raises(UsageError, match="replacement doesn't fit hedgehog"):
        product({"task": "glue", "dataset": "snli", "attn": "hedgehog", "recipe": "replacement", "seed": [0, 1]})
    with pytest.raises(UsageError, match=r"(?s)no combination is left:.*fit hedgehog.*fit elu"):
        product({"task": "glue", "dataset": "snli", "attn": ["hedgehog", "elu"], "recipe": "replacement"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attn": ["elu", "hedgehg"]}, "Did you mean 'hedgehog'"),
        ({"task": ["recall", "glu"]}, "Did you mean 'glue'"),
        ({"dataset": ["ar", "mqr"]}, "Did you mean 'mqar'"),
        ({"recipe": ["hedgehg"]}, "Did you mean 'hedgehog'"),
        ({"leaning_rate": [1]}, "no setting named 'leaning_rate'"),
        ({"lr": [1e-3, -1]}, "--lr must be above 0"),
        ({"seed": []}, "seed has no value"),
        ({"out": ["a", "b"]}, "out changes no result"),
        ({"attn": ["hedgehog"], "option": {"activation": ["exp", "exq"]}}, "exq"),
    ],
)
def test_a_name_or_a_value_that_nothing_has_is_refused(settings, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        product(AR | {"attn": ["elu"]} | settings)


def test_an_option_may_fit_some_of_the_attentions():
    made = product(AR | {"attn": ["elu", "hedgehog"], "option": {"activation": ["exp"]}})
    assert [t.config.attn for t in made.trials] == ["hedgehog"]
    assert made.left_out[0].names == ("recall/ar elu[activation=exp]",)


# --- flags and files ---


def test_flags_make_the_grid():
    made = parsed(
        "--task", "recall", "--dataset", "ar", "--attn", "elu,hedgehog[activation=exp,init=random]", "--seeds", "1:3",
        "--grid", "lr=1e-3,3e-3", "--grid", "keep-layers=0,1;1", "--epochs", "2",
    )  # fmt: skip
    assert len(made.trials) == 16
    assert {t.config.seed for t in made.trials} == {1, 2}
    assert {t.config.lr for t in made.trials} == {1e-3, 3e-3}
    assert {t.config.keep_layers for t in made.trials} == {"0,1", "1"}
    assert {t.config.epochs for t in made.trials} == {2.0}
    assert {tuple(t.config.options.items()) for t in made.trials} == {
        (), (("activation", "exp"), ("init", "random")),
    }  # fmt: skip


def test_options_are_an_axis_too_and_none_stands_for_the_default():
    made = parsed(
        "--task", "recall", "--dataset", "ar", "--attn", "hedgehog", "--option", "negation=false",
        "--grid", "option.activation=softmax,exp", "--grid", "lr=none,1e-2",
    )  # fmt: skip
    assert {(t.config.lr, t.config.options["activation"]) for t in made.trials} == {
        (None, "softmax"), (None, "exp"), (1e-2, "softmax"), (1e-2, "exp"),
    }  # fmt: skip
    assert {t.config.options["negation"] for t in made.trials} == {False}


def test_semicolons_part_values_that_have_commas():
    def configs(axis):
        flags = ("--task", "recall", "--dataset", "ar", "--attn", "hedgehog", "--grid", axis)
        return [t.config for t in parsed(*flags).trials]

    assert [c.tune for c in configs("tune=1e-3,3e-3;1e-4")] == [(1e-3, 3e-3), (1e-4,)]
    assert [c.layers for c in configs("layers=0=softmax,1=taylor[project_to=4];1=elu")] == [
        (("0", "softmax"), ("1", "taylor[project_to=4]")), (("1", "elu"),),
    ]  # fmt: skip


def test_a_file_holds_lists_and_flags_override_them(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("""
task: recall
dataset: [ar]
attn: [hedgehog, elu]
seed: 0:3
lr: [1e-3, 3e-3]
option: {activation: [softmax, exp]}
""")
    made = parsed("--config", file)
    assert len(made.trials) == 3 * 2 * 2
    assert {t.config.attn for t in made.trials} == {"hedgehog"}
    assert made.left_out[0].runs == 12
    fewer = parsed("--config", file, "--attn", "hedgehog", "--seeds", "7", "--lr", "5e-4")
    assert [(t.config.seed, t.config.lr, t.config.options) for t in fewer.trials] == [
        (7, 5e-4, {"activation": "softmax"}), (7, 5e-4, {"activation": "exp"}),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--grid", "lr"], "--grid takes SETTING=VALUE,VALUE"),
        (["--grid", "lr="], "--grid takes SETTING=VALUE,VALUE"),
        (["--grid", "lr=1e-3", "--lr", "1e-3"], "lr is given twice"),
        (["--grid", "lr=fast,slow"], "lr can't be 'fast'"),
        (["--grid", "devices=1,2"], "devices changes no result"),
        (["--seeds", "3:1"], "has none in it"),
    ],
)
def test_a_flag_that_means_nothing_is_refused(flags, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        parsed("--task", "recall", "--dataset", "ar", "--attn", "elu", *flags)


def test_a_range_that_yaml_reads_as_a_number_is_refused(tmp_path):
    file = tmp_path / "grid.yaml"
    file.write_text("task: recall\nattn: elu\nseed: 1:3\n")
    assert yaml.safe_load(file.read_text())["seed"] == 63
    with pytest.raises(UsageError, match="put it in quotes or brackets"):
        parsed("--config", file)
    file.write_text("task: recall\nattn: elu\ndataset: ar\nseed: '1:3'\n")
    assert [t.config.seed for t in parsed("--config", file).trials] == [1, 2]


def test_a_file_may_not_import_code_unless_it_is_allowed_to(tmp_path):
    (tmp_path / "mine.py").write_text(ATTENTION + CAUSAL)
    file = tmp_path / "grid.yaml"
    file.write_text("task: recall\ndataset: ar\nattn: [elu, 'mine.py:OnlyForward']\n")
    with pytest.raises(UsageError, match="--allow-code"):
        parsed("--config", file)
    assert len(parsed("--config", file, "--allow-code").trials) == 2
    for layers in ("{0: 'mine.py:OnlyForward'}", "[{0: elu}, {1: 'mine.py:OnlyForward'}]"):
        other = tmp_path / "layers.yaml"
        other.write_text(f"task: recall\ndataset: ar\nattn: elu\nlayers: {layers}\n")
        with pytest.raises(UsageError, match="--allow-code"):
            parsed("--config", other)
    assert len(parsed("--config", file, "--attn", "mine.py:OnlyForward").trials) == 1  # a flag may


# --- seeds ---

SEEDS = st.lists(
    st.one_of(
        st.integers(0, 10**6).map(lambda n: (str(n), [n])),
        st.tuples(st.integers(0, 10**6), st.integers(1, 50)).map(
            lambda pair: (f"{pair[0]}:{pair[0] + pair[1]}", list(range(pair[0], pair[0] + pair[1])))
        ),
    ),
    min_size=1,
    max_size=6,
)


@given(SEEDS)
def test_seeds_are_what_their_parts_say_each_once_and_in_order(parts):
    expected = list(dict.fromkeys(seed for _, seeds in parts for seed in seeds))
    assert seeds_of(",".join(text for text, _ in parts)) == expected
    assert seeds_of(" , ".join(text.replace(":", " : ") for text, _ in parts)) == expected


@given(st.text(alphabet="0123456789:,- x²", max_size=12))
@example("")
@example("0:99999999999")
def test_any_other_text_is_refused_in_one_line(text):
    try:
        seeds = seeds_of(text)
    except UsageError as error:
        assert "\n" not in str(error)
        assert "--seeds" in str(error)
    else:
        assert re.fullmatch(r"[0-9:, ]+", text)
        assert seeds
        assert len(set(seeds)) == len(seeds)


# --- what is there already ---


def test_a_result_is_found_by_its_settings_and_by_nothing_less():
    made, file = execute(RunConfig.from_dict(TINY | {"attn": "elu"}))
    same = product(TINY | {"attn": ["elu", "relu"], "seed": [0, 1]})
    earlier = Earlier(Path("runs"))
    found = earlier.done(same.trials)
    (done,) = (trial for trial in same.trials if trial.config.attn == "elu" and trial.config.seed == 0)
    assert list(found) == [done.name]
    assert found[done.name] == made
    assert earlier.file(made) == file
    for change in ({"lr": 0.5}, {"save_model": True}, {"force": True}):
        assert not earlier.done(product(TINY | {"attn": "elu"} | change).trials), change
    assert not Earlier(Path("elsewhere")).done(same.trials)
    file.rename(file.with_name("old-result.json"))
    assert not Earlier(Path("runs")).done(same.trials)


def test_earlier_results_tell_how_long_a_trial_takes_the_nearest_first():
    done = [run(RunConfig.from_dict(TINY | {"attn": attn})) for attn in ("elu", "relu")]
    seconds = [sum(one.cost["seconds"].values()) for one in done]
    earlier = Earlier(Path("runs"))

    def trial(**changes):
        return product(TINY | {"attn": "elu", "seed": 7} | changes).trials[0]

    assert earlier.device_seconds(trial()) == seconds[0]
    assert earlier.device_seconds(trial(attn="t2r")) == pytest.approx(sum(seconds) / 2)
    assert earlier.device_seconds(trial(attn="t2r"), ["seeds"]) is None
    longer = trial(epochs=2)
    assert [one.key for one in earlier.like(longer, "attention")] == []
    assert earlier.device_seconds(longer) == pytest.approx(sum(seconds) / 2)
    assert earlier.device_seconds(trial(max_len=8)) is None
    assert Earlier(Path("elsewhere")).device_seconds(trial()) is None


def test_a_result_of_a_users_file_counts_for_its_content_alone(tmp_path):
    code = ATTENTION + "class Mine(FeatureMap):\n    def forward(self, x):\n        return x.exp()\n"
    for folder, content in {"first": code, "copy": code, "changed": code + "# changed\n"}.items():
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(content)
    run(RunConfig.from_dict(TINY | {"attn": "first/mine.py:Mine"}))
    assert len(Earlier(Path("runs")).done(product(TINY | {"attn": "copy/mine.py:Mine"}).trials)) == 1
    assert not Earlier(Path("runs")).done(product(TINY | {"attn": "changed/mine.py:Mine"}).trials)


def test_data_of_the_users_may_have_changed_so_their_result_is_not_taken_for_granted(tmp_path):
    (tmp_path / "reviews.csv").write_text(
        "text,label,split\n" + "good,1,train\nbad,0,train\ngood,1,test\nbad,0,test\n" * 20
    )
    (trial,) = product({"task": "glue", "dataset": "reviews.csv", "attn": "elu"}).trials
    assert trial.own_files
    assert not product(AR | {"attn": "elu"}).trials[0].own_files


def test_a_shared_teacher_is_named_once_until_it_is_trained():
    settings = TINY | {"regime": "finetuned-conversion", "attn": ["elu", "hedgehog"], "teacher_seed": [0, 1]}
    trials = product(settings).trials
    teachers = teachers_of(trials)
    assert [t.plan.config.teacher_seed for t in teachers] == [0, 1]
    assert all(t.name.startswith("teacher-recall-ar-") for t in teachers)
    assert len({trial.teacher for trial in trials}) == 2
    assert not teachers_of(trials[:1])  # nobody shares it
    assert not teachers_of(product(TINY | {"attn": ["elu", "relu"]}).trials)  # from scratch
    assert Earlier(Path("runs")).teacher_seconds(trials[0]) is None
    train_teacher(teachers[0].config)
    assert Earlier(Path("runs")).teacher_seconds(trials[-1]) > 0
    assert [t.plan.config.teacher_seed for t in teachers_of(trials)] == [1]
