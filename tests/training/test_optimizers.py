"""Optimizers by name and by path: each resumes bit-equal, and names or arguments that are not known are refused."""

from __future__ import annotations

import copy
import importlib.util
import json
import sys

import pytest
import torch

from gouache.errors import RequestError, TrainingError
from gouache.training import optimizers, state
from gouache.training.loop import train
from gouache.training.objective import Group, by_decay
from gouache.training.optimizers import EXTRAS, TABLE, build

from .toys import linear, points, regression, settings


class Adaptive(torch.optim.Optimizer):
    """Gradient descent that keeps a count per parameter as a number, and changes an option of its groups, as
    optimizers that estimate the rate do."""

    def __init__(self, params, lr: float, weight_decay: float = 0.0, growth: float = 2.0) -> None:
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "growth": growth, "d": 1.0})

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                own = self.state[parameter]
                own["count"] = own.get("count", 0) + 1
                own["previous"] = own.get("previous", torch.zeros_like(parameter)) * 0.5 + parameter.grad
                parameter.sub_(group["lr"] * group["d"] * own["previous"] / own["count"])
            group["d"] *= group["growth"]


class Opaque(Adaptive):
    def step(self, closure=None):  # type: ignore[override]
        super().step()
        for parameter in self.param_groups[0]["params"]:
            self.state[parameter]["object"] = object()


def test_every_name_in_the_table_is_torchs_own_class_with_the_settings():
    for name, (make, _) in TABLE.items():
        optimizer = build(settings(optimizer=name, weight_decay=0.3), by_decay({"net": linear()}))

        assert type(optimizer) is make
        assert [group["weight_decay"] for group in optimizer.param_groups] == [0.3, 0.0]
    adam = build(settings(optimizer="adam", betas=(0.8, 0.95)), by_decay({"net": linear()}))
    assert adam.param_groups[0]["betas"] == (0.8, 0.95)


def test_arguments_override_the_table_and_a_dotted_path_names_any_class():
    own = f"{__name__}.Adaptive"
    nesterov = settings(optimizer="sgd", optimizer_arguments={"momentum": 0.5, "nesterov": True})

    assert build(nesterov, by_decay({"net": linear()})).param_groups[0]["nesterov"] is True
    built = build(settings(optimizer=own, optimizer_arguments={"growth": 3.0}), by_decay({"net": linear()}))
    assert type(built) is Adaptive and built.param_groups[1]["growth"] == 3.0
    assert type(build(settings(optimizer="torch.optim.NAdam"), by_decay({"net": linear()}))) is torch.optim.NAdam


def test_a_module_is_imported_only_when_its_optimizer_is_named(tmp_path, monkeypatch):
    (tmp_path / "optimizer_of_a_test.py").write_text("import torch\nclass Mine(torch.optim.SGD):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path)
    chosen = settings(optimizer="optimizer_of_a_test.Mine")
    assert "optimizer_of_a_test" not in sys.modules

    assert type(build(chosen, by_decay({"net": linear()}))).__name__ == "Mine"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (
            {"optimizer": "adam8"},
            r"optimizer: 'adam8' is not known; use adamw, adam, sgd, adafactor, muon, .*or the dotted",
        ),
        ({"optimizer": "no.such.Thing"}, "no.such.Thing cannot be imported"),
        ({"optimizer": "torch.optim.Nothing"}, "torch.optim.Nothing cannot be imported"),
        ({"optimizer": "torch.nn.Linear"}, "not a class derived from torch.optim.Optimizer"),
        ({"optimizer": ".Linear"}, "'.Linear' is not known"),
        ({"optimizer_arguments": {"momentum": 0.9}}, "optimizer_arguments: adamw does not accept .*momentum"),
        ({"optimizer_arguments": {"eps": -1}}, "optimizer_arguments: adamw does not accept .*epsilon"),
        ({"optimizer": "torch.optim.LBFGS"}, "torch.optim.LBFGS does not accept"),
    ],
)
def test_a_name_path_or_argument_that_is_not_known_is_refused(values, words):
    with pytest.raises(RequestError, match=words) as caught:
        build(settings(**values), by_decay({"net": linear()}))

    assert "\n" not in str(caught.value)


