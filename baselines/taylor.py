"""Taylor: the exponential of softmax to second order, as a feature map."""

from typing import Any

import torch
from torch import Tensor, nn

from hhbench.attention import FeatureMap, MixerShape, project, register_attention
from hhbench.errors import UsageError


class _Monomials(torch.autograd.Function):
    """y [..., N, P] -> [1, y, y_i^2 / sqrt 2, y_i y_j] [..., N, F], each pair i < j once.

    The pairs are the products of y with y turned by 1, 2 ... places, and at half the circle half of them. They are
    written with the tokens last, where all rows are long; what is returned is the transposed view of that.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        ctx.save_for_backward(y)
        P, turns, half = y.shape[-1], (y.shape[-1] + 1) // 2, y.shape[-1] // 2
        y = y.mT
        around = torch.cat([y, y[..., :half, :]], dim=-2)
        y = around[..., :P, :]
        out = y.new_empty(*y.shape[:-2], 1 + P + P * (P + 1) // 2, y.shape[-1])
        out[..., 0, :] = 1.0
        out[..., 1 : 1 + P, :] = y
        turned = around.unfold(-2, P, 1)[..., :turns, :, :].mT  # [..., turns, P, N]
        pairs = out[..., 1 + P : 1 + P + turns * P, :]
        torch.mul(y.unsqueeze(-3), turned, out=pairs.view(*pairs.shape[:-2], turns, P, -1))
        pairs[..., :P, :] *= 0.5**0.5
        if P % 2 == 0:
            torch.mul(y[..., :half, :], y[..., half:, :], out=out[..., 1 + P + turns * P :, :])
        return out.mT

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        P, half, start = y.shape[-1], y.shape[-1] // 2, 1 + 2 * y.shape[-1]
        y, grad = y.mT, grad.mT.contiguous()
        around = torch.cat([y, y[..., :half, :]], dim=-2)
        y = around[..., :P, :]
        total: Tensor = torch.addcmul(grad[..., 1 : 1 + P, :], y, grad[..., 1 + P : start, :], value=2**0.5)
        for turn in range(1, (P + 1) // 2):
            of_pairs = grad[..., start : start + P, :]
            total.addcmul_(of_pairs, around[..., turn : turn + P, :])
            back = of_pairs * y
            total[..., turn:, :] += back[..., : P - turn, :]
            total[..., :turn, :] += back[..., P - turn :, :]
            start += P
        if P % 2 == 0:
            of_pairs = grad[..., start:, :]
            total[..., :half, :].addcmul_(of_pairs, y[..., half:, :])
            total[..., half:, :].addcmul_(of_pairs, y[..., :half, :])
        return total.mT


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
        y = (x if self.weight is None else project(x, self.weight)) * self.scale**0.5
        features: Tensor = _Monomials.apply(y)
        return features

    def flops(self, num_tokens: int) -> int:
        """The projection, if there is one."""
        if self.weight is None:
            return 0
        return 2 * self.shape.num_heads * num_tokens * self.shape.head_dim * self.weight.shape[-1]
