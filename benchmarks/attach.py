"""Attaching an SDXL LoRA: python -m benchmarks attach [--dtype bf16|fp32] [--rounds 6]

A LoRA of the official layout (144 MB at the usual rank) on an SDXL with random weights, alternately with the lower
bound for folding: copying the weights that it changes to new memory. The original weights are read from a mapped
float16 file. Needs 6 GB of disk and 18 GB of memory (24 GB for fp32).
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

from benchmarks.report import log, machine, store

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
        log("writing a LoRA and networks with random weights")
        lora(path)
        rows = measured(path, options.dtype, options.rounds)
    print(table(rows))
    result = {"machine": machine("torch"), "options": vars(options), "tasks": rows}
    store(f"attach-{options.dtype}", result, table(rows))
    return 0


def lora(path: Path) -> None:
    """Write a LoRA with random float16 weights in the official layout."""
    import torch
    from safetensors.torch import save_file

    shapes = {name: shape for name, (shape, *_) in json.loads(gzip.decompress(MANIFEST.read_bytes())).items()}
    generator = torch.Generator().manual_seed(0)
    tensors = {name: (0.01 * torch.randn(shape, generator=generator)).half() for name, shape in shapes.items()}
    save_file(tensors, path)
    log(f"{len(tensors)} tensors, {path.stat().st_size / 1e6:.0f} MB")


def measured(path: Path, dtype: str, rounds: int) -> list[dict[str, Any]]:
    import torch
    from safetensors.torch import save_file

    from gouache.adapters.attach import Adapters
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
    for place in SDXL.locations:
        if isinstance(place.spec, UNetSpec | TextSpec):
            specs[place.component] = place.spec
            with torch.device("meta"):
                network = UNet(place.spec) if isinstance(place.spec, UNetSpec) else ClipText(place.spec)
            networks[place.component] = network.to(DTYPES[dtype]).to_empty(device="cpu").requires_grad_(False)
    adapter = read_lora(open_model(path), module_names(specs))
    model = path.with_name("model.safetensors")
    halves = {}
    for component, name in adapter.tensors:
        weight = networks[component].get_submodule(name).weight
        assert isinstance(weight, torch.Tensor)
        halves[f"{component}/{name}.weight"] = torch.full(weight.shape, 0.02, dtype=torch.float16)
        weight.fill_(0.02)
    save_file(halves, model)
    del halves
    file = open_model(model)

    def restore(component: str, name: str) -> torch.Tensor:
        """The original weight from the mapped file, cast as when it was loaded."""
        if f"{component}/{name}" not in file:
            return networks[component].get_parameter(name).data
        return cast(file.tensor(f"{component}/{name}"), DTYPES[dtype], "cpu")

    def changed_weights() -> list[torch.Tensor]:
        return [networks[component].get_submodule(name).weight.data for component, name in adapter.tensors]  # type: ignore

    adapters = Adapters(networks, restore)
    size = sum(weight.nbytes for weight in changed_weights())
    log(f"{len(adapter.tensors)} weights, {size / 1e9:.2f} GB in {dtype}")
    times: dict[str, list[float]] = {"copy": [], "attach": [], "another strength": [], "detach": []}

    def copy() -> None:
        copies = timed(times["copy"], lambda: [torch.empty_like(weight).copy_(weight) for weight in changed_weights()])
        del copies
        trim()

    def attach() -> None:
        attached = [timed(times["attach"], lambda: adapters.attach(adapter, Strength(0.8)))]
        timed(times["another strength"], lambda: adapters.change(attached[0], Strength(0.5)))
        timed(times["detach"], lambda: adapters.detach(attached.pop()))
        trim()

    trim()
    for number in range(rounds):
        # Each is first as often as second: the speed of allocating new memory depends on what was freed just before.
        for work in (copy, attach) if number % 2 else (attach, copy):
            work()
        log(f"{number + 1}/{rounds}: " + ", ".join(f"{name} {seconds[-1]:.2f} s" for name, seconds in times.items()))
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}
    return [
        {"task": name, "seconds": median, "ratio": median / medians["copy"], "bytes": size}
        for name, median in medians.items()
    ]


def trim() -> None:
    """Return freed memory to the system, so that the next task gets new memory, as a first attach does."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def timed(into: list[float], work: Callable[[], T]) -> T:
    """Run `work`, append the seconds it takes to `into`, and return its result."""
    start = time.perf_counter()
    result = work()
    into.append(time.perf_counter() - start)
    return result


def table(rows: list[dict[str, Any]]) -> str:
    head = ["| task | seconds | times a copy |", "| --- | ---: | ---: |"]
    return (
        "\n".join([*head, *(f"| {row['task']} | {row['seconds']:.2f} | {row['ratio']:.2f} |" for row in rows)]) + "\n"
    )
