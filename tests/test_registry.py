"""A name is a file: built-ins, plug-ins, a user's own files, and what is answered to a wrong name."""

import hashlib
import importlib
import sys
from pathlib import Path

import pytest
import torch

from hhbench.attention import ATTENTIONS, AttentionSpec, FeatureMap, probe
from hhbench.errors import HHBenchError, UsageError, unknown_name
from hhbench.registry import Registry, is_code_reference

HEADER = "from hhbench.attention import Attention, FeatureMap, SequenceMixer, register_attention\n"
SQUARE = HEADER + "class Square(FeatureMap):\n    def forward(self, x):\n        return x * x\n"
DECORATED = SQUARE.replace("class", '@register_attention(paper="mine, eq. 1", cost="N D E")\nclass')


@pytest.fixture(autouse=True)
def _own_registry(monkeypatch):
    """What a test registers or imports is gone after it."""
    for name in ATTENTIONS.names():
        ATTENTIONS.get(name)
    monkeypatch.setattr(ATTENTIONS, "_specs", dict(ATTENTIONS._specs))
    monkeypatch.setattr(ATTENTIONS, "_external", {})
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        if not name.startswith(("hhbench.", "torch")):
            del sys.modules[name]


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write files below a folder that is on the import path."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(path: str, text: str) -> Path:
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
        importlib.invalidate_caches()
        return file

    return write


def one_line(error: BaseException) -> str:
    assert "\n" not in str(error)
    return str(error)


# --- built-ins ---


def test_a_name_is_a_file():
    folder = Path(importlib.import_module("hhbench.baselines").__path__[0])
    files = {file.stem.replace("_", "-") for file in folder.glob("[!_]*.py")}
    assert files <= set(ATTENTIONS.names())
    for name in files:
        spec = ATTENTIONS.get(name)
        assert spec.name == name
        assert spec.part.__module__ == f"hhbench.baselines.{name.replace('-', '_')}"
        assert not spec.external
        assert spec.source_hash() is None


def test_names_import_nothing(write):
    write("shelf/__init__.py", "")
    write("shelf/first_thing.py", "raise AssertionError")
    write("shelf/_private.py", "raise AssertionError")
    registry: Registry = Registry("thing", package="shelf", entry_points="no.such.group", adopt=lambda c, n: n)
    assert registry.names() == ["first-thing"]
    assert "shelf.first_thing" not in sys.modules


def test_a_built_in_is_imported_when_asked_for(write):
    write("shelf/__init__.py", "things = None")
    write("shelf/first_thing.py", "import shelf\nshelf.things.add('first-thing', 42)")
    registry: Registry = Registry("thing", package="shelf", entry_points="no.such.group", adopt=lambda c, n: n)
    importlib.import_module("shelf").things = registry
    assert registry.get("first-thing") == registry.get("first-thing", allow_code=False) == 42


@pytest.mark.parametrize("wrong,nearest", [("hedgehgo", "hedgehog"), ("sofmax", "softmax"), ("T2R", "t2r")])
def test_a_wrong_name_is_answered_with_the_nearest(wrong, nearest):
    with pytest.raises(UsageError, match=f"no attention named '{wrong}'") as caught:
        ATTENTIONS.get(wrong)
    message = one_line(caught.value)
    assert all(name in message for name in ATTENTIONS.names())
    if nearest != "t2r":
        assert f"Did you mean '{nearest}'?" in message


def test_a_name_far_from_all_gets_no_guess():
    assert "Did you mean" not in str(unknown_name("thing", "zzzz", ["abc"]))
    assert str(unknown_name("thing", "a", [])) == "no thing named 'a'. Known: none."


def test_a_repeated_name_is_refused():
    spec = ATTENTIONS.get("softmax")
    with pytest.raises(UsageError, match="attention 'softmax' is already registered"):
        ATTENTIONS.add("softmax", spec)


def test_what_is_a_reference_to_code():
    assert all(map(is_code_reference, ("a.py", "a.py:B", "dir/a.py:B", "package.module.B", "package:B")))
    assert not any(map(is_code_reference, ("softmax", "softmax-window", "t2r", "softmax_window")))


