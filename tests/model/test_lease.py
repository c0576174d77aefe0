"""One model shared by requests and threads: each has its own adapters, and the weights are restored bit for bit."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.adapters import attach as attaching
from gouache.errors import ModelError
from gouache.model.attach import Attached
from tests.adapters.loras import factors, save_kohya
from tests.adapters.test_attach import same, weights
from tests.pipelines import Narrow, altered

OPTIONS = {"steps": 3, "size": (64, 64), "seed": 3, "cfg": 3.0}


@pytest.fixture(params=[pytest.param("fp32", marks=pytest.mark.full), "bf16"])
def model(request: pytest.FixtureRequest, narrow: Callable[[str], Narrow]) -> Model:
    return gouache.load(narrow("sd1").file, device="cpu", dtype=request.param)


@pytest.fixture
def loras(model: Model, tmp_path: Path) -> list[str]:
    paths = [tmp_path / f"{number}.safetensors" for number in range(3)]
    return [str(save_kohya(path, model, factors(model, seed=seed))) for seed, path in enumerate(paths)]


def latents(model: Model, count: int = 1, **options: object) -> list[Tensor]:
    return [picture.latent for picture in model.paint("a cat", count=count, **{**OPTIONS, **options})]  # type: ignore[arg-type]


def test_threads_with_different_loras_get_the_pictures_they_would_get_alone(model: Model, loras: list[str]):
    before = weights(model)
    expected = [latents(model, 2), *(latents(model, 2, lora=[lora]) for lora in loras)]
    options: list[dict[str, object]] = [{}, *({"lora": [lora]} for lora in loras)]

    with ThreadPoolExecutor(len(options)) as pool:
        found = list(pool.map(lambda each: latents(model, 2, **each), options))

    for shared, alone in zip(found, expected):
        assert all(torch.equal(one, other) for one, other in zip(shared, alone, strict=True))
    assert same(before, weights(model)) and not list(model.adapters) and not model.attached


def test_two_open_iterations_take_turns(model: Model, loras: list[str]):
    alone = [latents(model, 3, lora=[lora]) for lora in loras[:2]]
    plain = latents(model)

    one = model.paint("a cat", count=3, lora=[loras[0]], **OPTIONS)  # type: ignore[arg-type]
    two = model.paint("a cat", count=3, lora=[loras[1]], **OPTIONS)  # type: ignore[arg-type]
    pictures = [[next(one).latent], [next(two).latent]]
    assert torch.equal(latents(model)[0], plain[0])
    for _ in range(2):
        pictures[0].append(next(one).latent)
        pictures[1].append(next(two).latent)

    for shared, expected in zip(pictures, alone):
        assert all(torch.equal(a, b) for a, b in zip(shared, expected, strict=True))


def test_a_suspended_iteration_blocks_no_other_thread(model: Model, loras: list[str]):
    plain = latents(model)
    suspended = model.paint("a cat", count=2, lora=[loras[0]], **OPTIONS)  # type: ignore[arg-type]
    first = next(suspended)

    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.extend(latents(model)), daemon=True)
    thread.start()
    thread.join(120)

    assert not thread.is_alive() and torch.equal(found[0], plain[0])
    assert not torch.equal(first.latent, plain[0])
    suspended.close()


def test_a_deleted_iteration_detaches_its_adapters(model: Model, loras: list[str]):
    before = weights(model)
    pictures = model.paint("a cat", count=2, lora=[loras[0]], **OPTIONS)  # type: ignore[arg-type]
    next(pictures)
    del pictures

    assert same(before, weights(model)) and not list(model.adapters)


def test_an_adapter_of_the_caller_applies_to_every_request(model: Model, loras: list[str]):
    both, alone = latents(model, lora=[loras[0], loras[1]]), latents(model, lora=[loras[1]])
    attached = model.attach(loras[0])

    suspended = model.paint("a cat", count=2, lora=[loras[1]], **OPTIONS)  # type: ignore[arg-type]
    assert torch.equal(next(suspended).latent, both[0])
    assert torch.equal(latents(model)[0], latents(model, lora=[])[0])
    attached.detach()
    next(suspended)

    assert torch.equal(latents(model, lora=[loras[1]])[0], alone[0])


def test_a_request_in_the_callback_of_another_changes_neither(model: Model, loras: list[str]):
    alone, inner_alone = latents(model, lora=[loras[0]]), latents(model, lora=[loras[1]])
    inner: list[Tensor] = []

    def on_step(step: object) -> None:
        if not inner:
            inner.extend(latents(model, lora=[loras[1]]))

    outer = [p.latent for p in model.paint("a cat", lora=[loras[0]], on_step=on_step, **OPTIONS)]  # type: ignore[arg-type]

    assert torch.equal(outer[0], alone[0]) and torch.equal(inner[0], inner_alone[0])


def test_the_same_adapters_twice_in_a_row_are_folded_once(
    model: Model, loras: list[str], monkeypatch: pytest.MonkeyPatch
):
    folds: list[int] = []
    fold = attaching.fold

    def counted(*arguments: object) -> object:
        folds.append(1)
        return fold(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(attaching, "fold", counted)
    first = latents(model, lora=[loras[0], loras[1]])
    before = len(folds)
    again = latents(model, lora=[loras[0], loras[1]])
    assert before > 0 and len(folds) == before and torch.equal(first[0], again[0])

    other = latents(model, lora=[f"{loras[0]}:0.5", loras[1]])
    assert len(folds) > before and not torch.equal(other[0], first[0])


def test_a_file_that_was_replaced_is_folded_again(model: Model, loras: list[str]):
    first = latents(model, lora=[loras[0]])
    save_file({name: tensor * 2 for name, tensor in load_file(loras[0]).items()}, loras[0])

    assert not torch.equal(latents(model, lora=[loras[0]])[0], first[0])


def test_a_lora_that_gives_nan_leaves_the_model_as_it_was(model: Model, loras: list[str], tmp_path: Path):
    plain, before = latents(model), weights(model)
    tensors = load_file(loras[0])
    for name in tensors:
        if "unet" in name and name.endswith("lora_up.weight"):
            tensors[name] = torch.full_like(tensors[name], 1e30)
    save_file(tensors, tmp_path / "bad.safetensors")

    with pytest.raises(ModelError, match="NaN or infinite"):
        latents(model, lora=[str(tmp_path / "bad.safetensors")])

    assert not model.upcast and same(before, weights(model))
    assert torch.equal(latents(model)[0], plain[0])
    assert all(math.isfinite(float(parameter.float().sum())) for parameter in model.unet.parameters())


def test_a_request_that_failed_half_way_is_refused_again(
    model: Model, loras: list[str], narrow: Callable[[str], Narrow], tmp_path: Path
):
    other = gouache.load(narrow("sdxl").file, device="cpu", dtype="fp32")
    bad = str(save_kohya(tmp_path / "other.safetensors", other, factors(other)))
    before = weights(model)

    for _ in range(2):
        with pytest.raises(ModelError, match="other"):
            latents(model, lora=[loras[0], bad])

    assert same(before, weights(model)) and not model.attached


def test_a_failing_request_in_a_callback_does_not_disturb_the_outer_one(model: Model, loras: list[str], tmp_path: Path):
    alone = latents(model, lora=[loras[0]])
    (tmp_path / "bad.safetensors").write_bytes(b"not a model")
    wide = {name: torch.cat([t, t], -1) if t.ndim > 1 else t for name, t in load_file(loras[1]).items()}
    save_file(wide, tmp_path / "wide.safetensors")
    refused: list[str] = []

    def on_step(step: object) -> None:
        for name in ("bad", "wide"):
            with pytest.raises(gouache.GouacheError):
                latents(model, lora=[loras[1], str(tmp_path / f"{name}.safetensors")])
            refused.append(name)

    found = [p.latent for p in model.paint("a cat", lora=[loras[0]], on_step=on_step, **OPTIONS)]  # type: ignore[arg-type]

    assert len(refused) == 6 and torch.equal(found[0], alone[0])


@pytest.mark.parametrize("going_on", [True, False])
@pytest.mark.parametrize("moment", [0, 1, 40, 100])
def test_an_interrupt_while_adapters_are_exchanged_loses_nothing(
    moment: int, going_on: bool, narrow: Callable[[str], Narrow], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Ctrl-C while another request takes the model: in `disable` (0), or at some weight that is restored."""
    model = gouache.load(narrow("sd1").file, device="cpu", dtype="fp32")
    lora = save_kohya(tmp_path / "lora.safetensors", model, factors(model))
    other = altered(narrow("sd1").file, tmp_path / "vae.safetensors", lambda tensors: None)
    options = {"lora": [str(lora)], "vae": str(other)}
    alone, before, vae = latents(model, 2, **options), weights(model), model.vae
    pictures = model.paint("a cat", count=2, **options, **OPTIONS)  # type: ignore[arg-type]
    next(pictures)
    calls = 0

    def interrupting(function: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object) -> object:
            nonlocal calls
            calls += 1
            if calls == max(moment, 1):
                raise KeyboardInterrupt
            return function(*arguments)

        return call

    with monkeypatch.context() as patch:
        if moment:
            patch.setattr(model.adapters, "_restore", interrupting(model.adapters._restore))
        else:
            patch.setattr(Attached, "disable", interrupting(Attached.disable))
        with pytest.raises(KeyboardInterrupt):
            latents(model)

    if going_on:
        assert torch.equal(next(pictures).latent, alone[1])
    pictures.close()
    assert same(before, weights(model)) and model.vae is vae and not model.attached and not list(model.adapters)


