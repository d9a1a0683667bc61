"""What an attention's file imports: the contracts, what their implementations share, and how a class registers."""

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from hhbench.contracts import (
    Attention,
    Direction,
    FeatureMap,
    MixerShape,
    OptimizerSettings,
    SequenceMixer,
    check_hidden_states,
    check_inputs,
    identity_weight,
    masked_softmax,
    project,
    refuse_state_unless_causal,
    repeat_heads,
    sum_dtype,
    token_positions,
    visible_keys,
    without_autocast,
    zero_padding,
)
from hhbench.errors import HHBenchError, UsageError, in_one_line, unknown_name
from hhbench.linear_attention import LinearAttention
from hhbench.registry import Registry, source_hash

__all__ = [
    "ATTENTIONS",
    "Attention",
    "AttentionSpec",
    "Direction",
    "FeatureMap",
    "LinearAttention",
    "MixerShape",
    "OptimizerSettings",
    "SequenceMixer",
    "build_attention",
    "check_hidden_states",
    "check_inputs",
    "identity_weight",
    "masked_softmax",
    "probe",
    "project",
    "refuse_state_unless_causal",
    "register_attention",
    "repeat_heads",
    "sum_dtype",
    "token_positions",
    "visible_keys",
    "without_autocast",
    "zero_padding",
]

Part = FeatureMap | Attention | SequenceMixer
PartT = TypeVar("PartT", bound=type[Part])


@dataclass(frozen=True, kw_only=True)
class AttentionSpec:
    """One registered attention: what it is, what it costs, and how it is built.

    Attributes:
        name: what the command line calls it.
        part: the class, at the rung where it registered.
        paper: where it comes from.
        cost: time per layer in N, D, F: "N F E".
        directions: which uses it serves.
        recipe: the recipe that converts a pretrained model unless the user says otherwise.
        version: raised whenever its results change; it is part of every result's key.
        external: it is a user's own, not one of hhbench's.
    """

    name: str
    part: type[Part]
    paper: str
    cost: str
    directions: frozenset[Direction]
    recipe: str
    version: int
    external: bool = False

    @property
    def convertible(self) -> bool:
        """Whether it can take over q, k and v of a pretrained layer."""
        return not issubclass(self.part, SequenceMixer)

    @property
    def rung(self) -> str:
        return next(c.__name__ for c in (FeatureMap, Attention, SequenceMixer) if issubclass(self.part, c))

    @property
    def options(self) -> dict[str, Any]:
        """Every option with its default: the keyword-only parameters of the class, and of the sum around a map."""
        holders: list[type] = [self.part]
        unchangeable = set()
        if issubclass(self.part, FeatureMap):
            holders.append(LinearAttention)
            unchangeable = {"tie_qk"} if self.part.tied else set()
        return {
            name: parameter.default
            for holder in holders
            for name, parameter in inspect.signature(holder).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY
            and parameter.default is not parameter.empty
            and name not in unchangeable
        }

    @property
    def state(self) -> str:
        """What causal decoding keeps, by the default options: for one head of width 64, or 64 channels of a mixer."""
        if "causal" not in self.directions:
            return "none"
        shape = MixerShape(dim=64, num_heads=1, num_kv_heads=1, head_dim=64, scale=0.125, max_len=4096, causal=True)
        with torch.random.fork_rng(devices=[]):
            module = self.build(shape)
        few, many = module.state_bytes(1024), module.state_bytes(2048)
        if few is None or many is None:
            return "none"
        return f"{few:,} B" if few == many else f"{(many - few) // 1024:,} B a token"

    def label(self, options: Mapping[str, Any]) -> str:
        """The name with every option that is not the default: what a table's row is called."""
        unusual = [f"{k}={options[k]}" for k in sorted(options) if options[k] != self.options.get(k)]
        return f"{self.name}[{','.join(unusual)}]" if unusual else self.name

    def check(self, *, direction: Direction, options: Mapping[str, Any]) -> None:
        """Refuse a direction that it can't serve and options that it doesn't have."""
        if direction not in self.directions:
            raise UsageError(f"{self.name} has no {direction} form; it is {' and '.join(sorted(self.directions))}")
        for name in options.keys() - self.options.keys():
            raise unknown_name(f"option of {self.name}", name, self.options)

    def build(self, shape: MixerShape, **options: Any) -> "Attention | SequenceMixer":
        """Make the module for one layer.

        Raises:
            UsageError: the direction or an option doesn't fit.
            HHBenchError: a user's class raised, or is none of the three contracts.
        """
        self.check(direction=shape.direction, options=options)
        try:
            if issubclass(self.part, FeatureMap):
                of_sum = {name for name in inspect.signature(LinearAttention).parameters if name in options}
                of_map = {name: value for name, value in options.items() if name not in of_sum}
                make_map = functools.partial(self.part, **of_map)
                return LinearAttention(shape, make_map, **{name: options[name] for name in of_sum})
            return self.part(shape, **options)
        except HHBenchError:
            raise
        except Exception as error:
            if not self.external:
                raise
            raise HHBenchError(f"building {self.name} failed: {in_one_line(error)}") from error

    def source_hash(self) -> str | None:
        """sha256 of a user's own file, which is part of a result's key; None for hhbench's own."""
        return source_hash(self.part)


