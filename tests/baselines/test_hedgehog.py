"""Hedgehog: the published sizes, the closed form at the identity, how near softmax it is before training."""

import itertools
import math

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention
from hhbench.errors import UsageError

Hedgehog = ATTENTIONS.get("hedgehog").part


def parameters(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize(
    "layers,heads,head_dim,published",
    [(32, 32, 128, 33_554_432), (12, 12, 64, 1_179_648)],
    ids=["Llama-2-7B", "BERT-base, GPT-2 and ViT-B"],
)
def test_it_adds_the_published_number_of_parameters(layers, heads, head_dim, published, make_shape):
    """0.495 % of Llama-2-7B: a square map without bias for each head of q and of k."""
    shape = make_shape(num_heads=heads, head_dim=head_dim)
    assert layers * parameters(build_attention("hedgehog", shape)) == published


def test_options_change_the_number_of_parameters(make_shape):
    shape = make_shape(num_heads=4, num_kv_heads=2, head_dim=8)

    def count(**options):
        return parameters(build_attention("hedgehog", shape, **options))

    assert count() == 2 * 4 * 8 * 8
    assert count(activation="exp") == count()
    assert count(tie_qk=True) == count() // 2
    assert count(shared_heads=True) == 2 * 8 * 8
    assert count(activation="joint-softmax") == count(negation=False) == count(init="random") == count()
    assert count(bias=True) == count() + 2 * 4 * 8
    assert count(feature_dim=3) == 2 * 4 * 8 * 3
    assert count(share_kv_heads=True) == (4 + 2) * 8 * 8


def test_a_state_is_the_cache_of_129_tokens(make_shape):
    """33,024 numbers a head for widths of 128, beside one running maximum; softmax keeps 256 a token."""
    shape = make_shape(num_heads=1, head_dim=128)
    state, token = (build_attention(name, shape).state_bytes(1) for name in ("hedgehog", "softmax"))
    assert state == (33_024 + 1) * 4 + 8
    assert state // token == 129


@pytest.mark.parametrize("shared_heads,heads", [(False, 3), (True, 1)])
def test_it_begins_at_the_identity(shared_heads, heads, make_shape):
    feature_map = Hedgehog(make_shape(num_heads=3), shared_heads=shared_heads, bias=True)
    assert torch.equal(feature_map.weight, torch.eye(4).expand(heads, 4, 4))
    assert not feature_map.bias.any()
    assert feature_map.feature_dim == 8
    assert Hedgehog(make_shape(), feature_dim=3).feature_dim == 6


@pytest.mark.parametrize("direction", ["causal", "bidirectional"])
def test_the_exponential_map_at_the_identity_is_a_sum_of_hyperbolic_cosines(direction, make_shape):
    """phi(q).phi(k) = sum_i exp(q_i + k_i) + exp(-q_i - k_i) = 2 sum_i cosh(q_i + k_i)."""
    shape = make_shape(causal=direction == "causal")
    q, k = torch.randn(2, 1, 2, 6, 4, dtype=torch.float64)
    kernel = 2 * torch.cosh(q[:, :, :, None] + k[:, :, None]).sum(-1)
    kernel = kernel.tril() if shape.causal else kernel
    weights = build_attention("hedgehog", shape, activation="exp").double().weights(q, k)
    torch.testing.assert_close(weights, kernel / kernel.sum(-1, keepdim=True), atol=1e-12, rtol=0)


def test_the_exponential_features_of_a_key_are_true_with_their_scale(make_shape):
    k, positions = torch.randn(1, 2, 6, 4), torch.arange(6)[None]
    features, log_scale = Hedgehog(make_shape(), activation="exp").map_keys(k, positions=positions, key_mask=None)
    expected = torch.cat([k.exp(), (-k).exp()], -1)
    torch.testing.assert_close(features * log_scale.exp()[..., None], expected)
    assert features.max() == 1


def test_each_half_is_a_softmax_of_its_own(make_shape):
    x, positions = torch.randn(1, 2, 6, 4), torch.arange(6)[None]
    feature_map = Hedgehog(make_shape())
    features, log_scale = feature_map.map_keys(x, positions=positions, key_mask=None)
    assert log_scale is None
    assert torch.equal(feature_map.map_queries(x, positions=positions), features)
    torch.testing.assert_close(features.unflatten(-1, (2, 4)).sum(-1), torch.ones(1, 2, 6, 2))
    torch.testing.assert_close(features[..., :4], x.softmax(-1))
    torch.testing.assert_close(features[..., 4:], (-x).softmax(-1))


def test_the_activations_are_three_attentions(make_shape):
    q, k = torch.randn(2, 1, 2, 6, 4)
    activations = ("softmax", "exp", "joint-softmax")
    found = [build_attention("hedgehog", make_shape(), activation=a).weights(q, k) for a in activations]
    for one, other in itertools.combinations(found, 2):
        assert (one - other).abs().max() > 0.01


def test_a_scale_before_the_map_changes_the_weights(make_shape):
    """Which is why q and k come in unscaled: only a factor on phi(q).phi(k) would cancel."""
    module = build_attention("hedgehog", make_shape())
    q, k = torch.randn(2, 1, 2, 6, 4)
    assert (module.weights(q, k) - module.weights(q / 2, k / 2)).abs().max() > 0.01


@pytest.mark.parametrize("negation", [True, False])
def test_the_joint_softmax_is_one_over_both_halves_at_twice_the_size(negation, make_shape):
    """exp(+-2x) over the sum of them all: what flash-linear-attention's map gives for the same W."""
    x, positions = torch.tensor([1.0, 0.0, -0.5]).view(1, 1, 1, 3), torch.zeros(1, 1, dtype=torch.int64)
    feature_map = Hedgehog(make_shape(num_heads=1, head_dim=3), activation="joint-softmax", negation=negation)
    features, log_scale = feature_map.map_keys(x, positions=positions, key_mask=None)
    grown = [math.exp(e) for e in ([2, 0, -1, -2, 0, 1] if negation else [2, 0, -1])]
    torch.testing.assert_close(features.flatten(), torch.tensor(grown) / sum(grown))
    assert log_scale is None
    assert torch.equal(feature_map.map_queries(x, positions=positions), features)


def test_without_negation_it_is_the_first_half(make_shape):
    x, positions = torch.randn(1, 2, 6, 4), torch.arange(6)[None]
    for activation in ("softmax", "exp"):
        whole, half = (Hedgehog(make_shape(), activation=activation, negation=n) for n in (True, False))
        assert (whole.feature_dim, half.feature_dim) == (8, 4)
        (features, log_scale), (expected, its_scale) = (
            m.map_keys(x, positions=positions, key_mask=None) for m in (half, whole)
        )
        if log_scale is not None:
            features, expected = features * log_scale.exp()[..., None], expected * its_scale.exp()[..., None]
        torch.testing.assert_close(features, expected[..., :4])


def test_the_exponential_map_without_negation_begins_as_the_elementwise_exponential(make_shape):
    q, k, v = torch.randn(3, 1, 2, 6, 4)
    found = build_attention("hedgehog", make_shape(), activation="exp", negation=False)(q, k, v)
    assert torch.equal(found, build_attention("exp", make_shape())(q, k, v))


@pytest.mark.parametrize("shared_heads", [False, True])
def test_a_random_start_takes_the_fan_of_a_tensor_of_three_dimensions(shared_heads, make_shape):
    """sqrt(6 / (128 * 64)) = 0.02706, where a matrix of one head alone would give sqrt(6 / 128) = 0.217."""
    shape = make_shape(num_heads=8, head_dim=128)
    module = build_attention("hedgehog", shape, feature_dim=64, init="random", shared_heads=shared_heads)
    weight = module.query_map.weight
    assert weight.abs().max().item() == pytest.approx(0.02706, abs=5e-5)
    assert weight.std().item() == pytest.approx(0.02706 / 3**0.5, rel=0.02)
    assert torch.equal(weight, module.key_map.weight)
    assert weight is not module.key_map.weight


def test_the_identity_draws_nothing(make_shape):
    before = torch.get_rng_state()
    build_attention("hedgehog", make_shape())
    assert torch.equal(torch.get_rng_state(), before)


def test_a_random_start_orders_its_weights_because_both_maps_begin_alike(likeness):
    """Two draws would know nothing of q.k."""
    found = likeness("hedgehog", init="random")
    assert found.spearman == pytest.approx(0.689, abs=0.02)
    assert found.entropy > math.log(200) - 0.0005  # uniform all but for that


def test_an_unknown_choice_is_refused(make_shape):
    with pytest.raises(UsageError, match="activation is softmax, exp or joint-softmax, not 'relu'"):
        build_attention("hedgehog", make_shape(), activation="relu")
    with pytest.raises(UsageError, match="init is identity or random, not 'zeros'"):
        build_attention("hedgehog", make_shape(), init="zeros")


def test_negation_makes_it_more_monotone_than_its_rivals(likeness):
    rivals = likeness("elu"), likeness("t2r")
    for activation in ("softmax", "exp"):
        found = likeness("hedgehog", activation=activation)
        assert found.spearman > max(rival.spearman for rival in rivals) + 0.1
        assert found.kl < likeness("elu").kl
