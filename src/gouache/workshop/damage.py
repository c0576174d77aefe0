"""What is wrong with the weights themselves: looked for tensor by tensor, which takes reading them all."""

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
    """One thing that is wrong with one tensor. `serious`: it spoils what is painted; else it is only untidy."""

    tensor: str
    what: str
    serious: bool


def faults(file: ModelFile, found: Found, on_bytes: OnBytes | None = None) -> list[Fault]:
    """NaN, infinite and all-zero weights, position ids that are not 0 to 76."""
    import torch

    known = {
        source
        for component in found.components.values()
        for origin in component.origins.values()
        for source in origin.sources
    }
    results = list[Fault]()
    for name, info in file.tensors.items():
        tensor = file.tensor(name)
        shown, used = printable(name), name in known or not found.components
        if name.endswith("position_ids"):
            if not torch.equal(tensor.flatten().double(), torch.arange(info.elements, dtype=torch.float64)):
                results.append(Fault(shown, "is not 0, 1, 2, ...: merged, or cast; nothing here reads it", False))
        elif tensor.is_floating_point() and info.elements:
            values = tensor.float() if tensor.dtype.itemsize < 4 else tensor
            strange = int((~torch.isfinite(values)).sum())
            if strange:
                kind = "NaN" if bool(torch.isnan(values).any()) else "infinite"
                results.append(Fault(shown, f"has {strange} of {info.elements} numbers {kind}", used))
            elif len(info.shape) > 1 and not bool(values.any()):
                results.append(Fault(shown, "is zero throughout", used))
        if on_bytes is not None:
            on_bytes(info.nbytes)
    return results


def fingerprints(file: ModelFile, found: Found, on_bytes: OnBytes | None = None) -> dict[str, str]:
    """{component: 12 digits} that are equal where the same weights are, whatever the file's layout, in float16.

    By them a VAE or text encoder is recognised in another file.
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
