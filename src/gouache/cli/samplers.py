"""`gouache samplers`."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option


def samplers(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List samplers and schedules, with the other names they answer to."""
    from gouache.diffusion.samplers.catalog import SAMPLERS
    from gouache.diffusion.spacing import AUTOMATIC, SPACINGS

    if as_json:
        listed = [
            {"name": s.name, "automatic": s.spacing, "aliases": s.aliases, "settings": s.knobs, "noise": s.uses_noise}
            for s in SAMPLERS
        ]
        schedules = [{"name": AUTOMATIC, "aliases": ()}, *({"name": s.name, "aliases": s.aliases} for s in SPACINGS)]
        print(json.dumps({"samplers": listed, "schedules": schedules}, indent=1))
        return
    print(f"{'sampler':20}{'Automatic means':18}also called")
    for each in SAMPLERS:
        print(f"{each.name:20}{each.spacing:18}{', '.join(each.aliases)}".rstrip())
    print(f"\n{'schedule':20}also called\n{AUTOMATIC}")
    for spacing in SPACINGS:
        print(f"{spacing.name:20}{', '.join(spacing.aliases)}".rstrip())
