"""Tensor names of TAESD: encoder and decoder in one file, or one file for each as its author published them.

encoder.layers.0.weight       diffusers, both in one file
taesd_decoder.1.weight        ComfyUI, both in one file
0.weight, 1.conv.0.weight     encoder or decoder only; the decoder's numbers are one higher because of its clamp layer
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.(?:layers\.)?)?(\d{1,3})\.((?:conv\.[024]\.)?(?:weight|bias))")
_CLAMPED = 1  # number of the decoder's first convolution in the author's file, after the clamp


def tiny_names(names: Iterable[str]) -> dict[str, str] | None:
    """{name in `nn.vae_tiny`: name in the file}; None if the names are not those of a TAESD."""
    names = list(names)
    matches = {name: _NAME.fullmatch(name) for name in names}
    if not names or None in matches.values() or not any(".conv." in name for name in names):
        return None
    found: dict[str, str] = {}
    bare = min(int(match[2]) for match in matches.values() if match is not None)
    for name, match in matches.items():
        assert match is not None
        tower = match[1] or ("decoder" if bare == _CLAMPED else "encoder")
        shift = _CLAMPED if tower == "decoder" and ".layers." not in name else 0
        found[f"{tower}.layers.{int(match[2]) - shift}.{match[3]}"] = name
    return found
