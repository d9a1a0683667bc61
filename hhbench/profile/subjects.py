"""What is timed: one attention layer; for whole models and tasks see `whole`.

A subject makes a workload for each cell of the table: an attention, a piece of work, a precision and a length.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from hhbench.attention import ATTENTIONS, Attention, MixerShape, SequenceMixer
from hhbench.config import split_label
from hhbench.errors import UsageError
from hhbench.profile.correctness import autocast, complaint, module_call, random_inputs
from hhbench.profile.request import MODES, SOFTMAX, Request

TRAIN, PREFILL, FIRST, TOKEN = "train", "prefill", "first token", "token"
WORKS: Final = {"train": (TRAIN,), "prefill": (PREFILL,), "decode": (FIRST, TOKEN)}
SLACK = 64  # tokens that may be decoded after a prompt
# A GPU has several kernels for softmax, and torch's choice isn't always the fastest.
BACKENDS: Final = {
    f"{SOFTMAX} by {name}": backend
    for name, backend in (
        ("SDPA flash", SDPBackend.FLASH_ATTENTION),
        ("SDPA cuDNN", SDPBackend.CUDNN_ATTENTION),
        ("SDPA efficient", SDPBackend.EFFICIENT_ATTENTION),
        ("SDPA math", SDPBackend.MATH),
    )
}


def is_softmax(label: str) -> bool:
    """Whether others are compared with it."""
    return label == SOFTMAX or label in BACKENDS


def state_bytes(module: Attention | SequenceMixer, length: int, dtype: torch.dtype, batch_size: int) -> int | None:
    """What decoding keeps after `length` tokens. Sums are kept in float32; a cache of keys and values, and those of a
    window, in the type that they have.
    """
    stated = module.state_bytes(length, batch_size=batch_size)
    if stated is None or dtype == torch.float32:
        return stated
    if not module.has_state:
        return stated * dtype.itemsize // torch.float32.itemsize
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.get_default_device())
    inputs = random_inputs(module.shape, isinstance(module, SequenceMixer), 1, dtype, device, batch_size)
    training = module.training
    with torch.no_grad(), autocast(device, dtype):
        _, state = module.eval()(*inputs, return_state=True)
    module.train(training)
    kept: int = state.nbytes  # as after any number of tokens
    return kept


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One cell's work.

    Attributes:
        prepare: makes fresh random inputs and returns the call to be timed. What it holds goes with it.
        tokens: that one call reads, or writes.
        flops: of one call, as the attention states them; None: not stated.
        state_bytes: what decoding keeps after the cell's tokens; None: nothing that it could decode from.
        note: what a reader must know of it.
    """

    prepare: Callable[[], Callable[[], object]]
    tokens: int
    flops: int | None
    state_bytes: int | None
    note: str = ""


class Subject(ABC):
    """What is profiled.

    Attributes:
        title: for a person.
        modes: those of the request, or all that it has.
        lengths: tokens, in rising order.
        facts: what a reader of the record must know of it beside the request.
    """

    title: str
    modes: tuple[str, ...]
    lengths: tuple[int, ...]
    facts: dict[str, Any]

    @abstractmethod
    def labels(self) -> list[str]:
        """The rows: the request's attentions, and the other kernels that softmax has here."""

    @abstractmethod
    def works(self, label: str) -> tuple[str, ...]:
        """What is timed of one row. Its first token is left out where that is the very same call as `prefill`."""

    @abstractmethod
    def check(self, label: str, dtype: torch.dtype) -> tuple[str, bool]:
        """See `correctness.complaint`."""

    @abstractmethod
    def workload(self, label: str, work: str, dtype: torch.dtype, length: int) -> Workload:
        """The work of one cell.

        Raises:
            UsageError: there is none; the message says why.
        """

    def least_bytes(self, dtype: torch.dtype, length: int) -> int:
        """The memory of a call of which nothing else is known yet."""
        return 0


