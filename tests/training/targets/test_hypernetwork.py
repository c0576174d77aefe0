"""Hypernetworks as targets, compared with A1111's construction: torch's layers in a Sequential, by a file's values."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gouache
from gouache import Model
from gouache.errors import ModelError, RequestError
from gouache.files.open import open_model
from gouache.training import checkpointing
from gouache.training.memory import Simulation
from gouache.training.targets.hypernetwork import HypernetworkOptions, HypernetworkTarget
from gouache.training.targets.hypernetwork_layers import Draws, HypernetworkLayers
from tests.pipelines import Narrow
from tests.training.targets.steps import FAMILIES, generator, loss, output, train, weights

THEIRS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "leakyrelu": nn.LeakyReLU,
    "elu": nn.ELU,
    "swish": nn.Hardswish,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "celu": nn.CELU,
    "gelu": nn.GELU,
    "hardshrink": nn.Hardshrink,
    "hardsigmoid": nn.Hardsigmoid,
    "hardswish": nn.Hardswish,
    "hardtanh": nn.Hardtanh,
    "logsigmoid": nn.LogSigmoid,
    "mish": nn.Mish,
    "prelu": nn.PReLU,
    "relu6": nn.ReLU6,
    "rrelu": nn.RReLU,
    "selu": nn.SELU,
    "silu": nn.SiLU,
    "softplus": nn.Softplus,
    "softshrink": nn.Softshrink,
    "softsign": nn.Softsign,
    "tanhshrink": nn.Tanhshrink,
}
IMPOSSIBLE = ("glu", "threshold", "multiheadattention", "softmax", "softmax2d", "softmin", "logsoftmax")
STRUCTURES = ((1, 2, 1), (1, 1), (1, 0.5, 1.5, 2, 1))


def sequential(width: int, flags: dict[str, Any]) -> nn.Sequential:
    """A1111's network for the values that its files have."""
    structure, dropouts = flags["layer_structure"], flags["dropout_structure"]
    layers: list[nn.Module] = []
    for number in range(1, len(structure)):
        layers.append(nn.Linear(int(width * structure[number - 1]), int(width * structure[number])))
        last = number == len(structure) - 1
        if flags["activation_func"] not in (None, "linear") and (flags["activate_output"] or not last):
            layers.append(THEIRS[flags["activation_func"]]())
        if flags["is_layer_norm"]:
            layers.append(nn.LayerNorm(int(width * structure[number])))
        if dropouts is not None and dropouts[number] > 0:
            layers.append(nn.Dropout(dropouts[number]))
    return nn.Sequential(*layers)


def load_as_a1111(path: Path) -> dict[int, tuple[nn.Sequential, nn.Sequential]]:
    """Its networks, every tensor of which has its place (strict)."""
    content = torch.load(path, weights_only=True)
    loaded = {}
    for width, sides in content.items():
        if isinstance(width, int):
            pair = []
            for state in sides:
                outer = nn.Module()
                outer.linear = sequential(width, content)
                outer.load_state_dict(state, strict=True)
                pair.append(outer.linear.eval())
            loaded[width] = tuple(pair)
    return loaded


@contextmanager
def trained(model: Model, start: Path | None = None, **values: Any) -> Iterator[HypernetworkTarget]:
    file = None if start is None else open_model(start)
    target = HypernetworkTarget(model, HypernetworkOptions(**values), seed=3, start=file)
    try:
        yield target
    finally:
        target.detach()


def layers_of(width: int = 16, **values: Any) -> HypernetworkLayers:
    options = HypernetworkOptions(**values)
    layers = HypernetworkLayers(width, options, Draws(7))
    layers.initialise(options.initialisation, generator(0))
    return layers


