"""One command: python -m benchmarks [--quick] [--dtype bf16|fp32] [--rounds 3] [--only NAME]

Writes a Stable Diffusion 1.5 with random weights to a temporary folder, then times each task for Gouache and diffusers
alternately (A B A B), each time in a new process, so that a drift of the machine's speed affects both. Needs the test
extra, 6 GB of disk and 8 GB of memory; `--quick` uses a narrow model instead. Results go to benchmarks/results/.

    python -m benchmarks workshop ...    the commands that convert, merge and prune files: see benchmarks/workshop.py
    python -m benchmarks attach ...      attaching, changing and detaching an SDXL LoRA: see benchmarks/attach.py
    python -m benchmarks shards ...      start and batches of a large data set in tar shards: see benchmarks/shards.py
    python -m benchmarks train ...       training steps: see benchmarks/train.py
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

from benchmarks import attach, shards, train, workshop
from benchmarks.report import log, machine, store
from benchmarks.tasks import TASKS
from gouache.wording import plural

HERE = Path(__file__).parent
SIDES = ("gouache", "diffusers")


def main() -> int:
    if sys.argv[1:2] == ["workshop"]:
        return workshop.main(sys.argv[2:])
    if sys.argv[1:2] == ["attach"]:
        return attach.main(sys.argv[2:])
    if sys.argv[1:2] == ["shards"]:
        return shards.main(sys.argv[2:])
    if sys.argv[1:2] == ["train"]:
        return train.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--quick", action="store_true", help="use a narrow model: takes seconds, only to try the benchmark"
    )
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=TASKS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        log("writing models with random weights")
        run("make", "both", Path(folder), options)
        ceiling = run("ceiling", "both", Path(folder), options)["flops_per_second"]
        log(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s in a product of {options.dtype} matrices")
        rows = [measure(task, Path(folder), options, ceiling) for task in TASKS if options.only in (None, task)]
    result = {
        "machine": machine("torch", "diffusers", "transformers"),
        "options": vars(options),
        "ceiling_gflops": ceiling / 1e9,
        "tasks": rows,
    }
    print(table(result))
    if not options.quick and options.only is None:
        store(options.dtype, result, table(result))
    return 0


def measure(task: str, folder: Path, options: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    """Time both sides alternately; medians of all timed calls, and the median of the ratios of each round."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES:
            found[side].append(run(task, side, folder, options))
            log(f"{task} {number + 1}/{options.rounds} {side}: {median(found[side][-1]):.3f} s")
    ratios = [median(ours) / median(theirs) for ours, theirs in zip(found["gouache"], found["diffusers"])]
    row: dict[str, Any] = {"task": task, "ratio": statistics.median(ratios), "ratios": ratios}
    for side in SIDES:
        seconds = statistics.median(median(each) for each in found[side])
        row[side] = {"seconds": seconds, "peak_private_mb": max(each["peak_private_mb"] for each in found[side])}
        if flops := found[side][0].get("flops"):
            row[side]["fraction_of_ceiling"] = flops / seconds / ceiling
    return row


def run(task: str, side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One task of one side in a new process."""
    command = [sys.executable, "-m", "benchmarks.tasks", task, side, str(folder), options.dtype]
    command += ["--quick"] if options.quick else []
    done = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, env={**os.environ, **OFFLINE})
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}


def median(result: dict[str, Any]) -> float:
    return statistics.median(result["seconds"])


def table(result: dict[str, Any]) -> str:
    """The result as Markdown: a ratio below 1 means that Gouache is faster."""
    options, computer = result["options"], result["machine"]
    rounds = plural(options["rounds"], "round")
    lines = [
        f"{options['dtype']}, medians of {rounds}, both sides alternately, in new processes. "
        f"{computer['cpu']}, {computer['cores']} cores, Python {computer['python']}, torch {computer['torch']}, "
        f"diffusers {computer['diffusers']}. Matrix product ceiling {result['ceiling_gflops']:.0f} GFLOP/s.",
        "",
        "| task | gouache, s | diffusers, s | ratio | share of ceiling | gouache, private MB | diffusers, private MB |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in result["tasks"]:
        ours, theirs = row["gouache"], row["diffusers"]
        share = f"{ours['fraction_of_ceiling']:.2f}" if "fraction_of_ceiling" in ours else ""
        lines.append(
            f"| {row['task']} | {ours['seconds']:.3f} | {theirs['seconds']:.3f} | {row['ratio']:.2f} | {share} "
            f"| {ours['peak_private_mb']:.0f} | {theirs['peak_private_mb']:.0f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
