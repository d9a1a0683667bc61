"""The causal sum by flash-linear-attention's Triton kernels, on CUDA, where they are installed (`hhbench[gpu]`).

Theirs is the sum without a normaliser; a column of ones beside the values is ours. They store what they add up in the
type of their inputs, so they get float32, which Triton multiplies in TF32: in bfloat16 the last outputs of a long
sequence would be off by three roundings. Autograd keeps the features for their backward pass.

**Not run on a GPU yet**, so they are believed only after they have agreed with the quadratic form on this GPU: once
for each shape of the features. HHBENCH_FLA=0 leaves them out.
"""

import functools
import importlib.util
import logging
import os

import torch
from torch import Tensor
from torch.nn.functional import pad

from hhbench.errors import in_one_line
from hhbench.kernels import trial
from hhbench.linear_sum import Keys, Sums, divide, empty_sums, quadratic

log = logging.getLogger("hhbench")

ASKED = "HHBENCH_FLA"
NAME = "flash-linear-attention"
_WIDTH = 16  # columns of the values come in multiples of it, as their tiles do
_agreed: dict[tuple[torch.device, int, int], bool] = {}
_TRIED = 1024  # tokens, of eight heads
_AGREEMENT = 0.005  # of the largest value: above the rounding of TF32, far below any mistake


def wanted(q: Tensor) -> bool:
    """Whether these queries are for the kernels: of 16 bits, on a GPU that has TF32, which keeps what they hold."""
    if not q.is_cuda or q.dtype not in (torch.bfloat16, torch.float16) or os.environ.get(ASKED) == "0":
        return False
    return installed() and torch.cuda.get_device_capability(q.device) >= (8, 0)


@functools.cache
def installed() -> bool:
    return importlib.util.find_spec("fla") is not None


def agrees(device: torch.device, feature_dim: int, value_dim: int) -> bool:
    """Whether they give the sum, its state and its gradients here. A warning says it where they don't, or fail."""
    place = device, feature_dim, value_dim
    if place not in _agreed:
        try:
            _agreed[place] = _try(*place)
        except torch.OutOfMemoryError:  # there may be room another time
            return False
    return _agreed[place]


def _try(device: torch.device, feature_dim: int, value_dim: int) -> bool:
    """See `agrees`.

    In two pieces of a sequence, with padded keys; of a size at which it matters how they are tiled, as Triton tries
    that out now.
    """
    log.info("trying %s's kernels for features of %d, which may take some minutes once", NAME, feature_dim)
    generator = torch.Generator().manual_seed(0)
    try:
        with trial():
            q, k, v, cotangent = (
                torch.randn(1, 8, _TRIED, width, generator=generator, device="cpu").to(device)
                for width in (feature_dim, feature_dim, value_dim, value_dim)
            )
            k[:, :, ::7], v[:, :, ::7] = 0.0, 0.0
            given = [x.requires_grad_() for x in (q.abs(), k.abs(), v)]
            first, second = (slice(0, _TRIED // 3), slice(_TRIED // 3, None))
            (q1, k1, v1), (q2, k2, v2) = ([x[:, :, piece] for x in given] for piece in (first, second))
            early, state = causal(q1, k1, v1, None, need_sums=True)
            late, state = causal(q2, k2, v2, state, need_sums=True)
            assert state is not None
            exact = [x.detach().double().requires_grad_() for x in given]
            keys = Keys(exact[1], exact[2], None)
            truth, end = quadratic(exact[0], keys, causal=True), empty_sums(keys).add(keys)
            out = torch.cat([early, late], 2)
            found = [out, state.values, state.keys, *torch.autograd.grad(out, given, cotangent)]
            expected = [truth, end.values, end.keys, *torch.autograd.grad(truth, exact, cotangent.double())]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever another library's kernels do on a GPU that they weren't tried on
        problem = f"fail here ({in_one_line(error)})"
    else:
        pairs = [(x.detach().double(), y.detach()) for x, y in zip(found, expected, strict=True)]
        off = max(float((x - y).abs().max() / y.abs().max()) for x, y in pairs)
        if off <= _AGREEMENT:
            return True
        problem = f"differ from the definition by {off:.2g} of the largest value"
    log.warning("%s's kernels %s and are not used; %s=0 doesn't try them", NAME, problem, ASKED)
    return False


def causal(
    queries: Tensor, keys: Tensor, values: Tensor, sums: Sums | None, *, need_sums: bool
) -> tuple[Tensor, Sums | None]:
    """The output [B, H, N, E], and the sums after the last token if they are needed.

    Args:
        queries, keys: features [B, H, N, F], of keys without log scales; padded keys are 0.
        values: [B, H, N, E]. All three float32.
        sums: those before the first token, or None.
    """
    from fla.ops.simple_gla import chunk_simple_gla

    (B, H, N, F), E = queries.shape, values.shape[3]
    surplus = -(E + 1) % _WIDTH
    start = None
    if sums is not None:
        both = torch.cat([sums.values, sums.keys[..., None]], -1)
        start = pad(both, (0, surplus)).reshape(B * H, 1, F, E + 1 + surplus)
    # Their layout is [B, N, H, .]: each head as a row of its own needs no copy.
    rows = [x.reshape(B * H, N, 1, -1) for x in (queries, keys, pad(pad(values, (0, 1), value=1.0), (0, surplus)))]
    u, end = chunk_simple_gla(*rows, scale=1.0, initial_state=start, output_final_state=need_sums)
    u = u.view(B, H, N, -1)
    out = divide(u[..., :E], u[..., E])
    if not need_sums:
        return out, None
    end = end.view(B, H, F, -1)
    log_max = values.new_zeros(B, H, dtype=end.dtype) if sums is None else sums.log_max
    return out, Sums(end[..., :E], end[..., E], log_max)
