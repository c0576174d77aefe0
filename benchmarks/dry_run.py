"""What `--dry-run` predicts against what a run takes: python -m benchmarks.dry_run [--only CASE] [--quick]

For each case, a new process predicts, and another trains for a few steps with samples, validation and checkpoints.
Compared are the peak of private memory (RssAnon, sampled 100 times per second: what the process has allocated, without
mapped files), the mean time of a step, and the bytes of caches and checkpoints on disk. Ratios are predicted /
measured; between 0.85 and 1.15 is the aim. Full-size cases need 6 GB of disk, 5 GB of memory and a quiet
machine; `--quick` runs those of `mini` alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

from benchmarks.report import log, machine, store
from benchmarks.tasks import make, private_mb

Tables = dict[str, dict[str, Any]]

LORA: Tables = {"adapter": {"form": "lora", "rank": 16, "alpha": 16}, "train": {"ema_decay": 0.0}}
WEIGHTS: Tables = {"adapter": {"form": "none"}, "train": {"ema_decay": 0.0}}
FP32: Tables = {"memory": {"dtype": "fp32", "autocast": "no"}}
BF16: Tables = {"memory": {"dtype": "bf16"}}


def _merged(*parts: Tables) -> Tables:
    result: Tables = {}
    for part in parts:
        for name, table in part.items():
            result[name] = {**result.get(name, {}), **table}
    return result


# name: (model, its side in pixels, steps, settings)
CASES: dict[str, tuple[str, int, int, Tables]] = {
    "mini LoRA": ("mini", 256, 12, _merged(LORA, FP32)),
    "mini weights": ("mini", 256, 12, _merged(WEIGHTS, FP32)),
    "mini weights, EMA, batch 4": ("mini", 256, 12, _merged(WEIGHTS, FP32, {"train": {"ema_decay": 0.99, "batch": 4}})),
    "mini weights in bf16": ("mini", 256, 8, _merged(WEIGHTS, BF16)),
    "SD1.5 LoRA fp32": ("full", 256, 4, _merged(LORA, FP32)),
    "SD1.5 LoRA bf16": ("full", 256, 4, _merged(LORA, BF16)),
    "SD1.5 LoRA bf16 autocast": ("full", 256, 4, _merged(LORA, FP32, {"memory": {"autocast": "yes"}})),
    "SD1.5 LoRA bf16, checkpointing": ("full", 256, 4, _merged(LORA, BF16, {"memory": {"checkpointing": True}})),
    "SD1.5 LoRA fp32, batch 2, EMA": ("full", 256, 4, _merged(LORA, FP32, {"train": {"batch": 2, "ema_decay": 0.99}})),
    "SD1.5 LoRA fp32, text encoder": ("full", 256, 4, _merged(LORA, FP32, {"parts": {"text_encoder": True}})),
    "SD1.5 LoRA fp32, 512 px": ("full", 512, 3, _merged(LORA, FP32)),
}


def main(arguments: list[str]) -> int:
    if arguments[:1] in (["predict"], ["measure"]):
        print(json.dumps(_predict(*arguments[1:]) if arguments[0] == "predict" else _measure(*arguments[1:])))
        return 0
    parser = argparse.ArgumentParser(
        prog="benchmarks.dry_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=CASES, action="append")
    parser.add_argument("--quick", action="store_true", help="the cases of mini alone")
    parser.add_argument(
        "--model", type=Path, help="a full-size model that exists; else one with random weights is made"
    )
    options = parser.parse_args(arguments)
    chosen = [name for name, case in CASES.items() if name in (options.only or CASES)]
    chosen = [name for name in chosen if CASES[name][0] == "mini" or not options.quick]
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        _pictures(folder / "pictures")
        model = options.model or folder / "models" / "model"
        if options.model is None and any(CASES[name][0] == "full" for name in chosen):
            log("writing a model with random weights")
            make(folder / "models", False)
        rows = []
        for name in chosen:
            rows.append(_compared(name, folder, model))
            log(table(rows[-1:]).splitlines()[-1])
    print(table(rows))
    if options.only is None and not options.quick:
        result = {"machine": machine("torch"), "cases": rows}
        store("dry-run", result, table(rows))
    return 0


def _pictures(folder: Path) -> None:
    """Four pictures of two shapes with captions."""
    import numpy as np
    from PIL import Image

    folder.mkdir()
    for number, size in enumerate([(512, 512), (512, 512), (640, 448), (512, 512)]):
        levels = np.random.default_rng(number).integers(0, 256, (size[1] // 8, size[0] // 8, 3), np.uint8)
        Image.fromarray(levels).resize(size).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(f"zorb, picture {number}")


def _compared(name: str, folder: Path, model: Path) -> dict[str, Any]:
    run = folder / "run"
    environment = {**os.environ, "HOME": str(folder), "GOUACHE_DATA": str(folder / "data"), "GOUACHE_INDEX": "0"}
    found = {}
    for what in ("predict", "measure"):
        command = [sys.executable, "-m", "benchmarks.dry_run", what, name, str(folder), str(model)]
        done = subprocess.run(
            command, cwd=Path(__file__).parents[1], env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        found[what] = json.loads(done.stdout.splitlines()[-1])
    subprocess.run(["rm", "-rf", str(run)], check=True)
    predicted, measured = found["predict"], found["measure"]
    ratios = {key: predicted[key] / measured[key] for key in ("memory", "step", "cache", "checkpoints")}
    return {"case": name, "predicted": predicted, "measured": measured, "ratios": ratios}


def _settings(name: str, folder: Path, model: str) -> Any:
    from gouache.training.run_settings import checked

    kind, side, steps, tables = CASES[name]
    usual: Tables = {
        "model": {"name": "mini" if kind == "mini" else model},
        "data": {"folder": str(folder / "pictures"), "resolution": [side], "bucket_step": 64},
        "train": {"steps": steps, "batch": 1, "learning_rate": 1e-5, "log_steps": 1,
                  "validate_steps": max(2, steps // 2), "save_steps": max(2, steps // 2)},
        "samples": {"every": steps, "steps": 2},
        "validation": {"timesteps": 2, "probe": 1},
    }  # fmt: skip
    return checked({"output": str(folder / "out.safetensors"), "device": "cpu", **_merged(usual, tables)})


def _predict(name: str, folder: str, model: str) -> dict[str, Any]:
    from gouache.app.settings import read
    from gouache.app.training import estimate
    from gouache.app.training.folder import RunFolder

    began = time.perf_counter()
    settings = _settings(name, Path(folder), model)
    found = estimate.estimate(settings, RunFolder(Path(folder) / "run"), read(), on_note=log)
    return {
        "memory": found.memory_bytes,
        "step": found.step_seconds,
        "cache": found.cache_bytes,
        "checkpoints": found.checkpoint_bytes * found.checkpoints,
        "seconds": time.perf_counter() - began,
    }


def _measure(name: str, folder: str, model: str) -> dict[str, Any]:
    from gouache.app.settings import read
    from gouache.app.training import runs
    from gouache.app.training.folder import RunFolder

    settings, run = _settings(name, Path(folder), model), Path(folder) / "run"
    with Peaks() as peaks:

        def work(what: str, done: int, total: int) -> None:
            peaks.phase = "caches"

        def step(progress: object) -> None:
            peaks.phase = "after step 1"

        runs.run(settings, RunFolder(run), read(), on_note=log, on_work=work, on_progress=step, overwrite=True)
    lines = [json.loads(line) for line in (run / "times.jsonl").read_text().splitlines()]
    others = ("validation", "previews", "saving")
    seconds = [line["seconds"] - sum(line.get(each, 0) for each in others) for line in lines]
    steps = sorted(run.glob("step-*"))
    return {
        "memory": round(max(peaks.megabytes.values()) * 2**20),
        "memory by phase": peaks.megabytes,
        "step": statistics.mean(seconds[1:]),
        "cache": _bytes(run / "cache"),
        "checkpoints": sum(map(_bytes, steps)),
    }


class Peaks(threading.Thread):
    """Within the block, the peaks of this process's private memory in MB by phase."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.phase, self.megabytes = "preparing", dict[str, float]()
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(0.01):
            self.megabytes[self.phase] = max(self.megabytes.get(self.phase, 0.0), private_mb())

    def __enter__(self) -> Peaks:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def table(rows: list[dict[str, Any]]) -> str:
    lines = [
        "| case | memory, MB | ratio | step, s | ratio | caches, MB | ratio | checkpoints, MB | ratio |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        measured, ratios = row["measured"], row["ratios"]
        lines.append(
            f"| {row['case']} | {measured['memory'] / 1e6:.0f} | {ratios['memory']:.2f} "
            f"| {measured['step']:.2f} | {ratios['step']:.2f} | {measured['cache'] / 1e6:.2f} | {ratios['cache']:.2f} "
            f"| {measured['checkpoints'] / 1e6:.1f} | {ratios['checkpoints']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
