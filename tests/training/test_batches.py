"""Batches: the same for the same number, through caches or not, and nothing in them is out of date."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torch import Tensor

from gouache import Model
from gouache.data import pictures
from gouache.data.buckets import Buckets
from gouache.data.record import PictureOptions, Record
from gouache.errors import RequestError, TrainingError
from gouache.prompts.encode import Sizes, encode
from gouache.training.batch import Batch
from gouache.training.batches import Batches, Options
from gouache.training.denoising import Denoising
from gouache.training.latent_cache import LatentCache, identity_of
from gouache.training.text_cache import TextCache

from .data_sets import BUCKETS, Encoders, batches, change_pixel, data_set, draw, plain_caption, shuffled_caption

EVERYTHING = PictureOptions(flip=True, random_crop=True, color=True)


def tensors(batch: Batch) -> dict[str, Tensor]:
    text = batch.conditioning
    parts = {
        "context": text and text.context,
        "vector": text and text.vector,
        "channels": text and text.concat,
        **{name: getattr(batch, name) for name in ("latents", "concat", "weights", "mask", "regularization")},
    }
    return {name: part for name, part in parts.items() if part is not None}


def same(one: Batch, two: Batch) -> bool:
    first, second = tensors(one), tensors(two)
    texts = [(batch.captions, batch.sizes, batch.names) for batch in (one, two)]
    return (
        texts[0] == texts[1]
        and first.keys() == second.keys()
        and all(torch.equal(first[name], second[name]) for name in first)
    )


def test_seven_pictures_of_five_shapes_are_seen_repeats_times_and_count_the_same(tmp_path: Path):
    records = [replace(record, repeats=1 + row % 3) for row, record in enumerate(data_set(tmp_path))]
    with batches(records, None, batch=4) as source:
        assert len({row.crop.size for row in source.rows}) == 5
        for epoch in range(3):
            seen: Counter[str] = Counter()
            share: Counter[str] = Counter()
            for number in range(epoch * len(source), (epoch + 1) * len(source)):
                batch = source(number)
                seen.update(batch.names)
                assert batch.weights is not None and len(batch) == len(batch.names) <= 4
                # The loss of a batch is the mean over its examples.
                for name, weight in zip(batch.names, (batch.weights / len(batch)).tolist()):
                    share[name] += weight  # type: ignore[assignment]

            assert seen == {record.name: record.repeats for record in records}
            assert all(share[record.name] == pytest.approx(record.repeats / 4) for record in records)


@pytest.mark.parametrize("inpainting", [False, True])
def test_a_batch_is_the_same_with_any_number_of_workers_any_caches_and_any_start(tmp_path: Path, inpainting: bool):
    records = data_set(tmp_path, repeats=3, picture_options=EVERYTHING)
    values: dict[str, Any] = {"caption": shuffled_caption, "inpainting": inpainting, "variations": 3, "seed": 5}
    with batches(records, None, **values) as source:
        expected = [source(number) for number in range(30)]

    for workers in (0, 1, 4):
        for folder in (None, tmp_path / f"cold{workers}", tmp_path / "shared"):
            with batches(records, folder, workers=workers, **values) as source:
                assert all(same(source(number), expected[number]) for number in range(30))
    with batches(records, tmp_path / "shared", workers=2, **values) as source:
        for number in (17, 18, 3, 29, 28, 17):
            assert same(source(number), expected[number])
    with batches(records, None, **(values | {"seed": 6})) as source:
        assert not any(same(source(number), expected[number]) for number in range(30))


def test_a_changed_batch_size_acts_from_its_number_on_and_pictures_count_the_same(tmp_path: Path):
    records = data_set(tmp_path, repeats=3)
    with batches(records, None) as source, batches(records, None, changes=((4, 2),)) as changed:
        assert all(same(source(number), changed(number)) for number in range(4))
        share: Counter[str] = Counter()
        epoch = 0
        for number in range(4, 50):
            batch = changed(number)
            if changed.plan.batch(number)[0] != epoch:
                break
            assert batch.weights is not None and set(batch.weights.tolist()) == {len(batch) / 2}
            share.update(batch.names)
        share.update(name for number in range(4) for name in source(number).names)
    assert share == {record.name: 3 for record in records}


def test_variations_are_drawn_from_few_that_are_the_same_in_every_run(tmp_path: Path):
    records = data_set(tmp_path, repeats=40, picture_options=EVERYTHING)
    seen = []
    for seed in (1, 2):
        with batches(records, None, seed=seed, variations=3) as source:
            seen.append({example.key for number in range(len(source)) for example in source.examples(number)})

    assert seen[0] == seen[1]
    assert len(seen[0]) == 7 * 3 * 2  # mirrored or not


def test_a_picture_is_seen_at_each_of_several_resolutions(tmp_path: Path):
    records = data_set(tmp_path, repeats=2)
    small = Buckets((32, 32), step=8)
    with batches(records, None, buckets=(BUCKETS, small)) as source:
        seen = Counter(
            (name, sizes.size)
            for number in range(len(source))
            for name, sizes in zip(source(number).names, source(number).sizes)
        )

        assert len(seen) == 14 and set(seen.values()) == {2}
        assert {size for _, size in seen} == {row.crop.size for row in source.rows}
        assert all(size in BUCKETS.sizes or size in small.sizes for _, size in seen)
    # A small picture that is not enlarged has the same size twice, and is seen at it once.
    draw(tmp_path / "small.png", (32, 32))
    pair = tuple(Buckets((side, side), step=8, upscale=False) for side in (64, 48))
    with batches([Record(tmp_path / "small.png", "small.png")], None, buckets=pair) as source:
        assert len(source.rows) == 1


def test_the_sizes_of_sdxl_describe_what_is_seen(loaded: Callable[[str], Model], tmp_path: Path):
    """As in diffusers' script: the picture is scaled, mirrored, then cut at the numbers that the network receives."""
    model = loaded("sdxl")
    records = data_set(tmp_path, repeats=8, picture_options=PictureOptions(flip=True, random_crop=True))

    @torch.no_grad()
    def text(texts: list[str], sizes: list[Sizes] | None = None):
        return encode(
            texts, model.tokenizer, model.text_encoders, model.text_recipe, sizes=sizes, pooled_only=sizes is None
        )

    encoders, keys = Encoders(), set()
    for _ in range(2):  # the second time from the caches
        latents = LatentCache(tmp_path / "latents", "vae", encoders.picture)
        source = Batches(
            records,
            Options(buckets=(BUCKETS,), batch=4),
            latents,
            TextCache(tmp_path / "texts", "x", text),
            plain_caption,
            model.text_recipe,
        )
        corners = set()
        with source:
            for number in range(len(source)):
                batch = source(number)
                assert batch.conditioning is not None and batch.conditioning.vector is not None
                expected = text(list(batch.captions), list(batch.sizes))
                torch.testing.assert_close(batch.conditioning.vector, expected.vector, rtol=0, atol=1e-5)
                keys |= {example.key for example in source.examples(number)}
                for row, (name, sizes, example) in enumerate(zip(batch.names, batch.sizes, source.examples(number))):
                    picture = Image.open(tmp_path / name)
                    assert sizes.original == picture.size
                    picture = picture.resize(example.view.crop.scaled, Image.Resampling.LANCZOS)
                    picture = ImageOps.mirror(picture) if example.view.flip else picture
                    left, top = sizes.crop
                    picture = picture.crop((left, top, left + sizes.size[0], top + sizes.size[1]))
                    images = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1
                    assert torch.allclose(Encoders().picture(images)[0], batch.latents[row], atol=1e-6)
                    corners.add((name, sizes.crop, example.view.flip))
        assert len({flip for _, _, flip in corners}) == 2 and len(corners) > 20
    assert len(encoders.pictures) == len(keys)


