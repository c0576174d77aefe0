"""Settings given as `key=value` texts, on top of those of a file; also under the names of other trainers."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from pydantic import JsonValue

from gouache.errors import RequestError, printable
from gouache.outside import MalformedText, parse_toml
from gouache.training import aliases
from gouache.training.alias_values import TEXT_RATES, Meaning
from gouache.training.run_settings import keys


def with_overrides(values: Mapping[str, Any], overrides: list[str]) -> dict[str, Any]:
    """`values`, as in the file, with `key=value` texts applied: `train.steps=300`, `rank=8`, `network_dim=8`.

    A key without its table must be unique. Values are TOML; what is not TOML is text. A key alone is a switch that is
    set. Keys of [data] are also added to `data.fixed`. Raises RequestError.
    """
    result = {name: dict(value) if isinstance(value, Mapping) else value for name, value in values.items()}
    named = [_named(text) for text in overrides]
    found = [_meaning(*each, text) for each, text in zip(named, overrides)]
    adapter = result.get("adapter")
    known = {f"adapter.{key}": value for key, value in adapter.items()} if isinstance(adapter, dict) else {}
    for each in (*(each.implied for each in found), *(each.values for each in found)):
        known |= each
    found.append(aliases.together({name: value for name, value, _ in named}, known))
    for each in found:
        _apply(result, each.implied)
    for each in found:
        _apply(result, each.values)
    given = [key.removeprefix("data.") for each in found for key in (*each.implied, *each.values) if key[:5] == "data."]
    if fixing := [name for name in given if name not in ("folder", "fixed")]:
        before = result["data"].get("fixed", [])
        before = before if isinstance(before, list) else [before]
        result["data"]["fixed"] = [*before, *(name for name in dict.fromkeys(fixing) if name not in before)]
    if isinstance(result.get("parts"), dict):
        _make_text_rates_relative(result["parts"], result.get("train"))
    return result


def _named(text: str) -> tuple[str, JsonValue, bool]:
    """(name, value, whether a value is given) of `key=value`; that of a key alone is true."""
    key, sign, value = text.partition("=")
    return key.strip().lstrip("-").replace("-", "_"), _value(value.strip()) if sign else True, bool(sign)


def _meaning(plain: str, parsed: JsonValue, given: bool, text: str) -> Meaning:
    """What `text`, which is `plain` = `parsed`, sets."""
    if (found := aliases.meaning(plain, parsed)) is not None:
        return found
    table, name = _key(text.partition("=")[0].strip())
    if not given:
        raise RequestError("set", f"{printable(text, 80)!r} is not key=value")
    return Meaning({f"{table}.{name}" if table else name: parsed})


def _apply(result: dict[str, Any], values: Mapping[str, Any]) -> None:
    for key, value in values.items():
        table, _, name = key.partition(".")
        if name:
            if not isinstance(result.setdefault(table, {}), dict):
                raise RequestError(table, f"is {printable(repr(result[table]), 40)}; expected a table")
            result[table][name] = value
        else:
            result[table] = value


def _make_text_rates_relative(parts: dict[str, Any], train: Any) -> None:
    """Absolute rates of text encoders become shares of the learning rate, which is known when all are applied."""
    for key, name in zip(TEXT_RATES, ("text_rate", "text_rate_2")):
        absolute = parts.pop(key.partition(".")[2], None)
        if absolute is None:
            continue
        rate = train.get("learning_rate") if isinstance(train, dict) else None
        if not isinstance(rate, int | float) or not isinstance(absolute, int | float) or not rate > 0:
            raise RequestError("text_encoder_lr", "needs train.learning_rate, of which it is a share")
        parts[name] = float(f"{absolute / rate:.9g}")


def _key(text: str) -> tuple[str, str]:
    """(table, key) of a setting's name; the table is "" for those outside tables."""
    text = text.replace("-", "_")
    every = list(keys())
    found = [each for each in every if each == text or each.rpartition(".")[2] == text]
    if text in every:
        found = [text]
    if len(found) != 1:
        known = [*every, *(each.rpartition(".")[2] for each in every), *aliases.names()]
        near = difflib.get_close_matches(text, dict.fromkeys(known), n=3)
        problem = f"is in several tables: {', '.join(found)}" if found else "is not a setting"
        hint = "" if found else f"; did you mean {' or '.join(near)}?" if near else "; see `gouache train new`"
        raise RequestError("set", f"{printable(text, 80)} {problem}{hint}")
    table, _, name = found[0].rpartition(".")
    return table, name


def _value(text: str) -> JsonValue:
    try:
        return parse_toml(f"value = {text}")["value"]
    except (MalformedText, KeyError):
        return text
