"""T2R: a learned ReLU map, put into a pretrained Transformer and finetuned with it."""

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, identity_weight, register_attention


@register_attention(paper="Kasai et al. 2021", cost="N F E", recipe="t2r")
class T2R(FeatureMap):
    """phi(x) = relu(x W_h + b_h), W and b of each head.

    Queries and keys have maps of their own, started at the identity, as in the comparison of the Hedgehog paper's
    first author; the original ties them (`tie_qk`) and starts at random.

    Args:
        feature_dim: F; the head width by default.
        bias: add b_h.
    """

    def __init__(self, shape: MixerShape, *, feature_dim: int | None = None, bias: bool = True) -> None:
        super().__init__(shape)
        self.feature_dim = shape.head_dim if feature_dim is None else feature_dim
        self.weight = nn.Parameter(identity_weight(shape.num_heads, shape.head_dim, self.feature_dim))
        self.bias = nn.Parameter(torch.zeros(shape.num_heads, 1, self.feature_dim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        y = x @ self.weight.to(x.dtype)
        return (y if self.bias is None else y + self.bias.to(x.dtype)).relu()