def test_editing_a_pixel_a_caption_or_the_autoencoder_makes_that_entry_alone_again(tmp_path: Path):
    records = data_set(tmp_path, picture_options=PictureOptions(flip=True))

    def encoded(vae: str = "vae", text: str = "text") -> tuple[int, list[str]]:
        encoders = Encoders()
        with batches(records, tmp_path / "cache", encoders, vae=vae, text=text, batch=1) as source:
            source.prepare(range(20 * len(source)))
        return len(encoders.pictures), encoders.texts

    captions = sorted({"", *(record.captions[0] for record in records)})
    assert (lambda count, texts: (count, sorted(texts)))(*encoded()) == (14, captions)
    assert encoded() == (0, [])
    change_pixel(records[2].path)
    assert encoded() == (2, [])  # and its mirror image
    records[3] = replace(records[3], captions=("another caption",))
    assert encoded() == (0, ["another caption"])
    count, texts = encoded(vae="another")
    assert (count, texts) == (14, [])
    count, texts = encoded(text="another")
    assert (count, len(texts)) == (0, 8)
    Image.new("L", (64, 64), 128).save(tmp_path / "mask.png")
    records[0] = replace(records[0], mask=tmp_path / "mask.png")
    assert encoded() == (2, [])
    change_pixel(tmp_path / "mask.png")
    assert encoded() == (2, [])
    assert encoded() == (0, [])


