"""1 + ELU: the features and the kernel, by hand."""

import math

import pytest
import torch

from hhbench.attention import ATTENTIONS, build_attention

LinearTransformer = ATTENTIONS.get("elu").part


def test_features_by_hand(make_shape):
    """x + 1 above zero, exp(x) below."""
    x = torch.tensor([2.0, 0.0, -1.0, -3.0]).view(1, 1, 1, 4)
    found = LinearTransformer(make_shape(num_heads=1))(x)
    expected = torch.tensor([3.0, 1.0, math.exp(-1), math.exp(-3)])
    torch.testing.assert_close(found.flatten(), expected)


def test_weights_by_hand(make_shape):
    """phi(1) = 2 against keys phi(0) = 1, phi(1) = 2, phi(-1) = 1/e, in one dimension."""
    shape = make_shape(num_heads=1, head_dim=1, causal=False)
    q, k = torch.ones(1, 1, 3, 1), torch.tensor([0.0, 1.0, -1.0]).view(1, 1, 3, 1)
    found = build_attention("elu", shape).weights(q, k)
    expected = torch.tensor([1.0, 2.0, math.exp(-1)]) / (3 + math.exp(-1))
    torch.testing.assert_close(found, expected.expand(1, 1, 3, 3))


def test_a_kernel_by_hand(make_shape):
    """(2, 1/e).(1, 3) = 2 + 3/e and (2, 1/e).(2, 1) = 4 + 1/e."""
    shape = make_shape(num_heads=1, head_dim=2, causal=False)
    q = torch.tensor([1.0, -1.0]).expand(1, 1, 2, 2)
    k = torch.tensor([[0.0, 2.0], [1.0, 0.0]]).view(1, 1, 2, 2)
    kernel = torch.tensor([2 + 3 / math.e, 4 + 1 / math.e])
    found = build_attention("elu", shape).weights(q, k)
    torch.testing.assert_close(found, (kernel / kernel.sum()).expand(1, 1, 2, 2))


def test_it_has_no_parameters(make_shape):
    module = build_attention("elu", make_shape())
    assert list(module.parameters()) == []
    assert module.state_dict() == {}


def test_it_is_flatter_than_softmax_and_hardly_ordered(likeness):
    """The expected numbers are of one head, whose rank correlation scatters by 0.012."""
    found = likeness("elu")
    assert found.entropy == pytest.approx(5.293, abs=0.02)
    assert found.kl == pytest.approx(0.444, abs=0.02)
    assert found.spearman == pytest.approx(0.501, abs=0.025)
    assert found.entropy > likeness("softmax").entropy + 0.4
