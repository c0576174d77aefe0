"""Pictures of a data set as tensors: scaled, cut, mirrored, recoloured, with their masks.

A `View` states everything that decides the pixels apart from the content of the file, so that what is computed from
them can be cached under (content, view).
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from gouache.data import masks
from gouache.data.buckets import Crop, Size
from gouache.data.members import Member, read_bytes, sampled_digest
from gouache.data.record import PictureOptions, Record
from gouache.errors import RequestError, TrainingError, printable
from gouache.images import pixels

SETTING = "data"  # the name of the option that pictures are given for, in messages
COLOR = 0.1  # the largest change of brightness, contrast and saturation, as a share
HUE = 0.02  # the largest change of hue, in turns


@dataclass(frozen=True)
class Examined:
    """What is in the files of a record.

    `digest` is a hash of the picture and its mask; of a picture without a mask it is the SHA-256 of its file. `size` is
    that of the upright picture. `counted` is the share of it, 0 to 1, that its mask lets count; None without a mask.
    """

    digest: str
    size: Size
    counted: float | None = None


@dataclass(frozen=True)
class View:
    """A way to see a picture: `crop` is cut out, then mirrored if `flip`, then recoloured.

    `color` are factors of brightness, contrast and saturation and a shift of the hue in turns. `alpha_mask`: the alpha
    channel is a mask; otherwise the transparent parts of the picture are white.
    """

    crop: Crop
    flip: bool = False
    color: tuple[float, float, float, float] | None = None
    alpha_mask: bool = False

    @property
    def corner(self) -> tuple[int, int]:
        """(left, top) of what is cut out, in the scaled picture as it is seen: mirrored if the view is."""
        left, top = self.crop.offset
        return (self.crop.room[0] - left if self.flip else left), top


def view(crop: Crop, options: PictureOptions, flip: bool, generator: torch.Generator) -> View:
    """The view of `crop` with its random position and colours, as far as `options` ask for them."""
    if options.random_crop:
        left, top = (int(torch.randint(room + 1, (), generator=generator)) for room in crop.room)
        crop = replace(crop, offset=(left, top))
    color = None
    if options.color:
        *factors, hue = (torch.rand(4, generator=generator, dtype=torch.float64) * 2 - 1).tolist()
        color = (*(round(1 + COLOR * factor, 4) for factor in factors), round(HUE * hue, 4))
    return View(crop, flip and options.flip, color, options.alpha_mask)  # type: ignore[arg-type]


def examine(record: Record, known: Mapping[str, Examined] | None = None) -> Examined:
    """The content of the files of `record`. They are decoded once, so that a damaged one is found before it is used.

    `known` are contents that were decoded before, by digest. Nothing is read of a member of a shard that has a digest,
    and its mask is not known. Raises RequestError, also for a mask that is black.
    """
    if isinstance(record.path, Member) and record.path.digest and record.path.size:
        return Examined(record.path.digest, record.path.size)
    data, mask_data = _read(record)
    digest = _digest(record, data, mask_data)
    if known is not None and digest in known:
        return known[digest]
    picture, mask = _decode(record, data, mask_data)
    if mask is None:
        return Examined(digest, picture.size)
    if mask.getbbox() is None:
        raise RequestError(
            "mask",
            f"{printable(str(record.mask or record.path))} is black or transparent everywhere, so nothing of "
            f"{printable(record.name)} would be trained; make white, or opaque, what counts",
        )
    return Examined(digest, picture.size, float(masks.to_tensor(mask).mean()))


def decode(record: Record) -> tuple[Image.Image, Image.Image | None]:
    """The picture of `record`, as `images.pixels.normalise` gives it, and its mask in mode L.

    Raises RequestError if one of its files cannot be read.
    """
    return _decode(record, *_read(record))


def load(record: Record, content: Examined, view: View) -> tuple[Tensor, Tensor | None]:
    """The picture (3, H, W) in [-1, 1] and its mask (1, H, W), 0 to 1, if it has one.

    Raises RequestError if a file cannot be read, TrainingError if it is not the one that `content` describes.
    """
    data, mask = _read(record)
    if _digest(record, data, mask) != content.digest:
        raise TrainingError(
            f"{printable(str(record.path))}: the picture or its mask was changed while it was used for training; "
            "resume the run to train with what is there now"
        )
    picture, picture_mask = _decode(record, data, mask)
    if picture.size != content.size:  # only a shard's pictures are used before they were decoded once
        found = f"{picture.width}x{picture.height} pixels, and {content.size[0]}x{content.size[1]} in its header"
        raise RequestError(SETTING, f"{printable(str(record.path))} has {found}")
    return render(picture, picture_mask, view)


def render(picture: Image.Image, mask: Image.Image | None, view: View) -> tuple[Tensor, Tensor | None]:
    """`picture`, as `decode` gives it, as `view` sees it, with its mask; see `load`."""
    # Under an alpha mask the colours count as they are; white would shine through at soft edges.
    opaque = picture.convert("RGB") if view.alpha_mask else pixels.on_white(picture)
    seen = _recolor(_cut(opaque, view, Image.Resampling.LANCZOS), view)
    cut = None if mask is None else masks.to_tensor(_cut(mask, view, Image.Resampling.BOX))
    return pixels.to_tensor([seen])[0], cut


def _read(record: Record) -> tuple[bytes, bytes | None]:
    data = read_bytes(record.path, SETTING)
    return data, None if record.mask is None else read_bytes(record.mask, "mask")


def _digest(record: Record, data: bytes, mask: bytes | None) -> str:
    if isinstance(record.path, Member) and record.path.digest:
        return sampled_digest(len(data), data, data)
    digest = hashlib.sha256(data)
    if mask is None and not record.picture_options.alpha_mask:
        return digest.hexdigest()
    parts = digest.hexdigest(), record.picture_options.alpha_mask, mask and hashlib.sha256(mask).hexdigest()
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _decode(record: Record, data: bytes, mask: bytes | None) -> tuple[Image.Image, Image.Image | None]:
    picture = pixels.decode(data, str(record.path), SETTING)
    file = None if mask is None else pixels.decode(mask, str(record.mask), "mask")
    return picture, masks.mask_of(picture, record.picture_options.alpha_mask, file, str(record.mask))


def _cut(picture: Image.Image, view: View, filter: Image.Resampling) -> Image.Image:
    crop = view.crop
    (left, top), (width, height) = crop.offset, crop.size
    if picture.size != crop.scaled:
        picture = picture.resize(crop.scaled, filter)
    picture = picture.crop((left, top, left + width, top + height))
    return ImageOps.mirror(picture) if view.flip else picture


def _recolor(picture: Image.Image, view: View) -> Image.Image:
    if view.color is None:
        return picture
    *factors, hue = view.color
    for change, factor in zip((ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color), factors):
        picture = change(picture).enhance(factor)
    h, s, v = picture.convert("HSV").split()
    shift = round(hue * 256)
    return Image.merge("HSV", (h.point([(level + shift) % 256 for level in range(256)]), s, v)).convert("RGB")
