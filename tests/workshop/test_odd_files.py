"""Every command reads models of odd origin as what they are: averages alone, hybrid VAE names, scaled fp8, Forge's."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import ModelError, RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.workshop.convert import convert
from gouache.workshop.diff import diff, open_both
from gouache.workshop.lora.bake import bake
from gouache.workshop.merge import merge
from gouache.workshop.prune import prune
from gouache.workshop.recipe import Recipe, Source
from tests.marks import usual
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
Tensors = dict[str, Tensor]
UNET, VAE = "model.diffusion_model.", "first_stage_model."


def merged(target: Path, *models: Path, **settings: str) -> Tensors:
    merge(Recipe(models=tuple(Source(str(path)) for path in models), **settings), target, overwrite=True)  # type: ignore[arg-type]
    return load_file(target)


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def round_trip(source: Path, folder: Path) -> Tensors:
    """The tensors of `source`, converted to a diffusers folder and back."""
    convert(source, folder)
    convert(folder, folder.with_suffix(".safetensors"))
    return load_file(folder.with_suffix(".safetensors"))


def average(name: str) -> str:
    """The name of a tensor's average, as the original training code makes it."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


# ---- averages (EMA) alone


@pytest.fixture(params=["sd1", pytest.param("sdxl", marks=pytest.mark.full)])
def averages(request: pytest.FixtureRequest, narrow: Narrows, tmp_path: Path) -> tuple[Path, Path]:
    """A model, and the same whose U-Net is there only as its averages."""
    plain = narrow(request.param).file
    tensors = load_file(plain)
    renamed = {average(name) if name.startswith(UNET) else name: tensor for name, tensor in tensors.items()}
    save_file(renamed, tmp_path / "ema.safetensors")
    return plain, tmp_path / "ema.safetensors"


def test_averages_alone_are_weights_to_every_command(averages: tuple[Path, Path], tmp_path: Path):
    plain, ema = averages
    tensors = load_file(plain)

    for order in ((ema, plain), (plain, ema)):
        assert same(merged(tmp_path / "merged.safetensors", *order), tensors)
    for keep in (None, "ema"):
        prune(ema, tmp_path / "pruned.safetensors", keep=keep, overwrite=True)
        assert same(load_file(tmp_path / "pruned.safetensors"), tensors)
    assert same(round_trip(ema, tmp_path / "folder"), tensors)
    assert diff(*open_both(plain, ema)).equal and diff(*open_both(ema, tmp_path / "folder")).equal


@pytest.mark.parametrize("keep", ["last", "both"])
def test_averages_alone_cannot_be_pruned_to_other_weights(averages: tuple[Path, Path], tmp_path: Path, keep: str):
    with pytest.raises(RequestError, match="no weights but the EMA weights"):
        prune(averages[1], tmp_path / "out.safetensors", keep=keep)


# ---- models with a component that cannot be used


@pytest.fixture
def incomplete(narrow: Narrows, tmp_path: Path) -> Path:
    """A model without one tensor of its U-Net, and with the averages of all its tensors."""

    def change(tensors: Tensors) -> None:
        tensors |= {average(name): tensor.clone() for name, tensor in tensors.items() if name.startswith(UNET)}
        del tensors[UNET + "input_blocks.1.0.in_layers.2.weight"]

    return altered(narrow("sd1").file, tmp_path / "incomplete.safetensors", change)


def test_no_command_writes_a_model_whose_unet_is_incomplete(incomplete: Path, narrow: Narrows, tmp_path: Path):
    base, out = narrow("sd1").file, tmp_path / "out.safetensors"
    attention = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
    factors = {f"{attention}.lora_down.weight": torch.ones(1, 64), f"{attention}.lora_up.weight": torch.ones(64, 1)}
    save_file(factors, tmp_path / "lora.safetensors")
    commands: list[Callable[[], object]] = [
        lambda: merged(out, incomplete, base),
        lambda: merged(out, base, incomplete),
        lambda: prune(incomplete, out),
        lambda: prune(incomplete, out, keep="ema"),
        lambda: convert(incomplete, tmp_path / "folder"),
        lambda: bake(incomplete, [(tmp_path / "lora.safetensors", 1.0)], out),
    ]

    for command in commands:
        with pytest.raises(ModelError, match=r"1 of \d+ tensors is missing: input_blocks.1.0.in_layers.2.weight"):
            command()
    assert not out.exists() and not (tmp_path / "folder").exists()


