"""The device and dtype of a model: checks device names, and chooses a dtype by measuring.

On one CPU bfloat16 is twice as fast as float32, on another, which emulates it, ten times slower; the same holds for
float16 on GPUs. Therefore the dtypes are timed, on a part of a U-Net.
"""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch

from gouache.errors import DeviceError, RequestError
from gouache.nn.attention import SpatialTransformer
from gouache.nn.blocks import ResBlock

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
LONG_NAMES = {"float32": "fp32", "float": "fp32", "bfloat16": "bf16", "float16": "fp16", "half": "fp16"}

CHANNELS = 320  # of the first level of every released U-Net

TIME_LIMIT = 1.5
"""Seconds after which no further round of a measurement begins."""
MAX_ROUNDS = 20
MIN_ROUNDS = 3
"""With fewer rounds the best one may still be disturbed."""
MAX_SPREAD = 1.3
"""A quiet machine repeats a round within some percent; where the median round takes this many times as long as the
best one, other programs ran meanwhile."""


def device(name: str | None) -> torch.device:
    """The device called `name`; None chooses cuda, else mps, else cpu. Raises DeviceError where it does not exist."""
    if name is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(name)
    except RuntimeError:
        raise RequestError("device", f"{name!r} is not a device; use cpu, cuda, cuda:1 or mps") from None
    if wanted.type == "cuda" and not torch.cuda.is_available():
        raise DeviceError(f"device {name}: this torch ({torch.__version__}) finds no CUDA device; use --device cpu")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise DeviceError(f"device {name}: there are {torch.cuda.device_count()} CUDA devices, numbered from 0")
    if wanted.type == "mps" and not torch.backends.mps.is_available():
        raise DeviceError("device mps: not available on this machine or in this torch; use --device cpu")
    if wanted.type not in ("cpu", "cuda", "mps"):
        raise RequestError("device", f"{name!r} is not supported; use cpu, cuda or mps")
    return wanted


def dtype(name: str) -> torch.dtype:
    """The dtype called fp32, bf16 or fp16, or by its long name. Raises RequestError for another name."""
    short = LONG_NAMES.get(name, name)
    if short not in DTYPES:
        raise RequestError("dtype", f"{name!r} is not known; use {', '.join(DTYPES)}")
    return DTYPES[short]


def dtype_name(dtype: torch.dtype) -> str:
    """The short name, as used on the command line and in the recipes of pictures."""
    return next(name for name, value in DTYPES.items() if value == dtype)


def native_dtypes(on: torch.device) -> tuple[str, ...]:
    """The 16-bit dtypes, by name, that `on` has arithmetic units for; empty where it has none or torch cannot tell.

    On x86 these are AVX512-BF16 and AMX-BF16, on ARM the bf16 extension; on CUDA compute capability 8.0 or higher.
    """
    if on.type == "cuda":
        return ("bf16", "fp16") if torch.cuda.get_device_capability(on) >= (8, 0) else ()
    return ("bf16",) if on.type == "cpu" and bf16_units() else ()


def bf16_units() -> tuple[str, ...]:
    """The bf16 units of the CPU, as torch names them: amx_bf16 or amx_tile, avx512_bf16; on ARM bf16, sve_bf16.

    torch has no public function for them, and its private ones differ by version: 2.6 to 2.13 are covered.
    """
    try:
        if (capabilities := getattr(torch.cpu, "get_capabilities", None)) is not None:  # newer versions of torch
            found = capabilities()
            return tuple(name for name in ("amx_bf16", "avx512_bf16", "bf16", "sve_bf16") if found.get(name, False))
        if platform.machine().lower() in ("arm64", "aarch64"):
            # On x86 this operator also returns True for AVX512 without bf16 units, which emulates bf16.
            return ("bf16",) if torch.ops.mkldnn._is_mkldnn_bf16_supported() else ()
        checks = {name: getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("amx_tile", "avx512_bf16")}
        return tuple(name for name, check in checks.items() if check is not None and check())
    except (AttributeError, RuntimeError):
        return ()


@dataclass(frozen=True)
class Timings:
    """Best time in seconds by dtype name, over `rounds` rounds. `spread` >= 1: see MAX_SPREAD; the largest of all."""

    seconds: Mapping[str, float]
    rounds: int
    spread: float

    @property
    def noisy(self) -> bool:
        return self.rounds < MIN_ROUNDS or self.spread > MAX_SPREAD


