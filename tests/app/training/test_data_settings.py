"""Settings that a data set has itself: explicit ones come before them, chosen ones after them; end to end."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from gouache.app.settings import Settings
from gouache.app.training import defaults, prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.objective import text_encoder
from gouache.app.training.opening import opened
from gouache.app.training.prepare import Prepared
from gouache.data.record import CaptionOptions, PictureOptions
from gouache.errors import GouacheError, RequestError
from gouache.training.run_settings import RunSettings, template
from tests.pipelines import Narrow

Choose = Callable[..., RunSettings]
Ready = Callable[..., Any]


def picture(path: Path, size: tuple[int, int] = (64, 64), seed: int = 0, mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], len(mode)), np.uint8)
    Image.fromarray(levels, mode).save(path)
    return path


@pytest.fixture
def choose(narrow: Callable[[str], Narrow], settings: Settings, tmp_path: Path) -> Choose:
    """Settings as `gouache train lora DATA --set ...` chooses them."""

    def make(data: Path, *overrides: str, mode: str = "lora", **options: Any) -> RunSettings:
        usual = ["rank=2", "workers=0", "validation.probe=1", "validation.timesteps=1", "bucket_step=8"]
        return defaults.choose(
            mode, str(data), str(narrow("sd1").file), output=tmp_path / "out.safetensors", settings=settings,
            overrides=[*usual, *overrides], **{"steps": 2, "trigger": "", "class_word": "", **options},
        )  # fmt: skip

    return make


@pytest.fixture
def ready(settings: Settings, tmp_path: Path) -> Ready:
    """The run of settings, prepared; `notes` collects what is reported."""

    def make(chosen: RunSettings, notes: list[str] | None = None) -> Any:
        return prepare.prepared(
            chosen, RunFolder(tmp_path / "run"), settings, on_note=(notes if notes is not None else []).append,
            on_work=lambda what, done, total: None, fill_caches=False,
        )  # fmt: skip

    return make


TOML = """
[general]
shuffle_caption = true
keep_tokens = 1
flip_aug = true

[[datasets]]
resolution = [128, 64]
batch_size = 3
enable_bucket = true
bucket_no_upscale = true
bucket_reso_steps = 16
min_bucket_reso = 32
max_bucket_reso = 160
validation_split = 0.25
validation_seed = 7

  [[datasets.subsets]]
  image_dir = "one"
  num_repeats = 2
  keep_tokens_separator = "|||"
  caption_dropout_rate = 0.5

  [[datasets.subsets]]
  image_dir = "two"
  flip_aug = false
  keep_tokens = 3
  alpha_mask = true
