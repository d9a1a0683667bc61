"""Hedgehog: the published sizes, the closed form at the identity, how near softmax it is before training."""

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


def test_the_two_activations_are_two_attentions(make_shape):
    q, k = torch.randn(2, 1, 2, 6, 4)
    one, other = (build_attention("hedgehog", make_shape(), activation=a).weights(q, k) for a in ("softmax", "exp"))
    assert (one - other).abs().max() > 0.01


def test_a_scale_before_the_map_changes_the_weights(make_shape):
    """Which is why q and k come in unscaled: only a factor on phi(q).phi(k) would cancel."""
    module = build_attention("hedgehog", make_shape())
    q, k = torch.randn(2, 1, 2, 6, 4)
    assert (module.weights(q, k) - module.weights(q / 2, k / 2)).abs().max() > 0.01


def test_an_unknown_activation_is_refused(make_shape):
    with pytest.raises(UsageError, match="activation is softmax or exp, not 'relu'"):
        build_attention("hedgehog", make_shape(), activation="relu")


@pytest.mark.parametrize(
    "activation,entropy,kl,spearman", [("softmax", 5.288, 0.387, 0.873), ("exp", 5.284, 0.381, 0.747)]
)
def test_before_training_it_is_flat_but_ordered(activation, entropy, kl, spearman, likeness):
    """The expected numbers are of one head, whose rank correlation scatters by 0.012."""
    found = likeness("hedgehog", activation=activation)
    assert found.entropy == pytest.approx(entropy, abs=0.02)
    assert found.kl == pytest.approx(kl, abs=0.02)
    assert found.spearman == pytest.approx(spearman, abs=0.025)


def test_negation_makes_it_more_monotone_than_its_rivals(likeness):
    rivals = likeness("elu"), likeness("t2r")
    for activation in ("softmax", "exp"):
        found = likeness("hedgehog", activation=activation)
        assert found.spearman > max(rival.spearman for rival in rivals) + 0.1
        assert found.kl < likeness("elu").kl
