"""Taylor: a kernel that is a polynomial of q.k, in as few features as it takes."""

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

Taylor = ATTENTIONS.get("taylor").part


def test_features_by_hand(make_shape):
    """x = (2, 3) at scale 1: 1, x, x^2 / sqrt 2, x_1 x_2."""
    feature_map = Taylor(make_shape(num_heads=1, head_dim=2, scale=1.0))
    features = feature_map(torch.tensor([2.0, 3.0]).view(1, 1, 1, 2))
    root = 2**0.5
    torch.testing.assert_close(features.flatten(), torch.tensor([1, 2, 3, 4 / root, 9 / root, 6]))


@pytest.mark.parametrize("head_dim", [1, 2, 5, 16])
def test_the_kernel_is_the_exponential_s_second_order(head_dim, make_shape):
    """For any scale, not the head width's alone."""
    feature_map = Taylor(make_shape(head_dim=head_dim, scale=0.3))
    q, k = torch.randn(2, 1, 2, 6, head_dim, dtype=torch.float64)
    z = 0.3 * q @ k.mT
    torch.testing.assert_close(feature_map(q) @ feature_map(k).mT, 1 + z + z**2 / 2, atol=1e-12, rtol=0)


@pytest.mark.parametrize("project_to", [1, 3, 6])
def test_a_projected_kernel_is_of_the_projections(project_to, make_shape):
    module = build_attention("taylor", make_shape(scale=7.0, causal=False), project_to=project_to).double()
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64)
    z = (q @ module.query_map.weight) @ (k @ module.key_map.weight).mT * project_to**-0.5
    kernel = 1 + z + z**2 / 2
    torch.testing.assert_close(module.weights(q, k), kernel / kernel.sum(-1, keepdim=True), atol=1e-12, rtol=0)


def test_its_widths_and_parameters(make_shape):
    """Half the 1 + D + D^2 features, 4161 and 273, that public code writes out."""
    shape = make_shape(num_heads=12, head_dim=64)
    assert Taylor(shape).feature_dim == 2145
    assert Taylor(shape, project_to=16).feature_dim == 153
    assert Taylor(shape)(torch.randn(1, 12, 2, 64)).shape[-1] == 2145
    assert list(build_attention("taylor", shape).parameters()) == []
    projected = build_attention("taylor", shape, project_to=16)
    assert sum(p.numel() for p in projected.parameters()) == 2 * 12 * 64 * 16
    assert projected.state_bytes(1) == 12 * (153 * 64 + 153 + 1) * 4 + 8


def test_it_falls_until_minus_one_and_rises_after(make_shape):
    """z = -3, -1, 0, 2: the kernel is 2.5, 0.5, 1, 5, where softmax's would rise all along."""
    shape = make_shape(num_heads=1, head_dim=1, scale=1.0, causal=False)
    q, k = torch.ones(1, 1, 4, 1), torch.tensor([-3.0, -1.0, 0.0, 2.0]).view(1, 1, 4, 1)
    found = build_attention("taylor", shape).weights(q, k)
    torch.testing.assert_close(found[0, 0, 0], torch.tensor([2.5, 0.5, 1.0, 5.0]) / 9)


def test_its_signed_features_are_not_floored(make_shape):
    """A floor under negative features would make z positive throughout."""
    module = build_attention("taylor", make_shape(num_heads=1, head_dim=1, scale=1.0, causal=False)).eval()
    q, k, v = -torch.ones(1, 1, 2, 1), torch.tensor([0.0, 1.0]).view(1, 1, 2, 1), torch.tensor([[[[0.0], [1.0]]]])
    torch.testing.assert_close(module(q, k, v), torch.full((1, 1, 2, 1), 0.5 / 1.5))
    assert module.floored_rows == 0


def test_a_projection_keeps_the_spread_of_its_input(make_shape):
    feature_map = Taylor(make_shape(num_heads=4, head_dim=64), project_to=16)
    y = torch.randn(1, 4, 500, 64) @ feature_map.weight
    assert y.std().item() == pytest.approx(1, abs=0.05)


def test_a_projection_has_a_width(make_shape):
    with pytest.raises(UsageError, match="project_to must be at least 1, not 0"):
        build_attention("taylor", make_shape(), project_to=0)


@pytest.mark.parametrize("head_dim", [1, 2, 3, 6, 7])
def test_gradients_of_the_features_are_those_of_differences(head_dim, make_shape):
    x = torch.randn(2, 2, 3, head_dim, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Taylor(make_shape(head_dim=head_dim)), x)
