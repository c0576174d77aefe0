"""Attaching an SDXL LoRA: python -m benchmarks attach [--dtype bf16|fp32] [--rounds 6]

A LoRA of the official layout (144 MB at the usual rank) on an SDXL of random weights, in turns with the least that
folding can cost: copying the weights that it touches into fresh memory. The originals are read from a mapped float16
file. Needs 6 GB of disk and 18 GB of memory (24 GB for fp32).
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import gc
import gzip
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from benchmarks.report import machine, say, store

T = TypeVar("T")

ROOT = Path(__file__).parents[1]
MANIFEST = ROOT / "tests" / "keys" / "lora_kohya_sdxl.json.gz"


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks attach", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=6)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "lora.safetensors"
        say("making a LoRA and networks of random weights")
        lora(path)
        rows = measured(path, options.dtype, options.rounds)
    print(table(rows))
    result = {"machine": machine("torch"), "options": vars(options), "tasks": rows}
    store(f"attach-{options.dtype}", result, table(rows))
    return 0


def lora(path: Path) -> None:
    """Random weights in the official layout, float16."""
    import torch
    from safetensors.torch import save_file

    listed = json.loads(gzip.decompress(MANIFEST.read_bytes()))
    chance = torch.Generator().manual_seed(0)
    made = {name: (0.01 * torch.randn(shape, generator=chance)).half() for name, (shape, *_) in listed.items()}
    save_file(made, path)
    say(f"{len(made)} tensors, {path.stat().st_size / 1e6:.0f} MB")


def measured(path: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    import torch
    from safetensors.torch import save_file

    from gouache.adapters.attach import Layers
    from gouache.adapters.read import read_lora
    from gouache.adapters.strength import Strength
    from gouache.families.sdxl import SDXL
    from gouache.files.assign import cast
    from gouache.files.open import open_model
    from gouache.layouts.modules import module_names
    from gouache.model.residency import DTYPES
    from gouache.nn.clip_text import ClipText
    from gouache.nn.spec import TextSpec, UNetSpec
    from gouache.nn.unet import UNet

    networks: dict[str, torch.nn.Module] = {}
    specs: dict[str, UNetSpec | TextSpec] = {}
    for place in SDXL.places:
        if isinstance(place.spec, UNetSpec | TextSpec):
            specs[place.component] = place.spec
            with torch.device("meta"):
                built = UNet(place.spec) if isinstance(place.spec, UNetSpec) else ClipText(place.spec)
            networks[place.component] = built.to(DTYPES[dtype]).to_empty(device="cpu").requires_grad_(False)
    adapter = read_lora(open_model(path), module_names(specs))
    model = path.with_name("model.safetensors")
    halves = {}
    for component, name in adapter.tensors:
        weight = networks[component].get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        halves[f"{component}/{name}.weight"] = torch.full(weight.shape, 0.02, dtype=torch.float16)
        weight.fill_(0.02)
    save_file(halves, model)
    del halves, weight
    file = open_model(model)

    def restore(component: str, name: str) -> torch.Tensor:
        """From the mapped file, cast as it was loaded."""
        if f"{component}/{name}" not in file:
            return networks[component].get_parameter(name).data
        return cast(file.tensor(f"{component}/{name}"), DTYPES[dtype], "cpu")

    def touched() -> list[torch.Tensor]:
        return [networks[component].get_submodule(name).weight.data for component, name in adapter.tensors]  # type: ignore

    layers = Layers(networks, restore)
    size = sum(weight.nbytes for weight in touched())
    say(f"{len(adapter.tensors)} weights, {size / 1e9:.2f} GB in {dtype}")
    times: dict[str, list[float]] = {"copy": [], "attach": [], "another strength": [], "detach": []}

    def copy() -> None:
        copies = timed(times["copy"], lambda: [torch.empty_like(weight).copy_(weight) for weight in touched()])
        del copies
        trim()

    def attach() -> None:
        on = [timed(times["attach"], lambda: layers.attach(adapter, Strength(0.8)))]
        timed(times["another strength"], lambda: layers.change(on[0], Strength(0.5)))
        timed(times["detach"], lambda: layers.detach(on.pop()))
        trim()

    trim()
    for number in range(rounds):
        # In turns, each first as often as second: how fast fresh memory comes depends on what was freed just before.
        for work in (copy, attach) if number % 2 else (attach, copy):
            work()
        say(f"{number + 1}/{rounds}: " + ", ".join(f"{name} {seen[-1]:.2f} s" for name, seen in times.items()))
    copying = statistics.median(times["copy"])
    return [
        {"task": name, "seconds": statistics.median(seen), "ratio": statistics.median(seen) / copying, "bytes": size}
        for name, seen in times.items()
    ]


def trim() -> None:
    """Give freed memory back to the system, so that what comes next gets fresh memory as a first attach does."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def timed(into: list[float], work: Callable[[], T]) -> T:
    began = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - began)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    head = ["| task | seconds | of a copy |", "| --- | ---: | ---: |"]
    return (
        "\n".join([*head, *(f"| {row['task']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for row in rows)]) + "\n"
    )
