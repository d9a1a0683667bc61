"""T2R: a linear map before a ReLU."""

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention

T2R = ATTENTIONS.get("t2r").part


def test_it_is_a_linear_map_and_a_relu(make_shape):
    feature_map = T2R(make_shape(num_heads=3), feature_dim=5)
    torch.nn.init.normal_(feature_map.weight)
    torch.nn.init.normal_(feature_map.bias)
    x = torch.randn(2, 3, 6, 4)
    expected = torch.einsum("bhnd,hdf->bhnf", x, feature_map.weight) + feature_map.bias
    torch.testing.assert_close(feature_map(x), expected.relu())
    assert feature_map.feature_dim == 5


def test_its_matrix_folds_into_the_projection_before_it(make_shape):
    """phi(x P) = relu(x (P W) + b): after training, the map costs no multiplication of its own."""
    feature_map = T2R(make_shape(num_heads=1))
    torch.nn.init.normal_(feature_map.weight)
    torch.nn.init.normal_(feature_map.bias)
    hidden, projection = torch.randn(1, 1, 6, 16), torch.randn(16, 4)
    folded = hidden @ (projection @ feature_map.weight) + feature_map.bias
    torch.testing.assert_close(feature_map(hidden @ projection), folded.relu(), atol=1e-4, rtol=1e-4)


def test_it_begins_as_a_plain_relu(make_shape):
    x = torch.randn(1, 2, 6, 4)
    torch.testing.assert_close(T2R(make_shape())(x), x.relu())
    assert not T2R(make_shape()).bias.any()


def test_its_number_of_parameters(make_shape):
    module = build_attention("t2r", make_shape(num_heads=12, head_dim=64))
    assert 12 * sum(p.numel() for p in module.parameters()) == 12 * 2 * 12 * (64 * 64 + 64)
    module = build_attention("t2r", make_shape(num_heads=12, head_dim=64), bias=False)
    assert 12 * sum(p.numel() for p in module.parameters()) == 1_179_648


def test_a_query_without_features_attends_evenly_and_is_counted(make_shape):
    module = build_attention("t2r", make_shape(causal=False)).eval()
    q, k = torch.rand(2, 1, 2, 6, 4)
    q[:, :, 0] = -1
    v = torch.randn(1, 2, 6, 3)
    share = k.sum(-1, keepdim=True)  # the floor is the same in every feature
    torch.testing.assert_close(module(q, k, v)[:, :, 0], (share * v).sum(2) / share.sum(2))
    assert module.floored_rows == 2


def test_before_training_it_is_flat(likeness):
    """The expected numbers are of one head, whose rank correlation scatters by 0.012."""
    found = likeness("t2r")
    assert found.entropy == pytest.approx(5.244, abs=0.02)
    assert found.kl == pytest.approx(0.352, abs=0.02)
    assert found.spearman == pytest.approx(0.581, abs=0.025)
