"""The sheet of `gouache paint --steps-sheet`: the picture that the model predicts at every step."""

from __future__ import annotations

import io
import math
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gouache.app.model import Model
    from gouache.diffusion.samplers.sampler import Step


class StepsSheet:
    """Collects the x0 of every step of a batch; `write` makes the sheet of its next picture."""

    def __init__(self, model: Model) -> None:
        self._model = model
        self._steps: list[Step] = []
        self._picture = 0

    def on_step(self, step: Step) -> None:
        if step.index == 0:
            self._picture = 0
        self._steps[step.index :] = [step]  # a pass that is repeated in float32 counts its steps again

    def write(self, path: Path) -> Path:
        """Decode and write the steps of the batch's next picture as one labelled PNG."""
        from gouache.files.write import write_atomic
        from gouache.images import pixels
        from gouache.images.sheet import labelled_tiles

        latents = [step.denoised[self._picture] for step in self._steps]
        self._picture += 1
        images = [pixels.to_pictures(self._model.decode(latent[None]))[0] for latent in latents]
        labels = [f"step {step.index + 1} of {step.count}, sigma {step.sigma:.3g}" for step in self._steps]
        largest = max(image.size for image in images)  # the hires pass is larger than the first
        images = [image if image.size == largest else image.resize(largest) for image in images]
        buffer = io.BytesIO()
        labelled_tiles(images, labels, across=math.ceil(math.sqrt(len(images)))).save(buffer, "PNG")
        write_atomic(path, buffer.getvalue())
        return path
