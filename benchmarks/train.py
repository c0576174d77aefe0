"""Training steps: python -m benchmarks train [--task lora|full] [--rounds 12] [--threads N] [--quick]

Two tasks, Gouache and diffusers alternately: a step of a LoRA (rank 16 on the attention projections) of a Stable
Diffusion 1.5 in bfloat16, and a step of all weights of a narrow one in float32. Batch 1, 256x256 pixels. Each side is a
process of its own that loads the model as a user would, waits, and takes some steps when it is asked to, so that a
drift of the machine's speed affects both. Before, both compute the loss and the norm of the gradient for equal weights,
noise and timesteps. Needs 4 GB of disk and 8 GB of memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import log, machine, store
from gouache.wording import plural

ROOT = Path(__file__).parents[1]
SIDES = ("gouache", "diffusers")
STEPS = {"lora": 2, "full": 20}  # per round
OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="benchmarks train", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--task", choices=STEPS, action="append", help="only this one; nothing is stored")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--threads", type=int, default=0, help="of each side; 0: as each side chooses by itself")
    parser.add_argument("--channels-last", action="store_true", help="convolutions of diffusers in channels-last too")
    parser.add_argument("--quick", action="store_true", help="a narrow model for both: only to try the benchmark")
    parser.add_argument("--model", type=Path, help="folder with models that an earlier run has written, or will write")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        models = options.model or Path(scratch)
        if not (models / "tiny").exists():
            log("writing models with random weights")
            models.mkdir(parents=True, exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.tasks", "make", "both", str(models), "bf16"]
            command += ["--quick"] if options.quick else []
            subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, env={**os.environ, **OFFLINE})
        tasks = options.task or list(STEPS)
        rows = [measure(task, models, Path(scratch) / task, options) for task in tasks]
    result = {
        "machine": machine("torch", "diffusers", "peft", "accelerate"),
        "options": {**vars(options), "model": None},
        "tasks": rows,
    }
    print(table(result))
    if not options.quick and options.task is None:
        store("train-bf16", result, table(result))
    return 0


class Side:
    """A process that trains with one of the two programs when it is asked to."""

    def __init__(self, task: str, side: str, models: Path, folder: Path, options: argparse.Namespace) -> None:
        self.name, self._errors = side, folder / f"{side}.log"
        model = models / ("tiny" if task == "full" else "model")
        command = [sys.executable, "-m", "benchmarks.trainers", task, side, str(model), str(folder)]
        command += ["--channels-last"] if options.channels_last else []
        threads = {"OMP_NUM_THREADS": str(options.threads)} if options.threads else {}
        with self._errors.open("w") as errors:
            self._process = subprocess.Popen(
                command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
                env={**os.environ, **OFFLINE, **threads},
            )  # fmt: skip
        self.check = self._answer()

    def steps(self, count: int) -> dict[str, Any]:
        """Take `count` steps; "seconds" is their duration, with what the loop does between steps."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{count}\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate("0\n")

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        sys.exit(f"{self.name} failed:\n{self._errors.read_text()[-2000:]}")


def measure(task: str, models: Path, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """The medians of the rounds, and of the ratios of each round."""
    folder.mkdir(parents=True, exist_ok=True)
    sides = [Side(task, name, models, folder, options) for name in SIDES]
    try:
        log(f"{task}: {', '.join(f'{side.name} {side.check}' for side in sides)}")
        for side in sides:
            side.steps(2)  # the first steps allocate memory
        found: list[list[dict[str, Any]]] = []
        for number in range(options.rounds):
            order = sides if number % 2 else sides[::-1]
            taken = {side.name: side.steps(STEPS[task]) for side in order}
            found.append([taken[name] for name in SIDES])
            times = ", ".join(f"{name} {per_step(taken[name], task):.3f} s" for name in SIDES)
            log(f"{task} {number + 1}/{options.rounds}: {times}")
    finally:
        for side in sides:
            side.close()
    row: dict[str, Any] = {"task": task, "modules": sides[0].check["modules"]}
    ratios = {key: [ours[key] / theirs[key] for ours, theirs in found] for key in ("seconds", "cpu_seconds")}
    row["ratio"], row["cpu_ratio"] = (statistics.median(ratios[key]) for key in ("seconds", "cpu_seconds"))
    row["ratios"] = ratios["seconds"]
    for index, name in enumerate(SIDES):
        each = [pair[index] for pair in found]
        row[name] = {
            "seconds": statistics.median(per_step(one, task) for one in each),
            "waiting_for_data": sum(one["data_seconds"] for one in each) / sum(one["seconds"] for one in each),
            "peak_private_mb": max(one["peak_private_mb"] for one in each),
            **sides[index].check,
        }
    row["memory_ratio"] = row["gouache"]["peak_private_mb"] / row["diffusers"]["peak_private_mb"]
    return row


def per_step(result: dict[str, Any], task: str) -> float:
    return result["seconds"] / STEPS[task]


UNITS = {"lora": "module", "full": "tensor"}
TITLES = {"lora": "SD1.5, LoRA of rank 16", "full": "narrow SD1, all weights"}


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a ratio below 1 means that Gouache is faster, or needs less memory."""
    options, computer = result["options"], result["machine"]
    lines = [
        f"A training step: batch 1, 256x256 pixels, AdamW; medians of {plural(options['rounds'], 'round')}, both sides "
        f"alternately. {computer['cpu']}, {computer['cores']} cores, Python {computer['python']}, torch "
        f"{computer['torch']}, diffusers {computer['diffusers']}, peft {computer['peft']}. Loss and norm of the "
        "gradient are those of both sides for equal weights, noise and timesteps.",
        "",
        "| task | gouache, s | diffusers, s | ratio | ratio of CPU time | gouache, private MB | diffusers, private MB "
        "| ratio | waiting for data | loss | gradient |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | --- | --- |",
    ]
    for row in result["tasks"]:
        ours, theirs = row["gouache"], row["diffusers"]
        lines.append(
            f"| {TITLES[row['task']]} ({plural(row['modules'], UNITS[row['task']])}) | {ours['seconds']:.3f} "
            f"| {theirs['seconds']:.3f} | {row['ratio']:.2f} | {row['cpu_ratio']:.2f} | {ours['peak_private_mb']:.0f} "
            f"| {theirs['peak_private_mb']:.0f} | {row['memory_ratio']:.2f} | {ours['waiting_for_data']:.2%} "
            f"| {ours['loss']:.5f}, {theirs['loss']:.5f} | {ours['norm']:.4f}, {theirs['norm']:.4f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
