"""What this machine has and can, as lines a topic: for the user, and for a report of trouble."""

from __future__ import annotations

import os
import platform
import shutil
import time
from collections.abc import Iterator

import torch

from gouache.app import machine, names, places
from gouache.app.settings import Settings
from gouache.errors import GouacheError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.model import load, residency
from gouache.version import __version__


def examine(settings: Settings) -> dict[str, list[str]]:
    """Topic -> lines."""
    return {
        "gouache": [f"{__version__} on Python {platform.python_version()}, {platform.platform()}"],
        "torch": [f"{torch.__version__}, {torch.get_num_threads()} threads"],
        "devices": list(_devices(settings)),
        "dtypes": list(_dtypes(settings)),
        "memory": list(_memory()),
        "disk": [f"{shutil.disk_usage('.').free / 1e9:.0f} GB free here"],
        "models": list(_models(settings)),
        "step": list(_step(settings)),
    }


def _devices(settings: Settings) -> Iterator[str]:
    yield f"cpu ({platform.processor() or platform.machine()}, {os.cpu_count()} cores)"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        yield f"cuda:{index} ({properties.name}, {properties.total_memory / 1e9:.0f} GB)"
    if torch.backends.mps.is_available():
        yield "mps"
    yield f"{residency.device(settings.device)} is used by default"


def _dtypes(settings: Settings) -> Iterator[str]:
    device = residency.device(settings.device)
    times = machine.timings(device, settings)
    told = ", ".join(f"{name} {seconds * 1e3:.0f} ms" for name, seconds in times.items())
    yield f"{residency.dtype_name(residency.choose(times))} on {device}, the fastest measured ({told})"
    if device.type == "cpu":
        yield "fp32 for models narrower than the released ones, such as mini"


def _memory() -> Iterator[str]:
    try:
        pages, size = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE")
        yield f"{pages * size / 1e9:.1f} GB"
    except (AttributeError, ValueError, OSError):
        yield "unknown on this system"


def _models(settings: Settings) -> Iterator[str]:
    for root in settings.models:
        count = len({path for place in places.places_of(root) for path in places.models(place.folder, place.kind)})
        yield f"{root}: {f'{count} models' if root.exists() else 'does not exist yet'}"
    if settings.hub is not None and settings.hub.is_dir():
        yield f"{settings.hub}: {len(list(places.hub(settings)))} models"
    yield "mini: the model inside the package" if names.embedded("mini") else "mini: not in this build"


def _step(settings: Settings) -> Iterator[str]:
    path = names.embedded("mini")
    if path is None:
        yield "not timed: there is no embedded model"
        return
    try:
        file = open_model(path)
        model = load.load(file, identify(file), device=residency.device(settings.device))
    except GouacheError as error:
        yield f"not timed: {error}"
        return
    width, height = model.size
    x = torch.zeros(2, model.vae.spec.latent_channels, height // 8, width // 8, device=model.device)
    denoise = model.denoiser(model.encode_prompts(["", ""]))
    denoise(x, torch.tensor(1.0))
    began = time.perf_counter()
    denoise(x, torch.tensor(1.0))
    yield f"{(time.perf_counter() - began) * 1e3:.0f} ms for one step of mini, {width}x{height}, on {model.device}"
