"""Products in float32 of frozen bfloat16 layers, compared with the same layers in float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gouache.nn import products

LAYERS = {
    "linear": (nn.Linear(40, 72), (2, 40, 40)),
    "linear without bias": (nn.Linear(72, 40, bias=False), (1, 64, 72)),
    "linear, few rows": (nn.Linear(40, 72), (1, 5, 40)),
    "1x1": (nn.Conv2d(16, 24, 1), (2, 16, 6, 7)),
    "3x3, tiny map": (nn.Conv2d(16, 24, 3, padding=1), (2, 16, 3, 4)),
    "3x3, small map": (nn.Conv2d(48, 24, 3, padding=1), (2, 48, 6, 7)),
    "3x3, large map": (nn.Conv2d(16, 24, 3, padding=1), (1, 16, 20, 21)),
    "3x3, stride 2": (nn.Conv2d(16, 24, 3, stride=2, padding=1), (1, 16, 9, 8)),
    "3x3, groups": (nn.Conv2d(16, 24, 3, padding=1, groups=4), (1, 16, 6, 6)),
}


@pytest.fixture(autouse=True)
def _faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a CPU where float32 is faster, with weights of several blocks."""
    monkeypatch.setattr(products, "float32_is_faster", lambda: True)
    monkeypatch.setattr(products, "BLOCK", 1024)


def layer_of(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    layer, shape = LAYERS[name]
    layer = copy.deepcopy(layer).bfloat16().requires_grad_(False)
    x = torch.randn(shape).bfloat16()
    if x.ndim == 4:
        layer = layer.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        x = x.contiguous(memory_format=torch.channels_last)
    return layer, x


def results(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The output, and the gradient of x for a fixed gradient of the output."""
    x = x.clone().requires_grad_()
    out = layer(x)
    gradient = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).bfloat16()
    out.backward(gradient.to(out))
    assert x.grad is not None
    return out.detach(), x.grad


def error(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).norm() / exact.norm())


@pytest.mark.parametrize("name", LAYERS)
def test_output_and_gradient_are_those_of_float64_rounded_to_bfloat16(name: str) -> None:
    layer, x = layer_of(name)
    exact = results(copy.deepcopy(layer).double(), x.double())
    products.enable(layer)
    found = results(layer, x)
    for one, other in zip(found, exact, strict=True):
        assert one.dtype == torch.bfloat16 and one.shape == other.shape
        assert error(one, other) < 3.5e-3  # rounding a result to 8 bits: 1.7e-3


@pytest.mark.parametrize("name", LAYERS)
def test_memory_layout_of_the_input_does_not_matter(name: str) -> None:
    layer, x = layer_of(name)
    products.enable(layer)
    for found, before in zip(results(layer, x.mT.contiguous().mT), results(layer, x), strict=True):
        assert error(found, before.double()) < 3.5e-3


@pytest.mark.parametrize("name", LAYERS)
def test_without_gradients_nothing_changes(name: str) -> None:
    layer, x = layer_of(name)
    plain, before = layer(x), results(layer, x)
    disable = products.enable(layer)
    with torch.no_grad():
        assert torch.equal(layer(x), plain)
    disable()
    assert "forward" not in vars(layer)
    assert all(torch.equal(one, other) for one, other in zip(results(layer, x), before, strict=True))


def test_trained_weights_have_gradients() -> None:
    layer, x = layer_of("linear")
    products.enable(layer.requires_grad_(True))
    layer(x).sum().backward()
    rows = x.flatten(0, 1).double().sum(0)
    weight = layer.weight
    assert isinstance(weight, Tensor) and weight.grad is not None
    assert error(weight.grad, rows.expand(weight.shape)) < 1e-2


def test_float32_inputs_are_left_to_torch() -> None:
    layer, x = layer_of("linear")
    products.enable(layer.float())
    assert torch.equal(layer(x.float()), F.linear(x.float(), layer.weight, layer.bias))  # type: ignore[arg-type]


@pytest.mark.parametrize("columns_first", [False, True])
@pytest.mark.parametrize(("queries", "keys"), [(70, 70), (64, 77)])
def test_attention_and_its_gradients_are_those_of_float64(queries: int, keys: int, columns_first: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, 3, count, 20, generator=generator).bfloat16() for count in (queries, keys, keys)]
    gradient = torch.randn(2, 3, queries, 20, generator=generator).bfloat16()
    if columns_first:  # as a product the other way round returns them
        *inputs, gradient = (each.mT.contiguous().mT for each in (*inputs, gradient))

    def computed(function: object, dtype: torch.dtype) -> list[Tensor]:
        tensors = [each.to(dtype).requires_grad_() for each in inputs]
        out = function(*tensors)  # type: ignore[operator]
        return [out.detach(), *torch.autograd.grad(out, tensors, gradient.to(out))]

    def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return (q @ k.transpose(2, 3) / 20**0.5).softmax(-1) @ v

    exact = computed(by_definition, torch.float64)
    for one, other in zip(computed(products.attention, torch.bfloat16), exact, strict=True):
        assert error(one, other) < 5e-3


XEON = "processor\t: 0\nvendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16{}\n\nprocessor\t: 1\n"
EPYC = "vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f{}\n"


@pytest.mark.parametrize(
    ("cpuinfo", "slow"),
    [
        (XEON.format(""), True),
        (XEON.format(" amx_bf16 amx_tile"), False),
        (EPYC.format(" avx512_bf16"), False),
        (EPYC.format(""), True),
        ("processor\t: 0\nFeatures\t: fp asimd bf16\n", False),
        ("", False),
    ],
)
def test_processors_with_slow_bfloat16_are_known_by_their_flags(cpuinfo: str, slow: bool) -> None:
    assert products.slow_bfloat16(cpuinfo) is slow
