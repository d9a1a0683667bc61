"""The compiled form: the definition's numbers, no later key, and the plain form wherever it can't serve."""

import logging
import os
import platform
import subprocess
from pathlib import Path

import pytest
import torch
from native_cases import FORMS, forget, hedgehog
from torch import Tensor, nn

from hhbench import native
from hhbench.attention import FeatureMap, build_attention
from hhbench.kernels import kernels
from hhbench.linear_attention import LinearAttention
from hhbench.linear_sum import CHUNK
from hhbench.profile.correctness import distance

LENGTHS = {
    "two tokens": {"B": 1, "H": 1, "N": 2, "D": 3, "E": 1},
    "a tile less one": {"B": 1, "H": 2, "N": 63, "D": 16, "E": 16},
    "a tile and one": {"B": 2, "H": 2, "N": 65, "D": 16, "E": 24},
    "several blocks": {"B": 2, "H": 4, "G": 2, "N": 600, "D": 20, "E": 37, "half": 13},
    "long": {"B": 1, "H": 1, "N": 2048, "D": 64, "E": 64},
}
CASES = LENGTHS | {name: form | {"N": 150} for name, form in FORMS.items()}


# Of bfloat16, widths that are multiples of 32, up to 64 for a softmax: multiplied in AMX.
ROUNDED = {
    "two tokens": {"B": 1, "H": 2, "N": 2, "D": 32, "E": 32},
    "half a tile": {"B": 1, "H": 2, "N": 32, "D": 64, "E": 64},
    "a tile and one": {"B": 2, "H": 2, "N": 65, "D": 64, "E": 32},
    "several blocks": {"B": 2, "H": 4, "G": 2, "N": 600, "D": 32, "E": 96, "half": 64, "bias": True},
    "wide": {"B": 1, "H": 2, "N": 150, "D": 128, "E": 96, "half": 32, "bias": True},
    "widest": {"B": 1, "H": 4, "G": 2, "N": 171, "D": 128, "E": 128, "half": 64, "share_kv_heads": True},
    "long": {"B": 1, "H": 1, "N": 2048, "D": 64, "E": 64},
}


BOTH = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def rounded(make_shape, case):
    attention, inputs = hedgehog(make_shape, **ROUNDED[case])
    return attention, [x.bfloat16() for x in inputs]


def either(make_shape, dtype, **sizes):
    """In float32 of these sizes, or what is multiplied in AMX."""
    return rounded(make_shape, "several blocks") if dtype == torch.bfloat16 else hedgehog(make_shape, **sizes)


def ran_native(attention, inputs, **more):
    with torch.inference_mode(), kernels() as seen:
        out = attention(*inputs, **more)
    return out, not seen.keys().isdisjoint({"native", "native amx"})


def amx() -> str:
    """Which kernel serves ROUNDED, on a CPU that has AMX and on one that hasn't."""
    compiled = native.library()
    assert compiled is not None
    return "native amx" if compiled.has_amx() else "native"


@pytest.mark.parametrize("case", CASES)
def test_it_is_the_definition_in_float64(compiler, make_shape, case):
    attention, inputs = hedgehog(make_shape, **CASES[case])
    out, native_ran = ran_native(attention, inputs)
    assert native_ran
    truth = attention.double().quadratic(*(x.double() for x in inputs))
    assert distance(out, truth) <= 3e-7


def test_one_token_is_its_value(compiler, make_shape):
    attention, (q, k, v) = hedgehog(make_shape, B=2, H=2, N=1, D=64, E=64)
    with torch.no_grad():
        out = native.hedgehog(q, k, v, attention.query_map.weight, attention.key_map.weight)
    assert distance(out, v.double()) <= 3e-7


@pytest.mark.parametrize("factor", [0.0, 7.0, 50.0, 1000.0])
def test_large_logits_neither_overflow_nor_vanish(compiler, make_shape, factor):
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=300, D=64, E=64, factor=factor)
    out, native_ran = ran_native(attention, inputs)
    # Rounding of the logits themselves is the error from here on, in any form.
    truth = attention.double().quadratic(*(x.double() for x in inputs))
    assert native_ran and distance(out, truth) <= 3e-7 * max(1.0, factor)


