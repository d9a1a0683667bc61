"""What the README says is so: its commands run, its tables are the results', its tree is the tree."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from hhbench import result

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()

# Real runs, cut short: the commands are what is tested here, not the numbers.
SHORT = [
    "--train-examples",
    "64",
    "--test-examples",
    "64",
    "--epochs",
    "0.5",
    "--transfer-epochs",
    "0.5",
]
SHORT_TEACHER = ["--teacher-epochs", "0.5"]  # what is converted is trained already


def code(language: str, text: str = README) -> list[str]:
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)
    return [block for name, block in blocks if name == language]


def commands() -> list[str]:
    lines = "".join(code("bash")).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def my_map() -> str:
    (source,) = (block for block in code("python") if block.startswith("# my_map.py"))
    return source


def run(command: list[str], folder: Path) -> str:
    finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where a reader of the README stands."""
    (tmp_path / "my_map.py").write_text(my_map())
    (tmp_path / "docs").symlink_to(ROOT / "docs")
    return tmp_path


@pytest.fixture(scope="session")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of random weights, converted: what stands in for the README's, which takes minutes to make."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    home = tmp_path_factory.mktemp("converted")
    (home / "text.txt").write_text(README + CONTRIBUTING)
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([README], vocab_size=300, show_progress=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer._tokenizer).save_pretrained(home / "llama")
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, bos_token_id=None, eos_token_id=None,
        )
    ).save_pretrained(home / "llama")  # fmt: skip
    words = ["hhbench", "convert", "./llama", "--attn", "hedgehog", "--data", "text.txt", "--to", "smollm2-hedgehog"]
    run([sys.executable, "-m", *words, *SHORT, "--max-len", "32"], home)
    return home / "smollm2-hedgehog"


def needs_network(command: str) -> bool:
    return ("--task glue" in command and "--dry-run" not in command) or "hhbench convert" in command


@pytest.mark.parametrize(
    "command", [pytest.param(c, marks=pytest.mark.network) if needs_network(c) else c for c in commands()]
)
def test_a_command_runs(command: str, folder: Path, request: pytest.FixtureRequest) -> None:
    words = shlex.split(command)
    assert words[0] == "hhbench"
    if "smollm2-hedgehog" in words and words[1] != "convert":
        (folder / "smollm2-hedgehog").symlink_to(request.getfixturevalue("converted"))
    trains = words[1] in ("run", "convert") and "--dry-run" not in words and "smollm2" not in words
    if trains:
        words += SHORT + (SHORT_TEACHER if words[1] == "run" else [])
    if words[2:3] == ["smollm2"]:
        words.append("--dry-run")
    out = run([sys.executable, "-m", *words], folder)
    assert ("result: " in out) == trains


def test_the_python_example_runs(folder: Path) -> None:
    (example,) = (block for block in code("python") if block.startswith("import hhbench"))
    assert "Score(" in run([sys.executable, "-c", example], folder)


def test_the_tables_are_those_of_the_results() -> None:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from publish import END, tables
    finally:
        sys.path.pop(0)
    for (page, start), printed in tables().items():
        block = page.read_text().partition(start)[2].partition(END)[0]
        assert block.count("\n| ") > 3
        assert block.strip("\n") == printed.strip("\n"), (
            f"run scripts/publish.py: {page.name} is not what the results say"
        )


@pytest.mark.parametrize("name", ["mini", "conversions", "teachers"])
def test_the_published_tables_are_the_command_s(name: str, folder: Path) -> None:
    printed = run([sys.executable, "-m", "hhbench", "leaderboard", f"docs/results/{name}"], folder)
    assert printed.strip("\n") in (ROOT / "docs" / f"{name}.md").read_text()


def test_results_fit_the_code_that_is_committed() -> None:
    """A result of an older version of an attention or a task must be run again."""
    from hhbench.attention import ATTENTIONS
    from hhbench.task import TASKS

    for one in result.find(ROOT / "docs" / "results")[0]:
        assert one.identity["attention"]["version"] == ATTENTIONS.get(one.attention["name"]).version
        assert one.identity["task"]["version"] == TASKS.get(one.task["name"]).part.version


def test_the_tree_is_the_tree() -> None:
    (tree,) = (block for block in code("") if block.startswith("hhbench/"))
    named = set(re.findall(r"[\w/]+\.(?:py|sh)", tree))
    for package in ("hhbench", "hhbench/hosts", "hhbench/fidelity", "hhbench/profile", "tasks", "baselines"):
        files = {p.name for p in (ROOT / package).glob("*.py") if not p.name.startswith("_")}
        assert files <= named, f"{package}: {files - named} missing in the README's tree"
    packages = ("", "/commands", "/hosts", "/fidelity", "/profile")  # of the commands the tree names what they share
    folders = (*(f"hhbench{package}" for package in packages), "tasks", "baselines", "scripts")
    everywhere = {p.name for folder in folders for p in (ROOT / folder).iterdir()}
    assert named <= everywhere


def test_the_attention_of_contributing_is_the_one_of_the_readme() -> None:
    """CONTRIBUTING's example is a working attention too."""
    (example,) = (block for block in code("python", re.sub(r"^   ", "", CONTRIBUTING, flags=re.MULTILINE)))
    scope: dict[str, object] = {"__name__": "hhbench_test_contributing"}
    exec(compile(example, "CONTRIBUTING.md", "exec"), scope)
    assert "SquaredReLU" in scope


def test_no_registry_s_host_is_named() -> None:
    words = ("pypi", "org"), ("huggingface", "co"), ("npmjs", "com"), ("npmjs", "org"), ("debian", "org")
    names = [rf"{name}\.{domain}\b" for name, domain in words]
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in listed.splitlines():
        assert not re.search("|".join(names).encode(), (ROOT / name).read_bytes()), f"{name} names a host"
