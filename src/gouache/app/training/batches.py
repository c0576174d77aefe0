"""The batches and the validation of a run, from its settings, its pictures and its model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import torch

from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import pretraining
from gouache.app.training.batch_changes import batch_changes
from gouache.app.training.folder import RunFolder
from gouache.app.training.objective import text_encoder
from gouache.app.training.pictures import OnNote, Pictures, buckets_of, cache_of, latents_of, read_pictures
from gouache.data import captions
from gouache.data.buckets import Buckets
from gouache.data.record import PictureOptions, Record
from gouache.data.shard_records import ShardRecords
from gouache.model.inpainting import CHANNELS as INPAINTING_CHANNELS
from gouache.prompts.chunks import chunk
from gouache.training.batch import Batch
from gouache.training.batches import Batches, Options
from gouache.training.denoising import Denoising
from gouache.training.distributed import ALONE, World
from gouache.training.latent_cache import LatentCache, identity_of
from gouache.training.run_settings import RunSettings
from gouache.training.target import Target
from gouache.training.text_cache import TextCache
from gouache.training.validation import Validation


def make_batches(
    settings: RunSettings,
    folder: RunFolder,
    model: Model,
    target: Target,
    records: Sequence[Record],
    *,
    validation: bool = False,
    on_note: OnNote | None = None,
    world: World = ALONE,
) -> Batches:
    """The batches of `records`; those of a validation are not varied, and the same with any seed and batch size.

    `on_note` receives a line for each damaged picture that is found in the stream of a large set.
    """
    data, cache = settings.data, cache_of(settings, folder)
    on_pictures, side = pretraining.trains_on_pictures(settings), pretraining.side_of_pictures(settings, model)
    if on_pictures:  # batches have the pictures themselves
        latents = LatentCache(None, "pictures", lambda picture: picture, channels=3)
    else:
        latents = LatentCache(
            latents_of(cache),
            identity_of({"vae": model.vae}, scale=model.core.vae_scale),
            model.encode,
            channels=model.unet.spec.out_channels,
        )
    texts = None
    if not target.trains_text and not on_pictures:
        identity = identity_of(model.text_encoders, clip_skip=settings.model.clip_skip)
        encode_text = text_encoder(settings, model)
        texts = TextCache(
            None if cache is None else cache / "texts", identity, lambda captions: encode_text(captions, None)
        )
    batch, changes = (settings.train.batch, ()) if validation else batch_changes(folder, settings, world.size)
    options = Options(
        buckets_of(settings, model.size) if side is None else (Buckets((side, side), 8, fixed=True),),
        batch=batch,
        changes=changes,
        seed=settings.train.seed,
        variations=1 if validation else data.cache_variations,
        inpainting=model.unet.spec.in_channels == INPAINTING_CHANNELS and not on_pictures,
        balance=not validation,
        workers=data.workers,
        device=model.device,
        window=data.window,
        on_damaged=on_note if data.stream else None,
        world=world,
    )
    if validation:
        records = [
            replace(
                each,
                repeats=1,
                caption_options=replace(
                    each.caption_options,
                    shuffle=False,
                    tag_dropout=0,
                    dropout=0,
                    dropout_every_epochs=0,
                    warmup_steps=0,
                    templates=each.caption_options.templates[:1],
                ),
                picture_options=PictureOptions(alpha_mask=each.picture_options.alpha_mask),
            )
            for each in records
        ]

    def caption(record: Record, epoch: int, generator: torch.Generator, number: int) -> str:
        generator = torch.Generator().manual_seed(0) if validation else generator
        return captions.caption(record, epoch, generator, number // settings.train.accumulate, settings.train.steps)

    def chunks(text: str) -> int:
        counts = {name: len(next(iter(vectors.values()))) for name, vectors in model.embeddings.items()}
        return len(chunk(text, model.tokenizer, counts, plain=True))

    return Batches(records, options, latents, texts, caption, model.text_recipe, chunks)


def make_validation(
    settings: RunSettings,
    folder: RunFolder,
    model: Model,
    target: Target,
    pictures: Pictures,
    objective: Denoising,
    on_note: OnNote | None = None,
) -> Validation:
    """The validation of the held-out pictures and of some of the training pictures, read into memory."""
    held_out, probe, name = validation_batches(settings, folder, model, target, pictures, on_note)
    points = settings.validation.timesteps
    return Validation(objective, held_out, probe, points, f"{points} timesteps of {name}")


def validation_batches(
    settings: RunSettings, folder: RunFolder, model: Model, target: Target, pictures: Pictures, on_note: OnNote | None
) -> tuple[list[Batch], list[Batch], str]:
    """(batches of the held-out pictures, of some of the training pictures, what identifies them)."""
    plain = pictures.training
    if not isinstance(plain, ShardRecords):
        plain = [record for record in plain if not record.regularization]
    probe = plain[:: max(1, len(plain) // max(1, settings.validation.probe))][: settings.validation.probe]

    def all_of(records: Sequence[Record]) -> tuple[list[Batch], str]:
        if not records:
            return [], ""
        with make_batches(settings, folder, model, target, records, validation=True, on_note=on_note) as batches:
            return [batches(number) for number in range(len(batches))], batches.identity

    (held_out, name), (training, name_of_training) = all_of(pictures.held_out), all_of(probe)
    return held_out, training, name or name_of_training


def measured_pictures(
    settings: RunSettings, folder: RunFolder, model: Model, target: Target, user: Settings, on_note: OnNote
) -> Callable[[], Iterator[torch.Tensor]]:
    """The pictures whose latents are measured when the autoencoder of a run is exported, read when they are needed."""

    def read() -> Iterator[torch.Tensor]:
        records = read_pictures(settings, folder, lambda line: None, user).training
        with make_batches(settings, folder, model, target, records, on_note=on_note) as batches:
            yield from pretraining.measured(batches)

    return read
