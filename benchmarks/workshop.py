"""Commands on full-size model files: python -m benchmarks workshop [--family sd1|sdxl] [--dtype fp16|fp32] ...

Writes checkpoints with random weights to a temporary folder, then times each command alternately with a raw copy
(A B A B), each in a new process: the copy reads the same files and writes as many bytes as the command did, flushed to
disk. Before each run the files are read once, so that they are in the page cache as far as memory allows, and pending
writes are flushed. Cached hashes are deleted between runs.

SD1.5 needs 11 GB of disk and SDXL 32 GB, which is checked first; everything is deleted at the end.
"""

from __future__ import annotations

import argparse
import math
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.report import lines, log, machine, store
from benchmarks.tasks import watched
from gouache.wording import plural

ROOT = Path(__file__).parents[1]
MANIFESTS = {"sd1": "sd15_emaonly", "sdxl": "sdxl_base"}
DTYPES = {"fp16": "F16", "fp32": "F32"}
NETWORKS = ("model.", "model_ema.", "first_stage_model.", "cond_stage_model.", "conditioner.")
SIDES = ("gouache", "copy")
PIECE = 1 << 24

if TYPE_CHECKING:
    from gouache.files.record import TensorInfo

    Infos = Mapping[str, TensorInfo]


@dataclass(frozen=True)
class Task:
    """A command, and the name of its output `{out}`; `{a}`, `{b}` and `{full}` are replaced by checkpoints."""

    command: str
    output: str = ""

    @property
    def reads(self) -> tuple[str, ...]:
        return tuple(name for name in ("a", "b", "full") if f"{{{name}}}" in self.command)


# `full` is a checkpoint as training writes it: float32, with EMA weights.
TASKS = {
    "inspect": Task("inspect {a}"),
    "convert to .ckpt": Task("convert {a} {out}", "out.ckpt"),
    "convert to a folder": Task("convert {a} {out}", "out"),
    "convert to bf16": Task("convert {a} {out} --dtype bf16", "out.safetensors"),
    "merge two": Task("merge {a} {b} {out}", "out.safetensors"),
    "prune to fp16": Task("prune {full} {out} --dtype fp16", "out.safetensors"),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks workshop", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--family", default="sd1", choices=tuple(MANIFESTS))
    parser.add_argument(
        "--dtype", default="fp16", choices=tuple(DTYPES), help="of all checkpoints except the pruned one"
    )
    parser.add_argument("--folder", help="folder for temporary files, on the disk to measure")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=tuple(TASKS))
    parser.add_argument(
        "--quick", action="store_true", help="use checkpoints of mini's size, only to try the benchmark"
    )
    options = parser.parse_args(arguments)
    chosen = {name: task for name, task in TASKS.items() if options.only in (None, name)}
    with tempfile.TemporaryDirectory(prefix="gouache-benchmark-", dir=options.folder) as folder:
        rows = list(measured(chosen, checkpoints(options), Path(folder), options.rounds))
    result = {"machine": machine("torch") | {"memory": memory()}, "options": vars(options), "tasks": rows}
    print(table(result))
    if not options.quick and options.only is None:
        store(f"workshop-{options.family}-{options.dtype}", result, table(result))
    return 0


def measured(
    tasks: Mapping[str, Task], tensors: Mapping[str, Infos], folder: Path, rounds: int
) -> Iterator[dict[str, Any]]:
    """A row for each task. A checkpoint is written before the first task that reads it and deleted after the last."""
    sizes = {name: sum(info.nbytes for info in infos.values()) for name, infos in tensors.items()}
    needed = max(sum(sizes[name] for name in task.reads) for task in tasks.values()) + sizes["a"]  # no task writes more
    free = shutil.disk_usage(folder).free
    if needed + 1e9 > free:
        sys.exit(f"needs {needed / 1e9 + 1:.0f} GB of disk; only {free / 1e9:.0f} GB are free in {folder}")
    remaining = list(tasks.values())
    for name, task in tasks.items():
        files = [folder / f"{each}.safetensors" for each in task.reads]
        for each, path in zip(task.reads, files):
            if not path.exists():
                log(f"writing {path.name}, {sizes[each] / 1e9:.1f} GB of random weights")
                make(path, tensors[each], seed=ord(each[0]))
        yield alternately(name, task, files, folder, rounds)
        remaining.remove(task)
        for path in files:
            if not any(path.stem in other.reads for other in remaining):
                path.unlink()


