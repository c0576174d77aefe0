"""From settings to what the loop needs: model, target, data, objective. Everything that can be wrong is found here.

settings -> header of the model -> pictures and captions -> model -> target -> caches and batches -> objective
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from gouache.app import hashes, loading, machine, names
from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import class_pictures
from gouache.app.training.defaults import trainable
from gouache.app.training.folder import RunFolder
from gouache.data import captions, contents, folders, scores, split
from gouache.data.buckets import Buckets
from gouache.data.contents import Content
from gouache.data.dataset import DataSet
from gouache.data.record import CaptionOptions, PictureOptions, Record
from gouache.data.subset import Subset
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import RequestError, TrainingError, printable
from gouache.families.found import Found
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.model import residency
from gouache.prompts.encode import Sizes, encode
from gouache.training import checkpointing
from gouache.training.batch import Batch
from gouache.training.batches import Batches, Options
from gouache.training.denoising import Denoising
from gouache.training.latent_cache import LatentCache, identity_of
from gouache.training.mapped import to_disk
from gouache.training.noise import NoiseOptions
from gouache.training.run_settings import RunSettings
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.dropout import Rates
from gouache.training.targets.options import AdapterOptions
from gouache.training.targets.weights import WeightsOptions, WeightsTarget
from gouache.training.text_cache import TextCache
from gouache.training.timesteps import Timesteps
from gouache.training.validation import Validation
from gouache.wording import plural

OnNote = Callable[[str], None]
OnWork = Callable[[str, int, int], None]
INPAINTING_CHANNELS = 9


@dataclass(frozen=True)
class Pictures:
    """The training pictures and those held out of training, with the data set they are from."""

    dataset: DataSet
    training: Sequence[Record]
    held_out: Sequence[Record]


@dataclass(frozen=True)
class Prepared:
    """A run that is ready to begin."""

    settings: RunSettings
    model: Model
    target: AdapterTarget | WeightsTarget
    objective: Denoising
    pictures: Pictures
    batches: Batches
    validation: Validation


def read_pictures(settings: RunSettings, folder: RunFolder, on_note: OnNote) -> Pictures:
    """The pictures of a run, filtered, weighed and divided. Raises GouacheError; no weight is read."""
    data = settings.data
    if not data.folder:
        raise RequestError("data.folder", "is missing; name a folder of pictures")
    subset = Subset(
        trigger=data.trigger,
        class_word=data.class_word,
        repeats=data.repeats,
        caption_options=CaptionOptions(
            shuffle=data.shuffle,
            keep_tokens=data.keep_tokens,
            tag_dropout=data.tag_dropout,
            prefix=data.prefix,
            suffix=data.suffix,
            wildcard=data.wildcard,
        ),
        picture_options=PictureOptions(
            flip=data.flip, random_crop=data.random_crop, color=data.color, alpha_mask=data.masks == "alpha"
        ),
    )
    regularization = _class_folder(settings, folder)
    present = regularization if regularization is not None and regularization.is_dir() else None
    found = folders.read(Path(data.folder), subset, regularization=present)
    found = scores.select(found, data.filter) if data.filter else found
    found = scores.weigh(found, data.weigh) if data.weigh else found
    for note in found.notes:
        on_note(note)
    records = list(found.records)
    if data.masks == "none":
        records = [replace(record, mask=None) for record in records]
    elif masked := sum(record.mask is not None for record in records):
        on_note(f"{masked} of {len(records)} pictures have a mask; the loss is limited to its white parts")
    training, held_out = records, list[Record]()
    if amount := settings.validation.pictures or settings.validation.share:
        known = [_readable(each) for each in contents.contents([record.path for record in records], folder.contents)]
        training, held_out = split.split(records, known, amount, settings.train.seed)
        on_note(f"{len(held_out)} of {plural(len(records), 'picture')} held out for validation")
    if not training:
        raise RequestError("data.folder", f"{printable(data.folder)}: no picture is left to train on")
    return Pictures(found, training, held_out)


def _readable(content: Content | RequestError) -> Content:
    if isinstance(content, RequestError):
        raise content
    return content


def _class_folder(settings: RunSettings, folder: RunFolder) -> Path | None:
    data = settings.data
    if data.class_folder:
        return Path(data.class_folder)
    return folder.path / "class" if data.class_pictures else None


def check_model(settings: RunSettings, user: Settings) -> tuple[Path, Found]:
    """The file of the model and what its header says. Raises GouacheError if it cannot be trained."""
    path = names.resolve(settings.model.name, user)
    found = identify(
        open_model(path), prediction=settings.model.prediction or None, family=settings.model.family or None
    )
    trainable(found)
    return path, found


@contextmanager
def prepared(
    settings: RunSettings,
    folder: RunFolder,
    user: Settings,
    *,
    on_note: OnNote,
    on_work: OnWork,
    fill_caches: bool = True,
) -> Iterator[Prepared]:
    """A context manager of the run; afterwards the model is free of the target and the threads have ended.

    `fill_caches`: encode all pictures and captions that can be known now. Raises GouacheError.
    """
    check_model(settings, user)
    pictures = read_pictures(settings, folder, on_note)
    model = load_model(settings, user, on_note)
    if _paint_class(settings, folder, model, on_work):
        pictures = read_pictures(settings, folder, lambda line: None)
    target = make_target(settings, model, user)
    for note in target.notes:
        on_note(note)
    batches = make_batches(settings, folder, model, target, pictures.training)
    try:
        for network in (model.unet, *model.text_encoders.values()) if settings.memory.checkpointing else ():
            checkpointing.enable(network)
        objective = make_objective(settings, model, target, batches, user)
        validation = make_validation(settings, folder, model, target, pictures, objective)
        if fill_caches and settings.data.cache:
            _fill(settings, batches, on_work)
            encoders = () if target.trains_text else model.text_encoders.values()
            to_disk([model.vae, *encoders], folder.cache)
        yield Prepared(settings, model, target, objective, pictures, batches, validation)
    finally:
        batches.close()
        if isinstance(target, AdapterTarget):
            target.detach()


def load_model(settings: RunSettings, user: Settings, on_note: OnNote) -> Model:
    """The model in the dtype for training. Raises GouacheError, also if its file is not that of the settings."""
    chosen = settings.model
    device = settings.device or user.device
    dtype = settings.memory.dtype or None
    if dtype is None and settings.adapter.form == "none":
        dtype = "fp32"
    model = loading.load(
        chosen.name,
        device=device,
        dtype=dtype,
        prediction=chosen.prediction or None,
        family=chosen.family or None,
        vae=None if chosen.vae == "automatic" else chosen.vae,
        settings=user,
        on_note=on_note,
    )
    if chosen.sha256 and hashes.sha256(model.file, user) != chosen.sha256:
        raise TrainingError(
            f"{printable(str(model.file.path))} is not the model that the run began with: its SHA-256 is another; name "
            "that file in model.name, or start a new run"
        )
    for network in (model.unet, model.vae, *model.text_encoders.values()):
        network.requires_grad_(False)
    if chosen.zero_terminal_snr:
        model.core.schedule = model.schedule.zero_terminal_snr()
    return model


def _paint_class(settings: RunSettings, folder: RunFolder, model: Model, on_work: OnWork) -> int:
    """Paint the missing pictures of the class; returns how many there were."""
    data, where = settings.data, _class_folder(settings, folder)
    if where is None or not data.class_pictures or settings.loss.prior == "none":
        return 0
    if not data.class_word:
        raise RequestError("data.class_word", "is missing: it says what the class pictures show")
    return class_pictures.paint_missing(
        model, data.class_word, data.class_pictures, where, sides(settings, model)[-1],
        lambda done, total: on_work("painting class pictures", done, total),
    )  # fmt: skip


def sides(settings: RunSettings, model: Model) -> list[tuple[int, int]]:
    """The resolutions of training, as (width, height)."""
    return [(side, side) for side in settings.data.resolution] or [model.size]


def make_target(settings: RunSettings, model: Model, user: Settings) -> AdapterTarget | WeightsTarget:
    """What is trained. Raises RequestError or ModelError if the model has no such parts."""
    chosen, parts = settings.adapter, settings.parts
    encoders = list(model.text_encoders)
    trained = (*(["unet"] if parts.unet else []), *(encoders if parts.text_encoder else []))
    if not trained:
        raise RequestError("parts", "names nothing to train; set unet or text_encoder to true")
    rates = dict.fromkeys(encoders, parts.text_rate) if parts.text_encoder else {}
    if parts.text_rate_2 and len(encoders) > 1 and parts.text_encoder:
        rates[encoders[1]] = parts.text_rate_2
    stops = dict.fromkeys(encoders, parts.text_stop * settings.train.accumulate) if parts.text_stop else {}
    stops = {name: stop for name, stop in stops.items() if name in trained}
    if chosen.form == "none":
        channels = INPAINTING_CHANNELS if settings.model.inpainting else 0
        return WeightsTarget(
            model,
            WeightsOptions(trained, rates, stops, settings.model.weights, channels, settings.loss.prior == "model"),
        )
    if settings.model.inpainting and model.unet.spec.in_channels != INPAINTING_CHANNELS:
        raise RequestError(
            "model.inpainting",
            f"{printable(settings.model.name)} has {model.unet.spec.in_channels} input channels; train its weights "
            "(adapter.form = none), or a LoRA of an inpainting model",
        )
    options = AdapterOptions(
        form=chosen.form,
        parts=trained,
        modules={"attention": "attention", "linear": None, "all": "all"}[chosen.modules],
        norms=chosen.modules == "all" and chosen.form == "full",
        rank=chosen.rank,
        alpha=chosen.alpha or None,
        conv_rank=chosen.conv_rank or None,
        conv_alpha=chosen.conv_alpha or None,
        ranks=chosen.ranks,
        alphas=chosen.alphas,
        rates=rates,
        loraplus=chosen.plus_ratio,
        dropouts=Rates(chosen.module_dropout, chosen.rank_dropout, chosen.dropout),
        stop_after=stops,
    )
    start = open_model(names.resolve(chosen.start, user, "lora", "adapter.start")) if chosen.start else None
    return AdapterTarget(model, options, seed=settings.train.seed, start=start)


def make_batches(
    settings: RunSettings,
    folder: RunFolder,
    model: Model,
    target: AdapterTarget | WeightsTarget,
    records: Sequence[Record],
    *,
    validation: bool = False,
) -> Batches:
    """The batches of `records`; those of a validation are not varied."""
    data = settings.data
    cache = (Path(data.cache_folder) if data.cache_folder else folder.cache) if data.cache else None
    latents = LatentCache(
        None if cache is None else cache / "latents",
        identity_of({"vae": model.vae}, scale=model.core.vae_scale),
        model.encode,
        channels=model.unet.spec.out_channels,
    )
    texts = None
    if not target.trains_text:
        identity = identity_of(model.text_encoders, clip_skip=settings.model.clip_skip)
        encode_text = text_encoder(settings, model)
        texts = TextCache(
            None if cache is None else cache / "texts", identity, lambda captions: encode_text(captions, None)
        )
    buckets = tuple(
        Buckets(size, data.bucket_step, data.bucket_min or None, data.bucket_max or None, data.upscale)
        for size in sides(settings, model)
    )
    options = Options(
        buckets,
        batch=settings.train.batch,
        seed=settings.train.seed,
        variations=1 if validation else data.cache_variations,
        inpainting=model.unet.spec.in_channels == INPAINTING_CHANNELS,
        balance=not validation,
        workers=data.workers,
        device=model.device,
    )
    if validation:
        plain = CaptionOptions(prefix=data.prefix, suffix=data.suffix)
        records = [
            replace(each, repeats=1, caption_options=plain, picture_options=PictureOptions()) for each in records
        ]
    return Batches(records, options, latents, texts, captions.caption, model.text_recipe)


def make_validation(
    settings: RunSettings,
    folder: RunFolder,
    model: Model,
    target: AdapterTarget | WeightsTarget,
    pictures: Pictures,
    objective: Denoising,
) -> Validation:
    """The validation of the held-out pictures and of some of the training pictures, read into memory."""
    plain = [record for record in pictures.training if not record.regularization]
    probe = plain[:: max(1, len(plain) // max(1, settings.validation.probe))][: settings.validation.probe]

    def all_of(records: Sequence[Record]) -> list[Batch]:
        if not records:
            return []
        with make_batches(settings, folder, model, target, records, validation=True) as batches:
            return [batches(number) for number in range(len(batches))]

    return Validation(objective, all_of(pictures.held_out), all_of(probe), settings.validation.timesteps)


def text_encoder(
    settings: RunSettings, model: Model
) -> Callable[[Sequence[str], Sequence[Sizes] | None], Conditioning]:
    """Encodes captions as plain text, without weights and brackets; the vector without sizes if none are given."""

    def run(texts: Sequence[str], sizes: Sequence[Sizes] | None) -> Conditioning:
        return encode(
            texts,
            model.tokenizer,
            model.text_encoders,
            model.text_recipe,
            clip_skip=settings.model.clip_skip or None,
            sizes=sizes,
            pooled_only=True,
            emphasis="none",
            embeddings=model.embeddings,
            device=model.device,
        )

    return run


def make_objective(
    settings: RunSettings, model: Model, target: AdapterTarget | WeightsTarget, batches: Batches, user: Settings
) -> Denoising:
    loss, encode_text = settings.loss, text_encoder(settings, model)
    with torch.no_grad():
        unconditional = encode_text([""], None)
    levels = len(model.schedule.sigmas)
    return Denoising(
        model.denoiser,
        target.networks,
        unconditional,
        settings.train.seed,
        dropout=settings.data.caption_dropout,
        gamma=loss.gamma,
        weighting=loss.weighting,
        autocast=_autocast(settings, model, user),
        data=batches.identity,
        base=base_of(model, user),
        target=target,
        encode=lambda texts, sizes: encode_text(texts, sizes),
        noise=NoiseOptions(
            offset=loss.noise_offset,
            offset_random=loss.noise_offset_random,
            offset_adaptive=loss.adaptive_noise_scale,
            pyramid_iterations=loss.pyramid_iterations,
            pyramid_discount=loss.pyramid_discount,
            perturbation=loss.input_perturbation,
        ),
        timesteps=Timesteps(
            loss.timesteps,
            shift=loss.timestep_shift,
            first=round(loss.timestep_min * levels),
            last=round(loss.timestep_max * levels),
        ),
        v_like_loss=loss.v_like,
        distance=loss.loss,
        huber_c=loss.huber,
        huber_schedule=loss.huber_schedule,
        prior_weight=loss.prior_weight,
        prior="frozen" if loss.prior == "model" else "pictures",
    )


def base_of(model: Model, user: Settings) -> str:
    """What frozen weights are: the hashes of the model file and of a VAE from another file."""
    parts = [hashes.sha256(model.file, user)]
    parts += [hashes.sha256(model.vae_file, user)] if model.vae_file is not None else []
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _autocast(settings: RunSettings, model: Model, user: Settings) -> bool:
    if settings.memory.autocast != "auto":
        return settings.memory.autocast == "yes"
    if model.dtype != torch.float32:
        return False
    return machine.best_dtype(model.device, model.unet.spec.channels, user) == residency.dtype("bf16")


def _fill(settings: RunSettings, batches: Batches, on_work: OnWork) -> None:
    """Encode what the run will need, one epoch or at most all its steps, so that the encoders are not needed later."""
    count = min(settings.train.steps * settings.train.accumulate, len(batches) * 8)
    batches.prepare(range(count), lambda done, total: on_work("encoding pictures and captions", done, total))