@pytest.mark.parametrize("activation", ["linear", *THEIRS])
def test_names_and_outputs_are_those_of_torchs_layers(activation: str) -> None:
    for number, structure in enumerate(STRUCTURES):
        for norm in (False, True):
            for last in (False, True):
                dropout = () if last else (0.0, *[0.2 * (number + 1)] * (len(structure) - 1))
                ours = layers_of(
                    structure=structure, activation=activation, activate_output=last, layer_norm=norm, dropout=dropout
                )
                for each in ours.parameters():
                    nn.init.normal_(each, std=0.3, generator=generator(each.numel()))
                flags = {
                    "layer_structure": structure,
                    "activation_func": activation,
                    "activate_output": last,
                    "is_layer_norm": norm,
                    "dropout_structure": dropout or None,
                }
                theirs = sequential(16, flags)
                theirs.load_state_dict({key.removeprefix("linear."): t for key, t in ours.state_dict().items()})
                x = torch.randn(2, 5, 16, generator=generator(1))
                torch.testing.assert_close(ours(x), theirs.eval()(x))


@pytest.mark.parametrize(
    ("initialisation", "expected", "bound"),
    [
        ("Normal", 0.01, None),
        ("XavierUniform", math.sqrt(2 / (400 + 200)), math.sqrt(6 / (400 + 200))),
        ("XavierNormal", math.sqrt(2 / (400 + 200)), None),
        ("KaimingUniform", math.sqrt(2 / 200), math.sqrt(6 / 200)),
        ("KaimingNormal", math.sqrt(2 / 200), None),
    ],
)
def test_first_values_have_the_distributions_of_the_papers(
    initialisation: str, expected: float, bound: float | None
) -> None:
    layers = layers_of(200, activation="prelu", layer_norm=True, initialisation=initialisation)
    state = layers.state_dict()
    first, norm = state["linear.0.weight"], torch.cat([state["linear.2.weight"], state["linear.4.weight"]])
    assert first.std().item() == pytest.approx(expected, rel=0.02)
    kurtosis = ((first - first.mean()) / first.std()).pow(4).mean().item()
    assert kurtosis == pytest.approx(1.8 if bound else 3.0, rel=0.05)  # of a uniform, and of a normal distribution
    assert bound is None or 0.99 * bound < first.abs().max() <= bound
    assert norm.std().item() == pytest.approx(0.01, rel=0.15) and abs(norm.mean().item()) < 0.002  # not 1, as usual
    assert state["linear.1.weight"].tolist() == [0.25]
    assert all(bool((tensor == 0).all()) for key, tensor in state.items() if key.endswith("bias"))


@pytest.mark.parametrize("family", FAMILIES[:3])
def test_training_reaches_every_parameter_and_the_file_paints_as_it_does(
    family: str, models: Callable[[str], Model], tmp_path: Path
) -> None:
    model, file = models(family), tmp_path / "style.pt"
    base, before = output(model), {name: tensor.clone() for name, tensor in model.unet.state_dict().items()}
    with trained(model, activation="swish", layer_norm=True, dropout=(0, 0.1, 0)) as target:
        expected = {module.in_features for name, module in model.unet.named_modules()
                    if isinstance(module, nn.Linear) and name.endswith("to_k")}  # fmt: skip
        assert set(target.hypernetwork.pairs) == expected and model.unet.spec.context_dim in expected
        start = weights(target)
        losses = train(model, target, rate=1e-2)
        assert losses[-1] < losses[0]
        for name, value in weights(target).items():
            # What is added to all keys alike changes no softmax: its gradient is 0 but for rounding.
            assert (value != start[name]).any() or name.endswith(".0.linear.4.bias"), name
        with target.frozen():
            assert torch.equal(output(model), base)
        live = output(model)
        assert (live - base).abs().max() > 1e-3
        target.export({}, file, metadata={"ss_steps": "4"})
    assert torch.equal(output(model), base)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.unet.state_dict().items())

    on = model.attach(file)
    assert torch.equal(output(model), live) and not on.unmatched
    on.detach()
    with trained(model, file, activation="relu") as again:  # the file's layers and values, not these
        assert torch.equal(output(model), live) and again.options.activation == "swish"


