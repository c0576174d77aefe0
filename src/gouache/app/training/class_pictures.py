"""Pictures of the class for DreamBooth's prior preservation (Ruiz et al. 2022), painted by the model when missing.

They show what the class word means to the model before training. They are kept, so the next run with the same folder
paints none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from gouache.errors import FileError
from gouache.generate import run
from gouache.generate.request import Request
from gouache.model.model import Model

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp"})
_SEED = 1_000_000  # of the first: none of those that users choose

OnPicture = Callable[[int, int], None]
"""Called with (done, total) after each picture."""


def paint_missing(model: Model, request: Request, count: int, folder: Path, on_picture: OnPicture | None = None) -> int:
    """Paint pictures of `request`, a prompt for the class, until `folder` has `count`; returns how many were painted.

    Each has its own seed, which its name states, so an interrupted run goes on where it stopped. Raises FileError if
    the folder cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        names = [path.name for path in folder.iterdir() if not path.name.startswith(".")]
    except OSError as error:
        raise FileError(folder, f"cannot be used for class pictures: {error.strerror}") from None
    present = sum(Path(name).suffix.lower() in PICTURES for name in names)
    painted, seed = 0, _SEED
    while present + painted < count:
        path = folder / f"{seed}.png"
        if not path.exists():
            next(iter(run.paint(model, replace(request, seed=seed)))).save(path)
            painted += 1
            if on_picture is not None:
                on_picture(present + painted, count)
        seed += 1
    return painted
