"""The autoencoder of a model exchanged for another."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from gouache.errors import ModelError, printable
from gouache.families.identify import identify
from gouache.files.open import open_model
from gouache.workshop import derive, layout, save
from gouache.workshop.convert import Converted, OnWork, progress
from gouache.workshop.modelspec import describe


def bake(model: Path, vae: Path, target: Path, *, overwrite: bool = False, on_work: OnWork | None = None) -> Converted:
    """`model` with the autoencoder of `vae` (a VAE file, or any model that has one) as the file `target`.

    Raises ModelError where either has none, or the shapes differ.
    """
    form = save.single_form_of(target)
    save.refuse_existing(target, overwrite)
    (file, found), other = layout.opened(model), open_model(vae)
    old, new = found.component("vae"), identify(other).component("vae")
    tensors = derive.arrange(other, new.origins)
    mine, theirs = ({name: info.shape for name, info in each.tensors.items()}
                    for each in (derive.arrange(file, old.origins), tensors))  # fmt: skip
    if mine != theirs:
        odd = next(name for name in sorted({*mine, *theirs}) if mine.get(name) != theirs.get(name))
        raise ModelError(
            f"{printable(str(vae))} holds an autoencoder of another form than {printable(str(model))}: {odd} is "
            f"{list(theirs[odd]) if odd in theirs else 'missing'}, expected "
            f"{list(mine[odd]) if odd in mine else 'no such tensor'}"
        )
    taken = {source for origin in old.origins.values() for source in origin.sources}
    rest = derive.keep(file, (name for name in file if name not in taken))
    result = derive.join(rest, layout.as_in(old, tensors, found.family.value))
    baked = {"gouache.vae": f"{vae.name}, sha256 {other.sha256()}"}
    result = replace(result, metadata={**describe(found), **file.metadata, **baked})

    def check(path: Path) -> None:
        save.compare(open_model(path), result, progress("checking", result.nbytes, on_work))

    save.write_file(result, target, form, progress("writing", result.nbytes, on_work), check)
    return Converted(len(result), result.nbytes, form, {}, {})
