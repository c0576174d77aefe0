"""Gradients through a loaded model: LoRA factors, an embedding's vectors, a hypernetwork's layers.

Each gradient is compared with finite differences of the loss in float64, on narrow models of every family.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

import gouache
from gouache import Model
from gouache.adapters.hypernetwork import HypernetworkHooks, Mlp
from gouache.adapters.parameters import ParameterAdapter
from gouache.adapters.strength import Strength
from gouache.diffusion.conditioning import Conditioning
from gouache.diffusion.denoiser import Denoiser
from tests.pipelines import Narrow

FAMILIES = ("sd1", "sd2", "sdxl", "sd1-inpainting")
PROMPTS = ["a red cat", "a (blue:1.3) dog, zorblax"]


@pytest.fixture(scope="module")
def models(narrow: Callable[[str], Narrow]) -> Callable[[str], Model]:
    """Narrow models in float64, for which finite differences are exact enough."""
    loaded: dict[str, Model] = {}

    def load(family: str) -> Model:
        if family not in loaded:
            model = gouache.load(narrow(family).file, device="cpu", dtype="fp32")
            for network in (model.unet, *model.text_encoders.values()):
                network.double()
            loaded[family] = model
        return loaded[family]

    return load


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def conditioning(model: Model) -> Conditioning:
    encoded = model.encode_prompts(PROMPTS, size=(64, 64))
    if model.variant != "inpainting":
        return encoded
    concat = torch.randn(2, 5, 8, 8, generator=generator(5), dtype=torch.float64)
    return Conditioning(encoded.context, encoded.vector, concat)


def loss(model: Model) -> Tensor:
    """A denoising loss of two latents at fixed levels, through the whole model: prompts, text encoders, U-Net."""
    x0 = torch.randn(2, 4, 8, 8, generator=generator(1), dtype=torch.float64)
    noise = torch.randn(2, 4, 8, 8, generator=generator(2), dtype=torch.float64)
    predicted, target = model.denoiser(conditioning(model)).loss_terms(x0, noise, torch.tensor([0.7, 3.0]).double())
    return (predicted - target).pow(2).mean()


def assert_gradients(model: Model, parameters: Mapping[str, Tensor], step: float = 1e-6) -> None:
    """Each parameter's gradient equals the central difference of the loss at its largest entry; most are not zero."""
    for parameter in parameters.values():
        parameter.grad = None
    loss(model).backward()
    reached = 0
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        index = int(parameter.grad.abs().argmax())
        gradient = float(parameter.grad.flatten()[index])
        with torch.no_grad():
            flat = parameter.view(-1)
            before = flat[index].clone()
            flat[index] = before + step
            above = float(loss(model))
            flat[index] = before - step
            below = float(loss(model))
            flat[index] = before
        difference = (above - below) / (2 * step)
        assert gradient == pytest.approx(difference, rel=1e-3, abs=1e-8), name
        reached += abs(gradient) > 1e-6
    assert reached > len(parameters) / 2  # a bias of the keys has none: softmax is invariant to it


def lora(model: Model) -> ParameterAdapter:
    """A LoRA on one linear layer and one convolution of the U-Net, and one layer of each text encoder."""
    modules = {
        ("unet", "middle_block.1.transformer_blocks.0.attn2.to_k"): (1, 1),
        ("unet", "input_blocks.1.0.in_layers.2"): (3, 3),
    } | {(name, "text_model.encoder.layers.0.self_attn.q_proj"): (1, 1) for name in model.text_encoders}
    parts = {}
    for number, (module, kernel) in enumerate(modules.items()):
        network = {"unet": model.unet, **model.text_encoders}[module[0]].get_submodule(module[1])
        rows, columns = network.weight.shape[:2]
        size = kernel if isinstance(network, nn.Conv2d) else ()
        ones = (1, 1) if isinstance(network, nn.Conv2d) else ()
        random = generator(10 + number)
        parts[module] = {
            "lora_up.weight": (
                0.1 * torch.randn(rows, 2, *ones, generator=random, dtype=torch.float64)
            ).requires_grad_(),
            "lora_down.weight": (
                0.1 * torch.randn(2, columns, *size, generator=random, dtype=torch.float64)
            ).requires_grad_(),
            "alpha": torch.tensor(1.0),
        }
    return ParameterAdapter("trained", parts)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_lora_factors(family: str, models: Callable[[str], Model]):
    model = models(family)
    adapter = lora(model)
    attached = model.adapters.attach(adapter, Strength(0.8), how="live")

    try:
        assert_gradients(model, dict(adapter.named_parameters()))
        assert all(parameter.grad is None for parameter in model.unet.parameters())
    finally:
        model.adapters.detach(attached)


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_vectors_of_an_embedding(family: str, models: Callable[[str], Model]):
    model = models(family)
    vectors = {
        name: (0.1 * torch.randn(2, width, generator=generator(3), dtype=torch.float64)).requires_grad_()
        for name, width in model.text_widths.items()
    }
    remove = model.embeddings.add("zorblax", vectors)

    try:
        assert_gradients(model, vectors)
        table = next(iter(model.text_encoders.values())).text_model.embeddings.token_embedding.weight
        assert table.grad is None
    finally:
        remove()


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_reach_the_layers_of_a_hypernetwork(family: str, models: Callable[[str], Model], tmp_path: Path):
    model = models(family)
    width = model.unet.spec.context_dim

    def mlp(seed: int) -> Mlp:
        random = generator(seed)
        weights = [(0.1 * torch.randn(width, width, generator=random, dtype=torch.float64)) for _ in range(2)]
        biases = [torch.zeros(width, dtype=torch.float64) for _ in range(2)]
        first, second = (
            ("linear", weight.requires_grad_(), bias.requires_grad_()) for weight, bias in zip(weights, biases)
        )
        return Mlp((first, "relu", second))

    pair = mlp(1), mlp(2)
    hooks = HypernetworkHooks(model.unet, {width: pair}, 0.7)
    hooks.attach()

    try:
        parameters = {
            f"{side}.{number}.{leaf}": step[leaf]
            for side, each in enumerate(pair)
            for number, step in enumerate(each.steps)
            if not isinstance(step, str)
            for leaf in (1, 2)
        }
        assert_gradients(model, parameters)  # type: ignore[arg-type]
    finally:
        hooks.remove()


def test_a_parameter_adapter_gives_the_output_of_the_same_weights_folded(models: Callable[[str], Model]):
    model = models("sd1")
    adapter = lora(model)
    module = ("unet", "middle_block.1.transformer_blocks.0.attn2.to_k")
    layer = model.unet.get_submodule(module[1])
    x = torch.randn(2, 7, layer.in_features, generator=generator(4), dtype=torch.float64)
    patch = adapter.patch(module)
    merged = layer.weight + 0.8 * 0.5 * (patch.parts["lora_up.weight"] @ patch.parts["lora_down.weight"]).double()
    expected = nn.functional.linear(x, merged, layer.bias)

    attached = model.adapters.attach(adapter, Strength(0.8), how="live")
    try:
        torch.testing.assert_close(layer(x), expected, atol=1e-6, rtol=1e-6)
    finally:
        model.adapters.detach(attached)


def test_no_graph_is_built_if_no_parameter_requires_gradients(models: Callable[[str], Model]):
    assert not loss(models("sd1")).requires_grad
    assert isinstance(models("sd1").denoiser(conditioning(models("sd1"))), Denoiser)
