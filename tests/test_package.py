"""hhbench.tasks and hhbench.baselines import from a checkout, an editable install and a wheel alike."""

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SHOW = "import hhbench, hhbench.tasks, hhbench.baselines; print(hhbench.tasks.__file__, hhbench.baselines.__file__)"


def imported(folder: Path) -> list[Path]:
    """Where the two lie for a Python that knows this folder and nothing that is installed."""
    code = f"import sys; sys.path.insert(0, {str(folder)!r}); {SHOW}"
    out = subprocess.run([sys.executable, "-I", "-S", "-c", code], capture_output=True, text=True, check=True).stdout
    return [Path(path) for path in out.split()]


def test_a_checkout() -> None:
    assert imported(ROOT) == [ROOT / "tasks" / "__init__.py", ROOT / "baselines" / "__init__.py"]


def test_what_is_installed_here(tmp_path: Path) -> None:
    out = subprocess.run([sys.executable, "-c", SHOW], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert len(out.split()) == 2


def test_beside_a_folder_of_the_same_name(tmp_path: Path) -> None:
    """Where a clone lies, `python -m` finds the clone's folder before what is installed from it."""
    (tmp_path / "hhbench" / "tasks").mkdir(parents=True)
    (tmp_path / "mine.py").write_text(
        "from hhbench.attention import FeatureMap\n\n\nclass Mine(FeatureMap):\n    pass\n"
    )
    command = [sys.executable, "-m", "hhbench", "show", "mine.py:Mine"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("mine.py:Mine: Mine, a FeatureMap")


@pytest.mark.network  # the build fetches setuptools
def test_a_wheel(tmp_path: Path) -> None:
    source = tmp_path / "source"  # building writes beside the sources
    shutil.copytree(ROOT, source, ignore=shutil.ignore_patterns(".*", "runs", "build", "*.egg-info", "results"))
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "-w", str(tmp_path), str(source)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("hhbench-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(tmp_path / "site")
    for folder in ("tasks", "baselines"):
        files = {f"hhbench/{folder}/{p.name}" for p in (ROOT / folder).glob("*.py")}
        assert files <= set(names)
    assert not [name for name in names if name.startswith(("tasks/", "baselines/", "tests/"))]
    assert imported(tmp_path / "site") == [
        tmp_path / "site" / "hhbench" / folder / "__init__.py" for folder in ("tasks", "baselines")
    ]
