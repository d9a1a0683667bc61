"""Hyena: the filter and its window, the block as a direct sum, and the authors' numbers.

Numbers marked as the authors' were computed by their code (safari, 02220c69) on the same weights and inputs.
"""

import math

import pytest
import torch
from torch import Tensor, nn

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

Hyena = ATTENTIONS.get("hyena").part
SMALL = {"atol": 1e-10, "rtol": 0}


@pytest.fixture
def make(make_shape):
    def build(*, causal: bool = True, max_len: int = 64, options=None, **changes) -> nn.Module:
        shape = make_shape(causal=causal, max_len=max_len, **changes)
        return build_attention("hyena", shape, **(options or {})).double()

    return build


def count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.fixture
def authors(make):
    """Two channels and a filter of width 2, whose weights are sin(1), sin(2), ... one after another."""
    module = make(num_heads=1, head_dim=2, max_len=8, options={"emb_dim": 5, "filter_width": 2, "frequency": 10.0})
    h = module.filter
    order = [h.weight_in, h.bias_in, h.weight_inner, h.bias_inner, h.weight_out]
    order += [module.in_proj.weight, module.in_proj.bias, module.short_conv.weight, module.short_conv.bias]
    order += [module.bias, module.out_proj.weight, module.out_proj.bias]
    start = 1
    with torch.no_grad():
        for parameter in order:
            n = parameter.numel()
            parameter.copy_(torch.arange(start, start + n, dtype=torch.float64).sin().view_as(parameter))
            start += n
    return module


def test_filter_and_outputs_are_the_authors_numbers(authors):
    expected = [
        [0.5216092924, 0.0942726196, -0.2605064838, 0.1319789977, -0.0828071342],
        [1.1556460860, 0.1177538051, -0.0149489302, -0.0010400907, 0.0000532646],
    ]
    torch.testing.assert_close(
        authors.filter.kernel(5, torch.float64), torch.tensor(expected).double(), atol=1e-7, rtol=0
    )
    x = torch.tensor([[1.0, -0.5], [2.0, 0.25], [-1.0, 0.75], [0.5, 0.5], [0.0, -2.0]], dtype=torch.float64)
    expected = [
        [-3.0318287041, 2.6603650759],
        [-25.5501018630, 17.1693400003],
        [-1.3758825419, 1.2100568177],
        [1.9911839696, 1.3177104300],
        [1.5288262656, 0.2323671243],
    ]
    torch.testing.assert_close(authors(x[None])[0], torch.tensor(expected).double(), atol=1e-6, rtol=0)


def test_it_has_as_many_parameters_as_the_authors(make):
    """Less the features of positions, max_len x emb_dim, which are fixed here."""
    assert count(make(num_heads=12, head_dim=64, max_len=1024)) == 2_465_856 - 1024 * 33
    assert count(make(num_heads=12, head_dim=72, max_len=1024)) == 3_100_320 - 1024 * 33
    assert count(make(num_heads=2, head_dim=8, options={"emb_dim": 3})) == 10_960
    assert count(make(causal=False)) - count(make()) == 33 * 64 + 64 + 2 * (64 * 64 + 64) + 64 * 8 + 64


def test_the_window_falls_to_1_percent_within_or_beyond_the_longest_sequence(make):
    """With a network that writes 1 everywhere: sin(freq * pi / (2 freq)) = 1, once."""
    h = make(num_heads=4, max_len=31).filter
    with torch.no_grad():
        for parameter in (h.weight_in, h.weight_inner, h.weight_out):
            parameter.zero_()
        h.bias_inner.fill_(math.pi / 2 / 14)
        h.weight_out[:, 0] = 1
    window = h.kernel(31, torch.float64)
    t = torch.arange(31, dtype=torch.float64) / 30
    torch.testing.assert_close(window[0], 0.01 ** (t / 1.5), atol=1e-6, rtol=0)
    torch.testing.assert_close(window[-1], 0.01 ** (t / 0.3), atol=1e-6, rtol=0)
    assert window[-1, 9].item() == pytest.approx(0.01, rel=1e-5)
    rates = window[:, 1].log().neg() * 30
    torch.testing.assert_close(rates.diff(), rates.diff()[:1].expand(15), atol=1e-6, rtol=0)
    h.shift = 0.25
    torch.testing.assert_close(h.kernel(31, torch.float64), window + 0.25, atol=1e-6, rtol=0)


