"""A run's weights as a file that other tools read, with what the file says of its run."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from gouache.app.settings import Settings
from gouache.app.training import prepare
from gouache.app.training.folder import RunFolder
from gouache.app.training.prepare import Prepared
from gouache.errors import RequestError, TrainingError, printable
from gouache.training import state
from gouache.training.run_settings import RunSettings
from gouache.training.targets.adapter import AdapterTarget
from gouache.training.targets.export import Averages
from gouache.version import __version__
from gouache.workshop.derive import DTYPES

WEIGHTS = ("ema", "last", "both")


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
) -> Path:
    """Write the checkpoint `step` (a number, best or last) of a run as the file `output`.

    `weights`: the averages (ema), the last weights, or both; "" chooses the averages where they are kept. `form`:
    adapter, full, pruned or pruned-emaonly; "" chooses by what was trained. Raises GouacheError.
    """
    settings = run.settings()
    last, averages = read_weights(run, step, settings)
    with prepare.prepared(
        settings, run, user, on_note=lambda line: None, on_work=lambda what, done, total: None, fill_caches=False
    ) as ready:
        write(ready, output, last, averages, weights=weights, form=form, names=names, overwrite=overwrite)
    return output


def read_weights(run: RunFolder, step: str, settings: RunSettings) -> tuple[Mapping[str, Tensor], Averages | None]:
    """(weights, averages or None) of a checkpoint. Raises RequestError or TrainingError if it does not exist."""
    steps = run.steps()
    if not steps:
        shown = printable(str(run.path))
        raise TrainingError(f"{shown} has no checkpoint yet; go on with it: gouache train run {shown}")
    if step == "last":
        found = state.newest(run.path)
    elif step == "best" or step.isdecimal():
        number = run.best_step() if step == "best" else int(step)
        if number not in steps:
            kept = ", ".join(map(str, steps))
            raise RequestError("step", f"{step} has no checkpoint; there are those of step {kept}")
        found = state.read(run.checkpoint(number))
    else:
        raise RequestError("step", f"{printable(step, 40)!r} is not known; use a number, best or last")
    assert found is not None
    averages = found.tensors.get("ema")
    if not averages:
        return found.tensors["weights"], None
    return found.tensors["weights"], Averages(averages, settings.train.ema_decay, int(found.values["ema_updates"]))


def write(
    ready: Prepared,
    output: Path,
    last: Mapping[str, Tensor],
    averages: Averages | None,
    *,
    weights: str = "",
    form: str = "",
    names: str = "kohya",
    overwrite: bool = False,
) -> None:
    """Write `last`, or `averages`, of the run `ready` as `output`; see `export`."""
    if weights not in ("", *WEIGHTS):
        raise RequestError("weights", f"{printable(weights, 40)!r} is not known; use {', '.join(WEIGHTS)}")
    if weights in ("ema", "both") and averages is None:
        raise RequestError("weights", f"{weights} needs averages, and the run keeps none; use last")
    about = metadata(ready)
    if isinstance(ready.target, AdapterTarget):
        if weights == "both":
            raise RequestError("weights", "both is for whole models; an adapter file holds one: use ema or last")
        chosen = averages.weights if averages is not None and weights != "last" else last
        ready.target.export(
            chosen, output, form=form or "adapter", names=names, metadata=about, dtype="fp16", overwrite=overwrite
        )
        return
    kept = None if weights == "last" else averages
    usual = "pruned" if kept is None or weights == "both" else "pruned-emaonly"
    stored = ready.model.found.component("unet").dtype.value  # of the file that training started from
    dtype = next((name for name, code in DTYPES.items() if code == stored), None)
    ready.target.export(
        last, output, form=form or usual, metadata=about, averages=kept, dtype=dtype, overwrite=overwrite
    )


def metadata(ready: Prepared) -> dict[str, str]:
    """Facts of the run under the names of kohya's scripts; of the data as much as `lineage` says."""
    settings, records = ready.settings, ready.pictures.training
    train, loss, epoch = settings.train, settings.loss, max(1, len(ready.batches))
    described = {
        "ss_training_comment": "",
        "ss_output_name": Path(settings.output).stem,
        "ss_learning_rate": repr(train.learning_rate),
        "ss_unet_lr": repr(train.learning_rate if settings.parts.unet else 0.0),
        "ss_text_encoder_lr": repr(train.learning_rate * settings.parts.text_rate * settings.parts.text_encoder),
        "ss_steps": str(train.steps),
        "ss_max_train_steps": str(train.steps),
        "ss_num_epochs": str(-(-train.steps * train.accumulate // epoch)),
        "ss_num_batches_per_epoch": str(epoch),
        "ss_num_train_images": str(sum(record.repeats for record in records if not record.regularization)),
        "ss_num_reg_images": str(sum(record.repeats for record in records if record.regularization)),
        "ss_num_validation_images": str(len(ready.pictures.held_out)),
        "ss_batch_size_per_device": str(train.batch),
        "ss_total_batch_size": str(train.batch * train.accumulate),
        "ss_gradient_accumulation_steps": str(train.accumulate),
        "ss_gradient_checkpointing": str(settings.memory.checkpointing),
        "ss_lr_scheduler": train.schedule,
        "ss_lr_warmup_steps": str(train.warmup),
        "ss_optimizer": train.optimizer,
        "ss_seed": str(train.seed),
        "ss_resolution": str(ready.batches.options.buckets[-1].resolution),
        "ss_enable_bucket": "True",
        "ss_shuffle_caption": str(settings.data.shuffle),
        "ss_keep_tokens": str(settings.data.keep_tokens),
        "ss_caption_dropout_rate": repr(settings.data.caption_dropout),
        "ss_min_snr_gamma": repr(loss.gamma) if loss.weighting == "min-snr" else "None",
        "ss_noise_offset": repr(loss.noise_offset) if loss.noise_offset else "None",
        "ss_loss_type": loss.loss,
        "ss_prior_loss_weight": repr(loss.prior_weight),
        "ss_clip_skip": str(settings.model.clip_skip or None),
        "modelspec.implementation": f"gouache {__version__}",
        "modelspec.resolution": "x".join(map(str, ready.batches.options.buckets[-1].resolution)),
    }  # fmt: skip
    if settings.data.trigger:
        described["modelspec.trigger_phrase"] = settings.data.trigger
    if settings.lineage == "none":
        return described
    described["ss_new_sd_model_hash"] = settings.model.sha256
    described["gouache.data"] = ready.pictures.dataset.identity()
    if settings.lineage == "plain":
        described["ss_sd_model_name"] = Path(settings.model.name).name
        described["ss_dataset_dirs"] = json.dumps(
            {Path(settings.data.folder).name: {"n_repeats": settings.data.repeats, "img_count": len(records)}}
        )
        tags = Counter(
            tag.strip() for record in records for tag in record.captions[0].split(",") if tag.strip()
        )  # fmt: skip
        described["ss_tag_frequency"] = json.dumps({Path(settings.data.folder).name: dict(tags)})
    return described