def alternately(name: str, task: Task, files: list[Path], folder: Path, rounds: int) -> dict[str, Any]:
    """Time command and raw copy alternately; medians, and the median of the ratios of each round."""
    output, copied, cache = folder / task.output, folder / "copy", folder / "cache"
    paths = {"out": output, **{path.stem: path for path in files}}
    command = ["gouache.cli.main", *(argument.format(**paths) for argument in task.command.split())]
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in (SIDES if task.output else SIDES[:1])}
    written = 0
    for number in range(rounds):
        for side, runs in found.items():
            read_once(files)
            os.sync()
            shutil.rmtree(cache, ignore_errors=True)
            arguments = command if side == "gouache" else [__spec__.name, str(copied), str(written), *map(str, files)]
            environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
            runs.append(watched([sys.executable, "-m", *arguments], cwd=ROOT, env=environment))
            if task.output and side == "gouache":
                written = size_of(output)
                shutil.rmtree(output) if output.is_dir() else output.unlink()
            copied.unlink(missing_ok=True)
            log(f"{name} {number + 1}/{rounds} {side}: {runs[-1]['seconds'][0]:.2f} s")
    ours, theirs = ([run["seconds"][0] for run in found.get(side, [])] for side in SIDES)
    return {
        "task": name,
        "read_bytes": sum(map(size_of, files)),
        "written_bytes": written,
        "seconds": statistics.median(ours),
        "copy_seconds": statistics.median(theirs) if theirs else None,
        "ratio": statistics.median(a / b for a, b in zip(ours, theirs)) if theirs else None,
        "ratios": [a / b for a, b in zip(ours, theirs)],
        "peak_private_mb": max(run["peak_private_mb"] for run in found["gouache"]),
    }


def checkpoints(options: argparse.Namespace) -> dict[str, Infos]:
    """{checkpoint: {tensor: shape and dtype}}."""
    from gouache.files.open import open_model
    from gouache.files.record import TensorInfo

    if options.quick:
        plain = open_model(ROOT / "src/gouache/embedded/mini.safetensors").tensors
    else:
        from tests.layouts.manifests import manifest

        entries = manifest(MANIFESTS[options.family])
        plain = {name: TensorInfo(tuple(shape), dtype) for name, (shape, dtype) in entries.items()}
    trained = [name for name in plain if name.startswith("model.diffusion_model.")]
    averages = {f"model_ema.{name.removeprefix('model.').replace('.', '')}": plain[name] for name in trained}
    small = in_dtype(plain, DTYPES[options.dtype])
    return {"a": small, "b": small, "full": in_dtype({**plain, **averages}, "F32")}


def in_dtype(infos: Infos, dtype: str) -> Infos:
    """`infos` with weights in `dtype`; noise schedules and position ids keep theirs."""
    weights = {name for name in infos if name.startswith(NETWORKS) and infos[name].dtype in ("F32", "F16", "BF16")}
    return {name: replace(info, dtype=dtype) if name in weights else info for name, info in infos.items()}


def make(path: Path, infos: Infos, seed: int) -> None:
    """Write a checkpoint with small random weights, one tensor at a time."""
    import torch

    from gouache.files.source import TORCH_NAMES
    from gouache.files.write import stream_safetensors

    values = torch.randn(1 << 22, generator=torch.Generator().manual_seed(seed)) * 0.02

    def read(name: str) -> torch.Tensor:
        info = infos[name]
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if not dtype.is_floating_point:
            return torch.arange(info.elements).reshape(info.shape).to(dtype)
        pool = values.to(dtype)
        return pool.repeat(math.ceil(info.elements / len(pool)))[: info.elements].reshape(info.shape)

    stream_safetensors(path, infos, read)


def read_once(files: list[Path]) -> None:
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.read(PIECE):
                pass


def size_of(path: Path) -> int:
    return sum(each.stat().st_size for each in path.rglob("*")) if path.is_dir() else path.stat().st_size


def copy(target: Path, size: int, files: list[Path]) -> None:
    """Read all of `files` and write `size` bytes of them to `target`, repeating them if they are fewer."""
    remaining = size
    with target.open("wb", buffering=0) as out:
        while True:
            for path in files:
                with path.open("rb", buffering=0) as file:
                    while piece := file.read(PIECE):
                        remaining -= out.write(piece[:remaining]) if remaining else 0
            if not remaining:
                break
        os.fsync(out.fileno())


def memory() -> str:
    total = next((line.split()[1] for line in lines("/proc/meminfo") if line.startswith("MemTotal")), "0")
    return f"{int(total) / 1e6:.0f} GB"


def table(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    options, computer = result["options"], result["machine"]
    rounds = plural(options["rounds"], "round")
    text = [
        f"{options['family']} in {options['dtype']}, medians of {rounds}, each in a new process, alternately with a "
        f"raw copy. {computer['cpu']}, {computer['cores']} cores, {computer['memory']} of memory, Python "
        f"{computer['python']}, torch {computer['torch']}. Files were read once before each run, so they were in the "
        "page cache as far as memory allows.",
        "",
        "| task | reads, GB | writes, GB | gouache, s | raw copy, s | ratio | private MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["tasks"]:
        compared = f"{row['copy_seconds']:.2f} | {row['ratio']:.2f}" if row["ratio"] else " | "
        text.append(
            f"| {row['task']} | {row['read_bytes'] / 1e9:.2f} | {row['written_bytes'] / 1e9:.2f} "
            f"| {row['seconds']:.2f} | {compared} | {row['peak_private_mb']:.0f} |"
        )
    return "\n".join(text) + "\n"


if __name__ == "__main__":
    copy(Path(sys.argv[1]), int(sys.argv[2]), list(map(Path, sys.argv[3:])))