def test_a_component_that_the_first_model_lacks_is_copied_on_request(narrow: Narrows, tmp_path: Path):
    base = narrow("sd1").file

    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith(VAE)]:
            del tensors[name]

    without = altered(base, tmp_path / "without.safetensors", change)

    assert same(merged(tmp_path / "a.safetensors", without, base), load_file(without))
    assert same(merged(tmp_path / "b.safetensors", without, base, vae="b"), load_file(base))
    done = merge(Recipe(models=(Source(str(without)), Source(str(base)))), tmp_path / "c.safetensors")
    assert done.notes == ("without.safetensors: it has no vae, so the merged model has none",)


# ---- VAEs with names of two projects

HYBRIDS = {
    "to_q": ({"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}, True),
    "to_q convolutions": ({"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}, False),
    "to_to_q": ({"q": "to_to_q", "k": "to_to_k", "v": "to_to_v", "proj_out": "to_out.0"}, True),
    "query": ({"q": "query", "k": "key", "v": "value", "proj_out": "proj_attn", "norm": "group_norm"}, True),
    "linear": ({}, True),
}


@pytest.mark.parametrize("case", usual(HYBRIDS, ("to_q", "query")))
def test_a_vae_with_names_of_two_projects_is_converted(narrow: Narrows, tmp_path: Path, case: str):
    names, linear = HYBRIDS[case]
    base = narrow("sd1").file
    tensors = load_file(base)
    hybrid: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(first_stage_model\.\w+\.mid\.attn_1\.)(\w+)(\.\w+)", name)
        if match is not None:
            name = match[1] + names.get(match[2], match[2]) + match[3]
            tensor = tensor[..., 0, 0] if linear and tensor.ndim == 4 else tensor
        hybrid[name] = tensor.contiguous()
    path = tmp_path / "hybrid.safetensors"
    save_file(hybrid, path)

    assert same(round_trip(path, tmp_path / "folder"), tensors)
    assert same(merged(tmp_path / "a.safetensors", base, path, vae="b"), tensors)
    assert diff(*open_both(path, base)).equal and diff(*open_both(path, tmp_path / "folder")).equal


# ---- scaled fp8

Scale = Callable[[Tensor], Tensor]
SCALES: dict[str, Scale] = {
    "per tensor": lambda weight: weight.abs().max(),
    "per channel": lambda weight: weight.abs().amax(1, keepdim=True),
}


def scaled(tensors: Tensors, name_of: Callable[[str], str], scale_of: Scale) -> tuple[Tensors, Tensors]:
    """(`tensors` with the matrices of the U-Net as scaled fp8, the same with the numbers that these stand for)."""
    stored, expected = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.startswith(UNET) or tensor.ndim != 2:
            continue
        scale = scale_of(tensor.float()).clamp(min=1e-9) / 448
        codes = (tensor.float() / scale).to(torch.float8_e4m3fn)
        stored |= {name: codes, name_of(name): scale}
        expected[name] = codes.float() * scale
    return stored, expected


NAMES: dict[str, Callable[[str], str]] = {
    "scale_weight": lambda name: name.removesuffix("weight") + "scale_weight",
    "weight_scale": lambda name: name + "_scale",
}


SCALED = usual(itertools.product(NAMES, SCALES), [("scale_weight", "per tensor"), ("weight_scale", "per channel")])


@pytest.mark.parametrize(("name", "scale"), SCALED)
def test_scaled_fp8_is_multiplied_by_its_scales_in_every_command(
    narrow: Narrows, tmp_path: Path, name: str, scale: str
):
    base, path = narrow("sd1").file, tmp_path / "fp8.safetensors"
    tensors = load_file(base)
    stored, expected = scaled(tensors, NAMES[name], SCALES[scale])
    stored[UNET + "scaled_fp8"] = torch.zeros(2).to(torch.float8_e4m3fn)
    stored[UNET + "out.2.scale_input"] = torch.ones(())
    save_file(stored, path)

    pruned = prune(path, tmp_path / "pruned.safetensors")
    assert same(load_file(tmp_path / "pruned.safetensors"), expected)
    assert same(round_trip(path, tmp_path / "folder"), expected)
    for order in ((path, base), (base, path)):
        result = merged(tmp_path / "merged.safetensors", *order)
        assert result.keys() == tensors.keys()
        for key, tensor in result.items():
            mean = tensors[key] if key.startswith(VAE) else (expected[key].double() + tensors[key].double()) / 2
            torch.testing.assert_close(tensor.double(), mean.double(), atol=1e-6, rtol=0)
    count = sum(key not in tensors for key in stored) - 2
    assert len(pruned.notes) == 1 and f"scaled fp8: {count} weights" in pruned.notes[0]


def test_a_scaled_model_paints_like_the_model_with_the_products(narrow: Narrows, tmp_path: Path, settings: object):
    import gouache

    stored, expected = scaled(load_file(narrow("sd1").file), NAMES["scale_weight"], SCALES["per channel"])
    stored[UNET + "time_embed.0.comfy_quant"] = torch.tensor(list(b'{"format": "float8_e4m3fn"}'), dtype=torch.uint8)
    save_file(stored, tmp_path / "fp8.safetensors")
    save_file(expected, tmp_path / "plain.safetensors")

    one, other = (
        gouache.load(tmp_path / f"{name}.safetensors", settings=settings).core.unet.state_dict()  # type: ignore[arg-type]
        for name in ("fp8", "plain")
    )

    assert same(dict(one), dict(other))


def test_blocks_of_a_scale_are_a_power_of_two_long(tmp_path: Path):
    """320 rows in three blocks of 128, the last one shorter, as in files with blocks of 128."""
    codes, scales = torch.ones(320, 256).to(torch.float8_e4m3fn), torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    save_file({"a.weight": codes, "a.weight_scale_inv": scales}, tmp_path / "a.safetensors")

    product = open_model(tmp_path / "a.safetensors").read("a.weight")

    expected = torch.tensor([[scales[row // 128, column // 128] for column in range(256)] for row in range(320)])
    assert torch.equal(product, expected)


def without_marker(tensors: Tensors) -> Tensors:
    stored, _ = scaled(tensors, lambda name: name.removesuffix("weight") + "unknown_scale", SCALES["per tensor"])
    return stored


def integers(tensors: Tensors) -> Tensors:
    name = UNET + "time_embed.0.weight"
    return {**tensors, name: torch.ones_like(tensors[name]).to(torch.int8), name + "_scale": torch.ones(())}


@pytest.mark.parametrize(
    ("quantise", "message"), [(without_marker, "no known scales"), (integers, "stored as I8, a quantisation")]
)
def test_weights_of_unknown_quantisation_are_refused(
    narrow: Narrows, tmp_path: Path, quantise: Callable[[Tensors], Tensors], message: str
):
    base, path, out = narrow("sd1").file, tmp_path / "codes.safetensors", tmp_path / "out.safetensors"
    save_file(quantise(load_file(base)), path)
    commands: list[Callable[[], object]] = [
        lambda: prune(path, out),
        lambda: convert(path, tmp_path / "folder"),
        lambda: convert(path, out, only="unet"),
        lambda: merged(out, path, base),
        lambda: merged(out, base, path),
    ]

    for command in commands:
        with pytest.raises(ModelError, match=message):
            command()
    assert message in identify(open_model(path)).missing["unet"]
    assert not out.exists() and not (tmp_path / "folder").exists()


# ---- Forge's checkpoints

FORGE_CLIP_G = {
    "Transformers": ("text_encoders.clip_g.transformer.", "text_encoder_2"),
    "OpenCLIP": ("text_encoders.clip_g.", ""),
    "OpenCLIP in a model": ("text_encoders.clip_g.model.", ""),
}


@pytest.mark.parametrize("case", FORGE_CLIP_G)
def test_forges_names_of_sdxl_are_read(narrow: Narrows, tmp_path: Path, case: str):
    base = narrow("sdxl")
    tensors = load_file(base.file)
    prefix, folder = FORGE_CLIP_G[case]
    first, second = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."
    forge = {re.sub("^" + re.escape(first), "text_encoders.clip_l.transformer.", name): tensor
             for name, tensor in tensors.items() if not name.startswith((second, VAE))}  # fmt: skip
    second_names = load_file(base.folder / folder / "model.safetensors") if folder else {
        name.removeprefix(second): tensor for name, tensor in tensors.items() if name.startswith(second)}  # fmt: skip
    forge |= {prefix + name: tensor for name, tensor in second_names.items()}
    forge |= {"text_encoders.clip_l.logit_scale": torch.ones(()), "text_encoders.clip_g.logit_scale": torch.ones(())}
    vae = load_file(base.folder / "vae" / "diffusion_pytorch_model.safetensors")
    save_file({**forge, **{f"vae.{name}": tensor for name, tensor in vae.items()}}, tmp_path / "forge.safetensors")

    found = identify(open_model(tmp_path / "forge.safetensors"))
    convert(tmp_path / "forge.safetensors", tmp_path / "folder")

    assert not found.missing
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        name = "model" if part.startswith("text") else "diffusion_pytorch_model"
        one, other = (
            {
                key.removeprefix("text_model."): tensor
                for key, tensor in load_file(path / part / f"{name}.safetensors").items()
            }
            for path in (tmp_path / "folder", base.folder)
        )
        assert same(one, other)
