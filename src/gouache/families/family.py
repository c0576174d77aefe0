"""Family: the constant facts of a model line that its files do not contain, and where the files keep its components."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from gouache.layouts.rules import Drop
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec
from gouache.prompts.recipe import TextRecipe

Spec = UNetSpec | VaeSpec | TextSpec


@dataclass(frozen=True)
class NoiseLevels:
    """The noise levels a line was trained on, as plain numbers from which `diffusion.schedule` makes a schedule.

    "scaled_linear": `steps` levels with betas from `low` to `high`, whose square roots are evenly spaced.
    "edm": every sigma from `low` to `high`; the network receives ln(sigma) / 4 as its timestep.
    """

    kind: Literal["scaled_linear", "edm"] = "scaled_linear"
    low: float = 0.00085
    high: float = 0.012
    steps: int = 1000


@dataclass(frozen=True)
class ComponentLocation:
    """The location of a component in single files, and its spec.

    `component` is its name, which is that of its folder in the diffusers layout. `prefix` precedes its tensor names.
    `layout` is the naming after the prefix: "original", "transformers" or "openclip". `spec` is that of the released
    weights; None if the network is not implemented yet.
    """

    component: str
    prefix: str
    layout: str
    spec: Spec | None


@dataclass(frozen=True, kw_only=True, eq=False)
class Family:
    """A line of models that differ only in their weights. There is one instance per family, compared by identity.

    `variants` maps the number of U-Net input channels to the variant. `size` is the (width, height) in pixels that the
    released weights were trained on; a fine-tune's metadata may state another. `leftovers` are tensors that files of
    this line contain and that nothing needs, each with the reason.
    """

    name: str
    title: str
    locations: tuple[ComponentLocation, ...]
    text: TextRecipe | None
    latent_scale: float
    size: tuple[int, int]
    variants: Mapping[int, str]
    prediction: Literal["eps", "v"] = "eps"
    levels: NoiseLevels = field(default_factory=NoiseLevels)
    leftovers: tuple[Drop, ...] = ()

    @property
    def unet(self) -> UNetSpec | None:
        """The U-Net of the released base model."""
        spec = self.spec("unet")
        return spec if isinstance(spec, UNetSpec) else None

    def spec(self, component: str) -> Spec | None:
        """The spec of `component` in the released weights; None if the line lacks it or it is not implemented yet."""
        return next((place.spec for place in self.locations if place.component == component), None)


_SCHEDULE = "a buffer of the noise schedule, which is recomputed: files in circulation have damaged ones"

COMMON_LEFTOVERS: tuple[Drop, ...] = (
    *(
        Drop(name, _SCHEDULE)
        for name in (
            "betas",
            "alphas_cumprod",
            "alphas_cumprod_prev",
            "sqrt_alphas_cumprod",
            "sqrt_one_minus_alphas_cumprod",
            "log_one_minus_alphas_cumprod",
            "sqrt_recip_alphas_cumprod",
            "sqrt_recipm1_alphas_cumprod",
            "posterior_variance",
            "posterior_log_variance_clipped",
            "posterior_mean_coef1",
            "posterior_mean_coef2",
            "logvar",
            "lvlb_weights",
            "denoiser.sigmas",
        )
    ),
    Drop("scale_factor", "the latent scale, which the family defines"),
    Drop("model_ema.decay", "the decay of the weight average (EMA)"),
    Drop("model_ema.num_updates", "the counter of the weight average (EMA)"),
    Drop("loss.{rest*}", "the loss that the autoencoder was trained with"),
    Drop("first_stage_model.loss.{rest*}", "the loss that the autoencoder was trained with"),
    Drop("first_stage_model.model_ema.{rest*}", "an average of the autoencoder, which is complete without it"),
    Drop("first_stage_model.logvar", "the weight of the loss that the autoencoder was trained with"),
    *(
        Drop(f"{prefix}.logit_scale", "the temperature of CLIP's contrastive loss")
        for prefix in ("cond_stage_model", "conditioner.embedders.{i}", "text_encoders.{i}")
    ),
    Drop("safety_checker/{rest*}", "the safety checker for finished pictures, which generation does not use"),
    *(
        Drop(name, "a marker of what the network predicts")
        for name in ("v_pred", "ztsnr", "edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")
    ),
)
"""Leftovers that files of any line may contain. Tensors in no network and not listed here are reported as unknown."""
