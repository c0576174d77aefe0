"""One LoRA under the names of every tool gives the same weights: those of W + scale * up @ down."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.layouts.modules import peft_names
from tests.adapters.loras import delta, factors
from tests.pipelines import Narrow

Rename = Callable[[str, str, str], str]
"""(component, the path of a module under our names, its path in diffusers) -> its name in the file."""


CLIP = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}


def omi(component: str, path: str, other: str) -> str:
    return f"unet.{path}" if component == "unet" else f"{CLIP[component]}.{path}"


def omi_with_transformer(component: str, path: str, other: str) -> str:
    return f"unet.{path}" if component == "unet" else f"{CLIP[component]}.transformer.{path}"


def comfy(component: str, path: str, other: str) -> str:
    return f"diffusion_model.{path}" if component == "unet" else f"text_encoders.{CLIP[component]}.transformer.{path}"


def doubled(component: str, path: str, other: str) -> str:
    return f"unet.unet.{other}" if component == "unet" else f"{component}.{path}"


def peft(component: str, path: str, other: str) -> str:
    return f"{component}.{other}"


KOHYA = (".lora_up.weight", ".lora_down.weight")
FORMS: dict[str, tuple[Rename, tuple[str, str]]] = {
    "omi": (omi, KOHYA),
    "omi, transformer": (omi_with_transformer, KOHYA),
    "comfy": (comfy, KOHYA),
    "doubled prefix": (doubled, (".lora_B.weight", ".lora_A.weight")),
    "hyphen": (peft, (".lora_B.my-style.weight", ".lora_A.my-style.weight")),
    "dots": (peft, (".lora_B.v1.5.final.weight", ".lora_A.v1.5.final.weight")),
    "space": (peft, (".lora_B.my style.weight", ".lora_A.my style.weight")),
    "hyphen, comfy": (comfy, (".lora_B.my-style.weight", ".lora_A.my-style.weight")),
}


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("form", FORMS)
def test_a_lora_is_applied_under_every_tools_names(
    form: str, family: str, models: Callable[[str], Model], tmp_path: Path
):
    model = models(family)
    rename, (up_suffix, down_suffix) = FORMS[form]
    others = {module: name.partition(".")[2] for module, name in peft_names(model.specs).items()}
    parts = factors(model)
    tensors: dict[str, Tensor] = {}
    for module, (up, down) in parts.items():
        stem = rename(*module, others[module])
        tensors |= {stem + up_suffix: up, stem + down_suffix: down}
    save_file(tensors, tmp_path / "lora.safetensors")
    networks = {"unet": model.unet, **model.text_encoders}
    before = {module: networks[module[0]].get_submodule(module[1]).weight.data.clone() for module in parts}

    attached = model.attach(tmp_path / "lora.safetensors")
    try:
        assert (attached.matched, attached.unmatched, attached.wrong_shape) == (len(parts), {}, {})
        for module, pair in parts.items():
            found = networks[module[0]].get_submodule(module[1]).weight.data
            torch.testing.assert_close(found.double(), before[module].double() + delta(pair, 1), atol=1e-5, rtol=0)
    finally:
        attached.detach()


def test_old_names_of_four_factors_per_text_layer_use_the_matching_one(models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    layer = "text_model.encoder.layers.0.self_attn"
    width = model.text_encoders["text_encoder"].get_submodule(f"{layer}.k_proj").weight.shape[0]
    generator = torch.Generator().manual_seed(0)
    pairs = {}
    tensors = {}
    for proj in ("q_proj", "k_proj", "v_proj", "out_proj"):
        for old in ("to_q", "to_k", "to_v", "to_out"):
            up, down = torch.randn(width, 2, generator=generator), torch.randn(2, width, generator=generator)
            pairs[proj, old] = up, down
            stem = f"text_encoder.{layer}.{proj}.{old}_lora"
            tensors |= {f"{stem}.up.weight": up, f"{stem}.down.weight": down}
    save_file(tensors, tmp_path / "old.safetensors")
    weight = model.text_encoders["text_encoder"].get_submodule(f"{layer}.k_proj").weight.data.double()

    attached = model.attach(tmp_path / "old.safetensors")
    found = model.text_encoders["text_encoder"].get_submodule(f"{layer}.k_proj").weight.data.double()
    attached.detach()

    assert attached.matched == 4 and len(attached.unmatched) == 24
    torch.testing.assert_close(found, weight + delta(pairs["k_proj", "to_k"], 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize("how", ["folded", "live"])
def test_the_bias_of_a_peft_lora_is_added(how: str, models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    name = "input_blocks.1.1.transformer_blocks.0.ff.net.2"
    module = model.unet.get_submodule(name)
    out, width = model.unet.get_parameter(f"{name}.weight").shape
    up, down, bias = torch.randn(out, 2), torch.randn(2, width), torch.randn(out)
    stem = "unet.down_blocks.0.attentions.0.transformer_blocks.0.ff.net.2"
    tensors = {f"{stem}.lora_B.weight": up, f"{stem}.lora_A.weight": down, f"{stem}.lora_B.bias": bias}
    save_file(tensors, tmp_path / "l.safetensors", {"lora_adapter_metadata": '{"unet.lora_alpha": 6, "unet.r": 2}'})
    x = torch.randn(3, width)
    before = module(x)

    attached = model.attach(tmp_path / "l.safetensors", 0.5, how=how)
    after = module(x)
    attached.detach()

    assert (attached.matched, attached.unmatched) == (1, {})
    torch.testing.assert_close(after, before + 0.5 * 3 * (x @ down.T @ up.T + bias), atol=1e-3, rtol=1e-4)
    assert torch.equal(module(x), before)


@pytest.mark.parametrize("how", ["folded", "live"])
def test_set_weight_replaces_the_weight(how: str, models: Callable[[str], Model], tmp_path: Path):
    model = models("sd1")
    name = "input_blocks.1.1.transformer_blocks.0.ff.net.2"
    module = model.unet.get_submodule(name)
    new, shift = torch.randn(module.weight.shape), torch.randn(module.bias.shape)
    stem = f"diffusion_model.{name}"
    save_file({f"{stem}.set_weight": new, f"{stem}.diff_b": shift}, tmp_path / "set.safetensors")
    x = torch.randn(3, new.shape[1])
    bias = module.bias.data.clone()

    attached = model.attach(tmp_path / "set.safetensors", how=how)
    after = module(x)
    attached.detach()

    torch.testing.assert_close(after, x @ new.T + bias + shift, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("how", ["folded", "live"])
def test_a_first_convolution_of_four_channels_changes_the_first_four_of_nine(
    how: str, models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path
):
    model = gouache.load(narrow("sd1-inpainting").file, device="cpu", dtype="fp32")
    first = model.unet.input_blocks[0][0]
    assert first.weight.shape[1] == 9
    up, down = torch.randn(first.weight.shape[0], 2, 1, 1), torch.randn(2, 4, 3, 3)
    save_file({"lora_unet_conv_in.lora_up.weight": up, "lora_unet_conv_in.lora_down.weight": down,
               "lora_unet_conv_in.alpha": torch.tensor(1.0)}, tmp_path / "x.safetensors")  # fmt: skip
    expected = first.weight.data.double().clone()
    expected[:, :4] += delta((up, down), 0.5)
    x = torch.randn(1, 9, 8, 8)

    attached = model.attach(tmp_path / "x.safetensors", how=how)
    found = first(x)
    attached.detach()

    assert (attached.matched, attached.wrong_shape) == (1, {})
    wanted = torch.nn.functional.conv2d(x.double(), expected, first.bias.data.double(), padding=1)
    torch.testing.assert_close(found.double(), wanted, atol=1e-4, rtol=1e-4)


def test_the_form_of_cloneofsimo_is_named(models: Callable[[str], Model], tmp_path: Path):
    tensors = {f"unet:{index}:{part}": torch.ones(2, 2) for index in range(3) for part in ("up", "down")}
    save_file(tensors, tmp_path / "x.safetensors", {"unet": '["CrossAttention"]'})

    with pytest.raises(gouache.errors.ModelError, match="cloneofsimo"):
        models("sd1").attach(tmp_path / "x.safetensors")


STEM = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.mark.parametrize(
    ("pattern", "matches"),
    [("attn1.to_q", True), ("to_q", True), (r"attn\d\.to_(q|k)", True), (r".*attn[12]\.to_q", True), ("o_q", False),
     (r"down_blocks\.[0-9]+\..*to_q$", True), (r"^unet\..*", True), (r"^down_blocks\..*", False), ("(", False)],
)  # fmt: skip
@pytest.mark.parametrize("where", ["header", "file"])
def test_alpha_patterns_match_as_in_peft(
    pattern: str, matches: bool, where: str, models: Callable[[str], Model], tmp_path: Path
):
    model = models("sd1")
    module = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    out, width = model.unet.get_parameter("input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight").shape
    up, down = torch.randn(out, 2), torch.randn(2, width)
    config = {"lora_alpha": 2, "r": 2, "alpha_pattern": {pattern: 10}}
    metadata = {"lora_adapter_metadata": json.dumps({f"unet.{key}": value for key, value in config.items()})}
    path = tmp_path / "adapter_model.safetensors"
    tensors = {f"{STEM}.lora_A.weight": down, f"{STEM}.lora_B.weight": up}
    save_file(tensors, path, metadata if where == "header" else None)
    if where == "file":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    before = module.weight.data.double()

    attached = model.attach(path)
    found = module.weight.data.double()
    attached.detach()

    torch.testing.assert_close(found, before + delta((up, down), 5 if matches else 1), atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "pattern",
    ["([a-z_0-9.]+)+Z", "(a|a)*Z", "(.*)*Z", "((.*)*)*Z", "(.?){200}Z", "(.*.*.*.*.*)Z", "(" * 5000, "a{9999}{9999}",
     "(?:(?:(?:[a-z.0-9_]*)*)*)*Z", "[" * 300, "(((((((((((.*)*)*)*)*)*)*)*)*)*)*Z"],
)  # fmt: skip
def test_patterns_take_bounded_time(pattern: str, models: Callable[[str], Model], tmp_path: Path):
    config = {"unet.lora_alpha": 1, "unet.r": 1, "unet.alpha_pattern": {pattern: 5}}
    tensors = {f"{STEM}.lora_A.weight": torch.ones(1, 32), f"{STEM}.lora_B.weight": torch.ones(32, 1)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": json.dumps(config)})
    start = time.monotonic()

    models("sd1").attach(tmp_path / "x.safetensors").detach()

    assert time.monotonic() - start < 2


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts open files in /proc")
def test_detach_closes_the_file_without_waiting_for_the_garbage_collector(
    models: Callable[[str], Model], tmp_path: Path
):
    import gc

    save_file({f"{STEM}.lora_A.weight": torch.ones(1, 32), f"{STEM}.lora_B.weight": torch.ones(32, 1)},
              tmp_path / "x.safetensors")  # fmt: skip
    model = models("sd1")
    gc.collect()
    gc.disable()
    try:
        before = len(list(Path("/proc/self/fd").iterdir()))
        for how in ("folded", "live"):
            for _ in range(3):
                model.attach(tmp_path / "x.safetensors", how=how).detach()
        after = len(list(Path("/proc/self/fd").iterdir()))
    finally:
        gc.enable()

    assert after == before
