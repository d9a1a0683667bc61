"""timm's vision transformers as hosts."""

from typing import Any

from timm.layers import Attention as TimmAttention
from torch import Tensor, nn

from hhbench.attention import MixerShape
from hhbench.errors import UsageError
from hhbench.hosts.slots import SLOT, HostLayer


def timm_layers(model: nn.Module) -> list[HostLayer]:
    """The attention layers of a timm model, in order of depth; none if it is no such model."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, TimmAttention)]
    return [HostLayer(name, module, _timm_shape(model, name, module)) for name, module in found]


class SlottedTimmAttention(TimmAttention):  # type: ignore[misc]  # timm is untyped
    """timm's Attention with a slot where its softmax was; qkv, norms, gate and proj are timm's."""

    def forward(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        if attn_mask is not None or is_causal:
            raise UsageError("hhbench hosts timm's attention without a mask and bidirectional")
        gate = self.gate(x).sigmoid() if getattr(self, "gate", None) is not None else None
        B, N = x.shape[:2]
        q, k, v = self.qkv(x).reshape(B, N, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        x = getattr(self, SLOT)(q, k, v, None).transpose(1, 2).reshape(B, N, -1)
        if hasattr(self, "norm"):
            x = self.norm(x)
        if gate is not None:
            x = x * gate
        return self.proj_drop(self.proj(x))  # type: ignore[no-any-return]


def _timm_shape(model: nn.Module, name: str, module: Any) -> MixerShape:
    if type(module) is not TimmAttention:
        raise UsageError(
            f"{type(model).__name__} can't be a host: {name} is a {type(module).__name__}, which does more than softmax"
        )
    patches = getattr(getattr(model, "patch_embed", None), "num_patches", None)
    if patches is None:
        raise UsageError(f"{type(model).__name__} can't be a host: it doesn't say how many patches it sees")
    return MixerShape(
        dim=module.qkv.in_features,
        num_heads=module.num_heads,
        num_kv_heads=module.num_heads,
        head_dim=module.qkv.out_features // 3 // module.num_heads,
        scale=float(module.scale),
        max_len=patches + getattr(model, "num_prefix_tokens", 1),
        causal=False,
        dropout=float(module.attn_drop.p),
    )
