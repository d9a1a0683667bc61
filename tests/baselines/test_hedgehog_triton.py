"""The fused kernels: their results under Triton's interpreter, and that every one compiles and fits a GPU's memory."""

import concurrent.futures
import multiprocessing
from typing import Any

import pytest
import torch
from torch import Tensor

from hhbench.attention import MixerShape, build_attention
from hhbench.linear_attention import LinearAttention

triton = pytest.importorskip("triton", reason="Triton comes with torch's CUDA wheels for Linux")

from hhbench.baselines._hedgehog_triton import (  # noqa: E402
    WIDTHS,
    Launch,
    Options,
    Problem,
    hedgehog_attention,
    shared_memory,
    supported,
)

MASKS = {
    "all": torch.ones(2, 40, dtype=torch.bool),
    "left": torch.arange(40).expand(2, 40) >= torch.tensor([[7], [33]]),
    "right": torch.arange(40).expand(2, 40) < torch.tensor([[31], [3]]),
    "random": torch.rand(2, 40, generator=torch.Generator().manual_seed(1)) < 0.5,
    "a whole row": torch.tensor([[True], [False]]).expand(2, 40),
}


def make(
    *,
    causal: bool,
    length: int = 40,
    heads: int = 2,
    groups: int | None = None,
    width: int = 16,
    value_width: int = 16,
    scale: float = 1.0,
    **options: Any,
) -> tuple[LinearAttention, list[Tensor]]:
    """An attention with maps that are not the identity, and q, k and v for it."""
    torch.manual_seed(0)
    groups = groups or heads
    shape = MixerShape(
        dim=heads * width, num_heads=heads, num_kv_heads=groups, head_dim=width, scale=1, max_len=512, causal=causal
    )
    module = build_attention("hedgehog", shape, **options)
    assert isinstance(module, LinearAttention)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3).mul_(scale)
    sizes = [(heads, width), (groups, width), (groups, value_width)]
    return module, [torch.randn(2, length, h, w).transpose(1, 2).requires_grad_() for h, w in sizes]


def fused(module: LinearAttention, inputs: list[Tensor], key_mask: Tensor | None, parts: int) -> Tensor:
    a, b = module.query_map, module.key_map
    options = {"activation": a.activation, "negation": a.negation, "bias_q": a.bias, "bias_k": b.bias}
    return hedgehog_attention(
        *inputs, a.weight, b.weight, causal=module.shape.causal, key_mask=key_mask, parts=parts, **options
    )


def errors(mask: str | None, parts: int, dtype: torch.dtype, poison: bool, options: dict[str, Any]) -> dict[str, float]:
    """Of the output and of each gradient against the quadratic form in float64, in parts of its largest value.

    Or, as a gradient may be zero, of a twentieth of the largest of all.
    """
    module, inputs = make(**options)
    key_mask = None if mask is None else MASKS[mask]
    inputs = [x.detach().to(dtype).requires_grad_() for x in inputs]
    parameters = dict(module.named_parameters())
    true_module = make(**options)[0].double()
    true_inputs = [x.detach().double().requires_grad_() for x in inputs]
    truth = true_module(*true_inputs, key_mask=key_mask, form="quadratic")
    do = torch.randn_like(truth)
    true_gradients = torch.autograd.grad(truth, [*true_inputs, *true_module.parameters()], do)
    if poison:
        assert key_mask is not None
        with torch.no_grad():
            for x in inputs:
                x.masked_fill_(~key_mask[:, None, :, None], torch.nan)
    found = fused(module, inputs, key_mask, parts)
    assert found.dtype == dtype
    gradients = torch.autograd.grad(found, [*inputs, *parameters.values()], do.to(dtype))
    names = ["output", "q", "k", "v", *parameters]
    pairs = dict(zip(names, zip((found, *gradients), (truth, *true_gradients), strict=True), strict=True))
    largest = {name: true.abs().max().item() for name, (_, true) in pairs.items()}
    least = max(largest.values()) / 20
    return {
        name: ((got.double() - true).abs().max() / max(largest[name], least)).item()
        for name, (got, true) in pairs.items()
    }


@pytest.fixture(scope="module")
def interpreter():
    """A process in which Triton interprets its kernels: it must know before it is imported."""
    context = multiprocessing.get_context("spawn")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        one_thread: dict[str, Any] = {"initializer": torch.set_num_threads, "initargs": (1,)}
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context, **one_thread) as pool:
            pool.submit(int).result()

            def measure(mask=None, parts=1, dtype=torch.float32, poison=False, **options) -> dict[str, float]:
                return pool.submit(errors, mask, parts, dtype, poison, options).result()

            yield measure


DIRECTIONS = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


@DIRECTIONS
@pytest.mark.parametrize("mask", MASKS)
def test_padding_reaches_nothing(causal, mask, interpreter):
    found = interpreter(causal=causal, mask=mask, poison=mask != "all")
    assert max(found.values()) < 1e-5, found


