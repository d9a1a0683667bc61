"""Hedgehog: a learned map that mimics softmax."""

from typing import Literal

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, identity_weight, register_attention
from hhbench.errors import UsageError


@register_attention(paper="Zhang et al. 2024, section 4.2 and appendix A.1", cost="N 2F E")
class Hedgehog(FeatureMap):
    """y = x W_h (+ b_h); phi(x) = [act(y), act(-y)], with W at the identity to begin with.

    `activation="softmax"`: each half is a softmax over its features. This bounds the features, and makes phi another
    function than the exponential one, not a stabilised copy of it: it divides each key by a norm of its own.
    `activation="exp"`: the elementwise exponential of the paper's section 4.2.

    Public code gives the name to a third map, one softmax over [2y, -2y]; that one is not this.

    Args:
        activation: "softmax" or "exp".
        feature_dim: F, the width of each half; the head width by default, so that phi is twice as wide.
        bias: add b_h. The paper's parameter count of its Llama run (0.495 % of the model) has none.
        shared_heads: one W for all heads, as in the listing of the paper's appendix.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        activation: Literal["softmax", "exp"] = "softmax",
        feature_dim: int | None = None,
        bias: bool = False,
        shared_heads: bool = False,
    ) -> None:
        super().__init__(shape)
        if activation not in ("softmax", "exp"):
            raise UsageError(f"hedgehog's activation is softmax or exp, not {activation!r}")
        self.activation = activation
        half = shape.head_dim if feature_dim is None else feature_dim
        self.feature_dim = 2 * half
        heads = 1 if shared_heads else shape.num_heads
        self.weight = nn.Parameter(identity_weight(heads, shape.head_dim, half))
        self.bias = nn.Parameter(torch.zeros(heads, 1, half)) if bias else None

    def map_queries(self, q: Tensor, *, positions: Tensor) -> Tensor:
        y = self._projected(q)
        if self.activation == "softmax":
            return self._softmax_halves(y)
        y = torch.cat([y, -y], dim=-1)
        return (y - y.amax(-1, keepdim=True).detach()).exp()

    def map_keys(self, k: Tensor, *, positions: Tensor, key_mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        y = self._projected(k)
        if self.activation == "softmax":
            return self._softmax_halves(y), None
        y = torch.cat([y, -y], dim=-1)
        top = y.amax(-1).detach()
        return (y - top[..., None]).exp(), top

    def _projected(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    @staticmethod
    def _softmax_halves(y: Tensor) -> Tensor:
        return torch.cat([y.softmax(-1), (-y).softmax(-1)], dim=-1)
