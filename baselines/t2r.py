"""T2R: a learned ReLU map, put into a pretrained Transformer and finetuned with it."""

from typing import Literal

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, identity_weight, project, register_attention
from hhbench.errors import UsageError


@register_attention(paper="Kasai et al. 2021", cost="N F E", recipe="t2r")
class T2R(FeatureMap):
    """phi(x) = relu(x W_h + b_h), W and b of each head.

    Queries and keys have maps of their own, started at the identity, as in the comparison of the Hedgehog paper's
    first author. The original ties them (`tie_qk`), starts at random (`init`), and multiplies q, not k, by D ** -0.5.

    Args:
        feature_dim: F; the head width by default.
        bias: add b_h.
        init: "identity" with no bias to begin with, or "random": W and b uniform within D ** -0.5, which is how torch
            starts a Linear layer from D features and how the original's code leaves it.
    """

    def __init__(
        self,
        shape: MixerShape,
        *,
        feature_dim: int | None = None,
        bias: bool = True,
        init: Literal["identity", "random"] = "identity",
    ) -> None:
        super().__init__(shape)
        if init not in ("identity", "random"):
            raise UsageError(f"t2r's init is identity or random, not {init!r}")
        self.feature_dim = shape.head_dim if feature_dim is None else feature_dim
        self.weight = nn.Parameter(identity_weight(shape.num_heads, shape.head_dim, self.feature_dim))
        self.bias = nn.Parameter(torch.zeros(shape.num_heads, 1, self.feature_dim)) if bias else None
        if init == "random":
            for parameter in self.parameters():
                nn.init.uniform_(parameter, -(shape.head_dim**-0.5), shape.head_dim**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = project(x, self.weight)
        return (y if self.bias is None else y + self.bias.to(x.dtype)).relu()

    def flops(self, num_tokens: int) -> int:
        """The product with W."""
        return 2 * self.shape.num_heads * num_tokens * self.shape.head_dim * self.feature_dim
