"""`gouache samplers`."""

from __future__ import annotations

import json
from typing import Annotated

from typer import Option


def samplers(as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False) -> None:
    """List the samplers and schedules, with their aliases."""
    from gouache.diffusion.samplers.catalog import SAMPLERS
    from gouache.diffusion.spacing import AUTOMATIC, SPACINGS

    if as_json:
        entries = [
            {
                "name": s.name,
                "automatic": s.spacing,
                "aliases": s.aliases,
                "settings": s.knobs,
                "noise": s.uses_noise,
                "least_steps": s.least_steps,
            }
            for s in SAMPLERS
        ]
        schedules = [{"name": AUTOMATIC, "aliases": ()}, *({"name": s.name, "aliases": s.aliases} for s in SPACINGS)]
        print(json.dumps({"samplers": entries, "schedules": schedules}, indent=1))
        return
    print(f"{'sampler':20}{'default schedule':18}{'steps':11}aliases")
    for each in SAMPLERS:
        steps = f"from {each.least_steps}" if each.least_steps else ""
        print(f"{each.name:20}{each.spacing:18}{steps:11}{', '.join(each.aliases)}".rstrip())
    print("\nLMS, PLMS and DEIS need more steps the larger the guidance scale is.")
    print(f"\n{'schedule':20}aliases\n{AUTOMATIC:20}(the sampler's default schedule)")
    for spacing in SPACINGS:
        print(f"{spacing.name:20}{', '.join(spacing.aliases)}".rstrip())
