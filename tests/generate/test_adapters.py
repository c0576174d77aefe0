"""Requests with adapters: against diffusers with the same files, recorded in the recipe, detached afterwards."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gouache import Model
from gouache.diffusion.conditioning import Conditioning
from gouache.errors import GouacheError, RequestError
from gouache.generate import run
from gouache.generate.adapters import AdapterSpec, Kind, PathSource, read_spec
from gouache.generate.notes import adapter_notes, notes
from gouache.generate.request import Request
from gouache.nn.blocks import timestep_embedding
from tests.adapters.loras import factors, save_kohya, save_peft
from tests.adapters.test_attach import same, weights
from tests.pipelines import Narrow

OPTIONS = {"steps": 4, "size": (64, 64), "seed": 3, "cfg": 3.0}


class In(PathSource):
    """Files of one folder, by name."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def find(self, kind: Kind, name: str, *, paths: bool = True) -> Path:
        return self.folder / f"{name}.safetensors"


def latent(model: Model, prompt: str = "a cat", **options: object) -> Tensor:
    return next(model.paint(prompt, **{**OPTIONS, **options})).latent


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_networks_with_a_lora_give_the_outputs_of_diffusers(
    family: str,
    save: Callable[..., Path],
    models: Callable[[str], Model],
    narrow: Callable[[str], Narrow],
    tmp_path: Path,
):
    model = models(family)
    parts = {module: pair for module, pair in factors(model).items() if family == "sd1" or module[0] == "unet"}
    path = save(tmp_path / "style.safetensors", model, parts)
    pipeline = copy.deepcopy(narrow(family).pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=path.name)
    x, t = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([500.0, 20.0])
    context = torch.randn(2, 77, model.unet.spec.context_dim, generator=torch.Generator().manual_seed(1))
    vector, more = None, {}
    if family == "sdxl":
        vector = torch.randn(2, 96 + 6 * 256, generator=torch.Generator().manual_seed(2))
        ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
        more = {"added_cond_kwargs": {"text_embeds": vector[:, :96], "time_ids": ids}}
        vector = torch.cat([vector[:, :96], timestep_embedding(ids.flatten(), 256).reshape(2, -1)], 1)

    attached = model.attach(path)
    with torch.inference_mode():
        theirs = pipeline.unet(x, t, context, **more).sample
        with_lora = model.unet(x, t, context, vector)
        torch.testing.assert_close(with_lora, theirs, atol=1e-4, rtol=1e-4)
        if family == "sd1":
            torch.testing.assert_close(
                model.encode_prompts(["a cat"]).context, pipeline.encode_prompt("a cat", "cpu", 1, False)[0],
                atol=1e-4, rtol=1e-4,
            )  # fmt: skip
        else:
            assert attached.matched == len(parts)
    attached.detach()
    with torch.inference_mode():
        assert (model.unet(x, t, context, vector) - with_lora).abs().max() > 1e-2


def test_a_tag_an_option_and_attach_give_the_same_picture(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    before = weights(model)
    plain = latent(model)

    by_tag = next(run.paint(model, Request(prompt="a cat<lora:style:0.8>", **OPTIONS), source=In(tmp_path))).latent
    by_option = latent(model, lora=f"{path}:0.8")
    attached = model.attach(path, 0.8)
    by_caller = latent(model)
    attached.detach()

    assert torch.equal(by_tag, by_option) and torch.equal(by_tag, by_caller)
    assert not torch.equal(by_tag, plain) and torch.equal(latent(model), plain)
    assert same(before, weights(model))


def test_the_recipe_records_the_adapters_and_reproduces_the_picture(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "zorblax.safetensors")

    picture = next(
        model.paint("a zorblax", lora=[f"{path}:0.8:te=0.5"], embedding=tmp_path / "zorblax.safetensors", **OPTIONS)
    )

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


def test_closing_the_iteration_detaches_everything(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model))
    before = weights(model)

    pictures = model.paint("", lora=f"{path}:1", count=3, **OPTIONS)
    next(pictures)
    assert not same(before, weights(model))
    pictures.close()

    assert same(before, weights(model)) and not list(model.adapters)


def test_a_second_file_that_is_refused_detaches_the_first(models: Callable[[str], Model], tmp_path: Path):
    model, other = models("sd1"), models("sdxl")
    good = save_kohya(tmp_path / "good.safetensors", model, factors(model))
    bad = save_kohya(tmp_path / "bad.safetensors", other, factors(other))
    before = weights(model)

    with pytest.raises(GouacheError) as refused:
        next(model.paint("a cat", lora=[str(good), str(bad)], **OPTIONS))

    assert "bad.safetensors" in str(refused.value) and "\n" not in str(refused.value)
    assert same(before, weights(model))


