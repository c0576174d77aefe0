"""The autoencoder or the text encoder as the target of a run, whose file is a whole model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from gouache.errors import RequestError
from gouache.training.pretraining.latent_scale import deviation, scaled
from gouache.training.targets.export import Averages
from gouache.training.targets.weights import WeightsTarget


class PartTarget(WeightsTarget):
    """All weights of one part of a model that is not the U-Net."""

    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str = "pruned",
        names: str = "original",
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model with this part. `averages` replace the last weights: files have none but of the U-Net."""
        weights = {**weights, **({} if averages is None else averages.weights)}
        form = "pruned" if form == "pruned-emaonly" else form
        super().export(weights, path, form=form, metadata=metadata, dtype=dtype, overwrite=overwrite)


class AutoencoderTarget(PartTarget):
    """All weights of the autoencoder; its latents get the scale of Stable Diffusion 1 when it is exported.

    `pictures` gives those whose latents are measured then, (B, 3, H, W) in [-1, 1]; it must be set before.
    """

    pictures: Callable[[], Iterable[Tensor]] | None = None

    @torch.no_grad()
    def export(
        self,
        weights: Mapping[str, Tensor],
        path: Path,
        *,
        form: str = "pruned",
        names: str = "original",
        metadata: Mapping[str, str],
        averages: Averages | None = None,
        dtype: str | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write the model; its latents times 0.18215 have unit variance over the pictures.

        The network has the exported weights afterwards, before they are scaled.
        """
        if self.pictures is None:
            raise RequestError("pictures", "are missing: the scale of latents is measured on pictures")
        weights = {**weights, **({} if averages is None else averages.weights)}
        vae = self.networks["vae"]
        for name, tensor in vae.state_dict().items():
            tensor.copy_(weights.get(f"vae.{name}", tensor))
        own = {name: tensor.detach().float() for name, tensor in vae.state_dict().items()}
        factor = 1 / (self.model.core.vae_scale * deviation(self.model.vae, self.pictures()))  # type: ignore[arg-type]
        exported = {f"vae.{name}": tensor for name, tensor in scaled(own, factor).items()}
        super().export(exported, path, form=form, metadata=metadata, dtype=dtype, overwrite=overwrite)
