"""Batches of a data set: pictures and captions to latents and conditioning, through caches, read ahead by threads.

    number -> plan (which rows) -> examples (view, caption) -> caches, or decoded and encoded now -> `Batch`

Everything random in an example is drawn from (seed, number, place in the batch). A batch is therefore a function of its
number, whatever the number of threads, the state of the caches, and the batch that a run begins with.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import asdict, dataclass, replace
from types import TracebackType
from typing import TypeVar

import torch
from torch import Tensor

from gouache.data import pictures
from gouache.data.buckets import Buckets
from gouache.data.epochs import Plan
from gouache.data.pictures import Examined, View
from gouache.data.record import Record
from gouache.data.workers import in_order, reading_threads
from gouache.errors import RequestError
from gouache.prompts.encode import Sizes, add_sizes
from gouache.prompts.recipe import TextRecipe
from gouache.training.batch import Batch, Part, part_rows
from gouache.training.distributed import ALONE, World
from gouache.training.examples import Example, Loaded, Needs, Read
from gouache.training.inpainting import draw_mask
from gouache.training.latent_cache import LatentCache
from gouache.training.objective import step_generator
from gouache.training.rows import Row, StreamedRows, columns_of, rows_of
from gouache.training.text_cache import TextCache

T = TypeVar("T")
R = TypeVar("R")

Caption = Callable[[Record, int, torch.Generator, int], str]
"""The caption of a record in an epoch, with its random changes, in the batch of a number."""


@dataclass(frozen=True)
class Options:
    """How batches are made.

    A batch has `batch` examples; `changes` (number, batch) state from which batch on it has another number of them.
    Each picture is seen at a size of each of `buckets`, or at its own resolution. Where options of a record ask for
    random positions or colours, one of `variations` versions is used, the same ones in every run, so that they can be
    cached; so is one of as many masks per picture with `inpainting`. `balance`: as many class pictures as others
    are seen per epoch, in turn, see `data.epochs.balance`. `workers` threads read and decode ahead; with 0 that happens
    when a batch is requested. `device` is that of the batches. Pictures in shards are shuffled within `window` shards,
    see `Plan`; 0: over all. `on_damaged` receives a line for a picture that cannot be read when it is needed, which
    then counts nothing; without it that is an error. With several processes in `world`, each makes its part of every
    batch, see `Batch.part`, and its share of the caches.
    """

    buckets: tuple[Buckets, ...]
    batch: int = 1
    changes: tuple[tuple[int, int], ...] = ()
    seed: int = 0
    variations: int = 8
    inpainting: bool = False
    balance: bool = True
    workers: int = 2
    device: torch.device | str = "cpu"
    window: int = 0
    on_damaged: Callable[[str], None] | None = None
    world: World = ALONE


class Batches:
    """`batches(number)` is the batch of that number, counted from 0.

    `texts` None: a text encoder is trained, so batches have captions instead of conditioning. `caption` makes the
    caption of a record. `recipe` is the family's, for the sizes that SDXL receives.

    `chunks` is the number of chunks that a caption is encoded in; several processes need it for captions of others.

    `rows` are the pictures at their sizes, with what is known of them, `columns` some of it for all; `plan` is their
    order. `waited` is the time in seconds that callers have spent waiting for batches: for threads, disks, and encoders
    of what is not yet cached.

    Raises RequestError if there are no pictures or a file is not one.
    """

    def __init__(
        self,
        records: Sequence[Record],
        options: Options,
        latents: LatentCache,
        texts: TextCache | None,
        caption: Caption,
        recipe: TextRecipe | None = None,
        chunks: Callable[[str], int] | None = None,
    ) -> None:
        for buckets in options.buckets:
            if buckets.step % latents.factor:
                raise RequestError("bucket_step", f"is {buckets.step}; expected a multiple of {latents.factor}")
        self.options, self._latents, self._texts = options, latents, texts
        self._caption, self._recipe, self._chunks = caption, recipe, chunks
        self.waited = 0.0
        self._damaged = set[str]()
        self._pool = reading_threads(options.workers or 1)
        self._ahead: dict[int, Future[Read]] = {}
        self.rows = self._rows(records)
        self.columns = columns = columns_of(self.rows)
        self.plan = Plan(
            columns.sizes,
            columns.repeats,
            options.batch,
            lambda epoch: step_generator(_stream(options.seed, "epochs"), epoch),
            options.changes,
            columns.regularization if options.balance else (),
            columns.shards,
            options.window,
        )
        if not len(self.plan):
            raise RequestError(pictures.SETTING, "has no pictures")

    def __len__(self) -> int:
        """The number of batches per epoch."""
        return len(self.plan)

    @property
    def sizes(self) -> Sequence[tuple[int, int]]:
        """(width, height) of each picture, in pixels."""
        return self.columns.sizes

    @property
    def resolution(self) -> tuple[int, int]:
        """(width, height) of the largest buckets."""
        return self.options.buckets[-1].resolution

    def __call__(self, number: int) -> Batch:
        """The batch. Raises RequestError or TrainingError for a picture, FileError for a full disk."""
        began = time.perf_counter()
        batch = self._batch(number, self._read_ahead(number))
        self.waited += time.perf_counter() - began
        return batch

    @property
    def identity(self) -> str:
        """A hash of everything that examples depend on: pictures, captions, options, encoders; not batch and seed."""
        rows = (
            [self.rows.identity]
            if isinstance(self.rows, StreamedRows)
            else [
                {
                    **asdict(row.record),
                    "path": None,
                    "name": None,
                    "mask": None,
                    "conditioning": None,
                    "scores": None,
                    "content": row.content.digest,
                    "crop": asdict(row.crop),
                }
                for row in self.rows
            ]
        )
        others = self.options.variations, self.options.inpainting, self._latents.vae
        text = json.dumps([rows, others, self._texts.encoders if self._texts is not None else None])
        return hashlib.sha256(text.encode()).hexdigest()[:40]

    def examples(self, number: int) -> list[Example]:
        """The examples of a batch, those of all processes. Nothing is read."""
        epoch, rows = self.plan.batch(number)
        return [self._example(self.rows[row], epoch, number, place) for place, row in enumerate(rows)]

    def needs(self, numbers: Iterable[int], chunk_bytes: int = 0) -> Needs:
        """What the batches `numbers` need of the caches. A text is counted as one chunk of `chunk_bytes`."""
        examples, texts = self._distinct(numbers)
        latents, options = self._latents, self.options
        first = {example.key: example for example in examples}
        bytes_of_latents = sum(
            latents.nbytes(example.row.crop.size, mask=example.row.content.counted is not None)
            for example in first.values()
        )
        missing = sum(key not in latents for key in first)
        count = len(first)
        if options.inpainting:
            count += len(examples)
            bytes_of_latents += sum(latents.nbytes(example.row.crop.size, concat=True) for example in examples)
            missing += sum(example.hole_key not in latents for example in examples)
        absent = sum(text not in self._texts for text in texts) if self._texts is not None else 0
        return Needs(count, len(texts), bytes_of_latents, len(texts) * chunk_bytes, missing, absent)

    def prepare(self, numbers: Iterable[int], on_progress: Callable[[int, int], None] | None = None) -> None:
        """Fill the caches with all that the batches `numbers` need; afterwards these use no encoder.

        `on_progress` receives how many entries are done and how many there are. Several processes make equal shares.
        """
        examples, texts = self._distinct(numbers)
        world, folder = self.options.world, self._latents.folder
        first, step = (0, 1) if folder is None else world.share_of(folder)
        examples, texts = examples[first::step], texts[first::step]
        total = len(examples) + len(texts)
        for done, (example, loaded) in enumerate(in_order(self._pool, self._load, examples), 1):
            self._complete(example, loaded)
            if on_progress is not None:
                on_progress(done, total)
        if self._texts is not None:
            for done, text in enumerate(texts, len(examples) + 1):
                self._texts.row(text)
                if on_progress is not None:
                    on_progress(done, total)
            self._texts.flush()
        world.barrier()
        if self._texts is not None and world.size > 1:
            self._texts.find()

    def close(self) -> None:
        """End the threads and write what is only in memory."""
        self._pool.shutdown(cancel_futures=True)
        if self._texts is not None:
            self._texts.flush()

    def __enter__(self) -> Batches:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _rows(self, records: Sequence[Record]) -> Sequence[Row]:
        def examined() -> list[Examined]:
            known = self._latents.contents()
            contents = list(in_order(self._pool, lambda record: pictures.examine(record, known), records))
            self._latents.keep_contents(contents)
            return contents

        return rows_of(records, self.options.buckets, examined)

    def _example(self, row: Row, epoch: int, number: int, place: int) -> Example:
        generator = step_generator(_stream(self.options.seed, f"examples {place}"), number)
        flip = bool(torch.rand((), generator=generator) < 0.5)
        variation, hole = torch.randint(self.options.variations, (2,), generator=generator).tolist()
        caption = self._caption(row.record, epoch, generator, number)
        view = self._view(row, flip, variation)
        key = self._latents.key(row.content, view)
        if not self.options.inpainting:
            return Example(row, view, caption, key)
        return Example(row, view, caption, key, hole, self._latents.key(row.content, view, hole))

    def _view(self, row: Row, flip: bool, variation: int) -> View:
        generator = step_generator(_number(row.content.digest), variation)
        return pictures.view(row.crop, row.record.picture_options, flip, generator)

    def _distinct(self, numbers: Iterable[int]) -> tuple[list[Example], list[str]]:
        """The examples of these batches whose cached pictures differ, and their different captions."""
        examples: dict[tuple[str, str], Example] = {}
        texts: dict[str, None] = {}
        for number in numbers:
            for example in self.examples(number):
                examples.setdefault((example.key, example.hole_key), example)
                texts[example.caption] = None
        if self._texts is None:
            return list(examples.values()), []
        return list(examples.values()), list({"": None, **texts})  # "" extends captions of fewer chunks

    def _read_ahead(self, number: int) -> Read:
        if not self.options.workers:
            return self._read(number)
        wanted = range(number, number + self.options.workers + 1)
        for other in [other for other in self._ahead if other not in wanted]:
            self._ahead.pop(other).cancel()
        for each in wanted:
            if each not in self._ahead:
                self._ahead[each] = self._pool.submit(self._read, each)
        return self._ahead.pop(number).result()

    def _read(self, number: int) -> Read:
        examples, world = self.examples(number), self.options.world
        if world.size == 1:
            return Read([self._load(example) for example in examples])
        captions = tuple(example.caption for example in examples)
        # Without a row of its own, a process computes the loss of another one's with a weight of 0.
        rows = part_rows(world.rank, world.size, len(examples)) or range(1)
        part = Part(
            rows, len(examples), world.size, captions,
            tuple(map(self._chunks, captions)) if self._chunks is not None else (),
            sum(example.row.record.regularization for example in examples),
        )  # fmt: skip
        return Read([self._load(examples[row]) for row in rows], part)

    def _load(self, example: Example) -> tuple[Example, Loaded]:
        """Read the cached parts of an example, and its picture if one is missing. Called by threads."""
        latents = self._latents.read(example.key)
        concat = self._latents.read(example.hole_key) if example.hole is not None else None
        picture, damage = None, ""
        if latents is None or (example.hole is not None and concat is None):
            try:
                picture = pictures.load(example.row.record, example.row.content, example.view)
            except RequestError as error:
                if self.options.on_damaged is None:
                    raise
                damage = str(error)
        text = self._texts.read(example.caption) if self._texts is not None else None
        return example, Loaded(latents, concat, text, picture, damage)

    def _complete(self, example: Example, loaded: Loaded) -> tuple[dict[str, Tensor], Tensor | None]:
        """The latents of an example with their mask, and its concat channels; what is missing is encoded now."""
        latents, concat = loaded.latents, loaded.concat
        if loaded.damage:  # in place of the picture, with a weight of 0
            self._report(loaded.damage)
            width, height = (side // self._latents.factor for side in example.row.crop.size)
            blank = torch.zeros(self._latents.channels, height, width)
            channels = torch.zeros(1 + self._latents.channels, height, width)
            return {"latents": blank}, None if example.hole is None else channels
        if loaded.picture is not None:
            picture, mask = loaded.picture
            # It may have been made since the thread looked, for another example.
            latents = latents or self._latents.read(example.key)
            if latents is None:
                latents = dict(self._latents.make(example.key, picture, mask))
            if example.hole is not None and concat is None:
                hole = draw_mask(example.row.crop.size, step_generator(_number(example.key), example.hole))
                concat = dict(self._latents.make_concat(example.hole_key, picture, hole))
        assert latents is not None
        return latents, None if concat is None else concat["concat"]

    def _report(self, damage: str) -> None:
        if self.options.on_damaged is not None and damage not in self._damaged:
            self._damaged.add(damage)
            self.options.on_damaged(f"{damage.removeprefix(f'{pictures.SETTING}: ')}; it counts nothing in its batches")

    def _batch(self, number: int, read: Read) -> Batch:
        loaded, part, world = read.examples, read.part, self.options.world
        device, examples = self.options.device, [example for example, _ in loaded]
        records = [example.row.record for example in examples]
        entries, channels = zip(*(self._complete(*each) for each in loaded))
        latents = torch.stack([entry["latents"] for entry in entries]).to(device)
        concat = torch.stack(channels).to(device) if self.options.inpainting else None
        mask = None
        if any("mask" in entry for entry in entries):
            whole = torch.ones_like(latents[0, :1], device="cpu")
            mask = torch.stack([entry.get("mask", whole) for entry in entries]).to(device)
        # A short batch counts by its size, so that every picture counts the same.
        count = len(loaded) if part is None else len(part_rows(world.rank, world.size, part.count)) * world.size
        share = count / self.plan.full(number)
        sizes = tuple(
            Sizes(example.view.crop.size, example.view.crop.original, example.view.corner) for example in examples
        )
        conditioning = None
        if self._texts is not None:
            texts = [self._texts.row(each.caption) if known.text is None else known.text for each, known in loaded]
            chunks = max(part.chunks) if part is not None and part.chunks else 1
            conditioning = self._texts.join(texts, chunks).to(device)
            if self._recipe is not None:
                conditioning = add_sizes(conditioning, self._recipe, sizes)
            conditioning, concat = replace(conditioning, concat=concat), None
        return Batch(
            latents,
            conditioning,
            tuple(example.caption for example in examples),
            sizes,
            concat,
            torch.tensor(
                [0.0 if known.damage else each.row.record.weight * share for each, known in loaded], device=device
            ),
            mask,
            torch.tensor([record.regularization and count > 0 for record in records], device=device),
            tuple(record.name for record in records),
            tuple(example.row.content.digest for example in examples),
            part,
        )


def _number(digest: str) -> int:
    """A seed from a hash in hexadecimal."""
    return int(digest[:15], 16)


def _stream(seed: int, use: str) -> int:
    """A seed for one use of random numbers, unlike those of other uses of `seed`, such as the noise of a step."""
    return _number(hashlib.sha256(f"{use} {seed}".encode()).hexdigest())
