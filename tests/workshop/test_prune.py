"""`prune` and `vae bake`: which tensors are kept under which names, and the report of those that were dropped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gouache.errors import ModelError, RequestError
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.workshop.convert import convert
from gouache.workshop.prune import prune
from gouache.workshop.vae import bake
from tests.pipelines import Narrow, altered

Narrows = Callable[[str], Narrow]
UNET = "model.diffusion_model."


def average_of(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def full(tensors: dict[str, Tensor]) -> None:
    """Add what a file has after training: EMA weights, buffers, a loss, and an unknown tensor."""
    for name in [name for name in tensors if name.startswith(UNET)]:
        tensors[average_of(name)] = tensors[name] + 1
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(470000, dtype=torch.int32)
    tensors["betas"] = torch.linspace(0, 1, 1000, dtype=torch.float64)
    tensors["first_stage_model.loss.discriminator.main.0.weight"] = torch.zeros(8, 8)
    tensors["lora_tools.cache"] = torch.zeros(16)


@pytest.fixture(scope="module")
def trained(narrow: Narrows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return altered(narrow("sd1").file, tmp_path_factory.mktemp("trained") / "full.safetensors", full)


def test_ema_weights_replace_the_weights(trained: Path, tmp_path: Path):
    source = load_file(trained)

    done = prune(trained, tmp_path / "m.safetensors")

    pruned = load_file(tmp_path / "m.safetensors")
    for name, tensor in pruned.items():
        assert torch.equal(tensor, source[average_of(name) if name.startswith(UNET) else name]), name
    assert {"betas", "model_ema.decay", "model_ema.num_updates"} <= pruned.keys()  # as in the released files
    assert done.saved == sum(t.nbytes for t in source.values()) - sum(t.nbytes for t in pruned.values())
    assert identify(open_model(tmp_path / "m.safetensors")).ema.value == "counters"  # type: ignore[union-attr]
    assert len(done.dropped) == 3


def test_keep_last_drops_the_ema_weights(trained: Path, tmp_path: Path):
    source = load_file(trained)

    prune(trained, tmp_path / "m.safetensors", keep="last")

    pruned = load_file(tmp_path / "m.safetensors")
    assert all(torch.equal(tensor, source[name]) for name, tensor in pruned.items())
    gone = source.keys() - pruned.keys()
    assert gone == {name for name in source if "model_ema.diffusion" in name or "loss" in name or "lora" in name}


def test_keep_both_keeps_weights_and_ema_weights(trained: Path, tmp_path: Path):
    prune(trained, tmp_path / "m.safetensors", keep="both")

    pruned, source = load_file(tmp_path / "m.safetensors"), load_file(trained)
    assert source.keys() - pruned.keys() == {name for name in source if "loss" in name or "lora" in name}


def test_components_can_be_dropped_and_weights_cast(trained: Path, tmp_path: Path):
    done = prune(trained, tmp_path / "m.safetensors", dtype="fp16", drop=("vae", "text"))

    pruned = load_file(tmp_path / "m.safetensors")
    assert not [name for name in pruned if name.startswith(("first_stage_model", "cond_stage_model"))]
    assert all(tensor.dtype == torch.float16 for name, tensor in pruned.items() if name.startswith(UNET))
    assert pruned["betas"].dtype == torch.float64  # casting it, as other tools do, damages the noise schedule
    assert any("vae" in reason for reason in done.dropped)
    before = sum(tensor.nbytes for tensor in load_file(trained).values())
    assert done.saved == before - sum(tensor.nbytes for tensor in pruned.values())


def test_a_training_checkpoint_loses_its_optimizer(narrow: Narrows, tmp_path: Path):
    weights = load_file(narrow("sd1").file)
    moments = {n: {"exp_avg": torch.zeros(1000), "step": torch.tensor(5.0)} for n in range(3)}
    content = {"state_dict": weights, "global_step": 5, "optimizer_states": [{"state": moments, "param_groups": []}]}
    torch.save(content, tmp_path / "last.ckpt")

    done = prune(tmp_path / "last.ckpt", tmp_path / "m.ckpt")

    written = torch.load(tmp_path / "m.ckpt", weights_only=True)
    assert written.keys() == {"state_dict", "global_step"} and written["state_dict"].keys() == weights.keys()
    assert done.dropped["training state: optimizers, schedules"] == (6, 3 * 4004)


def test_invalid_requests_are_refused(narrow: Narrows, tmp_path: Path):
    file = narrow("sd1").file
    torch.save({"a": torch.zeros(2)}, tmp_path / "a.pt")

    with pytest.raises(RequestError, match=r"has no EMA weights .*; use last instead of ema"):
        prune(file, tmp_path / "m.safetensors", keep="ema")
    with pytest.raises(RequestError, match="'all' is not known; use ema, last or both"):
        prune(file, tmp_path / "m.safetensors", keep="all")
    with pytest.raises(RequestError, match="'unet' is not known"):
        prune(file, tmp_path / "m.safetensors", drop=("unet",))
    with pytest.raises(ModelError, match="cannot be pruned because it has no complete U-Net"):
        prune(tmp_path / "a.pt", tmp_path / "m.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


@pytest.mark.parametrize("line", ["sd1", "sd2", "sdxl"])
def test_a_vae_is_baked_into_a_model(narrow: Narrows, line: str, tmp_path: Path):
    def keep_changed_vae(tensors: dict[str, Tensor]) -> None:
        for name in [name for name in tensors if not name.startswith("first_stage_model.")]:
            del tensors[name]
        for name in list(tensors):
            tensors[name.removeprefix("first_stage_model.")] = tensors.pop(name) + 1

    vae = altered(narrow(line).file, tmp_path / "vae.safetensors", keep_changed_vae)

    bake(narrow(line).file, vae, tmp_path / "file.safetensors")
    bake(narrow(line).folder, vae, tmp_path / "folder.safetensors")

    before = load_file(narrow(line).file)
    for source in ("file", "folder"):
        after = load_file(tmp_path / f"{source}.safetensors")
        assert after.keys() == before.keys()
        for name, tensor in after.items():
            in_vae = name.startswith("first_stage_model.")
            assert torch.equal(tensor, before[name] + 1 if in_vae else before[name]), name


def test_a_folder_is_pruned_to_a_single_file(narrow: Narrows, tmp_path: Path):
    prune(narrow("sd1").folder, tmp_path / "m.safetensors", drop=("vae",))

    single = {name for name in load_file(narrow("sd1").file) if not name.startswith("first_stage_model.")}
    assert load_file(tmp_path / "m.safetensors").keys() == single


@pytest.mark.parametrize("keep", ["ema", "both"])
def test_a_folder_is_pruned_like_the_file_it_was_made_from(trained: Path, tmp_path: Path, keep: str):
    """The EMA weights, which a diffusers folder has no place for, are in its leftovers."""
    convert(trained, tmp_path / "folder")

    prune(trained, tmp_path / "a.safetensors", keep=keep)  # type: ignore[arg-type]
    prune(tmp_path / "folder", tmp_path / "b.safetensors", keep=keep)  # type: ignore[arg-type]

    one, two = load_file(tmp_path / "a.safetensors"), load_file(tmp_path / "b.safetensors")
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
