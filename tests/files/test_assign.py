"""A module on the meta device is filled completely and in one dtype, or not at all, with a one-line error."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gouache.errors import ModelError
from gouache.files.assign import assign, cast, compare
from gouache.files.open import open_model


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 4)
        self.norm = nn.BatchNorm1d(4)
        self.last = nn.Linear(4, 2, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.first(x)))


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight


def on_meta(kind: type[nn.Module]) -> nn.Module:
    with torch.device("meta"):
        return kind()


def test_a_filled_module_gives_the_same_output_as_the_original():
    torch.manual_seed(0)
    original = Network().eval()
    module = on_meta(Network).eval()

    fit = assign(module, original.state_dict())

    x = torch.randn(6, 3)
    assert module(x).equal(original(x))
    assert sorted(fit.matched) == sorted(original.state_dict())
    assert fit.fits and str(fit) == ""
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_mapped_file_stays_mapped(tmp_path: Path):
    safetensors.torch.save_file(Network().state_dict(), tmp_path / "m.safetensors")
    file = open_model(tmp_path / "m.safetensors")
    module = on_meta(Network)

    assign(module, {name: file.tensor(name) for name in file})

    assert module.get_parameter("first.weight").data_ptr() == file.tensor("first.weight").data_ptr()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_tensors_get_one_dtype_and_others_keep_theirs(dtype: torch.dtype):
    state = Network().state_dict()
    state["first.weight"] = state["first.weight"].half()
    state["last.weight"] = state["last.weight"].bfloat16()
    module = on_meta(Network)

    assign(module, state, dtype=dtype, keep={"norm.running_mean"})

    found = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    assert found.pop("norm.num_batches_tracked") == torch.int64
    assert found.pop("norm.running_mean") == torch.float32
    assert set(found.values()) == {dtype}


def test_missing_unexpected_and_wrongly_shaped_tensors_are_counted_and_listed():
    state = Network().state_dict()
    del state["last.weight"], state["first.bias"]
    state["extra"] = torch.zeros(1)
    state["first.weight"] = torch.zeros(3, 4)
    module = on_meta(Network)

    with pytest.raises(ModelError) as caught:
        assign(module, state)

    assert str(caught.value) == (
        "the tensors do not fit the network (Network): 2 missing (first.bias, last.weight), 1 unexpected (extra), "
        "1 with a wrong shape (first.weight is 3x4, expected 4x3)"
    )
    assert all(parameter.is_meta for parameter in module.parameters())


def test_the_message_for_many_faults_is_one_short_line():
    with pytest.raises(ModelError) as caught:
        assign(on_meta(Network), {f"wrong\n{i}" * 99: torch.zeros(1) for i in range(500)})

    assert "500 unexpected" in str(caught.value) and "\n" not in str(caught.value)
    assert len(str(caught.value)) < 1000


def test_compare_needs_only_names_and_shapes():
    fit = compare(on_meta(Network), {"first.weight": (4, 3), "first.bias": (5,), "other": (1,)})

    assert fit.matched == ("first.weight",)
    assert fit.unexpected == ("other",)
    assert fit.wrong_shape == (("first.bias", (5,), (4,)),)
    assert len(fit.missing) == 6 and not fit.fits


@pytest.mark.parametrize("names", [["embed.weight"], ["head.weight"], ["embed.weight", "head.weight"]])
def test_tied_weights_stay_tied_under_any_of_their_names(names: list[str]):
    module = on_meta(Tied)
    weight = torch.randn(5, 3)

    assign(module, {name: weight.clone() for name in names}, dtype=torch.float16)

    assert module.get_parameter("head.weight") is module.get_parameter("embed.weight")
    assert module.get_parameter("head.weight").equal(weight.half())
    assert len(list(module.parameters())) == 1


def test_a_tied_weight_with_two_values_is_refused():
    with pytest.raises(ModelError, match="are one tied weight, but their values differ"):
        assign(on_meta(Tied), {"embed.weight": torch.zeros(5, 3), "head.weight": torch.ones(5, 3)})


def test_a_buffer_left_on_the_meta_device_is_an_error():
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("table", torch.zeros(3), persistent=False)

    with pytest.raises(ModelError, match=r"1 tensor of Hidden received no value: table"):
        assign(on_meta(Hidden), {})


def test_integer_tensors_for_a_parameter_are_assigned_unchanged():
    module = on_meta(Tied)

    assign(module, {"embed.weight": torch.zeros(5, 3, dtype=torch.int8)})

    assert module.get_parameter("embed.weight").dtype == torch.int8


def test_a_lazy_mapping_is_read_one_tensor_at_a_time():
    state = Network().state_dict()
    alive: list[int] = []
    most = 0

    class Lazy(Mapping[str, Tensor]):
        def __getitem__(self, name: str) -> Tensor:
            nonlocal most
            tensor = state[name].double()
            alive.append(1)
            weakref.finalize(tensor, alive.pop)
            most = max(most, len(alive))
            return tensor

        def __iter__(self) -> Iterator[str]:
            return iter(state)

        def __len__(self) -> int:
            return len(state)

    assign(on_meta(Network), Lazy(), dtype=torch.float32)

    assert most <= 3  # the current one, the one before it, and the integer counter, which is kept


@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2**16 - 1), min_size=1, max_size=50), st.booleans())
def test_the_cast_between_the_16_bit_types_equals_that_of_torch(bits: list[int], to_bfloat: bool):
    source, target = (torch.float16, torch.bfloat16) if to_bfloat else (torch.bfloat16, torch.float16)
    tensor = torch.tensor(bits, dtype=torch.int32).to(torch.uint16).view(source)

    found, expected = cast(tensor, target, "cpu"), tensor.to(target)

    assert found.dtype == target
    assert torch.equal(found.isnan(), expected.isnan())
    assert torch.equal(found.nan_to_num(), expected.nan_to_num())


def test_the_cast_in_pieces_handles_large_strided_empty_and_scalar_tensors():
    large = torch.randn(600_001, generator=torch.Generator().manual_seed(0)).half()

    assert cast(large, torch.bfloat16, "cpu").equal(large.to(torch.bfloat16))
    assert cast(large[::2], torch.bfloat16, "cpu").equal(large[::2].to(torch.bfloat16))
    assert cast(torch.zeros(0, 3).half(), torch.bfloat16, "cpu").shape == (0, 3)
    assert cast(torch.tensor(2.5).half(), torch.bfloat16, "cpu").item() == 2.5
