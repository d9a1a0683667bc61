"""What a CUDA device would be given: linear attention traced on tensors that have a device and no data."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from hhbench import linear_attention
from hhbench.attention import build_attention
from hhbench.kernels import kernels


class Products(TorchDispatchMode):
    """The operands of every product, and whether its result is of a type that was named."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[tuple[bool, torch.Tensor, torch.Tensor]] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.overloadpacket is torch.ops.aten.bmm:
            self.made.append((function is torch.ops.aten.bmm.dtype, *args[:2]))
        return function(*args, **kwargs or {})


@pytest.mark.skipif("dtype" not in torch.ops.aten.bmm.overloads(), reason="torch 2.8 and later name a product's type")
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
