"""Files of checkpoints: which options go together, whose weights are in the file, adapters baked into models."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import export
from gouache.app.training.export import Choice, choose
from gouache.app.training.folder import RunFolder
from gouache.errors import GouacheError, RequestError
from gouache.training import state
from gouache.training.run_settings import RunSettings, checked
from tests.app.training.short_runs import run, settings_of
from tests.pipelines import Narrow

Narrows = Callable[[str], Narrow]
FILE = Path("x.safetensors")


def trained(form: str) -> RunSettings:
    return checked({"adapter": {"form": form}, "train": {"steps": 1, "batch": 1, "learning_rate": 1}})


@pytest.mark.parametrize(
    ("form", "averages", "options", "expected"),
    [
        ("lora", False, {}, ("last", "adapter")),
        ("lora", True, {}, ("ema", "adapter")),
        ("lora", True, {"weights": "last"}, ("last", "adapter")),
        ("lora", False, {"form": "full"}, ("last", "full")),
        ("lora", True, {"form": "pruned-emaonly"}, ("ema", "pruned-emaonly")),
        ("none", False, {}, ("last", "pruned")),
        ("none", True, {}, ("ema", "pruned-emaonly")),
        ("none", True, {"weights": "last"}, ("last", "pruned")),
        ("none", True, {"weights": "both"}, ("both", "pruned")),
        ("none", True, {"form": "full"}, ("both", "full")),
        ("none", True, {"form": "full", "weights": "ema"}, ("ema", "full")),
        ("none", False, {"form": "full"}, ("last", "full")),
    ],
)
def test_what_is_not_said_is_chosen_by_what_was_trained(form, averages, options, expected):
    assert choose(trained(form), averages, FILE, **options) == Choice(*expected, "kohya")


@pytest.mark.parametrize(
    ("form", "averages", "options", "message"),
    [
        ("lora", True, {"weights": "both"}, "both is for trained weights"),
        ("lora", False, {"weights": "ema"}, "needs averages"),
        ("none", False, {"form": "pruned-emaonly"}, "needs averages"),
        ("none", True, {"form": "pruned-emaonly", "weights": "last"}, "averages alone"),
        ("none", True, {"form": "adapter"}, "trained the weights themselves"),
        ("none", True, {"names": "peft"}, "names: peft is for LoRAs"),
        ("lora", True, {"form": "full", "names": "diffusers"}, "names: diffusers is for LoRAs"),
        ("lora", True, {"form": "half"}, "not known; use adapter, full"),
        ("lora", True, {"weights": "all"}, "not known; use ema, last, both"),
        ("lora", True, {"names": "a1111"}, "not known; use kohya"),
    ],
)
def test_options_that_do_not_go_together_are_one_line(form, averages, options, message):
    with pytest.raises(RequestError, match=message):
        choose(trained(form), averages, FILE, **options)


@pytest.mark.parametrize(("names", "out"), [("peft", "x.safetensors"), ("kohya", "x.ckpt"), ("kohya", "folder")])
def test_the_name_must_fit_what_is_written(names: str, out: str):
    with pytest.raises(RequestError, match="out"):
        choose(trained("lora"), False, Path(out), names=names)


@pytest.fixture(scope="module")
def adapter_run(narrow: Narrows, settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A finished run with averages and the checkpoints of steps 2 and 4, whose pictures are gone."""
    from tests.app.training.conftest import pictures

    folder = tmp_path_factory.mktemp("run")
    data = pictures.__wrapped__(folder)  # type: ignore[attr-defined]
    chosen = settings_of(
        narrow("sd1").file, data, folder / "out.safetensors", adapter={"rank": 2, "alpha": 2},
        train={"ema_decay": 0.5, "save_steps": 2, "keep": 5, "validate_steps": 1000}, data={"trigger": "zorb"},
    )  # fmt: skip
    run(chosen, folder / "run", settings)
    shutil.rmtree(data)
    return RunFolder(folder / "run")


