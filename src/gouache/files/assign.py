"""Fills a module built on the meta device with the tensors of a file: each counted, cast once, none left over.

The file's tensors become the module's parameters, without a copy where dtype and device already match (a mapped
file stays mapped). Names and shapes are compared before any tensor is read. A module is filled completely or not
at all.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gouache.errors import ModelError, printable

_SCRATCH = 1 << 18  # elements: one megabyte of float32, which stays in the processor's cache


@dataclass(frozen=True)
class AssignReport:
    """How the tensors of a file match a module's: the names that match, and the three ways to differ."""

    matched: tuple[str, ...]
    missing: tuple[str, ...]  # in the module, not in the file
    unexpected: tuple[str, ...]  # in the file, not in the module
    wrong_shape: tuple[tuple[str, tuple[int, ...], tuple[int, ...]], ...]  # name, shape in the file, shape expected

    @property
    def fits(self) -> bool:
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        """'3 missing (a, b, c), 1 with a wrong shape (w is 4x8, expected 4x9)'; empty if everything fits."""
        shapes = [
            f"{printable(name)} is {_shape_text(found)}, expected {_shape_text(expected)}"
            for name, found, expected in self.wrong_shape
        ]
        groups = (("missing", self.missing), ("unexpected", self.unexpected), ("with a wrong shape", shapes))
        return ", ".join(f"{len(names)} {what} ({_listed(names)})" for what, names in groups if names)


def compare(module: nn.Module, shapes: Mapping[str, tuple[int, ...]]) -> AssignReport:
    """Compares names and shapes of a file's tensors with those of `module`, which may be on the meta device."""
    expected = {name: tuple(tensor.shape) for name, tensor in module.state_dict(keep_vars=True).items()}
    both = [name for name in expected if name in shapes]
    tied = _tied_names(module)
    present = {name for group in tied for name in group if any(twin in shapes for twin in group)}
    return AssignReport(
        matched=tuple(name for name in both if tuple(shapes[name]) == expected[name]),
        missing=tuple(name for name in expected if name not in shapes and name not in present),
        unexpected=tuple(name for name in shapes if name not in expected),
        wrong_shape=tuple(
            (name, tuple(shapes[name]), expected[name]) for name in both if tuple(shapes[name]) != expected[name]
        ),
    )


def assign(
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    keep: Container[str] = (),
) -> AssignReport:
    """Fills `module` with `tensors`, each on `device` and, if it is floating point and not in `keep`, in `dtype`.

    `dtype` None keeps the dtypes of the file. Tensors are looked up one at a time, so a lazy mapping stays lazy and
    memory use is bounded. Weights that are tied in the module stay tied, whichever of their names the file has.
    Parameters do not require gradients afterwards. Raises ModelError if names or shapes differ, or if a tied weight
    has two different values.
    """
    shapes = {name: tuple(tensors[name].shape) for name in tensors}
    fit = compare(module, shapes)
    if not fit.fits:
        raise ModelError(f"the tensors do not fit the network ({type(module).__name__}): {fit}")

    tied = _tied_names(module)
    twins = {name: group for group in tied for name in group}
    state: dict[str, Tensor] = {}
    for name in fit.matched:
        first = next((twin for twin in twins.get(name, ()) if twin in state), None)
        if first is not None:
            if not torch.equal(tensors[name], tensors[first]):
                raise ModelError(
                    f"{printable(name)} and {printable(first)} are one tied weight, but their values differ in the file"
                )
            continue
        state[name] = cast(tensors[name], None if name in keep else dtype, device)
    for group in tied:
        source = next(name for name in group if name in state)
        state |= dict.fromkeys(group, state[source])

    module.requires_grad_(False)  # before loading: an integer tensor cannot become a parameter that requires gradients
    module.load_state_dict(state, strict=True, assign=True)
    _tie(module, tied)
    left = [name for name, tensor in (*module.named_parameters(), *module.named_buffers()) if tensor.is_meta]
    if left and torch.device(device).type != "meta":
        count = "1 tensor" if len(left) == 1 else f"{len(left)} tensors"
        raise ModelError(f"{count} of {type(module).__name__} received no value: {_listed(left)}")
    return fit


def cast(tensor: Tensor, dtype: torch.dtype | None, device: torch.device | str) -> Tensor:
    """`tensor` on `device`; if it is floating point, in `dtype`. Returns the same tensor if nothing changes."""
    target = torch.device(device)
    if dtype is None or not tensor.is_floating_point() or tensor.dtype == dtype:
        return tensor.to(target)
    if target.type != "cpu":
        return tensor.to(target).to(
            dtype
        )  # moved first: a file's dtype is the narrower to transfer, and devices cast faster
    if {tensor.dtype, dtype} == {torch.float16, torch.bfloat16} and tensor.is_contiguous():
        return _through_float32(tensor, dtype)
    return tensor.to(dtype)


def _through_float32(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Casts between fp16 and bf16 via float32, in small pieces: four times as fast as torch's direct cast."""
    result = torch.empty(tensor.shape, dtype=dtype)
    scratch = torch.empty(min(_SCRATCH, tensor.numel()), dtype=torch.float32)
    for piece, output in zip(tensor.view(-1).split(_SCRATCH), result.view(-1).split(_SCRATCH)):
        output.copy_(scratch[: piece.numel()].copy_(piece))
    return result


def _tied_names(module: nn.Module) -> list[tuple[str, ...]]:
    """The groups of names that share one parameter."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return [tuple(group) for group in names.values() if len(group) > 1]


def _tie(module: nn.Module, tied: list[tuple[str, ...]]) -> None:
    """Makes each group one parameter again; `load_state_dict(assign=True)` had made it several."""
    for first, *others in tied:
        parameter = module.get_parameter(first)
        for name in others:
            owner, _, leaf = name.rpartition(".")
            setattr(module.get_submodule(owner), leaf, parameter)


def _shape_text(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "a scalar"


def _listed(names: Sequence[str], most: int = 3) -> str:
    listed = [printable(name) for name in names[:most]]
    return ", ".join(listed) + (", ..." if len(names) > most else "")