def measure(on: torch.device, limit: float = TIME_LIMIT) -> Timings:
    """Time a part of a released U-Net in every dtype that `on` can compute in. Takes about `limit` seconds.

    One residual block and one transformer at 32x32, on one image; on a GPU on two, since starting its kernels would
    take most of the time otherwise. All weights are alike, because only the time matters. A CPU computes it in one
    thread: on a busy machine several wait for each other at every operation, and their times are unreliable.
    """
    runs: dict[str, Callable[[], None]] = {}
    for name, value in DTYPES.items():
        if on.type == "cpu" and value == torch.float16:
            continue  # no CPU computes in it at a useful speed, and timing that takes long
        with torch.device("meta"):  # a pair per dtype, because to_empty() and to() change a module in place
            parts = ResBlock(CHANNELS, 4 * CHANNELS, CHANNELS), SpatialTransformer(CHANNELS, 768, 8, 1, linear=False)
        try:
            block, transformer = (part.to(value).to_empty(device=on) for part in parts)
            for weight in (*block.parameters(), *transformer.parameters()):
                weight.detach().fill_(0.01)
            runs[name] = _run(block, transformer, on, value)
        except RuntimeError:  # a dtype that this device does not have
            continue
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        return time_interleaved(runs, limit=limit)
    finally:
        torch.set_num_threads(threads)


def _run(
    block: torch.nn.Module, transformer: torch.nn.Module, on: torch.device, dtype: torch.dtype
) -> Callable[[], None]:
    images = 1 if on.type == "cpu" else 2
    x, emb, context = (
        torch.ones(images, *shape, dtype=dtype, device=on) for shape in ((CHANNELS, 32, 32), (4 * CHANNELS,), (77, 768))
    )

    def run() -> None:
        with torch.inference_mode():
            transformer(block(x, emb), context).sum().item()  # .item() waits for the GPU

    return run


def time_interleaved(
    runs: Mapping[str, Callable[[], None]],
    clock: Callable[[], float] = time.perf_counter,
    limit: float = TIME_LIMIT,
) -> Timings:
    """Time each of `runs` once per round, round after round, until `limit` seconds have passed or MAX_ROUNDS are done.

    Interleaved, because then a load that comes or goes affects all of them. The first round warms up (memory, kernels)
    and counts only where there is time for no other. What then takes more than four times as long as the fastest, as an
    emulated dtype does, is not timed again. What raises RuntimeError is left out.
    """
    begin = clock()
    first: dict[str, float] = {}
    for name, run in runs.items():
        before = clock()
        try:
            run()
        except RuntimeError:  # the device has the dtype, but not every operation in it
            continue
        first[name] = clock() - before
    times: dict[str, list[float]] = {name: [] for name in first}
    rounds = 0
    while rounds < MAX_ROUNDS and clock() - begin < limit:
        fastest = min((min(each) for each in times.values() if each), default=float("inf"))
        for name, each in times.items():
            if each and min(each) > 4 * fastest:
                continue
            before = clock()
            runs[name]()
            each.append(clock() - before)
        rounds += 1
    if not rounds:
        return Timings(first, 1, 1.0)
    spread = max(statistics.median(each) / max(min(each), 1e-9) for each in times.values())
    return Timings({name: min(each) for name, each in times.items()}, rounds, spread)


@dataclass(frozen=True)
class Choice:
    dtype: torch.dtype
    reason: str


def choose(seconds: Mapping[str, float], native: Collection[str] = (), busy: bool = False) -> Choice:
    """The dtype to compute in, from the `seconds` that each takes and those that the device has units for.

    A 16-bit dtype that takes less than 0.8 of float32's time. In doubt, what the device has units for: where it saves
    less than a fifth, or the machine was `busy`. Even then it must not take more than 1.25 of float32's time: some
    processors have bf16 units that are slower than their float32 ones (AVX512-BF16 without AMX). Times from a `busy`
    machine without units for the dtype need 0.5 instead of 0.8.
    """
    others = [name for name in seconds if name != "fp32"]
    if not others:
        return Choice(torch.float32, "the only dtype measured")
    fastest = min(others, key=lambda name: seconds[name])
    if "fp32" not in seconds:
        return Choice(DTYPES[fastest], "the fastest measured")
    share = {name: seconds[name] / seconds["fp32"] for name in others}
    built = min((name for name in others if name in native), key=lambda name: seconds[name], default=None)
    if busy and built is not None:
        if share[built] <= 1.25:
            return Choice(DTYPES[built], f"the device has units for {built}")
        return Choice(torch.float32, f"the fastest measured, although the device has units for {built}")
    if share[fastest] < (0.5 if busy else 0.8):
        return Choice(DTYPES[fastest], "the fastest measured")
    if built is not None and share[built] <= 1:
        return Choice(DTYPES[built], f"not slower than fp32, and the device has units for {built}")
    if share[fastest] < 1:
        return Choice(torch.float32, f"{fastest} saves too little time for its lower precision")
    return Choice(torch.float32, "the fastest measured")


def total_memory(device: torch.device) -> int | None:
    """Bytes of the device's memory; None where the system does not say (Windows)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[1]
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):
        return None
