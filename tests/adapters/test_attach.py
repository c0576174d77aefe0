"""Attaching: the merged weights by definition, two ways that agree, and nothing left behind in any order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.adapters.strength import Strength
from gouache.errors import ModelError
from gouache.model.attach import attach
from tests.adapters.loras import delta, factors, save_kohya, save_peft
from tests.pipelines import Narrow


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str, str], Model]:
    loaded: dict[tuple[str, str], Model] = {}

    def load(line: str, dtype: str = "fp32") -> Model:
        key = line, dtype
        if key not in loaded:
            loaded[key] = gouache.load(narrow(line).file, device="cpu", dtype=dtype)
        return loaded[key]

    return load


def weights(model: Model) -> dict[str, Tensor]:
    networks = {"unet": model.unet, **model.text_encoders}
    return {f"{n}.{name}": t.clone() for n, network in networks.items() for name, t in network.state_dict().items()}


def same(before: dict[str, Tensor], after: dict[str, Tensor]) -> bool:
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def seen(model: Model) -> Tensor:
    """What the U-Net makes of a fixed latent under a fixed prompt, the text encoders included."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    return model.denoise(x, torch.tensor(2.0), model.encode_prompts(["a cat on a mat"]))


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("save", [save_kohya, save_peft])
def test_folded_weights_are_those_of_the_definition(
    line: str, save: Callable[..., Path], models: Callable[..., Model], tmp_path: Path
):
    model = models(line)
    parts = factors(model, convolutions=save is save_kohya)
    before = weights(model)

    on = model.attach(save(tmp_path / "some.safetensors", model, parts), 0.7)

    scale = 0.7 * (2 / 4 if save is save_kohya else 1)
    assert (on.matched, on.unmatched, on.wrong_shape, on.how) == (len(parts), {}, {}, "folded")
    after = weights(model)
    for name, tensor in after.items():
        component, _, path = name.partition(".")
        pair = parts.get((component, path.removesuffix(".weight")))
        wanted = before[name].double() + delta(pair, scale) if pair is not None else before[name].double()
        torch.testing.assert_close(tensor.double(), wanted, atol=1e-5, rtol=1e-5)
    on.detach()
    assert same(before, weights(model))


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_live_does_the_same_as_folded(line: str, models: Callable[..., Model], tmp_path: Path):
    model = models(line)
    path = save_kohya(tmp_path / "some.safetensors", model, factors(model, convolutions=True))
    plain = seen(model)

    with_it = {}
    for how in ("folded", "live"):
        on = model.attach(path, Strength(0.8, 0.5), how=how)
        assert on.how == how
        with_it[how] = seen(model)
        on.detach()

    torch.testing.assert_close(with_it["live"], with_it["folded"], atol=2e-4, rtol=2e-4)
    assert (with_it["folded"] - plain).abs().max() > 0.05
    assert torch.equal(seen(model), plain)


def forms(model: Model, folder: Path) -> list[Path]:
    """An adapter of each other kind for one linear layer, one convolution and one norm."""
    chance = torch.Generator().manual_seed(1)

    def some(*shape: int) -> Tensor:
        return 0.1 * torch.randn(*shape, generator=chance)

    linear = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    conv, norm = "lora_unet_down_blocks_0_resnets_0_conv1", "lora_unet_down_blocks_0_resnets_0_norm2"
    wide = 32
    kinds = {
        "loha": {f"{linear}.hada_w1_a": some(wide, 2), f"{linear}.hada_w1_b": some(2, wide),
                 f"{linear}.hada_w2_a": some(wide, 2), f"{linear}.hada_w2_b": some(2, wide)},
        "lokr": {f"{conv}.lokr_w1": some(4, 4), f"{conv}.lokr_w2": some(8, 8, 3, 3)},
        "dora": {f"{linear}.lora_up.weight": some(wide, 2), f"{linear}.lora_down.weight": some(2, wide),
                 f"{linear}.dora_scale": 1 + some(1, wide)},
        "oft": {f"{linear}.oft_blocks": some(4, 8, 8)},
        "boft": {f"{linear}.oft_blocks": some(2, 8, 4, 4)},
        "ia3": {f"{linear}.weight": some(wide), f"{linear}.on_input": torch.tensor(1.0)},
        "glora": {f"{linear}.{n}.weight": some(*s) for n, s in
                  {"a1": (wide, 2), "a2": (2, wide), "b1": (wide, 2), "b2": (2, wide)}.items()},
        "full": {f"{conv}.diff": some(wide, wide, 3, 3), f"{conv}.diff_b": some(wide)},
        "norm": {f"{norm}.w_norm": some(wide), f"{norm}.b_norm": some(wide)},
    }  # fmt: skip
    paths = []
    for kind, tensors in kinds.items():
        paths.append(folder / f"{kind}.safetensors")
        save_file(tensors, paths[-1])
    return paths


