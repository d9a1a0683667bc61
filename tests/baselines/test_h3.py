"""H3: kernels at small sizes, the convolution and its recurrence, and the authors' numbers.

Numbers marked as the authors' were computed by their code (safari, 02220c69) on the same weights and inputs.
"""

import cmath
import math

import pytest
import torch
from torch import Tensor, nn

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

H3 = ATTENTIONS.get("h3").part
SMALL = {"atol": 1e-10, "rtol": 0}


@pytest.fixture
def make(make_shape):
    """An H3 in float64, moved off its initial values."""

    def build(*, causal: bool = True, d_state: int = 6, noise: float = 0.2, **changes) -> nn.Module:
        module = build_attention("h3", make_shape(causal=causal, **changes), d_state=d_state).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(noise * torch.randn_like(parameter))
        return module

    return build


def settle(parameter: Tensor, values) -> None:
    with torch.no_grad():
        parameter.copy_(torch.as_tensor(values, dtype=torch.float64).view_as(parameter))


@pytest.fixture
def authors(make_shape):
    """One channel and d_state 4, every weight given."""
    module = build_attention("h3", make_shape(num_heads=1, head_dim=1), d_state=4).double()
    settle(module.in_proj.weight, [0.5, -1.0, 2.0])
    settle(module.in_proj.bias, [0.1, 0.2, -0.3])
    settle(module.out_proj.weight, 1.5)
    settle(module.out_proj.bias, 0.4)
    settle(module.shift.B, [1.0, 0.5, 0.0, -0.25])
    settle(module.shift.C, [0.4, -0.3, 0.2, 0.1])
    settle(module.D_shift, 0.7)
    settle(module.D, -0.6)
    settle(module.diagonal.log_dt, math.log(0.1))
    settle(module.diagonal.log_A_real, [math.log(0.5), math.log(0.25)])
    settle(module.diagonal.A_imag, [0.0, math.pi])
    settle(module.diagonal.B, [[1.0, 0.0], [0.5, 0.5]])
    settle(module.diagonal.C, [[1.0, -0.5], [0.25, 2.0]])
    return module


def test_kernels_and_outputs_are_the_authors_numbers(authors):
    shift, diagonal = authors.shift.kernel(9, torch.float64), authors.diagonal.kernel(6, torch.float64)
    assert shift.flatten().tolist() == pytest.approx([0.225, -0.2, 0.25, 0.1], abs=1e-7)
    assert diagonal.flatten().tolist() == pytest.approx(
        [-0.0073206968, -0.0595427803, -0.0860741877, -0.0864855222, -0.0627971642, -0.0191734943], abs=1e-7
    )
    x = torch.tensor([1.0, -0.5, 2.0, 0.25, -1.0, 0.75], dtype=torch.float64).view(1, 6, 1)
    assert authors(x).flatten().tolist() == pytest.approx(
        [1.0876084927, 0.2397010618, 8.1157217063, 0.5995383750, -0.7022723423, 1.4772347446], abs=1e-6
    )


def test_the_shift_s_kernel_by_hand(make):
    """K_l = sum_j B_j C_{j + l}: (1, 2, 0, 0) against (3, 5, 7, 9)."""
    shift = make(num_heads=1, head_dim=1, d_state=4).shift
    settle(shift.B, [1, 2, 0, 0])
    settle(shift.C, [3, 5, 7, 9])
    assert shift.kernel(9, torch.float64).tolist() == [[13, 19, 25, 9]]


def test_the_diagonal_s_kernel_in_closed_form(make):
    """A real A of -1/2 and dt 0.1: dA = 0.975 / 1.025, dB = 0.1 / 1.025, and twice the real part."""
    diagonal = make(num_heads=1, head_dim=1, d_state=2).diagonal
    settle(diagonal.log_dt, math.log(0.1))
    settle(diagonal.log_A_real, math.log(0.5))
    settle(diagonal.A_imag, 0)
    settle(diagonal.B, [1, 0])
    settle(diagonal.C, [3, 4])
    expected = 2 * 3 * 0.1 / 1.025 * (0.975 / 1.025) ** torch.arange(100, dtype=torch.float64)
    torch.testing.assert_close(diagonal.kernel(100, torch.float64)[0], expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 16, 17, 1000, 4096])