@DIRECTIONS
@pytest.mark.parametrize(
    "options",
    [
        {"length": 1},
        {"length": 64},
        {"length": 65},
        {"length": 150, "parts": 2},
        {"length": 150, "parts": 3},
        {"value_width": 128},
        {"width": 32, "value_width": 16},
        {"feature_dim": 32},
        {"shared_heads": True},
        {"heads": 4, "groups": 2},
        {"heads": 4, "groups": 2, "share_kv_heads": True},
        {"bias": True, "mask": "left"},
        {"negation": False},
        {"activation": "joint-softmax"},
        {"activation": "joint-softmax", "negation": False},
    ],
    ids=str,
)
def test_it_is_the_quadratic_form(causal, options, interpreter):
    found = interpreter(causal=causal, **options)
    assert max(found.values()) < 1e-5, found


@DIRECTIONS
def test_features_at_the_floor_hold(causal, interpreter):
    """Weights 50 times as large: most features lie at the floor, and through it goes no gradient."""
    found = interpreter(causal=causal, scale=50.0)
    assert max(found.values()) < 1e-3, found


@DIRECTIONS
@pytest.mark.parametrize("dtype,bound", [(torch.bfloat16, 0.03), (torch.float16, 0.004)], ids=str)
def test_half_precision_is_near(causal, dtype, bound, interpreter):
    found = interpreter(causal=causal, dtype=dtype, length=150, parts=2)
    assert max(found.values()) < bound, found


def launches(
    *,
    causal: bool = True,
    dtype: torch.dtype = torch.bfloat16,
    width: int = 64,
    value_width: int | None = None,
    parts: int = 2,
    whole: bool = False,
    **options: bool,
) -> list[Launch]:
    """Every kernel of a forward and a backward pass, on tensors without data."""
    B, H, N = 4, 12, 4096
    found: list[Launch] = []
    with torch.device("meta"):
        q, k, v = (torch.empty(B, N, H, w, dtype=dtype).transpose(1, 2) for w in (width, width, value_width or width))
        weight, bias = torch.empty(H, width, width), torch.empty(H, width) if whole else None
        mask = torch.ones(B, N, dtype=torch.bool) if whole else None
        settings = Options(causal, parts=parts, **options)
        problem = Problem(q, k, v, (weight, weight), (bias, bias), mask, settings, found.append)
        out, den, states = problem.forward()
        problem.backward(out, den, states, torch.empty_like(out))
    return found


def compiled_shared_memory(launch: Launch, capability: int) -> int:
    """Compile as a launch would, which needs no GPU, and return the bytes of shared memory that it takes."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    types = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32", torch.uint8: "*u8"}
    signature, constants, attributes = {}, dict(launch.constants), {}
    for i, name in enumerate(launch.kernel.arg_names):
        value = launch.arguments.get(name)
        if isinstance(value, Tensor):
            signature[name] = types[value.dtype]
        elif value is None or value == 1:
            signature[name] = "constexpr"
            constants.setdefault(name, value)
        else:
            signature[name] = "i32"
        if isinstance(value, Tensor) or (signature[name] == "i32" and value % 16 == 0):
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(launch.kernel, signature, constants, attributes)
    options = {"num_warps": launch.tiling.warps, "num_stages": launch.tiling.stages}
    binary = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    assert binary.asm["cubin"]
    return binary.metadata.shared


def check_that_it_fits(capability: int, **options: Any) -> None:
    found = launches(**options)
    assert len({launch.kernel for launch in found}) == 4
    for launch in found:
        used = compiled_shared_memory(launch, capability)
        constants = launch.constants
        allowed = shared_memory(max(constants["P"], 2 * constants["D"]), options.get("dtype") in (None, torch.bfloat16))
        assert used <= allowed, (launch.kernel, options)
    assert allowed <= {80: 163, 90: 227}[capability] << 10


@pytest.mark.parametrize("capability", [80, 90])
def test_every_kernel_compiles_and_fits_the_shared_memory(capability):
    check_that_it_fits(capability)


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(
    "options",
    [
        {"causal": False},
        {"whole": True},
        {"causal": False, "whole": True},
        {"negation": False},
        {"joint": True},
        {"value_width": 128},
        *({"width": width} for width in WIDTHS),
        *({"width": width, "dtype": torch.float32} for width in WIDTHS if width <= 64),
        {"dtype": torch.float16},
    ],
    ids=str,
)
def test_every_variant_compiles_and_fits_the_shared_memory(capability, options):
    check_that_it_fits(capability, **options)


def test_it_says_why_it_stays_off(monkeypatch):
    module, (q, k, v) = make(causal=True)
    weights = module.query_map.weight, module.key_map.weight

    def reason() -> str | None:
        return supported(q, k, v, *weights, activation="softmax", negation=True)

    monkeypatch.delenv("HHBENCH_TRITON", raising=False)
    assert "have not run on a GPU yet; HHBENCH_TRITON=1" in reason()
    monkeypatch.setenv("HHBENCH_TRITON", "1")
    assert "need CUDA, not cpu" in reason()
