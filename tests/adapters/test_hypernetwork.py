"""Hypernetworks compared with A1111's construction: torch layers in a Sequential, according to the file's flags."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gouache
from gouache import Model
from gouache.adapters.hypernetwork import ACTIVATIONS, read_hypernetwork
from gouache.errors import ModelError
from gouache.files.open import open_model
from tests.pipelines import Narrow

# A1111's dictionary: six explicit entries, then every torch activation class by name.
THEIRS: dict[str, Any] = {
    name.lower(): getattr(nn, name)
    for name in nn.modules.activation.__all__
    if name not in ("MultiheadAttention", "Threshold", "Softmax", "Softmin", "LogSoftmax", "Softmax2d", "GLU")
} | {"swish": nn.Hardswish, "relu": nn.ReLU, "leakyrelu": nn.LeakyReLU, "elu": nn.ELU, "tanh": nn.Tanh}


def sequential(dim: int, structure: list[float], flags: dict[str, Any], seed: int) -> nn.Sequential:
    """A1111's network for keys or values: linear, activation, layer norm, dropout, by the flags in the file."""
    torch.manual_seed(seed)
    activation, activate_output = flags.get("activation_func"), flags.get("activate_output", True)
    dropouts = [0.0] * len(structure)
    if flags.get("use_dropout"):
        dropouts = [0.0, *[0.3] * (len(structure) - 3), 0.3 if flags.get("last_layer_dropout") else 0.0, 0.0]
    layers: list[nn.Module] = []
    for i in range(len(structure) - 1):
        layers.append(nn.Linear(int(dim * structure[i]), int(dim * structure[i + 1])))
        if activation not in (None, "linear") and not (i >= len(structure) - 2 and not activate_output):
            layers.append(THEIRS[activation]())
        if flags.get("is_layer_norm"):
            layers.append(nn.LayerNorm(int(dim * structure[i + 1])))
        if dropouts[i + 1] > 0:
            layers.append(nn.Dropout(p=dropouts[i + 1]))
    built = nn.Sequential(*layers).eval()
    for parameter in built.parameters():
        nn.init.normal_(parameter, std=0.3)
    return built


def save(
    path: Path, dims: list[int], structure: list[float], flags: dict[str, Any], old: bool = False
) -> dict[int, Any]:
    pairs = {dim: (sequential(dim, structure, flags, dim), sequential(dim, structure, flags, dim + 1)) for dim in dims}
    record: dict[Any, Any] = {}
    for dim, pair in pairs.items():
        if old:
            states = [{name_of(key): value for key, value in net.state_dict().items()} for net in pair]
        else:
            states = [{f"linear.{key}": value for key, value in net.state_dict().items()} for net in pair]
        record[dim] = (states[0], states[1])
    if not old:
        record |= {"step": 100, "name": "some", "layer_structure": structure, **flags, "sd_checkpoint": "abc"}
    torch.save(record, path)
    return pairs


def name_of(key: str) -> str:
    number, leaf = key.split(".")
    return f"linear{int(number) + 1}.{leaf}"


FLAGS: dict[str, tuple[list[float], dict[str, Any]]] = {
    "plain": ([1, 2, 1], {}),
    "relu, old files without activate_output": ([1, 2, 1], {"activation_func": "relu"}),
    "output not activated": ([1, 2, 1], {"activation_func": "swish", "activate_output": False}),
    "layer norm": ([1, 2, 1], {"activation_func": "tanh", "is_layer_norm": True}),
    "dropout": ([1, 2, 2, 1], {"activation_func": "elu", "use_dropout": True, "activate_output": True}),
    "dropout of the last layer": (
        [1, 1.5, 2, 1],
        {"activation_func": "mish", "is_layer_norm": True, "use_dropout": True, "last_layer_dropout": True},
    ),
    "deep": ([1, 2, 4, 2, 1], {"activation_func": "leakyrelu", "activate_output": False}),
}


