"""How near a map that was never trained comes to softmax, on the inputs for which the numbers are known."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from hhbench.attention import MixerShape, build_attention


class Likeness(NamedTuple):
    entropy: float  # of the weights, nats a query; uniform is log(200) = 5.298
    kl: float  # KL(softmax || weights), nats a query
    spearman: float  # rank correlation of q.k and the weights, a query


def ranks(x: Tensor) -> Tensor:
    return x.argsort(-1).argsort(-1).double()


@pytest.fixture(scope="session")
def likeness() -> Callable[..., Likeness]:
    """Of an attention as it is built: q, k standard normal, d = 64, 200 tokens, bidirectional, 64 heads."""

    @functools.cache
    def measure(name: str, **options) -> Likeness:
        torch.manual_seed(0)
        shape = MixerShape(dim=512, num_heads=8, num_kv_heads=8, head_dim=64, scale=1 / 8, max_len=200, causal=False)
        q, k = torch.randn(2, 8, 8, 200, 64, dtype=torch.float64)
        dots = q @ k.mT
        softmax = (dots * shape.scale).softmax(-1)
        weights = build_attention(name, shape, **options).double().weights(q, k)
        entropy = -torch.special.xlogy(weights, weights).sum(-1)
        kl = (softmax * (softmax.log() - weights.log())).sum(-1)
        pairs = torch.stack([ranks(dots), ranks(weights)]) - 199 / 2
        spearman = pairs.prod(0).sum(-1) / pairs[0].square().sum(-1)
        return Likeness(entropy.mean().item(), kl.mean().item(), spearman.mean().item())

    return measure
