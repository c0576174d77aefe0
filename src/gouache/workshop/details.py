"""Details of a file beyond its components: ranks, trigger words, hypernetwork layers, training state.

They come from names, shapes and metadata alone, like all of the report without `--deep`.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gouache.errors import printable
from gouache.families.found import Found
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.adapters import read_adapter, read_embedding, read_hypernetwork, split_names
from gouache.outside import MalformedText, parse_json
from gouache.wording import plural

_MAX_TAGS = 12  # caption tags that a report lists
_MOST_COUNT = 2**40  # of one tag; larger numbers are no counts
_MOST_ITEMS = 16  # items of a stored list that a report shows


@dataclass(frozen=True)
class Detail:
    """A named statement as text, with the evidence for it."""

    name: str
    value: str
    evidence: str


def finite(value: object) -> float | None:
    """`value` as a number for a report; None if it is not a number, or not a finite one."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300 or math.isnan(value):
        return None
    return float(value)


def text_of(value: object) -> str:
    """A value that a file stores, as one printable line; numbers can have any length, and lists any depth."""
    if isinstance(value, str):
        return printable(value)
    if value is None or isinstance(value, bool):
        return str(value)
    if isinstance(value, int | float):
        number = finite(value)
        return str(value) if number is not None and abs(number) < 1e15 else "a number out of range"
    if isinstance(value, list | tuple) and all(finite(each) is not None for each in value):
        listed = ", ".join(text_of(each) for each in value[:_MOST_ITEMS])
        return f"[{listed}{', ...' if len(value) > _MOST_ITEMS else ''}]"
    return f"a {type(value).__name__}"


def details(file: ModelFile, found: Found) -> list[Detail]:
    """The details that apply to this kind of file."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if read_adapter(shapes) is not None:
        return [*_ranks(file), *_training_metadata(file.metadata), *_trigger_details(file.metadata)]
    if read_hypernetwork(shapes) is not None:
        return list(_hypernetwork(file))
    if (embedding := read_embedding(shapes, file.extra)) is not None:
        widths = " and ".join(map(str, embedding.widths.values()))
        return [
            Detail("vectors", str(embedding.vectors), f"each {widths} wide, in {embedding.format} format"),
            *_embedding_trigger(file, embedding.format),
        ]
    return list(_training(file.extra))


_DOWN = (
    ".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".lora_linear_layer.down.weight",
    ".hada_w1_b",
)  # fmt: skip


def _ranks(file: ModelFile) -> Iterator[Detail]:
    suffixes = {name: suffix for name, (_, suffix) in split_names(file).items()}
    ranks = Counter(
        shape[0] for name, suffix in suffixes.items() if suffix in _DOWN and (shape := file.tensors[name].shape)
    )
    if ranks:
        listed = ", ".join(f"{rank} ({plural(count, 'module')})" for rank, count in sorted(ranks.items()))
        yield Detail("rank", listed, "the shapes of the down factors")
    if alpha := file.metadata.get("ss_network_alpha"):
        yield Detail("alpha", printable(alpha), "the metadata states ss_network_alpha")
    if ".lora_mid.weight" in suffixes.values():
        yield Detail("form", "Tucker", "some convolutions have a core tensor, lora_mid")


_TRAINING_KEYS = (
    ("ss_network_module", "made by"),
    ("ss_base_model_version", "base model"),
    ("ss_sd_model_name", "trained on"),
    ("ss_resolution", "resolution"),
    ("ss_clip_skip", "clip skip"),
    ("ss_num_train_images", "images"),
    ("ss_num_epochs", "epochs"),
    ("ss_steps", "steps"),
    ("ss_optimizer", "optimizer"),
    ("ss_learning_rate", "learning rate"),
    ("ss_training_comment", "comment"),
    ("modelspec.usage_hint", "usage"),
    ("modelspec.license", "licence"),
    ("modelspec.author", "author"),
)


def _training_metadata(metadata: Mapping[str, str]) -> Iterator[Detail]:
    for key, name in _TRAINING_KEYS:
        value = metadata.get(key, "")
        if value not in ("", "None"):
            yield Detail(name, printable(value, 120), f"the metadata states {key}")


def _trigger_details(metadata: Mapping[str, str]) -> Iterator[Detail]:
    """The adapter's trigger words, and the most frequent tags of its training captions, as far as they are known."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        yield Detail("trigger words", printable(phrase), "the metadata states modelspec.trigger_phrase")
    counts = tag_counts(metadata)
    if counts:
        listed = ", ".join(f"{printable(tag, 40)} ({count})" for tag, count in counts.most_common(_MAX_TAGS))
        yield Detail("captions", listed, f"the most frequent of {plural(len(counts), 'tag')} in ss_tag_frequency")


def trigger_words(metadata: Mapping[str, str], most: int = 5) -> list[str]:
    """An adapter's trigger words as its author states them, else the most frequent tags of its training captions."""
    if phrase := metadata.get("modelspec.trigger_phrase", "").strip():
        return [printable(phrase, 80)]
    return [printable(tag, 60) for tag, _ in tag_counts(metadata).most_common(most)]


def tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """How often each tag is in the training captions, over all folders; empty if the metadata does not say."""
    try:
        folders = parse_json(metadata.get("ss_tag_frequency", "{}"))
    except MalformedText:
        return Counter()
    counts: Counter[str] = Counter()
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(tag, str) and type(count) is int and 0 < count < _MOST_COUNT:
                counts[tag.strip()] += count
    return counts


