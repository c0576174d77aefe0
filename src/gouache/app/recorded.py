"""The files that a recipe names: models, adapters and pictures, for painting a picture again.

A recipe may come from a stranger. A path in it is opened only if the file there has the hash in the recipe, so that
whoever wrote the recipe had that file already; otherwise model files are looked up in the library by hash and name.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from gouache.app import hashes, names
from gouache.app.settings import Settings
from gouache.app.sources import LibrarySource
from gouache.errors import FileError, RequestError, printable
from gouache.files.open import open_model
from gouache.generate.adapters import Kind, read_spec
from gouache.images.input_image import InputImage, input_image
from gouache.images.pixels import read_bytes

_ANYWAY = "open it anyway with --allow-paths (allow_paths=True)"


def model_path(about: Mapping[str, Any], kind: str, settings: Settings, allow_paths: bool = False) -> Path:
    """The model file or folder of a recipe's entry (`name`, `path`, `sha256`, each optional) of that `kind`.

    `allow_paths`: its path is opened whatever is there. Raises RequestError if none is found.
    """
    recorded, digest, name = (str(about.get(key) or "") for key in ("path", "sha256", "name"))
    path = Path(recorded)
    if recorded and (_has_hash(path, digest, settings) or (allow_paths and _exists(path))):
        return path
    name = name or path.stem
    if not name:
        raise RequestError(kind, "the recipe names none" + ("; name it with --model" if kind == "model" else ""))
    category = "checkpoint" if kind in ("model", "refiner") else kind
    try:
        if digest:
            return names.resolve(f"{name} [{digest}]", settings, category, setting=kind, paths=False)
    except RequestError as error:
        first = error
    else:
        first = None
    try:
        # The library's file of that name is another now, which the comparison with the picture reports.
        return names.resolve(name, settings, category, setting=kind, paths=False)
    except RequestError as error:
        error = first or error
        message = str(error).removeprefix(f"{error.setting}: ")
        if recorded:
            message += (
                f"; the recipe's path {printable(recorded)} is not a file with the recipe's hash: "
                f"{'name the model with --model, or ' if kind == 'model' else ''}{_ANYWAY}"
            )
        raise RequestError(error.setting, message) from None


def _exists(path: Path) -> bool:
    return os.path.exists(path)  # noqa: PTH110  # False for what is no possible path


def _has_hash(path: Path, digest: str, settings: Settings) -> bool:
    try:
        if digest and path.is_file():
            return hashes.sha256_of(path, settings) == digest
        return bool(digest) and path.is_dir() and hashes.sha256(open_model(path), settings) == digest
    except (FileError, OSError, ValueError):
        return False


def picture(name: str, recorded: object, digest: object, folder: Path, allow_paths: bool = False) -> InputImage:
    """The picture that a recipe gives as `name` (init, mask, depth): at its path, or of the same file name in `folder`.

    Raises RequestError if neither is the picture with the recipe's hash; with `allow_paths`, only if there is none.
    """
    if not isinstance(recorded, str) or not recorded:
        raise RequestError(name, f"was not read from a file, so it is not known; give it with --{name}")
    for path in (Path(recorded), folder / Path(recorded).name):
        try:
            data = read_bytes(path, name)
        except RequestError:
            continue
        if allow_paths or hashlib.sha256(data).hexdigest() == digest:
            return input_image(path, name)
    raise RequestError(
        name,
        f"{printable(recorded)} is not the picture that this one was made from: it was moved, changed, or is another "
        f"file; give the picture with --{name}" + ("" if allow_paths else f", or {_ANYWAY}"),
    )


class RecordedSource(LibrarySource):
    """Finds the adapter files of a recipe; `adapters` are its entries. Names that it has not are the library's."""

    def __init__(self, settings: Settings, adapters: Sequence[Mapping[str, Any]], allow_paths: bool = False) -> None:
        super().__init__(settings)
        self._adapters, self._allow_paths = adapters, allow_paths

    def find(self, kind: Kind, name: str, *, paths: bool = True) -> Path:
        for each in self._adapters:
            if each.get("kind") == kind and each.get("setting") and read_spec(kind, str(each["setting"])).name == name:
                return self._locate(each)
        return super().find(kind, name, paths=paths and self._allow_paths)

    def mentioned(self, texts: Sequence[str], widths: Mapping[str, int]) -> Mapping[str, Path]:
        used = [each for each in self._adapters if each.get("kind") == "embedding" and not each.get("setting")]
        return {str(each.get("name", "")): self._locate(each) for each in used}

    def default_strength(self, path: Path) -> float:
        """The recorded strength, because the default may have changed since."""
        for each in self._adapters:
            strength = each.get("strength")
            if (
                each.get("name") == path.stem
                and isinstance(strength, Mapping)
                and isinstance(strength.get("unet"), int | float)
            ):
                return float(strength["unet"])
        return super().default_strength(path)

    def attached_before(self) -> Iterator[tuple[Path, Mapping[str, Any], str]]:
        """(file, strength, how) of the LoRAs and hypernetworks that were attached to the model, not by the request."""
        for each in self._adapters:
            if each.get("kind") in ("lora", "hypernetwork") and not each.get("setting"):
                strength = each.get("strength")
                yield self._locate(each), strength if isinstance(strength, Mapping) else {}, str(each.get("how", ""))

    def vae(self) -> Path | None:
        """The VAE from another file, if there was one."""
        return next((self._locate(each) for each in self._adapters if each.get("kind") == "vae"), None)

    def _locate(self, used: Mapping[str, Any]) -> Path:
        return model_path(used, str(used["kind"]), self._settings, self._allow_paths)
