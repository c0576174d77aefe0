"""TAESD compared with diffusers' AutoencoderTiny, for every form of its files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from gouache.errors import ModelError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.layouts.tiny import tiny_names
from gouache.model.vae import load_vae
from gouache.nn.vae_tiny import TinyAutoencoder

diffusers = pytest.importorskip("diffusers")


@pytest.fixture(scope="module")
def theirs() -> Any:
    torch.manual_seed(0)
    return diffusers.AutoencoderTiny().eval()


def as_published(state: dict[str, torch.Tensor], half: str) -> dict[str, torch.Tensor]:
    """Its author's files: a Sequential, whose decoder starts with the clamp, so its numbers are one higher."""
    shift = 1 if half == "decoder" else 0
    found = {}
    for name, tensor in state.items():
        if name.startswith(f"{half}.layers."):
            number, _, rest = name.removeprefix(f"{half}.layers.").partition(".")
            found[f"{int(number) + shift}.{rest}"] = tensor
    return found


def load(path: Path) -> TinyAutoencoder:
    file = open_model(path)
    found = identify(file)
    assert found.kind.value == "preview decoder"
    vae = load_vae(file, found, "cpu", torch.float32)
    assert isinstance(vae, TinyAutoencoder)
    return vae


def test_encoding_and_decoding_agree(theirs: Any, tmp_path: Path):
    save_file(theirs.state_dict(), tmp_path / "taesd.safetensors")
    mine = load(tmp_path / "taesd.safetensors")
    image = torch.rand(2, 3, 64, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1

    with torch.inference_mode():
        latent = theirs.encode(image).latents
        torch.testing.assert_close(mine.encode(image).mean, latent, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.decode(latent), theirs.decode(latent).sample, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("form", ["decoder only", "both in one file", "folder"])
def test_every_form_of_its_files_is_loaded(form: str, theirs: Any, tmp_path: Path):
    state = theirs.state_dict()
    latent = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2))
    path = tmp_path / "taesd_decoder.safetensors"
    if form == "decoder only":
        save_file(as_published(state, "decoder"), path)
    elif form == "both in one file":
        save_file(
            {f"taesd_{t}.{n}": v for t in ("encoder", "decoder") for n, v in as_published(state, t).items()}, path
        )
    else:
        path = tmp_path / "taesd"
        theirs.save_pretrained(path)

    mine = load(path)

    with torch.inference_mode():
        torch.testing.assert_close(mine.decode(latent), theirs.decode(latent).sample, atol=1e-4, rtol=1e-4)


def test_a_file_with_only_an_encoder_is_refused(theirs: Any, tmp_path: Path):
    save_file(as_published(theirs.state_dict(), "encoder"), tmp_path / "taesd_encoder.pth.safetensors")
    file = open_model(tmp_path / "taesd_encoder.pth.safetensors")

    with pytest.raises(ModelError, match="encoder of a TAESD"):
        load_vae(file, identify(file), "cpu", torch.float32)


def test_other_files_with_numbered_layers_are_not_recognised_as_taesd():
    assert tiny_names(["0.weight", "0.bias", "2.weight"]) is None
    assert tiny_names([]) is None
