"""Hedgehog's attention in many shapes, for the tests of its compiled forms."""

import torch

from hhbench import native
from hhbench.attention import build_attention
from hhbench.linear_attention import LinearAttention
from hhbench.native import step

FORMS = {
    "odd widths": {"B": 2, "H": 3, "D": 20, "E": 37, "half": 13},
    "widest": {"B": 1, "H": 2, "D": 128, "E": 128},
    "grouped": {"B": 2, "H": 4, "G": 2, "D": 32, "E": 32},
    "shared keys": {"B": 2, "H": 6, "G": 2, "D": 32, "E": 24, "share_kv_heads": True},
    "bias": {"B": 1, "H": 2, "D": 32, "E": 32, "bias": True},
    "bias of shared keys": {"B": 2, "H": 4, "G": 2, "D": 32, "E": 32, "bias": True, "share_kv_heads": True},
    "one W": {"B": 1, "H": 3, "D": 32, "E": 32, "shared_heads": True},
    "one W of shared keys": {"B": 1, "H": 4, "G": 2, "D": 32, "E": 32, "shared_heads": True, "share_kv_heads": True},
    "tied": {"B": 1, "H": 2, "D": 32, "E": 32, "tie_qk": True},
}


def hedgehog(make_shape, *, B, H, N, D, E, G=None, half=None, factor=1.0, **options):
    """An attention with drawn maps, and q, k, v."""
    shape = make_shape(num_heads=H, num_kv_heads=G or H, head_dim=D)
    attention = build_attention("hedgehog", shape, feature_dim=half, **options).eval()
    assert isinstance(attention, LinearAttention)
    with torch.no_grad():
        for p in attention.parameters():
            p.normal_(std=D**-0.5)
    q, k = torch.randn(B, H, N, D) * factor, torch.randn(B, G or H, N, D) * factor
    return attention, (q, k, torch.randn(B, G or H, N, E))


def forget() -> None:
    """The library that was loaded."""
    native.library.cache_clear()
    step.compiled.cache_clear()
