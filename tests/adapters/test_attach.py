"""Attaching: merged weights by definition, folded and live with equal outputs, originals restored in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.adapters.strength import Strength, strength
from gouache.errors import ModelError
from gouache.model.attach import attach
from tests.adapters.loras import delta, factors, save_kohya, save_peft
from tests.pipelines import Narrow


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str, str], Model]:
    loaded: dict[tuple[str, str], Model] = {}

    def load(family: str, dtype: str = "fp32") -> Model:
        key = family, dtype
        if key not in loaded:
            loaded[key] = gouache.load(narrow(family).file, device="cpu", dtype=dtype)
        return loaded[key]

    return load


def weights(model: Model) -> dict[str, Tensor]:
    networks = {"unet": model.unet, **model.text_encoders}
    return {f"{n}.{name}": t.clone() for n, network in networks.items() for name, t in network.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def output(model: Model) -> Tensor:
    """x0 for a fixed latent and prompt, through the text encoders and the U-Net."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.denoise(x, torch.tensor(2.0), model.encode_prompts(["a cat on a mat"]))


seen = output  # the name that test_damaged imports


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_folded_weights_are_those_of_the_definition(
    family: str, save: Callable[..., Path], models: Callable[..., Model], tmp_path: Path
):
    model = models(family)
    parts = factors(model, convolutions=save is save_kohya)
    before = weights(model)

    attached = model.attach(save(tmp_path / "some.safetensors", model, parts), 0.7)

    scale = 0.7 * (2 / 4 if save is save_kohya else 1)
    counts = attached.matched, attached.unmatched, attached.wrong_shape
    assert (*counts, attached.how) == (len(parts), {}, {}, "folded")
    after = weights(model)
    for name, tensor in after.items():
        component, _, path = name.partition(".")
        pair = parts.get((component, path.removesuffix(".weight")))
        expected = before[name].double() + delta(pair, scale) if pair is not None else before[name].double()
        torch.testing.assert_close(tensor.double(), expected, atol=1e-5, rtol=1e-5)
    attached.detach()
    assert same(before, weights(model))


@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_live_gives_the_output_of_folded(family: str, models: Callable[..., Model], tmp_path: Path):
    model = models(family)
    path = save_kohya(tmp_path / "some.safetensors", model, factors(model, convolutions=True))
    plain = output(model)

    results = {}
    for how in ("folded", "live"):
        attached = model.attach(path, Strength(0.8, 0.5), how=how)
        assert attached.how == how
        results[how] = output(model)
        attached.detach()

    torch.testing.assert_close(results["live"], results["folded"], atol=2e-4, rtol=2e-4)
    assert (results["folded"] - plain).abs().max() > 0.05
    assert torch.equal(output(model), plain)