def test_every_form_folds_and_lives_alike(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    before = weights(model)
    for path in forms(model, tmp_path):
        results = {}
        for how in ("folded", "live"):
            on = model.attach(path, 0.7, how=how)
            assert on.matched == 1 and not on.unmatched, path.name
            results[how] = seen(model)
            on.detach()
        torch.testing.assert_close(results["live"], results["folded"], atol=2e-4, rtol=2e-4, msg=path.name)
        assert not torch.equal(results["folded"], seen(model)), path.name
    assert same(before, weights(model))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_any_order_of_attaching_and_detaching_ends_where_it_began(
    dtype: str, models: Callable[..., Model], tmp_path: Path
):
    model = models("sd1", dtype)
    paths = [*forms(model, tmp_path), save_kohya(tmp_path / "a.safetensors", model, factors(model, seed=1))]
    paths.append(save_kohya(tmp_path / "b.safetensors", model, factors(model, seed=2, convolutions=True)))
    before, strides = weights(model), {name: t.stride() for name, t in model.unet.state_dict().items()}
    chance = random.Random(0)
    on = []
    for _ in range(60):
        if on and chance.random() < 0.5:
            on.pop(chance.randrange(len(on))).detach()
        elif on and chance.random() < 0.3:
            chance.choice(on).change(chance.uniform(-1, 1))
        else:
            on.append(model.attach(chance.choice(paths), chance.uniform(-1, 1), how=chance.choice([None, "live"])))
    on.append(model.attach(paths[0], 0.5))
    assert not same(before, weights(model))

    while on:
        on.pop(chance.randrange(len(on))).detach()

    assert same(before, weights(model))
    assert {name: t.stride() for name, t in model.unet.state_dict().items()} == strides
    assert torch.equal(seen(model), seen(model)) and not list(model.adapters)


def test_what_is_left_on_is_what_alone_would_be(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    first = save_kohya(tmp_path / "a.safetensors", model, factors(model, seed=1))
    second = save_kohya(tmp_path / "b.safetensors", model, factors(model, seed=2))
    alone = model.attach(second, 0.6)
    wanted = weights(model)
    alone.detach()

    one = model.attach(first, 0.4)
    two = model.attach(second, 0.6)
    one.detach()

    assert same(wanted, weights(model))
    two.detach()


def test_an_error_half_way_leaves_nothing(
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


def test_another_strength_is_that_strength_from_the_start(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, factors(model))
    straight = model.attach(path, 0.3)
    wanted = weights(model)
    straight.detach()

    on = model.attach(path, 1.0)
    on.change(0.3)

    assert same(wanted, weights(model))
    on.detach()


def test_only_what_changes_is_read_again(models: Callable[..., Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = models("sd1")
    on = model.attach(save_kohya(tmp_path / "a.safetensors", model, factors(model)), Strength(1.0, 1.0))
    read: list[str] = []
    monkeypatch.setattr(model.adapters, "_restore", lambda c, n: (read.append(c), model.restore(c, n))[1])

    on.change(Strength(1.0, 0.5))

    assert set(read) == {"text_encoder"}
    on.detach()


def test_strength_by_network_and_by_block(models: Callable[..., Model], tmp_path: Path):
    from gouache.adapters.strength import strength

    model = models("sd1")
    parts = factors(model)
    before = weights(model)
    blocks = strength(1.0, 0.25, "IN=0, M00=0.5, OUT=2, BASE=2", spec=model.unet.spec)

    on = model.attach(save_kohya(tmp_path / "a.safetensors", model, parts, alpha=None), blocks)

    after = weights(model)
    for (component, path), pair in parts.items():
        wanted = {"input_blocks": 0.0, "middle_block": 0.5, "output_blocks": 2.0, "text_model": 0.5}
        factor = wanted[path.partition(".")[0]]
        name = f"{component}.{path}.weight"
        torch.testing.assert_close(
            after[name].double(), before[name].double() + delta(pair, factor), atol=1e-5, rtol=1e-5
        )
    on.detach()


def test_live_adapters_act_in_their_part_of_the_run(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, {m: p for m, p in factors(model).items() if m[0] == "unet"})
    plain = seen(model)
    whole = model.attach(path, how="live")
    full = seen(model)
    whole.detach()

    on = model.attach(path, Strength(start=0.25, end=0.75))

    assert on.how == "live"
    for progress, acts in ((0.0, False), (0.2, False), (0.25, True), (0.5, True), (0.75, False), (1.0, False)):
        model.adapters.set_progress(progress)
        assert torch.equal(seen(model), full if acts else plain), progress
    on.detach()


def test_a_file_of_which_nothing_fits_is_refused_in_one_line(models: Callable[..., Model], tmp_path: Path):
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
def test_one_for_another_family_is_refused_even_where_modules_fit(
    width: int, family: str, models: Callable[..., Model], tmp_path: Path
):
    model = models("sdxl" if width != 2048 else "sd1")
    path = tmp_path / "other.safetensors"
    key = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn2_to_k"
    text = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    made = {f"{key}.lora_down.weight": torch.zeros(4, width), f"{key}.lora_up.weight": torch.zeros(64, 4)}
    made |= {f"{text}.lora_down.weight": torch.zeros(4, 64), f"{text}.lora_up.weight": torch.zeros(256, 4)}
    save_file(made, path)

    with pytest.raises(ModelError, match=f"for {family}.*the model is"):
        model.attach(path)


def test_what_finds_no_module_is_named_with_its_nearest(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    parts = factors(model)
    path = save_kohya(tmp_path / "a.safetensors", model, parts)
    from safetensors.torch import load_file

    tensors = load_file(path)
    some = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    odd = some.replace("to_q", "to_z")
    tensors |= {
        f"{odd}.{end}": tensors[f"{some}.{end}"].clone() for end in ("lora_up.weight", "lora_down.weight", "alpha")
    }
    narrow = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_k"
    tensors[f"{narrow}.lora_up.weight"] = torch.zeros(7, 4)
    save_file(tensors, path)

    on = model.attach(path)

    assert on.matched == len(parts) - 1 and len(on.unmatched) == 3 and len(on.wrong_shape) == 1
    assert all(near.startswith(some[:-1]) for near in on.unmatched.values())
    assert "3 names unmatched" in str(on) and "1 of another shape" in str(on)
    on.detach()


def test_what_no_adapter_touches_is_not_touched(models: Callable[..., Model], tmp_path: Path):
    model = models("sd1")
    path = save_kohya(tmp_path / "a.safetensors", model, factors(model))
    untouched = model.unet.get_parameter("input_blocks.0.0.weight")

    attach(model, gouache.open_model(path)).detach()

    assert model.unet.get_parameter("input_blocks.0.0.weight") is untouched
