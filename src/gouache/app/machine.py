"""What this machine computes best in, measured once and remembered."""

from __future__ import annotations

import platform

import torch

from gouache.app.cache import read_cache, write_cache
from gouache.app.settings import Settings
from gouache.model import residency

NARROW = 128
"""Below so many channels a CPU spends its time between the products, where bfloat16 is slower than float32."""


def best_dtype(device: torch.device, channels: int, settings: Settings) -> torch.dtype:
    """The dtype to load a U-Net of `channels` at its first level in, on `device`."""
    if device.type == "cpu" and channels < NARROW:
        return torch.float32
    return residency.choose(timings(device, settings))


def timings(device: torch.device, settings: Settings) -> dict[str, float]:
    """Seconds by dtype, from the cache where this machine, device, torch and thread count were measured before."""
    what = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    key = f"{device.type} {what} torch {torch.__version__} threads {torch.get_num_threads()}"
    store = settings.cache / "timings.json"
    known = read_cache(store)
    times = known.get(key)
    if isinstance(times, dict) and times and all(isinstance(value, float) for value in times.values()):
        return times
    measured = residency.measure(device)
    write_cache(store, {**known, key: measured})
    return measured