def test_an_optimizer_that_estimates_one_rate_is_refused_unequal_factors():
    pytest.importorskip("prodigyopt")
    a, b, frozen = (torch.nn.Parameter(torch.zeros(2, 2)) for _ in range(3))

    for name in ("prodigy", "prodigyopt.Prodigy"):
        with pytest.raises(RequestError, match=r"one rate for all parts.* 0\.5, 1;.*text_rate"):
            build(settings(optimizer=name), [Group({"a": a}), Group({"b": b}, 0.5)])
    build(settings(optimizer="prodigy"), [Group({"a": a}, 0.5), Group({"b": b}, 0.5), Group({"c": frozen}, 0.0)])


class Failing(torch.optim.SGD):
    """One whose step is replaced."""


@pytest.mark.parametrize("kind", [RuntimeError, ValueError])
def test_an_optimizer_that_fails_is_one_line_that_names_it(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(Failing, "step", lambda self: (_ for _ in ()).throw(kind("two\nlines")))

    with pytest.raises(TrainingError, match=r"Failing failed at step 1: two lines$"):
        train(regression(), points, settings(optimizer=f"{__name__}.Failing"), tmp_path)


def test_running_out_of_memory_in_the_optimizer_is_not_called_its_failure(tmp_path, monkeypatch):
    monkeypatch.setattr(Failing, "step", lambda self: (_ for _ in ()).throw(RuntimeError("CUDA out of memory")))

    with pytest.raises(RuntimeError, match=r"^CUDA out of memory$"):
        train(regression(), points, settings(optimizer=f"{__name__}.Failing"), tmp_path)


@pytest.mark.parametrize("start", [0.0, 0.02])
def test_adafactor_moves_weights_like_adamw_also_from_zero(start):
    """With equal gradients at the same rate: the factors of a LoRA begin at 0 and at small values."""
    moved = {}
    for name in ("adamw", "adafactor"):
        weight = torch.nn.Parameter(torch.full((6, 4), start))
        optimizer = build(settings(optimizer=name, learning_rate=1e-4, weight_decay=0.0), [Group({"a": weight})])
        for number in range(20):
            weight.grad = 1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(number))
            optimizer.step()
        moved[name] = float((weight.detach() - start).abs().mean())

    assert 0.3 < moved["adafactor"] / moved["adamw"] < 3


OPTIMIZERS = [
    *({"optimizer": name} for name in TABLE),
    {"optimizer": "sgd", "optimizer_arguments": {"momentum": 0.9}},
    {"optimizer_arguments": {"amsgrad": True}},
    {"optimizer": "torch.optim.NAdam"},
    {"optimizer": "torch.optim.ASGD"},
    {"optimizer": "torch.optim.Rprop"},
    {"optimizer": f"{__name__}.Adaptive"},
]


@pytest.mark.parametrize("values", OPTIMIZERS, ids=lambda values: "-".join(str(value) for value in values.values()))
def test_a_run_with_any_optimizer_resumes_bit_equal(tmp_path, values):
    whole = train(regression(), points, settings(**values), tmp_path / "whole")
    train(regression(), points, settings(steps=2, **values), tmp_path / "parts")
    train(regression(seed=9), points, settings(steps=4, **values), tmp_path / "parts")
    parts = train(regression(seed=9), points, settings(**values), tmp_path / "parts")

    torch.testing.assert_close(dict(parts.last), dict(whole.last), rtol=0, atol=0)
    expected, found = (state.newest(tmp_path / name) for name in ("whole", "parts"))
    assert expected is not None and found is not None
    assert found.tensors["optimizer"].keys() == expected.tensors["optimizer"].keys()
    assert all(torch.equal(found.tensors["optimizer"][name], t) for name, t in expected.tensors["optimizer"].items())
    assert found.values["optimizer"] == expected.values["optimizer"]
    assert not torch.equal(whole.last["net.weight"], linear().weight)