def _adopt(cls: type, name: str) -> AttentionSpec:
    if not (inspect.isclass(cls) and issubclass(cls, FeatureMap | Attention | SequenceMixer)):
        raise UsageError(f"{name} is none of hhbench.attention's FeatureMap, Attention and SequenceMixer")
    return _spec(cls, name=name, paper="the user's own", cost="not stated")


ATTENTIONS: Registry[AttentionSpec] = Registry(
    "attention", package="hhbench.baselines", entry_points="hhbench.attentions", adopt=_adopt
)


def _spec(part: type[Part], *, name: str, paper: str, cost: str, **fields: Any) -> AttentionSpec:
    return AttentionSpec(
        name=name,
        part=part,
        paper=paper,
        cost=cost,
        directions=frozenset(fields.pop("directions", ("causal", "bidirectional"))),
        recipe=fields.pop("recipe", "hedgehog"),
        version=fields.pop("version", 1),
        external=not part.__module__.startswith("hhbench."),
    )


def register_attention(
    *,
    paper: str,
    cost: str,
    directions: tuple[Direction, ...] = ("causal", "bidirectional"),
    recipe: str = "hedgehog",
    version: int = 1,
    name: str | None = None,
) -> Callable[[PartT], PartT]:
    """Register a class under its file's name. See `AttentionSpec` for the arguments."""

    def add(part: PartT) -> PartT:
        own = name or part.__module__.rpartition(".")[2].replace("_", "-")
        if not part.__module__.startswith("hhbench."):
            own = name or part.__name__
        spec = _spec(part, name=own, paper=paper, cost=cost, directions=directions, recipe=recipe, version=version)
        ATTENTIONS.add(own, spec, external=spec.external)
        return part

    return add


def build_attention(name: str, shape: MixerShape, **options: Any) -> Attention | SequenceMixer:
    """An attention of the registry, a user's file (`path.py:Class`) or a dotted path, for one layer.

    >>> shape = MixerShape(dim=64, num_heads=4, num_kv_heads=4, head_dim=16, scale=0.25, max_len=128, causal=True)
    >>> hedgehog = build_attention("hedgehog", shape)
    """
    return ATTENTIONS.get(name).build(shape, **options)


def probe(spec: AttentionSpec, *, direction: Direction, options: Mapping[str, Any]) -> None:
    """Run a user's attention once on four tokens, one of them padded, so that what it gets wrong is a clear line
    before anything trains.
    """
    shape = MixerShape(
        dim=16,
        num_heads=2,
        num_kv_heads=2,
        head_dim=8,
        scale=8**-0.5,
        max_len=16,
        causal=direction == "causal",
    )
    with torch.random.fork_rng(devices=[]):
        module = spec.build(shape, **options)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            x = torch.randn(2, 2, 4, 8)
            mask = torch.tensor([[True] * 4, [True] * 3 + [False]])
            if isinstance(module, SequenceMixer):
                out = module(torch.randn(2, 4, 16), key_mask=mask)
            else:
                out = module(x, x, x, key_mask=mask)
    except HHBenchError:
        raise
    except Exception as error:
        raise HHBenchError(f"{spec.name} failed on four tokens: {in_one_line(error)}") from error
    expected = (2, 4, 16) if isinstance(module, SequenceMixer) else (2, 2, 4, 8)
    if not isinstance(out, Tensor) or out.shape != expected:
        got = list(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise HHBenchError(f"{spec.name} returned {got} where {list(expected)} was expected")
