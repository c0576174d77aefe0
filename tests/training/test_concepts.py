"""Files of prompts: LECO's list, the TOML of kohya's scripts, sliders, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from gouache.errors import GouacheError
from gouache.training.concepts import Concept, identity, read, slider

LECO = """
- target: "van gogh"   # the example of LECO's README
  positive: "van gogh"
  unconditional: ""
  neutral: ""
  action: "erase"
  guidance_scale: 1.0
  resolution: 512
  batch_size: 2
  dynamic_resolution: true
  multiplier: -1.5
  weight: 0.5
- target: oil painting
  unconditional: photo
  action: enhance
  guidance_scale: -4
"""


def file(folder: Path, text: str, name: str = "prompts.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def test_a_list_of_leco(tmp_path: Path):
    assert read(file(tmp_path, LECO)) == [
        Concept("van gogh", "van gogh", "", "", "erase", 1.0, (512, 512), True, False, 2, -1.5, 0.5),
        # positive is target, neutral is unconditional, and the rest has LECO's defaults
        Concept("oil painting", "oil painting", "photo", "photo", "enhance", -4.0),
    ]


def test_toml_of_kohyas_scripts_has_defaults_at_the_top(tmp_path: Path):
    text = """
    guidance_scale = 1.5
    resolution = [768, 512]
    [[prompts]]
    target = "van gogh"
    [[prompts]]
    target = "monet"
    guidance_scale = 2.0
    """
    first, second = read(file(tmp_path, text, "prompts.toml"))
    assert first == Concept("van gogh", "van gogh", guidance=1.5, size=(512, 768))  # [height, width]
    assert (second.target, second.guidance, second.size) == ("monet", 2.0, (512, 768))


SLIDER = {"targets": [{"target_class": "person", "positive": "old person", "negative": "young person",
                       "multiplier": 1.25, "weight": 0.5}], "guidance_scale": 2.0, "resolution": 768}  # fmt: skip


@pytest.mark.parametrize("table", [SLIDER, {"slider": SLIDER}], ids=["top", "slider"])
def test_a_slider_becomes_the_four_concepts_of_kohyas_scripts(table: dict[str, object], tmp_path: Path):
    found = read(file(tmp_path, json.dumps(table), "slider.json"))
    assert [(each.positive, each.unconditional, each.action, each.multiplier) for each in found] == [
        ("young person", "old person", "erase", 1.25),
        ("old person", "young person", "enhance", 1.25),
        ("old person", "young person", "erase", -1.25),
        ("young person", "old person", "enhance", -1.25),
    ]
    assert {(each.target, each.neutral, each.weight, each.guidance, each.size) for each in found} == {
        ("person", "", 0.5, 2.0, (768, 768))
    }


def test_one_prompt_of_a_slider_is_enough(tmp_path: Path):
    (plus, minus) = read(file(tmp_path, "targets: [{target_class: '', negative: blurry, positive: ''}]"))
    assert (plus.positive, plus.action, plus.multiplier) == ("blurry", "erase", 1.0)
    assert (minus.positive, minus.action, minus.multiplier) == ("blurry", "enhance", -1.0)
    assert [each.action for each in slider("", "sharp", "")] == ["enhance", "erase"]


def test_neutral_prompts_and_resolutions_multiply_a_slider(tmp_path: Path):
    file(tmp_path, "studio photo\n\n  cinematic  \n", "neutrals.txt")
    text = """
    neutrals = ["", "photo"]
    neutral_prompt_file = "neutrals.txt"
    resolutions = [512, [512, 768]]
    [[targets]]
    target_class = "person"
    positive = "smiling person"
    [[targets]]
    target_class = "cat"
    positive = "smiling cat"
    neutral = "animal"
    """
    found = read(file(tmp_path, text, "slider.toml"))
    person = [each for each in found if each.target == "person"]
    assert [each.neutral for each in person[::4]] == ["", "photo", "studio photo", "cinematic"]
    assert {each.size for each in person} == {(512, 512), (768, 512)} and len(person) == 16
    assert {each.neutral for each in found if each.target == "cat"} == {"animal"}


def test_the_identity_depends_on_every_field():
    concept = Concept("a", "b")
    others = [Concept("a", "b", neutral="c"), Concept("a", "b", weight=2.0), Concept("a", "b", size=(64, 64))]
    assert len({identity([each]) for each in (concept, *others)}) == 4 and identity([concept]) == identity([concept])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no prompts"),
        ("[]", "has no prompts"),
        ("a: b", "has no prompts"),
        ("- [a", "is not YAML: while parsing a flow sequence at line 1, column 3: - [a ^ expected ',' or ']'"),
        ("prompts_file: p.yaml\nnetwork: {rank: 4}", "prompts_file: is 'p.yaml': this is LECO's configuration"),
        ("- &a {target: x}\n- *a", "aliases"),
        ("- cat", "prompts 1: is 'cat'; expected a table"),
        ("- positive: cat", "prompts 1: has neither target"),
        ("- {target: a}\n- {target: 3}", "prompts 2: target: is 3; expected text"),
        ("- {target: a, guidance: 2}", "unknown key 'guidance'; did you mean guidance_scale"),
        ("- {target: a, action: remove}", "action: 'remove' is not known; use erase or enhance"),
        ("- {target: a, guidance_scale: .inf}", "guidance_scale: is inf; expected a number"),
        ("- {target: a, guidance_scale: yes}", "guidance_scale: is True; expected a number"),
        ("- {target: a, resolution: 500}", "resolution: is 500; expected a side"),
        ("- {target: a, resolution: [512, 512, 3]}", "resolution: is"),
        ("- {target: a, batch_size: 0}", "batch_size: is 0; expected a whole number from 1"),
        ("- {target: a, batch_size: 1.5}", "batch_size: is 1.5"),
        ("- {target: a, multiplier: 0}", "multiplier: is 0"),
        ("- {target: a, weight: -1}", "weight: is -1; expected 0"),
        ("- {target: a, dynamic_resolution: 1}", "dynamic_resolution: is 1; expected true or false"),
        ("targets: cat", "targets: is 'cat'; expected a list"),
        ("targets: [{target_class: a}]", "negative are both missing"),
        ("{targets: [], network: {}}", "unknown key 'network'"),
        ("{targets: [{target_class: a, positive: b}], neutrals: c}", "neutrals: is 'c'; expected a list of texts"),
        ("{targets: [{target_class: a, positive: b}], prompt_file: none.txt}", "none.txt: does not exist"),
        (f"targets: [{{target_class: a, positive: b, neutrals: {['c'] * 501}}}]", "1002 concepts"),
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused_in_one_line(text: str, message: str, tmp_path: Path):
    with pytest.raises(GouacheError) as caught:
        read(file(tmp_path, text))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_another_suffix_is_refused(tmp_path: Path):
    with pytest.raises(GouacheError, match=r"expected \.yaml, \.yml, \.toml, \.json"):
        read(file(tmp_path, LECO, "prompts.txt"))
