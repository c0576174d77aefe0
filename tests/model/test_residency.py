"""Names of devices and dtypes, and the choice among measured dtypes."""

from __future__ import annotations

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
def test_dtypes_go_by_their_short_and_long_names(name: str, dtype: torch.dtype):
    assert residency.dtype(name) == dtype
    assert residency.dtype(residency.dtype_name(dtype)) == dtype


def test_an_unknown_dtype_is_refused_with_the_known_ones():
    with pytest.raises(RequestError, match="dtype: 'int8' is not known; use fp32, bf16, fp16"):
        residency.dtype("int8")


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "meta", "xpu", ""])
def test_what_is_no_device_of_ours_is_a_setting_to_correct(name: str):
    with pytest.raises(RequestError, match="use cpu, cuda"):
        residency.device(name)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has the device whose absence is tested")
@pytest.mark.parametrize("name", ["cuda", "cuda:1"])
def test_an_absent_device_is_named_with_what_to_do(name: str):
    with pytest.raises(DeviceError, match=rf"device {name}: .* sees no CUDA device; use --device cpu"):
        residency.device(name)


@pytest.mark.parametrize(
    ("times", "chosen"),
    [
        ({"fp32": 1.0, "bf16": 0.5}, torch.bfloat16),
        ({"fp32": 1.0, "bf16": 0.9}, torch.float32),  # not worth the precision
        ({"fp32": 1.0, "bf16": 7.0}, torch.float32),  # emulated
        ({"fp32": 1.0, "bf16": 0.6, "fp16": 0.4}, torch.float16),
        ({"bf16": 1.0}, torch.bfloat16),  # a device without float32
    ],
)
def test_float32_is_left_only_for_what_saves_a_fifth_of_its_time(times: dict[str, float], chosen: torch.dtype):
    assert residency.choose(times) == chosen