def test_an_export_has_the_weights_of_its_step(adapter_run: RunFolder, settings: Settings, tmp_path: Path):
    for step, weights, stored in (("2", "last", "weights"), ("4", "ema", "ema"), ("last", "", "ema")):
        out = tmp_path / f"{step}-{weights}.safetensors"
        number = export.export(adapter_run, out, settings, step=step, weights=weights)
        expected = load_file(adapter_run.checkpoint(number) / f"{stored}.safetensors")
        key = next(name for name in sorted(expected) if name.endswith("lora_up/weight"))
        values = [tensor for name, tensor in load_file(out).items() if name.endswith("lora_up.weight")]
        assert any(torch.equal(value, expected[key].half()) for value in values)
        with safe_open(out, "pt") as file:
            metadata = file.metadata()
        assert (metadata["ss_steps"], metadata["ss_num_train_images"]) == (str(number), "5")
        assert metadata["ss_epoch"] == str(number // 4)  # five pictures of three sizes: four batches of at most two
        assert metadata["modelspec.trigger_phrase"] == "zorb"


@pytest.mark.parametrize("lineage", ["none", "hashed"])
def test_a_file_without_lineage_states_nothing_of_its_data(
    lineage: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    output = tmp_path / f"{pictures.name}.safetensors"
    chosen = settings_of(
        narrow("sd1").file, pictures, output, adapter={"rank": 2}, lineage=lineage, train={"steps": 1},
        data={"trigger": "zorb", "buckets": False}, validation={"pictures": 1},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    with safe_open(output, "pt") as file:
        metadata = file.metadata()
    text = " ".join(metadata.values())
    counts = {name for name in metadata if name.endswith("_images") or "epoch" in name}
    assert metadata["ss_enable_bucket"] == "False"
    assert (bool(counts), "zorb" in text, pictures.name in text) == ((lineage == "hashed"),) * 3


def test_a_baked_model_paints_as_the_model_with_the_adapter(
    adapter_run: RunFolder, narrow: Narrows, settings: Settings, tmp_path: Path
):
    export.export(adapter_run, tmp_path / "lora.safetensors", settings)
    for form in ("full", "pruned"):
        export.export(adapter_run, tmp_path / f"{form}.safetensors", settings, form=form)
        model = gouache.load(narrow("sd1").file, device="cpu", dtype="fp32", settings=settings)
        baked = gouache.load(tmp_path / f"{form}.safetensors", device="cpu", dtype="fp32", settings=settings)
        options = {"steps": 2, "seed": 1, "size": (64, 64)}
        expected = next(model.paint("zorb", lora=[str(tmp_path / "lora.safetensors")], **options)).latent
        plain = next(model.paint("zorb", **options)).latent
        found = next(baked.paint("zorb", **options)).latent
        assert (found - expected).abs().max() < 1e-2 * (plain - expected).abs().max()


@pytest.mark.skipif("sys.platform == 'win32'", reason="no flock")
def test_a_run_can_be_exported_while_it_trains_and_bad_requests_read_no_weights(
    adapter_run: RunFolder, settings: Settings, tmp_path: Path
):
    with state.locked(adapter_run.path):
        assert export.export(adapter_run, tmp_path / "x.safetensors", settings) == 4
    copy = RunFolder(tmp_path / "copy")
    shutil.copytree(adapter_run.path, copy.path)
    for step in copy.steps():
        (copy.checkpoint(step) / "weights.safetensors").write_bytes(b"damaged")
    for options, message in (
        ({"weights": "both"}, "both"), ({"step": "3"}, "no checkpoint; there are those of step 2, 4"),
        ({"step": "first"}, "not known; use a number, best or last"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            export.export(copy, tmp_path / "y.safetensors", settings, **options)
    with pytest.raises(RequestError, match="already exists"):
        export.export(copy, tmp_path / "x.safetensors", settings)
    with pytest.raises(GouacheError, match="damaged"):
        export.export(copy, tmp_path / "y.safetensors", settings)
    assert not (tmp_path / "y.safetensors").exists()


def test_full_weights_with_averages_have_the_forms_of_released_files(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = settings_of(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"},
        train={"ema_decay": 0.5, "steps": 2},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    folder, files = RunFolder(tmp_path / "run"), dict[str, dict[str, torch.Tensor]]()
    for name, options in {
        "full": {"form": "full"}, "last": {"weights": "last"}, "ema": {"weights": "ema", "form": "full"},
        "emaonly": {"form": "pruned-emaonly"},
    }.items():  # fmt: skip
        export.export(folder, tmp_path / f"{name}.safetensors", settings, **options)
        files[name] = load_file(tmp_path / f"{name}.safetensors")
    kept = {kind: load_file(folder.checkpoint(2) / f"{kind}.safetensors") for kind in ("weights", "ema")}
    inner = "input_blocks.0.0.weight"
    key, average = f"model.diffusion_model.{inner}", "model_ema.diffusion_modelinput_blocks00weight"
    for name, kind in (("full", "weights"), ("last", "weights"), ("ema", "ema"), ("emaonly", "ema")):
        found = files[name][key]
        assert torch.equal(found, kept[kind][f"unet.{inner}"].to(found.dtype))
        assert (average in files[name]) is (name == "full")
    assert torch.equal(files["full"][average].float(), kept["ema"][f"unet.{inner}"].to(files["full"][average].dtype))
