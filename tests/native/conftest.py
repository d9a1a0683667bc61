"""Every test here asks for the compiled form."""

import shutil

import pytest
from native_cases import forget

from hhbench import native


@pytest.fixture(autouse=True)
def _asked_for(monkeypatch):
    monkeypatch.setenv("HHBENCH_NATIVE", "1")


@pytest.fixture
def cc():
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler named cc")


@pytest.fixture
def compiler(cc):
    forget()
    assert native.library() is not None


@pytest.fixture
def fresh(monkeypatch, tmp_path):
    """A cache of its own, and no library remembered before or after."""
    monkeypatch.setenv("HHBENCH_CACHE", str(tmp_path))
    forget()
    yield tmp_path
    forget()
