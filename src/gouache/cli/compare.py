"""`gouache compare`."""

from __future__ import annotations

import json
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def compare(
    models: Annotated[
        list[str], Argument(metavar="MODEL MODEL...", help="Files, folders or names; at least two.", show_default=False)
    ],
    prompts: Annotated[Path, Option(help="A text file, a prompt a line.", show_default=False)],
    output: Annotated[
        Path | None, Option("--output", "-o", help="A new folder.", show_default="outputs/compare-DATE")
    ] = None,
    negative: Annotated[str, Option("--negative", "-n", help="What to keep out of the pictures.")] = "",
    sampler: Annotated[str, Option(help="See `gouache samplers`.")] = "DPM++ 2M",
    schedule: Annotated[str, Option(help="How the steps are spaced.")] = "Automatic",
    steps: Annotated[int, Option(help="Steps of the sampler.")] = 25,
    cfg: Annotated[float, Option(help="How closely to follow the prompt.")] = 7.0,
    seed: Annotated[int, Option(help="The first seed of each prompt.")] = 0,
    count: Annotated[int, Option(help="Pictures a prompt.")] = 1,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT.", show_default="the first model's own")] = None,
    clip: Annotated[
        Path | None, Option(help="A whole CLIP in Transformers names, to score how pictures fit prompts.")
    ] = None,
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best there is")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="the fastest measured")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Paint the same prompts and seeds with several models, into one labelled sheet with their measures."""
    from gouache.app.compare import compare as service
    from gouache.app.compare import prompts_of
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.face import load
    from gouache.files.open import open_model

    settings = read()
    for name in models:  # what cannot be opened is refused before the first picture
        open_model(resolve(name, settings))
    out = output or settings.output / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    with Bar() as bar:
        measured = service(
            models, prompts_of(prompts), out, lambda name: load(name, device=device, dtype=dtype, settings=settings),
            encoder=clip, on_picture=bar.show, negative=negative, sampler=sampler, schedule=schedule, steps=steps,
            cfg=cfg, seed=seed, count=count, size=size,
        )  # fmt: skip
    if as_json:
        print(json.dumps({"folder": str(out), "models": [asdict(each) for each in measured]}, ensure_ascii=False))
        return
    for each in measured:
        print(f"{each.model}: {', '.join([f'loaded in {each.load_seconds:.1f} s', *each.words()])}")
    print(out / "sheet.png")
