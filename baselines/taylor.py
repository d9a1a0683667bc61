"""Taylor: the exponential of softmax to second order, as a feature map."""

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, register_attention
from hhbench.errors import UsageError


@register_attention(
    paper="Zhang et al. 2024, section 4.1; Arora et al. 2024 (Based)", cost="N D^2 E", recipe="no-transfer"
)
class Taylor(FeatureMap):
    """phi(q).phi(k) = 1 + z + z^2 / 2, z = scale q.k: never below 1/2, spiky, and monotone while z >= -1.

    phi(x) = [1, y, y_i^2 / sqrt 2, y_i y_j for i < j], y = sqrt(scale) x: 1 + D + D (D + 1) / 2 features. Public
    code writes out all D^2 products, each pair twice, for the same kernel.

    Args:
        project_to: P. Project q and k to P features first (16 in Based), by a learned matrix [D, P] of each head;
            z = q.k / sqrt P then. There is something to teach: `--recipe hedgehog` works.
    """

    signed = True

    def __init__(self, shape: MixerShape, *, project_to: int | None = None) -> None:
        super().__init__(shape)
        width, self.scale = shape.head_dim, shape.scale
        self.weight: nn.Parameter | None = None
        if project_to is not None:
            if project_to < 1:
                raise UsageError(f"project_to must be at least 1, not {project_to}")
            width, self.scale = project_to, project_to**-0.5
            # A projected feature varies as much as a feature of x: z then has the spread that softmax's logits have.
            # Random, for no D - P features deserve to be left out, which is what the first P would do.
            self.weight = nn.Parameter(torch.randn(shape.num_heads, shape.head_dim, project_to) * shape.head_dim**-0.5)
        self.feature_dim = 1 + width + width * (width + 1) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = (x if self.weight is None else x @ self.weight.to(x.dtype)) * self.scale**0.5
        width = y.shape[-1]
        # One diagonal of y y^T after another: views of y alone, where indices would copy it and the square is twice it.
        pairs = (y[..., : width - apart] * y[..., apart:] for apart in range(1, width))
        return torch.cat([torch.ones_like(y[..., :1]), y, y.square() * 0.5**0.5, *pairs], dim=-1)
