"""The objectives of pretraining an autoencoder and a text encoder, on batches of pictures with captions.

Their batches have pictures (B, 3, H, W) in [-1, 1] where those of latent diffusion have latents. A batch counts by the
mean weight of its pictures.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.model.clip import DEVIATION, MEAN
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.training.autoencoder import Pictures, Reconstruction, psnr
from gouache.training.batch import Batch
from gouache.training.contrastive import Temperature
from gouache.training.objective import Group, Json, by_decay, step_generator
from gouache.training.pretraining.adversary import Adversary
from gouache.training.pretraining.features import RandomFeatures


@dataclass(frozen=True)
class AutoencoderObjective:
    """The loss of `reconstruction`, a perceptual distance with the weight `perceptual`, and an adversary, if any.

    `data`, `base` and `validation` identify the data, the initial weights and the validation, as in `Denoising`.
    """

    reconstruction: Reconstruction
    features: RandomFeatures
    perceptual: float = 0.0
    adversary: Adversary | None = None
    data: str | None = None
    base: str | None = None
    validation: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset(
        {"kl", "structure", "perceptual", "adversary_weight", "adversary_start", "autocast", "data", "validation"}
    )

    @property
    def autocast(self) -> bool:
        return self.reconstruction.autocast

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        vae: dict[str, nn.Module] = {"vae": self.reconstruction.vae}
        return vae if self.adversary is None else {**vae, "discriminator": self.adversary.discriminator}

    def parameter_groups(self) -> list[Group]:
        return by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        adversary = self.adversary
        return {
            **self.reconstruction.config(),
            "type": "autoencoder",
            "perceptual": self.perceptual,
            "adversary": adversary is not None,
            "adversary_weight": 0.0 if adversary is None else adversary.weight,
            "adversary_start": 0 if adversary is None else adversary.start,
            "data": self.data,
            "base": self.base,
            "validation": self.validation,
        }

    def losses(self, batch: Batch, number: int) -> Mapping[str, Tensor]:
        inner, images = self.reconstruction, batch.latents
        decoded, kl = inner.decoded(Pictures(images), step_generator(inner.seed, number))
        terms = self._terms(decoded, images, kl)
        loss = terms["loss"]
        if self.adversary is not None:
            # Compared with the reconstruction alone: the KL does not reach the last layer of the decoder.
            added, of_adversary = self.adversary.losses(
                images, decoded, loss, inner.vae.decoder.conv_out.weight, number
            )
            loss, terms = loss + added, {**terms, **of_adversary}
        return {**terms, "loss": loss * _weight(batch)}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """Mean losses of reconstructions from the means of latents, without the adversary, and their "psnr" in dB."""
        sums = dict[str, float]()
        count = sum(len(batch) for batch in batches)
        for batch in batches:
            decoded, kl = self.reconstruction.decoded(Pictures(batch.latents), None)
            terms = self._terms(decoded, batch.latents, kl)
            terms["psnr"] = psnr(decoded, batch.latents).mean()
            for name, value in terms.items():
                sums[name] = sums.get(name, 0.0) + float(value) * len(batch)
        return {name: value / max(1, count) for name, value in sums.items()}

    def _terms(self, decoded: Tensor, images: Tensor, kl: Tensor) -> dict[str, Tensor]:
        terms = self.reconstruction.terms(decoded, images, kl)
        if self.perceptual:
            terms["perceptual"] = self.features.distance(decoded, images)
            terms["loss"] = terms["loss"] + self.perceptual * terms["perceptual"]
        return terms


Tokenize = Callable[[Sequence[str]], Tensor]
"""Captions to tokens (B, N) with begin and end."""


@dataclass(frozen=True)
class TextObjective:
    """The contrast of captions and pictures. The picture tower and the temperature are trained with the text encoder.

    Pictures are normalised as CLIP's, so that the tower's usual preprocessing fits it. A caption that several pictures
    of a batch have counts as right for each of them.
    """

    text: ClipText
    vision: ClipVision
    temperature: Temperature
    tokenize: Tokenize
    autocast: bool = False
    data: str | None = None
    base: str | None = None
    validation: str | None = None

    changeable: ClassVar[frozenset[str]] = frozenset({"autocast", "data", "validation"})

    @property
    def networks(self) -> Mapping[str, nn.Module]:
        return {"text_encoder": self.text, "vision": self.vision, "temperature": self.temperature}

    def parameter_groups(self) -> list[Group]:
        return by_decay(self.networks)

    def config(self) -> Mapping[str, Json]:
        return {
            "type": "contrast",
            "vision": json.dumps(vars(self.vision.spec)),
            "autocast": self.autocast,
            "data": self.data,
            "base": self.base,
            "validation": self.validation,
        }

    def losses(self, batch: Batch, number: int) -> Mapping[str, Tensor]:
        losses = self._losses(*self._features(batch), batch.captions)
        return {**losses, "loss": losses["loss"] * _weight(batch)}

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch]) -> dict[str, float]:
        """The loss and the "accuracy" of retrieval among the pictures of all `batches`."""
        captions = [caption for batch in batches for caption in batch.captions]
        features = [self._features(batch) for batch in batches]
        texts, images = (torch.cat(each) for each in zip(*features, strict=True))
        return {name: float(value) for name, value in self._losses(texts, images, captions).items()}

    def _features(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Features of norm 1 of captions and pictures, both (B, projection)."""
        images = batch.latents
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.autocast):
            texts = self.text(self.tokenize(batch.captions).to(images.device)).pooled
            pictures = self.vision(clip_pixels(images)).pooled
        return F.normalize(texts.float(), dim=-1), F.normalize(pictures.float(), dim=-1)

    def _losses(self, texts: Tensor, images: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
        logits = self.temperature() * texts @ images.T
        same = torch.tensor([[a == b for b in captions] for a in captions], device=logits.device)
        wanted = same / same.sum(1, keepdim=True)
        loss = 0.5 * (F.cross_entropy(logits, wanted) + F.cross_entropy(logits.T, wanted))
        accuracy = same.gather(1, logits.argmax(1, keepdim=True)).float().mean()
        return {"loss": loss, "accuracy": accuracy}


def clip_pixels(images: Tensor) -> Tensor:
    """Pictures in [-1, 1] with the mean and deviation of those that OpenAI's CLIP received."""
    mean, deviation = (torch.tensor(each, device=images.device)[:, None, None] for each in (MEAN, DEVIATION))
    return ((images + 1) / 2 - mean) / deviation


def _weight(batch: Batch) -> Tensor | float:
    return 1.0 if batch.weights is None else batch.weights.mean()
