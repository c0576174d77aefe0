"""On the meta device, the networks have exactly the tensors of the official files and the published sizes."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from gouache.layouts.rules import plan
from gouache.layouts.text import OPENCLIP
from gouache.nn.clip_text import ClipText
from gouache.nn.clip_vision import ClipVision
from gouache.nn.spec import TextSpec, UNetSpec, VaeSpec, VisionSpec
from gouache.nn.unet import UNet
from gouache.nn.vae import Autoencoder

KEYS = Path(__file__).parent.parent / "keys"

# From the original configuration files: v1-inference.yaml, v2-inference.yaml, sd_xl_base.yaml, sd_xl_refiner.yaml.
SD1 = UNetSpec(channels=320, channel_mult=(1, 2, 4, 4), attention_depth=(1, 1, 1, 0), heads=8, context_dim=768)
SD2 = replace(SD1, heads=None, head_channels=64, context_dim=1024, linear_projection=True)
SDXL = replace(
    SD2,
    channel_mult=(1, 2, 4),
    attention_depth=(0, 2, 10),
    middle_depth=10,
    context_dim=2048,
    vector_channels=1280 + 6 * 256,
)
REFINER = replace(
    SD2,
    channels=384,
    attention_depth=(0, 4, 4, 0),
    middle_depth=4,
    context_dim=1280,
    vector_channels=1280 + 5 * 256,
)
KL_F8 = VaeSpec()
CLIP_L = TextSpec()
OPENCLIP_H = TextSpec(width=1024, layers=24, heads=16, mlp_width=4096, activation="gelu", projection=1024)
OPENCLIP_BIGG = TextSpec(width=1280, layers=32, heads=20, mlp_width=5120, activation="gelu", projection=1280)

# What the files contain besides the networks, and why it is not loaded.
SCHEDULE = {  # the noise schedule, which is computed from its two end points instead
    "alphas_cumprod", "alphas_cumprod_prev", "betas", "log_one_minus_alphas_cumprod", "posterior_log_variance_clipped",
    "posterior_mean_coef1", "posterior_mean_coef2", "posterior_variance", "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod", "sqrt_recip_alphas_cumprod", "sqrt_recipm1_alphas_cumprod",
}  # fmt: skip
EMA_COUNTERS = {"model_ema.decay", "model_ema.num_updates"}  # of the training run's moving average
POSITIONS = {"cond_stage_model.transformer.text_model.embeddings.position_ids"}  # the numbers 0 to 76
TEMPERATURE = "logit_scale"  # of CLIP's contrastive loss
MIDAS = "depth_model."  # a separate network that estimates the depth map for sd2_depth
VAE_LOSS = "loss."  # LPIPS and the discriminator, used in training the autoencoder


def official(name: str) -> dict[str, tuple[int, ...]]:
    manifest = json.loads(gzip.decompress((KEYS / f"{name}.json.gz").read_bytes()))
    return {key: tuple(shape) for key, (shape, _) in manifest.items()}


def built(make: type[nn.Module], spec: object) -> nn.Module:
    with torch.device("meta"):
        return make(spec)


def named_shapes(network: nn.Module, prefix: str = "") -> dict[str, tuple[int, ...]]:
    return {prefix + name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}


def from_openclip(shapes: dict[str, tuple[int, ...]], prefix: str) -> dict[str, tuple[int, ...]]:
    """The same file with the OpenCLIP tower under `prefix` renamed and split by the layout tables."""
    inner = {name.removeprefix(prefix): shape for name, shape in shapes.items() if name.startswith(prefix)}
    outer = {name: shape for name, shape in shapes.items() if not name.startswith(prefix)}
    found = plan(OPENCLIP, inner)
    assert not found.unnamed
    kept = {prefix + name: inner[name] for name in found.dropped}
    return outer | kept | {prefix + name: origin.shape(inner) for name, origin in found.origins.items()}


def without(shapes: dict[str, tuple[int, ...]], leftovers: set[str]) -> dict[str, tuple[int, ...]]:
    assert leftovers <= shapes.keys()
    return {name: shape for name, shape in shapes.items() if name not in leftovers}


@pytest.mark.parametrize(("file", "channels"), [("sd15_emaonly", 4), ("sd15_inpainting", 9)])
def test_sd1_files_contain_exactly_these_networks_and_known_leftovers(file, channels):
    expected = without(official(file), SCHEDULE | EMA_COUNTERS | POSITIONS)

    networks = (
        named_shapes(built(UNet, replace(SD1, in_channels=channels)), "model.diffusion_model.")
        | named_shapes(built(Autoencoder, KL_F8), "first_stage_model.")
        | named_shapes(built(ClipText, CLIP_L), "cond_stage_model.transformer.")
    )

    assert networks == expected


@pytest.mark.parametrize(("file", "channels"), [("sd15_pruned_full", 4), ("sd15_instruct_pix2pix", 8)])
def test_sd1_files_with_ema_contain_every_unet_tensor_twice_once_without_dots(file, channels):
    expected = without(official(file), SCHEDULE | EMA_COUNTERS | POSITIONS)

    unet = named_shapes(built(UNet, replace(SD1, in_channels=channels)), "diffusion_model.")
    networks = (
        {f"model.{name}": shape for name, shape in unet.items()}
        | {f"model_ema.{name.replace('.', '')}": shape for name, shape in unet.items()}
        | named_shapes(built(Autoencoder, KL_F8), "first_stage_model.")
        | named_shapes(built(ClipText, CLIP_L), "cond_stage_model.transformer.")
    )

    assert networks == expected


@pytest.mark.parametrize(
    ("file", "channels"), [("sd21_512_base", 4), ("sd21_768_v", 4), ("sd2_depth", 5), ("sd2_inpainting", 9)]
)
def test_sd2_files_contain_exactly_these_networks_and_known_leftovers(file, channels):
    shapes = from_openclip(official(file), "cond_stage_model.model.")
    midas = {name for name in shapes if name.startswith(MIDAS)}
    assert bool(midas) == (file == "sd2_depth")
    expected = without(shapes, SCHEDULE | EMA_COUNTERS | midas | {f"cond_stage_model.model.{TEMPERATURE}"})

    networks = (
        named_shapes(built(UNet, replace(SD2, in_channels=channels)), "model.diffusion_model.")
        | named_shapes(built(Autoencoder, KL_F8), "first_stage_model.")
        | named_shapes(built(ClipText, OPENCLIP_H), "cond_stage_model.model.")
    )

    assert networks == expected


def test_sdxl_base_contains_exactly_these_networks_and_known_leftovers():
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    leftovers = {f"{first}text_model.embeddings.position_ids", second + TEMPERATURE}
    expected = without(from_openclip(official("sdxl_base"), second), leftovers)

    networks = (
        named_shapes(built(UNet, SDXL), "model.diffusion_model.")
        | named_shapes(built(Autoencoder, KL_F8), "first_stage_model.")
        | named_shapes(built(ClipText, CLIP_L), first)
        | named_shapes(built(ClipText, OPENCLIP_BIGG), second)
    )

    assert networks == expected


def test_sdxl_refiner_contains_exactly_these_networks_and_known_leftovers():
    text = "conditioner.embedders.0.model."
    expected = without(from_openclip(official("sdxl_refiner"), text), {text + TEMPERATURE})

    networks = (
        named_shapes(built(UNet, REFINER), "model.diffusion_model.")
        | named_shapes(built(Autoencoder, KL_F8), "first_stage_model.")
        | named_shapes(built(ClipText, OPENCLIP_BIGG), text)
    )

    assert networks == expected


@pytest.mark.parametrize("file", ["sdxl_vae", "vae_kl_f8_ft_mse", "vae_kl_f8_train_with_loss"])
def test_autoencoder_files_contain_exactly_the_autoencoder_and_known_leftovers(file):
    shapes = official(file)
    loss = {name for name in shapes if name.startswith(VAE_LOSS)}
    assert bool(loss) == (file == "vae_kl_f8_train_with_loss")
    counters = EMA_COUNTERS if file == "vae_kl_f8_ft_mse" else set()

    assert named_shapes(built(Autoencoder, KL_F8)) == without(shapes, loss | counters)


@pytest.mark.parametrize(
    ("make", "spec", "count"),
    [
        (UNet, SD1, 859_520_964),
        (UNet, replace(SD1, in_channels=9), 859_535_364),
        (UNet, replace(SD1, in_channels=8), 859_532_484),
        (UNet, SD2, 865_910_724),
        (UNet, replace(SD2, in_channels=9), 865_925_124),
        (UNet, replace(SD2, in_channels=5), 865_913_604),
        (UNet, SDXL, 2_567_463_684),
        (UNet, REFINER, 2_259_526_660),
        (Autoencoder, KL_F8, 83_653_863),
        (ClipText, CLIP_L, 123_060_480),
        (ClipText, OPENCLIP_H, 354_032_640),  # the file's 354,032,641 without logit_scale
        (ClipText, OPENCLIP_BIGG, 694_659_840),
        # OpenAI's ViT-L/14 and OpenCLIP's ViT-H/14, as transformers counts CLIPVisionModelWithProjection
        (ClipVision, VisionSpec(), 303_966_208),
        (
            ClipVision,
            VisionSpec(width=1280, layers=32, heads=16, mlp_width=5120, activation="gelu", projection=1024),
            632_076_800,
        ),
    ],
    ids=lambda value: getattr(value, "__name__", None) or (str(value) if isinstance(value, int) else "spec"),
)
def test_networks_have_the_published_number_of_weights(make, spec, count):
    assert sum(parameter.numel() for parameter in built(make, spec).parameters()) == count


@pytest.mark.parametrize(
    ("make", "spec"), [(UNet, SD1), (UNet, SDXL), (Autoencoder, KL_F8), (ClipText, CLIP_L), (ClipVision, VisionSpec())]
)
def test_networks_have_no_buffers_which_would_stay_on_the_meta_device(make, spec):
    assert not list(built(make, spec).buffers())


# Which blocks have transformers, and how many, follows from the names in the official files.
@pytest.mark.parametrize(
    ("spec", "depths"),
    [
        (SD1, {1: 1, 2: 1, 4: 1, 5: 1, 7: 1, 8: 1}),
        (SD2, {1: 1, 2: 1, 4: 1, 5: 1, 7: 1, 8: 1}),
        (SDXL, {4: 2, 5: 2, 7: 10, 8: 10}),
        (REFINER, {4: 4, 5: 4, 7: 4, 8: 4}),
    ],
    ids=["sd1", "sd2", "sdxl", "refiner"],
)
def test_transformers_are_in_the_blocks_of_the_original(spec, depths):
    blocks = built(UNet, spec).input_blocks

    found = {
        index: len(layer.transformer_blocks)
        for index, block in enumerate(blocks)
        for layer in block
        if hasattr(layer, "transformer_blocks")
    }

    assert found == depths


def test_sd1_has_eight_heads_everywhere_and_later_families_64_channels_per_head():
    sd1 = [module for module in built(UNet, SD1).modules() if hasattr(module, "to_q")]
    later = [
        module for spec in (SD2, SDXL, REFINER) for module in built(UNet, spec).modules() if hasattr(module, "to_q")
    ]

    assert {module.heads for module in sd1} == {8}
    assert {module.to_q.out_features / module.heads for module in sd1} == {40, 80, 160}
    assert {module.to_q.out_features / module.heads for module in later} == {64}


def test_group_norms_have_the_eps_of_the_original():
    unet = {name: module.eps for name, module in built(UNet, SD1).named_modules() if isinstance(module, nn.GroupNorm)}
    vae = {module.eps for module in built(Autoencoder, KL_F8).modules() if isinstance(module, nn.GroupNorm)}

    transformers = {eps for name, eps in unet.items() if name.endswith(".norm")}
    residual = {eps for name, eps in unet.items() if not name.endswith(".norm")}

    assert (transformers, residual, vae) == ({1e-6}, {1e-5}, {1e-6})
