"""`gouache repaint`."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Option


def repaint(
    picture: Annotated[Path, Argument(help="A PNG that Gouache saved.", show_default=False)],
    output: Annotated[
        str | None, Option("--output", "-o", help="Where to save the new one.", show_default="nowhere")
    ] = None,
    model: Annotated[
        str | None, Option("--model", "-m", help="The model, if it has moved.", show_default="the recipe's")
    ] = None,
    init: Annotated[
        str | None, Option(help="The picture it was made from, if it has moved.", show_default="the recipe's")
    ] = None,
    mask: Annotated[str | None, Option(help="Its mask, if it has moved.", show_default="the recipe's")] = None,
    depth: Annotated[str | None, Option(help="Its depth map, if it has moved.", show_default="the recipe's")] = None,
    device: Annotated[str | None, Option(help="Another device than the recipe's.")] = None,
    allow_paths: Annotated[
        bool,
        Option(
            "--allow-paths",
            help="Open what the recipe's paths name, also if it is not what the picture was made with. Without it, a "
            "stranger's picture opens no file of yours that its maker did not have.",
        ),
    ] = False,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file given with -o.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Paint a picture again from the recipe in its file, and say whether it is identical; if not, what differs."""
    from gouache.app.repaint import repaint as service
    from gouache.app.settings import read
    from gouache.cli.output import Output
    from gouache.cli.progress import Steps

    settings = read()
    target = None if output is None else Output(output, settings.output, 1, overwrite)
    images = {name: path for name, path in (("init", init), ("mask", mask), ("depth", depth)) if path is not None}
    with Steps(1, 1) as steps:
        result = service(
            picture, settings, model=model, images=images, device=device, allow_paths=allow_paths, on_step=steps.on_step
        )
    if target is not None:
        print(target.save(result.picture, 0), file=sys.stderr)
    if as_json:
        print(
            json.dumps({"identical": result.identical, "largest_difference": result.largest, "causes": result.causes})
        )
    elif result.identical:
        print("identical")
    else:
        share = f"{result.share:.1%}" if result.share >= 0.001 else "less than 0.1%"
        print(f"differs: {share} of the pixels, by up to {result.largest} of 255 levels")
        for cause in result.causes:
            print(f"  {cause}")
    if not result.identical:
        sys.exit(1)
