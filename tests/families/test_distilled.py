"""Distilled U-Nets are named as what they are, not as damaged files."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gouache.families.identify import identify
from tests.families.records import official, record

UNET = "model.diffusion_model."


def without_middle(name: str) -> bool:
    return name.startswith(UNET + "middle_block.")


def one_residual(name: str) -> bool:
    return name.startswith((UNET + "middle_block.1.", UNET + "middle_block.2."))


def shallow(name: str) -> bool:
    return name.startswith(UNET + "output_blocks.5.1.transformer_blocks.1.")


@pytest.mark.parametrize(
    ("lacks", "says"),
    [(without_middle, "no middle block.*SDXS"), (one_residual, "one residual.*SSD-1B"), (shallow, "1 and 2.*SSD-1B")],
)
def test_a_distilled_unet_is_named(lacks: Callable[[str], bool], says: str):
    import re

    tensors = {name: info for name, info in official("sdxl_base").items() if not lacks(name)}

    found = identify(record(tensors))

    assert "unet" not in found.components
    assert re.search(f"distilled.*{says}", found.missing["unet"])


def test_a_missing_tensor_is_not_distillation():
    tensors = official("sd15_emaonly")
    del tensors[UNET + "middle_block.2.in_layers.0.weight"]

    assert "1 of 686 tensors is missing" in identify(record(tensors)).missing["unet"]
