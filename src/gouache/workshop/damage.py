"""Damaged weights, and fingerprints of components. Both read every tensor of the file."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass

from gouache.errors import printable
from gouache.families.found import Found
from gouache.files.record import ModelFile
from gouache.workshop import derive

OnBytes = Callable[[int], None]


@dataclass(frozen=True)
class Fault:
    """A defect of one tensor. `serious`: it affects pictures; otherwise it is harmless."""

    tensor: str
    what: str
    serious: bool


def faults(file: ModelFile, found: Found, on_bytes: OnBytes | None = None) -> list[Fault]:
    """NaN, infinite and all-zero weights, and position ids that are not 0 to 76."""
    import torch

    used_names = {
        source
        for component in found.components.values()
        for origin in component.origins.values()
        for source in origin.sources
    }
    results = list[Fault]()
    for name, info in file.tensors.items():
        tensor = file.tensor(name)
        shown, used = printable(name), name in used_names or not found.components
        if name.endswith("position_ids"):
            if not torch.equal(tensor.flatten().double(), torch.arange(info.elements, dtype=torch.float64)):
                what = "is not 0, 1, 2, ...: a merge or a cast changed it; Gouache does not use it"
                results.append(Fault(shown, what, False))
        elif tensor.is_floating_point() and info.elements:
            values = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            non_finite = int((~torch.isfinite(values)).sum())
            if non_finite:
                what = "NaN" if bool(torch.isnan(values).any()) else "infinite"
                results.append(Fault(shown, f"has {non_finite} of {info.elements} values {what}", used))
            elif len(info.shape) > 1 and not bool(values.any()):
                results.append(Fault(shown, "is all zeros", used))
        if on_bytes is not None:
            on_bytes(info.nbytes)
    return results


def fingerprints(file: ModelFile, found: Found, on_bytes: OnBytes | None = None) -> dict[str, str]:
    """{component: 12 hexadecimal digits}: a hash of the component's weights in float16, independent of the layout.

    It identifies the same VAE or text encoder in different files.
    """
    import torch

    prints = {}
    for component in found.components.values():
        inner = derive.arrange(file, component.origins)
        digest = hashlib.sha256()
        for name in sorted(inner):
            values = inner.read(name).to(torch.float16).contiguous()
            digest.update(name.encode() + values.view(-1).view(torch.uint8).numpy().tobytes())
            if on_bytes is not None:
                on_bytes(inner.tensors[name].nbytes)
        prints[component.name] = digest.hexdigest()[:12]
    return prints
