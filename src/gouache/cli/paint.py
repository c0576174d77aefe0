"""`gouache paint`."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from typer import Argument, Option

from gouache.errors import RequestError, printable

if TYPE_CHECKING:
    from PIL.Image import Image

    from gouache.app.model import Model
    from gouache.generate.adapters import UsedFile
    from gouache.generate.picture import Picture
    from gouache.generate.request import Request


def paint(
    prompt: Annotated[
        str | None, Argument(help="What to paint, in A1111's prompt language.", show_default=False)
    ] = None,
    negative: Annotated[str, Option("--negative", "-n", help="The negative prompt.")] = "",
    model: Annotated[
        str, Option("--model", "-m", help="A model file, a folder, or a name; see `gouache models list`.")
    ] = "mini",
    output: Annotated[
        str | None, Option("--output", "-o", help="A .png file, or a folder ending in /.", show_default="outputs/")
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace the file given with -o if it exists.")] = False,
    sampler: Annotated[str, Option(help="See `gouache samplers`.")] = "DPM++ 2M",
    schedule: Annotated[str, Option(help="How the noise levels are spaced; see `gouache samplers`.")] = "Automatic",
    steps: Annotated[int, Option(help="Sampling steps.")] = 25,
    cfg: Annotated[
        float | None,
        Option(help="Guidance scale; 1 turns the negative prompt off.", show_default="the model's own, else 7"),
    ] = None,
    seed: Annotated[int | None, Option(help="Seed of the first picture.", show_default="random")] = None,
    size: Annotated[str | None, Option(help="WIDTHxHEIGHT in pixels.", show_default="the model's size")] = None,
    count: Annotated[int, Option(help="Number of pictures; each has the next seed.")] = 1,
    batch: Annotated[int, Option(help="Pictures painted at once.")] = 1,
    clip_skip: Annotated[
        int | None, Option(help="Layer of the text encoder, from the end.", show_default="the model's default")
    ] = None,
    emphasis: Annotated[str, Option(help="How weights act: original, no norm, ignore, none, comfy.")] = "original",
    init: Annotated[Path | None, Option(help="A picture to start from.")] = None,
    strength: Annotated[float, Option(help="Denoising strength for --init, 0 to 1.")] = 0.6,
    mask: Annotated[
        Path | None, Option(help="A mask for --init: white is painted over; the rest only passes through the VAE.")
    ] = None,
    image_cfg: Annotated[float, Option(help="For instruct-pix2pix: how closely to keep to --init.")] = 1.5,
    depth: Annotated[Path | None, Option(help="For depth models: a depth picture, white is near.")] = None,
    hires: Annotated[
        str | None, Option(help="Hires fix: a second pass at FACTOR or WIDTHxHEIGHT.", show_default=False)
    ] = None,
    hires_steps: Annotated[int | None, Option(help="Steps of the hires pass.", show_default="--steps")] = None,
    hires_strength: Annotated[float, Option(help="Denoising strength of the hires pass.")] = 0.7,
    hires_upscaler: Annotated[str, Option(help="latent, nearest-exact, bicubic or lanczos.")] = "latent",
    hires_sampler: Annotated[str | None, Option(help="Sampler of the hires pass.", show_default="--sampler")] = None,
    hires_schedule: Annotated[str | None, Option(help="Schedule of the hires pass.", show_default="--schedule")] = None,
    hires_prompt: Annotated[str, Option(help="Prompt of the hires pass.", show_default="PROMPT")] = "",
    hires_negative: Annotated[str, Option(help="Negative prompt of the hires pass.", show_default="--negative")] = "",
    refiner: Annotated[str | None, Option(help="A model that runs the last steps.", show_default=False)] = None,
    refiner_at: Annotated[float, Option(help="Where the refiner takes over, 0 to 1 of the noise schedule.")] = 0.8,
    variation_seed: Annotated[int | None, Option(help="A seed to vary towards.")] = None,
    variation_strength: Annotated[float, Option(help="How far to vary, 0 to 1.")] = 0.0,
    rng: Annotated[str, Option(help="Noise source: cpu, or nv for that of NVIDIA GPUs.")] = "cpu",
    eta: Annotated[
        float | None, Option(help="Noise added by DDIM and ancestral samplers.", show_default="the sampler's default")
    ] = None,
    ensd: Annotated[int, Option(help="A1111's eta noise seed delta.")] = 0,
    rescale: Annotated[float, Option(help="Guidance rescale, 0 to 1; for v-prediction models.")] = 0.0,
    lora: Annotated[
        list[str] | None, Option(help="A LoRA: FILE[:STRENGTH][:te=STRENGTH][:start=0.2][:end=0.8]; repeat for more.")
    ] = None,
    lora_blocks: Annotated[
        list[str] | None, Option(help="FILE=PRESET, numbers, or IN=0,OUT=1: a --lora's strength by U-Net block.")
    ] = None,
    embedding: Annotated[
        list[str] | None, Option(help="An embedding outside the model folders; its name in prompts is its file's.")
    ] = None,
    hypernet: Annotated[list[str] | None, Option(help="A hypernetwork: FILE[:STRENGTH].")] = None,
    vae: Annotated[str, Option(help="Another VAE: a file, automatic, or none for the model's own.")] = "automatic",
    device: Annotated[str | None, Option(help="cpu, cuda, cuda:1 or mps.", show_default="the best there is")] = None,
    dtype: Annotated[str | None, Option(help="fp32, bf16 or fp16.", show_default="the fastest measured")] = None,
    prediction: Annotated[str | None, Option(help="eps or v, if the file does not say.")] = None,
    family: Annotated[str | None, Option(help="sd1, sd2, sdxl, if the file does not say.")] = None,
    examples: Annotated[bool, Option("--examples", help="Instead of PROMPT: sixteen examples, on one sheet.")] = False,
    explain: Annotated[
        bool, Option("--explain", help="Print how the prompt is read, step by step, and paint nothing.")
    ] = False,
    steps_sheet: Annotated[
        bool, Option("--steps-sheet", help="Also write NAME-steps.png: the predicted picture at every step.")
    ] = False,
    as_json: Annotated[bool, Option("--json", help="Print one JSON object per picture.")] = False,
) -> None:
    """Paint pictures of PROMPT."""
    from gouache.generate.request import Request

    if (prompt is None) is not examples:
        found = "is missing" if prompt is None else "cannot be given with --examples, which has its own"
        raise RequestError("prompt", f'{found}; for example: gouache paint "a red apple", or gouache paint --examples')
    prompt = prompt or ""
    options = dict(  # noqa: C408
        prompt=prompt, negative=negative, sampler=sampler, schedule=schedule, steps=steps, cfg=cfg, seed=seed,
        size=size, count=count, batch=batch, clip_skip=clip_skip, emphasis=emphasis, init=init, strength=strength,
        mask=mask, image_cfg=image_cfg, depth=depth, hires=hires, hires_steps=hires_steps,
        hires_strength=hires_strength, hires_upscaler=hires_upscaler, hires_sampler=hires_sampler,
        hires_schedule=hires_schedule,
        hires_prompt=hires_prompt, hires_negative=hires_negative, refiner=refiner, refiner_at=refiner_at,
        variation_seed=variation_seed, variation_strength=variation_strength, rng=rng, eta=eta, ensd=ensd,
        rescale=rescale, lora=lora or (), lora_blocks=lora_blocks or (), embedding=embedding or (),
        hypernet=hypernet or (),
    )  # fmt: skip
    request = Request.from_json(options)
    if examples and output is not None and Path(output).suffix:
        raise RequestError("output", f"{output} is the name of a file; --examples writes a folder of pictures")
    from gouache.diffusion.samplers import catalog

    catalog.find(request.sampler, request.schedule)  # a misspelt name is refused before gigabytes are read
    catalog.find(request.hires_sampler or request.sampler, request.hires_schedule or request.schedule)
    if explain:
        _explain(request)
        return

    from gouache.app.loading import load
    from gouache.app.settings import read
    from gouache.cli.output import Output

    settings = read()
    default = settings.output / "examples" if examples else settings.output
    target = Output(output, default, 1 if examples else request.count, overwrite)
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

        save = lambda picture, index: picture.save(target.folder / f"{index + 1:02d}.png")  # noqa: E731
        images = _paint(loaded, requests_of(request), save, as_json, steps_sheet)
        print(write_sheet(images, target.folder / "sheet.png"), file=sys.stderr if as_json else sys.stdout)
        return
    _notes(loaded, request)
    _paint(loaded, [request], target.save, as_json, steps_sheet)


def _explain(request: Request) -> None:
    """How the prompts are read, without loading a model."""
    from gouache.generate.prompting import split_prompt
    from gouache.prompts.explain import explain
    from gouache.prompts.tokenizer import Tokenizer

    tokenizer = Tokenizer()
    hires_steps = (request.hires_steps or request.steps) if request.hires is not None else None
    parts = [("prompt", request.prompt), ("negative prompt", request.negative)]
    if hires_steps is not None:
        parts += [("hires prompt", request.hires_prompt), ("hires negative prompt", request.hires_negative)]
    for title, text in parts:
        if title.startswith("hires") and not text:
            continue
        text, tags = split_prompt(text)
        print(f"{title}: {text}" if text else f"{title}: (empty)")
        for tag in tags:
            print(f"  adapter {tag}")
        first = None if title.startswith("hires") else hires_steps
        steps = hires_steps if title.startswith("hires") and hires_steps is not None else request.steps
        plain = request.emphasis == "none"
        negative = "negative" in title
        print(explain(text, steps, tokenizer, hires_steps=first, negative=negative, plain=plain))


def _paint(
    model: Model,
    requests: Sequence[Request],
    save: Callable[[Picture, int], Path],
    as_json: bool,
    steps_sheet: bool,
) -> list[Image]:
    """Paint all requests; `save` saves a picture with its number, from 0."""
    from gouache.cli.progress import Steps
    from gouache.cli.steps_sheet import StepsSheet

    images = []
    count = sum(request.count for request in requests)
    with Steps(count, requests[0].batch) as steps:
        sheet = StepsSheet(model) if steps_sheet else None

        def on_step(step: Any) -> None:
            steps.on_step(step)
            if sheet is not None:
                sheet.on_step(step)

        try:
            for request in requests:
                attached = partial(_attached, request)
                for picture in model.paint(request, on_step=on_step, on_attached=attached, on_hash=steps.show):
                    path = save(picture, len(images))
                    images.append(picture.image)
                    if as_json:
                        print(json.dumps({"path": str(path), "seed": picture.seed, **picture.recipe}), flush=True)
                    else:
                        print(path, flush=True)
                    if sheet is not None:
                        written = sheet.write(path.with_stem(f"{path.stem}-steps"))
                        print(written, file=sys.stderr if as_json else sys.stdout, flush=True)
        except KeyboardInterrupt:
            steps.close()
            print(f"stopped; {len(images)} of {count} pictures are done and saved", file=sys.stderr)
            sys.exit(130)
    if model.upcast:
        print(f"note: NaN in {model.dtype}; computed in float32 instead: {', '.join(model.upcast)}", file=sys.stderr)
    return images


def _notes(model: Model, request: Request) -> None:
    """Print what the user should know about this prompt before the wait."""
    from gouache.app.sources import LibrarySource
    from gouache.generate.adapters import bundled_words
    from gouache.generate.notes import notes, unescaped_names
    from gouache.generate.prompting import read_texts, split_prompt

    source, texts = LibrarySource(model.settings), read_texts(request)
    names = source.mentioned(texts, model.text_widths)
    written = [request.prompt, request.negative, request.hires_prompt, request.hires_negative]
    for note in unescaped_names(request, source.mentioned(written, model.text_widths)):
        _note(note)
    for path in source.mentioned_for_other_models(texts, model.text_widths):
        _note(
            f"embedding '{path.stem}' ({path.name}) does not fit this model; '{path.stem}' in the prompt is read as an "
            f"ordinary word"
        )
    words = bundled_words(request, [*split_prompt(request.prompt)[1], *split_prompt(request.hires_prompt)[1]], source)
    for note in notes(model, request, [*names, *words, *(Path(each).stem for each in request.embedding)]):
        _note(note)


def _attached(request: Request, used: list[UsedFile]) -> None:
    """Print the files that were attached, and how much of each was used."""
    from gouache.generate.notes import adapter_notes

    for each in used:
        print(each, file=sys.stderr)
    for note in adapter_notes(request, used):
        _note(note)


def _note(text: str) -> None:
    print(f"note: {printable(text, sys.maxsize)}", file=sys.stderr)
