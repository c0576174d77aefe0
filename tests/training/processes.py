"""Runs in several processes connected by gloo, and the parts of batches that each of them has."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.schedule import Schedule
from gouache.training import sharding
from gouache.training.batch import Batch, Part, part_rows
from gouache.training.denoising import Denoising
from gouache.training.distributed import World, processes
from gouache.training.loop import Batches, train
from gouache.training.objective import step_generator

from .runs import Net, captioned, denoising, seeded
from .toys import Regression, denoiser_factory, linear, points, settings

STEPS = 20


def in_processes(work: Callable[..., None], folder: Path, *arguments: Any, size: int = 2) -> list[int | None]:
    """Call `work(world, folder, *arguments)` in `size` new processes; returns their exit codes.

    What they print on stderr is appended to the file `errors` in `folder`.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("spawn")
    started = [
        context.Process(target=_run, args=(work, rank, size, port, (folder, *arguments))) for rank in range(size)
    ]
    for each in started:
        each.start()
    for each in started:
        each.join(120)
        if each.is_alive():
            each.kill()
    return [each.exitcode for each in started]


def _run(work: Callable[..., None], rank: int, size: int, port: int, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    errors = os.open(arguments[0] / "errors", os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(errors, 2)
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    with processes("cpu") as world:
        work(world, *arguments)


def part_of(batch: Batch, world: World) -> Batch:
    """The rows of a process, as `training.batches` chooses and weights them."""
    if world.size == 1:
        return batch
    count = len(batch)
    own = part_rows(world.rank, world.size, count)
    rows = own or range(1)
    index = slice(rows.start, rows.stop)
    assert batch.weights is not None and batch.mask is not None and batch.regularization is not None
    return replace(
        batch,
        latents=batch.latents[index],
        captions=batch.captions[index],
        sizes=batch.sizes[index],
        weights=batch.weights[index] * len(own) * world.size / count,
        mask=batch.mask[index],
        regularization=batch.regularization[index] & bool(own),
        names=batch.names[index],
        part=Part(rows, count, world.size, batch.captions, (), int(batch.regularization.sum())),
    )


def start(name: str, world: World) -> tuple[Any, Batches, dict[str, Any]]:
    """(objective, batches of this process, settings) of the run `name`."""
    if name == "regression":

        def rows(number: int) -> Any:
            return tuple(each.chunk(world.size)[world.rank] for each in points(number))

        return Regression(linear()), rows, {"accumulate": 2, "ema_decay": 0.9, "clip_norm": 0.1}
    if name == "pieces":
        net = seeded(Net())
        objective = Denoising(
            denoiser_factory(net, Schedule.scaled_linear(), "v"), {"unet": net}, Conditioning(torch.zeros(1, 2, 6)),
            seed=4, dropout=0.3, base="toy",
        )  # fmt: skip
        net.rate = 1.0

        def conditioned(number: int) -> Batch:
            context = torch.randn(len(captioned(number)), 2, 6, generator=step_generator(6, number))
            batch = part_of(captioned(number), world)
            own = slice(None) if batch.part is None else batch.part.own
            return replace(batch, conditioning=Conditioning(context[own]))

        return objective, conditioned, {"ema_decay": 0.9, "keep": 9, "clip_norm": 0.05, "accumulate": 2}
    objective, _ = denoising()
    # The gradient of a frozen prior is 0 at first, apart from rounding, which Adam would divide by its own size.
    values = {"ema_decay": 0.9, "keep": 9, "optimizer_arguments": {"eps": 1e-3}}
    return objective, lambda number: part_of(captioned(number), world), values


def go(world: World, name: str, folder: Path, steps: int = STEPS, **changed: Any) -> None:
    """Begin or resume the run `name` in `folder`, up to step `steps` of `STEPS`."""
    objective, batches, values = start(name.removeprefix("sharded "), world)
    if name.startswith("sharded ") and world.size > 1:
        sharding.shard(objective.networks.values(), world)
    chosen = settings(**{"steps": STEPS, "schedule": "cosine", "warmup": 3, "log_steps": 1, **values, **changed})
    done = 0

    def should_stop() -> bool:  # only one process is asked to
        nonlocal done
        done += 1
        return world.rank == world.size - 1 and steps < STEPS and done > steps

    train(objective, batches, chosen, folder, should_stop=should_stop, world=world, on_note=lambda line: None)


def go_all(world: World, folder: Path) -> None:
    """All runs of the tests, each in a folder of its own in `folder`; at last one process has an error."""
    go(world, "regression", folder / "regression")
    go(world, "denoising", folder / "denoising")
    go(world, "denoising", folder / "two then one", 8)
    go(world, "denoising", folder / "one then two")
    go(world, "sharded pieces", folder / "sharded")
    go(world, "sharded pieces", folder / "sharded then one", 8)
    go(world, "sharded pieces", folder / "one then sharded")
    assert world.highest(float(world.rank), 2.0) == (1.0, 2.0)
    assert world.of_main(world.rank) == 0 and world.all_of(world.rank) == [0, 1]
    caches(world, folder / "cache")
    stop_one(world, folder / "stopped")
    fail_in_one(world, folder / "failed")


def caches(world: World, folder: Path) -> None:
    """Each process makes its share of the caches and counts what it encodes."""
    from .data_sets import Encoders, batches, data_set

    encoders = Encoders()
    if world.is_main:
        (folder / "pictures").mkdir(parents=True)
        data_set(folder / "pictures")
    world.barrier()
    records = data_set_of(folder / "pictures")
    with batches(records, folder / "entries", encoders, world=world) as source:
        source.prepare(range(len(source)))
        made = len(encoders.pictures), len(encoders.texts)
        for number in range(len(source)):
            source(number)
        assert (len(encoders.pictures), len(encoders.texts)) == made
    (folder / f"made by {world.rank}").write_text(" ".join(map(str, made)))


def data_set_of(folder: Path) -> list[Any]:
    from gouache.data.record import Record

    return [Record(path, path.name, (f"one, two, number {path.stem}",)) for path in sorted(folder.glob("*.png"))]


def fail_in_one(world: World, folder: Path) -> None:
    """The second process has an error in step 3; the first would go on for long."""
    objective, batches, _ = start("regression", world)

    def broken(number: int) -> Any:
        if number == 3 and world.rank == 1:
            raise ValueError("broken")
        return batches(number)

    train(objective, broken, settings(steps=100_000), folder, world=world)


def stop_one(world: World, folder: Path) -> None:
    """Ctrl-C reaches one process only."""
    objective, batches, _ = start("regression", world)

    def interrupted(number: int) -> Any:
        if number == 5 and world.rank == 1:
            signal.raise_signal(signal.SIGINT)
        return batches(number)

    result = train(objective, interrupted, settings(steps=100_000), folder, world=world)
    (folder / f"signal {world.rank}").write_text(f"{result.step} {result.signal}")
