"""What others made is read and never run: configs, results, checkpoints, models. Nothing leaves its folder."""

import json
import pickle
import re
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from tiny import TEXT, VOCAB

from hhbench import leaderboard, models, result
from hhbench.cli import main
from hhbench.errors import HHBenchError

GOOD = Path(__file__).parent.parent / "docs" / "results" / "mini" / "recall-ar-elu-s0.result.json"


class Bomb:
    """Unpickled, it leaves a file."""

    def __reduce__(self):
        return (Path.touch, (Path("exploded"),))


@pytest.fixture(autouse=True)
def _nothing_explodes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("bomb.py").write_text("from pathlib import Path\nPath('exploded').touch()\nclass Bomb: ...\n")
    yield
    assert not Path("exploded").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"attn": "bomb.py:Bomb"},
        {"task": "bomb.py:Bomb"},
        {"attn": "bomb:Bomb"},
        {"layers": {"0": "bomb.py:Bomb"}},
        {"layers": "0=softmax,1=bomb.py:Bomb"},
        {"layers": {"0": "bomb.py:Bomb[a=1]"}, "allow_code": True},  # a file can't allow itself
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["yaml", "result"])
def test_a_config_imports_no_code(settings, kind, capsys):
    values = {"task": "recall", "dataset": "ar", "attn": "elu"} | settings
    theirs = json.loads(GOOD.read_text())
    theirs["config"] |= values
    Path("theirs").write_text(yaml.safe_dump(values) if kind == "yaml" else json.dumps(theirs))
    assert main(["run", "--config", "theirs", "--dry-run"]) == 2
    assert "--allow-code" in capsys.readouterr().err


def test_a_yaml_config_makes_no_objects(capsys):
    Path("theirs.yaml").write_text("task: !!python/object/apply:os.system ['touch exploded']\n")
    assert main(["run", "--config", "theirs.yaml", "--dry-run"]) == 2
    assert "can't be read" in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"\xff\xfe\x00", b"[" * 50_000, b"task: [", b"- 1"])
def test_a_config_that_is_none_is_refused_in_one_line(content, capsys):
    Path("theirs.yaml").write_bytes(content)
    assert main(["run", "--config", "theirs.yaml", "--dry-run"]) == 2
    assert "--config theirs.yaml" in capsys.readouterr().err


def test_a_results_folders_are_not_the_reruns(capsys):
    theirs = json.loads(GOOD.read_text())
    theirs["config"] |= {"out": "../elsewhere", "model_folder": "/elsewhere", "train_examples": 64, "test_examples": 16}
    Path("theirs.json").write_text(json.dumps(theirs))
    assert main(["run", "--config", "theirs.json", "--logger", "none", "--accelerator", "cpu"]) == 0
    assert {path.name for path in Path().iterdir()} == {"runs", "bomb.py", "theirs.json"}
    assert not Path("../elsewhere").exists()


def a_model(folder: str, **changes) -> Path:
    from transformers import BertConfig, BertForSequenceClassification

    sizes = {name: value for name, value in TEXT.items() if name != "vocab_size"}
    BertForSequenceClassification(BertConfig(vocab_size=VOCAB, **sizes)).save_pretrained(folder)
    path = Path(folder) / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return path.parent


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel"},
        {"model_type": "bomb", "auto_map": {"AutoConfig": "bomb.Bomb", "AutoModel": "bomb.Bomb"}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_model_brings_no_code(changes, monkeypatch):
    from transformers import AutoModelForSequenceClassification

    monkeypatch.setattr("builtins.input", lambda *args: "y")  # nobody is asked
    folder = a_model("theirs", **changes)
    (folder / "bomb.py").write_text(Path("bomb.py").read_text())
    with pytest.raises(HHBenchError, match="theirs"):
        models.transformers_model(AutoModelForSequenceClassification, str(folder), pretrained=True, dropout=0.0)


def test_pickled_weights_are_refused():
    folder = a_model("theirs")
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))
    with pytest.raises(HHBenchError, match="pickled"):
        models.check_folder(folder, pretrained=True)


def test_scores_of_examples_are_not_unpickled():
    np.savez("theirs.npz", index=np.array([Bomb()], dtype=object))
    with np.load("theirs.npz") as arrays, pytest.raises(ValueError, match="allow_pickle"):
        arrays["index"]


def test_a_checkpoint_is_not_unpickled():
    torch.save({"state_dict": Bomb()}, "theirs.ckpt")
    assert zipfile.is_zipfile("theirs.ckpt")
    with pytest.raises(pickle.UnpicklingError):
        torch.load("theirs.ckpt", weights_only=True)


HOSTILE = [
    "<script>x</script>",
    "a|b",
    "a\\|b",
    "[x](y)",
    "![x](y)",
    "`x`",
    "&lt;",
    "\x1b[31mred\x1b[0m",
    "a\nb\rc",
    "=1+1",
]


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_in_a_table_is_text_and_nothing_else(name):
    theirs = json.loads(GOOD.read_text())
    theirs["attention"]["label"] = name
    theirs["environment"]["device"] = name
    tables = leaderboard.tables([result.Result.from_dict(theirs)])
    text, csv = leaderboard.render(tables), leaderboard.render(tables, "csv")
    assert (text + csv).replace("\n", "").isprintable()
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 3
    assert not re.search(r"(?<!\\)<script|\[x\]\(|!\[x|(?<!\\)`|(?<!\\)&", text)
    cells = rows[2].replace("\\\\", "").replace("\\|", "").count("|")
    assert cells == rows[1].count("|")
    assert len(csv.splitlines()) == 2 and ",=1+1" not in csv


def test_a_number_without_end_spoils_one_result_not_the_table():
    theirs = GOOD.read_text().replace('"num_examples": 2000', f'"num_examples": 1{"0" * 400}')
    Path("a.result.json").write_text(theirs.replace('"value": ', f'"value": 1{"0" * 400}, "x": ', 1))
    Path("b.result.json").write_text(
        GOOD.read_text().replace('"peak_memory_mb": ', f'"peak_memory_mb": 1{"0" * 400}', 1)
    )
    Path("c.result.json").write_text(GOOD.read_text())
    found, complaints = result.find(Path())
    assert len(found) == 1 and len(complaints) == 2


def test_settings_that_look_like_markup_are_shown_as_they_are(capsys):
    first, second = (json.loads(GOOD.read_text()) for _ in range(2))
    second["identity"]["settings"]["option"] = {"a": "[/red]"}
    second["key"] = result.key_of(second["identity"])
    for name, values in (("a.json", first), ("b.json", second)):
        Path(name).write_text(json.dumps(values))
    assert main(["show", "a.json", "b.json"]) == 0
    assert "[/red]" in capsys.readouterr().out