def test_a_long_sum_stays_accurate(compiler, make_shape):
    attention, (q, k, v) = hedgehog(make_shape, B=1, H=1, N=16384, D=64, E=64)
    out, native_ran = ran_native(attention, (q, k, v))
    maps = attention.double()
    with torch.no_grad():
        fq = maps.query_map.map_queries(q[:, :, -256:].double(), positions=None)
        fk, _ = maps.key_map.map_keys(k.double(), positions=None, key_mask=None)
        scores = (fq @ fk.mT).tril(16384 - 256)
        truth = scores @ v.double() / scores.sum(-1, keepdim=True)
    assert native_ran and distance(out[:, :, -256:], truth) <= 1e-6


@BOTH
def test_later_tokens_change_nothing_earlier(compiler, make_shape, dtype):
    attention, inputs = either(make_shape, dtype, B=2, H=2, N=200, D=16, E=16)
    before, native_ran = ran_native(attention, inputs)
    for at in (1, 31, 64, 70, inputs[0].shape[2] - 1):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, at:] = torch.randn_like(x[:, :, at:]) * 5
        after, _ = ran_native(attention, changed)
        assert torch.equal(after[:, :, :at], before[:, :, :at])
        assert not torch.equal(after[:, :, at:], before[:, :, at:])
        short, _ = ran_native(attention, [x[:, :, :at] for x in inputs])
        if at == 1:  # which takes another form
            assert distance(short, before[:, :, :1].double()) <= 1e-6
        else:
            assert torch.equal(short, before[:, :, :at])
    assert native_ran


def test_tensors_that_are_not_contiguous(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, H=2, N=100, D=16, E=16)
    out, _ = ran_native(attention, inputs)
    turned, native_ran = ran_native(attention, [x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs])
    assert native_ran and torch.equal(out, turned)


def test_threads_change_nothing(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, H=3, N=100, D=16, E=16)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 2, 7):
            torch.set_num_threads(number)
            found.append(ran_native(attention, inputs)[0])
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


class Relu(FeatureMap):
    """Whole rows are zero without the floor."""

    def forward(self, x: Tensor) -> Tensor:
        return x.relu()


class Signed(FeatureMap):
    signed = True

    def __init__(self, shape) -> None:
        super().__init__(shape)
        self.feature_dim = 7
        self.weight = nn.Parameter(torch.randn(shape.head_dim, 7) / 10)

    def forward(self, x: Tensor) -> Tensor:
        ones = torch.ones_like(x[..., :1])
        return torch.cat([ones, (x @ self.weight.to(x.dtype))[..., :6]], -1)


class Scaled(FeatureMap):
    def map_queries(self, q, *, positions):
        return (q - q.amax(-1, keepdim=True)).exp()

    def map_keys(self, k, *, positions, key_mask):
        top = k.amax(-1)
        return (k - top[..., None]).exp(), top


@pytest.mark.parametrize("make_map", [Relu, Signed])
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("N", [97, 256, 700])
def test_any_features_block_by_block(compiler, make_shape, make_map, padded, N):
    attention = LinearAttention(make_shape(num_heads=3, head_dim=10, max_len=1024), make_map).eval()
    inputs = [torch.randn(2, 3, N, 10) for _ in range(3)]
    mask = None
    if padded:
        mask = torch.ones(2, N, dtype=torch.bool)
        mask[0, :70] = False
        mask[1, -5:] = False
    out, native_ran = ran_native(attention, inputs, key_mask=mask)
    truth = attention.double().quadratic(*(x.double() for x in inputs), key_mask=mask)
    assert native_ran and distance(out, truth) <= 1e-6


def test_a_state_goes_on_where_it_stopped(compiler, make_shape):
    attention = LinearAttention(make_shape(num_heads=3, head_dim=10, max_len=1024), Relu).eval()
    inputs = [torch.randn(2, 3, 400, 10) for _ in range(3)]
    with torch.inference_mode(), kernels() as seen:
        whole = attention(*inputs)
        first, state = attention(*(x[:, :, :150] for x in inputs), return_state=True)
        second, state = attention(*(x[:, :, 150:399] for x in inputs), state=state, return_state=True)
        last = attention(*(x[:, :, 399:] for x in inputs), state=state)
    assert seen["native"] >= 3
    assert distance(torch.cat([first, second, last], 2), whole.double()) <= 1e-6


