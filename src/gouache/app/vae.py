"""Which autoencoder a checkpoint uses: the one the user names, else the one that fits it best."""

from __future__ import annotations

import contextlib
import os
import sqlite3
from dataclasses import dataclass
from pathlib import Path

from gouache.app import names
from gouache.app.search_paths import candidates
from gouache.app.settings import DATABASE, Settings
from gouache.errors import GouacheError, ModelError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.generate.adapters import AUTOMATIC, OWN
from gouache.nn.spec import VaeSpec

SIBLINGS = (".vae.safetensors", ".vae.pt", ".vae.ckpt")
# Of several that fit, files with these names come first: their authors recommend them for the family.
_PREFERRED = {"sd1": ("ft-mse", "ft-ema"), "sd2": ("ft-mse", "ft-ema"), "sdxl": ("sdxl_vae", "sdxl-vae", "sdxl")}


@dataclass(frozen=True)
class Chosen:
    """`path` None: the checkpoint's own. `note`: what the user should know about the choice, "" for nothing.

    `replaceable`: if its weights turn out to be damaged, another may be used.
    """

    path: Path | None
    note: str = ""
    replaceable: bool = False


def choose_vae(file: ModelFile, found: Found, wanted: str | None, settings: Settings) -> Chosen:
    """The autoencoder for `file`. `wanted`: a name or path, "none" for its own, None or "automatic" to choose.

    Raises ModelError if it has none and the library has none that fits.
    """
    if wanted is not None and wanted.lower() not in (AUTOMATIC, OWN):
        return Chosen(names.resolve(wanted, settings, "vae"))
    if wanted is not None and wanted.lower() == OWN:
        return Chosen(None)
    path = file.path
    if (noted := _noted(path, settings)) is not None:
        return Chosen(noted, f"using {noted.name}, which the library notes for {path.name}")
    for ending in SIBLINGS:
        sibling = path.with_name(path.stem + ending)
        if not path.is_dir() and sibling.is_file():
            return Chosen(sibling, f"using {sibling.name}, which is next to {path.name}")
    is_model = found.kind.value in ("checkpoint", "diffusers folder") and "unet" in found.components
    if "vae" not in found.components and is_model:
        reason = found.missing.get("vae", "none is in the file")
        return replacement(found, f"{printable(str(path))} has no usable VAE ({reason})", settings)
    return Chosen(None, replaceable=True)


def replacement(found: Found, trouble: str, settings: Settings) -> Chosen:
    """The library's autoencoder for a checkpoint whose own cannot be used. Raises ModelError if there is none."""
    other = _fitting(found, settings)
    if other is None:
        family = found.family.value
        raise ModelError(
            f"{trouble}, and no VAE for {family.title if family else 'it'} is in the "
            f"model folders; give one with --vae FILE"
        )
    return Chosen(other, f"{trouble}; using {other.name} instead")


def _noted(path: Path, settings: Settings) -> Path | None:
    """What the user noted for this checkpoint, `gouache models set NAME --vae FILE`.

    Read without SQLAlchemy, whose import alone would take a tenth of a small picture's time.
    """
    database = settings.data / DATABASE
    if not database.is_file():
        return None
    ask = "SELECT about.vae FROM about JOIN file ON file.sha256 = about.sha256 WHERE file.path = ? AND about.vae != ''"
    try:
        with contextlib.closing(sqlite3.connect(f"{database.as_uri()}?mode=ro", uri=True, timeout=5)) as connection:
            row = connection.execute(ask, (os.fsencode(path.resolve()),)).fetchone()
            row = row or connection.execute(ask, (os.fsencode(path),)).fetchone()
    except sqlite3.Error:  # of an older Gouache, or damaged; the library's own commands say so
        return None
    return Path(row[0]) if row is not None and Path(row[0]).exists() else None


def _fitting(found: Found, settings: Settings) -> Path | None:
    """The first autoencoder of the library that goes with the family, the usual ones before others."""
    family = found.family.value
    if family is None:
        return None
    preferred = _PREFERRED.get(family.name, ())
    fitting = list[Path]()
    for candidate in candidates(settings):
        if candidate.category not in ("vae", "") or candidate.path.is_dir():
            continue
        try:
            other = identify(open_model(candidate.path))
        except GouacheError:
            continue
        vae = other.components.get("vae")
        known = family.spec("vae")
        if other.kind.value != "vae" or vae is None or not isinstance(vae.spec, VaeSpec):
            continue
        if not isinstance(known, VaeSpec) or vae.spec.latent_channels == known.latent_channels:
            fitting.append(candidate.path)
    ranked = sorted(
        fitting, key=lambda path: min([preferred.index(p) for p in preferred if p in path.name.lower()] or [9])
    )
    if family.name == "sdxl":  # whose latents the autoencoders of SD1 and SD2 have the shape of, and do not fit
        ranked = [path for path in ranked if "xl" in path.name.lower()]
    else:
        ranked = [path for path in ranked if "xl" not in path.name.lower()]
    return ranked[0] if ranked else None
