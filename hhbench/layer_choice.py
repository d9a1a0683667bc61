"""Which layers of a converted model to give their softmax back: those that attention transfer taught least."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import nn

from hhbench.attention import ATTENTIONS
from hhbench.errors import HHBenchError, UsageError
from hhbench.hosts import attach, slots


@dataclass(frozen=True)
class Step:
    """One point of the curve.

    Attributes:
        layer: the layer that was given softmax; None at the start, where none was.
        score: of the model that all layers so far make; None where there is nothing to score.
    """

    layer: str | None
    score: float | None


def keep_worst(
    model: nn.Module, divergences: Mapping[str, float], count: int, score: Callable[[], float | None]
) -> list[Step]:
    """Give the layers of the largest divergence softmax, in place, one after the other, and score after each.

    Greedy by each layer's own divergence, not by the score: transfer teaches every layer against the softmax of its
    own q and k, so that what one layer lacks doesn't depend on which others are kept, and one report orders them all.
    That costs count + 1 scores, where trying every layer in every round would cost about count times the layers. The
    score is reported, it doesn't choose. Of equal layers the shallower one comes first.

    Args:
        model: converted and taught. Its own weights stay; those of the attentions that softmax replaces go.
        divergences: by layer, after transfer: KL(softmax || weights), or the error of the output where an attention
            has no weights; never both in one mapping. Layers that are softmax already don't count.
        count: how many layers to keep.
        score: measures the model as it stands.

    Returns:
        The curve: `count` + 1 steps, the first before any layer is kept.

    Raises:
        UsageError: the model has fewer layers to keep than `count`.
        HHBenchError: a layer that could be kept has no divergence, or one that is not a number.
    """
    softmax = ATTENTIONS.get("softmax")
    hosted = slots(model)
    candidates = [name for name, slot in hosted.items() if not slot.placement.is_softmax]
    if not 0 < count <= len(candidates):
        raise UsageError(f"can't keep {count} layers as softmax: {len(candidates)} are something else")
    for name in candidates:
        if math.isnan(divergences.get(name, math.nan)):
            raise HHBenchError(f"{name} has no divergence from softmax to be chosen by: name the layers to keep")
    worst = sorted(candidates, key=lambda name: -divergences[name])
    steps = [Step(None, score())]
    for name in worst[:count]:
        slot = hosted[name]
        placement = dataclasses.replace(slot.placement, attention=softmax.name, options={})
        attach(model, placement, softmax.build(placement.shape).train(slot.training))
        steps.append(Step(name, score()))
    return steps
