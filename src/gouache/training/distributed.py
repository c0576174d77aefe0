"""Several processes that train one model: what each needs to know of the others, and how they combine numbers.

`torchrun` starts the processes, on one machine or on many, and names each in its environment. `processes` connects
them and yields the `World` of this one, which is passed along. A process that was started alone has the world `ALONE`,
for which nothing here does anything.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from gouache.errors import RequestError, TrainingError, printable
from gouache.files.write import write_atomic
from gouache.training import cache_file

T = TypeVar("T")

# One process may work for long while the others wait: it paints samples, or writes the result. A process that ends is
# noticed at once, because its connections close; this limit is for machines that vanish.
TIME_LIMIT = timedelta(hours=12)
BUCKET = 1 << 23  # numbers that are sent together, 32 MB
_OF_CONNECTIONS = ("onnection closed", "onnection reset", "gloo", "NCCL")  # in messages of torch
_VARIABLES = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class World:
    """This process, number `rank` of `size`, and `local_rank` of the `local_size` on its machine.

    All processes must call the methods below in the same order. They raise TrainingError if another process has ended.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this is the process that writes files and prints."""
        return self.rank == 0

    def barrier(self) -> None:
        """Return when all processes are here."""
        self.highest(0.0)

    def highest(self, *numbers: float) -> tuple[float, ...]:
        """The highest of each number over all processes."""
        if self.size == 1:
            return numbers
        values = torch.tensor(numbers, dtype=torch.float64)  # on the CPU, so no kernel of the GPU is waited for
        _combine(lambda group: group.all_reduce(values, group.ReduceOp.MAX))
        return tuple(values.tolist())

    def any(self, flag: bool) -> bool:
        """Whether `flag` is true in one of the processes."""
        return self.highest(float(flag))[0] > 0

    def of_main(self, value: T) -> T:
        """The value that the main process passed."""
        if self.size == 1:
            return value
        values = [value]
        _combine(lambda group: group.broadcast_object_list(values, device=torch.device("cpu")))
        return values[0]

    def all_of(self, value: T) -> list[T]:
        """The values of all processes, by rank."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        _combine(lambda group: group.all_gather_object(values, value))
        return values

    def share_of(self, folder: Path) -> tuple[int, int]:
        """(number, count) of the share of this process in making the files of a folder.

        All processes share the work if all see the same folder. Otherwise those of each machine do.
        """
        if self.size == 1:
            return 0, 1
        probe = folder / self.of_main(f".gouache-shared-{secrets.token_hex(8)}")
        if self.is_main:
            cache_file.make_folder(folder)
            write_atomic(probe, b"")
        self.barrier()
        is_shared = all(self.all_of(probe.exists()))
        if self.is_main:
            probe.unlink(missing_ok=True)
        return (self.rank, self.size) if is_shared else (self.local_rank, self.local_size)

    @torch.no_grad()
    def mean(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The means of named scalars over the processes, in float32. All processes must have the same names."""
        if self.size == 1 or not values:
            return dict(values)
        stacked = torch.stack([value.detach().float() for value in values.values()])
        _combine(lambda group: group.all_reduce(stacked))
        return dict(zip(values, stacked / self.size))

    @torch.no_grad()
    def sum(self, value: Tensor) -> Tensor:
        """The sum of a tensor over the processes."""
        if self.size > 1:
            value = value.detach().clone()
            _combine(lambda group: group.all_reduce(value))
        return value

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace the gradients by their means over the processes, as DistributedDataParallel does; in float32.

        A process without a gradient of a parameter counts as one of zeros; without one in all, there is none.
        """
        if self.size == 1:
            return
        for bucket in _buckets(list(parameters)):
            # The last numbers say in how many processes each has a gradient.
            parts = [(torch.zeros_like(each) if each.grad is None else each.grad).flatten() for each in bucket]
            present = torch.tensor([each.grad is not None for each in bucket], device=bucket[0].device)
            flat = torch.cat([*(part.float() for part in parts), present.float()])
            _combine(lambda group, flat=flat: group.all_reduce(flat))
            *means, counts = flat.split([*(part.numel() for part in parts), len(bucket)])
            for parameter, mean, count in zip(bucket, means, counts.tolist()):
                if not count:
                    continue
                mean = mean.div_(self.size).view(parameter.shape)
                if parameter.grad is None:
                    parameter.grad = mean.to(parameter.dtype, copy=True)
                else:
                    parameter.grad.copy_(mean)


ALONE = World()


@contextmanager
def processes(device: str = "") -> Iterator[World]:
    """Connects the processes that torchrun started, if it started this one; yields the world of this process.

    `device` is that of the settings, such as "cpu"; empty: the best there is. Of an error that several processes have,
    or that follows from the end of another process, only the first reaches the user: the other processes end with the
    exit code 2. Raises RequestError or TrainingError if the processes cannot be connected.
    """
    found = _of_environment()
    if found.size == 1:
        yield found
        return
    if device not in ("", "cpu", "cuda"):
        raise RequestError(
            "device", f"is {printable(device, 40)}; with several processes use cuda, of which each has one GPU, or cpu"
        )
    import torch.distributed as group

    uses_cuda = torch.cuda.is_available() and device in ("", "cuda")
    if uses_cuda:
        if found.local_rank >= torch.cuda.device_count():
            raise RequestError(
                "--nproc-per-node",
                f"is {found.local_size}, but there are {torch.cuda.device_count()} GPUs; start one process for each",
            )
        torch.cuda.set_device(found.local_rank)
    try:
        group.init_process_group("cpu:gloo,cuda:nccl" if uses_cuda else "gloo", timeout=TIME_LIMIT)
    except (RuntimeError, ValueError) as error:
        problem = printable(" ".join(str(error).split()), 200)
        raise TrainingError(
            f"the processes cannot be connected through {os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}: "
            f"{problem}; start them with torchrun"
        ) from None
    try:
        yield found
        found.barrier()  # no process leaves while another needs it
    except SystemExit:
        raise
    except BaseException as error:
        if not _is_first_failure():
            raise SystemExit(2) from None
        if isinstance(error, RuntimeError) and any(word in str(error) for word in _OF_CONNECTIONS):
            raise _lost(error) from None
        raise
    # Only now: after an error the others may hang in it.
    group.destroy_process_group()


def _of_environment() -> World:
    """Raises RequestError if the variables of torchrun are incomplete."""
    numbers = [os.environ.get(name, default) for name, default in (
        ("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", os.environ.get("RANK", "0")), ("LOCAL_WORLD_SIZE", "1"),
    )]  # fmt: skip
    if numbers[1] == "1":
        return ALONE
    if missing := [name for name in _VARIABLES if name not in os.environ]:
        raise RequestError(missing[0], "is not in the environment; start several processes with torchrun")
    try:
        world = World(*map(int, numbers))
    except ValueError:
        raise RequestError("RANK", f"or WORLD_SIZE is not a number: {printable(', '.join(numbers), 80)}") from None
    if not 0 <= world.rank < world.size:
        raise RequestError("RANK", f"is {world.rank}; expected a number from 0 to WORLD_SIZE - 1, {world.size - 1}")
    return world


class LostProcess(TrainingError):
    """Another process of the run has ended, so this one cannot go on."""


def _combine(work: Callable[[Any], object]) -> None:
    """Call `work` with torch.distributed. Raises LostProcess."""
    import torch.distributed as group

    try:
        work(group)
    except RuntimeError as error:
        raise _lost(error) from None


def _lost(error: BaseException) -> LostProcess:
    problem = printable(" ".join(str(error).split()).rpartition("]")[2].strip(), 120)
    return LostProcess(
        f"another process of this run has ended ({problem}); the run can be resumed from its newest checkpoint"
    )


def _is_first_failure() -> bool:
    """Whether no other process had an error before this one."""
    import torch.distributed as group

    try:
        return group.distributed_c10d._get_default_store().add("failures", 1) == 1
    except (RuntimeError, ValueError):
        return False  # the process that kept the store has ended, with an error of its own


def _buckets(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in groups of about `BUCKET` numbers."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and sum(each.numel() for each in bucket) + tensor.numel() > BUCKET:
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