def _embedding_trigger(file: ModelFile, form: str) -> Iterator[Detail]:
    name = file.extra.get("name")
    placeholder = next(iter(file), "") if form == "diffusers" else ""
    if placeholder:
        yield Detail("trigger word", printable(placeholder), "the tensor's name; A1111 uses the file's name instead")
    else:
        evidence = f"the file's name, which prompts use; the name stored inside is {text_of(name)}"
        yield Detail("trigger word", printable(file.path.stem), evidence if name else "the file's name")
    for key, title in (("step", "steps"), ("sd_checkpoint_name", "trained on")):
        if isinstance(value := file.extra.get(key), int | str) and value != "":
            yield Detail(title, text_of(value), f"stored in the file: {key}")


def _hypernetwork(file: ModelFile) -> Iterator[Detail]:
    shapes = {name: info.shape for name, info in file.tensors.items()}
    widths = read_hypernetwork(shapes) or (1,)
    yield Detail("widths", ", ".join(map(str, widths)), "for each, a network for keys and one for values")
    structure = file.extra.get("layer_structure")
    first = [shape for name, shape in shapes.items() if name.startswith(f"{widths[0]}.0.") and len(shape) == 2]
    ratios = [round(shape[0] / widths[0], 2) for shape in first]
    evidence = "stored in the file: layer_structure" if structure else "computed from the shapes of its layers"
    yield Detail("layers", text_of(structure or [1, *ratios]), evidence)
    for key, title, absent in (
        ("activation_func", "activation", "linear"), ("is_layer_norm", "layer norm", False),
        ("use_dropout", "dropout", False), ("activate_output", "activates its output", True),
        ("step", "steps", None), ("name", "name", None), ("sd_checkpoint_name", "trained on", None),
    ):  # fmt: skip
        value = file.extra.get(key, absent)
        if value is not None:
            evidence = f"stored in the file: {key}" if key in file.extra else "A1111's default; the file does not say"
            yield Detail(title, text_of(value), evidence)


# ---- training state, from which a run can be resumed


def _training(extra: Mapping[str, Any]) -> Iterator[Detail]:
    states = extra.get("optimizer_states") or extra.get("optimizer") or extra.get("optimizer_state_dict")
    progress = {key: extra[key] for key in ("epoch", "global_step", "step") if isinstance(extra.get(key), int)}
    if progress:
        listed = ", ".join(f"{key} {text_of(value)}" for key, value in progress.items())
        yield Detail("progress", listed, "counters stored next to the weights")
    if metrics := _metrics(extra):
        listed = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        yield Detail("metrics", printable(listed), "scores of the training callbacks")
    for state in states if isinstance(states, list) else [states] if isinstance(states, dict) else []:
        yield from _optimizer(state)
    schedulers = extra.get("lr_schedulers")
    if isinstance(schedulers, list) and schedulers:
        yield Detail("schedules", str(len(schedulers)), "lr_schedulers: the learning rate schedules")


def _optimizer(state: Any) -> Iterator[Detail]:
    if not isinstance(state, dict):
        return
    moments = Counter[str]()
    nbytes = 0
    for entry in state["state"].values() if isinstance(state.get("state"), dict) else ():
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, TensorInfo) and value.elements > 1:
                moments[key if isinstance(key, str) else text_of(key)] += 1
                nbytes += value.nbytes
    listed = state.get("param_groups")
    groups = [group for group in listed if isinstance(group, dict)] if isinstance(listed, list) else []
    algorithm = _optimizer_name(set(moments), groups)
    stored = ", ".join(
        f"{printable(name, 40)} of {plural(count, 'weight')}" for name, count in moments.most_common(_MOST_ITEMS)
    )
    yield Detail("optimizer", f"{algorithm}, {nbytes / 1e6:,.0f} MB", f"its state: {stored or 'no moments'}")
    rates = sorted({rate for group in groups if (rate := finite(group.get("lr"))) is not None})
    if rates:
        some = ", ".join(f"{rate:g}" for rate in rates[:_MOST_ITEMS])
        yield Detail("learning rate", some, f"of {plural(len(groups), 'parameter group')}")


def _optimizer_name(moments: set[str], groups: list[dict[str, Any]]) -> str:
    """The algorithm, from the names of its state. Adam and AdamW have the same; the convention is that AdamW is the one
    with weight decay."""
    decay = max((finite(group.get("weight_decay")) or 0.0 for group in groups), default=0.0)
    if {"exp_avg", "exp_avg_sq"} <= moments:
        return "AdamW" if decay else "Adam or AdamW"
    if {"state1", "state2"} <= moments:
        return "8-bit Adam"
    if moments & {"exp_avg_sq_row", "exp_avg_sq_col"}:
        return "Adafactor"
    if {"s", "p0"} <= moments:
        return "Prodigy"
    if "exp_avg" in moments:
        return "Lion"
    return "SGD with momentum" if "momentum_buffer" in moments else "optimizer without moments" if groups else "unknown"


def _metrics(extra: Mapping[str, Any]) -> dict[str, float]:
    """Scores stored by training callbacks, as far as they are plain numbers."""
    found: dict[str, float] = {}
    stack = [extra.get("callbacks"), extra.get("metrics")]
    while stack:
        top = stack.pop()
        if not isinstance(top, dict):
            continue
        for key, value in top.items():
            if isinstance(key, str) and "score" in key.lower() and (score := finite(value)) is not None:
                found[key] = score
            elif isinstance(value, dict):
                stack.append(value)
    return found
