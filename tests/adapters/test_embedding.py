"""Embeddings in every known format: reading, and use in prompts."""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

import gouache
from gouache import Model
from gouache.adapters.embedding import bundled_vectors, vectors_of
from gouache.errors import ModelError
from gouache.files.open import open_model
from gouache.generate.adapters import PathSource, bundled_words
from gouache.generate.request import Request
from gouache.layouts.adapters import bundled
from tests.files.test_picture_file import in_pixels, with_chunk
from tests.pipelines import Narrow


def random_vectors(count: int, width: int = 64, seed: int = 0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def a1111(vectors: Tensor) -> dict[str, object]:
    return {"string_to_token": {"*": 265}, "string_to_param": {"*": vectors}, "name": "fox", "step": 5}


def in_picture(path: Path, vectors: Tensor) -> None:
    text = json.dumps({**a1111(vectors), "string_to_param": {"*": {"TORCHTENSOR": vectors.tolist()}}}).encode()
    if path.suffix == ".png":
        with_chunk(path, base64.b64encode(text).decode())
    else:
        image: Image.Image = in_pixels(zlib.compress(text, 9))
        image.save(path, "WEBP", lossless=True)


def parameters(vectors: Tensor) -> dict[str, object]:
    """The format of the original textual inversion code: a ParameterDict, and tokens as tensors."""
    return {"string_to_token": {"*": torch.tensor(265)}, "string_to_param": torch.nn.ParameterDict({"*": vectors})}


FORMATS: dict[str, Callable[[Path, Tensor], None]] = {
    "a.pt": lambda path, vectors: torch.save(a1111(vectors), path),
    "first.pt": lambda path, vectors: torch.save(parameters(vectors), path),
    "learned_embeds.bin": lambda path, vectors: torch.save({"<fox>": vectors}, path),
    "diffusers.safetensors": lambda path, vectors: save_file({"<fox>": vectors}, path),
    "emb_params.safetensors": lambda path, vectors: save_file({"emb_params": vectors}, path),
    "carried.png": in_picture,
    "carried.webp": in_picture,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_its_vectors(name: str, tmp_path: Path):
    vectors = random_vectors(3, 768)
    FORMATS[name](tmp_path / name, vectors)

    read = vectors_of(open_model(tmp_path / name))

    assert set(read) == {"text_encoder"} and torch.equal(read["text_encoder"], vectors)


def test_a_single_vector_may_be_one_dimensional(tmp_path: Path):
    torch.save({"<fox>": random_vectors(1, 768)[0]}, tmp_path / "one.bin")

    assert vectors_of(open_model(tmp_path / "one.bin"))["text_encoder"].shape == (1, 768)


def test_sdxl_has_vectors_for_both_encoders(tmp_path: Path):
    save_file({"clip_l": random_vectors(2, 768), "clip_g": random_vectors(2, 1280)}, tmp_path / "xl.safetensors")

    read = vectors_of(open_model(tmp_path / "xl.safetensors"))

    assert {name: tuple(each.shape) for name, each in read.items()} == {
        "text_encoder": (2, 768), "text_encoder_2": (2, 1280)
    }  # fmt: skip


def test_embeddings_bundled_in_a_lora(tmp_path: Path):
    tensors = {"bundle_emb.fox.clip_l": random_vectors(2, 768), "bundle_emb.fox.clip_g": random_vectors(2, 1280)}
    tensors["bundle_emb.cat.string_to_param.*"] = random_vectors(1, 768, 1)
    tensors["lora_unet_x.lora_up.weight"] = torch.zeros(4, 2)
    save_file(tensors, tmp_path / "lora.safetensors")
    file = open_model(tmp_path / "lora.safetensors")

    found = {name: bundled_vectors(file, names) for name, names in bundled(file).items()}

    assert set(found) == {"fox", "cat"} and set(found["fox"]) == {"text_encoder", "text_encoder_2"}
    assert torch.equal(found["cat"]["text_encoder"], random_vectors(1, 768, 1))


def test_words_of_the_embeddings_in_a_requests_loras(tmp_path: Path):
    """By option and by tag; files that are missing or damaged have none, and are reported when they are attached."""
    save_file({"bundle_emb.fox.emb_params": random_vectors(2, 64)}, tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"not a file of tensors")
    options = tuple(str(tmp_path / name) for name in ("a.safetensors:0.5", "b.safetensors", "c.safetensors"))

    assert bundled_words(Request(prompt="a fox", lora=options), (), PathSource()) == ["fox"]


@pytest.fixture(scope="module")
def model(narrow: Callable[[str], Narrow]) -> Model:
    return gouache.load(narrow("sd1").file, device="cpu", dtype="fp32")


def test_the_name_in_a_prompt_is_replaced_by_the_vectors(model: Model, narrow: Callable[[str], Narrow], tmp_path: Path):
    """Compared with diffusers, which adds the vectors to the encoder's embedding table under new tokens."""
    vectors = random_vectors(3, 64)
    save_file({"emb_params": vectors}, tmp_path / "zorblax.safetensors")
    import copy

    pipeline = copy.deepcopy(narrow("sd1").pipeline)
    pipeline.load_textual_inversion(vectors, token="zorblax")
    theirs, _ = pipeline.encode_prompt("a photo of zorblax, at night", "cpu", 1, False)

    on = model.attach(tmp_path / "zorblax.safetensors")

    assert (on.kind, on.matched, tuple(on.embeddings)) == ("embedding", 3, ("zorblax",))
    ours = model.encode_prompts(["a photo of zorblax, at night"]).context
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)
    for text in ("a photo of ZORBLAX, at night", "a photo of embedding:zorblax, at night"):
        assert torch.equal(model.encode_prompts([text]).context, ours)
    on.detach()
    assert not torch.equal(model.encode_prompts(["a photo of zorblax, at night"]).context, ours)


def test_emphasis_applies_to_all_vectors(model: Model, tmp_path: Path):
    save_file({"emb_params": random_vectors(2, 64)}, tmp_path / "zorblax.safetensors")
    on = model.attach(tmp_path / "zorblax.safetensors")

    def encode(prompt: str, emphasis: str = "no norm") -> Tensor:
        return model.encode_prompts([prompt], emphasis=emphasis).context  # type: ignore[arg-type]

    plain, strong = encode("fox zorblax cat"), encode("fox (zorblax:1.5) cat")

    factor = torch.ones(77)
    factor[2:4] = 1.5  # begin, fox, two vectors, cat
    torch.testing.assert_close(strong[0], plain[0] * factor[:, None])
    on.detach()


def test_an_embedding_is_never_split_between_chunks(model: Model, tmp_path: Path):
    from gouache.prompts.chunks import chunk

    prompt = "fox " * 74 + "zorblax cat"

    chunks = chunk(prompt, model.tokenizer, {"zorblax": 3})

    assert [len(each) for each in chunks] == [74, 4]
    assert [token.vector for token in chunks[1]] == [("zorblax", 0), ("zorblax", 1), ("zorblax", 2), None]


def test_the_longer_of_two_matching_names_is_used(model: Model):
    from gouache.prompts.chunks import chunk

    (row,) = chunk("bad hands today", model.tokenizer, {"bad": 1, "bad hands": 2})

    assert [token.vector for token in row] == [("bad hands", 0), ("bad hands", 1), None]


@pytest.mark.parametrize(("width", "family"), [(768, "Stable Diffusion 1"), (1024, "Stable Diffusion 2"), (96, "none")])
def test_a_wrong_width_is_reported_in_one_line(model: Model, width: int, family: str, tmp_path: Path):
    torch.save({"<fox>": random_vectors(1, width) if width != 96 else random_vectors(1, 128)}, tmp_path / "wide.pt")

    with pytest.raises(ModelError) as refused:
        model.attach(tmp_path / "wide.pt")

    assert "width 64" in str(refused.value) and family in str(refused.value) and "\n" not in str(refused.value)
    assert not model.embeddings


def test_nan_is_reported(model: Model, tmp_path: Path):
    vectors = random_vectors(1, 64)
    vectors[0, 3] = float("nan")
    save_file({"emb_params": vectors}, tmp_path / "nan.safetensors")

    with pytest.raises(ModelError, match="NaN"):
        model.attach(tmp_path / "nan.safetensors")


def test_sdxl_embeddings_reach_both_encoders(narrow: Callable[[str], Narrow], tmp_path: Path):
    xl = gouache.load(narrow("sdxl").file, device="cpu", dtype="fp32")
    both = {"clip_l": random_vectors(2, 64), "clip_g": random_vectors(2, 128, 1)}
    save_file(both, tmp_path / "zorblax.safetensors")
    on = xl.attach(tmp_path / "zorblax.safetensors")

    context = xl.encode_prompts(["zorblax"]).context

    first, second = xl.text_encoders["text_encoder"], xl.text_encoders["text_encoder_2"]
    begin, end = xl.tokenizer.begin, xl.tokenizer.end
    for encoder, vectors, pad, part in (
        (first, both["clip_l"], end, context[..., :64]), (second, both["clip_g"], 0, context[..., 64:])
    ):  # fmt: skip
        tokens = torch.tensor([[begin, 5, 5, end, *[pad] * 73]])
        embedded = encoder.embed(tokens).clone()
        embedded[0, 1:3] = vectors
        torch.testing.assert_close(part, encoder(tokens, embedded).layers[-2])
    on.detach()
    save_file({"clip_l": both["clip_l"]}, tmp_path / "half.safetensors")
    with pytest.raises(ModelError, match="vectors of width 64, but this model's text encoders have width 64 and 128"):
        xl.attach(tmp_path / "half.safetensors")
