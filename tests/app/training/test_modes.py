"""Modes as settings reach them: variants of the families, what is trained, where it starts, priors."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import export, prepare, runs
from gouache.app.training.folder import RunFolder
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.noise import Noise
from gouache.errors import GouacheError
from gouache.training.run_settings import RunSettings
from tests.app.training.short_runs import run, settings_of
from tests.marks import usual
from tests.pipelines import Narrow, scheduler

Narrows = Callable[[str], Narrow]
WEIGHTS: dict[str, Any] = {"mode": "finetune", "adapter": {"form": "none"}}


@pytest.fixture
def small(narrow: Narrows, pictures: Path, tmp_path: Path) -> Callable[..., RunSettings]:
    """Settings of a short run of the narrow model of a family, or of a file."""

    def make(family: str | Path, **tables: Any) -> RunSettings:
        file = family if isinstance(family, Path) else narrow(family).file
        usual: dict[str, Any] = {"adapter": {"rank": 2}, "train": {"steps": 2}, "validation": {"probe": 0}}
        for name, value in tables.items():
            usual[name] = {**usual.get(name, {}), **value} if isinstance(value, dict) else value
        return settings_of(file, pictures, tmp_path / "out.safetensors", **usual)

    return make


def ready(chosen: RunSettings, folder: Path, settings: Settings, notes: list[str] | None = None) -> Any:
    return prepare.prepared(
        chosen, RunFolder(folder), settings, on_note=(notes if notes is not None else []).append,
        on_work=lambda what, done, total: None, fill_caches=False,
    )  # fmt: skip


Small = Callable[..., RunSettings]


@pytest.mark.parametrize("mode", ["lora", pytest.param("finetune", marks=pytest.mark.full)])
def test_sd2_is_trained_for_what_it_is_said_to_predict(mode: str, small: Small, settings: Settings, tmp_path: Path):
    tables = WEIGHTS if mode == "finetune" else {}
    chosen = small("sd2", **tables, model={"prediction": "eps"}, validation={"timesteps": 1})
    with ready(chosen, tmp_path / "run", settings) as found:
        assert found.objective.prediction == "eps"
    finished = run(chosen, tmp_path / "run", settings)
    assert finished.path is not None and finished.path.exists()


@pytest.mark.parametrize("family", ["sd1", *(pytest.param(each, marks=pytest.mark.full) for each in ("sd2", "sdxl"))])
def test_growing_to_nine_channels_changes_nothing_at_step_0_and_the_result_is_trained_on(
    family: str, small: Small, narrow: Narrows, settings: Settings, tmp_path: Path
):
    base = gouache.load(narrow(family).file, device="cpu", dtype="fp32", settings=settings)
    context = base.encode_prompts(["a cat"], size=(64, 64))
    x, extra = (torch.randn(1, count, 8, 8, generator=torch.Generator().manual_seed(count)) for count in (4, 5))
    sigma = torch.tensor([2.0])
    chosen = small(family, **WEIGHTS, model={"inpainting": True}, train={"steps": 1})
    with torch.no_grad(), ready(chosen, tmp_path / "a", settings) as found:
        grown = found.model.denoiser(Conditioning(context.context, context.vector, extra))(x, sigma)
        assert torch.equal(grown, base.denoiser(context)(x, sigma))
        assert found.batches(0).conditioning.concat.shape[1] == 5

    finished = run(chosen, tmp_path / "a", settings)
    assert finished.path is not None
    inpainting = finished.path.rename(tmp_path / "inpainting.safetensors")
    adapter = run(small(inpainting, train={"steps": 1}), tmp_path / "b", settings)
    assert adapter.path is not None
    loaded = gouache.load(inpainting, device="cpu", dtype="fp32", settings=settings)
    attached = loaded.attach(adapter.path)
    assert loaded.variant == "inpainting" and not attached.unmatched and not attached.wrong_shape


def test_a_lora_of_a_model_to_be_grown_is_refused_before_it_is_loaded(
    small: Small, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("the model was loaded"))
    with pytest.raises(GouacheError, match="4 input channels; train its weights"):
        run(small("sd1", model={"inpainting": True}), tmp_path / "run", settings)


def test_ranks_alphas_and_rates_by_block_and_part(small: Small, settings: Settings, tmp_path: Path):
    adapter = {"rank": 2, "ranks": {"M00": 4, "text_encoder": 1}, "alphas": {"M00": 8.0}, "rates": {"M00": 0.25}}
    chosen = small("sdxl", adapter=adapter, parts={"text_encoder": True, "text_rate": 0.5, "text_rate_2": 0.1})
    with ready(chosen, tmp_path / "run", settings) as found:
        target = found.target
        rates = {id(each): group.rate for group in target.groups() for each in group.parameters.values()}
        seen = set[tuple[str, int, float, float]]()
        for part, path in target.modules:
            keys = target.adapter.keys_of((part, path))
            down = getattr(target.adapter, keys["lora_down.weight"])
            alpha = float(getattr(target.adapter, keys["alpha"]))
            where = "M00" if path.startswith("middle_block") else part
            seen.add((where, down.shape[0], alpha, rates[id(down)]))
    assert seen == {
        ("M00", 4, 8.0, 0.25), ("unet", 2, 2.0, 1.0), ("text_encoder", 1, 1.0, 0.5), ("text_encoder_2", 2, 2.0, 0.1),
    }  # fmt: skip


@pytest.mark.parametrize("form", usual(("lora", "none"), ("lora",)))
def test_the_rates_of_parts_may_change_when_a_run_is_resumed(
    form: str, small: Small, settings: Settings, tmp_path: Path
):
    plain = {"form": form} if form == "none" else {"form": form, "rank": 2}
    first = small("sd1", adapter=plain, parts={"text_encoder": True, "text_rate": 1.0}, train={"steps": 2})
    run(first, tmp_path / "run", settings, stop_after=1)
    ratio = {"plus_ratio": 16.0} if form == "lora" else {}
    second = small(
        "sd1", adapter={**plain, **ratio}, parts={"text_encoder": True, "text_rate": 0.1}, train={"steps": 2}
    )
    assert run(second, tmp_path / "run", settings).path is not None


def test_unequal_rates_with_prodigy_are_refused_before_the_model_is_loaded(
    small: Small, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    pytest.importorskip("prodigyopt")
    monkeypatch.setattr(prepare, "load_model", lambda *_: pytest.fail("the model was loaded"))
    for tables in (
        {"parts": {"text_encoder": True}},
        {"adapter": {"plus_ratio": 16.0}},
        {"adapter": {"rates": {"M00": 0.5}}},
    ):
        with pytest.raises(GouacheError, match="one rate for all parts"):
            run(small("sd1", train={"optimizer": "prodigy"}, **tables), tmp_path / "run", settings)


@pytest.mark.parametrize(
    ("adapter", "convolutions"),
    [({}, False), ({"conv_rank": 1}, True), ({"form": "locon"}, True), ({"form": "loha", "modules": "conv"}, True)],
)
def test_convolutions_are_trained_where_a_rank_or_the_form_asks_for_them(
    adapter: dict[str, Any], convolutions: bool, small: Small, settings: Settings, tmp_path: Path
):
    with ready(small("sd1", adapter=adapter), tmp_path / "run", settings) as found:
        assert ("unet", "input_blocks.1.0.in_layers.2") in found.target.modules or not convolutions
        assert any(path.endswith("in_layers.2") for _, path in found.target.modules) == convolutions


def test_an_adapter_starts_from_another_with_its_weights_alone(small: Small, settings: Settings, tmp_path: Path):
    first = run(small("sd1", adapter={"alpha": 1}), tmp_path / "a", settings)
    assert first.path is not None
    start = first.path.rename(tmp_path / "start.safetensors")
    chosen = small("sd1", adapter={"start": str(start), "rank": 7})
    with ready(chosen, tmp_path / "b", settings) as found:
        found.target.export({}, tmp_path / "again.safetensors", metadata={}, dtype="fp16")
        assert not found.target.notes
    one, two = load_file(start), load_file(tmp_path / "again.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def log_of(folder: Path, name: str) -> list[float]:
    return [line[name] for line in RunFolder(folder).log() if name in line]


@pytest.mark.parametrize("mode", usual(("lora", "weights"), ("lora",)))
def test_the_prior_of_the_model_begins_with_no_loss_and_needs_no_pictures(
    mode: str, small: Small, settings: Settings, tmp_path: Path
):
    """Before the first step the model predicts what it predicted before training."""
    chosen = small(
        "sd1", **({"adapter": {"form": "none"}} if mode == "weights" else {}), mode="dreambooth",
        data={"trigger": "zorb", "class_word": "a cat"}, loss={"prior": "model"}, train={"steps": 6, "batch": 4},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    losses = log_of(tmp_path / "run", "prior")
    assert losses[0] < 1e-10 < 1e-6 < max(losses)  # rounding depends on the batch
    with ready(chosen, tmp_path / "run", settings) as found:
        examples = [each for number in range(len(found.batches)) for each in found.batches.examples(number)]
        of_class = [each for each in examples if each.row.record.regularization]
        assert {each.caption for each in of_class} == {"a cat"}
        assert len(of_class) == len(examples) / 2


def test_the_prior_of_the_model_needs_the_word_for_the_class(small: Small, settings: Settings, tmp_path: Path):
    with pytest.raises(GouacheError, match=r"data\.class_word: is missing"):
        run(small("sd1", loss={"prior": "model"}), tmp_path / "run", settings)


def test_class_pictures_limit_the_loss_by_the_weight_of_the_prior(small: Small, settings: Settings, tmp_path: Path):
    (tmp_path / "cats").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "cats/0.png")
    data = {"class_folder": str(tmp_path / "cats"), "class_word": "a cat", "trigger": "zorb"}
    kinds = dict[float, float]()
    for weight in (0.0, 1.0):
        chosen = small("sd1", data=data, loss={"prior": "pictures", "prior_weight": weight}, train={"batch": 1})
        with ready(chosen, tmp_path / "run", settings) as found:
            numbers = range(len(found.batches))
            number = next(each for each in numbers if found.batches.examples(each)[0].row.record.regularization)
            losses = found.objective.losses(found.batches(number), number)
            kinds[weight] = losses["loss"].item()
    assert kinds[0.0] == 0 < kinds[1.0] == pytest.approx(float(losses["prior"]))


def test_class_pictures_that_were_painted_serve_the_next_run(small: Small, settings: Settings, tmp_path: Path):
    data = {"class_word": "a striped cat", "class_pictures": 2, "trigger": "zorb"}
    painted = list[str]()

    def work(what: str, done: int, total: int) -> None:
        painted.append(what)

    for name in ("a", "b"):
        chosen = small("sd1", data=data, loss={"prior": "pictures"}, mode="dreambooth", train={"steps": 1})
        chosen = chosen.model_copy(update={"output": str(tmp_path / f"{name}.safetensors")})
        runs.run(chosen, RunFolder(tmp_path / name), settings, on_note=lambda line: None, on_work=work)
    assert painted.count("painting class pictures") == 2


@pytest.mark.parametrize("mode", usual(("lora", "weights"), ("lora",)))
def test_the_text_encoder_stops_after_its_steps(mode: str, small: Small, settings: Settings, tmp_path: Path):
    tables = {"adapter": {"form": "none"}} if mode == "weights" else {}
    chosen = small(
        "sd1", **tables, parts={"text_encoder": True, "text_stop": 1},
        train={"steps": 3, "save_steps": 1, "keep": 9, "accumulate": 2, "batch": 1, "weight_decay": 0.1},
    )  # fmt: skip
    run(chosen, tmp_path / "run", settings)
    first, last = (load_file(tmp_path / "run" / f"step-{step:08d}" / "weights.safetensors") for step in (1, 3))
    changed = {name.split(".")[0] if mode == "weights" else name.split(".")[1].split("_model")[0]
               for name in first if not torch.equal(first[name], last[name])}  # fmt: skip
    text = [name for name in first if "text" in name and "unet" not in name]
    assert text and changed
    assert all(torch.equal(first[name], last[name]) for name in text)


@pytest.mark.parametrize("weights", [pytest.param("last", marks=pytest.mark.full), "ema"])
def test_which_weights_a_run_starts_from_is_said(weights: str, small: Small, settings: Settings, tmp_path: Path):
    tables = {**WEIGHTS, "train": {"steps": 2, "ema_decay": 0.9}}
    run(small("sd1", **tables), tmp_path / "a", settings)
    both = tmp_path / "both.safetensors"
    export.export(RunFolder(tmp_path / "a"), both, settings, weights="both", form="full")
    notes = list[str]()
    chosen = small(both, **WEIGHTS, model={"weights": weights})
    with ready(chosen, tmp_path / "b", settings, notes) as found:
        now = found.model.unet.state_dict()
        stored = load_file(both)
        prefix = "model_ema.diffusion_model" if weights == "ema" else "model.diffusion_model."
        for name, tensor in now.items():
            key = prefix + (name.replace(".", "") if weights == "ema" else name)
            assert torch.equal(tensor, stored[key].float()), name
    said = "starts from the averaged weights" if weights == "ema" else "starts from the last"
    assert any(said in note for note in notes), notes


@pytest.mark.parametrize("family", [pytest.param("sd1", marks=pytest.mark.full), "sdxl"])
def test_a_lora_paints_the_same_picture_in_diffusers(
    family: str, small: Small, narrow: Narrows, settings: Settings, tmp_path: Path
):
    chosen = small(family, parts={"text_encoder": True}, adapter={"rank": 4}, train={"learning_rate": 1e-3})
    finished = run(chosen, tmp_path / "run", settings)
    assert finished.path is not None
    model = gouache.load(narrow(family).file, device="cpu", dtype="fp32", settings=settings)
    options: dict[str, Any] = {"negative": "lowres", "steps": 4, "cfg": 5.0, "seed": 3, "size": (64, 64)}
    options |= {"sampler": "Euler", "schedule": "Uniform"}
    plain = next(model.paint("zorb, red", **options)).latent
    ours = next(model.paint("zorb, red", lora=[str(finished.path)], **options)).latent

    pipeline = copy.deepcopy(narrow(family).pipeline)
    pipeline.scheduler = scheduler("Euler", family)
    pipeline.load_lora_weights(str(finished.path.parent), weight_name=finished.path.name)
    sizes: dict[str, Any] = {"height": 64, "width": 64}
    theirs = pipeline(
        "zorb, red", negative_prompt="lowres", num_inference_steps=4, guidance_scale=5.0, output_type="latent",
        latents=Noise([3], (4, 8, 8)).start(), **sizes,
    ).images[0]  # fmt: skip

    scale = float(ours.abs().max())
    assert float((ours - plain).abs().max()) > 0.01 * scale
    torch.testing.assert_close(ours, theirs, atol=1e-4 * scale, rtol=0)
