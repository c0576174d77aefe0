"""Exported adapters, read by our reader and by diffusers, LyCORIS and PEFT: the U-Net's output is the trained one."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from gouache import Model
from gouache.errors import RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.nn.blocks import timestep_embedding
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.options import AdapterOptions
from tests.pipelines import Narrow
from tests.training.targets.steps import FAMILIES, cases, generator, output, train

FORMS: dict[str, dict[str, Any]] = {
    "lora": {"alpha": 2.0},
    "locon": {"form": "locon", "conv_rank": 2, "alpha": 2.0, "ranks": {"M00": 3}},
    "dora": {"form": "dora", "alpha": 2.0},
    "loha": {"form": "loha", "modules": "conv", "alpha": 2.0},
    "lokr": {"form": "lokr", "modules": "conv", "rank": 2, "alpha": 1.0},
    "lokr, full": {"form": "lokr", "modules": "conv", "rank": 1000},
    "dora of loha": {"form": "loha", "dora": True},
    "ia3": {"form": "ia3"},
    "oft": {"form": "oft", "modules": "conv"},
    "oft, constrained": {"form": "oft", "constraint": 0.001},
    "full": {"form": "full", "modules": "conv"},
    "norms": {"form": "locon", "norms": True},
}


def inputs(model: Model) -> tuple[tuple[Tensor, ...], dict[str, Any]]:
    """(x, t, context[, vector]) for our U-Net, and what diffusers' receives besides the first three."""
    x = torch.randn(2, model.unet.spec.in_channels, 8, 16, generator=generator(0))
    t = torch.tensor([500.0, 20.0])
    context = torch.randn(2, 77, model.unet.spec.context_dim, generator=generator(1))
    if not model.unet.spec.vector_channels:
        return (x, t, context), {}
    pooled = torch.randn(2, 96, generator=generator(2))
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    vector = torch.cat([pooled, timestep_embedding(ids.flatten(), 256).reshape(2, -1)], 1)
    return (x, t, context, vector), {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": ids}}


@torch.no_grad()
def of_ours(model: Model, unet: nn.Module | None = None) -> Tensor:
    return (unet or model.unet)(*inputs(model)[0])


@torch.no_grad()
def of_diffusers(model: Model, unet: Any) -> Tensor:
    ours, more = inputs(model)
    return unet.eval()(*ours[:3], **more).sample  # as pipelines and models read from files are


class Trained:
    """A target trained for some steps, and its outputs while it is attached."""

    def __init__(self, model: Model, case: str) -> None:
        self.model = model
        self.base = of_ours(model)
        options = AdapterOptions(**{"rank": 4, "parts": ("unet", *model.text_encoders), **FORMS[case]})
        self.target = AdapterTarget(model, options, seed=0)
        try:
            train(model, self.target, steps=3, rate=1e-2)
            self.of_unet, self.whole = of_ours(model), output(model)
        finally:
            self.target.detach()
        assert (self.of_unet - self.base).abs().max() > 1e-3

    def export(self, path: Path, **values: Any) -> Path:
        self.target.export({}, path, **{"metadata": {}, **values})
        return path


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


def through_lycoris(file: Path, model: Model, narrow: Callable[[str], Narrow], family: str) -> Tensor:
    """The U-Net's output with the adapter of `file`, built by LyCORIS.

    SDXL's names in kohya's files are those of the original U-Net, so there it is put on our own.
    """
    modules = pytest.importorskip("lycoris.modules")
    unet: Any = copy.deepcopy(model.unet if family == "sdxl" else narrow(family).pipeline.unet)
    tensors = {name: t for name, t in load_file(file).items() if name.startswith("lora_unet_")}
    layers = {"lora_unet_" + name.replace(".", "_"): layer for name, layer in unet.named_modules()}
    found = []
    for name in sorted({name.partition(".")[0] for name in tensors}):
        form, parts = modules.get_module(tensors, name)
        if form is modules.IA3Module:  # its own constructor from files does not take `on_input`
            found.append(form(name, layers[name], 1.0, train_on_input=bool(parts[1])))
            found[-1].weight.data.copy_(parts[0])
        else:
            found.append(modules.make_module(form, parts, name, layers[name]))
    for module in found:
        module.apply_to()
    return of_ours(model, unet) if family == "sdxl" else of_diffusers(model, unet)


CASES = cases(FORMS, alike=("lokr, full", "dora of loha", "oft, constrained"), of_others=("dora", "lokr", "oft", "ia3"))


OTHERS = [pytest.param(family, "locon", marks=pytest.mark.full) for family in ("sd1", "sd2", "sd1-inpainting")]


@pytest.mark.parametrize(("family", "case"), CASES)
def test_kohyas_names_are_read_by_us_and_by_others(
    family: str, case: str, models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path
):
    model = models(family)
    trained = Trained(model, case)
    file = trained.export(tmp_path / "style.safetensors")

    attached = model.attach(file)
    try:
        assert not attached.unmatched and not attached.wrong_shape
        close(of_ours(model), trained.of_unet)
        close(output(model), trained.whole)
    finally:
        attached.detach()
    close(through_lycoris(file, model, narrow, family), trained.of_unet)
    if case in ("lora", "locon"):  # diffusers' reader of these names does not take LyCORIS' shape of magnitudes
        pipeline = copy.deepcopy(narrow(family).pipeline)
        pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
        close(of_diffusers(model, pipeline.unet), trained.of_unet)


@pytest.mark.parametrize(("family", "case"), [("sd1", "lora"), ("sd1", "dora"), ("sdxl", "locon"), *OTHERS])
def test_diffusers_names_are_read_by_us_and_by_diffusers(
    family: str, case: str, models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path
):
    model = models(family)
    trained = Trained(model, case)
    file = trained.export(tmp_path / "style.safetensors", names="diffusers")

    attached = model.attach(file)
    try:
        assert not attached.unmatched and not attached.wrong_shape
        close(output(model), trained.whole)
    finally:
        attached.detach()
    pipeline = copy.deepcopy(narrow(family).pipeline)
    pipeline.load_lora_weights(str(tmp_path), weight_name=file.name)
    close(of_diffusers(model, pipeline.unet), trained.of_unet)
    if family == "sd1":
        pipeline.text_encoder.eval()
        context = pipeline.encode_prompt("a cat", "cpu", 1, False)[0]
        attached = model.attach(file)
        found = model.encode_prompts(["a cat"]).context
        attached.detach()
        close(found, context)


@pytest.mark.parametrize(
    "case",
    [
        "locon",
        "dora",
        *(pytest.param(each, marks=pytest.mark.full) for each in ("lora", "loha", "lokr", "lokr, full", "ia3")),
    ],
)
def test_pefts_folders_are_read_by_us_and_by_peft(
    case: str, models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path
):
    peft = pytest.importorskip("peft")
    model = models("sd1")
    trained = Trained(model, case)
    folder = trained.export(tmp_path / "style", names="peft")

    loaded = [model.attach(folder / part / "adapter_model.safetensors") for part in ("unet", "text_encoder")]
    try:
        close(output(model), trained.whole)
    finally:
        for each in loaded:
            each.detach()
    theirs = peft.PeftModel.from_pretrained(copy.deepcopy(narrow("sd1").pipeline.unet), str(folder / "unet"))
    close(of_diffusers(model, theirs), trained.of_unet)


@pytest.mark.parametrize("family", FAMILIES)
def test_metadata_is_that_of_kohyas_scripts(family: str, models: Callable[[str], Model], tmp_path: Path):
    model = models(family)
    values = {"metadata": {"ss_steps": "3", "modelspec.title": "Lines"}, "dtype": "fp16"}
    path = Trained(model, "locon").export(tmp_path / "style.safetensors", **values)

    with safe_open(path, "pt") as opened:
        metadata = opened.metadata()
        dtypes = {opened.get_tensor(name).dtype for name in opened.keys()}  # noqa: SIM118  # it is no mapping
    assert dtypes == {torch.float16}
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    assert metadata["sshs_model_hash"] == hashlib.sha256(data[start:]).hexdigest()
    version = {"sd1": "sd_v1", "sd1-inpainting": "sd_v1", "sd2": "sd_v2_v", "sdxl": "sdxl_base_v1-0"}[family]
    assert metadata["ss_base_model_version"] == version and metadata["ss_v2"] == str(family == "sd2")
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "2")
    assert json.loads(metadata["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert (metadata["ss_steps"], metadata["modelspec.title"]) == ("3", "Lines")
    assert metadata["modelspec.prediction_type"] == ("v" if family == "sd2" else "epsilon")
    found = identify(open_model(path))
    assert found.kind.value == "locon" and found.family.value is model.family


def test_weights_given_are_those_that_are_written(models: Callable[[str], Model], tmp_path: Path):
    target = Trained(models("sd1"), "lora").target
    halves = {f"adapter.{key}": tensor.detach() / 2 for key, tensor in target.adapter.named_parameters()}

    target.export(halves, tmp_path / "half.safetensors", metadata={})
    target.export({}, tmp_path / "whole.safetensors", metadata={})

    half, whole = load_file(tmp_path / "half.safetensors"), load_file(tmp_path / "whole.safetensors")
    assert half.keys() == whole.keys()
    for name, tensor in half.items():
        assert torch.equal(tensor, whole[name] if name.endswith(".alpha") else whole[name] / 2), name


@pytest.mark.parametrize(
    ("case", "name", "values", "message"),
    [
        ("oft", "a.safetensors", {"names": "diffusers"}, "pipelines read LoRA and DoRA"),
        ("oft", "a", {"names": "peft"}, "PEFT reads these forms"),
        ("full", "a", {"names": "peft"}, "use kohya"),
        ("lora", "a.ckpt", {}, "does not end in .safetensors"),
        ("lora", "a.safetensors", {"names": "peft"}, "PEFT's adapters are folders"),
        ("lora", "a.safetensors", {"names": "comfy"}, "use kohya, diffusers, peft"),
        ("lora", "a.safetensors", {"form": "lora"}, "is not known"),
    ],
)
def test_what_an_adapter_cannot_be_is_refused(
    case: str, name: str, values: dict[str, str], message: str, models: Callable[[str], Model], tmp_path: Path
):
    target = AdapterTarget(models("sd1"), AdapterOptions(**{"rank": 2, **FORMS[case]}), seed=0)
    target.detach()
    with pytest.raises(RequestError, match=message):
        target.export({}, tmp_path / name, metadata={}, **values)  # type: ignore[arg-type]
    assert not list(tmp_path.glob("**/*.*"))
