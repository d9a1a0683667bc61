"""ReLU: the kernel by hand, and a query that has no features."""

import torch

from hhbench.attention import build_attention


def test_a_kernel_by_hand(make_shape):
    """relu (2, -1) . relu (1, 3) = 2 and (2, 0) . (3, 0) = 6."""
    shape = make_shape(num_heads=1, head_dim=2, causal=False)
    q = torch.tensor([2.0, -1.0]).expand(1, 1, 2, 2)
    k = torch.tensor([[1.0, 3.0], [3.0, -5.0]]).view(1, 1, 2, 2)
    found = build_attention("relu", shape).weights(q, k)
    torch.testing.assert_close(found, torch.tensor([0.25, 0.75]).expand(1, 1, 2, 2))


def test_it_has_no_parameters(make_shape):
    module = build_attention("relu", make_shape())
    assert list(module.parameters()) == []
    assert module.state_dict() == {}


def test_a_query_without_features_attends_evenly_and_is_counted(make_shape):
    """Between keys whose features have one sum; the original divides by its epsilon and gives next to nothing."""
    module = build_attention("relu", make_shape(causal=False)).eval()
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    q[:, :, 0] = -q[:, :, 0].abs()
    q[:, :, 1:, 0] = k[..., 0] = 1
    k[..., 1:] = 0
    torch.testing.assert_close(module(q, k, v)[:, :, 0], v.mean(2))
    assert module.floored_rows == 2
