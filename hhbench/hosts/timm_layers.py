"""timm's vision transformers as hosts."""

from typing import Any

from timm.layers import Attention as TimmAttention
from torch import nn

from hhbench.attention import MixerShape
from hhbench.errors import UsageError
from hhbench.hosts.slots import HostLayer


def timm_layers(model: nn.Module) -> list[HostLayer]:
    """The attention layers of a timm model, in order of depth; none if it is no such model."""
    found = [(name, m) for name, m in model.named_modules() if isinstance(m, TimmAttention)]
    return [HostLayer(name, module, _timm_shape(model, name, module)) for name, module in found]


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