@pytest.mark.parametrize(
    "what",
    ["gradients of any features", "float64", "float16", "bidirectional", "scales", "wide", "half too wide", "unasked"],
)
def test_what_it_does_not_serve_takes_the_plain_form(compiler, make_shape, monkeypatch, what):
    width = 130 if "wide" in what else 8
    shape = make_shape(num_heads=2, head_dim=width, causal=what != "bidirectional")
    makers = {"scales": Scaled, "wide": Relu, "gradients of any features": Signed}
    attention = (LinearAttention(shape, makers[what]) if what in makers else build_attention("hedgehog", shape)).eval()
    inputs = [torch.randn(1, 2, 90, width) for _ in range(3)]
    if what in ("float64", "float16"):
        attention, inputs = attention.to(getattr(torch, what)), [x.to(getattr(torch, what)) for x in inputs]
    if what == "unasked":
        monkeypatch.delenv("HHBENCH_NATIVE")
    with torch.set_grad_enabled(what.startswith("gradients")), kernels() as seen:
        out = attention(*inputs)
    assert "native" not in seen
    truth = attention.double().quadratic(*(x.double() for x in inputs))
    assert distance(out.detach(), truth.detach()) <= (1e-2 if what == "float16" else 1e-6)


def gradients(attention, inputs, d_out: Tensor, **more) -> tuple[Tensor, list[Tensor]]:
    """The output, and what inputs and parameters receive."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = attention(*leaves, **more)
    return out.detach(), list(torch.autograd.grad(out, [*leaves, *attention.parameters()], d_out))


def learns_as_the_definition(attention, inputs, *, at_most: float, kernel: str = "native", **more) -> None:
    d_out = torch.randn(*inputs[0].shape[:3], inputs[2].shape[3]).to(inputs[0])
    with kernels() as seen:
        out, found = gradients(attention, inputs, d_out, **more)
    assert seen == {kernel: 1}
    exact = attention.double()
    truth, expected = gradients(exact, [x.double() for x in inputs], d_out.double(), form="quadratic", **more)
    assert distance(out, truth) <= at_most
    assert [x.dtype for x in found[:3]] == [x.dtype for x in inputs]
    for mine, true in zip(found, expected, strict=True):
        assert distance(mine, true) <= at_most


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_the_definitions_in_float64(compiler, make_shape, case):
    attention, inputs = hedgehog(make_shape, **CASES[case])
    learns_as_the_definition(attention, inputs, at_most=1.5e-6)


def padded(B: int, N: int) -> Tensor:
    """Left, right and in between; the first queries of the first sequence are blind."""
    mask = torch.rand(B, N) > 0.2
    mask[0, :80] = False
    mask[-1, -5:] = False
    return mask


@pytest.mark.parametrize("case", ["grouped", "shared keys", "bias", "one W", "odd widths", "several blocks"])
def test_padding_is_honoured(compiler, make_shape, case):
    attention, inputs = hedgehog(make_shape, **CASES[case])
    mask = padded(inputs[0].shape[0], inputs[0].shape[2])
    learns_as_the_definition(attention, inputs, at_most=2e-6, key_mask=mask)
    attention.float()
    with kernels() as seen:
        d_out = torch.ones(*inputs[0].shape[:3], inputs[2].shape[3])
        out, found = gradients(attention, inputs, d_out, key_mask=mask)
    assert seen == {"native": 1}
    assert (out[0, :, :80] == 0).all()
    assert all((x.mT[~mask[:, None, None, :].expand_as(x.mT)] == 0).all() for x in found[:3])


@BOTH
def test_what_padding_holds_does_not_matter(compiler, make_shape, dtype):
    attention, inputs = either(make_shape, dtype, B=2, H=2, N=200, D=16, E=16, bias=True)
    mask = padded(2, inputs[0].shape[2])
    out, native_ran = ran_native(attention, inputs, key_mask=mask)
    spoilt = [x.masked_fill(~mask[:, None, :, None], torch.nan) for x in inputs]
    again, _ = ran_native(attention, spoilt, key_mask=mask)
    assert native_ran and torch.equal(out, again) and (out[0, :, :80] == 0).all()


@pytest.mark.parametrize("which", ["q", "k", "v"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("D, E, dtype", [(16, 16, torch.float32), (64, 32, torch.bfloat16)])
def test_what_is_no_number_is_not_hidden(compiler, make_shape, which, value, D, E, dtype):
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=200, D=D, E=E)
    at = "qkv".index(which)
    inputs[at][:, 0, 100, 3] = value
    out, native_ran = ran_native(attention, [x.to(dtype) for x in inputs])
    spoilt = slice(100, 101) if which == "q" else slice(100, None)
    assert native_ran and out.isfinite()[:, 1].all()
    assert (
        which == "v" or out.isfinite()[:, 0, :100].all()
    )  # a value is multiplied by 0 for earlier queries of its tile
    columns = slice(3, 4) if which == "v" else slice(None)
    assert not out[:, 0, spoilt, columns].isfinite().any()


@pytest.mark.parametrize("factor", [7.0, 50.0])
def test_gradients_of_large_logits(compiler, make_shape, factor):
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=300, D=64, E=64, factor=factor**0.5)
    learns_as_the_definition(attention, inputs, at_most=1.5e-6 * factor)


@pytest.mark.parametrize("payload", [0x7FC00001, -0x3FFFFF])
def test_a_nan_of_any_bits_is_not_hidden(compiler, make_shape, payload):
    attention, inputs = hedgehog(make_shape, B=1, H=1, N=100, D=16, E=16)
    inputs[1][0, 0, 50, 3] = torch.tensor(payload, dtype=torch.int32).view(torch.float32)
    assert inputs[1][0, 0, 50].isnan().any()
    out, native_ran = ran_native(attention, inputs)
    assert native_ran and not out[0, 0, 50:].isfinite().any()


@BOTH
def test_a_later_tokens_large_logits_leave_the_rounding_of_earlier_ones(compiler, make_shape, dtype):
    attention, inputs = either(make_shape, dtype, B=1, H=2, N=100, D=64, E=64)
    before, native_ran = ran_native(attention, inputs)
    for at in (1, 31, 64, 70, inputs[0].shape[2] - 1):
        changed = [x.clone() for x in inputs]
        for x in changed:
            x[:, :, at:] *= 1000
        after, _ = ran_native(attention, changed)
        assert native_ran and torch.equal(before[:, :, :at], after[:, :, :at])


def test_under_autocast(compiler, make_shape):
    """As in training: q, k and v of bfloat16 linear layers, and W in float32."""
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=150, D=16, E=16)
    with torch.autocast("cpu", torch.bfloat16):
        learns_as_the_definition(attention, [x.bfloat16() for x in inputs], at_most=5e-3)


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
@pytest.mark.parametrize("flags", ["-mno-avx512f", "-mno-avx512f -mno-avx2"])
def test_narrower_vectors(cc, fresh, make_shape, monkeypatch, flags):
    monkeypatch.setenv("CC", f"cc {flags}")
    for case in ("odd widths", "grouped", "several blocks"):
        attention, inputs = hedgehog(make_shape, **CASES[case])
        learns_as_the_definition(attention, inputs, at_most=1.5e-6)


@pytest.mark.parametrize("padding", [False, True])
def test_bfloat16_is_summed_in_float32(compiler, make_shape, padding):
    attention, inputs = hedgehog(make_shape, B=2, H=4, G=2, N=150, D=16, E=16, bias=True)
    mask = padded(2, 150) if padding else None
    learns_as_the_definition(attention, [x.bfloat16() for x in inputs], at_most=5e-3, key_mask=mask)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_that_is_multiplied_in_amx(compiler, make_shape, case, padding):
    attention, inputs = rounded(make_shape, case)
    mask = padded(inputs[0].shape[0], inputs[0].shape[2]) if padding else None
    learns_as_the_definition(attention, inputs, at_most=8e-3, kernel=amx(), key_mask=mask)


@pytest.mark.skipif(platform.system() != "Linux", reason="/proc/cpuinfo")
def test_a_cpu_that_has_amx_uses_it(compiler):
    """By a compiler that knows it: GCC 12 or later, clang."""
    cpu = set(Path("/proc/cpuinfo").read_text().split())
    defined = subprocess.run(
        ["cc", "-march=native", "-dM", "-E", "-x", "c", os.devnull], capture_output=True, text=True, check=True
    )
    has = {"amx_bf16", "avx512_bf16"} <= cpu and "__AMX_BF16__" in defined.stdout
    assert amx() == ("native amx" if has else "native")


@pytest.mark.skipif(platform.machine() != "x86_64", reason="flags of x86")
def test_without_amx_bfloat16_is_multiplied_in_vectors(cc, fresh, make_shape, monkeypatch):
    monkeypatch.setenv("CC", "cc -mno-amx-bf16")
    assert amx() == "native"
    attention, inputs = rounded(make_shape, "several blocks")
    learns_as_the_definition(attention, inputs, at_most=8e-3)


def test_a_long_sum_of_bfloat16_stays_accurate(compiler, make_shape):
    attention, (q, k, v) = hedgehog(make_shape, B=1, H=1, N=16384, D=64, E=64)
    q, k, v = q.bfloat16(), k.bfloat16(), v.bfloat16()
    out, native_ran = ran_native(attention, (q, k, v))
    with torch.inference_mode():
        truth = attention.double()(q.double(), k.double(), v.double())
    assert native_ran and distance(out[:, :, -256:], truth[:, :, -256:]) <= 4e-3


def test_amx_leaves_torch_its_own(compiler, make_shape):
    """Both lay out the registers of one thread; torch's products go on as if nothing had been between them."""
    attention, inputs = rounded(make_shape, "half a tile")
    a, b = torch.randn(2, 256, 256).bfloat16()
    expected, out = a @ b, ran_native(attention, inputs)[0]
    for _ in range(3):
        assert torch.equal(a @ b, expected)
        assert torch.equal(ran_native(attention, inputs)[0], out)