def test_a_kernel_of_any_length_is_the_sum_of_powers(make, length):
    """Though no power is ever computed on its own."""
    diagonal = make().diagonal
    dA, dB, C = diagonal.discrete(torch.float64)
    powers = dA[..., None] ** torch.arange(length)
    expected = 2 * (C[..., None] * dB[..., None] * powers).sum(1).real
    torch.testing.assert_close(diagonal.kernel(length, torch.float64), expected, atol=1e-11, rtol=0)


def test_a_kernel_in_32_bits_stays_near(make_shape):
    diagonal = build_attention("h3", make_shape()).diagonal
    near, exact = diagonal.kernel(65_536, torch.float32), diagonal.double().kernel(65_536, torch.float64)
    assert (near - exact).abs().max() < 1e-4 * exact.abs().max()


def block_by_loops(module: nn.Module, x: Tensor) -> Tensor:
    """The causal definition for one sequence [N, C]: the recurrences, a number at a time."""
    N, C = x.shape
    q, k, v = (x @ module.in_proj.weight.T + module.in_proj.bias).chunk(3, dim=-1)
    y = torch.zeros(N, C, dtype=x.dtype)
    for c in range(C):
        dt = module.diagonal.log_dt[c].exp().item()
        A = [
            complex(-real, imag)
            for real, imag in zip(
                module.diagonal.log_A_real[c].exp().tolist(), module.diagonal.A_imag[c].tolist(), strict=True
            )
        ]
        B, readout = ([complex(*pair) for pair in p[c].tolist()] for p in (module.diagonal.B, module.diagonal.C))
        register = [0.0] * module.d_state
        state = [0j] * len(A)
        for i in range(N):
            register = [0.0, *register[:-1]]
            register = [r + b * k[i, c].item() for r, b in zip(register, module.shift.B[c].tolist(), strict=True)]
            shifted = sum(r * w for r, w in zip(register, module.shift.C[c].tolist(), strict=True))
            kv = (shifted + module.D_shift[c].item() * k[i, c].item()) * v[i, c].item()
            # (1 - dt A / 2) s' = (1 + dt A / 2) s + dt B u
            state = [
                ((1 + dt * a / 2) * s + dt * b * kv) / (1 - dt * a / 2) for s, a, b in zip(state, A, B, strict=True)
            ]
            out = 2 * sum(w * s for w, s in zip(readout, state, strict=True)).real
            y[i, c] = q[i, c] * (out + module.D[c].item() * kv)
    return y @ module.out_proj.weight.T + module.out_proj.bias


