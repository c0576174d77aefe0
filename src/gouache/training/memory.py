"""The memory of a computation, found by running it on tensors that have sizes, a dtype and a device but no data."""

from __future__ import annotations

import ctypes
import gc
import os
import weakref
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Simulation:
    """Tensors without data on `device`, which need not exist: every operation on them gives such tensors at once.

    They choose the kernels of `device` and are cast by autocast as real ones are, unlike tensors on the meta device.
    Real tensors may be mixed in. A value that Python code reads from them is 1.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._mode = FakeTensorMode(allow_non_fake_inputs=True)

    def convert(self, *modules: nn.Module) -> None:
        """Replace all parameters, which may be on the meta device."""
        for module in (part for root in modules for part in root.modules()):
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    with self._mode:
                        strides, dtype = parameter.stride(), parameter.dtype
                        empty = torch.empty_strided(parameter.shape, strides, dtype=dtype, device=self.device)
                    module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)

    def fill_buffers(self, *modules: nn.Module) -> None:
        """Replace all buffers, which are small, by real ones, whose values may be read."""
        for module in (part for root in modules for part in root.modules()):
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = torch.ones(buffer.shape, dtype=buffer.dtype)

    def only(self) -> AbstractContextManager[object]:
        """Within the block all new tensors are without data."""
        return self._mode

    def empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        with self._mode:
            return torch.empty(shape, dtype=dtype, device=self.device)

    def measure(self, work: Callable[[], object]) -> tuple[int, int]:
        """(the most bytes of tensors on the device that `work` makes and holds at once, those that its result holds).

        Tensors that existed before, and the scratch memory of kernels, are not counted.
        """
        tracker = _LiveBytes(self.device)
        with tracker:
            result = work()
            gc.collect()
            kept = tracker.now
        del result
        return tracker.peak, kept


class _LiveBytes(TorchDispatchMode):
    """Counts the bytes of the storages that operations make, until the last tensor that uses one is gone."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._device = device.type
        self._known: dict[int, weakref.ref[torch.UntypedStorage]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if tensors[0].dtype == torch.bool else 1 if not tensors[0].is_floating_point() else 1.0
        inputs = {id(each.untyped_storage()) for each in tensors}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type == self._device:
                storage = tensor.untyped_storage()
                if id(storage) not in inputs and id(storage) not in self._known:
                    self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        size, key = storage.nbytes(), id(storage)

        def gone(_: object) -> None:
            self.now -= size
            del self._known[key]

        self._known[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)


_M_MMAP_THRESHOLD = -3  # of malloc.h


def limit_heap(megabytes: int) -> None:
    """Let the C library of GNU take larger tensors from the system, and return each when it is freed.

    By itself it soon keeps anything up to 32 MiB in its heap, where small tensors between them hinder their return: a
    LoRA run kept 0.5 GB more. 1 is for weights, which are there for long. For the tensors of steps it would be slow,
    since memory is mapped anew for each; they need 12. Nothing is done where the user has set the limit.
    """
    if "MALLOC_MMAP_THRESHOLD_" not in os.environ:
        with suppress(OSError, AttributeError, TypeError):  # only the C library of GNU has it
            ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, megabytes * 2**20)


def trim() -> None:
    """Return freed memory to the system or the device, where the allocator would keep it for later."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    with suppress(OSError, AttributeError, TypeError):  # only the C library of GNU has it
        ctypes.CDLL(None).malloc_trim(0)