def test_numbers_and_changed_options_are_in_the_state_file_and_given_options_are_not(tmp_path):
    train(regression(), points, settings(steps=3, optimizer=f"{__name__}.Adaptive"), tmp_path)

    path = tmp_path / "step-00000003"
    values = json.loads((path / "state.json").read_text())["optimizer"]
    assert values == {
        "values": {"net.weight": {"count": 3}, "net.bias": {"count": 3}},
        "groups": [{"d": 8.0}, {"d": 8.0}],
    }
    found = state.newest(tmp_path)
    assert found is not None and set(found.tensors["optimizer"]) == {"net.weight.previous", "net.bias.previous"}


def test_state_that_cannot_be_saved_is_refused_by_name(tmp_path):
    with pytest.raises(TrainingError, match="Opaque keeps object as object, which cannot be saved"):
        train(regression(), points, settings(optimizer=f"{__name__}.Opaque"), tmp_path)


def test_half_precision_parameters_keep_state_in_its_own_dtype():
    network = linear().bfloat16()
    parameters = {f"net.{name}": parameter for name, parameter in network.named_parameters()}
    optimizer = build(settings(), by_decay({"net": network}))
    for parameter in parameters.values():
        optimizer.state[parameter] = {"step": torch.tensor(5.0), "exp_avg": torch.full(parameter.shape, 1.00001)}
    captured = optimizers.capture(optimizer, parameters, optimizers.options(optimizer))
    resumed = build(settings(), by_decay({"net": network}))

    optimizers.restore(resumed, parameters, captured)

    assert resumed.state[network.weight]["exp_avg"].dtype == torch.float32
    assert torch.equal(resumed.state[network.weight]["exp_avg"], torch.full((2, 3), 1.00001))


def test_muon_trains_matrices_and_adamw_the_rest():
    given = settings(optimizer="muon", learning_rate=0.02, weight_decay=0.0)
    network = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2), torch.nn.Flatten(), torch.nn.Linear(8, 5))
    optimizer = build(given, by_decay({"net": network}))
    theirs = copy.deepcopy(network)
    muon = torch.optim.Muon([theirs[2].weight], lr=0.02, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rest = [theirs[0].weight, theirs[0].bias, theirs[2].bias]
    adamw = torch.optim.AdamW(rest, lr=0.02, betas=(0.9, 0.99), weight_decay=0.0)

    for number in range(3):
        x = torch.randn(6, 3, 3, generator=torch.Generator().manual_seed(number))
        for each, optimizers_of_it in ((network, [optimizer]), (theirs, [muon, adamw])):
            each(x).pow(2).mean().backward()
            for one in optimizers_of_it:
                one.step()
                one.zero_grad()

    for ours, expected in zip(network.parameters(), theirs.parameters()):
        torch.testing.assert_close(ours, expected)


def test_muon_of_a_torch_without_it_is_refused_in_one_line(monkeypatch):
    monkeypatch.delattr(torch.optim, "Muon")

    with pytest.raises(RequestError, match=r"muon does not accept these settings: torch .* has no Muon"):
        build(settings(optimizer="muon"), by_decay({"net": linear()}))


@pytest.mark.parametrize("name", EXTRAS)
def test_an_extra_whose_package_is_missing_is_one_line_with_the_remedy(monkeypatch, name):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)

    with pytest.raises(RequestError, match=f"optimizer: {name} needs the package .*: pip install ") as caught:
        build(settings(optimizer=name), by_decay({"net": linear()}))

    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["lion", "prodigy", "schedule-free"])
def test_a_run_with_an_extra_resumes_bit_equal(tmp_path, name):
    pytest.importorskip(EXTRAS[name][0].partition(".")[0])
    values = {"optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 0.01, "ema_decay": 0}

    whole = train(regression(), points, settings(**values), tmp_path / "whole")
    for steps, seed in ((2, 0), (4, 9)):
        train(regression(seed), points, settings(**{**values, "steps": steps}), tmp_path / "parts")
    parts = train(regression(9), points, settings(**values), tmp_path / "parts")

    torch.testing.assert_close(dict(parts.last), dict(whole.last), rtol=0, atol=0)
    torch.testing.assert_close(dict(parts.weights), dict(whole.weights), rtol=0, atol=0)
    assert not torch.equal(whole.last["net.weight"], linear().weight)
