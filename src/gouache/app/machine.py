"""The fastest dtype of this machine: measured, stored in the cache folder, and measured again when in doubt."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from gouache.app.cache import read_cache, write_cache
from gouache.app.settings import Settings
from gouache.model import residency
from gouache.model.residency import Choice, Timings

NARROW = 128
"""With fewer channels than this a CPU spends most time outside of matrix products, where bfloat16 is slower."""
MAX_LOAD = 0.75
"""Running processes per core up to which the machine counts as quiet."""
MAX_MEASUREMENTS = 5
"""A machine that is never quiet is not measured at every start."""


@dataclass(frozen=True)
class Measurement:
    """`load`: the load average of the last minute per core, before the measurement; None where there is none.

    `count`: how often this device has been measured until now.
    """

    timings: Timings
    load: float | None
    count: int = 1

    @property
    def busy(self) -> bool:
        """Whether other programs may have changed the result."""
        return self.timings.noisy or (self.load is not None and self.load > MAX_LOAD)


def best_dtype(device: torch.device, channels: int, settings: Settings) -> torch.dtype:
    """The dtype for a U-Net whose first level has `channels`, on `device`."""
    if device.type == "cpu" and channels < NARROW:
        return torch.float32
    return choose(device, measurement(device, settings)).dtype


def choose(device: torch.device, measured: Measurement) -> Choice:
    return residency.choose(measured.timings.seconds, residency.native_dtypes(device), measured.busy)


def measurement(device: torch.device, settings: Settings, again: bool = False) -> Measurement:
    """The stored measurement of this processor or GPU with this version of torch; else, or if `again`, a new one.

    One that was made on a busy machine is repeated when the machine is quieter; of the two the better is kept. At most
    MAX_MEASUREMENTS are made unless `again`. Entries of an earlier version of Gouache are replaced.
    """
    store, key = settings.cache / "timings.json", _key(device)
    stored = None if again else _from_json(read_cache(store).get(key))
    load = load_per_core() if device.type == "cpu" else None  # of a GPU only the spread of the rounds shows it
    if stored is not None and not _worth_repeating(stored, load):
        return stored
    new = Measurement(residency.measure(device), load)
    if stored is not None:
        new = replace(min(new, stored, key=_disturbance), count=stored.count + 1)
    write_cache(store, {**read_cache(store), key: _to_json(new)})
    return new


def _key(device: torch.device) -> str:
    """The hardware and the version of torch.

    The bf16 units are part of it: on Linux `platform.processor` is often empty, and a home folder may be shared.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = " ".join((platform.processor() or platform.machine(), *residency.bf16_units()))
    return f"{device.type} {name} torch {torch.__version__}"


def load_per_core() -> float | None:
    """Running processes per core, averaged over the last minute; None on systems that do not count them (Windows)."""
    try:
        return os.getloadavg()[0] / (os.cpu_count() or 1)
    except (AttributeError, OSError):
        return None


def _worth_repeating(stored: Measurement, load: float | None) -> bool:
    if not stored.busy or stored.count >= MAX_MEASUREMENTS:
        return False
    if load is None or stored.load is None:
        return True
    return load <= max(MAX_LOAD, stored.load / 2)


def _disturbance(measured: Measurement) -> tuple[bool, bool, float, float]:
    """Lower is better. The spread of few rounds means nothing."""
    timings = measured.timings
    return measured.busy, timings.rounds < residency.MIN_ROUNDS, measured.load or 0.0, timings.spread


def _to_json(measured: Measurement) -> dict[str, Any]:
    return {**asdict(measured.timings), "load": measured.load, "count": measured.count}


def _from_json(value: object) -> Measurement | None:
    """None for what is damaged or in the form of an earlier version, which stored the seconds alone."""
    if not isinstance(value, Mapping):
        return None
    seconds, load = value.get("seconds"), value.get("load")
    rounds, spread, count = (value.get(name) for name in ("rounds", "spread", "count"))
    if not isinstance(seconds, Mapping) or not seconds or not all(_is_time(each) for each in seconds.values()):
        return None
    if not set(seconds) <= set(residency.DTYPES) or not isinstance(rounds, int) or not isinstance(count, int):
        return None
    if not isinstance(spread, int | float) or not isinstance(load, int | float | None):
        return None
    return Measurement(Timings(dict(seconds), rounds, spread), load, count)


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and value > 0
