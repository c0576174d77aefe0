"""The objective of a run from its settings, and the encoding of its captions."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence

import torch

from gouache.app import hashes, machine
from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import RequestError
from gouache.model import residency
from gouache.prompts.encode import Sizes, encode
from gouache.training.batches import Batches
from gouache.training.concept_objective import ConceptObjective, ConceptValidation
from gouache.training.concepts import Concept
from gouache.training.denoising import Denoising
from gouache.training.noise import NoiseOptions
from gouache.training.run_settings import RunSettings
from gouache.training.target import Target
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.timesteps import Timesteps


def make_objective(
    settings: RunSettings,
    model: Model,
    target: Target,
    batches: Batches,
    user: Settings,
    caption_dropout: float,
) -> Denoising:
    loss, encode_text = settings.loss, text_encoder(settings, model)
    with torch.no_grad():
        unconditional = encode_text([""], None)
    return Denoising(
        model.denoiser,
        target.networks,
        unconditional,
        settings.train.seed,
        dropout=caption_dropout,
        gamma=loss.gamma,
        weighting=loss.weighting,
        autocast=autocast_of(settings, model, user),
        data=batches.identity,
        base=base_of(model, user),
        target=target,
        encode=encode_text,
        noise=NoiseOptions(
            offset=loss.noise_offset,
            offset_random=loss.noise_offset_random,
            offset_adaptive=loss.adaptive_noise_scale,
            pyramid_iterations=loss.pyramid_iterations,
            pyramid_discount=loss.pyramid_discount,
            perturbation=loss.input_perturbation,
            perturbation_random=loss.input_perturbation_random,
        ),
        timesteps=timesteps_of(settings, len(model.schedule.sigmas)),
        v_like_loss=loss.v_like,
        distance=loss.loss,
        huber_c=loss.huber,
        huber_scale=loss.huber_scale,
        huber_schedule=loss.huber_schedule,
        prior_weight=loss.prior_weight,
        prior="frozen" if loss.prior == "model" else "pictures",
    )


def make_concept_objective(
    settings: RunSettings, model: Model, target: Target, concepts: Sequence[Concept], user: Settings
) -> ConceptObjective:
    """That of a run without pictures; all prompts are encoded now, each once."""
    assert isinstance(target, AdapterTarget)  # see `sliders.check`
    texts = list(dict.fromkeys(text for concept in concepts for text in concept.prompts))
    with torch.no_grad():
        rows = text_encoder(settings, model)(texts, None)
    return ConceptObjective(
        model.denoiser,
        target,
        concepts,
        {text: rows.rows([index]) for index, text in enumerate(texts)},
        settings.train.seed,
        size=model.size,
        batch=settings.train.batch,
        channels=model.unet.spec.out_channels,
        steps=settings.slider.denoising_steps,
        guidance=settings.slider.denoising_guidance,
        weighting=settings.loss.weighting,
        gamma=settings.loss.gamma,
        recipe=model.text_recipe,
        autocast=autocast_of(settings, model, user),
        base=base_of(model, user),
    )


def make_concept_validation(settings: RunSettings, objective: ConceptObjective) -> ConceptValidation:
    """Of some of the concepts, evenly from all of them."""
    concepts, most = objective.concepts, max(1, settings.validation.probe)
    chosen = concepts[:: -(-len(concepts) // most)]
    return ConceptValidation(objective, chosen, settings.validation.timesteps)


def timesteps_of(settings: RunSettings, levels: int) -> Timesteps:
    """Raises RequestError if the range has none of the `levels`."""
    loss = settings.loss
    first, last = round(loss.timestep_min * levels), round(loss.timestep_max * levels)
    if first >= last:
        raise RequestError(
            "loss.timestep_min",
            f"is {loss.timestep_min:g} and loss.timestep_max {loss.timestep_max:g}: none of the {levels} timesteps is "
            "between them; widen the range",
        )
    return Timesteps(loss.timesteps, shift=loss.timestep_shift, first=first, last=last)


def base_of(model: Model, user: Settings) -> str:
    """What frozen weights are: the hashes of the model file and of a VAE from another file."""
    parts = [hashes.sha256(model.file, user)]
    parts += [hashes.sha256(model.vae_file, user)] if model.vae_file is not None else []
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def autocast_of(settings: RunSettings, model: Model, user: Settings) -> bool:
    if settings.memory.autocast != "auto":
        return settings.memory.autocast == "yes"
    if model.dtype != torch.float32:
        return False
    return machine.best_dtype(model.device, model.unet.spec.channels, user) == residency.dtype("bf16")


def text_encoder(
    settings: RunSettings, model: Model
) -> Callable[[Sequence[str], Sequence[Sizes] | None], Conditioning]:
    """Encodes captions as plain text, without weights and brackets; the vector without sizes if none are given."""

    def run(texts: Sequence[str], sizes: Sequence[Sizes] | None) -> Conditioning:
        model.reload("text encoder")
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