def test_the_loss_through_the_caches_is_that_without_them(loaded: Callable[[str], Model], tmp_path: Path):
    """And that of pictures and captions that are encoded without any of this code."""
    model = loaded("sd1")
    records = data_set(tmp_path, repeats=2, picture_options=PictureOptions(flip=True))
    objective = Denoising(model.denoiser, {"unet": model.unet}, model.encode_prompts([""]), seed=3, dropout=0.3)
    vae = identity_of({"vae": model.vae}, scale=model.latent_scale)

    def source(folder: Path | None) -> Batches:
        latents = LatentCache(folder and folder / "latents", vae, model.encode)
        texts = TextCache(folder and folder / "texts", identity_of(model.text_encoders), model.encode_prompts)
        return Batches(records, Options((BUCKETS,), batch=4), latents, texts, plain_caption)

    def by_hand(batches: Batches, number: int) -> Batch:
        images = []
        for example in batches.examples(number):
            crop, (left, top) = example.view.crop, example.view.crop.offset
            picture = Image.open(example.row.record.path).resize(crop.scaled, Image.Resampling.LANCZOS)
            picture = picture.crop((left, top, left + crop.size[0], top + crop.size[1]))
            pixels = np.array(ImageOps.mirror(picture) if example.view.flip else picture)
            images.append(torch.from_numpy(pixels).permute(2, 0, 1).float() / 127.5 - 1)
        captions = [example.row.record.captions[0] for example in batches.examples(number)]
        # One by one and contiguous: the random weights of a narrow network make a last bit visible in the loss.
        latents = torch.cat([model.encode(image[None]) for image in images]).contiguous()
        weights = torch.full((len(images),), len(images) / 4)  # a short batch counts by its size
        return Batch(latents, model.encode_prompts(captions), weights=weights)

    with torch.no_grad(), source(None) as plain, source(tmp_path / "cache") as cached:
        cached.prepare(range(12))
        for number in range(12):
            expected = float(objective.losses(plain(number), number)["loss"])
            assert abs(float(objective.losses(cached(number), number)["loss"]) - expected) <= 1e-6
            assert abs(float(objective.losses(by_hand(plain, number), number)["loss"]) - expected) <= 1e-6


def test_after_preparing_no_encoder_is_used_and_shuffle_and_dropout_still_work(tmp_path: Path):
    records = data_set(tmp_path, repeats=5, picture_options=EVERYTHING)
    values: dict[str, Any] = {"caption": shuffled_caption, "inpainting": True, "variations": 2, "workers": 2}
    progress: list[tuple[int, int]] = []
    with batches(records, tmp_path / "cache", **values) as source:
        source.prepare(range(40), lambda done, total: progress.append((done, total)))
    assert progress == [(done, len(progress)) for done in range(1, len(progress) + 1)]

    encoders = Encoders()
    with batches(records, tmp_path / "cache", encoders, **values) as source:
        captions = {caption for number in range(40) for caption in source(number).captions}

    assert not encoders.pictures and not encoders.texts
    assert "" in captions and len(captions) > 30


