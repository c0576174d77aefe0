"""What can be known before weights are read is said before: in one line, with nothing loaded and nothing written."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from gouache.app import loading, machine
from gouache.app.model import Model
from gouache.app.settings import Settings
from gouache.app.training import prepare, runs
from gouache.app.training.defaults import TRAINABLE, trainable
from gouache.app.training.folder import RunFolder
from gouache.app.training.parts import options_of
from gouache.app.training.status import status
from gouache.errors import GouacheError, RequestError, TrainingError
from gouache.families.catalog import FAMILIES
from gouache.families.family import Family
from gouache.families.found import Fact, Found
from gouache.training.run_settings import checked
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]


def no_pictures(folder: Path) -> None:
    for path in list(folder.iterdir()):
        path.unlink()


def damaged_picture(folder: Path) -> None:
    (folder / "9.png").write_bytes((folder / "0.png").read_bytes()[:400])


def not_a_picture(folder: Path) -> None:
    (folder / "9.png").write_bytes(b"<html>not found</html>")


def caption_of_bytes(folder: Path) -> None:
    (folder / "0.txt").write_bytes(b"\xff\xfe\x00\xd8")


def caption_with_nul(folder: Path) -> None:
    (folder / "0.txt").write_bytes(b"a cat\0")


def black_mask(folder: Path) -> None:
    Image.new("L", (64, 64), 0).save(folder / "0.mask.png")


def damaged_mask(folder: Path) -> None:
    (folder / "0.mask.png").write_bytes(b"\x89PNG\r\n\x1a\nnothing")


def mask_of_other_shape(folder: Path) -> None:
    Image.new("L", (64, 128), 255).save(folder / "0.mask.png")


PICTURES: list[tuple[Callable[[Path], None], str]] = [
    (no_pictures, "has no pictures"),
    (damaged_picture, r"9\.png"),
    (not_a_picture, r"9\.png"),
    (caption_of_bytes, r"0\.txt"),
    (caption_with_nul, r"0\.txt.*NUL"),
    (black_mask, r"0\.mask\.png is black"),
    (damaged_mask, r"0\.mask\.png"),
    (mask_of_other_shape, "expected the same proportions"),
]


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reading weights fails the test."""
    monkeypatch.setattr(loading, "load", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize(("spoil", "said"), PICTURES, ids=[spoil.__name__ for spoil, _ in PICTURES])
@pytest.mark.parametrize("cache", [True, False])
def test_pictures_and_captions_that_cannot_be_used(
    spoil: Callable[[Path], None], said: str, cache: bool, narrow: Narrows, pictures: Path, settings: Settings,
    tmp_path: Path,
):  # fmt: skip
    spoil(pictures)
    data = {"masks": "file", "cache": cache}
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", data=data)
    with pytest.raises(GouacheError, match=said) as caught:
        run(chosen, tmp_path / "run", settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out.safetensors").exists() and not (tmp_path / "run/settings.toml").exists()


def unknown(narrow: Narrows, path: Path) -> None:
    save_file({"a.weight": torch.zeros(2)}, path)


def only_a_vae(narrow: Narrows, path: Path) -> None:
    tensors = load_file(narrow("sd1").file)
    save_file({name: tensor for name, tensor in tensors.items() if name.startswith("first_stage_model.")}, path)


def an_adapter(narrow: Narrows, path: Path) -> None:
    save_file({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.zeros(2, 2)}, path)


def edit(narrow: Narrows, path: Path) -> None:
    path.write_bytes(narrow("sd1-edit").file.read_bytes())


def depth(narrow: Narrows, path: Path) -> None:
    path.write_bytes(narrow("sd2-depth").file.read_bytes())


MODELS = [unknown, only_a_vae, an_adapter, edit, depth]


@pytest.mark.usefixtures("unloaded")
@pytest.mark.parametrize("make", MODELS, ids=[make.__name__ for make in MODELS])
def test_models_without_a_trainer(
    make: Callable[[Narrows, Path], None], narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    path = tmp_path / "model.safetensors"
    make(narrow, path)
    with pytest.raises(GouacheError, match=r"model\.safetensors") as caught:
        run(settings_of(path, pictures, tmp_path / "out.safetensors"), tmp_path / "run", settings)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run/settings.toml").exists()


@pytest.mark.parametrize(
    "family", [each for each in FAMILIES if each.name not in TRAINABLE], ids=lambda each: each.name
)
def test_families_without_a_trainer_are_named(family: Family, tmp_path: Path):
    kind, none = Fact("checkpoint", "its tensors", "certain"), Fact(None, "", "certain")
    found = Found(tmp_path / "other.safetensors", kind, Fact(family, "its widths", "certain"), none)
    with pytest.raises(GouacheError, match=f"other.safetensors is {re.escape(family.title)}, for which there is no"):
        trainable(found)


POISONED = "3.png"


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    """The latents of one picture are not finite."""
    with Image.open(pictures / POISONED) as picture:
        corner = torch.tensor(picture.getpixel((0, 0))).float() / 127.5 - 1
    encode = Model.encode

    def spoiled(self: Model, images: torch.Tensor) -> torch.Tensor:
        latents = encode(self, images)
        return latents * float("nan") if torch.allclose(images[0, :, 0, 0], corner, atol=1e-3) else latents

    monkeypatch.setattr(Model, "encode", spoiled)


@pytest.mark.usefixtures("poison")
@pytest.mark.parametrize("action", ["stop", "skip"])
def test_a_loss_that_is_not_finite_names_pictures_layer_and_timestep(
    action: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    train: dict[str, Any] = {"steps": 5, "batch": 1, "not_finite": action}
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", train=train,
                         adapter={"rank": 2}, validation={"probe": 0})  # fmt: skip
    notes = list[str]()
    if action == "stop":
        with pytest.raises(GouacheError) as caught:
            runs.run(chosen, RunFolder(tmp_path / "run"), settings, on_note=notes.append)
        said = str(caught.value)
    else:
        finished = runs.run(chosen, RunFolder(tmp_path / "run"), settings, on_note=notes.append)
        assert finished.path is not None
        assert all(bool(torch.isfinite(each).all()) for each in load_file(finished.path).values())
        said = next(note for note in notes if "not finite" in note)
        assert said.endswith("the step is skipped")
    assert "\n" not in said
    assert f"{POISONED} at timestep" in said and "first in unet." in said
    assert not any(f"{number}.png" in said for number in (0, 1, 2, 4))


@pytest.mark.usefixtures("unloaded")
def test_settings_that_cannot_be_are_found_before_anything_is_loaded(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    model = narrow("sd1").file
    for tables, said in (
        ({"data": {"filter": ["punsafe<0.1"]}}, "no picture has a score"),
        ({"validation": {"pictures": 5}}, "some must be left"),
        ({"data": {"folder": ""}}, r"data\.folder: is missing"),
        ({"train": {"optimizer": "no_such_package.Optimizer"}}, "no_such_package"),
        ({"train": {"optimizer_arguments": {"fast": True}}}, "optimizer_arguments: adamw does not accept"),
        ({"train": {"schedule": "no.such.Schedule"}}, "schedule: no.such.Schedule cannot be imported"),
        ({"adapter": {"form": "ia3", "rank_dropout": 0.1}}, "rank_dropout: does not apply to ia3"),
        ({"adapter": {"start": "no-such-adapter"}}, r"adapter\.start"),
        ({"parts": {"unet": False}}, "parts: names nothing to train"),
        ({"parts": {"unet": False, "text_encoder": True, "text_stop": 2}}, "stops all trained parts"),
        ({"loss": {"timestep_min": 0.5, "timestep_max": 0.2}}, "timestep_min 0.5 must be below timestep_max 0.2"),
        ({"loss": {"timestep_min": 0.5, "timestep_max": 0.5001}}, r"timestep_max 0\.5001: none of the 1000 timesteps"),
        ({"loss": {"prior": "pictures"}}, r"loss\.prior: is pictures, and there are no pictures of the class"),
        ({"data": {"class_folder": "no/such/place"}}, "no/such/place: does not exist"),
    ):
        with pytest.raises(GouacheError, match=said):
            run(settings_of(model, pictures, tmp_path / "out.safetensors", **tables), tmp_path / "run", settings)


WITHOUT_EFFECT: list[tuple[dict[str, Any], str]] = [
    *(
        ({"adapter": {"form": "none", name: value}}, rf"adapter\.{name}: has no effect on trained weights")
        for name, value in {
            "start": "a.safetensors", "rates": {"M00": 2.0}, "ranks": {"M00": 2}, "alphas": {"M00": 2.0}, "rank": 4,
            "dropout": 0.1, "rank_dropout": 0.1, "module_dropout": 0.1, "plus_ratio": 16.0, "modules": "conv",
            "conv_rank": 4, "factor": 2, "constraint": 0.1, "alpha": 1.0,
        }.items()
    ),
    *(
        ({"adapter": {"form": form, name: value}}, rf"adapter\.{name}: has no effect on {form}")
        for form, names in {
            "ia3": ("rank", "alpha", "conv_rank", "conv_alpha", "alphas"),
            "full": ("rank", "alpha", "conv_rank", "conv_alpha", "alphas"),
            "oft": ("alpha", "conv_alpha", "alphas"),
        }.items()
        for name in names
        for value in ({"M00": 2.0} if name == "alphas" else 4,)
    ),
    ({"model": {"weights": "ema"}}, "model.weights: ema is for trained weights"),
]  # fmt: skip


@pytest.mark.parametrize(("tables", "words"), WITHOUT_EFFECT, ids=[words for _, words in WITHOUT_EFFECT])
def test_a_setting_without_effect_is_one_line(tables: dict[str, Any], words: str):
    chosen = checked({"train": {"steps": 1, "batch": 1, "learning_rate": 1e-4}, **tables})
    with pytest.raises(RequestError, match=words) as caught:
        options_of(chosen, ["text_encoder"])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("form", ["lora", "locon", "loha", "lokr", "dora", "ia3", "oft", "full", "none"])
def test_every_form_is_accepted_with_its_own_settings(form: str):
    own = {} if form in ("none", "ia3", "full") else {"rank": 4} if form == "oft" else {"rank": 4, "alpha": 2.0}
    train = {"steps": 1, "batch": 1, "learning_rate": 1e-4}
    options = options_of(checked({"train": train, "adapter": {"form": form, **own}}), ["text_encoder"])
    assert options.parts == ("unet",)


@pytest.mark.parametrize("form", ["lora", "none"])
def test_half_precision_without_scaled_losses_is_refused_and_never_chosen(
    form: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"form": form}, memory={"dtype": "fp16"}
    )
    with pytest.raises(GouacheError, match=r"memory\.dtype: fp16 needs scaled losses"):
        run(chosen, tmp_path / "run", settings)
    monkeypatch.setattr(machine, "best_dtype", lambda *_: torch.float16)
    automatic = chosen.model_copy(update={"memory": chosen.memory.model_copy(update={"dtype": ""})})
    for user in (replace(settings, dtype=given) for given in (None, "fp16")):
        found = prepare.load_model(automatic, user, lambda line: None, torch.device("cpu"))
        assert found.dtype in (torch.float32, torch.bfloat16)


def test_zero_terminal_snr_of_a_model_that_predicts_noise_is_refused(
    unloaded: None, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", model={"zero_terminal_snr": True})
    with pytest.raises(GouacheError, match=r"model\.zero_terminal_snr: needs a model that predicts v"):
        run(chosen, tmp_path / "run", settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.skipif("sys.platform == 'win32'", reason="no flock")
def test_a_run_is_locked_while_it_is_prepared(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    chosen = settings_of(narrow("sd1").file, pictures, tmp_path / "out.safetensors", adapter={"rank": 2})
    folder = RunFolder(tmp_path / "run")

    def load(*_: Any) -> Model:
        assert status(folder).state == "running"
        with pytest.raises(TrainingError, match="another run is training here"):
            run(chosen, folder.path, settings)
        raise TrainingError("prepared no further")

    monkeypatch.setattr(prepare, "load_model", load)
    with pytest.raises(TrainingError, match="prepared no further"):
        run(chosen, folder.path, settings)
    assert status(folder).state == "not started"


def test_all_paths_of_a_run_are_absolute_in_its_settings(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """So that it goes on from any folder."""
    for name in ("model", "vae", "start"):
        shutil.copy(narrow("sd1").file, tmp_path / f"{name}.safetensors")
    shutil.copytree(pictures, tmp_path / "class")
    chosen = settings_of(
        Path("model.safetensors"), Path(pictures.name), Path("out.safetensors"), adapter={"start": "start.safetensors"},
        model={"vae": "vae.safetensors"}, data={"class_folder": "class", "cache_folder": "cache"},
    )  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prepare, "load_model", lambda *_: (_ for _ in ()).throw(TrainingError("far enough")))
    with pytest.raises(TrainingError, match="far enough"):
        run(chosen, Path("run"), settings)
    found = RunFolder(tmp_path / "run").settings()
    data = found.data
    paths = [found.output, found.model.name, found.model.vae, found.adapter.start, data.folder, data.class_folder]
    assert [str(Path(each).parent) for each in (*paths, data.cache_folder)] == [str(tmp_path)] * 7
