"""The keyword arguments of `Model.paint` are the fields of `Request`."""

from __future__ import annotations

from dataclasses import fields

from gouache.generate.request import Options, Request


def test_the_options_are_the_fields_of_a_request_except_its_prompt():
    assert Options.__annotations__.keys() == {each.name for each in fields(Request)} - {"prompt"}


def test_a_request_can_be_changed_by_options():
    request = Request(prompt="a cat", steps=7, size=(64, 64))

    changed = request.changed({"steps": 9, "hires": "2"})

    assert (changed.prompt, changed.steps, changed.size, changed.hires) == ("a cat", 9, (64, 64), 2.0)
    assert request.steps == 7
