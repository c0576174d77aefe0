"""A run's weights as a file that other tools read, with what the file says of its run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from gouache.app.settings import Settings
from gouache.app.training import lineage, prepare, sliders
from gouache.app.training.batches import measured_pictures
from gouache.app.training.folder import RunFolder
from gouache.app.training.parts import make_target
from gouache.app.training.prepare import Prepared
from gouache.errors import FileError, RequestError, TrainingError, printable
from gouache.families.found import Found
from gouache.files.write import write_atomic
from gouache.outside import MalformedText, parse_json, read_text
from gouache.prompts.grammar import escape
from gouache.training import state
from gouache.training.concept_objective import ConceptObjective
from gouache.training.pretraining.target import AutoencoderTarget
from gouache.training.run_settings import RunSettings
from gouache.training.state import State
from gouache.training.target import Target
from gouache.training.targets.export import FORMS_OF_MODELS, NAMES, Averages
from gouache.version import __version__
from gouache.workshop import save
from gouache.workshop.derive import DTYPES

WEIGHTS = ("ema", "last", "both")
FORMS = ("adapter", *FORMS_OF_MODELS)
SUFFIXES: Mapping[str, tuple[str, ...]] = {
    "adapter": (".safetensors",),
    "embedding": (".safetensors", ".pt"),
    "hypernetwork": (".pt",),
}


@dataclass(frozen=True)
class Choice:
    """What becomes a file: `weights` "ema", "last" or "both"; `form`, of FORMS; `names` of an adapter."""

    weights: str
    form: str
    names: str


def export(
    run: RunFolder,
    output: Path,
    user: Settings,
    *,
    step: str = "last",
    weights: str = "",
    form: str = "",
    names: str = "kohya",
    overwrite: bool = False,
    on_note: Callable[[str], None] | None = None,
) -> int:
    """Write the checkpoint `step` (a number, best or last) of a run as the file `output`; returns its step.

    `weights`: the averages (ema), the last weights, or both; "" chooses the averages where they are kept. `form`:
    adapter, full, pruned or pruned-emaonly; "" chooses by what was trained. The run may be training meanwhile; the
    model is loaded on the CPU. Raises GouacheError, before any weight is read for what does not go together.
    """
    note = on_note or (lambda line: None)
    settings = run.settings()
    number = find_step(run, step)
    choice = choose(settings, run.has_averages(number), output, weights=weights, form=form, names=names)
    check_output(choice, output, overwrite)
    checkpoint = read_checkpoint(run, number, newest=step == "last", on_note=note)
    loaded = _on_cpu(settings, user, bakes=choice.form != "adapter")
    model = prepare.load_model(loaded, user, note)
    target = make_target(loaded, model, user)
    try:
        if isinstance(target, AutoencoderTarget):
            target.pictures = measured_pictures(loaded, run, model, target, user, note)
        write(target, settings, checkpoint, choice, output, metadata=read_metadata(run), overwrite=overwrite)
    finally:
        target.detach()
    if said := note_on_name(settings, output):
        note(said)
    return checkpoint.step


def note_on_name(settings: RunSettings, output: Path) -> str:
    """What prompts say for an embedding whose file is not named like its word, "" otherwise."""
    if settings.result != "embedding" or output.stem.casefold() == settings.data.trigger.casefold():
        return ""
    return f"programs know an embedding by the name of its file: prompts say {printable(escape(output.stem))}"


def _on_cpu(settings: RunSettings, user: Settings, bakes: bool) -> RunSettings:
    """The settings of a model that is loaded to be exported; if an adapter is baked into it, in the file's dtype."""
    memory = settings.memory
    if bakes and settings.result == "adapter":
        memory = memory.model_copy(update={"dtype": _stored(prepare.check_model(settings, user)[1]) or "fp32"})
    return settings.model_copy(update={"device": "cpu", "memory": memory})


def _stored(found: Found) -> str | None:
    """The dtype of the U-Net in its file; None for one that weights are not written in."""
    code = found.component("unet").dtype.value
    return next((name for name, each in DTYPES.items() if each == code), None)


def find_step(run: RunFolder, step: str) -> int:
    """The number of the checkpoint `step`. Raises RequestError or TrainingError if there is none."""
    steps, shown = run.steps(), printable(str(run.path))
    if not steps:
        raise TrainingError(f"{shown} has no checkpoint yet; go on with it: gouache train run {shown}")
    if step == "last":
        return steps[-1]
    if step != "best" and not step.isdecimal():
        raise RequestError("step", f"{printable(step, 40)!r} is not known; use a number, best or last")
    number = run.best_step() if step == "best" else int(step)
    if number in steps:
        return number
    if step == "best":
        found = "no validation yet" if number < 0 else f"the best at step {number}, whose checkpoint was not kept"
        raise RequestError("step", f"{shown} has {found}; use {', '.join(map(str, steps))} or last")
    raise RequestError("step", f"{step} has no checkpoint; there are those of step {', '.join(map(str, steps))}")


