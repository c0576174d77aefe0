"""Files that are wrong in one way each: refused in one line, or used as far as they fit; never a traceback."""

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


NOTHING_FITS: dict[str, dict[str, Tensor]] = {
    "boft of three dimensions": {f"{L}.boft_R": t(2, 8, 4)},
    "boft of no blocks": {f"{L}.boft_R": t(1, 0, 4, 4)},
    "a lora on a norm": {f"{NORM}.lora_up.weight": t(32, 2), f"{NORM}.lora_down.weight": t(2, 1)},
    "a lora of one dimension": {f"{L}.lora_up.weight": t(32), f"{L}.lora_down.weight": t()},
    "a lora of no rank": {f"{L}.lora_up.weight": t(32, 0), f"{L}.lora_down.weight": t(0, 32)},
    "half a lora": {f"{L}.lora_up.weight": t(32, 2)},
    "ia3 for another side": {f"{FF}.weight": t(32), f"{FF}.on_input": torch.tensor(1.0)},
    "oft of four dimensions": {f"{L}.oft_R.weight": t(2, 2, 2, 2)},
    "oft of odd blocks": {f"{L}.oft_blocks": t(3, 7, 7)},
    "a bias of another width": {f"{FF}.diff_b": t(7)},
    "lokr of the wrong size": {f"{L}.lokr_w1": t(3, 3), f"{L}.lokr_w2": t(5, 5)},
}


@pytest.mark.parametrize("case", NOTHING_FITS)
def test_what_fits_nothing_is_refused(case: str, model: Model, tmp_path: Path):
    save_file(NOTHING_FITS[case], tmp_path / "x.safetensors")
    before = weights(model)

    for how in ("folded", "live"):
        with pytest.raises(ModelError) as refused:
            model.attach(tmp_path / "x.safetensors", how=how)
        assert "\n" not in str(refused.value) and "x.safetensors" in str(refused.value)
    assert same(before, weights(model)) and not model.attached


DAMAGED: dict[str, dict[str, Tensor]] = {
    "sparse, places of no dimension": {f"{L}.bias_indices": t(), f"{L}.bias_values": t(1), f"{L}.bias_size": t(2)},
    "sparse, a size of no dimension": {f"{L}.bias_indices": t(2, 1), f"{L}.bias_values": t(1), f"{L}.bias_size": t()},
    "sparse, places outside": {f"{L}.bias_indices": torch.full((2, 1), 99.0), f"{L}.bias_values": t(1),
                               f"{L}.bias_size": torch.tensor([32.0, 32.0])},
    "an alpha that is not a number": {f"{L}.lora_up.weight": t(32, 2), f"{L}.lora_down.weight": t(2, 32),
                                      f"{L}.alpha": torch.tensor(math.nan)},
    "two alphas": {f"{L}.lora_up.weight": t(32, 2), f"{L}.lora_down.weight": t(2, 32), f"{L}.alpha": t(2)},
    "NaN": {f"{L}.lora_up.weight": t(32, 2) * math.nan, f"{L}.lora_down.weight": t(2, 32)},
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGED)
def test_damage_that_values_tell_is_named_and_nothing_stays(case: str, model: Model, tmp_path: Path):
    save_file(DAMAGED[case], tmp_path / "x.safetensors")
    before = weights(model)

    with pytest.raises(ModelError) as refused:
        model.attach(tmp_path / "x.safetensors")

    assert "\n" not in str(refused.value) and "x.safetensors" in str(refused.value)
    assert same(before, weights(model)) and not model.attached and not list(model.adapters)


@pytest.mark.parametrize("told", ['{"unet.lora_alpha": 1' + "0" * 400 + "}", "[1]", "{", '{"unet.lora_alpha": NaN}'])
def test_a_header_that_says_nonsense(told: str, model: Model, tmp_path: Path):
    name = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{name}.lora_A.weight": t(2, 32), f"{name}.lora_B.weight": t(32, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": told})

    try:
        model.attach(tmp_path / "x.safetensors").detach()
    except GouacheError as error:
        assert "\n" not in str(error)


