"""One picture of a data set, with its caption and how both are used."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from gouache.data.members import File


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are changed each time they are used, as in kohya's scripts.

    A caption is split into tags at `separator`; the first `keep_tokens` tags, or those before `keep_tokens_separator`
    and after its second occurrence, stay where they are. `shuffle` changes the order of the others, `tag_dropout`
    leaves each of them out with that probability. `dropout` replaces the whole caption by "" with that probability,
    `dropout_every_epochs` in every n-th epoch (0: never). `prefix` and `suffix` are joined to the caption with a space
    before it is split. `wildcard`: one of the lines of a caption is chosen at random instead of the first, and one of
    the alternatives in each `{a|b}`. `secondary_separator` joins tags that stay together; it becomes `separator` at the
    end. During the first `warmup_steps` steps (below 1: a share of the run) the number of tags grows from `warmup_min`.
    One of `templates` is the caption, with that of the picture in place of `[filewords]`, see `data.templates`.
    """

    shuffle: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    separator: str = ","
    secondary_separator: str = ""
    dropout: float = 0.0
    dropout_every_epochs: int = 0
    tag_dropout: float = 0.0
    prefix: str = ""
    suffix: str = ""
    wildcard: bool = False
    warmup_min: int = 1
    warmup_steps: float = 0.0
    templates: tuple[str, ...] = ()


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are changed each time they are used.

    `flip`: mirrored with probability 0.5. `random_crop`: the part that does not fit the bucket is cut at a random
    position instead of equally from both sides. `color`: brightness, contrast, saturation and hue vary slightly.
    `alpha_mask`: the alpha channel is the mask of the loss.
    """

    flip: bool = False
    random_crop: bool = False
    color: bool = False
    alpha_mask: bool = False


@dataclass(frozen=True)
class Record:
    """A picture and its captions.

    `path` is the picture's, `name` its name in messages: the path relative to the data set. `captions` are the lines of
    its caption; only the first is used without `wildcard`. It is seen `repeats` times per epoch, and its loss is
    multiplied by `weight`. `regularization`: it shows the class, not the subject (DreamBooth's prior preservation).
    `mask` is a picture file whose white parts count in the loss. `scores` are numbers of its metadata (`punsafe`,
    `aesthetic`, `watermark`). `conditioning` is a second picture (control, edit), for targets that use one.
    `resolution` (width, height) is that of its part of the data set, if it differs from the run's.
    """

    path: File
    name: str
    captions: tuple[str, ...] = ("",)
    repeats: int = 1
    weight: float = 1.0
    regularization: bool = False
    mask: File | None = None
    conditioning: Path | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    resolution: tuple[int, int] | None = None
    caption_options: CaptionOptions = CaptionOptions()
    picture_options: PictureOptions = PictureOptions()
