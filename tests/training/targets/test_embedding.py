"""Embeddings as targets: their gradients are those of the token table's rows, and nothing else of the model changes."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from gouache import Model
from gouache.adapters.embedding import vectors_of
from gouache.errors import RequestError
from gouache.files.open import open_model
from gouache.training.targets.embedding import EmbeddingOptions, EmbeddingTarget
from tests.pipelines import Narrow
from tests.training.targets.steps import FAMILIES, loss, output, train, weights

WORD = "cat"  # a word of the prompts in `steps`, one token long


@contextmanager
def trained(model: Model, **values: Any) -> Iterator[EmbeddingTarget]:
    target = EmbeddingTarget(model, EmbeddingOptions(**{"word": WORD, "start": WORD, **values}))
    try:
        yield target
    finally:
        target.detach()


def tables(model: Model) -> dict[str, torch.nn.Parameter]:
    """The token tables of a model's encoders."""
    return {
        name: encoder.text_model.embeddings.token_embedding.weight  # type: ignore[misc]
        for name, encoder in model.text_encoders.items()
    }


def everything(model: Model) -> dict[str, Tensor]:
    networks = {"unet": model.unet, "vae": model.vae, **model.text_encoders}
    return {f"{part}.{name}": t.clone() for part, each in networks.items() for name, t in each.state_dict().items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_step_0_is_the_base_and_only_the_vectors_are_trained(family: str, models: Callable[[str], Model]) -> None:
    model = models(family)
    base, before = output(model), everything(model)
    with trained(model) as target:
        assert torch.equal(output(model), base)
        start = weights(target)
        losses = train(model, target)
        assert losses[-1] < losses[0]
        assert start.keys() == {f"embedding.{name}" for name in model.text_encoders}
        assert all((value != start[name]).any() for name, value in weights(target).items())
        assert (output(model) - base).abs().max() > 1e-4
        with target.frozen():
            assert torch.equal(output(model), base)
    assert torch.equal(output(model), base)
    after = everything(model)
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
def test_gradients_are_those_of_the_row_of_the_token_table(family: str, models: Callable[[str], Model]) -> None:
    model = models(family)
    (token,) = model.tokenizer.encode(WORD)
    wanted = {}
    for name, table in tables(model).items():
        table.requires_grad_(True)
        wanted[name] = torch.autograd.grad(loss(model), table)[0][token]
        table.requires_grad_(False)
    with trained(model) as target:
        target.embedding.norms = dict.fromkeys(target.embedding.norms, (0.0, 1e9))  # the range has a test of its own
        loss(model).backward()
        for name, parameter in target.embedding.named_parameters():
            torch.testing.assert_close(parameter.grad, wanted[name][None], rtol=1e-4, atol=1e-8)


def test_norms_stay_in_the_range_of_the_vocabulary(models: Callable[[str], Model], tmp_path: Path) -> None:
    model = models("sd1")
    norms = tables(model)["text_encoder"].norm(dim=1)
    with trained(model, vectors=2, start="red cat") as target:
        with torch.no_grad():
            target.embedding.text_encoder[0] *= 100  # type: ignore[operator]
            target.embedding.text_encoder[1] *= 0.001  # type: ignore[operator]
        direction = target.embedding.text_encoder.detach().clone()  # type: ignore[operator]
        loss(model).backward()
        gradient = target.embedding.text_encoder.grad
        assert isinstance(gradient, Tensor) and (gradient != 0).any()
        along = (gradient * direction).sum(1) / (gradient.norm(dim=1) * direction.norm(dim=1))
        assert along.abs().max() < 1e-4
        target.export({}, tmp_path / "cat.safetensors", metadata={})
    (vectors,) = vectors_of(open_model(tmp_path / "cat.safetensors")).values()
    torch.testing.assert_close(vectors.norm(dim=1), torch.stack([norms.max(), norms[norms > 0].min()]))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("family", ["sd1", "sd2", "sdxl"])
def test_files_are_read_by_us_and_by_diffusers(
    family: str, suffix: str, models: Callable[[str], Model], narrow: Callable[[str], Narrow], tmp_path: Path
) -> None:
    model, file = models(family), tmp_path / f"{WORD}{suffix}"
    with trained(model, vectors=3) as target:
        train(model, target)
        expected = output(model)
        target.export({}, file, metadata={"ss_steps": "4"})
    on = model.attach(file)
    torch.testing.assert_close(output(model), expected, rtol=1e-5, atol=1e-6)
    ours = model.encode_prompts([f"a red {WORD}"], size=(64, 64))
    on.detach()

    pipeline = copy.deepcopy(narrow(family).pipeline)
    prompt = "a red zorblax"
    if family == "sdxl":
        state = load_file(file) if suffix == ".safetensors" else torch.load(file, weights_only=True)
        pipeline.load_textual_inversion(
            state["clip_l"], token="zorblax", text_encoder=pipeline.text_encoder, tokenizer=pipeline.tokenizer
        )
        pipeline.load_textual_inversion(
            state["clip_g"], token="zorblax", text_encoder=pipeline.text_encoder_2, tokenizer=pipeline.tokenizer_2
        )
        context, _, pooled, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    else:
        pipeline.load_textual_inversion(str(file), token="zorblax")
        context, pooled = pipeline.encode_prompt(prompt, "cpu", 1, do_classifier_free_guidance=False)[0], None
    torch.testing.assert_close(ours.context, context, rtol=1e-4, atol=1e-4)
    if pooled is not None:
        assert ours.vector is not None
        torch.testing.assert_close(ours.vector[:, : pooled.shape[1]], pooled, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"word": " "}, "trigger: is missing"),
        *(
            (
                {"word": f"zo{each}rb"},
                r"data\.trigger: is 'zo.*rb'; expected a word without .*, which is syntax of prompts",
            )
            for each in r"()[]{}|\<>:#"
        ),
        ({"vectors": 0}, "vectors: is 0; expected 1 to 75"),
        ({"vectors": 76}, "vectors: is 76; expected 1 to 75"),
        ({"start": ""}, "init_word: has no tokens"),
    ],
)
def test_impossible_options_are_refused(values: dict[str, Any], message: str, models: Callable[[str], Model]) -> None:
    with pytest.raises(RequestError, match=message), trained(models("sd1"), **values):
        pass
    assert len(models("sd1").embeddings) == 0


def test_other_forms_and_names_are_refused(models: Callable[[str], Model], tmp_path: Path) -> None:
    with trained(models("sd1")) as target:
        for values, message in (
            ({"path": tmp_path / "a.ckpt"}, "does not end in .safetensors or .pt"),
            ({"path": tmp_path / "a.pt", "form": "full"}, "is for trained weights"),
            ({"path": tmp_path / "a.pt", "names": "peft"}, "is for LoRAs"),
        ):
            with pytest.raises(RequestError, match=message):
                target.export({}, metadata={}, **values)  # type: ignore[arg-type]
    assert not any(tmp_path.iterdir())
