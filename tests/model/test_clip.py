"""CLIP's scores against Transformers' own model and processor, on random narrow weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from gouache.errors import ModelError
from gouache.model import clip


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2, "hidden_act": request.param}
    config = transformers.CLIPConfig(
        text_config={**sizes, "hidden_size": 64, "bos_token_id": 49406, "eos_token_id": 49407},
        vision_config={**sizes, "hidden_size": 48, "image_size": 32, "patch_size": 8},
        projection_dim=24,
    )
    folder = tmp_path_factory.mktemp("clip")
    transformers.CLIPModel(config).eval().save_pretrained(folder)
    return folder


def pictures() -> list[Image.Image]:
    random = torch.Generator().manual_seed(1)
    sizes = ((40, 32), (32, 57), (128, 96))
    return [
        Image.fromarray(torch.randint(256, (height, width, 3), generator=random, dtype=torch.uint8).numpy())
        for width, height in sizes
    ]


def test_both_encoders_agree_with_transformers(folder: Path, clip_folder: Path):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.CLIPModel.from_pretrained(folder).eval()
    tokenizer = transformers.CLIPTokenizer.from_pretrained(clip_folder)
    processor = transformers.CLIPImageProcessorPil if hasattr(transformers, "CLIPImageProcessorPil") else None
    processor = (processor or transformers.CLIPImageProcessor)(size={"shortest_edge": 32}, crop_size=32)
    prompts = ["a cat", "a very long " + "word " * 100]

    ours = clip.load(folder)

    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    pixels = processor(pictures(), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        found = theirs(input_ids=tokens["input_ids"], pixel_values=pixels)
    assert_close(ours.encode_prompts(prompts), found.text_embeds, atol=1e-5, rtol=1e-4)
    assert_close(ours.encode_images(pictures()), found.image_embeds, atol=2e-3, rtol=1e-2)


def test_a_file_without_both_encoders_is_refused(narrow, tmp_path: Path):
    with pytest.raises(ModelError, match="is not a complete CLIP"):
        clip.load(narrow("sd1").file)