def filter_by_loops(h: nn.Module, length: int) -> Tensor:
    rows = []
    bands = torch.linspace(1e-4, (h.emb_dim - 1) // 2 - 1, (h.emb_dim - 1) // 2, dtype=torch.float64)
    for i in range(length):
        t = i / (h.max_len - 1)
        angles = [2 * math.pi * i / h.max_len * f for f in bands.tolist()]
        z = torch.tensor([t, *map(math.cos, angles), *(-math.sin(a) for a in angles)], dtype=torch.float64)
        z = torch.sin(h.freq * (h.weight_in @ z + h.bias_in))
        z = torch.sin(h.freq * (h.weight_inner[0] @ z + h.bias_inner[0]))
        z = torch.sin(h.freq * (h.weight_inner[1] @ z + h.bias_inner[1]))
        delta = torch.linspace(math.log(0.01) / 1.5, math.log(0.01) / 0.3, h.weight_out.shape[0], dtype=torch.float64)
        rows.append(h.weight_out @ z * torch.exp(-t * delta.abs()))
    return torch.stack(rows, dim=1)


@pytest.mark.parametrize("causal", [True, False])
def test_it_is_the_direct_sum(make, causal):
    """Of a filter, a short convolution and a long one that are written out; one token ahead if bidirectional."""
    module, x = make(causal=causal), torch.randn(1, 20, 8, dtype=torch.float64)
    with torch.no_grad():
        u = x[0] @ module.in_proj.weight.T + module.in_proj.bias
        short = module.short_conv.bias.repeat(20, 1)
        for i in range(20):
            for tap in range(3):
                j = i + tap - (2 if causal else 1)
                if 0 <= j < 20:
                    short[i] += module.short_conv.weight[:, 0, tap] * u[j]
        gate_out, gate_in, v = short.chunk(3, dim=-1)
        v = gate_in * v
        past = filter_by_loops(module.filter, 20)
        y = module.bias * v
        for i in range(20):
            for j in range(i + 1):
                y[i] += past[:, i - j] * v[j]
            if not causal:
                future = filter_by_loops(module.future_filter, 20)
                for j in range(i + 1, 20):
                    y[i] += future[:, j - i - 1] * v[j]
        expected = (gate_out * y) @ module.out_proj.weight.T + module.out_proj.bias
        torch.testing.assert_close(module(x)[0], expected, **SMALL)


def test_lag_0_counts_once(make):
    """A filter for the future that is zero leaves the causal long convolution."""
    module = make(causal=False)
    with torch.no_grad():
        module.future_filter.weight_out.zero_()
        module.short_conv.weight[:, :, 0::2] = 0  # and the short one sees its own token only
    causal = make()
    state = {k: v for k, v in module.state_dict().items() if not k.startswith("future_")}
    state["short_conv.weight"] = state["short_conv.weight"].roll(1, dims=-1)
    causal.load_state_dict(state)
    x = torch.randn(1, 12, 8, dtype=torch.float64)
    torch.testing.assert_close(module(x), causal(x), **SMALL)


def test_the_short_convolution_sees_one_token_on_each_side(make):
    """With a long one that is nothing but b."""
    module = make(causal=False)
    with torch.no_grad():
        module.filter.weight_out.zero_()
        module.future_filter.weight_out.zero_()
    x = torch.randn(1, 9, 8, dtype=torch.float64, requires_grad=True)
    (grad,) = torch.autograd.grad(module(x)[0, 4].sum(), x)
    reached = grad[0].abs().sum(-1) > 1e-9
    assert reached.nonzero().flatten().tolist() == [3, 4, 5]


def test_filters_learn_at_their_own_rate_and_don_t_decay(make):
    module = make(causal=False)
    own = {
        f"{name}.{parameter}": (settings.max_lr, settings.weight_decay)
        for name, part in module.named_modules()
        for parameter, settings in getattr(part, "optimizer_settings", {}).items()
    }
    filters = {name for name, _ in module.named_parameters() if name.startswith(("filter.", "future_filter."))}
    assert own == dict.fromkeys(filters, (1e-3, 0.0))
    assert len(own) == 2 * 6


def test_it_begins_as_the_authors_do(make):
    module = make(num_heads=8, head_dim=64)
    h = module.filter
    assert (h.freq == 14).all()
    for parameter, fan_in in ((h.weight_in, 33), (h.bias_in, 33), (h.weight_inner, 64), (h.weight_out, 64)):
        assert 0.9 * fan_in**-0.5 < parameter.abs().max() <= fan_in**-0.5
    assert module.bias.std().item() == pytest.approx(1, abs=0.15)
    assert (make(options={"frequency": 3.0}).filter.freq == 3).all()


def test_a_filter_doesn_t_depend_on_how_many_lags_are_asked_for(make):
    """To the last bit within a block; the sines would make more of it."""
    h = make(max_len=512).filter
    with torch.no_grad():
        for parameter in h.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    assert torch.equal(h.kernel(7, torch.float64), h.kernel(50, torch.float64)[:, :7])
    torch.testing.assert_close(h.kernel(7, torch.float64), h.kernel(300, torch.float64)[:, :7], atol=1e-8, rtol=0)


def test_a_host_that_states_no_longest_sequence_costs_nothing(make):
    module = make(max_len=2**31)
    assert count(module) == count(make(max_len=2))
    assert list(module.buffers()) == []
    x = torch.randn(1, 30, 8, dtype=torch.float64)
    assert module(x).isfinite().all()
    torch.testing.assert_close(module(x), module.quadratic(x), **SMALL)


def test_a_host_of_one_token_works(make):
    module = make(max_len=1)
    assert module(torch.randn(2, 1, 8, dtype=torch.float64)).isfinite().all()


@pytest.mark.parametrize("form", ["forward", "quadratic"])
def test_a_sequence_longer_than_the_filter_is_refused(make, form):
    module = make(max_len=16)
    run = getattr(module, form)
    run(torch.randn(1, 16, 8, dtype=torch.float64))
    with pytest.raises(UsageError, match="reaches over 16 tokens, not 17"):
        run(torch.randn(1, 17, 8, dtype=torch.float64))


def test_it_has_no_state(make):
    assert not Hyena.has_state
    assert make().state_bytes(10) is None


@pytest.mark.parametrize(
    "options,message",
    [({"emb_dim": 4}, "emb_dim is odd"), ({"emb_dim": 1}, "emb_dim is odd"), ({"filter_width": 0}, "filter_width is")],
)
def test_options_that_don_t_fit_are_refused(make_shape, options, message):
    with pytest.raises(UsageError, match=message):
        Hyena(make_shape(), **options)