def test_a_built_in_s_name_is_taken_before_it_is_imported(write):
    write("shelf/__init__.py", "")
    write("shelf/first_thing.py", "raise AssertionError")
    registry: Registry = Registry("thing", package="shelf", entry_points="no.such.group", adopt=lambda c, n: n)
    with pytest.raises(UsageError, match="thing 'first-thing' is already registered"):
        registry.add("first-thing", 42, external=True)


def test_a_user_s_class_can_t_take_a_built_in_s_name(write):
    file = write("mine.py", DECORATED.replace('cost="N D E"', 'cost="N D E", name="softmax"'))
    with pytest.raises(UsageError, match="attention 'softmax' is already registered"):
        ATTENTIONS.get(f"{file}:Square")


# --- a user's own file or module ---


def test_a_class_of_a_file(write, make_shape):
    file = write("mine.py", SQUARE)
    spec = ATTENTIONS.get(f"{file}:Square")
    assert (spec.name, spec.external, spec.rung) == ("mine.py:Square", True, "FeatureMap")
    assert spec.directions == {"causal", "bidirectional"}
    assert ATTENTIONS.get(f"{file}:Square") is spec
    out = spec.build(make_shape())(*torch.ones(3, 1, 2, 3, 4))
    torch.testing.assert_close(out, torch.ones(1, 2, 3, 4))
    probe(spec, direction="causal", options={})


def test_a_file_named_from_its_own_folder(write, tmp_path, monkeypatch):
    write("mine.py", SQUARE)
    monkeypatch.chdir(tmp_path)
    assert ATTENTIONS.get("mine.py:Square").part is ATTENTIONS.get("./mine.py:Square").part


def test_a_decorated_class_keeps_what_it_says(write):
    file = write("mine.py", DECORATED)
    spec = ATTENTIONS.get(f"{file}:Square")
    assert (spec.name, spec.paper, spec.cost, spec.external) == ("Square", "mine, eq. 1", "N D E", True)
    assert ATTENTIONS.get("Square") is spec


def test_two_files_of_one_name_don_t_meet(write):
    one, other = write("a/mine.py", SQUARE), write("b/mine.py", SQUARE + "        # other\n")
    specs = [ATTENTIONS.get(f"{file}:Square") for file in (one, other)]
    assert specs[0].part is not specs[1].part
    assert specs[0].source_hash() != specs[1].source_hash()


@pytest.mark.parametrize("reference", ["lab.maps:Square", "lab.maps.Square"])
@pytest.mark.parametrize("text,name", [(SQUARE, None), (DECORATED, "Square")], ids=["undecorated", "decorated"])
def test_a_dotted_path(write, reference, text, name):
    write("lab/__init__.py", "")
    write("lab/maps.py", text)
    spec = ATTENTIONS.get(reference)
    assert spec.part is sys.modules["lab.maps"].Square
    assert spec.name == (name or reference)
    assert spec.external


def test_code_that_a_file_names_is_refused(write):
    file = write("mine.py", "raise AssertionError('imported')")
    write("lab.py", "raise AssertionError('imported')")
    for name in (f"{file}:Square", "lab:Square", "lab.Square"):
        with pytest.raises(UsageError, match="--allow-code"):
            ATTENTIONS.get(name, allow_code=False)
    assert ATTENTIONS.get("softmax", allow_code=False).name == "softmax"


def test_code_stays_refused_after_it_was_allowed_once(write):
    file = write("mine.py", SQUARE)
    ATTENTIONS.get(f"{file}:Square")
    with pytest.raises(UsageError, match="--allow-code"):
        ATTENTIONS.get(f"{file}:Square", allow_code=False)


@pytest.mark.parametrize(
    "text",
    [
        "raise ValueError('first line\\nsecond line')",
        "def broken(:",
        "import no_such_package_at_all",
        "1 / 0",
    ],
    ids=["ValueError of two lines", "SyntaxError", "ImportError", "ZeroDivisionError"],
)
def test_a_file_that_raises_is_named_in_one_line(write, text):
    file = write("mine.py", text)
    for _ in range(2):  # no half of a module is kept
        with pytest.raises(HHBenchError, match=r"importing .*mine\.py failed") as caught:
            ATTENTIONS.get(f"{file}:Square")
        assert str(file) in one_line(caught.value)
        assert caught.value.__cause__ is not None