def test_only_what_learns_gets_gradients(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, H=2, N=100, D=16, E=16, bias=True)
    _, every = gradients(attention, inputs, torch.ones_like(inputs[2]))
    for parameter in attention.parameters():
        parameter.requires_grad_(False)
    q = inputs[0].clone().requires_grad_()
    (alone,) = torch.autograd.grad(attention(q, *inputs[1:]).sum(), q)
    assert torch.equal(alone, every[0])
    for i, parameter in enumerate(attention.parameters()):
        parameter.requires_grad_()
        with kernels() as seen:
            (alone,) = torch.autograd.grad(attention(*inputs).sum(), parameter)
        assert seen == {"native": 1} and torch.equal(alone, every[3 + i])
        parameter.requires_grad_(False)


def test_one_map_for_queries_and_keys_learns_from_both(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=100, D=16, E=16, tie_qk=True)
    learns_as_the_definition(attention, inputs, at_most=1.5e-6)


def test_threads_change_no_gradient(compiler, make_shape):
    attention, inputs = hedgehog(make_shape, B=2, H=3, N=100, D=16, E=16)
    threads = torch.get_num_threads()
    try:
        found = []
        for number in (1, 7):
            torch.set_num_threads(number)
            found.append(gradients(attention, inputs, torch.ones_like(inputs[2]))[1])
    finally:
        torch.set_num_threads(threads)
    assert all(map(torch.equal, *found))


