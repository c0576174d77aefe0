"""`gouache paint --examples`: sixteen pictures, each with its recipe, and a sheet of them to look at."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from gouache.files.write import write_atomic

if TYPE_CHECKING:
    from gouache.diffusion.samplers.sampler import OnStep
    from gouache.face import Model
    from gouache.generate.request import Request

# Things that the embedded model knows, in words it was taught.
PROMPTS = (
    "a red apple on a blue background",
    "a cat on a green background",
    "a rocket on a purple background",
    "a panda on a red background",
    "a hamburger on a blue background",
    "a penguin on a pink background",
    "a sunflower on a blue background",
    "a fox on a grey background",
    "a strawberry on a white background",
    "a banana on a purple background",
    "a blue fish on an orange background",
    "a turtle on a brown background",
    "the moon on a black background",
    "a rainbow on a grey background",
    "a snowman on a turquoise background",
    "a red car on a white background",
)
ACROSS, GAP = 4, 4  # pictures in a row, pixels between them


def paint_examples(model: Model, request: Request, folder: Path, on_step: OnStep | None = None) -> list[Path]:
    """Paint `PROMPTS` with the request's other knobs and its seed, or 1; the files' paths, the sheet's last."""
    seed = 1 if request.seed is None else request.seed
    paths, images = [], []
    for number, prompt in enumerate(PROMPTS, 1):
        [picture] = model.paint(replace(request, prompt=prompt, seed=seed, count=1), on_step=on_step)
        paths.append(picture.save(folder / f"{number:02d}.png"))
        images.append(picture.image)
    buffer = io.BytesIO()
    side_by_side(images).save(buffer, "PNG")
    write_atomic(folder / "sheet.png", buffer.getvalue())
    return [*paths, folder / "sheet.png"]


def side_by_side(images: list[Image.Image]) -> Image.Image:
    """Pictures of one size, row by row."""
    width, height = images[0].size
    rows = -(-len(images) // ACROSS)
    sheet = Image.new("RGB", (ACROSS * (width + GAP) - GAP, rows * (height + GAP) - GAP), "white")
    for number, image in enumerate(images):
        sheet.paste(image, (number % ACROSS * (width + GAP), number // ACROSS * (height + GAP)))
    return sheet
