"""What `gouache paint --examples` paints: sixteen pictures, each with its recipe, and a sheet of them to look at."""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from PIL import Image

from gouache.files.write import write_atomic
from gouache.generate.request import Request
from gouache.images.sheet import tiled

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


def requests_of(request: Request) -> list[Request]:
    """`PROMPTS` with the request's other knobs and its seed, or 1."""
    seed = 1 if request.seed is None else request.seed
    return [replace(request, prompt=prompt, seed=seed, count=1) for prompt in PROMPTS]


def write_sheet(images: Sequence[Image.Image], path: Path) -> Path:
    buffer = io.BytesIO()
    tiled(images, across=4).save(buffer, "PNG")
    write_atomic(path, buffer.getvalue())
    return path