@pytest.mark.parametrize("compiler_name", ["no-such-compiler", "false"])
def test_without_a_compiler_one_debug_line_and_the_plain_form(fresh, make_shape, monkeypatch, caplog, compiler_name):
    monkeypatch.setenv("CC", compiler_name)
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=CHUNK, D=8, E=8)
    with caplog.at_level(logging.DEBUG, logger="hhbench"):
        out, native_ran = ran_native(attention, inputs)
        ran_native(attention, inputs)
    assert not native_ran and len([r for r in caplog.records if "no compiled" in r.message]) == 1
    assert distance(out, attention.double().quadratic(*(x.double() for x in inputs))) <= 1e-6


def test_a_source_that_does_not_compile_takes_the_plain_form(cc, fresh, make_shape, monkeypatch, caplog, tmp_path):
    (tmp_path / "bad.c").write_text("int f(void) { return }\n")
    monkeypatch.setattr(native, "FOLDER", tmp_path)
    attention, inputs = hedgehog(make_shape, B=1, H=2, N=CHUNK, D=8, E=8)
    with caplog.at_level(logging.DEBUG, logger="hhbench"):
        _, native_ran = ran_native(attention, inputs)
    assert not native_ran and any("no compiled" in r.message for r in caplog.records)


@pytest.mark.parametrize("harm", ["cut short", "one byte", "empty"])
def test_a_broken_library_in_the_cache_is_built_again(cc, fresh, monkeypatch, harm):
    (fresh / "quick.c").write_text("int answer(void) { return 42; }\n")
    monkeypatch.setattr(native, "FOLDER", fresh)
    assert native.library().answer() == 42
    (built,) = (fresh / "native").glob("*.so")
    whole = built.read_bytes()
    built.unlink()  # what is loaded stays as it is
    wrong = {"cut short": whole[:-100], "one byte": whole[:-1] + bytes([whole[-1] ^ 1]), "empty": b""}[harm]
    built.write_bytes(wrong)
    forget()
    assert native.library().answer() == 42
    assert built.read_bytes() != wrong and len(built.read_bytes()) == len(whole)
    assert [p.name for p in (fresh / "native").iterdir()] == [built.name]
