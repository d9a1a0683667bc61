"""What every sequence mixer with a convolution keeps: its two forms agree, and padding in the middle is nothing."""

import pytest
import torch

from hhbench.attention import build_attention

SMALL = {"atol": 1e-10, "rtol": 0}
OPTIONS = {"h3": {"d_state": 6}, "hyena": {}}
every_mixer = pytest.mark.parametrize("name", OPTIONS)
both_directions = pytest.mark.parametrize("causal", [True, False])


@pytest.fixture
def make(make_shape):
    """A mixer in float64, moved off its initial values."""

    def build(name: str, causal: bool) -> torch.nn.Module:
        module = build_attention(name, make_shape(causal=causal, max_len=64), **OPTIONS[name]).double()
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))
        return module

    return build


@every_mixer
@both_directions
@pytest.mark.parametrize("padded", [False, True])
def test_both_forms_agree_and_so_do_their_gradients(make, name, causal, padded):
    module, x = make(name, causal), torch.randn(2, 50, 8, dtype=torch.float64, requires_grad=True)
    key_mask = torch.rand(2, 50) < 0.7 if padded else None
    found, expected = module(x, key_mask=key_mask), module.quadratic(x, key_mask=key_mask)
    torch.testing.assert_close(found, expected, **SMALL)
    weight, inputs = torch.randn_like(x), [x, *module.parameters()]
    grads = [torch.autograd.grad((out * weight).sum(), inputs) for out in (found, expected)]
    torch.testing.assert_close(*grads, atol=1e-9, rtol=1e-9)


@every_mixer
@both_directions
def test_padding_in_the_middle_changes_nothing(make, name, causal):
    module, x = make(name, causal), torch.randn(1, 20, 8, dtype=torch.float64)
    key_mask = (torch.arange(20) % 3 > 0)[None]
    x[~key_mask] = torch.nan
    out = module(x, key_mask=key_mask)
    torch.testing.assert_close(out[:, key_mask[0]], module(x[:, key_mask[0]]), **SMALL)
    assert (out[~key_mask] == 0).all()
