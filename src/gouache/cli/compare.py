"""`gouache compare`."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from gouache.outside import json_line


def compare(
    models: Annotated[
        list[str], Argument(metavar="MODEL", help="Two or more files, folders or names.", show_default=False)
    ],
    prompts: Annotated[Path, Option(help="A text file with one prompt per line.", show_default=False)],
    output: Annotated[
        Path | None, Option("--output", "-o", help="The folder to create.", show_default="outputs/compare-DATE")
    ] = None,
    negative: Annotated[str, Option("--negative", "-n", help="The negative prompt.")] = "",
    sampler: Annotated[str, Option(help="See `gouache samplers`.")] = "DPM++ 2M",
    schedule: Annotated[str, Option(help="The noise schedule; see `gouache samplers`.")] = "Automatic",
    steps: Annotated[int, Option(help="Number of sampling steps.")] = 25,
    cfg: Annotated[
        float | None,
        Option(help="Guidance scale: how closely to follow the prompt.", show_default="each model's own, else 7"),
    ] = None,
    seed: Annotated[int, Option(help="The first seed of each prompt.")] = 0,
    count: Annotated[int, Option(help="Pictures per prompt.")] = 1,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT.", show_default="the first model's default")] = None,
    clip: Annotated[
        Path | None, Option(help="A complete CLIP in Transformers format, to score how well pictures match prompts.")
    ] = None,
    device: Annotated[
        str | None, Option(help="cpu, cuda, cuda:1 or mps.", show_default="cuda, else mps, else cpu")
    ] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="the fastest on this machine")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Paint the same prompts and seeds with several models, on one labelled sheet with measures."""
    from gouache.app.compare import compare as service
    from gouache.app.compare import read_prompts
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import Bar
    from gouache.face import load
    from gouache.files.open import open_model

    settings = read()
    for name in models:  # report a file that cannot be opened before painting the first picture
        open_model(resolve(name, settings))
    out = output or settings.output / f"compare-{datetime.now():%Y%m%d-%H%M%S}"
    with Bar() as bar:
        measures = service(
            models, read_prompts(prompts), out, lambda name: load(name, device=device, dtype=dtype, settings=settings),
            encoder=clip, on_picture=bar.show, negative=negative, sampler=sampler, schedule=schedule, steps=steps,
            cfg=cfg, seed=seed, count=count, size=size,
        )  # fmt: skip
    if as_json:
        print(json_line({"folder": str(out), "models": [asdict(each) for each in measures]}))
        return
    for each in measures:
        print(f"{each.model}: {', '.join([f'loaded in {each.load_seconds:.1f} s', *each.texts()])}")
    print(out / "sheet.png")
