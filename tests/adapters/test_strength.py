"""Strengths, and block weights given as text."""

from __future__ import annotations

import pytest

from gouache.adapters.strength import PRESETS, Strength, block_weights, from_json, strength
from gouache.errors import RequestError
from gouache.families.sd import SD1
from gouache.families.sdxl import SDXL
from gouache.layouts.blocks import blocks
from gouache.nn.spec import UNetSpec

SD, XL = (line.unet for line in (SD1, SDXL))
assert SD is not None and XL is not None

# The presets of the LoRA Block Weight extension: BASE IN01 IN02 IN04 IN05 IN07 IN08 MID OUT03 ... OUT11.
ROWS = {
    "NONE": "0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "ALL": "1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1",
    "INS": "1,1,1,0,0,0,0,0,0,0,0,0,0,0,0,0,0",
    "IND": "1,0,0,0,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "INALL": "1,1,1,1,1,1,1,0,0,0,0,0,0,0,0,0,0",
    "MIDD": "1,0,0,0,1,1,1,1,1,1,1,1,0,0,0,0,0",
    "OUTD": "1,0,0,0,0,0,0,0,1,1,1,1,0,0,0,0,0",
    "OUTS": "1,0,0,0,0,0,0,0,0,0,0,0,1,1,1,1,1",
    "OUTALL": "1,0,0,0,0,0,0,0,1,1,1,1,1,1,1,1,1",
}


def test_every_preset_equals_its_row():
    assert PRESETS.keys() == ROWS.keys()
    for name, row in ROWS.items():
        assert block_weights(name.lower(), blocks(SD)) == block_weights(row, blocks(SD)), name


def test_a_row_for_the_blocks_with_transformers():
    labels = ["BASE", "IN01", "IN02", "IN04", "IN05", "IN07", "IN08", "M00"] + [f"OUT{n:02}" for n in range(3, 12)]

    found = block_weights(",".join(str(n) for n in range(17)), blocks(SD))

    assert {label: found[label] for label in labels} == {label: float(n) for n, label in enumerate(labels)}
    assert len(found) == 26 and found["IN03"] == found["IN02"]


@pytest.mark.parametrize(("spec", "counts"), [(SD, (26, 17)), (XL, (20, 12))])
def test_rows_of_both_lengths_are_accepted(spec, counts: tuple[int, int]):
    for count in counts:
        assert set(block_weights(" ".join(["0.5"] * count), blocks(spec)).values()) == {0.5}
    with pytest.raises(RequestError, match=f"5 numbers were given; this U-Net expects {counts[0]} .* or {counts[1]} "):
        block_weights("1,1,1,1,1", blocks(spec))


def test_presets_work_for_sdxl():
    found = block_weights("OUTALL", blocks(XL))

    assert all(value == float(label.startswith("OUT") or label == "BASE") for label, value in found.items())


def test_labels_sides_and_ranges():
    found = block_weights("BASE=0; IN=0.5, mid=2, OUT03-OUT05=-1", blocks(SD))

    assert found["BASE"] == 0 and found["IN07"] == 0.5 and found["M00"] == 2
    assert [found[f"OUT{n:02}"] for n in range(2, 7)] == [1, -1, -1, -1, 1]


@pytest.mark.parametrize("text", ["IN99=1", "IN04=x", "=1", "nonsense", "1,2,x"])
def test_invalid_block_weights_are_refused(text: str):
    with pytest.raises(RequestError, match="lora_blocks"):
        block_weights(text, blocks(SD))


def test_each_network_has_its_own_strength():
    some = strength(0.8, 0.5, "BASE=0.5,OUT=0", spec=SD)

    assert some.of(("text_encoder", "text_model.encoder.layers.0.mlp.fc1")) == 0.25
    assert some.of(("unet", "output_blocks.3.1.proj_in")) == 0
    assert some.of(("unet", "input_blocks.1.1.proj_in")) == 0.8
    separate = Strength(0.8, {"text_encoder": 0.5})
    assert [separate.of((name, "x")) for name in ("text_encoder", "text_encoder_2")] == [0.5, 0.8]
    assert Strength(0.8).of(("text_encoder_2", "x")) == 0.8  # the U-Net's strength by default


@pytest.mark.parametrize("values", [{"unet": 10**400}, {"text": []}, {"text": "x"}, {"blocks": {}}, {"start": None}])
def test_a_damaged_record_of_a_strength_is_refused(values: dict[str, object]):
    with pytest.raises(RequestError):
        from_json(values, UNetSpec())