def test_gradients_are_those_of_torchs_layers(models: Callable[[str], Model]) -> None:
    """The same loss with hooks written here, which add torch's layers to the inputs of keys and values."""
    model = models("sd1")
    with trained(model, activation="tanh", initialisation="XavierNormal") as target:
        loss(model).backward()
        gradients = {name: each.grad for name, each in target.hypernetwork.named_parameters()}
        state = target.hypernetwork.state_dict()
    flags = {"layer_structure": (1, 2, 1), "activation_func": "tanh", "activate_output": False, "is_layer_norm": False}
    theirs = {
        (width, side): sequential(width, flags | {"dropout_structure": None})
        for width in target.hypernetwork.pairs
        for side in (0, 1)
    }
    for (width, side), layers in theirs.items():
        layers.load_state_dict({key: state[f"{width}.{side}.linear.{key}"] for key in layers.state_dict()})

    def hook(layers: nn.Module) -> Any:
        return lambda module, inputs: (inputs[0] + layers(inputs[0]),)

    handles = [
        module.register_forward_pre_hook(hook(theirs[module.in_features, int(name.endswith("to_v"))]))
        for name, module in model.unet.named_modules()
        if isinstance(module, nn.Linear) and name.endswith(("to_k", "to_v"))
    ]
    try:
        loss(model).backward()
    finally:
        for handle in handles:
            handle.remove()
    for (width, side), layers in theirs.items():
        for key, each in layers.named_parameters():
            found = gradients[f"{width}.{side}.linear.{key}"]
            torch.testing.assert_close(found, each.grad, rtol=1e-3, atol=1e-6)


def test_step_0_is_the_base_with_a_last_layer_of_zeros(models: Callable[[str], Model]) -> None:
    model = models("sd1")
    base = output(model)
    with trained(model, activation="relu") as target, torch.no_grad():
        assert not torch.equal(output(model), base)
        for name, each in target.hypernetwork.named_parameters():
            if ".linear.2." in name:
                each.zero_()
        assert torch.equal(output(model), base)


@pytest.mark.parametrize(
    "values",
    [
        {},
        {"structure": (1, 2, 2, 1), "activation": "mish", "use_dropout": True},
        {"structure": (1, 2, 2, 1), "use_dropout": True, "last_layer_dropout": True, "layer_norm": True},
        {"structure": (1, 1.5, 1), "activation": "prelu", "dropout": (0, 0.05, 0.15), "activate_output": True},
    ],
    ids=["usual", "dropout", "last-layer", "list"],
)
def test_files_load_in_a1111(values: dict[str, Any], models: Callable[[str], Model], tmp_path: Path) -> None:
    file, metadata = (
        tmp_path / "style.pt",
        {"ss_steps": "12", "ss_sd_model_name": "a", "ss_new_sd_model_hash": "b" * 64},
    )
    with trained(models("sd1"), widths=(64,), **values) as target:
        raised = {name: tensor + 0.25 for name, tensor in weights(target).items()}  # as of another checkpoint
        target.export(raised, file, metadata=metadata)
        x = torch.randn(2, 5, 64, generator=generator(1))
        with torch.no_grad():
            for each in target.hypernetwork.parameters():
                each.add_(0.25)
            expected = [side(x) for side in target.hypernetwork.pairs[64]]
    ((width, pair),) = load_as_a1111(file).items()
    assert width == 64
    for theirs, ours in zip(pair, expected, strict=True):
        torch.testing.assert_close(theirs(x), ours)
    content = torch.load(file, weights_only=True)
    assert list(content)[1:] == [
        "step", "name", "layer_structure", "activation_func", "is_layer_norm", "weight_initialization",
        "sd_checkpoint", "sd_checkpoint_name", "activate_output", "use_dropout", "dropout_structure",
        "last_layer_dropout", "optional_info",
    ]  # fmt: skip
    assert (content["step"], content["name"], content["sd_checkpoint"]) == (12, "style", "b" * 10)
    dropped = {4: [0, 0.3, 0.3 if "last_layer_dropout" in values else 0, 0], 3: list(values.get("dropout", [0, 0, 0]))}
    assert content["dropout_structure"] == dropped[len(content["layer_structure"])]
    assert content["use_dropout"] == any(content["dropout_structure"])


