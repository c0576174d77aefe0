"""Products of bfloat16 weights and activations computed in float32, for training on CPUs where that is faster.

Most x86 processors have no bfloat16 units, or slow ones: on an Intel Xeon (Sapphire Rapids) whose AMX a virtual machine
does not offer, matrix products reach 82 GFLOP/s per thread in bfloat16 and 146 in float32. Converting a weight
costs little beside that, so frozen layers convert theirs block by block, in both directions of a training step, and
nothing of it is kept. Sums are more exact than in bfloat16, which rounds every result too.

Only where gradients are enabled: the pixels of pictures do not depend on it. Decided by the processor's flags and not
by timing, so that a resumed run computes the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

BLOCK = 2**21  # numbers of a weight converted at once: 8 MiB in float32

FEW_ROWS = 32  # with fewer rows, reading the weights takes most of the time, and bfloat16 is faster
SMALL_MAP = 64  # up to so many positions, 3x3 convolutions are faster as products of matrices


@cache
def float32_is_faster() -> bool:
    """Whether this CPU multiplies float32 faster than bfloat16: x86 with neither AMX nor AMD's AVX512-BF16."""
    try:
        return slow_bfloat16(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="replace"))
    except OSError:
        return False


def slow_bfloat16(cpuinfo: str) -> bool:
    """The same for the text of /proc/cpuinfo; False for processors other than x86."""
    lines = (line.partition(":") for line in cpuinfo.splitlines())
    facts = {name.strip(): value.split() for name, _, value in lines}
    flags = facts.get("flags", [])  # ARM calls them Features
    amd = facts.get("vendor_id") == ["AuthenticAMD"]
    return bool(flags) and "amx_bf16" not in flags and not (amd and "avx512_bf16" in flags)


def applies_to(x: Tensor) -> bool:
    """Whether products of `x` are to be computed in float32."""
    return x.device.type == "cpu" and x.dtype == torch.bfloat16 and torch.is_grad_enabled() and float32_is_faster()


class Scratch:
    """Memory in which parts of weights are converted, one after the other.

    New memory is mapped page by page when it is written first, which takes longer than to convert the numbers.
    """

    def __init__(self) -> None:
        self._buffer = torch.empty(0)

    def exact(self, part: Tensor) -> Tensor:
        """`part` of a weight in float32, valid until the next call."""
        if self._buffer.numel() < part.numel():
            self._buffer = torch.empty(part.numel())
        memory = self._buffer[: part.numel()]
        if part.ndim == 4:  # in channels-last, as the weights of convolutions are
            count, channels, height, width = part.shape
            return memory.view(count, height, width, channels).permute(0, 3, 1, 2).copy_(part)
        return memory.view(part.shape).copy_(part)