def test_the_convolution_is_the_recurrence(make):
    module, x = make(), torch.randn(2, 40, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = torch.stack([block_by_loops(module, row) for row in x])
        torch.testing.assert_close(module(x), expected, **SMALL)


def test_lag_0_counts_once(make):
    """Without kernels for the past beyond lag 0 and none for the future, a token is alone."""
    module, x = make(causal=False), torch.randn(1, 12, 8, dtype=torch.float64)
    for name, parameter in module.named_parameters():
        if name.startswith("future_") and name.endswith(".C"):
            settle(parameter, torch.zeros_like(parameter))
    causal = make()
    causal.load_state_dict({k: v for k, v in module.state_dict().items() if not k.startswith("future_")})
    torch.testing.assert_close(module(x), causal(x), **SMALL)


def test_the_future_has_kernels_of_its_own_that_begin_at_the_next_token(make):
    """Written out with one kernel each for both sides of both models."""
    module, x = make(causal=False), torch.randn(1, 9, 8, dtype=torch.float64)

    def convolved(u: Tensor, past: Tensor, future: Tensor) -> Tensor:
        out = torch.zeros_like(u)
        for i in range(9):
            for j in range(9):
                kernel, lag = (past, i - j) if j <= i else (future, j - i - 1)
                if lag < kernel.shape[1]:
                    out[i] += kernel[:, lag] * u[j]
        return out

    with torch.no_grad():
        q, k, v = (x[0] @ module.in_proj.weight.T + module.in_proj.bias).chunk(3, dim=-1)
        shifts = (m.kernel(9, torch.float64) for m in (module.shift, module.future_shift))
        diagonals = (m.kernel(9, torch.float64) for m in (module.diagonal, module.future_diagonal))
        kv = (convolved(k, *shifts) + module.D_shift * k) * v
        y = q * (convolved(kv, *diagonals) + module.D * kv)
        torch.testing.assert_close(module(x)[0], y @ module.out_proj.weight.T + module.out_proj.bias, **SMALL)


def test_it_begins_as_the_authors_do(make_shape):
    module = build_attention("h3", make_shape(num_heads=8, head_dim=64))
    first = torch.zeros(512, 64)
    first[:, 0] = 1
    assert torch.equal(module.shift.B, first)
    assert torch.equal(module.shift.kernel(512, torch.float32), module.shift.C)
    assert 0.124 < module.shift.C.abs().max() <= 1 / 8  # a depthwise convolution of 64 taps
    diagonal = module.diagonal
    assert torch.allclose(diagonal.log_A_real.exp(), torch.tensor(0.5))
    assert torch.allclose(diagonal.A_imag, math.pi * torch.arange(32.0))
    assert torch.equal(torch.view_as_complex(diagonal.B.data), torch.ones(512, 32, dtype=torch.complex64))
    assert diagonal.C.square().sum(-1).mean().item() == pytest.approx(1, abs=0.05)
    dt = diagonal.log_dt.exp()
    assert dt.min() >= 1e-3
    assert dt.max() <= 0.1
    assert dt.log().mean().item() == pytest.approx(math.log(0.01), abs=0.2)
    assert module.D.std().item() == pytest.approx(1, abs=0.15)
    assert module.D_shift.std().item() == pytest.approx(1, abs=0.15)


def test_discretisation_is_bilinear(make):
    diagonal = make(noise=0.0).diagonal
    settle(diagonal.log_dt, [math.log(0.05)] * 8)
    dA, dB, _ = diagonal.discrete(torch.float64)
    for n in range(3):
        z = 0.05 * complex(-0.5, math.pi * n)
        assert abs(dA[0, n].item() - (1 + z / 2) / (1 - z / 2)) < 1e-7
        assert abs(dB[0, n].item() - 0.05 / (1 - z / 2)) < 1e-7
        assert abs(dA[0, n].item() - cmath.exp(z)) < abs(z) ** 3 / 11  # of third order in dt
    assert (dA.abs() < 1).all()


def test_it_has_as_many_parameters_as_the_authors(make_shape):
    def count(causal: bool) -> int:
        module = build_attention("h3", make_shape(num_heads=12, head_dim=64, causal=causal))
        return sum(p.numel() for p in module.parameters())

    assert count(True) == 2_610_432
    assert count(False) - count(True) == 768 * (2 * 64 + 1 + 2 * 32 + 4 * 32)


def test_dynamics_learn_slowly_and_don_t_decay(make):
    module = make(causal=False)
    own = {
        f"{name}.{parameter}": (settings.max_lr, settings.weight_decay)
        for name, part in module.named_modules()
        for parameter, settings in getattr(part, "optimizer_settings", {}).items()
    }
    names = ["shift.B", "diagonal.log_dt", "diagonal.log_A_real", "diagonal.A_imag", "diagonal.B"]
    assert own == {f"{side}{name}": (1e-3, 0.0) for side in ("", "future_") for name in names}
    assert own.keys() <= dict(module.named_parameters()).keys()


# --- decoding ---


@pytest.mark.parametrize("pieces", [[1] * 40, [40], [1, 39], [39, 1], [7, 1, 1, 20, 11]], ids=str)
def test_tokens_in_pieces_are_the_whole(make, pieces):
    module, x = make(), torch.randn(2, 40, 8, dtype=torch.float64)
    state, outputs = None, []
    for piece in x.split(pieces, dim=1):
        out, state = module(piece, state=state, return_state=True)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), module(x), **SMALL)
    torch.testing.assert_close(vars(state), vars(module(x, return_state=True)[1]), **SMALL)