def test_a_lora_for_some_of_the_steps(models: Callable[[str], Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = models("sd1")
    parts = {module: pair for module, pair in factors(model).items() if module[0] == "unet"}
    path = save_kohya(tmp_path / "style.safetensors", model, parts)
    plain, whole = latent(model), latent(model, lora=f"{path}:1:how=live")

    first, second = (latent(model, lora=f"{path}:1:{part}") for part in ("end=0.5", "start=0.5"))

    assert torch.equal(latent(model, lora=f"{path}:1:start=0:end=1:how=live"), whole)
    assert len({tuple(each.flatten().tolist()) for each in (plain, whole, first, second)}) == 4
    # Of four steps the first two with it and the last two without: steps, not calls, of which Heun has two per step.
    calls: list[tuple[float, bool]] = []
    denoise = type(model).denoise

    def watched(self: Model, x: Tensor, sigma: Tensor, conditioning: Conditioning) -> Tensor:
        (adapter,) = self.adapters
        calls.append((float(sigma.max()), all(hook.on for hook in adapter.hooks.values())))
        return denoise(self, x, sigma, conditioning)

    monkeypatch.setattr(type(model), "denoise", watched)
    latent(model, lora=f"{path}:1:end=0.5", sampler="Heun")
    assert [active for _, active in calls] == [True] * 4 + [False] * 3


def test_another_vae_for_one_request(models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path):
    diffusers = pytest.importorskip("diffusers")
    model = models("sd1")
    own = model.vae
    torch.manual_seed(0)
    tiny = diffusers.AutoencoderTiny().eval()
    save_file(tiny.state_dict(), tmp_path / "taesd.safetensors")

    picture = next(model.paint("a cat", vae=str(tmp_path / "taesd.safetensors"), **OPTIONS))

    with torch.inference_mode():
        expected = tiny.decode(picture.latent[None]).sample[0]
    levels = torch.from_numpy(np.array(picture.image)).permute(2, 0, 1).float()
    torch.testing.assert_close(levels, ((expected / 2 + 0.5).clamp(0, 1) * 255).round(), atol=1.01, rtol=0)
    assert picture.recipe["adapters"][0]["kind"] == "vae" and "VAE: taesd.safetensors" in picture.parameters
    assert model.vae is own
    model.vae = tmp_path / "taesd.safetensors"  # type: ignore[assignment]
    assert model.vae is not own and torch.equal(latent(model), picture.latent)
    model.vae = own
    assert model.vae_file is None
    next(model.paint("a cat", vae="none", **OPTIONS))


@pytest.mark.parametrize(
    ("text", "spec"),
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
def test_a_name_with_strengths_is_parsed(text: str, spec: AdapterSpec):
    assert read_spec("lora", text) == spec


@pytest.mark.parametrize("text", ["", ":0.8", "a:1:2:3", "a:te=x", "a:te=1_0", "a:start=0.9:end=0.1", "a:how=sideways"])
def test_an_invalid_name_with_strengths_is_refused(text: str):
    with pytest.raises(RequestError, match="lora"):
        read_spec("lora", text)


@pytest.mark.parametrize(
    ("text", "key"), [("a:te=nan", "te"), ("a:1:te2=inf", "te2"), ("a:unet=1e999", "unet"), ("a:start=", "start")]
)
def test_a_strength_that_is_not_a_number_is_named(text: str, key: str):
    with pytest.raises(RequestError, match=f"lora: '{text}': {key} is '{text.rpartition('=')[2]}', which is not"):
        read_spec("lora", text)


@pytest.mark.parametrize("tag", ["<lyco:plain:te=1:unet=1:dyn=4>", "<lora:plain:1:hr=0.5>", "<hypernet:x:a=1:b=2>"])
def test_an_unknown_key_is_named(tag: str, models: Callable[[str], Model]):
    keys = {"dyn": "dyn", "hr": "hr", "a=": "a, b"}
    expected = next(name for key, name in keys.items() if key in tag)

    with pytest.raises(RequestError, match=f": {expected} is not known here; the keys are blocks, end, how"):
        next(models("sd1").paint(f"a cat {tag}", **OPTIONS))


def test_missing_trigger_words_and_unused_embeddings_are_reported(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    metadata = {"ss_tag_frequency": json.dumps({"10_fox": {"zorb fox": 30, "sitting": 4}})}
    path = save_kohya(tmp_path / "style.safetensors", model, factors(model), metadata=metadata)
    save_file({"emb_params": torch.randn(2, 64)}, tmp_path / "zorblax.safetensors")
    found: list[str] = []

    for prompt in ("a cat", "a Zorb  Fox, zorblax"):
        request = Request(
            prompt=prompt, lora=(str(path),), embedding=(str(tmp_path / "zorblax.safetensors"),), **OPTIONS
        )  # type: ignore[arg-type]
        next(model.paint(request, on_attached=lambda used, r=request: found.extend(adapter_notes(r, used))))

    assert len(found) == 2
    assert "zorb fox, sitting" in found[0] and found[1].startswith("no prompt contains zorblax")
    assert not [note for note in notes(model, Request(prompt="<lora:x:1> a cat")) if "plain text" in note]
