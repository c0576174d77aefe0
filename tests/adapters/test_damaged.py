"""Files with one fault each: refused with a one-line error, or used as far as they fit; never another exception."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor

import gouache
from gouache import Model, Strength
from gouache.errors import GouacheError, ModelError, RequestError
from tests.adapters.loras import factors, save_kohya
from tests.adapters.test_attach import same, seen, weights
from tests.pipelines import Narrow

L = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
FF = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_ff_net_2"
NORM = "lora_unet_down_blocks_0_resnets_0_norm2"


@pytest.fixture(scope="module")
def model(narrow: Callable[[str], Narrow]) -> Model:
    return gouache.load(narrow("sd1").file, device="cpu", dtype="fp32")


def t(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)) if shape else torch.tensor(0.5)


FITS_NO_MODULE: dict[str, dict[str, Tensor]] = {
    "boft with three dimensions": {f"{L}.boft_R": t(2, 8, 4)},
    "boft without blocks": {f"{L}.boft_R": t(1, 0, 4, 4)},
    "a lora on a norm": {f"{NORM}.lora_up.weight": t(32, 2), f"{NORM}.lora_down.weight": t(2, 1)},
    "a lora with one dimension": {f"{L}.lora_up.weight": t(32), f"{L}.lora_down.weight": t()},
    "a lora of rank 0": {f"{L}.lora_up.weight": t(32, 0), f"{L}.lora_down.weight": t(0, 32)},
    "half a lora": {f"{L}.lora_up.weight": t(32, 2)},
    "ia3 for the other side": {f"{FF}.weight": t(32), f"{FF}.on_input": torch.tensor(1.0)},
    "oft with four dimensions": {f"{L}.oft_R.weight": t(2, 2, 2, 2)},
    "oft with blocks of an odd size": {f"{L}.oft_blocks": t(3, 7, 7)},
    "a bias of another width": {f"{FF}.diff_b": t(7)},
    "lokr of the wrong size": {f"{L}.lokr_w1": t(3, 3), f"{L}.lokr_w2": t(5, 5)},
}


@pytest.mark.parametrize("case", FITS_NO_MODULE)
def test_an_adapter_that_fits_no_module_is_refused(case: str, model: Model, tmp_path: Path):
    save_file(FITS_NO_MODULE[case], tmp_path / "x.safetensors")
    before = weights(model)

    for how in ("folded", "live"):
        with pytest.raises(ModelError) as refused:
            model.attach(tmp_path / "x.safetensors", how=how)
        assert "\n" not in str(refused.value) and "x.safetensors" in str(refused.value)
    assert same(before, weights(model)) and not model.attached


DAMAGED: dict[str, dict[str, Tensor]] = {
    "sparse, indices without dimensions": {f"{L}.bias_indices": t(), f"{L}.bias_values": t(1), f"{L}.bias_size": t(2)},
    "sparse, size without dimensions": {f"{L}.bias_indices": t(2, 1), f"{L}.bias_values": t(1), f"{L}.bias_size": t()},
    "sparse, indices out of range": {f"{L}.bias_indices": torch.full((2, 1), 99.0), f"{L}.bias_values": t(1),
                               f"{L}.bias_size": torch.tensor([32.0, 32.0])},
    "an alpha that is not a number": {f"{L}.lora_up.weight": t(32, 2), f"{L}.lora_down.weight": t(2, 32),
                                      f"{L}.alpha": torch.tensor(math.nan)},
    "two alphas": {f"{L}.lora_up.weight": t(32, 2), f"{L}.lora_down.weight": t(2, 32), f"{L}.alpha": t(2)},
    "NaN": {f"{L}.lora_up.weight": t(32, 2) * math.nan, f"{L}.lora_down.weight": t(2, 32)},
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_values_are_named_and_nothing_stays_attached(case: str, model: Model, tmp_path: Path):
    save_file(DAMAGED[case], tmp_path / "x.safetensors")
    before = weights(model)

    with pytest.raises(ModelError) as refused:
        model.attach(tmp_path / "x.safetensors")

    assert "\n" not in str(refused.value) and "x.safetensors" in str(refused.value)
    assert same(before, weights(model)) and not model.attached and not list(model.adapters)


@pytest.mark.parametrize("text", ['{"unet.lora_alpha": 1' + "0" * 400 + "}", "[1]", "{", '{"unet.lora_alpha": NaN}'])
def test_invalid_header_metadata(text: str, model: Model, tmp_path: Path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": t(2, 32), f"{name}.lora_B.weight": t(32, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": text})

    try:
        model.attach(tmp_path / "x.safetensors").detach()
    except GouacheError as error:
        assert "\n" not in str(error)


part_names = st.sampled_from([
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "dora_scale", "oft_blocks", "rescale",
    "oft_diag", "boft_R", "boft_s", "oft_R.weight", "ia3_l", "on_input", "weight", "a1.weight", "a2.weight",
    "b1.weight", "b2.weight", "diff", "diff_b", "w_norm", "b_norm", "bias_indices", "bias_values", "bias_size",
])  # fmt: skip
shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 128]), max_size=4)


@given(
    module=st.sampled_from([L, FF, NORM, "lora_te_text_model_embeddings_token_embedding", "lora_unet_conv_in"]),
    parts=st.dictionaries(part_names, shapes, min_size=1, max_size=5),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_combination_of_parts_is_used_or_refused_in_one_line(
    module: str, parts: dict[str, list[int]], model: Model, tmp_path: Path
):
    save_file({f"{module}.{part}": t(*shape) for part, shape in parts.items()}, tmp_path / "x.safetensors")
    for how in ("folded", "live"):
        try:
            on = model.attach(tmp_path / "x.safetensors", 0.5, how=how)
        except GouacheError as error:
            assert "\n" not in str(error)
            continue
        try:
            seen(model)
        except GouacheError as error:  # faults in the values show when a live adapter is applied
            assert "\n" not in str(error)
        on.detach()
    assert not list(model.adapters) and not model.attached


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_a_strength_that_is_not_finite_or_too_large_is_refused(number: float, model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))

    for attempt in (lambda: model.attach(path, number), lambda: next(model.paint("a", lora=f"{path}:te={number}"))):
        with pytest.raises(RequestError):
            attempt()


def test_an_interrupt_while_attaching_restores_the_weights(model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    before = weights(model)

    class InterruptingSet(set):  # type: ignore[type-arg]
        remaining = 40

        def add(self, item: object) -> None:
            super().add(item)
            InterruptingSet.remaining -= 1
            if not InterruptingSet.remaining:
                raise KeyboardInterrupt

    model.adapters._changed = InterruptingSet(model.adapters._changed)
    with pytest.raises(KeyboardInterrupt):
        model.attach(path)

    assert same(before, weights(model)) and not list(model.adapters)
    model.adapters._changed = set(model.adapters._changed)


def test_an_interrupt_while_detaching_still_detaches(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gouache.adapters.live import LivePatch

    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    plain = seen(model)
    on = model.attach(path, how="live")
    real_remove, remaining = LivePatch.remove, [4]

    def remove(self: LivePatch) -> None:
        remaining[0] -= 1
        if remaining[0] == 0:
            raise KeyboardInterrupt
        real_remove(self)

    monkeypatch.setattr(LivePatch, "remove", remove)
    with pytest.raises(KeyboardInterrupt):
        on.detach()

    assert torch.equal(seen(model), plain) and not list(model.adapters)


def test_a_detached_adapter_cannot_be_changed(model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    for how in ("folded", "live"):
        on = model.attach(path, how=how)
        on.detach()
        with pytest.raises(ModelError, match="not attached"):
            on.change(Strength(0.5, end=0.5))
    assert not list(model.adapters)


def test_embeddings_of_the_same_name_attach_and_detach_in_any_order(model: Model, tmp_path: Path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        save_file({"emb_params": torch.full((1, 64), float(number))}, tmp_path / str(number) / "zorb.safetensors")
    first, second = (model.attach(tmp_path / str(number) / "zorb.safetensors") for number in (1, 2))

    first.detach()
    assert model.embeddings["zorb"]["text_encoder"][0, 0] == 2
    second.detach()
    assert "zorb" not in model.embeddings and not model.embeddings


@pytest.mark.parametrize("shape", [(76, 64), (0, 64), (1, 64, 64)])
def test_embeddings_with_too_many_or_no_vectors_are_refused(shape: tuple[int, ...], model: Model, tmp_path: Path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(shape)}}, tmp_path / "x.pt")

    with pytest.raises(ModelError, match="expected 1 to 75 vectors"):
        model.attach(tmp_path / "x.pt")


def test_sdxl_embeddings_with_different_vector_counts_are_refused(tmp_path: Path, narrow: Callable[[str], Narrow]):
    xl = gouache.load(narrow("sdxl").file, device="cpu", dtype="fp32")
    save_file({"clip_l": t(3, 64), "clip_g": t(2, 128)}, tmp_path / "x.safetensors")

    with pytest.raises(ModelError, match="vectors"):
        xl.attach(tmp_path / "x.safetensors")


@pytest.mark.parametrize("fault", ["bias", "missing", "norm", "flat", "NaN"])
def test_inconsistent_hypernetworks_are_refused(fault: str, model: Model, tmp_path: Path):
    good = {"linear.0.weight": t(64, 64), "linear.0.bias": t(64), "linear.1.weight": t(64), "linear.1.bias": t(64)}
    change: dict[str, dict[str, Tensor]] = {
        "bias": {"linear.0.bias": t(7)},
        "norm": {"linear.1.weight": t(7), "linear.1.bias": t(7)},
        "flat": {"linear.0.weight": t(64, 64, 1)},
        "NaN": {"linear.0.bias": t(64) * math.nan},
        "missing": {},
    }
    side = {**good, **change[fault]}
    if fault == "missing":
        del side["linear.0.weight"]
    torch.save({64: (side, side), "name": "x"}, tmp_path / "x.pt")

    with pytest.raises(ModelError) as refused:
        model.attach(tmp_path / "x.pt")
    assert "\n" not in str(refused.value) and not model.attached


def test_two_live_adapters_combine_like_folded_ones(model: Model, tmp_path: Path):
    save_file({f"{L}.weight": torch.full((32,), 0.5), f"{L}.on_input": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    results = []
    for how in ("folded", "live"):
        both = [model.attach(tmp_path / "x.safetensors", how=how) for _ in range(2)]
        results.append(seen(model))
        for on in both:
            on.detach()

    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_a_module_named_twice_is_used_once_and_the_rest_is_reported(model: Model, tmp_path: Path):
    other = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{L}.lora_up.weight": t(32, 2), f"{L}.lora_down.weight": t(2, 32), f"{L}.alpha": torch.tensor(1.0)}
    tensors |= {f"{other}.lora_B.weight": t(32, 4), f"{other}.lora_A.weight": t(4, 32), f"{L}.diff": t(32, 32)}
    save_file(tensors, tmp_path / "x.safetensors")
    before = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q").weight.clone()

    on = model.attach(tmp_path / "x.safetensors")

    after = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q").weight
    torch.testing.assert_close(after, before + 0.5 * t(32, 2) @ t(2, 32))
    assert set(on.unmatched) == {f"{other}.lora_B.weight", f"{other}.lora_A.weight", f"{L}.diff"}
    on.detach()


DOWN = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"
NAMING_SCHEMES = {
    "early diffusers, text encoder": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", ("up", "down")
    ),
    "early diffusers, no processor": (f"unet.{DOWN}.to_out_lora", ("up", "down")),
    "PEFT with the adapter's name": (f"base_model.model.unet.{DOWN}.to_q", ("lora_B.default", "lora_A.default")),
    "PEFT around a component": (f"unet.base_model.model.{DOWN}.to_q", ("lora_B", "lora_A")),
    "LyCORIS wrapper": (f"lycoris_{DOWN.replace('.', '_')}_to_q", ("lora_up", "lora_down")),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMING_SCHEMES)
def test_other_naming_schemes(case: str, model: Model, tmp_path: Path):
    stem, (up, down) = NAMING_SCHEMES[case]
    width = 64 if "text" in case else 32
    tensors = {f"{stem}.{up}.weight": t(width, 2), f"{stem}.{down}.weight": t(2, width)}
    save_file(tensors, tmp_path / "x.safetensors")

    on = model.attach(tmp_path / "x.safetensors")

    assert on.matched == 1 and not on.unmatched
    on.detach()


def test_a_peft_folder(model: Model, tmp_path: Path):
    stem = "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_B.weight": t(32, 2), f"{stem}.lora_A.weight": t(2, 32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    layer = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    before = layer.weight.clone()

    on = model.attach(tmp_path)

    torch.testing.assert_close(layer.weight, before + 2 * t(32, 2) @ t(2, 32))
    on.detach()


def test_glora_in_early_lycoris_order(model: Model, tmp_path: Path):
    """There a1 and b1 are the factors next to the input: W a2 a1 + b2 b1."""
    tensors = {f"{FF}.{n}.weight": t(*s) for n, s in
               {"a1": (2, 128), "a2": (128, 2), "b1": (2, 128), "b2": (32, 2)}.items()}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    layer = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.ff.net.2")
    before = layer.weight.clone()

    on = model.attach(tmp_path / "x.safetensors")

    expected = before + before @ t(128, 2) @ t(2, 128) + t(32, 2) @ t(2, 128)
    torch.testing.assert_close(layer.weight, expected, atol=1e-4, rtol=1e-4)
    on.detach()
