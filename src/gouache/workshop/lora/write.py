"""LoRAs as files: under kohya's names or PEFT's, with what readers look for in their headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from gouache.errors import ModelError, RequestError, printable
from gouache.families.found import Found
from gouache.files.write import write_safetensors
from gouache.layouts.modules import Module, kohya_names, peft_names
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.workshop import save
from gouache.workshop.modelspec import ARCHITECTURES

Specs = Mapping[str, UNetSpec | TextSpec]
Factors = tuple[Tensor, Tensor]
"""(up (out, r), down (r, in, ...)): the difference is their product."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
NAMINGS = ("kohya", "peft")


@dataclass(frozen=True)
class Made:
    """A LoRA that was written: its modules, the smallest and largest rank, the share of the difference it holds."""

    modules: int
    ranks: tuple[int, int]
    held: float
    nbytes: int
    left_out: Mapping[str, int]


def specs_of(found: Found) -> dict[str, UNetSpec | TextSpec]:
    return {name: part.spec for name, part in found.components.items() if isinstance(part.spec, UNetSpec | TextSpec)}


def check_target(target: Path, dtype: str, naming: str, overwrite: bool) -> None:
    if target.suffix.lower() != ".safetensors":
        raise RequestError("out", f"{target} does not end in .safetensors, which is what LoRAs are written as")
    if dtype not in DTYPES:
        raise RequestError("dtype", f"{dtype!r} is not known; use {', '.join(DTYPES)}")
    if naming not in NAMINGS:
        raise RequestError("naming", f"{naming!r} is not known; use {' or '.join(NAMINGS)}")
    save.refuse_existing(target, overwrite)


def write(
    parts: Mapping[Module, Factors],
    specs: Specs,
    found: Found,
    target: Path,
    dtype: str,
    naming: str,
    said: Mapping[str, str],
    held: float,
    left_out: Mapping[str, int],
) -> Made:
    family = found.family.value
    original = family is not None and family.name.startswith("sdxl")

    names = kohya_names(specs, original) if naming == "kohya" else peft_names(specs)
    more = {"modelspec.sai_model_spec": "1.0.1", "modelspec.title": target.stem}
    if family is not None and family.name in ARCHITECTURES:
        more["modelspec.architecture"] = f"{ARCHITECTURES[family.name]}/lora"
    named = {names[module]: pair for module, pair in parts.items()}
    return write_stems(named, {**more, **said}, target, dtype, None, held, left_out)


def write_stems(
    parts: Mapping[str, Factors],
    metadata: Mapping[str, str],
    target: Path,
    dtype: str,
    comment: str | None,
    held: float,
    left_out: Mapping[str, int] | None = None,
) -> Made:
    """(up, down) by the name of each module; a name with dots in it is PEFT's, and has PEFT's endings."""
    kind = DTYPES[dtype]
    tensors: dict[str, Tensor] = {}
    ranks = []
    for stem, (up, down) in parts.items():
        rank = down.shape[0]
        up = up.reshape(up.shape[0], rank, *[1] * (down.ndim - 2))
        if not (torch.isfinite(up.to(kind)).all() and torch.isfinite(down.to(kind)).all()):
            raise ModelError(f"{printable(stem)} comes out too large for {dtype}; use bf16 or fp32")
        if "." in stem:
            tensors |= {f"{stem}.lora_A.weight": down.to(kind), f"{stem}.lora_B.weight": up.to(kind)}
        else:
            tensors |= {f"{stem}.lora_down.weight": down.to(kind), f"{stem}.lora_up.weight": up.to(kind)}
            tensors[f"{stem}.alpha"] = torch.tensor(float(rank), dtype=kind)
        ranks.append(rank)
    # What described the file before does not describe it now.
    stale = ("sshs_", "modelspec.hash", "ss_network_dim", "ss_network_alpha")
    said = {key: value for key, value in metadata.items() if not key.startswith(stale)}
    if not any("." in stem for stem in parts):
        said |= {"ss_network_module": "networks.lora", "ss_network_dim": str(max(ranks)),
                 "ss_network_alpha": str(float(max(ranks)))}  # fmt: skip
    if comment is not None:
        said["ss_training_comment"] = comment
    write_safetensors(target, {name: tensor.contiguous() for name, tensor in tensors.items()}, said)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return Made(len(parts), (min(ranks), max(ranks)), held, nbytes, dict(left_out or {}))
