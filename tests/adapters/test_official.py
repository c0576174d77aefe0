"""Official key lists of adapter files: each file matches completely, judged by shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gouache.adapters.attach import Adapters
from gouache.adapters.embedding import check_widths, vectors_of
from gouache.adapters.hypernetwork import read_hypernetwork
from gouache.adapters.read import read_lora
from gouache.families.catalog import FAMILIES
from gouache.files.open import open_model
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.modules import module_names
from gouache.nn.clip_text import ClipText
from gouache.nn.spec import TextSpec, UNetSpec
from gouache.nn.unet import UNet
from tests.layouts.manifests import manifest, shapes


def networks(family_name: str) -> dict[str, nn.Module]:
    family = next(family for family in FAMILIES if family.name == family_name)
    built: dict[str, nn.Module] = {}
    with torch.device("meta"):
        for location in family.locations:
            if isinstance(location.spec, UNetSpec):
                built[location.component] = UNet(location.spec)
            elif isinstance(location.spec, TextSpec):
                built[location.component] = ClipText(location.spec)
    return built


def fail_if_read(name: str) -> Tensor:
    raise AssertionError(f"{name} was read, but shapes should be enough")


@pytest.mark.parametrize(
    ("name", "family_name"), [("lora_kohya_sd15", "sd1"), ("locon_kohya_sd15", "sd1"), ("lora_kohya_sdxl", "sdxl")]
)
def test_every_module_of_an_official_lora_matches(name: str, family_name: str):
    infos = {key: TensorInfo(shape, "F16") for key, shape in shapes(name).items()}
    file = ModelFile(Path(f"{name}.safetensors"), "safetensors", infos, fail_if_read)
    parts = networks(family_name)
    specs: Mapping[str, Any] = {component: network.spec for component, network in parts.items()}

    adapter = read_lora(file, module_names(specs))
    fitting, wrong = Adapters(parts, fail_if_read).sort(adapter)  # type: ignore[arg-type]

    assert not adapter.unmatched and not wrong
    assert len(fitting) == len(infos) // 3  # up, down and alpha each


@pytest.mark.parametrize("example", manifest("a1111_hypernetwork")["examples"])
def test_every_official_hypernetwork_is_read(example: str, tmp_path: Path):
    listed = manifest("a1111_hypernetwork")["examples"][example]
    state = {key: torch.randn(shape) / shape[-1] ** 0.5 for key, (shape, _) in listed.items()}
    flags: dict[str, Any] = {"activation_func": example.split("_")[0], "is_layer_norm": "layernorm" in example}
    if example.startswith("default"):
        flags = {}
    torch.save({768: (state, state), "step": 1, "name": "x", **flags}, tmp_path / "x.pt")

    read = read_hypernetwork(open_model(tmp_path / "x.pt"))

    kept = [step for step in read.pairs[768][0].steps if not isinstance(step, str)]
    assert [step[1].shape for step in kept] == [tuple(s) for key, (s, _) in listed.items() if key.endswith("weight")]
    assert read.pairs[768][1](torch.randn(1, 77, 768)).shape == (1, 77, 768)


def test_the_activations_of_the_official_list_are_known():
    from gouache.adapters.hypernetwork import ACTIVATIONS

    # MultiheadAttention needs arguments, so A1111 cannot build it and no file contains it.
    listed = set(manifest("a1111_hypernetwork")["activation_names"]) - {"multiheadattention"}

    assert listed - {"linear", "prelu"} == set(ACTIVATIONS)


@pytest.mark.parametrize("family_name", ["sd1", "sd2", "sdxl", "sdxl-refiner"])
def test_official_embeddings_fit_their_families(family_name: str, tmp_path: Path):
    from safetensors.torch import save_file

    vectors = {"sd1": {"emb_params": torch.randn(4, 768)}, "sd2": {"emb_params": torch.randn(4, 1024)}}
    both = {"clip_l": torch.randn(4, 768), "clip_g": torch.randn(4, 1280)}
    save_file(vectors.get(family_name, both), tmp_path / "x.safetensors")
    file = open_model(tmp_path / "x.safetensors")
    texts = {name: part.spec.width for name, part in networks(family_name).items() if isinstance(part, ClipText)}

    check_widths(file, vectors_of(file), texts)
