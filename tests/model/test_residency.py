"""Names of devices and dtypes, the measurement of dtypes, and the choice among them."""

from __future__ import annotations

import platform
from collections.abc import Callable

import pytest
import torch

from gouache.errors import DeviceError, RequestError
from gouache.model import residency


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("fp32", torch.float32),
        ("bf16", torch.bfloat16),
        ("fp16", torch.float16),
        ("float32", torch.float32),
        ("bfloat16", torch.bfloat16),
        ("half", torch.float16),
    ],
)
def test_dtypes_have_short_and_long_names(name: str, dtype: torch.dtype):
    assert residency.dtype(name) == dtype
    assert residency.dtype(residency.dtype_name(dtype)) == dtype


def test_an_unknown_dtype_is_refused_with_the_list_of_known_ones():
    with pytest.raises(RequestError, match="dtype: 'int8' is not known; use fp32, bf16, fp16"):
        residency.dtype("int8")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "xpu", ""])
def test_a_name_that_is_not_a_supported_device_is_refused(name: str):
    with pytest.raises(RequestError, match="use cpu, cuda"):
        residency.device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a CUDA device")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_a_missing_device_is_refused_with_the_option_to_use(name: str):
    with pytest.raises(DeviceError, match=rf"device {name}: .* finds no CUDA device; use --device cpu"):
        residency.device(name)


@pytest.mark.parametrize(
    ("seconds", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 0.5}, torch.bfloat16),
        ({"fp32": 1.0, "bf16": 0.9}, torch.float32),  # not worth the lower precision
        ({"fp32": 1.0, "bf16": 7.0}, torch.float32),  # emulated
        ({"fp32": 1.0, "bf16": 0.6, "fp16": 0.4}, torch.float16),
        ({"fp32": 1.0}, torch.float32),
        ({"bf16": 1.0}, torch.bfloat16),  # a device without float32
    ],
)
def test_a_16_bit_dtype_is_chosen_if_it_saves_a_fifth_of_the_time(seconds: dict[str, float], chosen: torch.dtype):
    assert residency.choose(seconds).dtype == chosen


@pytest.mark.parametrize(
    ("bf16", "native", "busy", "chosen"),
    [
        (0.9, True, False, torch.bfloat16),  # in doubt, what the processor is built for
        (1.1, True, False, torch.float32),  # a quiet measurement decides
        (1528 / 1708, True, True, torch.bfloat16),  # measured at a load of 6 on 2 cores
        (1.2, True, True, torch.bfloat16),
        (1.7, True, True, torch.float32),  # AVX512-BF16 without AMX
        (0.7, False, True, torch.float32),
        (0.4, False, True, torch.bfloat16),
    ],
)
def test_in_doubt_the_units_of_the_device_decide(bf16: float, native: bool, busy: bool, chosen: torch.dtype):
    choice = residency.choose({"fp32": 1.0, "bf16": bf16}, ("bf16",) if native else (), busy)

    assert choice.dtype == chosen and choice.reason


def test_a_16_bit_dtype_without_units_is_chosen_when_it_is_faster():
    assert residency.choose({"fp32": 1.0, "bf16": 0.9, "fp16": 0.5}, ("bf16",)).dtype == torch.float16


class Clock:
    """A clock that advances only by what `spend` adds."""

    def __init__(self) -> None:
        self.now = 100.0
        self.order: list[str] = []

    def __call__(self) -> float:
        return self.now

    def spend(self, name: str, *seconds: float) -> Callable[[], None]:
        """A run called `name` that takes these seconds, one after the other, the last one again and again."""
        left = list(seconds)

        def run() -> None:
            self.order.append(name)
            self.now += left.pop(0) if len(left) > 1 else left[0]

        return run


def test_dtypes_are_timed_in_turn_and_the_best_round_counts():
    clock = Clock()
    runs = {"fp32": clock.spend("fp32", 0.9, 0.2, 0.1, 0.2), "bf16": clock.spend("bf16", 0.1, 0.3, 0.3, 0.3)}

    timings = residency.time_interleaved(runs, clock, limit=2.0)

    assert clock.order == ["fp32", "bf16"] * 4
    assert timings.seconds == pytest.approx({"fp32": 0.1, "bf16": 0.3}) and timings.rounds == 3
    assert timings.spread == pytest.approx(2.0) and timings.noisy


def test_a_measurement_is_limited_in_time_and_in_rounds():
    clock = Clock()
    slow = residency.time_interleaved({"fp32": clock.spend("", 2.0), "bf16": clock.spend("", 1.0)}, clock, limit=1.5)
    assert clock.now == 103.0 and slow.seconds == {"fp32": 2.0, "bf16": 1.0} and slow.noisy

    fast = residency.time_interleaved({"fp32": clock.spend("", 0.001)}, clock)
    assert fast.rounds == residency.MAX_ROUNDS and fast.spread == pytest.approx(1.0) and not fast.noisy


def test_an_emulated_dtype_is_not_timed_in_every_round():
    clock = Clock()
    runs = {"fp32": clock.spend("fp32", 0.1), "bf16": clock.spend("bf16", 0.9)}

    timings = residency.time_interleaved(runs, clock, limit=3.0)

    assert (
        clock.order.count("bf16") == 2
        and timings.seconds == pytest.approx({"fp32": 0.1, "bf16": 0.9})
        and timings.rounds > 3
    )


def test_a_dtype_whose_operations_are_missing_is_left_out():
    def missing() -> None:
        raise RuntimeError("not implemented for 'Half'")

    clock = Clock()
    timings = residency.time_interleaved({"fp32": clock.spend("", 0.1), "fp16": missing}, clock)

    assert list(timings.seconds) == ["fp32"]


def test_a_real_measurement_times_every_dtype_of_the_cpu_and_restores_the_threads(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(residency, "CHANNELS", 64)
    threads = torch.get_num_threads()

    timings = residency.measure(torch.device("cpu"), limit=0.0)

    assert list(timings.seconds) == ["fp32", "bf16"] and all(each > 0 for each in timings.seconds.values())
    assert torch.get_num_threads() == threads


@pytest.mark.parametrize(
    ("capabilities", "native"),
    [({"amx_bf16": True}, ("bf16",)), ({"avx512_bf16": True}, ("bf16",)), ({"avx512_f": True}, ())],
)
def test_bf16_units_are_read_from_the_capabilities_of_the_cpu(
    capabilities: dict[str, bool], native: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)

    assert residency.native_dtypes(torch.device("cpu")) == native


@pytest.mark.parametrize("name", ["_is_amx_tile_supported", "_is_avx512_bf16_supported", "none"])
def test_bf16_units_are_found_with_a_torch_that_lists_no_capabilities(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    for each in ("_is_amx_tile_supported", "_is_avx512_bf16_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda found=each == name: found, raising=False)

    assert residency.native_dtypes(torch.device("cpu")) == (() if name == "none" else ("bf16",))
    monkeypatch.delattr(torch.cpu, "_is_amx_tile_supported")
    residency.native_dtypes(torch.device("cpu"))  # no error with a torch that lacks a function