def test_missing_files_modules_and_classes(write, tmp_path):
    file = write("mine.py", SQUARE + "def function(): pass\n")
    with pytest.raises(UsageError, match=r"no file .*absent\.py"):
        ATTENTIONS.get(f"{tmp_path}/absent.py:Square")
    with pytest.raises(UsageError, match=r"no file "):
        ATTENTIONS.get(f"{tmp_path}/folder.py:Square")
    with pytest.raises(HHBenchError, match=r"importing no_such_lab\.maps failed: ModuleNotFoundError"):
        ATTENTIONS.get("no_such_lab.maps:Square")
    with pytest.raises(UsageError, match=r"no class in .*mine\.py named 'Sqare'\. Did you mean 'Square'\?") as caught:
        ATTENTIONS.get(f"{file}:Sqare")
    assert "FeatureMap" not in one_line(caught.value), "only the file's own classes are offered"
    with pytest.raises(UsageError, match="no class in"):
        ATTENTIONS.get(f"{file}:function")
    for name in (str(file), "mine.py"):
        with pytest.raises(UsageError, match="say which class"):
            ATTENTIONS.get(name)


def test_a_class_of_no_contract_is_refused(write):
    file = write("mine.py", "import torch\nclass Square(torch.nn.Module):\n    pass\n")
    with pytest.raises(UsageError, match=r"mine\.py:Square is none of .*FeatureMap, Attention and SequenceMixer"):
        ATTENTIONS.get(f"{file}:Square")


# --- plug-ins: an installed package's entry points ---


@pytest.fixture
def install(write):
    """What pip leaves of a package with one entry point: a module and its dist-info folder."""

    def install(text: str, *, name: str = "my-square", value: str = "lab:Square") -> None:
        write("lab.py", text)
        write("lab-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: lab\nVersion: 1.0\n")
        write("lab-1.0.dist-info/entry_points.txt", f"[hhbench.attentions]\n{name} = {value}\n")

    return install


def test_a_plug_in_is_listed_without_being_imported(install):
    install("raise AssertionError('imported')")
    assert "my-square" in ATTENTIONS.names()
    with pytest.raises(UsageError, match="Did you mean 'my-square'"):
        ATTENTIONS.get("my-sqare")


def test_a_plug_in_is_found_by_its_name(install, make_shape):
    install(SQUARE)
    for allow_code in (True, False):  # who installed it has trusted it
        spec = ATTENTIONS.get("my-square", allow_code=allow_code)
        assert (spec.name, spec.external, spec.part.__module__) == ("my-square", True, "lab")
    assert spec.source_hash() == hashlib.sha256(SQUARE.encode()).hexdigest()
    assert spec.build(make_shape()).query_map.feature_dim == 4


def test_a_plug_in_may_be_decorated(install):
    install(DECORATED)
    assert ATTENTIONS.get("my-square").paper == "mine, eq. 1"


def test_a_plug_in_that_raises_is_named(install):
    install("raise ValueError('old torch')")
    with pytest.raises(HHBenchError, match="importing plug-in lab:Square failed: ValueError: old torch"):
        ATTENTIONS.get("my-square")


def test_a_plug_in_that_is_no_class_is_refused(install):
    install("def square(x): return x * x", value="lab:square")
    with pytest.raises(UsageError, match="my-square is none of"):
        ATTENTIONS.get("my-square")


# --- what a user's class does when it is built and called ---


def adopted(write, body: str, *, base: str = "Attention") -> AttentionSpec:
    file = write("mine.py", HEADER + f"import torch\nclass Mine({base}):\n{body}")
    return ATTENTIONS.get(f"{file}:Mine")


CALL = "    def forward(self, q, k, v, *, key_mask=None, positions=None):\n        return "


