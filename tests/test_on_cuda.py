"""What a CUDA device would be given: linear attention traced on tensors that have a device and no data."""

import concurrent.futures
import multiprocessing
import os
from typing import NamedTuple

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hhbench import linear_attention
from hhbench.attention import MixerShape, build_attention
from hhbench.chunkwise import AtOnce, Mapped
from hhbench.kernels import kernels
from hhbench.profile import clock

pytestmark = pytest.mark.skipif(
    "dtype" not in torch.ops.aten.bmm.overloads(), reason="torch 2.8 and later name a product's type"
)


class Product(NamedTuple):
    """The type of its operands, whether that of its result was named, and what is summed over and its columns."""

    dtype: torch.dtype
    named: bool
    inner: int
    columns: int


class Products(TorchDispatchMode):
    """Every product that is made."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[Product] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.bmm:
            a, b = args[:2]
            assert a.dtype == b.dtype
            self.made.append(Product(a.dtype, function is torch.ops.aten.bmm.dtype, a.shape[2], b.shape[2]))
        return function(*args, **kwargs or {})


@pytest.fixture(scope="module")
def elsewhere():
    """Calls a function in a process of its own: one that has traced for CUDA forks no more."""
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield lambda function, *arguments: pool.submit(function, *arguments).result()


def forward(name: str, causal: bool) -> tuple[list[str], torch.dtype, list[Product]]:
    """What ran, the type of the output, and the products."""
    linear_attention.has_tensor_cores = lambda _: True
    os.environ["HHBENCH_FLA"] = "0"
    shape = MixerShape(dim=64, num_heads=2, num_kv_heads=2, head_dim=32, scale=0.2, max_len=400, causal=causal)
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        attention = build_attention(name, shape, tie_qk=True).eval()  # a tensor without data has no copy
        with kernels() as ran, Products() as products:
            out = attention(*(torch.empty(2, 2, 400, 32, dtype=torch.bfloat16) for _ in range(3)))
    assert (out.device.type, out.shape) == ("cuda", (2, 2, 400, 32))
    return list(ran), out.dtype, products.made


def backward(scaled: bool) -> tuple[list[torch.dtype], list[Product]]:
    """The types of gradients, and the products."""
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        features, values = torch.empty(4, 400, 32), torch.empty(4, 400, 33)
        block = Mapped(features, features, values, torch.empty(4, 400) if scaled else None)
        sums, log_max = torch.empty(4, 32, 33), torch.empty(4)
        with Products() as products:
            found = AtOnce(torch.bfloat16).backward(
                block, values, sums, log_max, torch.empty_like(sums), first=False, last=False
            )
    assert [x.shape for x in found] == [(4, 400, 32), (4, 400, 32), (4, 400, 32)]
    return [x.dtype for x in found], products.made


def counted() -> int:
    with FakeTensorMode(), torch.device("cuda"):
        a, b = torch.empty(3, 5, 7, dtype=torch.bfloat16), torch.empty(3, 7, 11, dtype=torch.bfloat16)
        with FlopCounterMode(display=False, custom_mapping=clock._COUNTED) as counter:
            torch.bmm(a, b, out_dtype=torch.float32)
    return counter.get_total_flops()


def assert_for_tensor_cores(products: list[Product]) -> None:
    for product in products:
        assert product.dtype == torch.bfloat16
        assert product.inner % 8 == product.columns % 8 == 0, "no rows of whole 16 bytes"


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["hedgehog", "elu", "exp", "cosformer", "taylor"])
def test_products_of_bfloat16_run_in_tensor_cores(name, causal, elsewhere):
    ran, dtype, products = elsewhere(forward, name, causal)
    kernel = "chunks at once" if name == "taylor" else "chunks at once, bfloat16"
    assert ran == [kernel if causal else f"{kernel}, bidirectional"]
    assert dtype == torch.bfloat16
    rounded = [product for product in products if product.named]
    assert bool(rounded) == (name != "taylor"), "its features cancel"
    assert_for_tensor_cores(rounded)


@pytest.mark.parametrize("scaled", [False, True], ids=["", "log scales"])
def test_so_do_those_of_the_backward_pass(scaled, elsewhere):
    dtypes, products = elsewhere(backward, scaled)
    assert set(dtypes) == {torch.float32}
    rounded = [product for product in products if product.named]
    assert len(rounded) == 15, "ten products, and five of what rounding takes"
    assert_for_tensor_cores(rounded)


def test_torch_s_counter_counts_them(elsewhere):
    assert elsewhere(counted) == 2 * 3 * 5 * 7 * 11
