"""LoRAs are extracted, changed and baked without loss, and diffusers reads the written files as Gouache does."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from gouache.errors import GouacheError, ModelError, RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.workshop.embedding import combine, vectors_of
from gouache.workshop.lora.bake import bake
from gouache.workshop.lora.change import merge, rename, resize
from gouache.workshop.lora.extract import extract
from gouache.workshop.lora.factors import Size, factors
from gouache.workshop.lora.write import CONVOLUTIONS, UNCHANGED
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
PREFIXES = ("model.diffusion_model.", "cond_stage_model.transformer.", "conditioner.embedders.0.transformer.")


def is_adaptable(name: str, tensor: Tensor) -> bool:
    return tensor.ndim > 1 and any(
        part in name
        for part in ("attn1.", "attn2.", ".ff.", "proj_in", "proj_out", "self_attn", ".mlp.", "in_layers.2")
    )


def tuned(rank: int, seed: int = 0) -> Callable[[dict[str, Tensor]], None]:
    """A function that adds differences of exactly this rank to the weights that LoRAs change."""

    def change(tensors: dict[str, Tensor]) -> None:
        generator = torch.Generator().manual_seed(seed)
        for name, tensor in tensors.items():
            if name.startswith(PREFIXES) and is_adaptable(name, tensor):
                rows, columns = tensor.flatten(1).shape
                delta = torch.randn(rows, rank, generator=generator) @ torch.randn(rank, columns, generator=generator)
                tensors[name] = tensor + 0.02 * delta.view_as(tensor)

    return change


@pytest.fixture(scope="module")
def made(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path, Path]]:
    """(base, base tuned by a difference of rank 4, the LoRA extracted from the two) of a model line."""
    folder = tmp_path_factory.mktemp("lora")
    done: dict[str, tuple[Path, Path, Path]] = {}

    def make(line: str) -> tuple[Path, Path, Path]:
        if line not in done:
            base = narrow(line).file
            new = altered(base, folder / f"{line}-tuned.safetensors", tuned(4))
            extract(new, base, folder / f"{line}-lora.safetensors", Size(4, 4), dtype="fp32")
            done[line] = base, new, folder / f"{line}-lora.safetensors"
        return done[line]

    return make


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_a_low_rank_difference_is_extracted_and_baked_without_loss(
    made: Callable[[str], tuple[Path, Path, Path]], line: str, tmp_path: Path
):
    base, new, lora = made(line)

    counts = bake(base, [(lora, 1.0)], tmp_path / "m.safetensors")

    assert [unmatched for _, unmatched in counts.values()] == [0]
    expected, found = load_file(new), load_file(tmp_path / "m.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], atol=2e-5, rtol=0, msg=name)


@pytest.mark.parametrize(("line", "family"), [("sd1", "sd1"), ("sdxl", "sdxl")])
def test_names_and_metadata_are_those_of_kohyas_files(
    made: Callable[[str], tuple[Path, Path, Path]], line: str, family: str
):
    _, _, lora = made(line)

    with safe_open(lora, "pt") as opened:
        metadata = opened.metadata()
    names = load_file(lora)

    assert metadata["ss_network_module"] == "networks.lora" and metadata["modelspec.architecture"].endswith("/lora")
    blocks = "lora_unet_input_blocks_" if line == "sdxl" else "lora_unet_down_blocks_"
    assert any(name.startswith(blocks) for name in names)
    assert any(name.startswith("lora_te1_" if line == "sdxl" else "lora_te_") for name in names)
    assert identify(open_model(lora)).kind.value in ("lora", "locon")


@pytest.mark.parametrize("naming", ["kohya", "peft"])
def test_diffusers_loads_the_file_and_fuses_it_to_the_same_weights(
    made: Callable[[str], tuple[Path, Path, Path]], narrow: Narrows, naming: str, tmp_path: Path
):
    import copy

    _, new, lora = made("sd1")
    rename(lora, tmp_path / "named.safetensors", naming, "sd1", dtype="fp32")
    pipeline = copy.deepcopy(narrow("sd1").pipeline)

    pipeline.load_lora_weights(tmp_path, weight_name="named.safetensors")
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()

    expected = load_file(new)
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k.weight"
    ours = expected["model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight"]
    torch.testing.assert_close(pipeline.unet.state_dict()[name], ours, atol=2e-5, rtol=0)
    text = {key.removeprefix("text_model."): value for key, value in pipeline.text_encoder.state_dict().items()}
    theirs = text["encoder.layers.0.self_attn.q_proj.weight"]
    ours = expected["cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight"]
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=0)


def test_renaming_to_peft_and_back_restores_the_file(made: Callable[[str], tuple[Path, Path, Path]], tmp_path: Path):
    _, _, lora = made("sd1")

    rename(lora, tmp_path / "peft.safetensors", "peft", "sd1", dtype="fp32")
    rename(tmp_path / "peft.safetensors", tmp_path / "kohya.safetensors", "kohya", "sd1", dtype="fp32")

    before, after = load_file(lora), load_file(tmp_path / "kohya.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)


def test_the_factors_are_the_best_approximation_of_their_rank():
    """Eckart and Young: no other matrix of that rank is closer."""
    delta = torch.randn(300, 200, generator=torch.Generator().manual_seed(0))
    delta = delta @ torch.diag(0.9 ** torch.arange(200.0))

    up, down, held, total = factors(delta, 8, Size(8))

    _, s, _ = torch.linalg.svd(delta)
    least_error = float(s[8:].pow(2).sum())
    error = float((delta - up @ down).pow(2).sum())
    assert error == pytest.approx(least_error, rel=0.01)
    assert held + error == pytest.approx(total, rel=1e-3)


def test_ranks_follow_energy_and_ratio():
    values = torch.tensor([4.0, 2.0, 1.0, 0.5])
    total = float(values.pow(2).sum())

    assert Size(4, energy=16 / total).cut(values, total) == 1
    assert Size(4, energy=16.1 / total).cut(values, total) == 2
    assert Size(4, energy=1.0).cut(values, total) == 4
    assert Size(4, ratio=4).cut(values, total) == 3
    assert Size(4).cut(values, total) == 4
    for invalid in ({"rank": 0}, {"rank": 4, "energy": 0.0}, {"rank": 4, "ratio": 0.5}):
        with pytest.raises(RequestError):
            Size(**invalid)  # type: ignore[arg-type]


def test_skipped_convolutions_are_counted_and_lower_the_share(
    made: Callable[[str], tuple[Path, Path, Path]], tmp_path: Path
):
    base, new, lora = made("sd1")

    all_modules = extract(new, base, tmp_path / "all.safetensors", Size(4, 4), dtype="fp32")
    linear = extract(new, base, tmp_path / "linear.safetensors", Size(4, 0), dtype="fp32")
    resized = resize(lora, tmp_path / "resized.safetensors", Size(4, 0), dtype="fp32")

    skipped = all_modules.modules - linear.modules
    assert all_modules.held == pytest.approx(1, abs=1e-5) and all_modules.left_out[CONVOLUTIONS] == 0
    assert linear.left_out[CONVOLUTIONS] == resized.left_out[CONVOLUTIONS] == skipped > 10
    assert linear.left_out[UNCHANGED] == all_modules.left_out[UNCHANGED] > 0

    def squares(kernel: bool) -> float:
        """The squared norm of the difference of the 3x3 convolutions, or of all other weights."""
        tensors, before = load_file(new), load_file(base)
        deltas = [(tensors[name] - before[name]).double() for name in before]
        return sum(float(each.pow(2).sum()) for each in deltas if (each.ndim == 4 and each.shape[-1] > 1) == kernel)

    share = squares(False) / (squares(False) + squares(True))
    assert linear.held == pytest.approx(share, abs=1e-4) and share < 0.95
    assert resized.held == pytest.approx(share, abs=1e-4)


def test_resizing_keeps_the_strongest_directions(made: Callable[[str], tuple[Path, Path, Path]], tmp_path: Path):
    _, _, lora = made("sd1")

    same = resize(lora, tmp_path / "same.safetensors", Size(4, 4), dtype="fp32")
    smaller = resize(lora, tmp_path / "smaller.safetensors", Size(2, 2), dtype="fp32")

    assert same.held == pytest.approx(1, abs=1e-5) and same.ranks == (4, 4)
    assert smaller.held < 0.95 and smaller.ranks == (2, 2)
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    before, after = (load_file(path) for path in (lora, tmp_path / "same.safetensors"))
    product = lambda t: t[f"{stem}.lora_up.weight"].flatten(1) @ t[f"{stem}.lora_down.weight"].flatten(1)  # noqa: E731
    torch.testing.assert_close(product(before), product(after), atol=1e-5, rtol=0)


def test_a_merged_lora_bakes_like_its_sources(
    made: Callable[[str], tuple[Path, Path, Path]], narrow: Narrows, tmp_path: Path
):
    base, _, lora = made("sd1")
    other = altered(base, tmp_path / "other.safetensors", tuned(3, seed=9))
    extract(other, base, tmp_path / "second.safetensors", Size(3, 3), dtype="fp32")
    both = [(lora, 0.5), (tmp_path / "second.safetensors", -1.0)]

    merge(both, tmp_path / "joined.safetensors", dtype="fp32")
    merge(both, tmp_path / "svd.safetensors", Size(7, 7), dtype="fp32")

    for name, loras in (("a", both), ("b", [(tmp_path / "joined.safetensors", 1.0)]),
                        ("c", [(tmp_path / "svd.safetensors", 1.0)])):  # fmt: skip
        bake(base, loras, tmp_path / f"{name}.safetensors")
    a, b, c = (load_file(tmp_path / f"{name}.safetensors") for name in "abc")
    for name in a:
        torch.testing.assert_close(a[name], b[name], atol=2e-5, rtol=0)
        torch.testing.assert_close(a[name], c[name], atol=5e-5, rtol=0)


def test_invalid_requests_are_refused_before_anything_is_written(
    made: Callable[[str], tuple[Path, Path, Path]], narrow: Narrows, tmp_path: Path
):
    base, new, lora = made("sd1")
    save_file({"a": torch.zeros(3)}, tmp_path / "none.safetensors")
    wider = {name: torch.cat([t, t], 1) if "lora_down" in name else t for name, t in load_file(lora).items()}
    save_file(wider, tmp_path / "wider.safetensors")

    cases: list[tuple[Callable[[], object], str]] = [
        (
            lambda: bake(base, [(tmp_path / "none.safetensors", 1.0)], tmp_path / "m.safetensors"),
            "matches no module of",
        ),
        (lambda: bake(base, [(tmp_path / "wider.safetensors", 1.0)], tmp_path / "m.safetensors"), "does not fit"),
        (lambda: extract(base, base, tmp_path / "l.safetensors", Size(4)), "does not differ"),
        (
            lambda: extract(narrow("sdxl").file, base, tmp_path / "l.safetensors", Size(4)),
            "models of different families",
        ),
        (lambda: extract(new, base, tmp_path / "l.ckpt", Size(4)), "does not end in .safetensors"),
        (lambda: extract(new, base, tmp_path / "l.safetensors", Size(4), naming="x"), "use kohya or peft"),
        (lambda: merge([(lora, 1.0)], tmp_path / "l.safetensors"), "at least two"),
        (lambda: resize(tmp_path / "none.safetensors", tmp_path / "l.safetensors", Size(4)), "is not a LoRA"),
    ]
    for attempt, message in cases:
        with pytest.raises(GouacheError, match=message):
            attempt()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["none.safetensors", "wider.safetensors"]


# ---- embeddings


def test_embeddings_of_different_formats_are_combined(tmp_path: Path):
    a, b = torch.randn(2, 64), torch.randn(3, 64)
    torch.save({"string_to_token": {"*": 265}, "string_to_param": {"*": a}, "name": "a", "step": 5}, tmp_path / "a.pt")
    save_file({"emb_params": b}, tmp_path / "b.safetensors")

    joined = combine([(tmp_path / "a.pt", 1.0), (tmp_path / "b.safetensors", 0.5)], tmp_path / "j.safetensors")
    mean = combine([(tmp_path / "a.pt", 1.0), (tmp_path / "b.safetensors", 3.0)], tmp_path / "m.safetensors", "mean")

    assert (joined.vectors, mean.vectors) == (5, 3)
    torch.testing.assert_close(load_file(tmp_path / "j.safetensors")["emb_params"], torch.cat([a, b * 0.5]))
    expected = torch.cat([(a + 3 * b[:2]) / 4, b[2:]])
    torch.testing.assert_close(load_file(tmp_path / "m.safetensors")["emb_params"], expected)
    assert vectors_of(open_model(tmp_path / "j.safetensors"))["text_encoder"].shape == (5, 64)


def test_embeddings_for_two_encoders_are_combined_per_encoder_and_widths_must_agree(tmp_path: Path):
    save_file({"clip_l": torch.ones(2, 64), "clip_g": torch.ones(2, 128)}, tmp_path / "a.safetensors")
    save_file({"clip_l": torch.zeros(1, 64), "clip_g": torch.zeros(1, 128)}, tmp_path / "b.safetensors")
    save_file({"emb_params": torch.ones(1, 64)}, tmp_path / "c.safetensors")
    pair = [(tmp_path / "a.safetensors", 1.0), (tmp_path / "b.safetensors", 1.0)]

    combine(pair, tmp_path / "m.safetensors")

    assert {n: tuple(t.shape) for n, t in load_file(tmp_path / "m.safetensors").items()} == {
        "clip_l": (3, 64), "clip_g": (3, 128)
    }  # fmt: skip
    with pytest.raises(ModelError, match=r"width 64 and .* of width 64 and 128: they are for different"):
        combine([pair[0], (tmp_path / "c.safetensors", 1.0)], tmp_path / "n.safetensors")
    with pytest.raises(RequestError, match="use join or mean"):
        combine(pair, tmp_path / "n.safetensors", "sum")