def test_a_model_that_painted_can_be_trained(model: Model):
    pictures = list(model.paint("a cat", **OPTIONS))  # type: ignore[arg-type]

    x = torch.randn(1, 3, 64, 64, requires_grad=True)
    model.encode(x).sum().backward()
    latent = pictures[0].latent[None].requires_grad_()
    model.decode(latent).sum().backward()
    sigma = torch.tensor([0.7])
    for parameter in model.vae.parameters():
        parameter.requires_grad_(True)
    conditioning = model.encode_prompts(["a cat"])
    unet = next(model.unet.parameters()).requires_grad_(True)
    model.denoiser(conditioning).loss_terms(latent.detach(), torch.ones(1, 4, 8, 8), sigma)[0].sum().backward()

    assert x.grad is not None and latent.grad is not None and unet.grad is not None


def test_weights_in_training_survive_a_picture_with_a_lora(model: Model, loras: list[str]):
    """The parameters stay the same objects, with what was learnt, and a preview shows the newest weights."""
    layer = model.unet.get_submodule("middle_block.1.transformer_blocks.0.attn2.to_k")
    parameter = layer.weight.requires_grad_(True)
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    pictures = []
    for _ in range(2):
        before = parameter.detach().clone()
        parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        after = parameter.detach().clone()

        pictures += latents(model, lora=[loras[0]])

        assert layer.weight is parameter and torch.equal(parameter, after) and not torch.equal(after, before)
    assert not torch.equal(*pictures)


def test_edited_weights_survive_a_picture_with_a_lora(model: Model, loras: list[str]):
    layer = model.unet.get_submodule("middle_block.1.transformer_blocks.0.attn2.to_k")
    first = latents(model, lora=[loras[0]])
    with torch.no_grad():
        layer.weight.mul_(0.5)
    edited = layer.weight.detach().clone()

    second = latents(model, lora=[loras[0]])

    assert torch.equal(layer.weight, edited) and not torch.equal(first[0], second[0])


def test_a_lora_of_the_caller_that_gave_nan_leaves_no_stage_in_float32(model: Model, loras: list[str], tmp_path: Path):
    before = weights(model)
    tensors = {
        name: torch.full_like(t, 1e30) if "unet" in name and name.endswith("lora_up.weight") else t
        for name, t in load_file(loras[0]).items()
    }
    save_file(tensors, tmp_path / "bad.safetensors")
    attached = model.attach(tmp_path / "bad.safetensors")
    with pytest.raises(ModelError, match="NaN or infinite"):
        latents(model)

    attached.detach()

    assert not model.upcast and same(before, weights(model))
