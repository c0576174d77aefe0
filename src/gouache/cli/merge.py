"""`gouache merge`."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from gouache.cli.text import shown
from gouache.errors import RequestError
from gouache.outside import json_line
from gouache.wording import plural

if TYPE_CHECKING:
    from gouache.files.record import ModelFile

METHOD_NAMES = (
    "weighted-sum",
    "add-difference",
    "sum-twice",
    "triple-sum",
    "slerp",
    "cosine-a",
    "cosine-b",
    "train-difference",
    "smooth-add",
    "ties",
    "dare",
    "dropout",
    "della",
    "geometric-median",
    "model-stock",
    "top-k",
    "truncated-rank",
)  # fmt: skip - a copy of the keys of METHODS, so that --help need not import torch; a test compares the two


def merge(
    models: Annotated[
        list[str],
        Argument(
            metavar="A B [C ...] OUT",
            help="Models (file, folder or name), then the file to write; or a recipe.toml, then the file to write.",
            show_default=False,
        ),
    ],
    method: Annotated[str, Option(help="Merge method: " + ", ".join(METHOD_NAMES) + ".")] = "weighted-sum",
    alpha: Annotated[float, Option(help="Weight of B, or strength of the difference.")] = 0.5,
    beta: Annotated[float, Option(help="Weight of C, for sum-twice and triple-sum.")] = 0.5,
    density: Annotated[
        float, Option(help="Share of each difference that is kept, for ties, dare, dropout, della and top-k.")
    ] = 0.2,
    epsilon: Annotated[float, Option(help="DELLA: spread of drop probabilities.")] = 0.1,
    rank: Annotated[int, Option(help="Rank kept by truncated-rank.")] = 64,
    seed: Annotated[int, Option(help="Random seed for dare, della, dropout.")] = 0,
    blocks: Annotated[
        str | None, Option(help="Alpha per U-Net block: numbers, a file, or a preset such as GRAD_V.")
    ] = None,
    beta_blocks: Annotated[str | None, Option(help="Beta per U-Net block, in the same forms as --blocks.")] = None,
    rule: Annotated[
        list[str] | None,
        Option(
            help="Alpha for tensors whose name matches, as PATTERN=ALPHA, such as '*.attn2.*=0.7'; can be repeated.",
            show_default=False,
        ),
    ] = None,
    vae: Annotated[str, Option(help="Model to copy the VAE from (a, b, c, ...), or merge.")] = "a",
    text: Annotated[str, Option(help="merge, or the model to copy the text encoders from (a, b, c, ...).")] = "merge",
    dtype: Annotated[str | None, Option(help="fp32, bf16, fp16 or fp8_e4m3.", show_default="A's dtype")] = None,
    recipe: Annotated[
        Path | None, Option(help="Write a recipe (TOML) that reproduces the merge.", readable=False)
    ] = None,
    overwrite: Annotated[bool, Option("--overwrite", help="Replace OUT and the recipe if they exist.")] = False,
    as_json: Annotated[bool, Option("--json", help="Print JSON.")] = False,
) -> None:
    """Merge models: weighted sums, differences, TIES, DARE and more. Weights can be set per U-Net block or tensor."""
    from gouache.app.hashes import sha256
    from gouache.app.names import resolve
    from gouache.app.settings import read
    from gouache.cli.progress import bytes_bar
    from gouache.workshop import recipe as recipes
    from gouache.workshop.merge import merge as service
    from gouache.workshop.progress import progress

    if len(models) < 2:
        raise RequestError("models", "name the models (or a recipe.toml), then the file to write")
    settings, target = read(), Path(models[-1])
    if len(models) == 2 and models[0].endswith(".toml"):
        requested = recipes.read(Path(models[0]))
    else:
        block_weights = {"alpha": blocks, "beta": beta_blocks}
        requested = recipes.Recipe(
            method=method, models=tuple(map(recipes.Source, models[:-1])), alpha=alpha, beta=beta, density=density,
            epsilon=epsilon, rank=rank, seed=seed, vae=vae, text=text, dtype=dtype,
            blocks={knob: weights for knob, weights in block_weights.items() if weights is not None},
            rules={"alpha": tuple(rule)} if rule else {},
        )  # fmt: skip
    resolved = tuple(replace(each, path=str(resolve(each.path, settings))) for each in requested.models)
    with bytes_bar() as bar:

        def hash_of(file: ModelFile) -> str:
            size = sum(path.stat().st_size for path in file.files)
            return sha256(file, settings, progress("hashing", size, bar.show))

        done = service(
            replace(requested, models=resolved), target, hash_of=hash_of, recipe_file=recipe, overwrite=overwrite,
            on_work=bar.show,
        )  # fmt: skip
    if as_json:
        print(json_line({"path": str(target), **asdict(done)}))
        return
    print(f"{shown(target)}: {plural(done.tensors, 'tensor')}, {done.nbytes / 1e6:,.1f} MB, sha256 {done.sha256}")
    for note in done.notes:
        print(f"note: {note}")
    for reason, count in done.left_out.items():
        print(f"left out {plural(count, 'tensor')}: {reason}")