@pytest.mark.parametrize(
    "returned,message",
    [
        ("q[:, :, :1]", r"mine\.py:Mine returned \[2, 2, 1, 8\] where \[2, 2, 4, 8\] was expected"),
        ("(q, None)", "returned tuple where"),
        ("None", "returned NoneType where"),
        ("q @ k", "failed on four tokens: RuntimeError"),
    ],
)
@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_a_probe_catches_a_wrong_output(write, returned, message, direction):
    spec = adopted(write, CALL + returned + "\n")
    with pytest.raises(HHBenchError, match=message) as caught:
        probe(spec, direction=direction, options={})
    one_line(caught.value)


def test_a_probe_of_a_mixer(write):
    call = "    def forward(self, x, *, key_mask=None):\n        return "
    probe(adopted(write, call + "x\n", base="SequenceMixer"), direction="causal", options={})


def test_a_probe_catches_a_mixer_s_wrong_output(write):
    call = "    def forward(self, x, *, key_mask=None):\n        return "
    with pytest.raises(HHBenchError, match=r"returned \[2, 4, 8\] where \[2, 4, 16\]"):
        probe(adopted(write, call + "x[..., :8]\n", base="SequenceMixer"), direction="bidirectional", options={})


def test_a_probe_leaves_the_random_numbers_alone(write):
    spec = adopted(write, CALL + "v\n")
    before = torch.get_rng_state()
    probe(spec, direction="causal", options={})
    assert torch.equal(torch.get_rng_state(), before)


def test_a_constructor_that_raises_is_named(write, make_shape):
    spec = adopted(write, "    def __init__(self, shape):\n        raise ValueError('no')\n" + CALL + "v\n")
    with pytest.raises(HHBenchError, match=r"building mine\.py:Mine failed: ValueError: no"):
        spec.build(make_shape())


def test_an_unfinished_class_is_named(write, make_shape):
    spec = adopted(write, "    pass\n")
    with pytest.raises(HHBenchError, match=r"building mine\.py:Mine failed: TypeError: .*abstract"):
        spec.build(make_shape())


def init(option: str) -> str:
    name = option.partition("=")[0]
    body = f"super().__init__(shape)\n        self.{name} = {name}\n"
    return f"    def __init__(self, shape, *, {option}):\n        {body}"


def test_keyword_only_arguments_are_options(write, make_shape):
    spec = adopted(write, init("width=3") + CALL + "v\n")
    assert spec.options == {"width": 3}
    assert spec.build(make_shape(), width=5).width == 5
    with pytest.raises(UsageError, match=r"no option of mine\.py:Mine named 'widht'\. Did you mean 'width'"):
        spec.build(make_shape(), widht=5)


def test_a_map_s_options_stand_beside_those_of_the_sum(write, make_shape):
    spec = adopted(
        write,
        init("power=2") + "    def forward(self, x):\n        return x**self.power\n",
        base="FeatureMap",
    )
    assert spec.options == {"power": 2, "tie_qk": False, "share_kv_heads": False}
    module = spec.build(make_shape(), power=4, tie_qk=True)
    assert module.query_map is module.key_map
    assert module.key_map.power == 4
    assert issubclass(spec.part, FeatureMap)


def test_the_source_hash_follows_the_file(write):
    file = write("mine.py", SQUARE)
    spec = ATTENTIONS.get(f"{file}:Square")
    first = spec.source_hash()
    assert first == hashlib.sha256(SQUARE.encode()).hexdigest()
    file.write_text(SQUARE + "# changed\n")
    assert spec.source_hash() != first


def test_the_same_words_in_another_folder_are_another_file(tmp_path, monkeypatch):
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        base = "from hhbench.attention import FeatureMap\n\n\nclass Mine(FeatureMap):\n"
        (folder / "mine.py").write_text(
            f"{base}    word = {name!r}\n\n    def forward(self, x):\n        return x.exp()\n"
        )
        monkeypatch.chdir(folder)
        found.append(ATTENTIONS.get("mine.py:Mine").part.word)
    assert found == ["one", "two"]