def save_other_forms(folder: Path) -> list[Path]:
    """Files of one adapter of each other form, on one linear layer, convolution or norm of SD1."""
    random = torch.Generator().manual_seed(1)

    def weights(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=random)

    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    conv, norm = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_down_blocks_0_resnets_0_norm2"
    width = 32
    files = {
        "loha": {f"{linear}.hada_w1_a": weights(width, 2), f"{linear}.hada_w1_b": weights(2, width),
                 f"{linear}.hada_w2_a": weights(width, 2), f"{linear}.hada_w2_b": weights(2, width)},
        "lokr": {f"{conv}.lokr_w1": weights(4, 4), f"{conv}.lokr_w2": weights(8, 8, 3, 3)},
        "dora": {f"{linear}.lora_up.weight": weights(width, 2), f"{linear}.lora_down.weight": weights(2, width),
                 f"{linear}.dora_scale": 1 + weights(1, width)},
        "oft": {f"{linear}.oft_blocks": weights(4, 8, 8)},
        "boft": {f"{linear}.oft_blocks": weights(2, 8, 4, 4)},
        "ia3": {f"{linear}.weight": weights(width), f"{linear}.on_input": torch.tensor(1.0)},
        "glora": {f"{linear}.{n}.weight": weights(*s) for n, s in
                  {"a1": (width, 2), "a2": (2, width), "b1": (width, 2), "b2": (2, width)}.items()},
        "full": {f"{conv}.diff": weights(width, width, 3, 3), f"{conv}.diff_b": weights(width)},
        "norm": {f"{norm}.w_norm": weights(width), f"{norm}.b_norm": weights(width)},
    }  # fmt: skip
    paths = []
    for form, tensors in files.items():
        paths.append(folder / f"{form}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def test_every_form_gives_the_same_output_folded_and_live(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    before = weights(model)
    for path in save_other_forms(tmp_path):
        results = {}
        for how in ("folded", "live"):
            attached = model.attach(path, 0.7, how=how)
            assert attached.matched == 1 and not attached.unmatched, path.name
            results[how] = output(model)
            attached.detach()
        torch.testing.assert_close(results["live"], results["folded"], atol=2e-4, rtol=2e-4, msg=path.name)
        assert not torch.equal(results["folded"], output(model)), path.name
    assert same(before, weights(model))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_order_of_attaching_and_detaching_restores_the_weights(
    dtype: str, models: Callable[..., Model], tmp_path: Path
):
    model = models("sd1", dtype)
    paths = [*save_other_forms(tmp_path), save_kohya(tmp_path / "a.safetensors", model, factors(model, seed=1))]
    paths.append(save_kohya(tmp_path / "b.safetensors", model, factors(model, seed=2, convolutions=True)))
    before, strides = weights(model), {name: t.stride() for name, t in model.unet.state_dict().items()}
    choices = random.Random(0)
    attached = []
    for _ in range(40):
        if attached and choices.random() < 0.5:
            attached.pop(choices.randrange(len(attached))).detach()
        elif attached and choices.random() < 0.3:
            choices.choice(attached).change(choices.uniform(-1, 1))
        else:
            how = choices.choice([None, "live"])
            attached.append(model.attach(choices.choice(paths), choices.uniform(-1, 1), how=how))
    attached.append(model.attach(paths[0], 0.5))
    assert not same(before, weights(model))

    while attached:
        attached.pop(choices.randrange(len(attached))).detach()

    assert same(before, weights(model))
    assert {name: t.stride() for name, t in model.unet.state_dict().items()} == strides
    assert not list(model.adapters)


def test_an_adapter_that_stays_acts_as_if_it_were_alone(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    first = save_kohya(tmp_path / "a.safetensors", model, factors(model, seed=1))
    second = save_kohya(tmp_path / "b.safetensors", model, factors(model, seed=2))
    alone = model.attach(second, 0.6)
    expected = weights(model)
    alone.detach()

    one = model.attach(first, 0.4)
    two = model.attach(second, 0.6)
    one.detach()

    assert same(expected, weights(model))
    two.detach()


def test_an_interrupt_while_attaching_restores_the_weights(
    models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, factors(model))
    other = model.attach(save_kohya(tmp_path / "b.safetensors", model, factors(model, seed=2)), 0.5)
    before = weights(model)
    calls = 0

    def failing(component: str, name: str) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 40:
            raise KeyboardInterrupt
        return model.restore(component, name)

    with monkeypatch.context() as patch:
        patch.setattr(model.adapters, "_restore", failing)
        with pytest.raises(KeyboardInterrupt):
            model.attach(path, 1.0)

    assert calls > 40 and same(before, weights(model))
    other.detach()


def test_a_changed_strength_gives_the_weights_of_that_strength(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, factors(model))
    unchanged = model.attach(path, 0.3)
    expected = weights(model)
    unchanged.detach()

    attached = model.attach(path, 1.0)
    attached.change(0.3)

    assert same(expected, weights(model))
    attached.detach()


def test_only_modules_whose_strength_changes_are_computed_again(
    models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    model = models("sd1")
    attached = model.attach(save_kohya(tmp_path / "a.safetensors", model, factors(model)), Strength(1.0, 1.0))
    read: list[str] = []
    monkeypatch.setattr(model.adapters, "_restore", lambda c, n: (read.append(c), model.restore(c, n))[1])

    attached.change(Strength(1.0, 0.5))

    assert set(read) == {"text_encoder"}
    attached.detach()


def test_strength_by_network_and_by_block(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    parts = factors(model)
    before = weights(model)
    blocks = strength(1.0, 0.25, "IN=0, M00=0.5, OUT=2, BASE=2", spec=model.unet.spec)

    attached = model.attach(save_kohya(tmp_path / "a.safetensors", model, parts, alpha=None), blocks)

    after = weights(model)
    for (component, path), pair in parts.items():
        factors_by_block = {"input_blocks": 0.0, "middle_block": 0.5, "output_blocks": 2.0, "text_model": 0.5}
        factor = factors_by_block[path.partition(".")[0]]
        name = f"{component}.{path}.weight"
        torch.testing.assert_close(
            after[name].double(), before[name].double() + delta(pair, factor), atol=1e-5, rtol=1e-5
        )
    attached.detach()


def test_live_adapters_act_in_their_part_of_the_run(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, {m: p for m, p in factors(model).items() if m[0] == "unet"})
    plain = output(model)
    whole = model.attach(path, how="live")
    full = output(model)
    whole.detach()

    attached = model.attach(path, Strength(start=0.25, end=0.75))

    assert attached.how == "live"
    for progress, acts in ((0.0, False), (0.2, False), (0.25, True), (0.5, True), (0.75, False), (1.0, False)):
        model.adapters.set_progress(progress)
        assert torch.equal(output(model), full if acts else plain), progress
    attached.detach()


def test_a_file_without_a_fitting_module_is_refused_in_one_line(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    before = weights(model)
    wide = {module: (up, torch.cat([down, down], 1)) for module, (up, down) in factors(model).items()}
    path = save_kohya(tmp_path / "other.safetensors", model, wide)

    with pytest.raises(ModelError) as refused:
        model.attach(path)

    assert "\n" not in str(refused.value) and str(path) in str(refused.value)
    assert same(before, weights(model)) and not list(model.adapters)


@pytest.mark.parametrize(
    ("width", "family"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (2048, "Stable Diffusion XL")]
)
def test_a_lora_for_another_family_is_refused_even_if_modules_fit(
    width: int, family: str, models: Callable[..., Model], tmp_path: Path
):
    model = models("sdxl" if width != 2048 else "sd1")
    path = tmp_path / "other.safetensors"
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    tensors = {f"{key}.lora_down.weight": torch.zeros(4, width), f"{key}.lora_up.weight": torch.zeros(64, 4)}
    tensors |= {f"{text}.lora_down.weight": torch.zeros(4, 64), f"{text}.lora_up.weight": torch.zeros(256, 4)}
    save_file(tensors, path)

    with pytest.raises(ModelError, match=f"for {family}.*the model is"):
        model.attach(path)


def test_unmatched_names_are_listed_with_the_nearest_module(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    parts = factors(model)
    path = save_kohya(tmp_path / "a.safetensors", model, parts)
    tensors = load_file(path)
    module = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    unknown = module.replace("to_q", "to_z")
    tensors |= {
        f"{unknown}.{end}": tensors[f"{module}.{end}"].clone()
        for end in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    mismatched = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors[f"{mismatched}.lora_up.weight"] = torch.zeros(7, 4)
    save_file(tensors, path)

    attached = model.attach(path)

    assert (attached.matched, len(attached.unmatched), len(attached.wrong_shape)) == (len(parts) - 1, 3, 1)
    assert all(nearest.startswith(module[:-1]) for nearest in attached.unmatched.values())
    assert "3 names unmatched" in str(attached) and "1 of another shape" in str(attached)
    attached.detach()


def test_weights_that_no_adapter_changes_are_not_replaced(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, factors(model))
    unchanged = model.unet.get_parameter("input_blocks.0.0.weight")

    attach(model, gouache.open_model(path)).detach()

    assert model.unet.get_parameter("input_blocks.0.0.weight") is unchanged