"""


@pytest.fixture
def toml(tmp_path: Path) -> Path:
    for number in range(2):
        picture(tmp_path / "one" / f"{number}.png", seed=number)
        picture(tmp_path / "two" / f"{number}.png", (96, 64), seed=10 + number, mode="RGBA")
        (tmp_path / "one" / f"{number}.txt").write_text("zorb ||| red, green, blue")
    path = tmp_path / "data.toml"
    path.write_text(TOML)
    return path


def test_the_tables_of_a_toml_become_settings_of_the_run(toml: Path, choose: Choose):
    chosen = choose(toml, "bucket_step=16")
    data = chosen.data
    assert data.resolution == ["128x64"]
    assert (data.bucket_min, data.bucket_max, data.buckets, data.upscale) == (32, 160, True, False)
    assert (chosen.train.batch, chosen.validation.share, chosen.validation.seed) == (3, 0.25, 7)


def test_explicit_settings_come_before_those_of_a_toml_and_these_before_chosen_ones(toml: Path, choose: Choose):
    plain, explicit = choose(toml), choose(toml, "train.batch=1", "resolution=64", "upscale=true")
    assert (plain.train.batch, plain.data.upscale) == (3, False)
    assert (explicit.train.batch, explicit.data.resolution, explicit.data.upscale) == (1, [64], True)


def test_the_subsets_of_a_toml_keep_their_options(toml: Path, choose: Choose, ready: Ready):
    chosen = choose(toml, "validation.share=0", "color=true", "caption_prefix=a", "caption_dropout=0.25")
    chosen = chosen.model_copy(update={"data": chosen.data.model_copy(update={"fixed": ["color", "prefix"]})})
    notes = list[str]()
    with ready(chosen, notes) as found:
        rows = {row.record.name: row.record for row in found.batches.rows}
    one, two = rows["one/0.png"], rows["two/0.png"]
    assert one.caption_options == CaptionOptions(
        shuffle=True, keep_tokens=1, keep_tokens_separator="|||", dropout=0.5, prefix="a"
    )
    assert two.caption_options == CaptionOptions(shuffle=True, keep_tokens=3, dropout=0.25, prefix="a")
    assert one.picture_options == PictureOptions(flip=True, color=True)
    assert two.picture_options == PictureOptions(color=True, alpha_mask=True)
    assert (one.repeats, two.repeats) == (2, 1)
    assert any("2 of 4 pictures masked" in note for note in notes)


def test_options_given_for_the_run_replace_those_of_all_subsets(toml: Path, choose: Choose, ready: Ready):
    chosen = choose(toml, "validation.share=0", "flip_aug=false", "keep_tokens=0", "num_repeats=5", "masks=none")
    with ready(chosen) as found:
        records = [row.record for row in found.batches.rows]
    assert not any(each.picture_options.flip or each.picture_options.alpha_mask for each in records)
    assert {each.repeats for each in records} == {5}
    assert {each.caption_options.keep_tokens for each in records} == {0}
    assert {each.caption_options.keep_tokens_separator for each in records} == {"|||", ""}


def test_a_share_of_dropped_captions_that_all_have_belongs_to_the_objective(toml: Path, choose: Choose, ready: Ready):
    toml.write_text(TOML.replace("caption_dropout_rate = 0.5", ""))
    with ready(choose(toml, "caption_dropout=0.25", "validation.share=0")) as found:
        assert found.objective.dropout == 0.25
        assert {row.record.caption_options.dropout for row in found.batches.rows} == {0}
    toml.write_text(TOML)
    with ready(choose(toml, "validation.share=0")) as found:
        assert found.objective.dropout == 0
        assert {row.record.caption_options.dropout for row in found.batches.rows} == {0, 0.5}


def seen_in_an_epoch(found: Prepared) -> Counter[tuple[str, tuple[int, int]]]:
    batches = found.batches
    return Counter(
        (example.row.record.name, example.row.crop.size)
        for number in range(len(batches))
        for example in batches.examples(number)
    )


def test_one_folder_in_two_data_sets_is_seen_at_both_resolutions(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "one/a.png", (128, 128))
    subset = '[[datasets.subsets]]\nimage_dir = "one"\n'
    file = tmp_path / "data.toml"
    file.write_text(f"[[datasets]]\nresolution = 64\n{subset}[[datasets]]\nresolution = 128\n{subset}num_repeats = 2")
    with ready(choose(file)) as found:
        assert seen_in_an_epoch(found) == {("one/a.png", (64, 64)): 1, ("one/a.png", (128, 128)): 2}
    with ready(choose(file, "resolution=96")) as found:
        assert seen_in_an_epoch(found) == {("one/a.png", (96, 96)): 3}


def test_several_resolutions_of_one_picture(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/a.png", (128, 128))
    with ready(choose(tmp_path / "a", "resolution=[64, 96]", "repeats=2")) as found:
        assert seen_in_an_epoch(found) == {("a.png", (64, 64)): 2, ("a.png", (96, 96)): 2}


def test_without_buckets_all_pictures_have_the_resolution(tmp_path: Path, choose: Choose, ready: Ready):
    for number, size in enumerate(((64, 64), (128, 64), (64, 160))):
        picture(tmp_path / "a" / f"{number}.png", size, number)
    with ready(choose(tmp_path / "a", "enable_bucket=false", "resolution=64,96")) as found:
        assert {row.crop.size for row in found.batches.rows} == {(64, 96)}


def test_seven_pictures_of_five_shapes_are_each_seen_exactly_repeats_times(
    tmp_path: Path, choose: Choose, ready: Ready
):
    shapes = ((64, 64), (96, 64), (64, 96), (128, 64), (64, 128), (64, 64), (96, 64))
    for number, size in enumerate(shapes):
        picture(tmp_path / "a" / f"{number}.png", size, number)
    chosen = choose(tmp_path / "a", "train.batch=4", "repeats=3", "resolution=64")
    with ready(chosen) as found:
        batches = found.batches
        for epoch in range(2):
            seen, weights = Counter[str](), Counter[str]()
            for number in range(epoch * len(batches), (epoch + 1) * len(batches)):
                batch = batches(number)
                seen.update(batch.names)
                # What a picture adds to the loss: the mean over its batch, times its weight.
                for name, weight in zip(batch.names, batch.weights.tolist()):
                    weights[name] += weight / len(batch)
                assert len(batch) <= 4 and len({sizes.size for sizes in batch.sizes}) == 1
            assert seen == {f"{number}.png": 3 for number in range(7)}
            assert all(weight == pytest.approx(3 / 4) for weight in weights.values())


def test_epochs_become_steps_of_whole_epochs(tmp_path: Path, choose: Choose, ready: Ready):
    for number, size in enumerate(((64, 64), (64, 64), (64, 64), (128, 64), (64, 128))):
        picture(tmp_path / "a" / f"{number}.png", size, number)
    chosen = choose(tmp_path / "a", "max_train_epochs=3", "train.batch=2", "resolution=64", "num_repeats=2")
    with ready(chosen) as found:
        assert chosen.train.steps == 3 * len(found.batches)


def test_everything_that_depends_on_the_steps_depends_on_those_of_the_epochs(tmp_path: Path, choose: Choose):
    picture(tmp_path / "a/0.png")
    by_epochs = choose(tmp_path / "a", "max_train_epochs=900")
    assert by_epochs.train.steps == 900
    assert by_epochs == choose(tmp_path / "a", steps=900)


def test_epochs_of_a_run_that_exists_are_one_line(tmp_path: Path, choose: Choose):
    picture(tmp_path / "a/0.png")
    (tmp_path / "a.toml").write_text(template(choose(tmp_path / "a")))
    with pytest.raises(RequestError, match=r"epochs: is for new runs.* train\.steps"):
        opened(tmp_path / "a.toml", ["max_train_epochs=3"])


def test_the_rate_is_chosen_by_what_is_trained(tmp_path: Path, choose: Choose):
    picture(tmp_path / "a/0.png")

    def rate(mode: str, *overrides: str) -> float:
        return choose(tmp_path / "a", *overrides, mode=mode, trigger="zorb").train.learning_rate

    low_rank = rate("lora")
    assert rate("dreambooth") == rate("finetune", "form=lora") == low_rank == rate("lora", "form=loha")
    for mode in ("lora", "dreambooth", "finetune"):
        assert 2e-6 / 1e-4 <= rate(mode, "form=none", "rank=16") / low_rank <= 0.1 + 1e-9
    assert rate("finetune", "rank=16") == rate("finetune", "form=none", "rank=16")


@pytest.mark.parametrize("value", ["0", "1.5", "many"])
def test_impossible_epochs_are_one_line(value: str, tmp_path: Path, choose: Choose):
    picture(tmp_path / "a/a.png")
    with pytest.raises(RequestError, match="epochs"):
        choose(tmp_path / "a", f"max_train_epochs={value}")


def test_repeats_in_folder_names_unless_they_are_given(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/4_zorb cat/0.png")
    picture(tmp_path / "a/1_zorb dog/0.png", seed=1)
    with ready(choose(tmp_path / "a")) as found:
        assert {row.record.name: row.record.repeats for row in found.batches.rows} == {
            "4_zorb cat/0.png": 4, "1_zorb dog/0.png": 1,
        }  # fmt: skip
        assert {row.record.captions for row in found.batches.rows} == {("zorb cat",), ("zorb dog",)}
    with ready(choose(tmp_path / "a", "num_repeats=2")) as found:
        assert {row.record.repeats for row in found.batches.rows} == {2}


def test_class_pictures_of_kohyas_folders_are_seen_as_often_as_the_others(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/img/6_zorb cat/0.png")
    for number in range(4):
        picture(tmp_path / "a/reg/1_cat" / f"{number}.png", seed=1 + number)
    with ready(choose(tmp_path / "a")) as found:
        kinds = Counter(
            example.row.record.regularization
            for number in range(len(found.batches))
            for example in found.batches.examples(number)
        )
    assert kinds == {False: 6, True: 6}


def test_other_files_of_captions(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/0.png")
    (tmp_path / "a/0.txt").write_text("not this")
    (tmp_path / "a/0.cap").write_text("this")
    with ready(choose(tmp_path / "a", "caption_extension=.cap")) as found:
        assert found.batches.rows[0].record.captions == ("this",)


def test_captions_are_framed_tagged_and_drawn(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/0.png")
    (tmp_path / "a/0.txt").write_text("a {red|blue} cat\na dog")
    overrides = ["enable_wildcard=true", "caption_prefix=photo of", "caption_suffix=end", "resolution=64"]
    with ready(choose(tmp_path / "a", *overrides, trigger="zorb")) as found:
        texts = {each.caption for number in range(60) for each in found.batches.examples(number)}
    assert texts == {f"photo of zorb, {text} end" for text in ("a red cat", "a blue cat", "a dog")}


def test_the_number_of_tags_grows_with_the_steps(tmp_path: Path, choose: Choose, ready: Ready):
    """kohya's token warm-up: from `min` at the first step to all of them, in proportion."""
    picture(tmp_path / "a/0.png")
    (tmp_path / "a/0.txt").write_text(", ".join("abcdefghi"))
    overrides = ["token_warmup_min=1", "token_warmup_step=0.5", "train.steps=32", "accumulate=2", "resolution=64"]
    with ready(choose(tmp_path / "a", *overrides)) as found:
        counts = [len(found.batches.examples(number)[0].caption.split(", ")) for number in range(0, 64, 2)]
    assert counts == [min(9, 1 + step * 8 // 16) for step in range(32)]


def test_fences_are_not_in_captions_of_validation(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/0.png")
    (tmp_path / "a/0.txt").write_text("zorb ||| red, green")
    overrides = ["keep_tokens_separator=|||", "shuffle=true", "caption_dropout=1", "resolution=64"]
    with ready(choose(tmp_path / "a", *overrides)) as found:
        context = found.validation.probe[0].conditioning.context
        wanted = text_encoder(found.settings, found.model)(["zorb, red, green"], None).context
    assert bool((context == wanted).all())


def test_scores_filter_and_weigh_but_leave_class_pictures_in(tmp_path: Path, choose: Choose, ready: Ready):
    lines = [{"file_name": f"{number}.png", "text": "a", "aesthetic": 4 + number, "punsafe": 0.1 * number}
             for number in range(4)]  # fmt: skip
    for number in range(4):
        picture(tmp_path / "a" / f"{number}.png", seed=number)
    picture(tmp_path / "cats/0.png", seed=9)
    (tmp_path / "a/metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    chosen = choose(
        tmp_path / "a", 'filter=["punsafe<0.25"]', "weigh=aesthetic", f"reg_data_dir={tmp_path / 'cats'}",
        "class_word=cat", "train.batch=1",
    )  # fmt: skip
    with ready(chosen) as found:
        records = [row.record for row in found.batches.rows]
        weights = {each.name: each.weight for each in records if not each.regularization}
        assert weights == pytest.approx({"0.png": 0.8, "1.png": 1.0, "2.png": 1.2})
        assert [each.weight for each in records if each.regularization] == [1.0]


def test_masks_beside_pictures_are_used_when_asked_for_and_said_aloud(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "a/0.png")
    picture(tmp_path / "a/1.png", seed=1)
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :32] = 255
    Image.fromarray(mask).save(tmp_path / "a/0.mask.png")
    for overrides, expected, said in (
        ((), None, "1 picture has a mask beside it that is not used"),
        (("masked_loss=true",), 0.5, "1 of 2 pictures masked: the loss is limited to 50% of their area"),
    ):
        notes = list[str]()
        with ready(choose(tmp_path / "a", *overrides, "train.batch=2", "resolution=64"), notes) as found:
            masks = found.batches(0).mask
            names = found.batches(0).names
        assert any(said in note for note in notes), notes
        if expected is None:
            assert masks is None
        else:
            areas = dict(zip(names, masks.mean((1, 2, 3)).tolist()))
            assert areas == {"0.png": 0.5, "1.png": 1.0}


CONCEPTS: list[dict[str, Any]] = [
    {
        "name": "cats", "path": "one", "balancing": 2.0, "loss_weight": 0.5,
        "image": {"enable_random_flip": False, "enable_crop_jitter": True, "enable_random_rotate": True},
        "text": {"prompt_source": "sample", "enable_tag_shuffling": True, "keep_tags_count": 2},
    },
    {"name": "names", "path": "two", "image": {}, "text": {"prompt_source": "filename"}, "type": "PRIOR_PREDICTION"},
    {"name": "held", "path": "one", "image": {}, "text": {}, "type": "VALIDATION"},
    {"name": "off", "path": "none", "enabled": False, "image": {}, "text": {}},
]  # fmt: skip


def test_concepts_of_onetrainer(tmp_path: Path, choose: Choose, ready: Ready):
    picture(tmp_path / "one/a.png")
    picture(tmp_path / "one/deep/c.png", seed=2)
    (tmp_path / "one/a.txt").write_text("a cat, red\na dog")
    picture(tmp_path / "two/b.png", seed=1)
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps(CONCEPTS))
    notes = list[str]()
    with ready(choose(file), notes) as found:
        rows = {row.record.name: row.record for row in found.batches.rows}
    assert set(rows) == {"one/a.png", "two/b.png"}
    cat, other = rows["one/a.png"], rows["two/b.png"]
    assert (cat.repeats, cat.weight, cat.captions, cat.regularization) == (2, 0.5, ("a cat, red", "a dog"), False)
    assert cat.caption_options == CaptionOptions(shuffle=True, keep_tokens=2, wildcard=True)
    assert cat.picture_options == PictureOptions(random_crop=True)
    assert (other.captions, other.regularization) == (("b",), True)
    assert other.picture_options == PictureOptions(flip=True, random_crop=True)
    said = "\n".join(notes)
    assert "enable_random_rotate: without effect" in said and "a concept for validation" in said


def test_concepts_in_whole_settings_with_prompts_in_one_file_and_explicit_ones_first(
    tmp_path: Path, choose: Choose, ready: Ready
):
    picture(tmp_path / "one/a.png")
    (tmp_path / "prompts.txt").write_text("a cat\na dog\n")
    concept = {"path": "one", "image": {}, "text": {"prompt_source": "concept", "prompt_path": "prompts.txt"}}
    file = tmp_path / "config.json"
    file.write_text(json.dumps({"learning_rate": 1, "concepts": [{**concept, "balancing": 3.0}]}))
    with ready(choose(file, "flip=false", "num_repeats=2", trigger="zorb")) as found:
        (row,) = found.batches.rows
    assert (row.record.captions, row.record.repeats) == (("zorb, a cat", "zorb, a dog"), 2)
    assert not row.record.picture_options.flip and row.record.picture_options.random_crop


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"path": ""}, "has no path"),
        ({"path": "none"}, "does not exist"),
        ({"balancing": "many"}, "balancing is 'many'"),
        ({"text": {"keep_tags_count": -1}}, "expected a number from 0"),
        ({"image": {"enable_resolution_override": True, "resolution_override": "big"}}, "expected pixels"),
        ({"image": 5}, "image is not a table"),
    ],
)
def test_concepts_that_are_wrong_are_one_line(change: dict[str, Any], said: str, tmp_path: Path, choose: Choose):
    picture(tmp_path / "one/a.png")
    file = tmp_path / "concepts.json"
    file.write_text(json.dumps([{"path": "one", "image": {}, "text": {}, **change}]))
    with pytest.raises(GouacheError, match=said) as caught:
        choose(file)
    assert "\n" not in str(caught.value)
