"""Memory of a run: encoders are freed, its settings are reachable, and a lack of it ends in one line."""

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

import gouache
from gouache.app.settings import Settings
from gouache.app.training import prepare, runs
from gouache.app.training.folder import RunFolder
from gouache.errors import TrainingError
from gouache.generate import run as generate
from gouache.training import state
from gouache.training.denoising import Denoising
from gouache.training.memory import Simulation

from .short_runs import Narrows, make_pictures, run, small_settings


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    return make_pictures(tmp_path / "pictures")


def equal(one: Path, other: Path) -> bool:
    first, second = load_file(one), load_file(other)
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize(("family", "dtype"), [("sd1", "fp32"), ("sd1", "bf16"), ("sdxl", "fp32")])
def test_weights_that_were_unloaded_are_gone_and_come_back_equal(family: str, dtype: str, narrow: Narrows):
    model = gouache.load(narrow(family).file, device="cpu", dtype=dtype)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(1)) * 2 - 1
    latents, text = model.encode(picture), model.encode_prompts(["a cat"])

    unet = {name: each.clone() for name, each in model.unet.state_dict().items()}
    strides = {name: each.stride() for name, each in model.unet.state_dict().items()}
    networks = (model.vae, model.unet, *model.text_encoders.values())
    storages = [weakref.ref(each.untyped_storage()) for network in networks for each in network.parameters()]
    model.unload("VAE")
    model.unload("text encoder")
    model.unload("U-Net")
    gc.collect()
    assert all(each() is None for each in storages)
    assert all(each.is_meta for network in networks for each in network.parameters())

    again = model.encode_prompts(["a cat"])
    assert torch.equal(model.encode(picture), latents)
    assert torch.equal(again.context, text.context)
    model.reload("U-Net")
    assert all(torch.equal(each, unet[name]) for name, each in model.unet.state_dict().items())
    assert {name: each.stride() for name, each in model.unet.state_dict().items()} == strides
    assert not model.unloaded and not any(each.requires_grad for each in model.unet.parameters())


