"""T2R: a linear map before a ReLU."""

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

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


def test_the_original_starts_within_the_bound_of_a_linear_layer(make_shape):
    """W and b uniform within D ** -0.5 = 1/8: a standard deviation of 1/8 / sqrt 3."""
    module = build_attention("t2r", make_shape(num_heads=4, head_dim=64), feature_dim=256, init="random")
    for parameter in module.parameters():
        assert parameter.abs().max() <= 1 / 8
        assert parameter.std().item() == pytest.approx(1 / 8 / 3**0.5, rel=0.05)
    assert torch.equal(module.query_map.weight, module.key_map.weight)
    assert module.query_map.weight is not module.key_map.weight
    assert [name for name, _ in build_attention("t2r", make_shape(), init="random", bias=False).named_parameters()] == [
        "query_map.weight",
        "key_map.weight",
    ]


def test_an_unknown_init_is_refused(make_shape):
    with pytest.raises(UsageError, match="init is identity or random, not 'zeros'"):
        build_attention("t2r", make_shape(), init="zeros")


def test_it_begins_as_the_relu_attention_and_draws_nothing(make_shape):
    before = torch.get_rng_state()
    module = build_attention("t2r", make_shape())
    assert torch.equal(torch.get_rng_state(), before)
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    assert torch.equal(module(q, k, v), build_attention("relu", make_shape())(q, k, v))