def choose(
    settings: RunSettings, averages: bool, output: Path, *, weights: str = "", form: str = "", names: str = "kohya"
) -> Choice:
    """What the options mean for a run with or without `averages`. Raises RequestError if they do not go together."""
    _known("weights", weights, ("", *WEIGHTS))
    _known("form", form, ("", *FORMS))
    _known("names", names, NAMES)
    if not averages and (weights in ("ema", "both") or form == "pruned-emaonly"):
        setting, value = ("weights", weights) if weights in ("ema", "both") else ("form", form)
        raise RequestError(setting, f"{value} needs averages, and this checkpoint has none; use last weights")
    if form == "pruned-emaonly" and weights in ("last", "both"):
        raise RequestError("form", f"pruned-emaonly has the averages alone, not {weights} weights; use pruned")
    result = settings.result
    if result != "model":
        if weights == "both":
            raise RequestError("weights", f"both is for trained weights; an {result} holds one kind: use ema or last")
        if form not in ("", "adapter") and (result != "adapter" or settings.embedding.vectors):
            raise RequestError("form", f"{form} is a file of a model, which cannot hold an embedding; use adapter")
        form, weights = form or "adapter", "ema" if averages and weights != "last" else "last"
    elif form == "adapter":
        raise RequestError(
            "form", "adapter: this run trained the weights themselves; `gouache lora extract` makes a LoRA of its file"
        )
    if names != "kohya" and form == "adapter" and result == "adapter" and settings.embedding.vectors:
        raise RequestError("names", f"{names} has no embeddings, and this LoRA has one; use kohya, which bundles it")
    if names != "kohya" and (form != "adapter" or result != "adapter"):
        raise RequestError("names", f"{names} is for LoRAs and other adapters alone; leave it out")
    if result == "model":
        usual = {"full": "both", "pruned": "both" if form else "ema"}
        weights = (weights or usual.get(form or "pruned", "ema")) if averages else "last"
        form = form or ("pruned-emaonly" if weights == "ema" else "pruned")
    if form != "adapter":
        save.single_form_of(output)
    elif names == "peft" and output.suffix:
        raise RequestError("output", f"{save.shown(output)} has a suffix; PEFT's adapters are folders, name one")
    elif names != "peft" and output.suffix.lower() not in SUFFIXES[result]:
        raise RequestError("output", f"{save.shown(output)} does not end in {' or '.join(SUFFIXES[result])}")
    return Choice(weights, form, names)


