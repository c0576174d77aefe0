"""What there is to say of a file beyond its parts: ranks and words, layers, the state of a training.

From names, shapes and metadata alone, like everything that is said without `--deep`.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from gouache.errors import printable
from gouache.families.found import Found
from gouache.files.record import ModelFile, TensorInfo
from gouache.layouts.adapters import read_adapter, read_embedding, read_hypernetwork, suffix_of

_MOST_WORDS = 12


@dataclass(frozen=True)
class Detail:
    """A statement under its name, in words, with where it stands."""

    name: str
    value: str
    evidence: str


def details(file: ModelFile, found: Found) -> list[Detail]:
    """What is particular to the kind of file that this is."""
    shapes = {name: info.shape for name, info in file.tensors.items()}
    if read_adapter(shapes) is not None:
        return [*_ranks(file), *_trained(file.metadata), *_words(file.metadata)]
    if read_hypernetwork(shapes) is not None:
        return list(_hypernetwork(file))
    if (embedding := read_embedding(shapes, file.extra)) is not None:
        widths = " and ".join(map(str, embedding.widths.values()))
        return [
            Detail("vectors", str(embedding.vectors), f"each {widths} wide, in the form {embedding.format}"),
            *_embedding_words(file, embedding.format),
        ]
    return list(_training(file.extra))


def _ranks(file: ModelFile) -> Iterator[Detail]:
    downs = (".lora_down.weight", ".lora_A.weight", ".lora.down.weight", "_lora.down.weight", ".hada_w1_b")
    ranks = Counter(info.shape[0] for name, info in file.tensors.items() if name.endswith(downs) and info.shape)
    if ranks:
        told = ", ".join(f"{rank} ({count} modules)" for rank, count in sorted(ranks.items()))
        yield Detail("rank", told, "the shapes of its inner factors")
    if alpha := file.metadata.get("ss_network_alpha"):
        yield Detail("alpha", printable(alpha), "the metadata says ss_network_alpha")
    if any(suffix_of(name) == ".lora_mid.weight" for name in file):
        yield Detail("form", "Tucker", "some of its convolutions have a core, lora_mid")


_SAID = (
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


def _trained(metadata: Mapping[str, str]) -> Iterator[Detail]:
    for key, name in _SAID:
        value = metadata.get(key, "")
        if value not in ("", "None"):
            yield Detail(name, printable(value, 120), f"the metadata says {key}")


def _words(metadata: Mapping[str, str]) -> Iterator[Detail]:
    """The words that call the adapter up: stated, or those that its training captions used most."""
    if phrase := metadata.get("modelspec.trigger_phrase"):
        yield Detail("trigger words", printable(phrase), "the metadata says modelspec.trigger_phrase")
    counts = tag_counts(metadata)
    if counts:
        told = ", ".join(f"{printable(word, 40)} ({count})" for word, count in counts.most_common(_MOST_WORDS))
        yield Detail("captions", told, f"the commonest of {len(counts)} tags in ss_tag_frequency")


def trigger_words(metadata: Mapping[str, str], most: int = 5) -> list[str]:
    """What calls an adapter up: the words that its author states, else the commonest tags of its training captions."""
    if phrase := metadata.get("modelspec.trigger_phrase", "").strip():
        return [printable(phrase, 80)]
    return [printable(word, 60) for word, _ in tag_counts(metadata).most_common(most)]


def tag_counts(metadata: Mapping[str, str]) -> Counter[str]:
    """How often the training captions used each tag, all folders together; empty where it is not said."""
    try:
        folders = json.loads(metadata.get("ss_tag_frequency", "{}"))
    except (ValueError, RecursionError):
        return Counter()
    counts: Counter[str] = Counter()
    for folder in folders.values() if isinstance(folders, dict) else ():
        for tag, count in folder.items() if isinstance(folder, dict) else ():
            if isinstance(tag, str) and type(count) is int and count > 0:
                counts[tag.strip()] += count
    return counts


def _embedding_words(file: ModelFile, form: str) -> Iterator[Detail]:
    name = file.extra.get("name")
    placeholder = next(iter(file), "") if form == "diffusers" else ""
    if placeholder:
        yield Detail("trigger word", printable(placeholder), "the tensor is called so; A1111 takes the file's name")
    else:
        evidence = f"embeddings are called up by their file's name; inside, it is called {printable(str(name))}"
        yield Detail("trigger word", printable(file.path.stem), evidence if name else "the file's name")
    for key, title in (("step", "steps"), ("sd_checkpoint_name", "trained on")):
        if isinstance(value := file.extra.get(key), int | str) and value != "":
            yield Detail(title, printable(str(value)), f"the file says {key}")


def _hypernetwork(file: ModelFile) -> Iterator[Detail]:
    shapes = {name: info.shape for name, info in file.tensors.items()}
    widths = read_hypernetwork(shapes) or (1,)
    yield Detail("widths", ", ".join(map(str, widths)), "a pair of networks, for keys and values, for each")
    structure = file.extra.get("layer_structure")
    first = [shape for name, shape in shapes.items() if name.startswith(f"{widths[0]}.0.") and len(shape) == 2]
    counted = [round(shape[0] / widths[0], 2) for shape in first]
    evidence = "the file says layer_structure" if structure else "counted from the shapes of its layers"
    yield Detail("layers", str(structure or [1, *counted]), evidence)
    for key, title, absent in (
        ("activation_func", "activation", "linear"), ("is_layer_norm", "layer norm", False),
        ("use_dropout", "dropout", False), ("activate_output", "activates its output", True),
        ("step", "steps", None), ("name", "name", None), ("sd_checkpoint_name", "trained on", None),
    ):  # fmt: skip
        value = file.extra.get(key, absent)
        if value is not None:
            said = f"the file says {key}" if key in file.extra else "what A1111 takes where the file does not say"
            yield Detail(title, printable(str(value)), said)


# ---- a training that can go on


def _training(extra: Mapping[str, Any]) -> Iterator[Detail]:
    states = extra.get("optimizer_states") or extra.get("optimizer") or extra.get("optimizer_state_dict")
    progress = {key: extra[key] for key in ("epoch", "global_step", "step") if isinstance(extra.get(key), int)}
    if progress:
        told = ", ".join(f"{key} {value}" for key, value in progress.items())
        yield Detail("progress", told, "counters beside the weights")
    if metrics := _metrics(extra):
        told = ", ".join(f"{name} {value:g}" for name, value in metrics.items())
        yield Detail("metrics", printable(told), "the callbacks' scores")
    for state in states if isinstance(states, list) else [states] if isinstance(states, dict) else []:
        yield from _optimizer(state)
    schedulers = extra.get("lr_schedulers")
    if isinstance(schedulers, list) and schedulers:
        yield Detail("schedules", str(len(schedulers)), "lr_schedulers: how the learning rate goes on")


def _optimizer(state: Any) -> Iterator[Detail]:
    if not isinstance(state, dict):
        return
    moments = Counter[str]()
    nbytes = 0
    for entry in state["state"].values() if isinstance(state.get("state"), dict) else ():
        for key, value in entry.items() if isinstance(entry, dict) else ():
            if isinstance(value, TensorInfo) and value.elements > 1:
                moments[str(key)] += 1
                nbytes += value.nbytes
    groups = [group for group in state.get("param_groups") or [] if isinstance(group, dict)]
    kind = _kind_of_optimizer(set(moments), groups)
    kept = ", ".join(f"{name} of {count}" for name, count in moments.items()) or "no moments"
    yield Detail("optimizer", f"{kind}, {nbytes / 1e6:,.0f} MB", f"it keeps {kept} weights")
    rates = sorted({group["lr"] for group in groups if isinstance(group.get("lr"), int | float)})
    if rates:
        told = ", ".join(f"{rate:g}" for rate in rates)
        yield Detail("learning rate", told, f"of {len(groups)} groups of parameters")


def _kind_of_optimizer(moments: set[str], groups: list[dict[str, Any]]) -> str:
    """By what it remembers; Adam and AdamW remember the same, and by convention differ in their weight decay."""
    decay = max((g["weight_decay"] for g in groups if isinstance(g.get("weight_decay"), int | float)), default=0)
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
    return (
        "SGD with momentum" if "momentum_buffer" in moments else "an optimizer without moments" if groups else "unknown"
    )


def _metrics(extra: Mapping[str, Any]) -> dict[str, float]:
    """Scores that callbacks of a training keep, as far as they are plain numbers."""
    found: dict[str, float] = {}
    stack = [extra.get("callbacks"), extra.get("metrics")]
    while stack:
        top = stack.pop()
        if not isinstance(top, dict):
            continue
        for key, value in top.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and "score" in str(key).lower():
                found[str(key)] = float(value)
            elif isinstance(value, dict):
                stack.append(value)
    return found
