"""A report on this machine: versions, devices, dtypes, memory, model folders, the time of one step."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import replace

import torch

from gouache.app import machine, names, search_paths
from gouache.app.settings import Settings
from gouache.errors import GouacheError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.model import load, residency
from gouache.version import __version__
from gouache.wording import plural


def examine(settings: Settings, measure: bool = False) -> dict[str, list[str]]:
    """The report: topic -> lines. `measure` times the dtypes again, even if a measurement is stored."""
    return {
        "gouache": [f"{__version__} on Python {platform.python_version()}, {platform.platform()}"],
        "torch": [f"{torch.__version__}, {plural(torch.get_num_threads(), 'thread')}"],
        "devices": list(_devices(settings)),
        "dtypes": list(_dtypes(settings, measure)),
        "memory": list(_memory()),
        "disk": [*_disk()],
        "models": list(_models(settings)),
        "step": list(_step(settings)),
    }


def _devices(settings: Settings) -> Iterator[str]:
    yield f"cpu ({platform.processor() or platform.machine()}, {plural(os.cpu_count() or 1, 'core')})"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} ({properties.name}, {properties.total_memory / 1e9:.0f} GB)"
    if torch.backends.mps.is_available():
        yield "mps"
    yield f"{residency.device(settings.device)} is used by default"


def _dtypes(settings: Settings, again: bool) -> Iterator[str]:
    """Which dtype is used and why, the times behind the choice, and how far they can be trusted."""
    device = residency.device(settings.device)
    measured = machine.measurement(device, settings, again)
    choice = machine.choose(device, measured)
    if settings.dtype is not None:
        chosen = residency.dtype_name(residency.dtype(settings.dtype))
        yield f"{chosen} on {device}, as set by GOUACHE_DTYPE or config.toml"
        yield f"without that setting: {residency.dtype_name(choice.dtype)}, {choice.reason}"
    else:
        yield f"{residency.dtype_name(choice.dtype)} on {device}: {choice.reason}"
        if device.type == "cpu":
            yield "fp32 for models narrower than the released ones, such as mini"
    timings = measured.timings
    times = ", ".join(f"{name} {_milliseconds(seconds)}" for name, seconds in timings.seconds.items())
    load = "" if measured.load is None else f" (load {measured.load:.1f} per core)"
    state = "busy" if measured.busy else "quiet"
    yield f"measured: {times}; best of {plural(timings.rounds, 'round')}, on a {state} machine{load}"
    if measured.busy:
        yield "times from a busy machine are uncertain; to measure again: gouache doctor --measure"


def _milliseconds(seconds: float) -> str:
    return f"{seconds * 1e3:.0f} ms" if seconds >= 0.01 else f"{seconds * 1e3:.2g} ms"


def _memory() -> Iterator[str]:
    total = residency.total_memory(torch.device("cpu"))
    yield "unknown on this system" if total is None else f"{total / 1e9:.1f} GB"


def _disk() -> Iterator[str]:
    try:
        yield f"{shutil.disk_usage('.').free / 1e9:.0f} GB free in the current folder"
    except OSError as error:  # a working folder that was deleted
        yield f"unknown: {error.strerror}"


def _models(settings: Settings) -> Iterator[str]:
    for root in settings.models:
        alone = replace(settings, models=(root,), hub=None)
        count = sum(1 for _ in search_paths.candidates(alone))
        exists = count or root.is_dir()
        yield f"{printable(str(root))}: {plural(count, 'model') if exists else 'does not exist yet'}"
    if settings.hub is not None and settings.hub.is_dir():
        yield f"{settings.hub}: {plural(len(list(search_paths.hub_candidates(settings))), 'model')}"
    yield "mini: the model inside the package" if names.embedded("mini") else "mini: not in this build"


def _step(settings: Settings) -> Iterator[str]:
    path = names.embedded("mini")
    if path is None:
        yield "not timed: this build has no embedded model"
        return
    try:
        file = open_model(path)
        model = load.load(file, identify(file), device=residency.device(settings.device))
    except GouacheError as error:
        yield f"not timed: {error}"
        return
    width, height = model.size
    x = torch.zeros(2, model.vae.spec.latent_channels, height // 8, width // 8, device=model.device)
    with torch.inference_mode():
        denoise = model.denoiser(model.encode_prompts(["", ""]))
        denoise(x, torch.tensor(1.0))  # warm-up
        began = time.perf_counter()
        denoise(x, torch.tensor(1.0))
        seconds = time.perf_counter() - began
    yield f"{seconds * 1e3:.0f} ms for one step of mini, {width}x{height}, on {model.device}"