def enable(network: nn.Module) -> Callable[[], None]:
    """Compute the frozen linear layers and convolutions of `network` so where it is faster; returns the reverse.

    The forward method of each layer is replaced, so names and weights stay as they are.
    """
    scratch = Scratch()  # one network is evaluated by one thread at a time
    layers = [each for each in network.modules() if type(each) in _FORWARD and "forward" not in vars(each)]
    for layer in layers:
        layer.forward = _chosen(layer, layer.forward, _FORWARD[type(layer)], scratch)

    def disable() -> None:
        for layer in layers:
            vars(layer).pop("forward", None)

    return disable


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(q k^T / sqrt(d)) v for bfloat16 tensors (B, heads, N or M, d), computed in float32."""
    return _Attention.apply(q, k, v)


def _chosen(
    layer: nn.Module, forward: Callable[..., Tensor], fast: Callable[[Any, Tensor, Scratch], Tensor], scratch: Scratch
) -> Any:
    def run(x: Tensor) -> Tensor:
        weight: Any = layer.weight
        if not applies_to(x) or weight.dtype != x.dtype or weight.requires_grad:
            return forward(x)
        return fast(layer, x, scratch)

    return run


def _linear(layer: nn.Linear, x: Tensor, scratch: Scratch) -> Tensor:
    return _Linear.apply(x, layer.weight, layer.bias, scratch)


def _convolution(layer: nn.Conv2d, x: Tensor, scratch: Scratch) -> Tensor:
    simple = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
    one, three = layer.kernel_size == (1, 1), layer.kernel_size == (3, 3)
    if simple and layer.stride == (1, 1) and one and layer.padding == (0, 0):
        rows = x.permute(0, 2, 3, 1)  # B H W C
        return _Linear.apply(rows, layer.weight.flatten(1), layer.bias, scratch).permute(0, 3, 1, 2)
    positions = len(x) * x.shape[2] * x.shape[3]
    if simple and layer.stride == (1, 1) and three and layer.padding == (1, 1) and positions <= SMALL_MAP:
        return _Small.apply(x, layer.weight, layer.bias, scratch)
    options = [list(each) for each in (layer.stride, layer.padding, layer.dilation)]
    if layer.padding_mode != "zeros" or isinstance(layer.padding, str):
        return nn.Conv2d.forward(layer, x)
    return _Convolution.apply(x, layer.weight, layer.bias, options, layer.groups, scratch)


_FORWARD: dict[type[nn.Module], Callable[[Any, Tensor, Scratch], Tensor]] = {
    nn.Linear: _linear,
    nn.Conv2d: _convolution,
}


def _product(x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch) -> Tensor:
    """x (rows, in) times weight (out, in) transposed, plus bias (out,): bfloat16 (rows, out)."""
    if len(x) < FEW_ROWS:
        out = (weight @ x.to(weight.dtype).T).T.contiguous()  # this way round, the weight need not be rearranged
        return out if bias is None else out.add_(bias)
    x, offset = x.float(), None if bias is None else bias.float()

    def product(block: slice) -> Tensor:
        part = scratch.exact(weight[block]).T
        return (x @ part if offset is None else torch.addmm(offset[block], x, part)).to(weight.dtype)

    return _joined([product(block) for block in _blocks(*weight.shape)])


def _back_product(gradient: Tensor, weight: Tensor, scratch: Scratch) -> Tensor:
    """gradient (rows, out) times weight (out, in): bfloat16 (rows, in)."""
    if len(gradient) < FEW_ROWS:
        return gradient @ weight
    rows, (outputs, inputs) = gradient.float(), weight.shape
    if inputs > outputs:  # blocks of columns: the larger result is written once
        blocks = _blocks(inputs, outputs)
        return _joined([(rows @ scratch.exact(weight[:, block])).to(weight.dtype) for block in blocks])
    first, *others = _blocks(outputs, inputs)
    total = rows[:, first] @ scratch.exact(weight[first])
    for block in others:
        total.addmm_(rows[:, block], scratch.exact(weight[block]))
    return total.to(weight.dtype)


def _joined(columns: list[Tensor]) -> Tensor:
    return columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)


def _blocks(count: int, width: int) -> list[slice]:
    """Consecutive slices of `count` rows of `width` numbers, at most about BLOCK numbers each, alike in size.

    Their bounds are multiples of 16, the channels that a processor computes at once.
    """
    parts = math.ceil(count * width / BLOCK)
    step = 16 * math.ceil(count / parts / 16)
    return [slice(first, min(first + step, count)) for first in range(0, count, step)]


class _Linear(torch.autograd.Function):
    """x (..., in) -> (..., out) for a weight (out, in) without a gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scratch = scratch
        return _product(x.reshape(-1, x.shape[-1]), weight, bias, scratch).view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        rows = _back_product(gradient.reshape(-1, gradient.shape[-1]), weight, ctx.scratch)
        return rows.view(*gradient.shape[:-1], weight.shape[1]), None, None, None


