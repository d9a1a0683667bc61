"""What every test gets: a fixed seed, one thread, and the small shape that most of them start from."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from hhbench import data
from hhbench.attention import MixerShape
from hhbench.cli import main

# The same examples every time, and no deadline: a busy machine must not fail a test.
settings.register_profile("hhbench", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("hhbench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Offline, tests that fetch from the package registry are skipped, with the reason."""
    if data.offline():
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="needs the package registry; an offline switch is set"))


# Python leaves Ctrl-C ignored in what a script's shell started in the background; tests send it to themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: its exit code, output and errors."""

    def call(*arguments: object) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            code = main([str(argument) for argument in arguments])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capsys.readouterr()
        return code, out, err

    return call


@pytest.fixture
def offline_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, an empty cache, and no network."""
    monkeypatch.chdir(tmp_path)
    for name in data.OFFLINE_SWITCHES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HHBENCH_OFFLINE", "1")
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture(scope="session")
def make_shape() -> Callable[..., MixerShape]:
    """A small causal shape; keywords change it, and the widths that follow from them follow."""

    def make(**changes) -> MixerShape:
        fields = {"num_heads": 2, "head_dim": 4, "max_len": 512, "causal": True, **changes}
        fields.setdefault("num_kv_heads", fields["num_heads"])
        fields.setdefault("dim", fields["num_heads"] * fields["head_dim"])
        fields.setdefault("scale", fields["head_dim"] ** -0.5)
        return MixerShape(**fields)

    return make