def test_dropouts_depend_on_seed_batch_and_module_alone(models: Callable[[str], Model]) -> None:
    model = models("sd1")
    with trained(model, activation="rrelu", dropout=(0, 0.5, 0), initialisation="XavierNormal") as target:

        def gradients(number: int) -> list[Tensor]:
            target.hypernetwork.zero_grad()
            target.begin_batch(number)
            loss(model).backward()
            return [each.grad.clone() for each in target.hypernetwork.parameters() if each.grad is not None]

        def equal(one: list[Tensor], other: list[Tensor]) -> bool:
            return all(map(torch.equal, one, other))

        before = output(model)
        first, second, again = gradients(5), gradients(6), gradients(5)
        assert equal(first, again) and not equal(first, second)
        disable = checkpointing.enable(model.unet)
        try:
            assert equal(first, gradients(5))
        finally:
            disable()
        assert torch.equal(output(model), before)  # nothing is dropped where gradients are disabled
    with trained(model, activation="rrelu", dropout=(0, 0.5, 0), initialisation="XavierNormal") as target:
        assert equal(first, gradients(5))  # a resumed run


def test_dropouts_have_their_probability_and_keep_the_mean() -> None:
    layers = layers_of(64, structure=(1, 4, 1), dropout=(0, 0.25, 0))
    with torch.no_grad():
        for each in layers.parameters():
            each.zero_()
        layers.linear[0].bias.fill_(1)  # type: ignore[union-attr, operator]
        layers.linear[2].weight.fill_(1 / 256)  # type: ignore[union-attr, operator]
    x, means = torch.zeros(8, 77, 64), {}
    for number, name in ((0, "a"), (0, "b"), (1, "a")):
        layers.draws.begin_batch(number)
        means[number, name] = layers(x, name)[..., 0]  # of 256 numbers that are 0 or 1 / 0.75
    for mean in means.values():
        assert mean.mean().item() == pytest.approx(1, abs=0.01)
        assert mean.std().item() == pytest.approx(math.sqrt(0.25 / 0.75 / 256), rel=0.15)
    one, *others = means.values()
    assert all(abs(torch.corrcoef(torch.stack([one.flatten(), each.flatten()]))[0, 1]) < 0.15 for each in others)


def test_a_bfloat16_model_trains_float32_parameters(narrow: Callable[[str], Narrow]) -> None:
    model = gouache.load(narrow("sd1").file, device="cpu", dtype="bf16")
    with trained(model, activation="relu") as target:
        losses = train(model, target, rate=1e-2)
        assert losses[-1] < losses[0]
        assert {each.dtype for each in target.hypernetwork.parameters()} == {torch.float32}
        matrices, others = target.groups()
        assert (matrices.decay, others.decay) == (True, False)
        assert all(name.endswith(".weight") for name in matrices.parameters)
        assert {*matrices.parameters, *others.parameters} == set(weights(target))


@pytest.mark.parametrize("from_file", [False, True])
def test_it_is_made_without_data_for_estimates_of_memory(
    from_file: bool, narrow: Callable[[str], Narrow], models: Callable[[str], Model], tmp_path: Path
) -> None:
    with trained(models("sd1"), activation="prelu", layer_norm=True) as target:
        target.export({}, tmp_path / "style.pt", metadata={})
        expected = {name: each.shape for name, each in weights(target).items()}
    model = gouache.load(narrow("sd1").file, device=torch.device("meta"), dtype="fp32")
    simulated = Simulation(torch.device("cpu"))
    simulated.convert(model.unet)
    model.core.device = simulated.device
    start = tmp_path / "style.pt" if from_file else None
    with simulated.only(), trained(model, start, activation="prelu", layer_norm=True) as target:
        assert {name: each.shape for name, each in weights(target).items()} == expected
        assert all(type(each.data) is not Tensor for each in target.hypernetwork.parameters())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"structure": (1,)}, "structure: has 1 numbers"),
        ({"structure": (1, 2, 2)}, "structure: is 1, 2, 2; it must begin and end with 1"),
        ({"structure": (1, 0, 1)}, "structure: is 1, 0, 1; expected numbers above 0"),
        ({"structure": (1, 1e-3, 1)}, "structure: 0.001 makes a layer of width 0 of inputs of 32"),
        ({"structure": (1, 1e9, 1)}, "expected 1 to 65536"),
        ({"activation": "Rellu"}, "activation: 'Rellu' is not known; the nearest is r?relu"),
        ({"initialisation": "Xavier"}, "initialisation: 'Xavier' is not known; use Normal"),
        ({"dropout": (0, 0.1)}, "dropouts: has 2 numbers; expected 3"),
        ({"dropout": (0, 1, 0)}, "dropouts: is 0, 1, 0; expected probabilities"),
        ({"dropout": (0.1, 0.1, 0)}, "dropouts: is 0.1, 0.1, 0; the first must be 0"),
        ({"dropout": (0, 0.1, 0), "use_dropout": True}, "use_dropout: and dropouts"),
        ({"use_dropout": True}, "use_dropout: drops nothing of 1, 2, 1"),
        ({"last_layer_dropout": True}, "last_layer_dropout: has no effect"),
        ({"widths": (64, 768)}, "widths: 768 is not a width of this model's attention; it has 32, 64"),
        *(({"activation": name}, f"activation: {name} ") for name in IMPOSSIBLE),
    ],
)
def test_impossible_options_are_refused(values: dict[str, Any], message: str, models: Callable[[str], Model]) -> None:
    base = output(models("sd1")) if "widths" in values else None
    with pytest.raises(RequestError, match=message), trained(models("sd1"), **values):
        pass
    assert base is None or torch.equal(output(models("sd1")), base)


