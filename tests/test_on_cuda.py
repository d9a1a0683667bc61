"""What a CUDA device would be given: linear attention traced on tensors that have a device and no data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from hhbench import linear_attention
from hhbench.attention import build_attention
from hhbench.chunkwise import AtOnce, Mapped
from hhbench.kernels import kernels
from hhbench.profile import clock


class Products(TorchDispatchMode):
    """The operands of every product, and whether its result is of a type that was named."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[bool, torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.bmm:
            self.made.append((function is torch.ops.aten.bmm.dtype, *args[:2]))
        return function(*args, **kwargs or {})


pytestmark = pytest.mark.skipif(
    "dtype" not in torch.ops.aten.bmm.overloads(), reason="torch 2.8 and later name a product's type"
)


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])
@pytest.mark.parametrize("name", ["hedgehog", "elu", "exp", "cosformer", "taylor"])
def test_products_of_bfloat16_run_in_tensor_cores(name, causal, make_shape, monkeypatch):
    monkeypatch.setattr(linear_attention, "has_tensor_cores", lambda _: True)
    monkeypatch.setenv("HHBENCH_FLA", "0")
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        shape = make_shape(dim=64, num_heads=2, head_dim=32, causal=causal, max_len=400)
        attention = build_attention(name, shape, tie_qk=True)  # a tensor without data has no copy
        with kernels() as ran, Products() as products:
            out = attention.eval()(*(torch.empty(2, 2, 400, 32, dtype=torch.bfloat16) for _ in range(3)))
    assert (out.device.type, out.dtype, out.shape) == ("cuda", torch.bfloat16, (2, 2, 400, 32))
    kernel = "chunks at once" if name == "taylor" else "chunks at once, bfloat16"
    assert list(ran) == [kernel if causal else f"{kernel}, bidirectional"]
    rounded = [(a, b) for named, a, b in products.made if named]
    assert bool(rounded) == (name != "taylor"), "its features cancel"
    for a, b in rounded:
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.shape[2] % 8 == b.shape[2] % 8 == 0, "no rows of whole 16 bytes"


@pytest.mark.parametrize("scaled", [False, True], ids=["", "log scales"])
def test_so_do_those_of_the_backward_pass(scaled):
    with FakeTensorMode(), torch.device("cuda"), torch.inference_mode():
        features, values = torch.empty(4, 400, 32), torch.empty(4, 400, 33)
        block = Mapped(features, features, values, torch.empty(4, 400) if scaled else None)
        sums, log_max = torch.empty(4, 32, 33), torch.empty(4)
        with Products() as products:
            found = AtOnce(torch.bfloat16).backward(
                block, values, sums, log_max, torch.empty_like(sums), first=False, last=False
            )
    assert [x.shape for x in found] == [(4, 400, 32), (4, 400, 32), (4, 400, 32)]
    assert all(x.dtype == torch.float32 for x in found)
    rounded = [(a, b) for named, a, b in products.made if named]
    assert len(rounded) == 15, "ten products, and five of what rounding takes"
    for a, b in rounded:
        assert a.dtype == b.dtype == torch.bfloat16
        assert a.shape[2] % 8 == b.shape[2] % 8 == 0


def test_torch_s_counter_counts_them():
    with FakeTensorMode(), torch.device("cuda"):
        a, b = torch.empty(3, 5, 7, dtype=torch.bfloat16), torch.empty(3, 7, 11, dtype=torch.bfloat16)
        with FlopCounterMode(display=False, custom_mapping=clock._COUNTED) as counter:
            torch.bmm(a, b, out_dtype=torch.float32)
    assert counter.get_total_flops() == 2 * 3 * 5 * 7 * 11
