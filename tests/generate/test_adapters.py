"""Requests that splice files in: against diffusers with the same files, counted in the recipe, gone afterwards."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.errors import GouacheError, RequestError
from gouache.generate.adapters import AdapterSpec, read_spec
from gouache.generate.notes import adapter_notes, notes
from gouache.generate.request import Request
from tests.adapters.loras import factors, save_kohya, save_peft
from tests.adapters.test_attach import same, weights
from tests.pipelines import Narrow

KNOBS = {"steps": 4, "size": (64, 64), "seed": 3, "cfg": 3.0}


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    loaded: dict[str, Model] = {}

    def load(line: str) -> Model:
        if line not in loaded:
            loaded[line] = gouache.load(narrow(line).file, device="cpu", dtype="fp32")
        return loaded[line]

    return load


def latent(model: Model, prompt: str = "a cat", **knobs: object) -> Tensor:
    return next(model.paint(prompt, **{**KNOBS, **knobs})).latent


@pytest.mark.parametrize("line", ["sd1", "sdxl"])
@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_networks_with_a_lora_are_those_of_diffusers_with_it(
    line: str,
    save: Callable[..., Path],
    models: Callable[[str], Model],
    narrow: Callable[[str], Narrow],
    tmp_path: Path,
):
    model = models(line)
    parts = {module: pair for module, pair in factors(model).items() if line == "sd1" or module[0] == "unet"}
    path = save(tmp_path / "style.safetensors", model, parts)
    pipeline = copy.deepcopy(narrow(line).pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
    context = torch.randn(2, 77, model.unet.spec.context_dim, generator=torch.Generator().manual_seed(1))
    vector, more = None, {}
    if line == "sdxl":
        vector = torch.randn(2, 96 + 6 * 256, generator=torch.Generator().manual_seed(2))
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": vector[:, :96], "time_ids": ids}}
        from gouache.nn.blocks import timestep_embedding

        vector = torch.cat([vector[:, :96], timestep_embedding(ids.flatten(), 256).reshape(2, -1)], 1)

    on = model.attach(path)
    with torch.inference_mode():
        theirs = pipeline.unet(x, t, context, **more).sample
        mine = model.unet(x, t, context, vector)
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
        if line == "sd1":
            torch.testing.assert_close(
                model.encode_prompts(["a cat"]).context, pipeline.encode_prompt("a cat", "cpu", 1, False)[0],
                atol=1e-4, rtol=1e-4,
            )  # fmt: skip
        else:
            assert on.matched == len(parts)
    on.detach()
    with torch.inference_mode():
        assert (model.unet(x, t, context, vector) - mine).abs().max() > 1e-2


def test_a_tag_an_option_and_attach_are_one(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    before = weights(model)
    plain = latent(model)

    by_tag = latent(model, f"a cat<lora:{path}:0.8>")
    by_option = latent(model, lora=f"{path}:0.8")
    on = model.attach(path, 0.8)
    attached = latent(model)
    on.detach()

    assert torch.equal(by_tag, by_option) and torch.equal(by_tag, attached)
    assert not torch.equal(by_tag, plain) and torch.equal(latent(model), plain)
    assert same(before, weights(model))


def test_the_recipe_counts_and_repeats(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "zorblax.safetensors")

    picture = next(
        model.paint("a zorblax", lora=[f"{path}:0.8:te=0.5"], embedding=tmp_path / "zorblax.safetensors", **KNOBS)
    )

    import hashlib

    lora, embedding = picture.recipe["adapters"]
    assert lora["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert (lora["kind"], lora["form"], lora["how"]) == ("lora", "lora", "folded")
    assert (lora["strength"]["unet"], lora["strength"]["text"]) == (0.8, 0.5)
    assert lora["matched"] == len(factors(model)) and (lora["unmatched"], lora["wrong_shape"]) == (0, 0)
    assert (embedding["kind"], embedding["matched"]) == ("embedding", 2)
    assert f'Lora hashes: "style: {lora["sha256"][:12]}"' in picture.parameters
    assert f'TI hashes: "zorblax: {embedding["sha256"][:12]}"' in picture.parameters
    again = next(model.paint(Request.from_json(json.loads(json.dumps(picture.recipe["request"])))))
    assert torch.equal(again.latent, picture.latent)


def test_stopping_in_the_middle_takes_everything_off(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    before = weights(model)

    pictures = model.paint(f"<lora:{path}:1>", count=3, **KNOBS)
    next(pictures)
    assert not same(before, weights(model))
    pictures.close()

    assert same(before, weights(model)) and not list(model.adapters)


def test_a_bad_second_file_takes_the_first_off_again(models: Callable[[str], Model], tmp_path: Path):
    model, other = models("sd1"), models("sdxl")
    good = save_kohya(tmp_path / "good.safetensors", model, factors(model))
    bad = save_kohya(tmp_path / "bad.safetensors", other, factors(other))
    before = weights(model)

    with pytest.raises(GouacheError) as refused:
        next(model.paint("a cat", lora=[str(good), str(bad)], **KNOBS))

    assert "bad.safetensors" in str(refused.value) and "\n" not in str(refused.value)
    assert same(before, weights(model))


def test_a_lora_for_some_of_the_steps(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    parts = {module: pair for module, pair in factors(model).items() if module[0] == "unet"}
    path = save_kohya(tmp_path / "style.safetensors", model, parts)
    plain, whole = latent(model), latent(model, lora=f"{path}:1:how=live")

    first, second = (latent(model, lora=f"{path}:1:{part}") for part in ("end=0.5", "start=0.5"))

    assert torch.equal(latent(model, lora=f"{path}:1:start=0:end=1:how=live"), whole)
    assert len({tuple(each.flatten().tolist()) for each in (plain, whole, first, second)}) == 4
    # Of four steps the first two with it, the last two without: the sampler's own steps, one after the other.
    sigmas: list[tuple[float, bool]] = []
    real = type(model).denoise

    def watched(self: Model, x: Tensor, sigma: Tensor, conditioning: object) -> Tensor:
        (layer,) = self.layers
        sigmas.append((float(sigma.max()), all(hook.on for hook in layer.hooks.values())))
        return real(self, x, sigma, conditioning)  # type: ignore[arg-type]

    type(model).denoise = watched  # type: ignore[method-assign]
    try:
        latent(model, lora=f"{path}:1:end=0.5", sampler="Heun")
    finally:
        type(model).denoise = real  # type: ignore[method-assign]
    levels = sorted({sigma for sigma, _ in sigmas}, reverse=True)
    assert all(on == (levels.index(sigma) < 2) for sigma, on in sigmas)


def test_another_vae_for_one_run(models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    model = models("sd1")
    own = model.vae
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny().eval()
    save_file(tiny.state_dict(), tmp_path / "taesd.safetensors")

    picture = next(model.paint("a cat", vae=str(tmp_path / "taesd.safetensors"), **KNOBS))

    with torch.inference_mode():
        wanted = tiny.decode(picture.latent[None]).sample[0]
    levels = torch.from_numpy(__import__("numpy").array(picture.image)).permute(2, 0, 1).float()
    torch.testing.assert_close(levels, ((wanted / 2 + 0.5).clamp(0, 1) * 255).round(), atol=1.01, rtol=0)
    assert picture.recipe["adapters"][0]["kind"] == "vae" and "VAE: taesd.safetensors" in picture.parameters
    assert model.vae is own
    model.vae = tmp_path / "taesd.safetensors"  # type: ignore[assignment]
    assert model.vae is not own and torch.equal(latent(model), picture.latent)
    model.vae = own
    assert model.vae_file is None
    next(model.paint("a cat", vae="none", **KNOBS))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("style", AdapterSpec("style")),
        ("style:0.8", AdapterSpec("style", 0.8)),
        ("style:0.5:1", AdapterSpec("style", 1.0, 0.5)),
        ("folder/style.safetensors:-1:te=0", AdapterSpec("folder/style.safetensors", -1.0, 0.0)),
        (r"C:\models\style.safetensors:.5", AdapterSpec(r"C:\models\style.safetensors", 0.5)),
        ("style:te=0.5:unet=1", AdapterSpec("style", 1.0, 0.5)),
        ("style:1:start=0.2:end=0.8:how=live", AdapterSpec("style", 1.0, None, 0.2, 0.8, "live")),
        ("style:1:te1=0.5:te2=0", AdapterSpec("style", 1.0, {"text_encoder": 0.5, "text_encoder_2": 0.0})),
        ("style:1:te=0.2:te2=0", AdapterSpec("style", 1.0, {"text_encoder": 0.2, "text_encoder_2": 0.0})),
        ("style:5e-1:lbw=INALL", AdapterSpec("style", 0.5, blocks="INALL")),
        ("a:b", AdapterSpec("a:b")),
    ],
)
def test_a_file_and_its_strengths(text: str, told: AdapterSpec):
    assert read_spec("lora", text) == told


@pytest.mark.parametrize("text", ["", ":0.8", "a:1:2:3", "a:te=x", "a:start=0.9:end=0.1", "a:how=sideways"])
def test_what_is_no_file_with_strengths(text: str):
    with pytest.raises(RequestError, match="lora"):
        read_spec("lora", text)


def test_trigger_words_and_unused_embeddings_are_mentioned(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    told = {"ss_tag_frequency": json.dumps({"10_fox": {"zorb fox": 30, "sitting": 4}})}
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model), metadata=told)
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "zorblax.safetensors")
    said: list[str] = []

    for prompt in ("a cat", "a Zorb  Fox, zorblax"):
        request = Request(prompt=prompt, lora=(str(path),), embedding=(str(tmp_path / "zorblax.safetensors"),), **KNOBS)  # type: ignore[arg-type]
        next(model.paint(request, on_attached=lambda found, r=request: said.extend(adapter_notes(r, found))))

    assert len(said) == 2 and "zorb fox, sitting" in said[0] and said[1].startswith("zorblax stands in no prompt")
    assert not [note for note in notes(model, Request(prompt="<lora:x:1> a cat")) if "plain text" in note]
