"""Files of the released sizes with random weights: identified, loaded, and run for one step in 24 GB. Run by hand.

    python3 launch.py test -m full tests/model/test_full_size.py

Each writes up to 16 GB to the temporary folder, and removes it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import gouache
from gouache.app.settings import Settings
from gouache.errors import ModelError
from gouache.families.identify import identify
from gouache.files.assign import assign
from gouache.files.open import open_model
from gouache.files.record import TensorInfo
from gouache.files.source import TORCH_NAMES
from gouache.files.write import stream_safetensors
from gouache.nn.spec import VaeSpec
from gouache.nn.vae import Autoencoder
from tests.layouts.manifests import manifest

pytestmark = [pytest.mark.full, pytest.mark.timeout(3600)]

GIGABYTE = 1e9


@dataclass(frozen=True)
class Released:
    """Facts of a released file. `prediction` None: it follows from values of the weights, which are random here."""

    family: str
    variant: str = "base"
    prediction: str | None = "eps"


MODELS = {
    "sd15_emaonly": Released("sd1"),
    "sd15_pruned_full": Released("sd1"),
    "sd15_inpainting": Released("sd1", "inpainting"),
    "sd15_instruct_pix2pix": Released("sd1", "instruct-pix2pix"),
    "sd21_512_base": Released("sd2", prediction=None),
    "sd21_768_v": Released("sd2", prediction=None),
    "sd2_depth": Released("sd2", "depth"),
    "sd2_inpainting": Released("sd2", "inpainting"),
    "sdxl_base": Released("sdxl"),
    "sdxl_refiner": Released("sdxl-refiner"),
}
VIDEO = ("svd", "svd_xt")
AUTOENCODERS = ("sdxl_vae", "vae_kl_f8_ft_mse", "vae_kl_f8_train_with_loss")


@pytest.fixture(params=["safetensors", "ckpt"])
def form(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    """A folder that is emptied after the test; pytest would keep the files."""
    yield tmp_path
    for path in tmp_path.iterdir():
        path.unlink()


@pytest.fixture(autouse=True)
def memory() -> Iterator[None]:
    """The peak memory of a test, mapped files included, is printed and is below 24 GB."""
    reset = Path("/proc/self/clear_refs")
    if not reset.exists():
        pytest.skip("needs Linux to read the peak of memory")
    reset.write_text("5")
    yield
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    held = int(peak.split()[1]) * 1024
    print(f"\npeak memory {held / GIGABYTE:.1f} GB")
    assert held < 24 * GIGABYTE


def written(name: str, form: str, folder: Path) -> Path:
    """Write a file with the names and shapes of a released one and small random weights, one tensor at a time."""
    pool = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0)) * 0.02
    infos = {key: TensorInfo(tuple(shape), dtype) for key, (shape, dtype) in manifest(name).items()}

    def read(key: str) -> Tensor:
        info = infos[key]
        dtype = getattr(torch, TORCH_NAMES[info.dtype])
        if not dtype.is_floating_point:
            return torch.arange(info.elements).reshape(info.shape).to(dtype)
        flat = pool.to(dtype).repeat(math.ceil(info.elements / len(pool)))[: info.elements]
        return flat.reshape(info.shape)

    whole = folder / f"{name}.safetensors"
    stream_safetensors(whole, infos, read)
    if form == "safetensors":
        return whole
    pickled = folder / f"{name}.ckpt"
    torch.save({"state_dict": load_file(whole)}, pickled)  # mapped, so that it is not in memory as a whole
    whole.unlink()
    return pickled


@pytest.mark.parametrize("name", MODELS)
def test_a_released_model_is_identified_loaded_and_run(name: str, form: str, folder: Path, settings: Settings):
    path, expected = written(name, form, folder), MODELS[name]
    picture = folder / "picture.png"
    Image.linear_gradient("L").resize((64, 64)).convert("RGB").save(picture)

    found = identify(open_model(path))
    model = gouache.load(path, dtype="bf16", settings=settings)
    options: dict[str, Any] = {"steps": 1, "size": (64, 64), "seed": 0}
    options |= {"init": picture, "strength": 1.0} if expected.variant == "instruct-pix2pix" else {}
    options |= {"depth": picture} if expected.variant == "depth" else {}
    painted = next(model.paint("a cat", **options))

    family, prediction = found.family.value, found.prediction
    assert family is not None and prediction is not None
    assert (found.kind.value, family.name, found.variant.value) == ("checkpoint", expected.family, expected.variant)
    assert expected.prediction in (None, prediction.value)
    assert not found.missing and not found.unknown
    assert {weight.dtype for weight in model.unet.parameters()} == {torch.bfloat16}
    assert torch.isfinite(painted.latent).all() and painted.image.size == (64, 64)


@pytest.mark.parametrize("name", VIDEO)
def test_a_video_model_is_identified_and_refused(name: str, form: str, folder: Path, settings: Settings):
    path = written(name, form, folder)

    found = identify(open_model(path))

    assert found.family.value is not None and found.family.value.name == "svd"
    assert not found.missing and not found.unknown
    with pytest.raises(ModelError, match="is Stable Video Diffusion, which can be inspected and converted"):
        gouache.load(path, settings=settings)


@pytest.mark.parametrize("name", AUTOENCODERS)
def test_an_autoencoder_is_identified_and_loaded(name: str, form: str, folder: Path):
    file = open_model(written(name, form, folder))

    found = identify(file)
    component = found.component("vae")
    assert isinstance(component.spec, VaeSpec)
    with torch.device("meta"):
        vae = Autoencoder(component.spec)
    tensors = {name: origin.tensor(file.tensor) for name, origin in component.origins.items()}
    fit = assign(vae, tensors, dtype=torch.float32)

    assert found.kind.value == "vae" and not found.unknown
    assert fit.fits and component.spec == VaeSpec()
    with torch.inference_mode():
        latent = vae.encode(torch.zeros(1, 3, 64, 64)).mean
        assert latent.shape == (1, 4, 8, 8) and vae.decode(latent).shape == (1, 3, 64, 64)