def test_what_the_caches_will_take_is_known_beforehand(tmp_path: Path):
    records = data_set(tmp_path, repeats=5, picture_options=EVERYTHING)
    records[0] = replace(records[0], picture_options=replace(EVERYTHING, alpha_mask=True))
    Image.new("RGBA", (64, 64), (9, 9, 9, 99)).save(records[0].path)
    chunk = 77 * 6 * 4 + 5 * 4
    with batches(
        records, tmp_path / "cache", Encoders(words=99), inpainting=True, variations=2, caption=shuffled_caption
    ) as source:
        before = source.needs(range(30), chunk)
        source.prepare(range(30))
        after = source.needs(range(30), chunk)

    latents = list((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    texts = list((tmp_path / "cache" / "texts").rglob("*.safetensors"))
    assert before.latents == before.missing_latents == len(latents) > 50
    assert before.texts == before.missing_texts > 20
    assert replace(before, missing_latents=0, missing_texts=0) == after
    assert sum(path.stat().st_size for path in latents) == pytest.approx(before.latent_bytes, rel=0.1)
    assert sum(path.stat().st_size for path in texts) == pytest.approx(before.text_bytes, rel=0.2)
    assert before.bytes == before.latent_bytes + before.text_bytes


def test_masks_follow_their_pictures(tmp_path: Path):
    records = data_set(tmp_path, picture_options=PictureOptions(flip=True))
    half = Image.new("L", (64, 64))
    half.paste(255, (0, 0, 20, 64))
    half.save(tmp_path / "mask.png")
    draw(tmp_path / "plain.png", (64, 64))
    pair = [replace(records[0], mask=tmp_path / "mask.png"), Record(tmp_path / "plain.png", "plain.png")]
    cells = torch.tensor([1, 1, 0.5, 0, 0, 0, 0, 0])
    flips = set()
    for folder in (None, tmp_path / "cache", tmp_path / "cache"):
        with batches(pair, folder) as source:
            for number in range(8):
                batch = source(number)
                assert batch.mask is not None and batch.mask.shape == (2, 1, 8, 8)
                for name, mask, example in zip(batch.names, batch.mask, source.examples(number)):
                    expected = cells.flip(0) if example.view.flip else cells
                    expected = expected if name == "0.png" else torch.ones(8)
                    assert torch.allclose(mask, expected.expand(1, 8, 8), atol=1e-6)
                    flips.add(example.view.flip)
    assert flips == {True, False}
    with batches([records[0]], None) as source:
        assert source(0).mask is None


def test_a_batch_of_an_inpainting_model_has_mask_and_masked_latent(tmp_path: Path):
    records = data_set(tmp_path, repeats=10)
    with batches(records, tmp_path / "cache", inpainting=True, variations=40) as source:
        covered = []
        for number in range(len(source)):
            batch = source(number)
            assert batch.concat is None and batch.conditioning is not None
            concat = batch.conditioning.concat
            assert concat is not None and concat.shape == (len(batch), 5, *batch.latents.shape[2:])
            for mask, kept, latents in zip(concat[:, 0], concat[:, 1:], batch.latents):
                if not mask.any():
                    assert torch.equal(kept, latents)
                if mask.all():
                    assert not kept.any()
                covered.append(float(mask.mean()))
        assert 0.0 in covered and 1.0 in covered and len(set(covered)) > 15
    with batches(records, None, text=None, inpainting=True) as source:
        batch = source(0)
        assert batch.conditioning is None and batch.concat is not None and batch.concat.shape[1] == 5


def test_captions_are_left_to_a_text_encoder_that_is_trained(tmp_path: Path):
    with batches(data_set(tmp_path), None, text=None) as source:
        batch = source(0)

    assert batch.conditioning is None
    assert len(batch.captions) == len(batch.sizes) == len(batch)
    assert all(name.removesuffix(".png") in caption for name, caption in zip(batch.names, batch.captions))


def test_class_pictures_are_marked_and_weighted_and_as_many_as_others(tmp_path: Path):
    records = [
        replace(record, repeats=4 if row < 2 else 1, regularization=row >= 2, weight=0.5 if row == 1 else 1.0)
        for row, record in enumerate(data_set(tmp_path))
    ]
    marks: Counter[bool] = Counter()
    with batches(records, None) as source:
        for number in range(len(source)):
            batch = source(number)
            assert batch.regularization is not None and batch.weights is not None
            marks.update(batch.regularization.tolist())
            for name, kind, weight in zip(batch.names, batch.regularization.tolist(), batch.weights.tolist()):
                assert kind == (name not in ("0.png", "1.png"))
                assert weight == len(batch) / 4 * (0.5 if name == "1.png" else 1)
    assert marks == {True: 8, False: 8}
    with batches(records, None, balance=False) as source:
        assert source.plan.examples == 8 + 5


def test_the_identity_changes_with_what_examples_depend_on_and_nothing_else(tmp_path: Path):
    records = data_set(tmp_path)

    def identity(records: list[Record] = records, **values: Any) -> str:
        with batches(records, None, **values) as source:
            return source.identity

    def changed(**values: Any) -> str:
        return identity([replace(records[0], **values), *records[1:]])

    first = identity()
    assert first == identity(batch=2, seed=7, workers=2)
    moved = [replace(record, path=record.path.rename(tmp_path / f"new{record.name}")) for record in records]
    assert first == identity([replace(record, name="x") for record in moved])
    records[:] = moved
    others = [
        changed(captions=("a",)),
        changed(repeats=2),
        changed(weight=0.5),
        changed(regularization=True),
        changed(picture_options=EVERYTHING),
        changed(caption_options=replace(records[0].caption_options, shuffle=True)),
        identity(records[1:]),
        identity(records[::-1]),
        identity(vae="another"),
        identity(text="another"),
        identity(text=None),
        identity(inpainting=True),
        identity(variations=2),
        identity(buckets=(BUCKETS, Buckets((32, 32), step=8))),
    ]
    change_pixel(records[6].path)
    others.append(identity())
    assert len({first, *others}) == len(others) + 1


def test_a_picture_that_is_replaced_during_a_run_stops_it(tmp_path: Path):
    records = data_set(tmp_path)[:1]
    with batches(records, tmp_path / "cache") as source:
        draw(records[0].path, (64, 64), seed=9)

        with pytest.raises(TrainingError, match=r"0\.png: the picture or its mask was changed"):
            source(0)


@pytest.mark.parametrize("workers", [0, 3])
def test_a_data_set_that_cannot_be_used_is_refused_before_anything_is_encoded(tmp_path: Path, workers: int):
    records = data_set(tmp_path)
    records[4].path.write_bytes(records[4].path.read_bytes()[:-100])

    with pytest.raises(RequestError, match=r"4\.png is not a picture that can be read"):
        batches(records, tmp_path / "cache", workers=workers)
    with pytest.raises(RequestError, match="data: has no pictures"):
        batches([], None, workers=workers)
    with pytest.raises(RequestError, match="bucket_step: is 4; expected a multiple of 8"):
        batches(records[:1], None, buckets=(Buckets((64, 64), step=4),))


def test_a_second_start_decodes_no_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = data_set(tmp_path, picture_options=PictureOptions(flip=True))
    with batches(records, tmp_path / "cache") as source:
        source.prepare(range(30))
        expected = source(7)
    monkeypatch.setattr(pictures.pixels, "decode", None)

    with batches(records, tmp_path / "cache", workers=2) as source:
        assert same(source(7), expected)


def test_the_time_spent_waiting_is_measured_and_workers_save_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    records = data_set(tmp_path, repeats=3)
    load = pictures.load

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return load(*arguments)

    monkeypatch.setattr(pictures, "load", slow)
    waited = {}
    for workers in (0, 2):
        with batches(records, None, workers=workers, batch=1) as source:
            for number in range(10):
                source(number)
                time.sleep(0.04)  # the step
            waited[workers] = source.waited

    assert 0.2 <= waited[0] < 2
    assert waited[2] < waited[0] / 2
