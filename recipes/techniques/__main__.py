"""python -m recipes.techniques FOLDER [--steps 400] [--model mini]

Teaches a model one invented character in four ways, from the same five drawings with the same captions: a LoRA, a whole
model (DreamBooth), an embedding and a hypernetwork. It writes to FOLDER: `pictures/`, a run and a file for each, and
`techniques.png`, where each row is one of them and all pictures have the same seed. For each it prints the size of its
file and two numbers, see `recipes.dreambooth`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gouache
from gouache.images.sheet import sheet
from recipes.drawings import CHARACTER, write_character
from recipes.dreambooth.__main__ import CLASS, OTHERS, SUBJECT, violet
from recipes.lora.__main__ import kept, painted
from recipes.mini.command import print_progress, run_command

TECHNIQUES: Mapping[str, dict[str, Any]] = {
    "lora": {"form": "locon", "rank": 16, "text_encoder": True, "learning_rate": 1e-3},
    "dreambooth": {"form": "none", "text_encoder": True, "learning_rate": 1e-4, "class_word": CLASS,
                   "class_pictures": 12},
    "embedding": {"vectors": 4, "init_word": "ghost", "learning_rate": 2e-2},
    "hypernetwork": {"learning_rate": 1e-3},
}  # fmt: skip
FILES = {"hypernetwork": f"{CHARACTER}.pt"}


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=400, help="training steps of each")
    parser.add_argument("--model", default="mini")
    options = parser.parse_args(arguments)
    return run_command(lambda: teach(options.folder, options.model, options.steps))


def teach(folder: Path, name: str, steps: int) -> None:
    drawings, prompts = write_character(folder / "pictures"), (*SUBJECT, *OTHERS)
    before = [painted(gouache.load(name, device="cpu", dtype="fp32"), prompt, seed=7) for prompt in prompts]
    rows = [before]
    for technique, settings in TECHNIQUES.items():
        own = folder / technique
        own.mkdir(exist_ok=True)
        print(technique, file=sys.stderr)
        finished = gouache.train(
            technique, folder / "pictures", model=name, output=own / FILES.get(technique, f"{CHARACTER}.safetensors"),
            folder=own / "run", steps=steps, trigger=CHARACTER, batch=2, samples={"prompts": [SUBJECT[0], OTHERS[0]]},
            on_progress=print_progress, **settings,
        )  # fmt: skip
        assert finished.path is not None
        model = gouache.load(finished.path if technique == "dreambooth" else name, device="cpu", dtype="fp32")
        if technique != "dreambooth":
            model.attach(finished.path)
        after = [painted(model, prompt, seed=7) for prompt in prompts]
        rows.append(after)
        count = len(SUBJECT)
        learnt, same = violet(after[:count]) / violet(drawings), kept(before[count:], after[count:])
        print(f"{technique}: {finished.path.stat().st_size / 1e6:.2f} MB  learnt {learnt:.2f}  kept {same:.2f}")
    sheet(prompts, [name, *TECHNIQUES], rows).save(folder / "techniques.png")


if __name__ == "__main__":
    sys.exit(main())
