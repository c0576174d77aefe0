"""A large data set in tar shards: python -m benchmarks shards [--shards 10] [--samples 10000]

Writes shards of small pictures with captions and scores, then measures, in one process without a model, the time and
memory of the first index, of the next start, of filters, of the first order, and of reading and decoding batches.
"""

from __future__ import annotations

import argparse
import io
import json
import resource
import tarfile
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.report import log, machine, store

BATCH, BATCHES = 8, 500


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="benchmarks shards", description=__doc__)
    parser.add_argument("--shards", type=int, default=10)
    parser.add_argument("--samples", type=int, default=10_000, help="of each shard")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        log("writing shards")
        write(Path(folder) / "shards", options.shards, options.samples)
        rows = list(measured(Path(folder)))
    lines = [f"| {row['task']} | {row['seconds']:.2f} | {row['peak_mb']:.0f} |" for row in rows]
    table = "\n".join(["| task | s | MB more than at the start |", "| --- | ---: | ---: |", *lines]) + "\n"
    print(table)
    store("shards", {"machine": machine("torch", "pillow"), "options": vars(options), "tasks": rows}, table)
    return 0


def write(folder: Path, shards: int, samples: int) -> None:
    """Shards of pictures of about 2 kB, of three shapes."""
    import numpy as np
    from PIL import Image

    generator = np.random.default_rng(0)
    pictures = list[bytes]()
    for number in range(300):
        width, height = ((64, 64), (96, 64), (64, 96))[number % 3]
        buffer, colours = io.BytesIO(), generator.integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
        Image.fromarray(colours).resize((width, height)).save(buffer, "JPEG")
        pictures.append(buffer.getvalue())
    folder.mkdir()
    for shard in range(shards):
        with tarfile.open(folder / f"{shard:06d}.tar", "w") as tar:
            for row in range(samples):
                number = shard * samples + row
                scores = {"punsafe": float(generator.random()), "aesthetic": 10 * float(generator.random())}
                for suffix, data in (
                    ("jpg", pictures[number % 300] + number.to_bytes(4, "big")),
                    ("txt", f"a picture, number {number}".encode()),
                    ("json", json.dumps({"url": "http://example.org/a.jpg", **scores}).encode()),
                ):
                    info = tarfile.TarInfo(f"{number:012d}.{suffix}")
                    info.size = len(data)
                    tar.addfile(info, io.BytesIO(data))


def measured(folder: Path) -> Iterator[dict[str, Any]]:
    import torch

    from gouache.data import pictures, scores
    from gouache.data.buckets import Buckets
    from gouache.data.folders import read
    from gouache.training.batches import Batches, Options
    from gouache.training.latent_cache import LatentCache

    torch.set_num_threads(1)
    start, began = _peak(), time.perf_counter()

    def row(task: str) -> dict[str, Any]:
        nonlocal began
        found = {"task": task, "seconds": time.perf_counter() - began, "peak_mb": _peak() - start}
        log(f"{task}: {found['seconds']:.2f} s")
        began = time.perf_counter()
        return found

    read(folder / "shards", stream=True, cache=folder / "index")
    yield row("index")
    found = read(folder / "shards", stream=True, cache=folder / "index")
    yield row("the next start")
    found = scores.weigh(scores.select(found, ["punsafe<0.9"]), "aesthetic")
    yield row("filter and weights")
    options = Options((Buckets((64, 64), step=8),), BATCH, window=4)
    latents = LatentCache(None, "", lambda images: torch.zeros(len(images), 4, 8, 8))
    with Batches(found.records, options, latents, None, lambda record, *_: record.captions[0]) as batches:
        yield row("rows of batches")
        batches.plan.batch(0)
        yield row("order of an epoch")
        for number in range(BATCHES):
            for example in batches.examples(number):
                pictures.load(example.row.record, example.row.content, example.view)
        yield row(f"{BATCHES * BATCH} pictures read and decoded in that order")


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
