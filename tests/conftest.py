"""What every test gets: a fixed seed, one thread, and the small shape that most of them start from."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import settings

from hhbench import data
from hhbench.attention import MixerShape

# The same examples every time, and no deadline: a busy machine must not fail a test.
settings.register_profile("hhbench", derandomize=True, deadline=None, print_blob=False)
settings.load_profile("hhbench")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Offline, tests that fetch from the package registry are skipped, with the reason."""
    if data.offline():
        for item in items:
            if item.get_closest_marker("network"):
                item.add_marker(pytest.mark.skip(reason="needs the package registry; an offline switch is set"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


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