def _known(setting: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise RequestError(setting, f"{printable(value, 40)!r} is not known; use {', '.join(filter(None, known))}")


def check_output(choice: Choice, output: Path, overwrite: bool) -> None:
    """Before any work: raises RequestError if `output` exists, FileError if it cannot be written."""
    if choice.names != "peft":
        save.check_target(output, overwrite)
    elif output.exists() and not (overwrite and output.is_dir()):
        raise RequestError("output", f"{save.shown(output)} already exists; choose another name, or add --overwrite")


def read_checkpoint(run: RunFolder, number: int, *, newest: bool, on_note: Callable[[str], None]) -> State:
    """The checkpoint of step `number`; with `newest` the newest one that is not damaged. Raises TrainingError."""
    if not newest:
        return state.read(run.checkpoint(number))
    found = None
    for attempt in range(3):
        try:
            found = state.newest(
                run.path, on_note=lambda line: on_note(line.replace("the run goes on from", "used is"))
            )
            break
        except TrainingError:  # a run that is training may have removed the one that was read
            if attempt == 2 or run.steps()[-1:] == [number]:
                raise
    if found is None:
        raise TrainingError(f"{printable(str(run.path))} has no checkpoint any more")
    return found


def write(
    target: Target,
    settings: RunSettings,
    checkpoint: State,
    choice: Choice,
    output: Path,
    *,
    metadata: Mapping[str, str],
    overwrite: bool = False,
) -> None:
    """Write the weights of `checkpoint` as `output`. The model of `target` has the baked weights afterwards."""
    last = checkpoint.tensors["weights"]
    averages = None
    if (means := checkpoint.tensors.get("ema")) and choice.weights != "last":
        averages = Averages(means, settings.train.ema_decay, int(checkpoint.values["ema_updates"]))
    about = {**metadata, "ss_steps": str(checkpoint.step), **_epoch(metadata, checkpoint)}
    about = lineage.with_steps(about, checkpoint.step)
    if choice.weights == "ema" and averages is not None and choice.form != "pruned-emaonly":
        last, averages = {**last, **averages.weights}, None
    # A model has the dtype of the file that training started from.
    dtype = "fp16" if choice.form == "adapter" else _stored(target.model.found)
    target.export(
        last,
        output,
        form=choice.form,
        names=choice.names,
        metadata=about,
        averages=averages,
        dtype=dtype,
        overwrite=overwrite,
    )


def _epoch(metadata: Mapping[str, str], checkpoint: State) -> dict[str, str]:
    """The number of whole epochs, if the length of one is known."""
    batches, number = metadata.get("ss_num_batches_per_epoch", ""), checkpoint.values.get("number")
    known = batches.isdecimal() and len(batches) < 10 and int(batches) > 0
    return {"ss_epoch": str(number // int(batches))} if known and isinstance(number, int) else {}


def write_metadata(ready: Prepared, run: RunFolder, processes: int = 1) -> None:
    """Keep `metadata` in the run's folder: exports need no pictures then. Raises FileError."""
    write_atomic(run.metadata, json.dumps(metadata(ready, processes), indent=1).encode())


def read_metadata(run: RunFolder) -> dict[str, str]:
    """What `write_metadata` wrote; empty if there is nothing that can be read."""
    try:
        values = parse_json(read_text(run.metadata))
    except (FileError, MalformedText):
        return {}
    return {name: value for name, value in values.items() if isinstance(value, str)} if isinstance(values, dict) else {}


def metadata(ready: Prepared, processes: int = 1) -> dict[str, str]:
    """Facts of the run, which so many processes train, under the names of kohya's scripts; of the data as much as
    `lineage` says.
    """
    settings, records = ready.settings, ready.pictures.training
    train, loss, epoch = settings.train, settings.loss, max(1, len(ready.batches))
    unet_rate, text_rate = _rates(settings)
    described = {
        "ss_training_comment": "",
        "ss_learning_rate": repr(train.learning_rate),
        "ss_unet_lr": repr(unet_rate),
        "ss_text_encoder_lr": repr(text_rate),
        "ss_max_train_steps": str(train.steps),
        "ss_batch_size_per_device": str(train.batch),
        "ss_total_batch_size": str(train.batch * train.accumulate * processes),
        "ss_gradient_accumulation_steps": str(train.accumulate),
        "ss_gradient_checkpointing": str(settings.memory.checkpointing),
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": str(train.warmup),
        "ss_optimizer": train.optimizer,
        "ss_seed": str(train.seed),
        "ss_resolution": str(ready.resolution),
        "ss_enable_bucket": str(settings.data.buckets),
        "ss_shuffle_caption": str(settings.data.shuffle),
        "ss_keep_tokens": str(settings.data.keep_tokens),
        "ss_caption_dropout_rate": repr(settings.data.caption_dropout),
        "ss_min_snr_gamma": repr(loss.gamma) if loss.weighting == "min-snr" else "None",
        "ss_noise_offset": repr(loss.noise_offset) if loss.noise_offset else "None",
        "ss_loss_type": loss.loss,
        "ss_prior_loss_weight": repr(loss.prior_weight),
        "ss_clip_skip": str(settings.model.clip_skip or None),
        "modelspec.implementation": f"gouache {__version__}",
        "modelspec.resolution": "x".join(map(str, ready.resolution)),
    }  # fmt: skip
    if settings.lineage == "none":
        return described | {"modelspec.title": settings.mode}  # not the name of the file, which may be that of the data
    described |= {
        "ss_output_name": Path(settings.output).stem,  # usually that of the folder of pictures
        "ss_num_epochs": str(-(-train.steps * train.accumulate // epoch)),
        "ss_num_batches_per_epoch": str(epoch),
        "ss_num_train_images": str(sum(record.repeats for record in records if not record.regularization)),
        "ss_num_reg_images": str(sum(record.repeats for record in records if record.regularization)),
        "ss_num_validation_images": str(len(ready.pictures.held_out)),
    }
    if settings.data.trigger:
        described["modelspec.trigger_phrase"] = settings.data.trigger
    described["ss_new_sd_model_hash"] = settings.model.sha256
    if isinstance(ready.objective, ConceptObjective):
        described |= sliders.metadata(settings, ready.objective.concepts)
    else:
        described["gouache.data"] = ready.pictures.dataset.identity()
    described[lineage.KEY] = lineage.extended(ready.model.file.metadata, settings, described["gouache.data"])
    if settings.lineage == "plain" and settings.mode != "slider":
        described["ss_sd_model_name"] = Path(settings.model.name).name
        described["ss_dataset_dirs"] = json.dumps(
            {Path(settings.data.folder).name: {"n_repeats": settings.data.repeats, "img_count": len(records)}}
        )
        tags = Counter(
            tag.strip() for record in records for tag in record.captions[0].split(",") if tag.strip()
        )  # fmt: skip
        described["ss_tag_frequency"] = json.dumps({Path(settings.data.folder).name: dict(tags)})
    return described


def _rates(settings: RunSettings) -> tuple[float, float]:
    """The learning rates of the U-Net's and of the first text encoder's weights; 0 where they are not trained."""
    rate, parts = settings.train.learning_rate, settings.parts
    if settings.result in ("embedding", "hypernetwork"):
        return 0.0, 0.0
    if settings.mode == "pretrain":
        return rate * (settings.pretrain.part == "unet"), rate * (settings.pretrain.part == "text")
    return rate * parts.unet, rate * parts.text_rate * parts.text_encoder
