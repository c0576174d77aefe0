"""`gouache paint`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from gouache.errors import RequestError

if TYPE_CHECKING:
    from PIL.Image import Image

    from gouache.face import Model
    from gouache.generate.request import Request
    from gouache.generate.splices import Spliced


OTHER_PICTURES = (".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")


def paint(
    prompt: Annotated[
        str | None, Argument(help="What to paint, in A1111's prompt language.", show_default=False)
    ] = None,
    negative: Annotated[str, Option("--negative", "-n", help="What to keep out of the picture.")] = "",
    model: Annotated[
        str, Option("--model", "-m", help="A model file, a folder, or a name; see `gouache doctor`.")
    ] = "mini",
    output: Annotated[
        Path | None, Option("--output", "-o", help="A .png file, or a folder ending in /.", show_default="outputs/")
    ] = None,
    sampler: Annotated[str, Option(help="See `gouache samplers`.")] = "DPM++ 2M",
    schedule: Annotated[str, Option(help="How the steps are spaced; see `gouache samplers`.")] = "Automatic",
    steps: Annotated[int, Option(help="Steps of the sampler.")] = 25,
    cfg: Annotated[float, Option(help="How closely to follow the prompt; 1 turns the negative off.")] = 7.0,
    seed: Annotated[int | None, Option(help="The first picture's seed.", show_default="random")] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels.", show_default="the model's own")] = None,
    count: Annotated[int, Option(help="How many pictures; each has the next seed.")] = 1,
    batch: Annotated[int, Option(help="How many are painted at once.")] = 1,
    clip_skip: Annotated[
        int | None, Option(help="Which layer of the text encoder, from the end.", show_default="the model's own")
    ] = None,
    emphasis: Annotated[str, Option(help="What weights do: original, no norm, ignore.")] = "original",
    init: Annotated[Path | None, Option(help="A picture to start from.")] = None,
    strength: Annotated[float, Option(help="How much of --init is repainted, 0 to 1.")] = 0.6,
    mask: Annotated[Path | None, Option(help="White where --init is to be painted over.")] = None,
    image_cfg: Annotated[float, Option(help="For instruct-pix2pix: how closely to keep to --init.")] = 1.5,
    depth: Annotated[Path | None, Option(help="For depth models: a depth picture, near is white.")] = None,
    variation_seed: Annotated[int | None, Option(help="A seed to vary towards.")] = None,
    variation_strength: Annotated[float, Option(help="How far, 0 to 1.")] = 0.0,
    rng: Annotated[str, Option(help="Whose noise: cpu, or nv for that of NVIDIA GPUs.")] = "cpu",
    eta: Annotated[
        float | None, Option(help="Noise added by DDIM and ancestral samplers.", show_default="theirs")
    ] = None,
    ensd: Annotated[int, Option(help="A1111's eta noise seed delta.")] = 0,
    rescale: Annotated[float, Option(help="Guidance rescale, 0 to 1; for v-prediction models.")] = 0.0,
    lora: Annotated[
        list[str] | None, Option(help="A LoRA: FILE[:STRENGTH][:te=STRENGTH][:start=0.2][:end=0.8]; again for more.")
    ] = None,
    lora_blocks: Annotated[
        list[str] | None, Option(help="FILE=PRESET, numbers, or IN=0,OUT=1: a --lora's strength by U-Net block.")
    ] = None,
    embedding: Annotated[
        list[str] | None, Option(help="An embedding that is in no model folder; prompts call it by its file's name.")
    ] = None,
    hypernet: Annotated[list[str] | None, Option(help="A hypernetwork: FILE[:STRENGTH].")] = None,
    vae: Annotated[str, Option(help="Another VAE: a file, automatic, or none for the model's own.")] = "automatic",
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best there is")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="the fastest measured")] = None,
    prediction: Annotated[str | None, Option(help="eps or v, where the file does not tell.")] = None,
    family: Annotated[str | None, Option(help="sd1, sd2, sdxl, where the file does not tell.")] = None,
    examples: Annotated[bool, Option("--examples", help="Instead of PROMPT: sixteen examples, on one sheet.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object a picture.")] = False,
) -> None:
    """Paint pictures of PROMPT."""
    from gouache.generate.request import Request

    if (prompt is None) is not examples:
        found = "is missing" if prompt is None else "cannot be given with --examples, which has its own"
        raise RequestError("prompt", f'{found}; as in: gouache paint "a red apple", or gouache paint --examples')
    prompt = prompt or ""
    knobs = dict(  # noqa: C408
        prompt=prompt, negative=negative, sampler=sampler, schedule=schedule, steps=steps, cfg=cfg, seed=seed,
        size=size, count=count, batch=batch, clip_skip=clip_skip, emphasis=emphasis, init=init, strength=strength,
        mask=mask, image_cfg=image_cfg, depth=depth, variation_seed=variation_seed,
        variation_strength=variation_strength, rng=rng, eta=eta, ensd=ensd, rescale=rescale, lora=lora or (),
        lora_blocks=lora_blocks or (), embedding=embedding or (), hypernet=hypernet or (),
    )  # fmt: skip
    request = Request.from_json(knobs).settled()
    if output is not None and output.suffix.lower() in OTHER_PICTURES:
        raise RequestError("output", f"{output} does not end in .png, the one format that keeps the whole recipe")
    if examples and output is not None and output.suffix:
        raise RequestError("output", f"{output} is a file's name; --examples writes a folder of pictures")
    from gouache.diffusion.samplers import catalog

    catalog.find(request.sampler, request.schedule)  # a misspelt name is refused before gigabytes are read

    from gouache.app.settings import read
    from gouache.face import load

    settings = read()
    target = output if output is not None else settings.output
    loaded = load(
        model,
        device=device,
        dtype=dtype,
        prediction=prediction,
        family=family,
        vae=vae,
        settings=settings,
        on_note=_note,
    )
    if examples:
        from gouache.cli.examples import requests_of, write_sheet

        folder = target if output is not None else target / "examples"
        images = _paint(loaded, requests_of(request), lambda index, _: folder / f"{index + 1:02d}.png", as_json)
        print(write_sheet(images, folder / "sheet.png"), file=sys.stderr if as_json else sys.stdout)
        return
    _notes(loaded, request)
    as_file = output is not None and output.suffix.lower() == ".png"
    _paint(loaded, [request], lambda index, seed: _path(target, seed, index, request.count, as_file), as_json)


def _paint(
    model: Model, requests: Sequence[Request], path_of: Callable[[int, int], Path], as_json: bool
) -> list[Image]:
    """Paint all that is requested, each picture saved where `path_of` its number, from 0, and its seed says."""
    from gouache.cli.progress import Steps

    images = []
    count = sum(request.count for request in requests)
    with Steps(count, requests[0].batch) as steps:
        try:
            for request in requests:
                for picture in model.paint(request, on_step=steps.on_step, on_spliced=partial(_spliced, request)):
                    path = picture.save(path_of(len(images), picture.seed))
                    images.append(picture.image)
                    if as_json:
                        print(json.dumps({"path": str(path), "seed": picture.seed, **picture.recipe}), flush=True)
                    else:
                        print(path, flush=True)
        except KeyboardInterrupt:
            steps.close()
            print(f"stopped; {len(images)} of {count} pictures are done and saved", file=sys.stderr)
            sys.exit(130)
    if model.upcast:
        print(f"note: NaN in {model.dtype}; computed in float32 instead: {', '.join(model.upcast)}", file=sys.stderr)
    return images


def _path(target: Path, seed: int, index: int, count: int, as_file: bool) -> Path:
    """Where a picture goes: the named file (numbered, if there are several), or the next free name in a folder."""
    if as_file:
        return target if count == 1 else target.with_stem(f"{target.stem}-{index + 1:0{len(str(count))}d}")
    taken = [int(path.name[:5]) for path in target.glob("[0-9][0-9][0-9][0-9][0-9]-*.png")] if target.is_dir() else []
    return target / f"{max(taken, default=-1) + 1:05d}-{seed}.png"


def _notes(model: Model, request: Request) -> None:
    """What the user should know of this prompt before waiting for it."""
    from gouache.app.shelf import LibraryShelf
    from gouache.generate.notes import notes

    shelf, prompts = LibraryShelf(model.settings), [request.prompt, request.negative]
    names = shelf.mentioned(prompts, model.text_widths)
    for path in shelf.passed_over(prompts, model.text_widths):
        _note(f"the embedding {path.name} is for another model, so {path.stem} is read as a word")
    known = {name.casefold() for name in (*names, *(Path(each).stem for each in request.embedding))}
    for note in notes(model, request, known):
        _note(note)


def _spliced(request: Request, splices: list[Spliced]) -> None:
    """What was put into the model, counted."""
    from gouache.generate.notes import splice_notes

    for each in splices:
        print(each, file=sys.stderr)
    for note in splice_notes(request, splices):
        _note(note)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)
