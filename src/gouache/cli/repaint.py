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
        Path | None, Option("--output", "-o", help="Where to save the new one.", show_default="nowhere")
    ] = None,
    model: Annotated[
        str | None, Option("--model", "-m", help="The model, if it has moved.", show_default="the recipe's")
    ] = None,
    device: Annotated[str | None, Option(help="Another device than the recipe's.")] = None,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Paint a picture again from the recipe in its file, and say whether it is identical; if not, what differs."""
    from gouache.app.repaint import repaint as service
    from gouache.app.settings import read
    from gouache.cli.progress import Steps

    with Steps(1, 1) as steps:
        result = service(picture, read(), model=model, device=device, on_step=steps.on_step)
    if output is not None:
        result.picture.save(output)
    if as_json:
        print(
            json.dumps({"identical": result.identical, "largest_difference": result.largest, "causes": result.causes})
        )
    elif result.identical:
        print("identical")
    else:
        print(f"differs: {result.share:.1%} of the pixels, by up to {result.largest} of 255 levels")
        for cause in result.causes:
            print(f"  {cause}")
    if not result.identical:
        sys.exit(1)
