"""Models in several files: diffusers folders, single components of one, and sharded weights.

    model_index.json                          names the components; each has a folder with
    unet/config.json                          its configuration and
    unet/diffusion_pytorch_model.safetensors  its weights: .safetensors or .bin, whole or in shards with an index,
                                              plain or as a variant (`.fp16.`)

Tensors of a whole folder are named `component/tensor`; those of a single component keep their names. Files that a
JSON file names are looked for in the folder of this JSON file only.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gouache.errors import DamagedFile, FileError, NotAModel, printable
from gouache.files.content import json_document
from gouache.files.record import ModelFile, Reader, TensorInfo
from gouache.files.single_file import open_file
from gouache.files.source import Source

if TYPE_CHECKING:
    import torch

# Names of a component's weights in diffusers (first) and transformers, then of a LoRA's in PEFT and diffusers.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model", "adapter_model", "pytorch_lora_weights")
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]{0,199}")


def open_folder(folder: Path, variant: str | None = None) -> ModelFile:
    """A diffusers folder, or one component of it, as a record.

    `variant` ('fp16') selects the weights of that name; a component without them uses its plain ones. Without
    `variant` the plain weights are used, and where there are none, the fp16 ones. Both substitutions are noted.
    """
    if (folder / "model_index.json").exists():
        return _open_pipeline(folder, variant)
    found = _find_weights(folder, variant)
    if found is not None:
        weights, used = found
        if variant is not None and used != variant:
            raise _no_variant(folder, variant)
        return _open_component(folder, weights, used, variant)
    here = sorted(path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".ckpt", ".pt", ".bin"))
    if here:
        raise NotAModel(
            folder, f"is a folder but not a diffusers model; open one of its files: {printable(', '.join(here))}"
        )
    raise NotAModel(folder, "is a folder without a model: it contains neither model_index.json nor weights")


def read_shards(source: Source) -> ModelFile:
    """Weights in several files, opened by their index (`*.safetensors.index.json`, `*.bin.index.json`)."""
    index, document = source.path, json_document(source)
    listed = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(listed, dict) or not listed:
        raise NotAModel(index, "lists no weights under 'weight_map'")
    names = sorted({name for name in listed.values() if isinstance(name, str)})
    for name in names:
        if not _NAME.fullmatch(name):
            raise DamagedFile(index, f"names the shard {printable(name, 60)!r}, which is not a plain file name")
    parts = {name: open_file(index.parent / name) for name in names}

    sources: dict[str, ModelFile] = {}
    for name, part in parts.items():
        for tensor in part:
            if tensor in sources:
                raise DamagedFile(index, f"tensor {printable(tensor)!r} is in two shards, the second is {name}")
            sources[tensor] = part
    for tensor, name in listed.items():
        if not isinstance(name, str) or tensor not in parts[name]:
            raise DamagedFile(
                index, f"tensor {printable(tensor)!r} is not in {printable(str(name))}, where the index lists it"
            )
    unlisted = len(sources) - len(listed)
    return ModelFile(
        path=index,
        format="sharded",
        tensors={tensor: part.tensors[tensor] for tensor, part in sources.items()},
        read=Reader(lambda name: sources[name].read(name), lambda name: sources[name].tensor(name)),
        metadata={key: value for part in parts.values() for key, value in part.metadata.items()},
        notes=(f"{_tensors(unlisted)} in its shards but not in its index",) if unlisted else (),
        files=(index, *(index.parent / name for name in names)),
    )


def _open_pipeline(folder: Path, variant: str | None) -> ModelFile:
    index = folder / "model_index.json"
    document = json_document(Source(index))
    if not isinstance(document, dict):
        raise NotAModel(index, "does not list the components of a model")
    extra: dict[str, Any] = {"model_index.json": document}
    components: dict[str, ModelFile] = {}
    notes: list[str] = []
    used_variants: set[str | None] = set()
    for name, value in document.items():
        # A component is [library, class]; [null, null] means that this model does not have it.
        if name.startswith("_") or not isinstance(value, list) or value in ([], [None, None]):
            continue
        if not _NAME.fullmatch(name):
            raise DamagedFile(index, f"names the component {printable(name, 60)!r}, which is not a plain folder name")
        part = folder / name
        if not part.is_dir():
            notes.append(f"the component {name} is listed, but its folder is missing")
            continue
        for config in sorted(part.glob("*config.json")):
            extra[f"{name}/{config.name}"] = json_document(Source(config))
        found = _find_weights(part, variant)
        if found is not None:
            weights, used = found
            used_variants.add(used)
            components[name] = _open_component(part, weights, used, variant)
            notes += [f"{name}: {note}" for note in components[name].notes]
    if not components:
        raise NotAModel(folder, "is a diffusers folder without weights: none of its components has weights")
    if variant is not None and variant not in used_variants:
        raise _no_variant(folder, variant)
    return _join_components(folder, components, extra, tuple(notes))


def _find_weights(folder: Path, variant: str | None) -> tuple[Path, str | None] | None:
    """(the weight file or shard index to open, its variant), or None if the folder has no weights."""
    for candidate in (None, "fp16") if variant is None else (variant, None):
        dotted = "" if candidate is None else f".{candidate}"
        for suffix in ("safetensors", "bin"):
            for stem in _STEMS:
                for name in (f"{stem}{dotted}.{suffix}", f"{stem}.{suffix}.index{dotted}.json"):
                    if (folder / name).exists():
                        return folder / name, candidate
    return None


def _open_component(folder: Path, weights: Path, used: str | None, variant: str | None) -> ModelFile:
    file = read_shards(Source(weights)) if weights.suffix == ".json" else open_file(weights)
    notes = file.notes
    if used != variant:
        notes = (f"uses the {used or 'plain'} weights: it has no {variant or 'plain'} ones", *notes)
    config = folder / "config.json"
    if not config.exists():
        return replace(file, path=folder, format="component folder", notes=notes)
    extra = {"config.json": json_document(Source(config))}
    return replace(file, path=folder, format="component folder", extra=extra, notes=notes, files=(config, *file.files))


def _no_variant(folder: Path, variant: str) -> FileError:
    return FileError(folder, f"has no weights of the variant {printable(variant)!r}")


def _tensors(count: int) -> str:
    return "1 tensor is" if count == 1 else f"{count} tensors are"


def _join_components(
    folder: Path, components: dict[str, ModelFile], extra: dict[str, Any], notes: tuple[str, ...]
) -> ModelFile:
    tensors: dict[str, TensorInfo] = {}
    sources: dict[str, tuple[ModelFile, str]] = {}
    for component, file in components.items():
        for name, info in file.tensors.items():
            tensors[f"{component}/{name}"] = info
            sources[f"{component}/{name}"] = (file, name)

    def read(name: str) -> torch.Tensor:
        file, inner = sources[name]
        return file.read(inner)

    def mapped(name: str) -> torch.Tensor:
        file, inner = sources[name]
        return file.tensor(inner)

    files = [folder / "model_index.json", *(path for file in components.values() for path in file.files)]
    return ModelFile(
        path=folder,
        format="diffusers folder",
        tensors=tensors,
        read=Reader(read, mapped),
        extra=extra,
        notes=notes,
        files=tuple(files),
    )