pieces = st.sampled_from([
    "lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "hada_w1_a", "hada_w1_b", "hada_w2_a",
    "hada_w2_b", "hada_t1", "lokr_w1", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "dora_scale", "oft_blocks", "rescale",
    "oft_diag", "boft_R", "boft_s", "oft_R.weight", "ia3_l", "on_input", "weight", "a1.weight", "a2.weight",
    "b1.weight", "b2.weight", "diff", "diff_b", "w_norm", "b_norm", "bias_indices", "bias_values", "bias_size",
])  # fmt: skip
some_shapes = st.lists(st.sampled_from([0, 1, 2, 3, 4, 8, 16, 32, 128]), max_size=4)


@given(
    place=st.sampled_from([L, FF, NORM, "lora_te_text_model_embeddings_token_embedding", "lora_unet_conv_in"]),
    parts=st.dictionaries(pieces, some_shapes, min_size=1, max_size=5),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_it_is_used_or_refused_in_one_line(
    place: str, parts: dict[str, list[int]], model: Model, tmp_path: Path
):
    save_file({f"{place}.{part}": t(*shape) for part, shape in parts.items()}, tmp_path / "x.safetensors")
    for how in ("folded", "live"):
        try:
            on = model.attach(tmp_path / "x.safetensors", 0.5, how=how)
        except GouacheError as error:
            assert "\n" not in str(error)
            continue
        try:
            seen(model)
        except GouacheError as error:  # what the values tell, where an adapter acts live
            assert "\n" not in str(error)
        on.detach()
    assert not list(model.adapters) and not model.attached


@pytest.mark.parametrize("number", [math.nan, math.inf, 1e300])
def test_a_strength_is_a_number(number: float, model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))

    for attempt in (lambda: model.attach(path, number), lambda: next(model.paint("a", lora=f"{path}:te={number}"))):
        with pytest.raises(RequestError):
            attempt()


