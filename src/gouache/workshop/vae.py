"""Replace the VAE of a model."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gouache.errors import ModelError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.files.record import ModelFile
from gouache.workshop import derive, layout, save
from gouache.workshop.convert import Converted
from gouache.workshop.modelspec import describe
from gouache.workshop.progress import OnWork, progress


def bake(model: Path, vae: Path, target: Path, *, overwrite: bool = False, on_work: OnWork | None = None) -> Converted:
    """Write `model` with the VAE of `vae` (a VAE file, or any model that has one) as the file `target`.

    Raises ModelError if one of them has no VAE, or if their shapes differ.
    """
    form = save.single_form_of(target)
    save.check_target(target, overwrite)
    (file, found), other = layout.opened(model), layout.open_weights(vae)
    old, new = found.component("vae"), identify(other).component("vae")
    tensors = derive.arrange(other, new.origins)
    expected, found_shapes = ({name: info.shape for name, info in each.tensors.items()}
                              for each in (derive.arrange(file, old.origins), tensors))  # fmt: skip
    if expected != found_shapes:
        every = sorted({*expected, *found_shapes})
        name = next(name for name in every if expected.get(name) != found_shapes.get(name))
        raise ModelError(
            f"the VAE in {printable(str(vae))} does not fit {printable(str(model))}: {name} is "
            f"{list(found_shapes[name]) if name in found_shapes else 'missing'}, expected "
            f"{list(expected[name]) if name in expected else 'no such tensor'}"
        )
    replaced = {source for origin in old.origins.values() for source in origin.sources}
    rest = derive.keep(file, (name for name in file if name not in replaced))
    result = derive.join(rest, layout.as_in(old, tensors, found.family.value))
    baked = {"gouache.vae": f"{vae.name}, sha256 {other.sha256(progress('hashing', _size(other), on_work))}"}
    result = replace(result, metadata={**describe(found), **file.metadata, **baked})

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    save.write_file(result, target, form, on_work, check, overwrite=overwrite)
    return Converted(len(result), result.nbytes, form, {}, {})


def _size(file: ModelFile) -> int:
    """Bytes of the files on disk."""
    return sum(path.stat().st_size for path in file.files)
