"""One command: python -m benchmarks [--quick] [--dtype bf16|fp32] [--rounds 3] [--only NAME]

Makes a Stable Diffusion 1.5 of random weights in a temporary folder, then times each task for Gouache and diffusers in
turns (A B A B), every time in a fresh process, so that a machine whose speed drifts moves both. Needs the test extra,
6 GB of disk and 8 GB of memory; `--quick` takes a narrow model instead. Results go to benchmarks/results/.

    python -m benchmarks workshop ...    the commands that turn files into files: see benchmarks/workshop.py
    python -m benchmarks attach ...      an SDXL LoRA put on, changed and taken off: see benchmarks/attach.py
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

from benchmarks import attach, workshop
from benchmarks.report import machine, say, store
from benchmarks.tasks import TASKS

HERE = Path(__file__).parent
SIDES = ("gouache", "diffusers")


def main() -> int:
    if sys.argv[1:2] == ["workshop"]:
        return workshop.main(sys.argv[2:])
    if sys.argv[1:2] == ["attach"]:
        return attach.main(sys.argv[2:])
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a narrow model: seconds, and only good for a look")
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "fp32"))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=TASKS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        say("making models of random weights")
        run("make", "both", Path(folder), options)
        ceiling = run("ceiling", "both", Path(folder), options)["flops_per_second"]
        say(f"ceiling: {ceiling / 1e9:.0f} GFLOP/s for a product of {options.dtype} matrices")
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
    """Both sides in turns; medians of all timed calls, and the median of the ratios round by round."""
    found: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for number in range(options.rounds):
        for side in SIDES:
            found[side].append(run(task, side, folder, options))
            say(f"{task} {number + 1}/{options.rounds} {side}: {median(found[side][-1]):.3f} s")
    ratios = [median(ours) / median(theirs) for ours, theirs in zip(found["gouache"], found["diffusers"])]
    row: dict[str, Any] = {"task": task, "ratio": statistics.median(ratios), "ratios": ratios}
    for side in SIDES:
        seconds = statistics.median(median(each) for each in found[side])
        row[side] = {"seconds": seconds, "peak_private_mb": max(each["peak_private_mb"] for each in found[side])}
        if flops := found[side][0].get("flops"):
            row[side]["fraction_of_ceiling"] = flops / seconds / ceiling
    return row


def run(task: str, side: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """One task of one side in a process of its own."""
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
    options, told = result["options"], result["machine"]
    lines = [
        f"{options['dtype']}, medians of {options['rounds']} rounds, each side in turn in fresh processes. "
        f"{told['cpu']}, {told['cores']} cores, Python {told['python']}, torch {told['torch']}, "
        f"diffusers {told['diffusers']}. Matrix ceiling {result['ceiling_gflops']:.0f} GFLOP/s.",
        "",
        "| task | gouache, s | diffusers, s | ratio | of the ceiling | private MB | diffusers' |",
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