def test_an_interrupt_at_any_place_leaves_nothing(model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    before = weights(model)

    class Interrupting(set):  # type: ignore[type-arg]
        left = 40

        def add(self, item: object) -> None:
            super().add(item)
            Interrupting.left -= 1
            if not Interrupting.left:
                raise KeyboardInterrupt

    model.adapters._changed = Interrupting(model.adapters._changed)
    with pytest.raises(KeyboardInterrupt):
        model.attach(path)

    assert same(before, weights(model)) and not list(model.adapters)
    model.adapters._changed = set(model.adapters._changed)


def test_an_interrupt_while_it_is_taken_off_takes_it_off(model: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from gouache.adapters.live import Live

    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    plain = seen(model)
    on = model.attach(path, how="live")
    real, left = Live.remove, [4]

    def remove(self: Live) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(Live, "remove", remove)
    with pytest.raises(KeyboardInterrupt):
        on.detach()

    assert torch.equal(seen(model), plain) and not list(model.adapters)


def test_what_is_off_stays_off(model: Model, tmp_path: Path):
    path = save_kohya(tmp_path / "x.safetensors", model, factors(model))
    for how in ("folded", "live"):
        on = model.attach(path, how=how)
        on.detach()
        with pytest.raises(ModelError, match="not attached"):
            on.change(Strength(0.5, end=0.5))
    assert not list(model.adapters)


def test_embeddings_of_one_name_come_and_go_in_any_order(model: Model, tmp_path: Path):
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        save_file({"emb_params": torch.full((1, 64), float(number))}, tmp_path / str(number) / "zorb.safetensors")
    first, second = (model.attach(tmp_path / str(number) / "zorb.safetensors") for number in (1, 2))

    first.detach()
    assert model.embeddings["zorb"]["text_encoder"][0, 0] == 2
    second.detach()
    assert "zorb" not in model.embeddings and not model.embeddings


@pytest.mark.parametrize("shape", [(76, 64), (0, 64), (1, 64, 64)])
def test_embeddings_that_no_prompt_has_room_for(shape: tuple[int, ...], model: Model, tmp_path: Path):
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": torch.zeros(shape)}}, tmp_path / "x.pt")

    with pytest.raises(ModelError, match="expected 1 to 75 vectors"):
        model.attach(tmp_path / "x.pt")


def test_halves_of_an_sdxl_embedding_that_do_not_match(tmp_path: Path, narrow: Callable[[str], Narrow]):
    xl = gouache.load(narrow("sdxl").file, device="cpu", dtype="fp32")
    save_file({"clip_l": t(3, 64), "clip_g": t(2, 128)}, tmp_path / "x.safetensors")

    with pytest.raises(ModelError, match="vectors"):
        xl.attach(tmp_path / "x.safetensors")


@pytest.mark.parametrize("fault", ["bias", "missing", "norm", "flat", "NaN"])
def test_hypernetworks_that_do_not_go_together(fault: str, model: Model, tmp_path: Path):
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


def test_two_live_ones_act_one_on_the_other(model: Model, tmp_path: Path):
    save_file({f"{L}.weight": torch.full((32,), 0.5), f"{L}.on_input": torch.tensor(1.0)}, tmp_path / "x.safetensors")
    results = []
    for how in ("folded", "live"):
        both = [model.attach(tmp_path / "x.safetensors", how=how) for _ in range(2)]
        results.append(seen(model))
        for on in both:
            on.detach()

    torch.testing.assert_close(results[0], results[1], atol=1e-4, rtol=1e-4)


def test_a_module_named_twice_counts_once_and_the_rest_is_told(model: Model, tmp_path: Path):
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
NAMES = {
    "the first diffusers, text encoder": (
        "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora", ("up", "down")
    ),
    "the first diffusers, no processor": (f"unet.{DOWN}.to_out_lora", ("up", "down")),
    "PEFT with the adapter's name": (f"base_model.model.unet.{DOWN}.to_q", ("lora_B.default", "lora_A.default")),
    "PEFT around a component": (f"unet.base_model.model.{DOWN}.to_q", ("lora_B", "lora_A")),
    "LyCORIS' own wrapper": (f"lycoris_{DOWN.replace('.', '_')}_to_q", ("lora_up", "lora_down")),
}  # fmt: skip


@pytest.mark.parametrize("case", NAMES)
def test_other_names_in_the_wild(case: str, model: Model, tmp_path: Path):
    stem, (up, down) = NAMES[case]
    width = 64 if "text" in case else 32
    tensors = {f"{stem}.{up}.weight": t(width, 2), f"{stem}.{down}.weight": t(2, width)}
    save_file(tensors, tmp_path / "x.safetensors")

    on = model.attach(tmp_path / "x.safetensors")

    assert on.matched == 1 and not on.unmatched
    on.detach()


def test_a_folder_of_pefts(model: Model, tmp_path: Path):
    stem = "base_model.model.unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{stem}.lora_B.weight": t(32, 2), f"{stem}.lora_A.weight": t(2, 32)}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 4}))
    layer = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn1.to_q")
    before = layer.weight.clone()

    on = model.attach(tmp_path)

    torch.testing.assert_close(layer.weight, before + 2 * t(32, 2) @ t(2, 32))
    on.detach()


def test_glora_as_its_first_trainers_wrote_it(model: Model, tmp_path: Path):
    """a1 and b1 are then the factors next to the input: W a2 a1 + b2 b1."""
    tensors = {f"{FF}.{n}.weight": t(*s) for n, s in
               {"a1": (2, 128), "a2": (128, 2), "b1": (2, 128), "b2": (32, 2)}.items()}  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    layer = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.ff.net.2")
    before = layer.weight.clone()

    on = model.attach(tmp_path / "x.safetensors")

    wanted = before + before @ t(128, 2) @ t(2, 128) + t(32, 2) @ t(2, 128)
    torch.testing.assert_close(layer.weight, wanted, atol=1e-4, rtol=1e-4)
    on.detach()
