"""All known families, and their lookup by name."""

from __future__ import annotations

from gouache.errors import RequestError
from gouache.families.family import Family
from gouache.families.sd import SD1, SD2
from gouache.families.sdxl import REFINER, SDXL
from gouache.families.svd import SVD

FAMILIES: tuple[Family, ...] = (SD1, SD2, SDXL, REFINER, SVD)


def family_named(name: str) -> Family:
    """The family called `name`. Raises RequestError, which lists all families, if there is none."""
    for family in FAMILIES:
        if family.name == name:
            return family
    names = ", ".join(family.name for family in FAMILIES)
    raise RequestError("family", f"{name!r} is unknown; expected one of {names}")