def test_other_formats_are_refused(models: Callable[[str], Model], tmp_path: Path) -> None:
    with trained(models("sd1")) as target:
        for values, message in (
            ({"path": tmp_path / "a.safetensors"}, "does not end in .pt"),
            ({"path": tmp_path / "a.pt", "form": "full"}, "is for trained weights"),
            ({"path": tmp_path / "a.pt", "names": "peft"}, "is for LoRAs"),
        ):
            with pytest.raises(RequestError, match=message):
                target.export({}, metadata={}, **values)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())


def test_novelais_files_are_a_start_and_wrong_ones_are_refused(models: Callable[[str], Model], tmp_path: Path) -> None:
    model, file = models("sd1"), tmp_path / "style.pt"

    def state(last: int = 64) -> dict[str, Tensor]:
        shapes = {"linear1.weight": (128, 64), "linear1.bias": (128,), "linear2.weight": (last, 128),
                  "linear2.bias": (last,)}  # fmt: skip
        return {name: 0.1 * torch.randn(shape, generator=generator(len(shape))) for name, shape in shapes.items()}

    torch.save({64: (state(), state()), 999: (state(), state())}, file)
    with trained(model, file) as target:
        assert "width 999 are not trained" in target.notes[0]
        trains = output(model)
        assert torch.equal(target.hypernetwork.pairs[64][1].linear[1].weight, state()["linear2.weight"])  # type: ignore[arg-type]
    torch.save({64: (state(), state())}, file)
    on = model.attach(file)
    assert torch.equal(output(model), trains)
    on.detach()

    good = {64: (state(), state())}
    for content, message in (
        ({999: (state(), state())}, "width 999; this model's attention has 32, 64"),
        ({64: (state(), state(32))}, r"linear.1.weight is 32 x 128; expected 64 x 128"),
        ({64: (state(),)}, "is missing; expected"),
        ({**good, "layer_structure": [1, 2, 2, 1]}, "linear.1.weight is 64 x 128; expected 128 x 128"),
        ({**good, "layer_structure": "1, 2, 1"}, "layer_structure is not a list of numbers"),
        ({**good, "layer_structure": [1, 1e9, 1]}, "cannot be trained further: hypernetwork.structure: 1e.09 makes"),
        ({**good, "activation_func": "softmax"}, "cannot be trained further: hypernetwork.activation: softmax works"),
        ({64: (state(), {**state(), "linear2.bias": torch.full((64,), torch.nan)})}, "NaN"),
        ({"lora_unet_x.lora_up.weight": torch.zeros(2, 2)}, "is not a hypernetwork"),
    ):
        torch.save(content, file)
        with pytest.raises(ModelError, match=message), trained(model, file):
            pass
