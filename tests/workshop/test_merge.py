"""`merge` on whole files: merged and copied tensors, refused requests, block weights, and reproduction by recipe."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from gouache.errors import GouacheError, ModelError, RequestError
from gouache.files.open import open_model
from gouache.layouts.blocks import blocks
from gouache.nn.spec import UNetSpec
from gouache.workshop import recipe as recipes
from gouache.workshop.block_weights import BASE, PRESETS, weights
from gouache.workshop.convert import convert
from gouache.workshop.merge import merge
from gouache.workshop.recipe import Recipe, Source
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
UNET, VAE, TEXT = "model.diffusion_model.", "first_stage_model.", "cond_stage_model."


def noisy(seed: int) -> Callable[[dict[str, Tensor]], None]:
    """A function that adds noise to every floating-point tensor of a file."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                tensors[name] = tensor + 0.1 * torch.randn(tensor.shape, generator=generator)

    return change


@pytest.fixture(scope="module")
def family(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Three models of one family, the second also as .ckpt and the third also as a folder."""
    folder = tmp_path_factory.mktemp("family")
    a = narrow("sd1").file
    b, c = (altered(a, folder / f"{name}.safetensors", noisy(seed)) for name, seed in (("b", 1), ("c", 2)))
    convert(b, folder / "b.ckpt")
    convert(c, folder / "c-folder")
    return {"a": a, "b": b, "c": c, "b.ckpt": folder / "b.ckpt", "c-folder": folder / "c-folder"}


def sources(*paths: Path) -> tuple[Source, ...]:
    return tuple(Source(str(path)) for path in paths)


def close(merged: Tensor, expected: Tensor) -> bool:
    return torch.allclose(merged.double(), expected, atol=1e-6, rtol=0)


def test_a_weighted_sum_of_files_copies_the_first_vae(family: dict[str, Path], tmp_path: Path):
    a, b = load_file(family["a"]), load_file(family["b"])

    merge(Recipe(models=sources(family["a"], family["b"]), alpha=0.3), tmp_path / "m.safetensors")

    merged = load_file(tmp_path / "m.safetensors")
    assert merged.keys() == a.keys()
    for name, tensor in merged.items():
        if name.startswith(VAE):
            assert torch.equal(tensor, a[name]), "the VAE is copied from A by default"
        else:
            assert close(tensor, 0.7 * a[name].double() + 0.3 * b[name].double()), name


def test_the_layout_of_the_models_does_not_matter(family: dict[str, Path], tmp_path: Path):
    recipe = Recipe(method="add-difference", alpha=0.5)
    plain = sources(family["a"], family["b"], family["c"])
    mixed = sources(family["a"], family["b.ckpt"], family["c-folder"])

    for name, models in (("plain", plain), ("mixed", mixed)):
        merge(recipes.Recipe(**{**vars(recipe), "models": models}), tmp_path / f"{name}.safetensors")

    one, other = (load_file(tmp_path / f"{name}.safetensors") for name in ("plain", "mixed"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(("vae", "text"), [("b", "merge"), ("merge", "b"), ("c", "a")])
def test_vae_and_text_encoder_are_copied_from_the_requested_model(
    family: dict[str, Path], tmp_path: Path, vae: str, text: str
):
    files = {key: load_file(family[key]) for key in "abc"}
    models = sources(family["a"], family["b"], family["c"])

    merge(Recipe(method="sum-twice", models=models, vae=vae, text=text), tmp_path / "m.safetensors")

    merged = load_file(tmp_path / "m.safetensors")
    mean = {name: 0.25 * files["a"][name] + 0.25 * files["b"][name] + 0.5 * files["c"][name] for name in merged}
    for prefix, mode in ((VAE, vae), (TEXT, text)):
        expected = mean if mode == "merge" else files[mode]
        assert all(close(merged[n], expected[n].double()) for n in merged if n.startswith(prefix))


def test_tensors_that_are_not_weights_are_copied(family: dict[str, Path], tmp_path: Path):
    """Other merge tools turn position ids of 76 into 75.99, then 75, and average the noise schedule."""
    ids = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    average = "model_ema.diffusion_modelout2weight"

    def add(tensors: dict[str, Tensor]) -> None:
        tensors |= {ids: torch.arange(77)[None], "betas": torch.rand(1000, dtype=torch.float64), average: torch.ones(4)}

    a = altered(family["a"], tmp_path / "a.safetensors", add)
    b = altered(family["b"], tmp_path / "b.safetensors", add)

    done = merge(Recipe(models=sources(a, b)), tmp_path / "m.safetensors")

    merged, first = load_file(tmp_path / "m.safetensors"), load_file(a)
    assert torch.equal(merged[ids], first[ids]) and torch.equal(merged["betas"], first["betas"])
    assert merged["betas"].dtype == torch.float64
    assert average not in merged and sum(done.left_out.values()) == 1


def test_add_difference_makes_an_inpainting_model_of_any_other(
    narrow: Narrows, family: dict[str, Path], tmp_path: Path
):
    """inpainting + (tuned - base): the input channels for mask and masked picture keep their weights."""
    first = f"{UNET}input_blocks.0.0.weight"
    inpainting = narrow("sd1-inpainting").file
    models = sources(inpainting, family["b"], family["c"])

    merge(Recipe(method="add-difference", models=models, alpha=1.0), tmp_path / "m.safetensors")

    i, b, c, m = (load_file(path) for path in (inpainting, family["b"], family["c"], tmp_path / "m.safetensors"))
    assert m[first].shape[1] == 9
    assert torch.equal(m[first][:, 4:], i[first][:, 4:])
    assert close(m[first][:, :4], i[first][:, :4].double() + b[first].double() - c[first].double())
    with pytest.raises(ModelError, match=r"give the inpainting .* model first"):
        merge(Recipe(models=sources(family["a"], inpainting)), tmp_path / "n.safetensors")


@pytest.mark.parametrize(
    ("recipe", "others", "message"),
    [
        (Recipe(method="add-difference"), ["b"], "needs 3 models; got 2"),
        (Recipe(method="ties"), ["b"], "the first of them the base"),
        (Recipe(method="average"), ["b"], "'average' is not known; use one of weighted-sum"),
        (Recipe(vae="d"), ["b"], "'d' is not known; use merge, a, b"),
        (Recipe(blocks={"alpha": "1,2,3"}), ["b"], "got 3 numbers; this U-Net needs 26: BASE and 25 blocks"),
        (Recipe(blocks={"alpha": "GRAD_X"}), ["b"], "is not a file, a preset"),
        (Recipe(rules={"alpha": ("no number",)}), ["b"], "is not PATTERN=NUMBER"),
        (Recipe(dtype="int8"), ["b"], "'int8' is not known"),
    ],
)
def test_invalid_merges_are_refused_with_a_message_of_one_line(
    family: dict[str, Path], tmp_path: Path, recipe: Recipe, others: list[str], message: str
):
    models = sources(family["a"], *(family[name] for name in others))

    with pytest.raises(GouacheError, match=message) as caught:
        merge(Recipe(**{**vars(recipe), "models": models}), tmp_path / "m.safetensors")

    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_models_of_different_families_are_refused_before_any_work(narrow: Narrows, tmp_path: Path):
    models = sources(narrow("sd1").file, narrow("sdxl").file)

    with pytest.raises(
        ModelError, match=r"Stable Diffusion XL and .* is Stable Diffusion 1: models of different families"
    ):
        merge(Recipe(models=models), tmp_path / "m.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_vae_of_another_shape_is_refused(narrow: Narrows, family: dict[str, Path], tmp_path: Path):
    def widen(tensors: dict[str, Tensor]) -> None:
        name = f"{VAE}decoder.conv_out.weight"
        tensors[name] = torch.cat([tensors[name], tensors[name]], 1)

    wide = altered(family["a"], tmp_path / "wide.safetensors", widen)

    with pytest.raises(ModelError, match="has no usable vae"):
        merge(Recipe(models=sources(family["a"], wide), vae="merge"), tmp_path / "m.safetensors")


def test_a_recipe_reproduces_the_merge_byte_for_byte(family: dict[str, Path], tmp_path: Path):
    recipe = Recipe(
        method="dare", models=sources(family["a"], family["b"], family["c"]), density=0.5, seed=7,
        blocks={"alpha": "GRAD_V"}, rules={"alpha": ("*attn2*=0.9",)},
    )  # fmt: skip

    first = merge(recipe, tmp_path / "one.safetensors", recipe_file=tmp_path / "r.toml")
    again = merge(recipes.read(tmp_path / "r.toml"), tmp_path / "two.safetensors")

    assert first.sha256 == again.sha256
    changed = (tmp_path / "r.toml").read_text().replace("seed = 7", "seed = 8")
    (tmp_path / "s.toml").write_text(changed)
    assert merge(recipes.read(tmp_path / "s.toml"), tmp_path / "three.safetensors").sha256 != first.sha256


def test_a_recipe_checks_the_hashes_of_its_models(family: dict[str, Path], tmp_path: Path):
    merge(Recipe(models=sources(family["a"], family["b"])), tmp_path / "m.safetensors", recipe_file=tmp_path / "r.toml")
    text = (tmp_path / "r.toml").read_text().replace(str(family["b"]), str(family["c"]))
    (tmp_path / "r.toml").write_text(text)

    with pytest.raises(ModelError, match="is not the file that the recipe was made with"):
        merge(recipes.read(tmp_path / "r.toml"), tmp_path / "n.safetensors")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpha = 'x'", "alpha = 'x', which is of the wrong type"),
        ("alfa = 1", "the unknown key 'alfa'"),
        ("[[models]]\nname='x'", "without a path"),
        ("alpha = ", "is not a merge recipe"),
    ],
)
def test_an_invalid_recipe_is_refused(tmp_path: Path, text: str, message: str):
    (tmp_path / "r.toml").write_text(text)

    with pytest.raises(GouacheError, match=message):
        recipes.read(tmp_path / "r.toml")


def test_metadata_lists_all_ancestors_with_their_hashes(family: dict[str, Path], tmp_path: Path):
    merge(Recipe(models=sources(family["a"], family["b"])), tmp_path / "m.safetensors")
    merge(Recipe(models=sources(tmp_path / "m.safetensors", family["c"])), tmp_path / "n.safetensors")

    with safe_open(tmp_path / "n.safetensors", "pt") as opened:
        metadata = opened.metadata()
    models = json.loads(metadata["sd_merge_models"])
    hashes = {open_model(path).sha256() for path in (family["a"], family["b"], family["c"], tmp_path / "m.safetensors")}
    assert hashes == models.keys()
    assert models[open_model(tmp_path / "m.safetensors").sha256()]["sd_merge_recipe"]["method"] == "weighted-sum"
    assert json.loads(metadata["sd_merge_recipe"])["type"] == "gouache"


def test_block_weights_and_rules_set_alpha_per_tensor(family: dict[str, Path], tmp_path: Path):
    numbers = [0.5] + [n / 24 for n in range(25)]
    recipe = Recipe(
        models=sources(family["a"], family["b"]), blocks={"alpha": ",".join(map(str, numbers))},
        rules={"alpha": ("*.attn2.to_k.weight=1.0", f"{UNET}nothing*=0.3")},
    )  # fmt: skip

    merge(recipe, tmp_path / "m.safetensors")

    a, b, m = load_file(family["a"]), load_file(family["b"]), load_file(tmp_path / "m.safetensors")
    alphas = {"time_embed.0.weight": 0, "input_blocks.4.0.in_layers.2.weight": 4 / 24,
              "middle_block.0.in_layers.2.weight": 12 / 24, "output_blocks.11.0.in_layers.2.weight": 1.0,
              "out.2.weight": 1.0, "input_blocks.4.1.transformer_blocks.0.attn2.to_k.weight": 1.0}  # fmt: skip
    for name, alpha in alphas.items():
        expected = (1 - alpha) * a[UNET + name].double() + alpha * b[UNET + name].double()
        assert close(m[UNET + name], expected), name
    text = "cond_stage_model.transformer.text_model.final_layer_norm.weight"
    assert close(m[text], 0.5 * a[text].double() + 0.5 * b[text].double())


SDXL = UNetSpec(channel_mult=(1, 2, 4), attention_depth=(0, 2, 10))


@pytest.mark.parametrize(("spec", "count"), [(UNetSpec(), 25), (SDXL, 19)], ids=["sd1", "sdxl"])
@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_has_a_weight_for_every_block(spec: UNetSpec, count: int, preset: str):
    found = weights(0.9, preset, spec).by_label

    assert found is not None and found.keys() == {BASE, *(block.label for block in blocks(spec))}
    assert len(found) == count + 1 and all(0 <= weight <= 1 for weight in found.values())


def test_presets_have_the_curves_they_are_named_after():
    curves = {name: list((weights(0.9, name, UNetSpec()).by_label or {}).values())[1:] for name in PRESETS}

    assert curves["GRAD_V"][0] == curves["GRAD_V"][-1] == 1 and curves["GRAD_V"][12] == 0
    assert curves["GRAD_A"][0] == curves["GRAD_A"][-1] == 0 and curves["GRAD_A"][12] == 1
    assert curves["FLAT_25"] == [0.25] * 25
    assert curves["SMOOTHSTEP"] == sorted(curves["SMOOTHSTEP"])
    assert curves["COSINE"] == sorted(curves["COSINE"], reverse=True)
    assert all(a + b + c == 1 for a, b, c in zip(curves["WRAP"], curves["RING"], curves["MID"]))


def test_a_file_of_labels_can_leave_blocks_out(tmp_path: Path):
    (tmp_path / "w.toml").write_text("IN04 = 0.25\nBASE = 1.0\n")

    found = weights(0.9, str(tmp_path / "w.toml"), UNetSpec())

    assert found.of("x", "input_blocks.4.0.in_layers.0.weight") == 0.25
    assert found.of("x", "middle_block.0.in_layers.0.weight") == 0.9
    assert found.of("x", None) == 1.0
    (tmp_path / "w.toml").write_text("IN99 = 0.25\n")
    with pytest.raises(GouacheError, match=r"IN99 = 0.25; expected BASE or IN00 to OUT11"):
        weights(0.9, str(tmp_path / "w.toml"), UNetSpec())


def test_large_tensors_are_merged_in_blocks_of_rows(
    family: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from gouache.workshop import merge as merge_module

    recipe = Recipe(models=sources(family["a"], family["b"]), alpha=0.3)
    merge(recipe, tmp_path / "whole.safetensors")
    monkeypatch.setattr(merge_module, "_AT_ONCE", 1000)
    merge(recipe, tmp_path / "blocks.safetensors")

    whole, in_blocks = (load_file(tmp_path / f"{name}.safetensors") for name in ("whole", "blocks"))
    assert all(torch.equal(whole[name], in_blocks[name]) for name in whole)


def test_an_existing_file_is_not_overwritten_by_default(family: dict[str, Path], tmp_path: Path):
    (tmp_path / "m.safetensors").write_text("older")

    with pytest.raises(RequestError, match="already exists"):
        merge(Recipe(models=sources(family["a"], family["b"])), tmp_path / "m.safetensors")
    assert (tmp_path / "m.safetensors").read_text() == "older"


def test_two_variants_with_extra_channels_are_not_merged_in_either_order(narrow: Narrows, tmp_path: Path):
    """Inpainting has 9 input channels and editing 8; the extra ones mean different things."""
    a, b = narrow("sd1-inpainting").file, narrow("sd1-edit").file

    for models in (sources(a, b), sources(b, a)):
        with pytest.raises(ModelError, match="different variants") as caught:
            merge(Recipe(models=models), tmp_path / "m.safetensors")
        assert "first" not in str(caught.value)
    with pytest.raises(ModelError, match=r"give the inpainting .* model first"):
        merge(Recipe(models=sources(narrow("sd1").file, a)), tmp_path / "m.safetensors")
