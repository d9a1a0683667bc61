"""Whether an attention computes what it defines: asked of each one before it is timed."""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from hhbench.attention import Attention, MixerShape, SequenceMixer
from hhbench.errors import HHBenchError

LENGTH = 288  # tokens: beyond a CPU's block, and two chunks of an accelerator, between which sums are carried
OF_MIXERS = 160  # their definitions hold the width of the model for each pair of tokens
# How far from float64 an output may be, as a part of its largest value; gradients four times as far.
BOUNDS = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}


def complaint(
    module: Attention | SequenceMixer, dtype: torch.dtype, *, gradients: bool, decodes: bool
) -> tuple[str, bool]:
    """What is wrong with an attention, or "", and whether there was a definition to compare it with.

    Outputs, and gradients of the inputs if asked for, are compared with its `quadratic` form in float64 on a short
    sequence; the last token once more as it is decoded.

    Args:
        module: in float32, on the device where it will be timed.
        dtype: of its inputs.

    Raises:
        HHBenchError: it doesn't serve these inputs.
        Exception: whatever it fails with.
    """
    mixer = isinstance(module, SequenceMixer)
    length = OF_MIXERS if mixer else LENGTH
    device = next((t.device for t in (*module.parameters(), *module.buffers())), torch.get_default_device())
    exact = copy.deepcopy(module).double().eval()
    inputs = random_inputs(module.shape, mixer, length, dtype, device)
    doubles = [x.double().requires_grad_(gradients) for x in inputs]
    try:
        truth = exact.quadratic(*doubles)
    except HHBenchError as error:
        return f"not checked: {error}", False
    direction = torch.randn_like(truth)
    module.eval()
    leaves = [x.requires_grad_(gradients) for x in inputs]
    with torch.set_grad_enabled(gradients):
        out = module_call(module, leaves, dtype)
    found = [("output", out, truth, BOUNDS[dtype])]
    if gradients:
        ours = torch.autograd.grad(out, leaves, direction.to(out.dtype), materialize_grads=True)
        true = torch.autograd.grad(truth, doubles, direction, materialize_grads=True)
        names = ("x",) if len(leaves) == 1 else ("q", "k", "v")
        found += [
            (f"gradient of {name}", a, b, 4 * BOUNDS[dtype]) for name, a, b in zip(names, ours, true, strict=True)
        ]
    if decodes:
        with torch.no_grad():
            last = _decoded(module, [x.detach() for x in leaves], dtype)
        found.append(("decoded token", last, truth[..., -1:, :], BOUNDS[dtype]))
    for what, ours_, true_, bound in found:
        off = distance(ours_, true_)
        if not off <= bound:  # not so for NaN either
            return f"{what} is {off:.1e} of the largest value from float64; at most {bound:.0e} is right", True
    return "", True


def distance(found: Tensor, truth: Tensor) -> float:
    """The largest error, as a part of the largest true value."""
    found, truth = found.detach().double(), truth.detach().double()
    return float((found - truth).abs().max() / truth.abs().max().clamp_min(1e-30))


def _decoded(module: Any, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """The last token's output, after all others."""
    if module.has_state:
        before, last = [x[..., :-1, :] for x in inputs], [x[..., -1:, :] for x in inputs]
        with autocast(inputs[0].device, dtype):
            _, state = module(*before, return_state=True)
            out: Tensor = module(*last, state=state)
        return out
    first, *rest = inputs
    return module_call(module, [first[..., -1:, :], *rest] if rest else inputs, dtype)[..., -1:, :]


def random_inputs(
    shape: MixerShape, mixer: bool, length: int, dtype: torch.dtype, device: torch.device, batch_size: int = 2
) -> list[Tensor]:
    """q, k and v [B, H or G, N, D], or a mixer's hidden states [B, N, C]."""
    if mixer:
        return [torch.randn(batch_size, length, shape.dim, device=device).to(dtype)]
    heads = (shape.num_heads, shape.num_kv_heads, shape.num_kv_heads)
    return [torch.randn(batch_size, h, length, shape.head_dim, device=device).to(dtype) for h in heads]


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Mixed precision for 16 bits, nothing for 32."""
    half = dtype != torch.float32
    return torch.autocast(device.type, dtype if half else None, enabled=half)


def module_call(module: nn.Module, inputs: list[Tensor], dtype: torch.dtype) -> Tensor:
    """A forward pass in the precision that is profiled."""
    with autocast(inputs[0].device, dtype):
        out: Tensor = module(*inputs)
    return out
