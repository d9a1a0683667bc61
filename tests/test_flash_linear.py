"""flash-linear-attention's own kernels, under Triton's interpreter, in float32: it can't read their bfloat16."""

import builtins
import concurrent.futures
import logging
import multiprocessing
import warnings
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")
pytest.importorskip("fla", reason="fla-core is in the extra `gpu`, and in `dev`", exc_type=ImportError)

from hhbench import flash_linear
from hhbench.attention import MixerShape, build_attention
from hhbench.kernels import kernels
from hhbench.linear_sum import LinearState, Sums
from hhbench.profile.correctness import distance


def interpret() -> None:
    """What their kernels ask of Triton that its interpreter lacks: timings to choose tiles by, and a loop's counter
    that is a tensor."""
    warnings.simplefilter("ignore")  # they say that this is a CPU
    torch.set_num_threads(1)
    import numpy
    import triton.language as tl
    from fla.ops.common import chunk_h
    from triton.runtime.autotuner import Autotuner
    from triton.runtime.interpreter import TensorHandle

    Autotuner.prune_configs = lambda self, arguments: self.configs[:1]
    Autotuner.do_bench = property(lambda _: lambda call, quantiles: call() or [0.0] * len(quantiles))

    def counter(*bounds: Any) -> Any:
        for i in builtins.range(*map(int, bounds)):
            yield tl.tensor(TensorHandle(numpy.array([i], dtype=numpy.int32), tl.int32), tl.int32)

    chunk_h.range = counter
    flash_linear._TRIED = 150


@pytest.fixture(scope="module")
def interpreted():
    """Calls a function in a process in which Triton interprets: it must know before it is imported."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, initializer=interpret) as pool:
            yield lambda function, *arguments: pool.submit(function, *arguments).result()


def errors(name: str, shared: bool, mask: bool, pieces: list[int]) -> tuple[dict[str, int], dict[str, float]]:
    """What ran, and the errors of outputs, state and gradients against the quadratic form in float64."""
    flash_linear.wanted = lambda q: True
    torch.manual_seed(0)
    shape = MixerShape(dim=32, num_heads=4, num_kv_heads=2, head_dim=8, scale=1.0, max_len=512, causal=True)
    attention = build_attention(name, shape, share_kv_heads=shared)
    N = sum(pieces)
    inputs = [torch.randn(2, heads, N, width).requires_grad_() for heads, width in ((4, 8), (2, 8), (2, 5))]
    key_mask = torch.rand(2, N) < 0.7 if mask else None
    cotangent = torch.randn(2, 4, N, 5)
    if key_mask is not None:
        cotangent *= key_mask[:, None, :, None]
    learned = list(attention.parameters())
    state: LinearState | None = None
    outputs = []
    with kernels() as ran:
        for start, length in zip([sum(pieces[:i]) for i in range(len(pieces))], pieces, strict=True):
            part = slice(start, start + length)
            out, state = attention(
                *(x[:, :, part] for x in inputs),
                key_mask=None if key_mask is None else key_mask[:, part],
                state=state,
                return_state=True,
            )
            outputs.append(out)
    found = [torch.cat(outputs, 2), *torch.autograd.grad(torch.cat(outputs, 2), [*inputs, *learned], cotangent)]
    attention.double()
    exact = [x.detach().double().requires_grad_() for x in inputs]
    truth, end = attention(*exact, key_mask=key_mask, form="quadratic", return_state=True)
    expected = [truth, *torch.autograd.grad(truth, [*exact, *attention.parameters()], cotangent.double())]
    names = ["output", "q", "k", "v", *(str(i) for i in range(len(learned)))]
    values = zip(names, found, expected, strict=True)
    if key_mask is not None:  # outputs of padded queries are nobody's
        asked = key_mask[:, None, :, None]
        values = [(n, x * asked, y * asked) if n in ("output", "q") else (n, x, y) for n, x, y in values]
    assert state is not None
    worst = {n: distance(x, y) for n, x, y in values}
    return dict(ran), worst | {n: distance(getattr(state, n), getattr(end, n)) for n in ("values", "keys")}


@pytest.mark.parametrize("pieces", [[150], [100, 1, 66]], ids=["whole", "in pieces"])
@pytest.mark.parametrize(
    ("name", "shared", "mask"), [("hedgehog", False, False), ("elu", True, False), ("hedgehog", False, True)]
)
def test_their_kernels_give_the_sum_its_gradients_and_its_state(name, shared, mask, pieces, interpreted):
    ran, worst = interpreted(errors, name, shared, mask, pieces)
    assert ran[flash_linear.NAME] == sum(n > 64 for n in pieces)
    assert max(worst.values()) < 1e-5, worst


def kernels_of(name: str) -> dict[str, int]:
    flash_linear.wanted = lambda q: True
    shape = MixerShape(dim=16, num_heads=2, num_kv_heads=2, head_dim=8, scale=1.0, max_len=512, causal=True)
    with kernels() as ran:
        build_attention(name, shape)(*torch.randn(3, 1, 2, 150, 8))
    return dict(ran)


def test_maps_that_their_sum_does_not_know_are_ours(interpreted):
    assert interpreted(kernels_of, "relu") == {flash_linear.NAME: 1}
    assert interpreted(kernels_of, "exp") == {"blocks": 1}, "its keys have log scales"
    assert interpreted(kernels_of, "taylor") == {"blocks": 1}, "its features have signs"


@pytest.mark.parametrize("wrong", ["differ", "fail"])
def test_kernels_that_do_not_agree_with_the_definition_are_not_used(wrong, monkeypatch, caplog):
    def causal(q, k, v, sums, *, need_sums):
        if wrong == "fail":
            raise RuntimeError("no kernel image\nfor this GPU")
        out = q @ k.mT @ v  # the sum without its normaliser, or its direction
        return out, Sums(k.mT @ v, k.sum(-2), torch.zeros(()))

    monkeypatch.setattr(flash_linear, "causal", causal)
    monkeypatch.setattr(flash_linear, "wanted", lambda q: True)
    flash_linear._agreed.clear()
    with caplog.at_level(logging.WARNING, "hhbench"):
        assert [kernels_of("relu") for _ in range(2)] == [{"blocks": 1}] * 2
    flash_linear._agreed.clear()
    assert len(caplog.messages) == 1, "said once"
    says = "differ from the definition by" if wrong == "differ" else "fail here (RuntimeError: no kernel image for this"
    assert says in caplog.text and "HHBENCH_FLA=0" in caplog.text


def test_a_cpu_never_wants_them():
    assert not flash_linear.wanted(torch.zeros(1, 1, 1, 1, dtype=torch.bfloat16))