@pytest.mark.parametrize("case", FLAGS)
def test_every_flag_has_the_effect_it_has_in_a1111(case: str, tmp_path: Path):
    structure, flags = FLAGS[case]
    pairs = save(tmp_path / "some.pt", [32, 64], structure, flags)

    read = read_hypernetwork(open_model(tmp_path / "some.pt"))

    assert set(read.pairs) == {32, 64}
    for dim, pair in pairs.items():
        x = torch.randn(2, 7, dim, generator=torch.Generator().manual_seed(0))
        for ours, theirs in zip(read.pairs[dim], pair):
            torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize("name", sorted(set(THEIRS) & {*ACTIVATIONS, "prelu"}))
def test_every_activation_equals_a1111s(name: str, tmp_path: Path):
    pairs = save(tmp_path / "some.pt", [32], [1, 2, 1], {"activation_func": name})
    x = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(0))

    ours = read_hypernetwork(open_model(tmp_path / "some.pt")).pairs[32][0]

    torch.testing.assert_close(ours(x), pairs[32][0](x))


def test_every_activation_of_torch_is_known():
    assert set(THEIRS) - {"prelu"} <= set(ACTIVATIONS)


def test_novelai_key_names(tmp_path: Path):
    pairs = save(tmp_path / "anime.pt", [32], [1, 2, 1], {}, old=True)
    x = torch.randn(1, 3, 32)

    read = read_hypernetwork(open_model(tmp_path / "anime.pt"))

    torch.testing.assert_close(read.pairs[32][1](x), pairs[32][1](x))


def test_it_changes_only_the_context_of_keys_and_values(narrow: Callable[[str], Narrow], tmp_path: Path):
    model: Model = gouache.load(narrow("sd1").file, device="cpu", dtype="fp32")
    pairs = save(tmp_path / "some.pt", [64, 32], [1, 2, 1], {"activation_func": "relu"})  # 64: context and two levels
    block = model.unet.get_submodule("input_blocks.1.1.transformer_blocks.0.attn2")
    x, context = torch.randn(1, 9, 32), torch.randn(1, 77, 64)
    plain = block(x, context)

    on = model.attach(tmp_path / "some.pt", 0.5)

    changed = [context + 0.5 * side(context) for side in pairs[64]]
    q, k, v = block.to_q(x), nn.functional.linear(changed[0], block.to_k.weight), None
    v = nn.functional.linear(changed[1], block.to_v.weight)
    from gouache.nn.attention import attention

    torch.testing.assert_close(block(x, context), block.to_out(attention(q, k, v, block.heads)))
    assert on.kind == "hypernetwork" and on.matched == sum(
        name.endswith((".to_k", ".to_v")) and layer.in_features in (32, 64)
        for name, layer in model.unet.named_modules() if isinstance(layer, nn.Linear)
    )  # fmt: skip
    on.change(0.0)
    assert torch.equal(block(x, context), plain)
    on.change(1.0)
    second = model.attach(tmp_path / "some.pt", 1.0)
    first_applied = [side(context) + context for side in pairs[64]]
    both = [context + side(context) for context, side in zip(first_applied, pairs[64])]
    expected: Tensor = block.to_out(
        attention(block.to_q(x), *(nn.functional.linear(c, w.weight) for c, w in zip(both, (block.to_k, block.to_v))),
                  block.heads)
    )  # fmt: skip
    torch.testing.assert_close(block(x, context), expected, atol=1e-4, rtol=1e-4)
    second.detach()
    on.detach()
    assert torch.equal(block(x, context), plain)


def test_a_hypernetwork_of_another_family_is_refused(narrow: Callable[[str], Narrow], tmp_path: Path):
    model: Model = gouache.load(narrow("sd1").file, device="cpu", dtype="fp32")
    save(tmp_path / "other.pt", [768, 320], [1, 2, 1], {})

    with pytest.raises(ModelError, match="768"):
        model.attach(tmp_path / "other.pt")


def test_an_unknown_activation_is_named_in_the_error(tmp_path: Path):
    save(tmp_path / "some.pt", [32], [1, 2, 1], {})
    record = torch.load(tmp_path / "some.pt", weights_only=False)
    torch.save({**record, "activation_func": "frobnicate"}, tmp_path / "some.pt")

    with pytest.raises(ModelError, match="frobnicate"):
        read_hypernetwork(open_model(tmp_path / "some.pt"))