@pytest.mark.full
def test_encoders_are_freed_between_samples_and_the_run_is_the_same_as_with_them(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded: list[Any] = []
    load = prepare.load_model
    monkeypatch.setattr(prepare, "load_model", lambda *given: loaded.append(load(*given)) or loaded[-1])
    unloaded: list[set[str]] = []
    file = narrow("sd1").file

    def chosen(name: str, **data: Any) -> Any:
        samples = {"every": 2, "steps": 2}
        return small_settings(file, pictures, tmp_path / f"{name}.safetensors", data=data, samples=samples)

    run(chosen("freed"), tmp_path / "freed", settings, on_progress=lambda _: unloaded.append({*loaded[-1].unloaded}))
    assert unloaded == [{"VAE", "text encoder"}] * 4
    run(chosen("kept", cache=False), tmp_path / "kept", settings)
    assert not loaded[-1].unloaded

    assert equal(tmp_path / "freed.safetensors", tmp_path / "kept.safetensors")
    for name in ("step-00000000-00.png", "step-00000002-00.png", "step-00000004-00.png"):
        one, other = (Image.open(tmp_path / folder / "samples" / name) for folder in ("freed", "kept"))
        assert ImageChops.difference(one, other).getbbox() is None


@pytest.mark.full
def test_a_caption_that_is_not_cached_brings_the_text_encoder_back(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    data = {"shuffle": True}
    fill = prepare._fill
    monkeypatch.setattr(prepare, "_fill", lambda settings, batches, on_work: None)
    run(
        small_settings(narrow("sd1").file, pictures, tmp_path / "late.safetensors", data=data),
        tmp_path / "late",
        settings,
    )
    monkeypatch.setattr(prepare, "_fill", fill)
    run(
        small_settings(narrow("sd1").file, pictures, tmp_path / "full.safetensors", data=data),
        tmp_path / "full",
        settings,
    )

    assert equal(tmp_path / "late.safetensors", tmp_path / "full.safetensors")


def test_trained_text_encoders_are_not_freed(narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path):
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors", parts={"text_encoder": True})
    with prepare.prepared(
        chosen, runs.RunFolder(tmp_path / "run"), settings, on_note=lambda line: None, on_work=lambda *done: None
    ) as ready:
        assert ready.model.unloaded == {"VAE"}


@pytest.mark.full
@pytest.mark.parametrize("rounding", ["master", "stochastic"])
def test_weights_in_bf16_train_resume_and_change(
    rounding: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path
):
    chosen = small_settings(
        narrow("sd1").file, pictures, tmp_path / "out.safetensors", mode="finetune", adapter={"form": "none"},
        memory={"dtype": "bf16", "checkpointing": True},
        train={"rounding": rounding, "accumulate": 2, "ema_decay": 0.9, "ema_on_cpu": True, "batch": 1, "steps": 3},
    )  # fmt: skip
    run(chosen, tmp_path / "whole", settings)
    steps = iter((False, False, True))
    run(chosen, tmp_path / "parts", settings, should_stop=lambda: next(steps, True))
    run(chosen, tmp_path / "parts", settings)

    ends = [tmp_path / name / "step-00000003" for name in ("whole", "parts")]
    assert all(equal(ends[0] / f"{name}.safetensors", ends[1] / f"{name}.safetensors") for name in ("weights", "ema"))
    dtypes = {tensor.dtype for tensor in load_file(ends[0] / "weights.safetensors").values()}
    assert dtypes == {torch.float32 if rounding == "master" else torch.bfloat16}
    before, after = load_file(narrow("sd1").file), load_file(tmp_path / "out.safetensors")
    assert any(not torch.equal(before[name].bfloat16(), after[name].bfloat16()) for name in before)


def test_a_simulation_counts_what_is_held_at_once():
    simulated = Simulation(torch.device("cpu"))
    layer = torch.nn.Linear(1000, 1000, bias=False, device="meta")
    simulated.convert(layer)
    x = simulated.empty(500, 1000)

    with torch.no_grad():
        peak, kept = simulated.measure(lambda: layer(x))
    assert (peak, kept) == (2_000_000, 2_000_000)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        peak, kept = simulated.measure(lambda: layer(x))
    # Both in half precision, and the result; autocast keeps the copy of a trained weight.
    assert (peak, kept) == (1_000_000 + 2_000_000 + 1_000_000, 2_000_000 + 1_000_000)


ERRORS = {
    "GPU": (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has ..."), "2684 MB"),
    "Python": (MemoryError(), ""),
    "library": (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), ""),
    "CPU": (None, "MB"),
}


@pytest.mark.parametrize("kind", ["CPU", *(pytest.param(e, marks=pytest.mark.full) for e in ERRORS if e != "CPU")])
def test_a_lack_of_memory_is_one_line_and_the_run_goes_on_later(
    kind: str, narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    error, amount = ERRORS[kind]
    losses = Denoising.losses

    def fail(self: Denoising, batch: Any, number: int) -> Any:
        if number == 3:
            if error is None:
                torch.empty(1 << 46, dtype=torch.uint8)  # 64 TB: torch's own error
            raise error or AssertionError
        return losses(self, batch, number)

    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors")
    with monkeypatch.context() as patch, pytest.raises(TrainingError, match="memory is not enough") as caught:
        patch.setattr(Denoising, "losses", fail)
        run(chosen, tmp_path / "run", settings)
    message = str(caught.value)
    assert "\n" not in message and amount in message
    assert "memory.checkpointing = true" in message and "train.batch below 2" in message
    assert "the checkpoint of step 2 is kept" in message
    assert state.read(tmp_path / "run" / "step-00000002").step == 2

    run(chosen, tmp_path / "run", settings)
    resumed = (tmp_path / "out.safetensors").rename(tmp_path / "resumed.safetensors")
    run(chosen, tmp_path / "whole", settings)
    assert equal(resumed, tmp_path / "out.safetensors")


def test_other_errors_are_not_taken_for_a_lack_of_memory(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: Denoising, batch: Any, number: int) -> Any:
        raise RuntimeError("expected scalar type Float")

    monkeypatch.setattr(Denoising, "losses", fail)
    with pytest.raises(RuntimeError, match="scalar type"):
        run(small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors"), tmp_path / "run", settings)


def test_samples_without_memory_do_not_end_the_run(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*given: Any, **options: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(generate, "paint", fail)
    notes: list[str] = []
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors", train={"steps": 1})
    assert run(chosen, tmp_path / "run", settings, on_note=notes.append).path is not None
    assert "no samples at step 0: the memory is not enough" in notes


def test_the_heap_has_the_limit_of_steps_also_after_a_run_that_could_not_begin(
    narrow: Narrows, pictures: Path, settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    limits: list[int] = []
    monkeypatch.setattr("gouache.training.memory.limit_heap", limits.append)
    monkeypatch.setattr(prepare, "make_objective", lambda *a: (_ for _ in ()).throw(TrainingError("no objective")))
    chosen = small_settings(narrow("sd1").file, pictures, tmp_path / "out.safetensors")

    with (
        pytest.raises(TrainingError, match="no objective"),
        prepare.prepared(chosen, RunFolder(tmp_path), settings, on_note=print, on_work=lambda *a: None),
    ):
        pass

    assert limits == [1, 12]