class LayerSubject(Subject):
    """One attention layer. Attentions are given q, k and v; sequence mixers hidden states of the width of all heads."""

    def __init__(self, request: Request, device: torch.device) -> None:
        self.request, self.device = request, device
        self.lengths = request.lengths
        self.modes = request.modes or (MODES if request.causal else (TRAIN, PREFILL))
        self.batch_size = request.batch_size or 1
        self.facts = {"kv_heads": request.heads}
        direction = "causal" if request.causal else "bidirectional"
        self.title = (
            f"one {direction} layer: {request.heads} heads of width {request.head_dim}, batch {self.batch_size}; "
            f"q, k and v are random; a mixer gets hidden states of width {request.heads * request.head_dim}, and has "
            "its projections; a training step is forward and backward"
        )
        self._built: dict[tuple[str, int, bool], Attention | SequenceMixer] = {}

    def labels(self) -> list[str]:
        return [*self.request.attentions, *(BACKENDS if self.device.type == "cuda" else ())]

    def works(self, label: str) -> tuple[str, ...]:
        works = tuple(work for mode in self.modes for work in WORKS[mode])
        if PREFILL in works and FIRST in works and not self._small(label).has_state:
            return tuple(work for work in works if work != FIRST)
        return works

    def check(self, label: str, dtype: torch.dtype) -> tuple[str, bool]:
        with self._kernel(label):
            return complaint(self._small(label), dtype, gradients="train" in self.modes, decodes="decode" in self.modes)

    def workload(self, label: str, work: str, dtype: torch.dtype, length: int) -> Workload:
        module = self._module(label, length, training=work == TRAIN)
        make: dict[str, Callable[..., Workload]] = {
            TRAIN: self._train,
            PREFILL: self._prefill,
            FIRST: self._first,
            TOKEN: self._token,
        }
        return make[work](label, module, dtype, length)

    def least_bytes(self, dtype: torch.dtype, length: int) -> int:
        """An input and the output."""
        return 2 * self.batch_size * length * self.request.heads * self.request.head_dim * dtype.itemsize

    def _shape(self, length: int) -> MixerShape:
        r = self.request
        return MixerShape(
            dim=r.heads * r.head_dim,
            num_heads=r.heads,
            num_kv_heads=r.heads,
            head_dim=r.head_dim,
            scale=r.head_dim**-0.5,
            max_len=length + SLACK,
            causal=r.causal,
        )

    def _small(self, label: str) -> Attention | SequenceMixer:
        return self._module(label, 512, training=False)

    def _module(self, label: str, length: int, *, training: bool) -> Attention | SequenceMixer:
        key = label, length, training
        if key not in self._built:
            torch.manual_seed(self.request.seed)
            if label in BACKENDS:
                module: Attention | SequenceMixer = _SDPA(self._shape(length))
            else:
                name, options = split_label(label)
                module = ATTENTIONS.get(name).build(self._shape(length), **options)
            self._built[key] = module.to(self.device).train(training)
        return self._built[key]

    def _kernel(self, label: str) -> contextlib.AbstractContextManager[Any]:
        return sdpa_kernel(BACKENDS[label]) if label in BACKENDS else contextlib.nullcontext()

    def _inputs(self, module: Attention | SequenceMixer, length: int, dtype: torch.dtype) -> list[Tensor]:
        mixer = isinstance(module, SequenceMixer)
        return random_inputs(module.shape, mixer, length, dtype, self.device, self.batch_size)

    def _forward_flops(self, module: Attention | SequenceMixer, new: int, every: int) -> int | None:
        return module.flops(new, every, batch_size=self.batch_size)

    def _train(self, label: str, module: Attention | SequenceMixer, dtype: torch.dtype, length: int) -> Workload:
        parameters = list(module.parameters())

        def prepare() -> Callable[[], object]:
            leaves = [x.requires_grad_() for x in self._inputs(module, length, dtype)]
            direction = torch.randn_like(leaves[0])

            def run() -> None:
                for leaf in (*leaves, *parameters):
                    leaf.grad = None
                with self._kernel(label):
                    module_call(module, leaves, dtype).backward(direction)  # type: ignore[no-untyped-call]

            return run

        forward = self._forward_flops(module, length, length)
        # A backward pass makes two products of each that the forward pass makes.
        flops = None if forward is None else 3 * forward
        return self._work(prepare, module, dtype, length, self.batch_size * length, flops)

    def _prefill(self, label: str, module: Attention | SequenceMixer, dtype: torch.dtype, length: int) -> Workload:
        def prepare() -> Callable[[], object]:
            inputs = self._inputs(module, length, dtype)
            return self._quiet(label, lambda: module_call(module, inputs, dtype))

        flops = self._forward_flops(module, length, length)
        return self._work(prepare, module, dtype, length, self.batch_size * length, flops)

    def _first(self, label: str, module: Any, dtype: torch.dtype, length: int) -> Workload:
        """A prompt is read, and what decoding needs of it is kept."""
        if not module.has_state:
            return self._prefill(label, module, dtype, length)

        def prepare() -> Callable[[], object]:
            inputs = self._inputs(module, length, dtype)
            return self._quiet(label, lambda: self._with_state(module, inputs, dtype))

        flops = self._forward_flops(module, length, length)
        return self._work(prepare, module, dtype, length, self.batch_size * length, flops)

    def _token(self, label: str, module: Any, dtype: torch.dtype, length: int) -> Workload:
        """One token after `length` others: from the state, over a cache of keys and values, or all of it once more."""
        note = ""
        if module.has_state:
            with torch.no_grad():
                _, state = self._with_state(module, self._inputs(module, length, dtype), dtype)

            def prepare() -> Callable[[], object]:
                token = self._inputs(module, 1, dtype)
                return self._quiet(label, lambda: self._with_state(module, token, dtype, state))

        elif isinstance(module, SequenceMixer):
            note = "no state: reads all again"

            def prepare() -> Callable[[], object]:
                inputs = self._inputs(module, length + 1, dtype)
                return self._quiet(label, lambda: module_call(module, inputs, dtype))

        else:
            note = "key-value cache"

            def prepare() -> Callable[[], object]:
                _, keys, values = self._inputs(module, length + 1, dtype)
                q, k, v = self._inputs(module, 1, dtype)

                def step() -> Tensor:  # the cache has room for the new token, as a good one has
                    keys[:, :, -1:], values[:, :, -1:] = k, v
                    return module_call(module, [q, keys, values], dtype)

                return self._quiet(label, step)

        new = length + 1 if isinstance(module, SequenceMixer) and not module.has_state else 1
        flops = self._forward_flops(module, new, length + 1)
        return self._work(prepare, module, dtype, length, self.batch_size, flops, note)

    def _with_state(self, module: Any, inputs: list[Tensor], dtype: torch.dtype, state: Any = None) -> Any:
        with autocast(self.device, dtype):
            return module(*inputs, state=state, return_state=True)

    def _quiet(self, label: str, call: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            with torch.no_grad(), self._kernel(label):
                return call()

        return run

    def _work(
        self,
        prepare: Callable[[], Callable[[], object]],
        module: Attention | SequenceMixer,
        dtype: torch.dtype,
        length: int,
        tokens: int,
        flops: int | None,
        note: str = "",
    ) -> Workload:
        state = state_bytes(module, length, dtype, self.batch_size) if self.request.causal else None
        return Workload(prepare=prepare, tokens=tokens, flops=flops, state_bytes=state, note=note)


class _SDPA(Attention):
    """torch's own function and nothing around it: the caller picks its backend."""

    def __init__(self, shape: MixerShape) -> None:
        super().__init__(shape)
        softmax = ATTENTIONS.get(SOFTMAX).build(shape)
        assert isinstance(softmax, Attention)
        self._softmax = softmax

    def forward(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        causal = self.shape.causal and q.shape[2] > 1
        if causal and q.shape[2] != k.shape[2]:
            raise UsageError("one query or as many as keys")
        return scaled_dot_product_attention(q, k, v, is_causal=causal, scale=self.shape.scale)

    def quadratic(self, q: Tensor, k: Tensor, v: Tensor, **_: Any) -> Tensor:
        return self._softmax.quadratic(q, k, v)

    def state_bytes(self, num_tokens: int, *, batch_size: int = 1) -> int | None:
        return self._softmax.state_bytes(num_tokens, batch_size=batch_size)

    def flops(self, num_queries: int, num_keys: int, *, batch_size: int = 1) -> int | None:
        return self._softmax.flops(num_queries, num_keys, batch_size=batch_size)
