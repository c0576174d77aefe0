"""Pretraining from nothing: autoencoder, text encoder and U-Net, each from the result of the one before."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import defaults, effects, export
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError
from gouache.images import pixels
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import run, settings_of
from tests.app.training.test_runs import painted

UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def part(name: str, pictures: Path, output: Path, model: Path | None = None, **tables: Any) -> RunSettings:
    usual: dict[str, Any] = {
        "mode": "pretrain", "pretrain": {"part": name, **({} if model else {"initial_size": "tiny"})},
        "train": {"steps": 3, "learning_rate": 1e-3, "save_steps": 1, "ema_decay": 0.5}, "samples": {"every": 2},
        "validation": {"pictures": 1},
    }  # fmt: skip
    for table, values in tables.items():
        usual[table] = {**usual.get(table, {}), **values}
    return settings_of(model or Path(), pictures, output, **usual)


def changed(before: Path, after: Path) -> set[str]:
    """The first parts of the names of tensors that differ."""
    one, two = load_file(before), load_file(after)
    assert one.keys() == two.keys() - {"model_ema.decay", "model_ema.num_updates"}
    return {name.split(".")[0] + "." for name in one if not torch.equal(one[name], two[name])}


def test_a_model_that_paints_is_trained_from_nothing(pictures: Path, settings: Settings, tmp_path: Path):
    vae, text, whole = (tmp_path / f"{name}.safetensors" for name in ("vae", "text", "whole"))
    run(part("vae", pictures, vae), tmp_path / "a", settings)
    run(part("text", pictures, text, vae), tmp_path / "b", settings)
    finished = run(part("unet", pictures, whole, text), tmp_path / "c", settings)

    rates = [[export.read_metadata(RunFolder(tmp_path / each))[f"ss_{network}_lr"] for each in "abc"]
             for network in ("unet", "text_encoder")]  # fmt: skip
    assert rates == [["0.0", "0.0", "0.001"], ["0.0", "0.001", "0.0"]]
    start = settings.data / "initial models" / "tiny-0.safetensors"
    assert changed(start, vae) == {VAE} and changed(vae, text) == {TEXT}
    assert changed(text, whole) == {"model."} and finished.path == whole
    assert torch.isfinite(painted(whole, settings)).all()
    assert list((tmp_path / "a" / "samples").glob("*.png")) and not (tmp_path / "b" / "samples").exists()
    assert [line for line in RunFolder(tmp_path / "a").log() if "validation psnr" in line]
    assert [line for line in RunFolder(tmp_path / "b").log() if "validation accuracy" in line]


def test_the_latents_of_an_exported_autoencoder_have_unit_variance(pictures: Path, settings: Settings, tmp_path: Path):
    output = tmp_path / "vae.safetensors"
    run(part("vae", pictures, output, data={"buckets": False}), tmp_path / "run", settings)
    export.export(RunFolder(tmp_path / "run"), tmp_path / "again.safetensors", settings)

    model = gouache.load(output, device="cpu", dtype="fp32", settings=settings)
    paths = sorted(pictures.glob("*.png"))
    same = [path for path in paths if Image.open(path).size == (64, 64)]
    with torch.no_grad():
        moments = [model.vae.encode(pixels.to_tensor([Image.open(path).convert("RGB")])) for path in same]
        noise = torch.Generator().manual_seed(0)
        samples = [each.sample(torch.randn(each.mean.shape, generator=noise)) for each in moments for _ in range(50)]
    assert 0.18215 * float(torch.cat(samples).std()) == pytest.approx(1, rel=0.1)
    one, two = load_file(output), load_file(tmp_path / "again.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.full  # `test_stages` has a short one
@pytest.mark.parametrize("name", ["vae", "text"])
def test_a_stopped_run_ends_bit_equal(name: str, pictures: Path, settings: Settings, tmp_path: Path):
    """With the discriminator and its moments, and the picture tower."""
    tables = {"pretrain": {"adversarial": 0.5, "adversarial_start": 1}} if name == "vae" else {}
    chosen = part(name, pictures, tmp_path / "out.safetensors", **tables)
    run(chosen, tmp_path / "whole", settings)
    stopped = run(chosen, tmp_path / "parts", settings, stop_after=2)
    assert (stopped.path, stopped.step) == (None, 2)
    run(chosen, tmp_path / "parts", settings)
    for file in ("weights", "optimizer", "ema"):
        one, two = (load_file(tmp_path / each / "step-00000003" / f"{file}.safetensors") for each in ("whole", "parts"))
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)
    other = "discriminator." if name == "vae" else "vision."
    assert any(key.startswith(other) for key in one)


def test_chosen_settings(pictures: Path, settings: Settings):
    def choose(*overrides: str, model: str = "") -> RunSettings:
        return defaults.choose(
            "pretrain", str(pictures), model, output=None, trigger="", class_word="", steps=None,
            overrides=list(overrides), settings=settings,
        )  # fmt: skip

    chosen = choose("pretrain.part=vae", "initial_size=tiny")
    assert chosen.data.resolution == [64] and not chosen.data.cache and chosen.train.ema_decay == 0.999
    assert chosen.train.batch == 2
    assert choose("pretrain.part=text", "initial_size=tiny").train.batch == 5  # all pictures at once
    chosen = choose("pretrain.part=unet", model="mini")
    assert chosen.data.cache and chosen.data.caption_dropout == 0.1 and chosen.model.name == "mini"
    with pytest.raises(GouacheError, match=r"pretrain\.initial_size: is missing; expected tiny, small, sd1, for"):
        choose("pretrain.part=vae")
    with pytest.raises(GouacheError, match=r"pretrain\.part: is missing; expected vae, text, unet"):
        choose("initial_size=tiny")
    with pytest.raises(GouacheError, match=r"pretrain\.initial_size: is tiny, but a model has its size; leave out one"):
        choose("pretrain.part=vae", "initial_size=tiny", model="mini")
    with pytest.raises(GouacheError, match=r"pretrain\.part: is missing"):  # as from Python
        gouache.train("pretrain", pictures, settings=settings)
    with pytest.raises(GouacheError, match=r"pretrain\.initial_size: is missing"):
        gouache.train("pretrain", pictures, settings=settings, part="vae")


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        ({"pretrain": {"initial_size": "huge"}}, "pretrain.initial_size"),
        ({"pretrain": {"part": "clip"}}, "pretrain.part"),
        ({"adapter": {"rank": 8}}, "adapter.rank: has no effect on the mode pretrain"),
        ({"parts": {"text_encoder": True}}, "parts.text_encoder: has no effect on the mode pretrain"),
        ({"loss": {"weighting": "min-snr"}}, "loss.weighting: has no effect on the mode pretrain"),
        ({"pretrain": {"part": "text", "kl": 1.0}}, "pretrain.kl: has no effect on the part text; it is for vae"),
        ({"adapter": {"start": "a.pt"}}, "adapter.start: has no effect on the mode pretrain"),
        ({"data": {"cache": True}}, "data.cache: has no effect on the part vae; leave it out"),
        ({"pretrain": {"adversarial_start": 5}}, "pretrain.adversarial_start: has no effect without"),
        ({"pretrain": {"part": "text"}, "train": {"batch": 1}}, "train.batch: is 1: a text encoder learns which"),
    ],
)
def test_impossible_settings_are_refused_in_one_line(
    tables: dict[str, Any], message: str, pictures: Path, settings: Settings, tmp_path: Path
):
    with pytest.raises(GouacheError, match=message) as caught:
        run(part("vae", pictures, tmp_path / "a.safetensors", **tables), tmp_path / "run", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("texts", ["none", "equal", "one picture"])
def test_a_text_encoder_needs_captions_to_tell_apart(texts: str, pictures: Path, settings: Settings, tmp_path: Path):
    """Without them the loss is 0, and no weight changes."""
    for path in pictures.glob("*.txt"):
        path.unlink() if texts == "none" else path.write_text("a cat") if texts == "equal" else None
    for path in sorted(pictures.glob("*.png"))[1:] if texts == "one picture" else ():
        path.unlink()
    chosen = part("text", pictures, tmp_path / "a.safetensors", validation={"pictures": 0})
    with pytest.raises(GouacheError, match=r"data\.folder: has no pictures with different captions"):
        run(chosen, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["vae", "text"])
@pytest.mark.parametrize(("key", "value"), [("prediction", "v"), ("clip_skip", 2), ("inpainting", True)])
def test_settings_of_denoising_have_no_effect_on_pictures(name: str, key: str, value: Any, tmp_path: Path):
    chosen = settings_of(
        Path(), tmp_path, tmp_path / "a.safetensors", mode="pretrain", pretrain={"part": name}, model={key: value}
    )
    with pytest.raises(
        GouacheError, match=rf"model\.{key}: has no effect on the mode pretrain of the part {name}; leave"
    ):
        effects.check(chosen)


def test_a_text_encoder_of_another_family_is_refused(narrow, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = part("text", pictures, tmp_path / "a.safetensors", narrow("sd2").file)
    with pytest.raises(GouacheError, match=r"pretrain\.part: text is for Stable Diffusion 1; the model is"):
        run(chosen, tmp_path / "run", settings)