class _Small(torch.autograd.Function):
    """A 3x3 convolution of stride 1 and padding 1 on a small map: a product with the 3x3 neighbourhoods."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, scratch: Scratch
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scratch = scratch
        padded = F.pad(x.permute(0, 2, 3, 1), (0, 0, 1, 1, 1, 1))  # B H+2 W+2 C
        places = padded.unfold(1, 3, 1).unfold(2, 3, 1).permute(0, 1, 2, 4, 5, 3)  # B H W 3 3 C
        rows = _product(places.reshape(-1, 9 * x.shape[1]), _as_rows(weight), bias, scratch)
        return rows.reshape(len(x), *x.shape[2:], -1).permute(0, 3, 1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (weight,) = ctx.saved_tensors
        count, outputs, height, width = gradient.shape
        rows = gradient.permute(0, 2, 3, 1).reshape(-1, outputs)
        places = _back_product(rows, _as_rows(weight), ctx.scratch).reshape(count, height, width, 3, 3, -1)
        padded = torch.zeros(count, height + 2, width + 2, weight.shape[1])
        for row, column in product(range(3), range(3)):
            padded[:, row : row + height, column : column + width] += places[:, :, :, row, column]
        return padded[:, 1:-1, 1:-1].to(weight.dtype).permute(0, 3, 1, 2), None, None, None


def _as_rows(weight: Tensor) -> Tensor:
    """(out, in, 3, 3) -> (out, 9 in), the order of neighbourhoods; no copy of a weight in channels-last."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


class _Convolution(torch.autograd.Function):
    """Any convolution whose weight has no gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        options: list[list[int]],
        groups: int,
        scratch: Scratch,
    ) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.scratch = scratch
        ctx.shape, ctx.options, ctx.groups = x.shape, options, groups
        return _convolved(x, weight, bias, options, groups, scratch)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        (weight,), gradient = ctx.saved_tensors, gradient.float()

        def product(block: slice) -> Tensor:
            part = ctx.scratch.exact(weight[:, block])
            # The input's values do not matter for its own gradient.
            x = gradient.new_empty(1).expand(ctx.shape[0], part.shape[1] * ctx.groups, *ctx.shape[2:])
            result, *_ = torch.ops.aten.convolution_backward(
                gradient, x, part, None, *ctx.options, False, [0, 0], ctx.groups, [True, False, False]
            )
            return result.to(weight.dtype)

        joined = _joined([product(block) for block in _channels(weight.transpose(0, 1), ctx.groups)])
        return joined, None, None, None, None, None


def _convolved(
    x: Tensor, weight: Tensor, bias: Tensor | None, options: list[list[int]], groups: int, scratch: Scratch
) -> Tensor:
    """The convolution in bfloat16, computed in float32."""
    x, offset = x.float(), None if bias is None else bias.float()

    def product(block: slice) -> Tensor:
        part = None if offset is None else offset[block]
        return F.conv2d(x, scratch.exact(weight[block]), part, *options, groups).to(weight.dtype)  # type: ignore[arg-type]

    return _joined([product(block) for block in _channels(weight, groups)])


def _channels(weight: Tensor, groups: int) -> list[slice]:
    """Blocks of the channels that are the first dimension of `weight`; all of them if there are groups."""
    count = len(weight)
    return [slice(0, count)] if groups > 1 else _blocks(count, weight[0].numel())


class _Attention(torch.autograd.Function):
    """torch's fused kernel, which keeps no scores; what is kept for the gradients is bfloat16."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # type: ignore[override]
        exact, sums = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(_rows(q), _rows(k), _rows(v))
        out = exact.to(q.dtype)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:  # type: ignore[override]
        q, k, v, out, sums = ctx.saved_tensors
        results = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            _rows(gradient), _rows(q), _rows(k), _rows(v), _rows(out), sums, 0.0, False
        )
        return tuple(each.to(q.dtype) for each in results)


def _rows(x: Tensor) -> Tensor:
    """In float32, the numbers of each row side by side: the fused kernel reads wrong memory otherwise."""
    return x.float() if x.stride(-1) == 1 else x.float().contiguous()
