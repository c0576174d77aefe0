"""Names without the wrappers that PyTorch and training scripts put around a model.

    module.NAME                 torch.nn.DataParallel, if all names begin with it
    a._orig_mod.b               torch.compile, anywhere in a name
    state_dict.NAME, model.NAME, ...   a model inside a dictionary or a list, if all names begin with it

A wrapper is removed only where it is around everything, so that no two tensors can get one name.
"""

from __future__ import annotations

import re
from dataclasses import replace

from gouache.files.record import ModelFile, Reader

# `model.` alone is also the first word of the original names of a U-Net.
_AROUND_ALL = re.compile(r"(?:module|state_dict|model_state_dict|ema_state_dict|model|net|network|params|weights|\d)\.")
_KNOWN = re.compile(r"model\.diffusion_model\.|\d+\.[01]\.linear|\d+\.(?:weight|bias|conv\.)|model\.\d")
_COMPILED = re.compile(r"(?:^|(?<=[./]))_orig_mod\.")
_MOST = 8  # wrappers around wrappers


def unwrapped(file: ModelFile) -> ModelFile:
    """`file` with the names that its model has without wrappers; `file` itself if there are none."""
    compiled = any("_orig_mod." in name for name in file)
    names = {name: _COMPILED.sub("", name) if compiled else name for name in file}
    removed = ["_orig_mod."] if compiled and any(name != plain for name, plain in names.items()) else []
    for _ in range(_MOST):
        first = next(iter(names.values()), "")
        match = _AROUND_ALL.match(first)
        if match is None or any(_KNOWN.match(name) for name in names.values()):
            break
        if not all(name.startswith(match[0]) and len(name) > len(match[0]) for name in names.values()):
            break
        names = {name: plain.removeprefix(match[0]) for name, plain in names.items()}
        removed.append(match[0])
    if not removed or len(set(names.values())) != len(names):
        return file
    stored = {plain: name for name, plain in names.items()}
    note = f"its tensor names are read without {' and '.join(dict.fromkeys(removed))}, which a wrapper added"
    return replace(
        file,
        tensors={plain: file.tensors[name] for plain, name in stored.items()},
        read=Reader(lambda name: file.read(stored[name]), lambda name: file.tensor(stored[name])),
        notes=(*file.notes, note),
    )