@pytest.mark.parametrize("where", ["left", "right", "holes", "all of a row"])
def test_a_padded_token_leaves_the_state_as_it_is(make, where):
    """Rows continue from their own last attended token, wherever padding lies and whatever it holds."""
    module, x = make(), torch.randn(2, 20, 8, dtype=torch.float64)
    key_mask = torch.ones(2, 20, dtype=torch.bool)
    key_mask[1] = {
        "left": torch.arange(20) >= 13,
        "right": torch.arange(20) < 9,
        "holes": torch.arange(20) % 3 == 1,
        "all of a row": torch.zeros(20),
    }[where].bool()
    x[~key_mask] = torch.nan
    full = module(x, key_mask=key_mask)
    assert (full[~key_mask] == 0).all()
    state, outputs = None, []
    for start, stop in ((0, 11), (11, 12), (12, 20)):
        piece = slice(start, stop)
        out, state = module(x[:, piece], key_mask=key_mask[:, piece], state=state, return_state=True)
        outputs.append(out)
    torch.testing.assert_close(torch.cat(outputs, 1), full, **SMALL)
    alone = x[1:, key_mask[1]]
    torch.testing.assert_close(full[1:, key_mask[1]], module(alone) if alone.numel() else alone, **SMALL)
    if alone.numel():
        _, expected = module(alone, return_state=True)
        torch.testing.assert_close(vars(state.select(torch.tensor([1]))), vars(expected), **SMALL)
    before = state
    nothing = torch.zeros(2, 3, dtype=torch.bool)
    _, state = module(torch.full((2, 3, 8), torch.inf).double(), key_mask=nothing, state=before, return_state=True)
    torch.testing.assert_close(vars(state), vars(before), atol=0, rtol=0)


def test_a_prefix_gives_the_prefix(make):
    module, x = make(), torch.randn(2, 30, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x[:, :11]), module(x)[:, :11], **SMALL)


@pytest.mark.parametrize("length", [1, 5, 200])
def test_a_state_has_a_constant_size(make_shape, length):
    module = build_attention("h3", make_shape())
    _, state = module(torch.randn(3, length, 8), return_state=True)
    assert state.nbytes == module.state_bytes(length, batch_size=3) == 3 * 8 * (64 + 2 * 32) * 4
    assert state.keys.shape == (3, 8, 64)
    assert state.diagonal.shape == (3, 8, 32, 2)


def test_gradients_flow_through_a_state(make):
    module, x = make(), torch.randn(1, 10, 8, dtype=torch.float64, requires_grad=True)
    _, state = module(x[:, :6], return_state=True)
    out = module(x[:, 6:], state=state)
    weight = torch.randn_like(out)
    found = torch.autograd.grad((out * weight).sum(), [x, *module.parameters()])
    expected = torch.autograd.grad((module(x)[:, 6:] * weight).sum(), [x, *module.parameters()])
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


def test_what_has_no_state_says_so(make):
    module, x = make(causal=False), torch.randn(1, 4, 8, dtype=torch.float64)
    assert module.state_bytes(4) is None
    with pytest.raises(UsageError, match="bidirectional h3 has no state"):
        module(x, return_state=True)


@pytest.mark.parametrize("d_state", [0, 1, 7, -2])
def test_a_state_of_no_pairs_is_refused(make_shape, d_state):
    with pytest.raises(UsageError, match="h3's d_state is even and at least 2"):
        H3(make_shape(), d_state=d_state)
