"""Models of transformers and timm, and how to give them another attention.

hhbench writes no Transformer. A host keeps its projections, rotary embeddings, norms and heads; only what happens
between q, k, v and the output changes. Every hosted layer gets an `AttentionSlot` as a child module, which holds the
attention:

- transformers calls whatever function is registered under the name in `config._attn_implementation`. Ours finds the
  slot on the calling module. A layer belongs to us when it makes that call, and a dry run tells which do: no list of
  architectures is kept.
- timm's `Attention` becomes a subclass of itself, which keeps `qkv` and `proj` and so loads the same weights.

A sequence mixer (H3, Hyena) has projections of its own: a `MixerSlot` stands where the host's attention module was.

What can't be hosted is refused by name, with the reason, before anything trains.
"""

from hhbench.hosts.cache import StateCache
from hhbench.hosts.conversion import ConversionPlan, convert, host_layers, plan_conversion
from hhbench.hosts.families import become_hosted, hosted_class
from hhbench.hosts.interface import INTERFACE, position_ids
from hhbench.hosts.slots import (
    AttentionSlot,
    CrossAttentionSlot,
    HostLayer,
    Interceptor,
    MixerSlot,
    Placement,
    attach,
    attention_parameters,
    attentions,
    hosted,
    placements,
    slots,
)

__all__ = [
    "INTERFACE",
    "AttentionSlot",
    "ConversionPlan",
    "CrossAttentionSlot",
    "HostLayer",
    "Interceptor",
    "MixerSlot",
    "Placement",
    "StateCache",
    "attach",
    "attention_parameters",
    "attentions",
    "become_hosted",
    "convert",
    "host_layers",
    "hosted",
    "hosted_class",
    "placements",
    "plan_conversion",
    "position_ids",
    "slots",
]
