"""Files whose U-Net is there only as its average (EMA): the average under the names of the weights.

The names of averages have no dots (`model_ema.diffusion_modelinput_blocks11proj_inweight`). Which dots are missing
follows from the parts of a U-Net's names, of which none is ambiguous: the index in a block has one digit.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from gouache.families.found import Component, Fact, Found
from gouache.files.record import ModelFile, Reader

AVERAGE = "model_ema."
_STEM, _PREFIX = "model_ema.diffusion_model", "model.diffusion_model."
_OTHER_UNETS = (_PREFIX, "diffusion_model.", "unet/")
_HEAD = re.compile(
    r"(input_blocks|output_blocks)(\d{1,3})(\d)|(label_emb)(\d)(\d)|(time_embed|middle_block|out)(\d)"
)  # fmt: skip
_PART = re.compile(
    r"(in_layers|emb_layers|out_layers|to_out|net)(\d)|(transformer_blocks)(\d+)"
    r"|(skip_connection|proj_in|proj_out|proj|attn[12]|norm[123]|norm|to_[qkv]|ff|op|conv|weight|bias)"
)


def weight_name(average: str) -> str | None:
    """The name of the U-Net's tensor whose average is called `average`; None if it is not one of a known U-Net."""
    rest = average.removeprefix(_STEM)
    match = _HEAD.match(rest) if rest != average else None
    if match is None:
        return None
    parts = [part for part in match.groups() if part is not None]
    at = match.end()
    while at < len(rest):
        match = _PART.match(rest, at)
        if match is None:
            return None
        parts += [part for part in match.groups() if part is not None]
        at = match.end()
    return _PREFIX + ".".join(parts)


def averages_only(file: ModelFile) -> dict[str, str]:
    """{name as a weight: name of the average} if `file` has averages of a U-Net and no U-Net; else an empty mapping."""
    if any(name.startswith(_OTHER_UNETS) for name in file):
        return {}
    found = ((weight_name(name), name) for name in file if name.startswith(_STEM))
    return {weight: average for weight, average in found if weight is not None}


def as_weights(file: ModelFile) -> ModelFile:
    """`file` with its averages under the names of weights if it has no others; else `file` itself."""
    names = averages_only(file)
    if not names:
        return file
    averages = {average: weight for weight, average in names.items()}
    return replace(
        file,
        tensors={averages.get(name, name): info for name, info in file.tensors.items()},
        read=Reader(lambda name: file.read(names.get(name, name)), lambda name: file.tensor(names.get(name, name))),
    )


def with_averages(found: Found, names: Mapping[str, str]) -> Found:
    """What was found in `as_weights(file)`, for `file` itself: the U-Net's tensors come from the averages."""
    ema = Fact("only", f"the U-Net is there only as its average (EMA): {len(names)} tensors, which are used", "certain")
    return replace(
        found,
        ema=ema,
        components={name: _renamed(part, names) for name, part in found.components.items()},
        leftovers={names.get(name, name): reason for name, reason in found.leftovers.items()},
        unknown=tuple(sorted(names.get(name, name) for name in found.unknown)),
    )


def _renamed(part: Component, names: Mapping[str, str]) -> Component:
    origins = {
        name: replace(origin, sources=tuple(names.get(source, source) for source in origin.sources))
        for name, origin in part.origins.items()
    }
    return replace(part, origins=origins)
