"""Where a model lives and in which numbers: device names checked, dtypes chosen by measuring, not by a list.

A CPU's bfloat16 can be twice as fast as its float32, or ten times slower; the same holds for a GPU's float16. So the
choice is timed, on a part of a U-Net.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch

from gouache.errors import DeviceError, RequestError
from gouache.nn.attention import SpatialTransformer
from gouache.nn.blocks import ResBlock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONG_NAMES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}

CHANNELS = 320  # of the first level of every released U-Net


def device(name: str | None) -> torch.device:
    """The device called `name`; None takes the best there is. Raises DeviceError where it is absent."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise RequestError("device", f"{name!r} is not a device; use cpu, cuda, cuda:1 or mps") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {name}: this torch ({torch.__version__}) sees no CUDA device; use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices, counted from 0")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps: this machine or this torch has none; use --device cpu")
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise RequestError("device", f"{name!r} is not supported; use cpu, cuda or mps")
    return wanted


def dtype(name: str) -> torch.dtype:
    """fp32, bf16 or fp16, or their long names."""
    short = LONG_NAMES.get(name, name)
    if short not in DTYPES:
        raise RequestError("dtype", f"{name!r} is not known; use {', '.join(DTYPES)}")
    return DTYPES[short]


def dtype_name(dtype: torch.dtype) -> str:
    """The short name, as the command line and the recipes of pictures say it."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def measure(on: torch.device) -> dict[str, float]:
    """Seconds that a part of a released U-Net takes for two images, by dtype name; about a second of work.

    One residual block and one transformer at 32x32, with weights that are all alike: only their time matters.
    """
    times: dict[str, float] = {}
    with torch.device("meta"):
        parts = ResBlock(CHANNELS, 4 * CHANNELS, CHANNELS), SpatialTransformer(CHANNELS, 768, 8, 1, linear=False)
    for name, kind in DTYPES.items():
        if on.type == "cpu" and kind == torch.float16:
            continue  # no CPU computes in it; it would only cost time to find out
        try:
            block, transformer = (part.to_empty(device=on).to(kind) for part in parts)
            for weight in (*block.parameters(), *transformer.parameters()):
                weight.detach().fill_(0.01)
            x, emb, context = (
                torch.ones(shape, dtype=kind, device=on)
                for shape in ((2, CHANNELS, 32, 32), (2, 4 * CHANNELS), (2, 77, 768))
            )
            best = float("inf")
            for _ in range(4):
                began = time.perf_counter()
                with torch.inference_mode():
                    transformer(block(x, emb), context).sum().item()  # a GPU has to be waited for
                best = min(best, time.perf_counter() - began)
            times[name] = best
        except RuntimeError:  # a dtype that this device does not have
            continue
    return times


def choose(times: Mapping[str, float]) -> torch.dtype:
    """The fastest dtype measured; float32 unless another saves a fifth of its time."""
    fastest = min(times, key=lambda name: times[name])
    worth = "fp32" not in times or times[fastest] < 0.8 * times["fp32"]
    return DTYPES[fastest if worth else "fp32"]
