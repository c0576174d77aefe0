"""Checkpoints of PyTorch Lightning, as CompVis' trainer writes them: the moments of each weight by its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import gouache
from gouache.errors import ModelError
from gouache.training import lightning
from gouache.training.optimizers import restore
from gouache.training.targets.weights import WeightsOptions, WeightsTarget
from tests.pipelines import Narrow
from tests.training.targets.steps import loss, weights

UNET = "model.diffusion_model."


def nested(names: list[str], tensors: dict[str, Any]) -> nn.Module:
    """A module tree in which parameters are registered in the order of `names`."""
    root = nn.Module()
    for name in names:
        *path, leaf = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module.add_module(part, nn.Module())
            module = module._modules[part]  # type: ignore[assignment]
        module.register_parameter(leaf, nn.Parameter(tensors[name].clone()))
    return root


def written(narrow: Narrow, path: Path, *, text: bool, family: str, steps: int = 3) -> dict[str, Any]:
    """A checkpoint of a Lightning module whose optimizer has taken `steps` steps; returns its content.

    The original registers a block's parts in the order of the original code, which is that of our network.
    """
    model = gouache.load(narrow.file, device="cpu", dtype="fp32")
    tensors = load_file(narrow.file)
    order = [UNET + name for name, _ in model.unet.named_parameters()]
    order += [name for name in tensors if name not in order and not name.startswith("first_stage_model.")]
    order += [name for name in tensors if name.startswith("first_stage_model.")]
    module = nested(order, tensors)
    named = dict(module.named_parameters())
    state = module.state_dict()
    trained = [name for name in named if name.startswith(UNET)]
    if text:
        trained += [name for name in named if name.startswith(("cond_stage_model.", "conditioner."))]
    optimizer = torch.optim.AdamW([named[name] for name in trained], lr=1e-4)
    generator = torch.Generator().manual_seed(0)
    for _ in range(steps):
        for name in trained:
            named[name].grad = torch.randn(named[name].shape, generator=generator)
        optimizer.step()
    averages = {"model_ema." + n.removeprefix("model.").replace(".", ""): state[n] * 0.5 for n in trained if UNET in n}
    averages |= {"model_ema.decay": torch.tensor(0.9999), "model_ema.num_updates": torch.tensor(steps)}
    content = {
        "epoch": 1,
        "global_step": steps,
        "pytorch-lightning_version": "1.4.2",
        "state_dict": state | averages,
        "callbacks": {"best": {"monitor": "val/loss", "best_k_models": {}}},
        "optimizer_states": [optimizer.state_dict()],
        "lr_schedulers": [{"last_epoch": steps, "_last_lr": [1e-4]}],
    }
    torch.save(content, path)
    return {"moments": {name: optimizer.state[named[name]] for name in trained}, "content": content}


@pytest.mark.parametrize(
    ("family", "text"),
    [
        ("sd1", True),
        *(pytest.param(*each, marks=pytest.mark.full) for each in (("sd1", False), ("sd2", True), ("sdxl", True))),
    ],
)
def test_a_run_goes_on_with_its_weights_moments_step_and_averages(
    family: str, text: bool, narrow: Callable[[str], Narrow], tmp_path: Path
):
    expected = written(narrow(family), tmp_path / "last.ckpt", text=text, family=family)

    state = lightning.read(tmp_path / "last.ckpt")

    options = {"prediction": "v"} if family == "sd2" else {}
    model = gouache.load(tmp_path / "last.ckpt", device="cpu", dtype="fp32", **options)
    parts = ("unet", *model.text_encoders) if text else ("unet",)
    target = WeightsTarget(model, WeightsOptions(parts))
    own = weights(target)
    assert state.step == 3 and state.updates == 3
    assert {path.rpartition(".")[0] for path in state.optimizer.tensors} == own.keys()
    assert state.averages.keys() == {name for name in own if name.startswith("unet.")}
    for name, tensor in own.items():
        if name.startswith("unet."):
            stored = expected["moments"][UNET + name.removeprefix("unet.")]
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(state.optimizer.tensors[f"{name}.{key}"], stored[key]), name
            assert torch.equal(state.averages[name], tensor * 0.5)
        assert float(state.optimizer.tensors[f"{name}.step"]) == 3
        assert state.optimizer.tensors[f"{name}.exp_avg"].shape == tensor.shape

    parameters = {name: p for group in target.groups() for name, p in group.parameters.items()}
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-4)
    restore(optimizer, parameters, state.optimizer)
    loss(model).backward()
    optimizer.step()
    assert 4 in {int(values["step"]) for values in optimizer.state.values()} <= {3, 4}


def test_the_moments_of_fused_weights_are_split_like_the_weights(narrow: Callable[[str], Narrow], tmp_path: Path):
    """OpenCLIP's query, key and value are one tensor in the file, and so are their moments."""
    expected = written(narrow("sd2"), tmp_path / "last.ckpt", text=True, family="sd2")
    fused = next(name for name in expected["moments"] if name.endswith("resblocks.1.attn.in_proj_weight"))

    tensors = lightning.read(tmp_path / "last.ckpt").optimizer.tensors

    layer = "text_encoder.text_model.encoder.layers.1.self_attn"
    parts = [tensors[f"{layer}.{part}_proj.weight.exp_avg"] for part in "qkv"]
    assert torch.equal(torch.cat(parts), expected["moments"][fused]["exp_avg"])


def test_steps_that_are_plain_numbers_as_in_old_files(narrow: Callable[[str], Narrow], tmp_path: Path):
    content = written(narrow("sd1"), tmp_path / "last.ckpt", text=False, family="sd1")["content"]
    for values in content["optimizer_states"][0]["state"].values():
        values["step"] = int(values["step"])
    torch.save(content, tmp_path / "old.ckpt")

    tensors = lightning.read(tmp_path / "old.ckpt").optimizer.tensors

    assert {float(tensor) for name, tensor in tensors.items() if name.endswith(".step")} == {3.0}


def change(content: dict[str, Any], what: str) -> None:
    states = content["optimizer_states"][0]
    if what == "no step":
        del content["global_step"]
    elif what == "no optimizer":
        del content["optimizer_states"]
    elif what == "too many":
        states["state"][9999] = states["state"][0]
    elif what == "another order":
        states["state"][0], states["state"][1] = states["state"][1], states["state"][0]
    elif what == "nothing yet":
        states["state"] = {}


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("no step", "is not a training checkpoint of PyTorch Lightning"),
        ("no optimizer", "is not a training checkpoint of PyTorch Lightning"),
        ("too many", "has moments of 10000 parameters, but its U-Net and text encoders have"),
        ("another order", "its parameters have another order: start from its weights instead"),
        ("nothing yet", "has no moments of the U-Net or a text encoder"),
    ],
)
def test_checkpoints_that_do_not_fit_are_refused(
    what: str, message: str, narrow: Callable[[str], Narrow], tmp_path: Path
):
    content = written(narrow("sd1"), tmp_path / "last.ckpt", text=False, family="sd1", steps=1)["content"]
    change(content, what)
    torch.save(content, tmp_path / "bad.ckpt")

    with pytest.raises(ModelError, match=message):
        lightning.read(tmp_path / "bad.ckpt")


def test_a_file_of_weights_alone_is_refused(narrow: Callable[[str], Narrow]):
    with pytest.raises(ModelError, match="start from its weights instead"):
        lightning.read(narrow("sd1").file)
