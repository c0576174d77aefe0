"""Whole weights as targets: what is trained and kept, the base while frozen, starts, stops, growing channels."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gouache
from gouache import Model
from gouache.errors import ModelError, RequestError
from gouache.training.target import Target
from gouache.training.targets.weights import WeightsOptions, WeightsTarget
from gouache.training.targets.widen import widen
from tests.pipelines import Narrow, altered
from tests.training.targets.steps import FAMILIES, conditioning, output, train, weights

UNET = "model.diffusion_model."


def load(narrow: Callable[[str], Narrow], family: str, **options: Any) -> Model:
    """A model of its own, because its weights are changed; they are in memory and require gradients.

    For weights that require gradients, and for those that are mapped from a file and hence aligned in another way,
    torch and MKL choose other matrix products, which round differently.
    """
    model = gouache.load(narrow(family).file, device="cpu", **{"dtype": "fp32", **options})
    for parameter in model.unet.parameters():
        parameter.data = parameter.data.clone()
        parameter.requires_grad_(True)
    return model


def digest(network: nn.Module) -> str:
    data = hashlib.sha256()
    for name, tensor in network.state_dict().items():
        data.update(name.encode())
        data.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return data.hexdigest()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_unet_is_trained_and_nothing_else_changes(family: str, narrow: Callable[[str], Narrow]):
    model = load(narrow, family)
    others: dict[str, nn.Module] = {"vae": model.vae, **model.text_encoders}
    base, before = output(model), {name: digest(network) for name, network in others.items()}

    target: Target = WeightsTarget(model, WeightsOptions(keep_base=True))
    assert torch.equal(output(model), base)
    start = weights(target)
    losses = train(model, target, rate=1e-3)

    assert losses[-1] < losses[0] and not target.trains_text
    assert {name: digest(network) for name, network in others.items()} == before
    assert {name for group in target.groups() for name in group.parameters} == start.keys()
    assert all(not torch.equal(tensor, start[name]) for name, tensor in weights(target).items())
    trained = output(model)
    with target.frozen():
        assert torch.equal(output(model), base)
    assert torch.equal(output(model), trained) and not torch.allclose(trained, base, atol=1e-3)


def test_training_does_not_change_a_file_that_is_mapped(narrow: Callable[[str], Narrow]):
    path = narrow("sd1").file
    before = hashlib.sha256(path.read_bytes()).hexdigest()
    model = gouache.load(path, device="cpu", dtype="fp32")
    target = WeightsTarget(model, WeightsOptions(keep_base=True))
    base = output(model)
    train(model, target, steps=1, rate=1e-3)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == before
    with target.frozen():
        torch.testing.assert_close(output(model), base, atol=1e-5, rtol=1e-5)


def test_text_encoders_have_their_rate_and_stop_after_their_batches(narrow: Callable[[str], Narrow]):
    model = load(narrow, "sdxl")
    parts = ("unet", "text_encoder", "text_encoder_2")
    options = WeightsOptions(parts, rates={"text_encoder": 0.1}, stop_after={"text_encoder_2": 2})
    target = WeightsTarget(model, options)
    rates = {name.partition(".")[0]: group.rate for group in target.groups() for name in group.parameters}
    start = weights(target)

    train(model, target, steps=2, rate=1e-3)
    stopped = weights(target)
    changed = {name.partition(".")[0] for name, tensor in stopped.items() if not torch.equal(tensor, start[name])}
    target.begin_batch(2)
    left = {n.partition(".")[0] for g in target.groups() for n in g.parameters}
    target.begin_batch(1)

    assert rates == {"unet": 1.0, "text_encoder": 0.1, "text_encoder_2": 1.0}
    assert target.trains_text and changed == set(parts)
    assert left == {"unet", "text_encoder"}
    assert all(parameter.requires_grad for parameter in model.text_encoders["text_encoder_2"].parameters())
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())


def test_matrices_have_weight_decay_and_vectors_do_not(narrow: Callable[[str], Narrow]):
    target = WeightsTarget(load(narrow, "sd1"), WeightsOptions())
    for group in target.groups():
        assert {parameter.ndim > 1 for parameter in group.parameters.values()} == {group.decay}


def test_the_frozen_model_needs_the_weights_before_training(narrow: Callable[[str], Narrow]):
    target = WeightsTarget(load(narrow, "sd1"), WeightsOptions())
    with pytest.raises(RequestError, match="keep_base: is off"), target.frozen():
        pass


@pytest.mark.parametrize(("family", "dtype"), [("sd1", "fp32"), ("sd1", "bf16"), ("sdxl", "fp32")])
def test_new_input_channels_change_nothing_at_step_0(family: str, dtype: str, narrow: Callable[[str], Narrow]):
    model = load(narrow, family, dtype=dtype)
    base = output(model)

    target = WeightsTarget(model, WeightsOptions(in_channels=9, keep_base=True))

    assert model.variant == "inpainting" and model.unet.spec.in_channels == 9
    assert len(target.notes) == 2 and "9 input channels" in target.notes[1]
    assert conditioning(model).concat is not None  # random, and without effect
    assert torch.equal(output(model), base)
    before = model.unet.input_blocks[0].get_parameter("0.weight").detach().clone()
    assert before.shape[1] == 9 and before[:, 4:].abs().sum() == 0
    train(model, target, steps=2, rate=1e-3)
    after = model.unet.input_blocks[0].get_parameter("0.weight")
    assert (after[:, 4:] != 0).float().mean() > 0.9  # they are trained
    with target.frozen():
        assert torch.equal(output(model), base)


def test_channels_that_a_family_does_not_have_are_refused(narrow: Callable[[str], Narrow]):
    with pytest.raises(ModelError, match="with 4 input channels cannot be given 7"):
        widen(load(narrow, "sd1"), 7)
    with pytest.raises(ModelError, match="with 9 input channels cannot be given 8; start from the base model"):
        widen(load(narrow, "sd1-inpainting"), 8)
    with pytest.raises(RequestError, match="needs the U-Net"):
        WeightsOptions(("text_encoder",), in_channels=9)


def average_of(name: str) -> str:
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def with_averages(tensors: dict[str, Tensor]) -> None:
    for name in [name for name in tensors if name.startswith(UNET)]:
        tensors[average_of(name)] = tensors[name] * 0.5
    tensors["model_ema.decay"] = torch.tensor(0.9999)
    tensors["model_ema.num_updates"] = torch.tensor(7, dtype=torch.int32)


def test_the_start_is_the_last_weights_or_on_request_the_averages(narrow: Callable[[str], Narrow], tmp_path: Path):
    file = altered(narrow("sd1").file, tmp_path / "both.safetensors", with_averages)
    plain = load(narrow, "sd1").unet.state_dict()

    last = WeightsTarget(gouache.load(file, device="cpu", dtype="fp32"), WeightsOptions())
    ema = WeightsTarget(gouache.load(file, device="cpu", dtype="fp32"), WeightsOptions(start="ema"))

    assert "has last and averaged weights (EMA): training starts from the last" in last.notes[0]
    assert "starts from the averaged weights (EMA) of both.safetensors" in ema.notes[0]
    for name, tensor in plain.items():
        assert torch.equal(last.model.unet.state_dict()[name], tensor)
        assert torch.equal(ema.model.unet.state_dict()[name], tensor * 0.5)
    assert last.config() != ema.config()
    with pytest.raises(ModelError, match="has no complete averaged weights"):
        WeightsTarget(load(narrow, "sd1"), WeightsOptions(start="ema"))


def test_the_start_from_averages_can_grow_channels(narrow: Callable[[str], Narrow], tmp_path: Path):
    file = altered(narrow("sd1").file, tmp_path / "both.safetensors", with_averages)
    model = gouache.load(file, device="cpu", dtype="fp32")
    before = model.unet.input_blocks[0].get_parameter("0.weight").detach().clone()
    WeightsTarget(model, WeightsOptions(start="ema", in_channels=9))
    after = model.unet.input_blocks[0].get_parameter("0.weight")
    assert torch.equal(after[:, :4], before * 0.5) and after[:, 4:].abs().sum() == 0


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"parts": ("clip",)}, "'clip' is not a part; the model has unet, text_encoder"),
        ({"parts": ()}, "names no component"),
        ({"start": "best"}, "'best' is not known; use last or ema"),
        ({"rates": {"text_encoder": 1.0}}, "'text_encoder' is not trained; trained: unet"),
        ({"rates": {"unet": -1.0}}, "is -1 for unet"),
        ({"stop_after": {"unet": 5}}, "stops all trained parts"),
    ],
)
def test_options_that_do_not_fit_are_refused(values: dict[str, Any], message: str, models: Callable[[str], Model]):
    with pytest.raises(RequestError, match=message):
        WeightsTarget(models("sd1"), WeightsOptions(**values))
