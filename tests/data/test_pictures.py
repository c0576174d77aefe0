"""Pictures as tensors, compared with what Pillow makes of them step by step."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from gouache.data import masks, pictures
from gouache.data.buckets import Buckets, cover
from gouache.data.pictures import Examined, View
from gouache.data.record import PictureOptions, Record
from gouache.errors import RequestError, TrainingError

WIDTH, HEIGHT = 90, 64


def coordinates(width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """A picture whose red is the column and whose green is the row."""
    y, x = np.mgrid[:height, :width]
    return Image.fromarray(np.stack([x, y, 0 * x], -1).astype(np.uint8))


@pytest.fixture
def record(tmp_path: Path) -> Record:
    coordinates().save(tmp_path / "picture.png")
    return Record(tmp_path / "picture.png", "picture.png")


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def load(record: Record, view: View) -> tuple[torch.Tensor, torch.Tensor | None]:
    return pictures.load(record, pictures.examine(record), view)


def levels(picture: torch.Tensor) -> np.ndarray:
    """(3, H, W) in [-1, 1] -> (H, W, 3) of 0 to 255."""
    return ((picture + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("random_crop", [False, True])
def test_a_view_is_the_picture_mirrored_and_then_cut_at_its_corner(record: Record, flip: bool, random_crop: bool):
    options = PictureOptions(flip=True, random_crop=random_crop)
    corners = set()
    for seed in range(200):
        view = pictures.view(cover((WIDTH, HEIGHT), (64, 64)), options, flip, generator(seed))
        left, top = view.corner
        corners.add(view.corner)
        if seed < 5:
            seen = ImageOps.mirror(coordinates()) if flip else coordinates()

            picture, mask = load(record, view)

            assert np.array_equal(levels(picture), np.asarray(seen.crop((left, top, left + 64, top + 64))))
            assert mask is None
    assert corners == ({(left, 0) for left in range(27)} if random_crop else {(13, 0)})


def test_the_corner_of_a_mirrored_picture_is_that_of_the_mirrored_picture():
    crop = cover((91, 64), (64, 64))  # 27 columns do not fit: 13 are cut on the left, 14 on the right

    assert View(crop).corner == (13, 0)
    assert View(crop, flip=True).corner == (14, 0)


def test_a_picture_that_may_not_be_mirrored_is_not():
    assert not pictures.view(cover((90, 64), (64, 64)), PictureOptions(), True, generator()).flip


def test_a_picture_is_scaled_to_cover_its_size(record: Record):
    crop = Buckets((32, 32), step=8).crop((WIDTH, HEIGHT))

    picture, _ = load(record, View(crop))

    left, top = crop.offset
    expected = coordinates().resize(crop.scaled, Image.Resampling.LANCZOS)
    expected = expected.crop((left, top, left + crop.size[0], top + crop.size[1]))
    assert np.array_equal(levels(picture), np.asarray(expected))


def test_colours_vary_slightly_and_repeatably(record: Record):
    Image.new("RGB", (64, 64), (200, 100, 50)).save(record.path)
    crop = cover((64, 64), (64, 64))
    plain, _ = load(record, View(crop))
    seen = []
    for seed in range(20):
        view = pictures.view(crop, PictureOptions(color=True), False, generator(seed))
        picture, _ = load(record, view)

        assert torch.equal(picture, load(record, view)[0])
        assert (picture - plain).abs().max() < 0.5
        seen.append(tuple(levels(picture)[0, 0].tolist()))

    assert len(set(seen)) > 15
    assert np.abs(np.mean(seen, 0) - (200, 100, 50)).max() < 12
    assert pictures.view(crop, PictureOptions(), False, generator()).color is None


def test_transparency_is_white_and_under_an_alpha_mask_the_colour_is_kept(record: Record):
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[..., 0], pixels[:, 32:, 3] = 200, 255
    Image.fromarray(pixels).save(record.path)
    crop = cover((64, 64), (64, 64))

    white, none = load(record, View(crop))
    record = Record(record.path, "", picture_options=PictureOptions(alpha_mask=True))
    kept, mask = load(record, pictures.view(crop, record.picture_options, False, generator()))

    assert none is None
    assert levels(white)[0, 0].tolist() == [255, 255, 255] and levels(white)[0, 63].tolist() == [200, 0, 0]
    assert (levels(kept) == (200, 0, 0)).all()
    assert torch.equal(mask, (torch.arange(64) >= 32).float().expand(1, 64, 64))


def test_a_picture_without_alpha_has_no_alpha_mask(record: Record):
    record = Record(record.path, "", picture_options=PictureOptions(alpha_mask=True))

    assert load(record, View(cover((WIDTH, HEIGHT), (64, 64)), alpha_mask=True))[1] is None


@pytest.mark.parametrize("scale", [1, 2, 3])
def test_a_mask_file_is_cut_and_mirrored_with_its_picture(record: Record, tmp_path: Path, scale: int):
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 0, 30, HEIGHT))
    mask.resize((scale * WIDTH, scale * HEIGHT), Image.Resampling.NEAREST).save(tmp_path / "mask.png")
    record = Record(record.path, "", mask=tmp_path / "mask.png")
    crop = cover((WIDTH, HEIGHT), (64, 64))

    _, plain = load(record, View(crop))
    _, mirrored = load(record, View(crop, flip=True))

    assert torch.equal(plain, (torch.arange(64) < 17).float().expand(1, 64, 64))
    assert torch.equal(mirrored, plain.flip(2))


def test_of_an_alpha_channel_and_a_mask_file_what_both_allow_counts(record: Record, tmp_path: Path):
    picture = Image.new("RGBA", (64, 64), (9, 9, 9, 0))
    picture.paste((9, 9, 9, 255), (0, 0, 64, 32))
    picture.save(record.path)
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    mask.save(tmp_path / "mask.png")
    record = Record(record.path, "", mask=tmp_path / "mask.png", picture_options=PictureOptions(alpha_mask=True))

    _, both = load(record, View(cover((64, 64), (64, 64)), alpha_mask=True))

    assert both is not None and both.sum() == 32 * 32 and both[0, :32, :32].all()


def test_the_content_states_how_much_a_mask_lets_count(record: Record, tmp_path: Path):
    mask = Image.new("L", (WIDTH, HEIGHT))
    mask.paste(255, (0, 0, 30, HEIGHT))
    mask.save(tmp_path / "mask.png")
    assert pictures.examine(record).counted is None
    assert pictures.examine(Record(record.path, "", mask=tmp_path / "mask.png")).counted == pytest.approx(1 / 3)

    Image.new("RGBA", (WIDTH, HEIGHT)).save(record.path)
    clear = Record(record.path, "clear.png", picture_options=PictureOptions(alpha_mask=True))
    with pytest.raises(
        RequestError, match=r"mask: .* transparent everywhere, so nothing of clear\.png would be trained"
    ):
        pictures.examine(clear)
    with pytest.raises(RequestError, match=r"mask.png is black"):
        Image.new("L", (WIDTH, HEIGHT)).save(tmp_path / "mask.png")
        pictures.examine(Record(record.path, "", mask=tmp_path / "mask.png"))


def test_a_mask_of_other_proportions_is_refused(record: Record, tmp_path: Path):
    Image.new("L", (50, 64)).save(tmp_path / "mask.png")
    record = Record(record.path, "", mask=tmp_path / "mask.png")

    with pytest.raises(
        RequestError, match=r"mask: .*mask.png has 50x64 pixels and its picture 90x64; expected the same"
    ):
        pictures.decode(record)


def test_a_mask_on_latents_is_the_share_of_each_cell():
    mask = torch.rand(1, 64, 96, generator=generator())

    assert torch.allclose(masks.to_latent(mask, (8, 12)), mask.reshape(1, 8, 8, 12, 8).mean((2, 4)), atol=1e-6)


def test_a_known_content_is_not_decoded_again(record: Record, monkeypatch: pytest.MonkeyPatch):
    content = pictures.examine(record)
    assert content.size == (WIDTH, HEIGHT)
    monkeypatch.setattr(pictures.pixels, "decode", None)

    assert pictures.examine(record, {content.digest: Examined("known", (1, 2))}) == Examined("known", (1, 2))
    with pytest.raises(TypeError):
        pictures.examine(record, {"another": content})


def test_a_picture_is_turned_as_its_exif_says(record: Record):
    exif = Image.Exif()
    exif[0x0112] = 6
    coordinates().save(record.path, exif=exif)

    assert pictures.examine(record).size == (HEIGHT, WIDTH)


def test_the_content_is_that_of_picture_and_mask(record: Record, tmp_path: Path):
    with_mask = Record(record.path, "", mask=tmp_path / "mask.png")
    Image.new("L", (WIDTH, HEIGHT), 2).save(tmp_path / "mask.png")
    digests = [pictures.examine(record).digest, pictures.examine(with_mask).digest]
    Image.new("L", (WIDTH, HEIGHT), 1).save(tmp_path / "mask.png")
    digests.append(pictures.examine(with_mask).digest)
    picture = coordinates()
    picture.putpixel((3, 3), (0, 0, 0))
    picture.save(record.path)
    digests += [pictures.examine(record).digest, pictures.examine(with_mask).digest]

    alpha = Record(record.path, "", picture_options=PictureOptions(alpha_mask=True))
    digests.append(pictures.examine(alpha).digest)

    assert len(set(digests)) == 6
    assert digests[3] == hashlib.sha256(record.path.read_bytes()).hexdigest()


def test_a_picture_that_was_replaced_is_not_mistaken_for_the_old_one(record: Record):
    content = pictures.examine(record)
    Image.new("RGB", (WIDTH, HEIGHT)).save(record.path)

    with pytest.raises(TrainingError, match=r"picture.png: the picture or its mask was changed while"):
        pictures.load(record, content, View(cover(content.size, (64, 64))))


def test_what_is_not_a_picture_is_refused_in_one_line(record: Record, tmp_path: Path):
    whole = record.path.read_bytes()
    record.path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(RequestError, match=r"data: .*picture.png is not a picture that can be read"):
        pictures.examine(record)

    record.path.write_bytes(b"text")
    with pytest.raises(RequestError, match=r"data: .*picture.png is not a picture that can be read"):
        pictures.examine(record)

    with pytest.raises(RequestError, match="data: there is no file"):
        pictures.examine(Record(tmp_path / "missing.png", ""))

    os.mkfifo(tmp_path / "pipe.png")
    with pytest.raises(RequestError, match="not a regular file"):
        pictures.examine(Record(tmp_path / "pipe.png", ""))
