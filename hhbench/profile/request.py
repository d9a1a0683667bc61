"""What is to be profiled. Nothing here imports torch."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from hhbench.config import split_label
from hhbench.errors import UsageError, unknown_name

MODES: Final = ("train", "prefill", "decode")
DTYPES: Final = ("float32", "bfloat16", "float16")
SOFTMAX: Final = "softmax"
LENGTHS: Final = "256:32768"
SECONDS: Final = 480.0  # in which every attention is measured on a CPU, as far as that goes
ROUNDS: Final = 7


@dataclass(frozen=True, kw_only=True)
class Request:
    """One profile: which attentions, where they sit, and how they are measured.

    Attributes:
        attentions: labels, `hedgehog` or `taylor[project_to=16]`. Softmax is always among them.
        lengths: tokens, in rising order; empty: the task's own.
        modes: of MODES; empty: all that the subject has. `train` is a forward and a backward pass, `prefill` a forward
            pass without gradients, `decode` the first token after a prompt and each one after it.
        dtypes: of DTYPES. The 16-bit ones run as in mixed precision: weights in float32, under autocast.
        task: profile this task's training step.
        model: profile this whole model.
        batch_size: sequences; None: 1, or the task's own.
        heads, head_dim: of a layer.
        causal: whether a layer looks back only.
        rounds: at most so many; what takes long is in fewer.
        threads: of the CPU; None: what torch has.
        device: cpu, cuda, mps; None: the first GPU, or the CPU.
        seconds: the whole profile's budget. What doesn't fit into it is not run, and says so.
        seed: of weights, inputs and the order within a round.
    """

    attentions: tuple[str, ...]
    lengths: tuple[int, ...] = ()
    modes: tuple[str, ...] = ()
    dtypes: tuple[str, ...] = ("float32",)
    task: str | None = None
    model: str | None = None
    batch_size: int | None = None
    heads: int = 12
    head_dim: int = 64
    causal: bool = True
    rounds: int = ROUNDS
    threads: int | None = None
    device: str | None = None
    seconds: float = SECONDS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.task and self.model:
            raise UsageError("--task and --model name two subjects: profile one at a time")
        for name, values, known in (("mode", self.modes, MODES), ("dtype", self.dtypes, DTYPES)):
            for value in values:
                if value not in known:
                    raise unknown_name(name, value, known)
        if not self.dtypes:
            raise UsageError(f"--dtype is empty; it takes {', '.join(DTYPES)}")
        if not self.attentions:
            raise UsageError("--attn is empty; hhbench list attentions shows the names")
        if not self.lengths and not self.task:
            raise UsageError(f"--lengths is empty; it takes {LENGTHS}")
        if self.task and set(self.modes) - {"train"}:
            raise UsageError("a task has a training step alone: leave --mode out, or say --mode train")
        if not self.causal and "decode" in self.modes:
            raise UsageError("--mode decode needs --direction causal: bidirectional, every token is there at once")
        for name in ("batch_size", "heads", "head_dim", "rounds", "threads", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UsageError(f"--{'budget' if name == 'seconds' else name.replace('_', '-')} must be above 0")

    @property
    def subject(self) -> str:
        """What is profiled: `layer`, `model` or `task`."""
        return "task" if self.task else "model" if self.model else "layer"

    def settings(self) -> dict[str, Any]:
        """What two profiles must share to be compared cell by cell: plain JSON values."""
        settings: dict[str, Any] = {"subject": self.subject, "batch_size": self.batch_size}
        if self.task:
            return settings | {"task": self.task}
        if self.model:
            return settings | {"model": model_name(self.model)}
        direction = "causal" if self.causal else "bidirectional"
        return settings | {"heads": self.heads, "head_dim": self.head_dim, "direction": direction}


def model_name(model: str) -> str:
    """A name as it is; of a folder its own name: its place says nothing."""
    return Path(model).absolute().name if Path(model).is_dir() else model


def labels_of(text: str, every: Callable[[], Iterable[str]]) -> tuple[str, ...]:
    """`all`, or labels apart by commas; softmax comes first, for everything is compared with it.

    Args:
        every: the names that `all` stands for.
    """
    labels = [part.strip() for part in re.split(r",(?![^\[]*\])", text) if part.strip()]
    if labels == ["all"]:
        labels = list(every())
    for label in labels:
        split_label(label)
    return tuple(dict.fromkeys([SOFTMAX, *labels])) if labels else ()


def lengths_of(text: str) -> tuple[int, ...]:
    """`256:32768` doubles from 256 up to 32768, which is always among them; `128,197` is a list; both may be joined.

    Raises:
        UsageError: it is neither, or a length is below 1.
    """
    lengths: set[int] = set()
    for part in text.split(","):
        if not re.fullmatch(r"\s*\d+\s*(:\s*\d+\s*)?", part):
            raise UsageError(f"--lengths takes FIRST:LAST, which doubles, or 128,197, not {text!r}")
        first, _, last = part.partition(":")
        low, high = int(first), int(last or first)
        if low < 1 or high < low:
            raise UsageError(f"--lengths {part.strip()}: lengths are at least 1, and the second is not below the first")
        lengths.add(high)
        while low < high:
            lengths.add(low)
            low *= 2
    return tuple(sorted(lengths))


def words_of(text: str) -> tuple[str, ...]:
    """Words apart by commas."""
    return tuple(dict.fromkeys(word.strip() for word in text.split(",") if word.strip()))


def listed(values: Sequence[Any]) -> str:
    """For a person: `256, 512, 1,024`."""
    return ", ".join(f"{value:,}" if isinstance(value, int) else str(value) for value in values)
