"""TAESD's files: both towers under diffusers' names, or a file for each as its author published them.

encoder.layers.0.weight       diffusers
taesd_decoder.1.weight        both in one, ComfyUI
0.weight, 1.conv.0.weight     a tower alone; the decoder's numbers are one higher, for it begins with the clamp
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_NAME = re.compile(r"(?:(?:taesd_)?(encoder|decoder)\.(?:layers\.)?)?(\d{1,3})\.((?:conv\.[024]\.)?(?:weight|bias))")
_CLAMPED = 1  # the number of the author's decoder's first convolution


def tiny_names(names: Iterable[str]) -> dict[str, str] | None:
    """{`nn.vae_tiny`'s name: the file's}; None where the names are not those of a TAESD."""
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
