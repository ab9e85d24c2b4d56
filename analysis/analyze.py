"""Analyses by name, for the command line: each saves its result, a table of its splits, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import xarray as xr

from mechanistic.store import group, open_run
from mechanistic.store.derived import write_result
from mechanistic.store.errors import UsageError
from mechanistic.store.schema import KIND

from .attention_boxes import attention_boxes
from .attention_concentration import attention_concentration
from .attention_distance import attention_distance
from .attention_entropy import attention_entropy
from .attention_mass import attention_mass
from .attention_rollout import rollout_row
from .attention_sparsity import attention_sparsity
from .cka import linear_cka
from .head_importance import head_importance
from .linear_probe import linear_probe
from .logit_lens import logit_lens
from .plot_head_map import plot_head_map
from .plot_layers import plot_layers
from .plot_probe import plot_probe
from .plot_rdm import plot_rdm
from .rdm import representational_dissimilarity
from .splits import summarize, with_samples
from .two_hop import two_hop


@dataclass(frozen=True)
class Options:
    """What the command line lets a user choose; each analysis takes what it has a use for."""

    tokens: str = "last"
    by: tuple[str, ...] = ()
    target: str = "relation"
    site: str = "text/resid_post"


@dataclass(frozen=True)
class Analysis:
    """One row of the command's help: what is computed, and how its result is drawn."""

    meaning: str
    compute: Callable[[xr.DataTree, Options], xr.Dataset]
    draw: Callable[[xr.DataTree, xr.Dataset, Options, Path], None] | None = None
    per_sample: bool = True


def _layers(run: xr.DataTree, result: xr.Dataset, options: Options, path: Path) -> None:
    """A curve over layers of each variable, heads averaged, split as asked."""
    heads = result.mean("head", keep_attrs=True) if "head" in result.dims else result
    split = summarize(with_samples(heads, run, list(options.by)), by=options.by[:1]).compute()
    for name in result.data_vars:
        if "layer" in split[name].dims:
            plot_layers(split, str(name), save_path=path.with_name(f"{path.name}_{name}.png"))


def _rollout(run: xr.DataTree, result: xr.Dataset, options: Options, path: Path) -> None:
    """How much of each row has come from image tokens, layer by layer."""
    rollout = result["attention_rollout"]
    shares = rollout.where(rollout["kind"] == KIND["image"], 0).groupby("sample_index").sum()
    shares = shares.rename(sample_index="sample").reset_index("sample")
    shares = shares.rename(sample="sample_index").assign_attrs(
        units="1", long_name="attention rollout on image tokens"
    )
    _layers(run, shares.to_dataset(name="image"), options, path)


def _rdm(run: xr.DataTree, result: xr.Dataset, options: Options, path: Path) -> None:
    for layer in result["layer"].values.tolist():
        title = f"{options.target} at {options.tokens}, layer {layer}"
        plot_rdm(result, layer=layer, title=title, save_path=path.with_name(f"{path.name}_layer{layer}.png"))


def _probe(run: xr.DataTree, result: xr.Dataset, options: Options, path: Path) -> None:
    title = f"{options.target} at {options.tokens}"
    plot_probe(result, title=title, save_path=path.with_name(f"{path.name}.png"))


def _heads(run: xr.DataTree, result: xr.Dataset, options: Options, path: Path) -> None:
    for criterion in result["criterion"].values:
        chosen = result.sel(criterion=criterion)
        file = path.with_name(f"{path.name}_{str(criterion).replace(' ', '_')}.png")
        plot_head_map(chosen["importance"], title=str(criterion), n=int(chosen["n_sample"]), save_path=file)


ANALYSES: Mapping[str, Analysis] = {
    "entropy": Analysis(
        "Shannon entropy of attention rows", lambda run, o: attention_entropy(run, tokens=o.tokens), _layers
    ),
    "concentration": Analysis(
        "mass on the five largest weights",
        lambda run, o: attention_concentration(run, tokens=o.tokens, k=5),
        _layers,
    ),
    "mass": Analysis(
        "share on image, text, special, answer and first token",
        lambda run, o: attention_mass(run, tokens=o.tokens),
        _layers,
    ),
    "sparsity": Analysis(
        "Gini coefficient of attention rows", lambda run, o: attention_sparsity(run, tokens=o.tokens), _layers
    ),
    "distance": Analysis(
        "mean attended distance in tokens", lambda run, o: attention_distance(run, tokens=o.tokens), _layers
    ),
    "boxes": Analysis(
        "mass on the subject's and object's patches, and AUROC against their boxes",
        lambda run, o: attention_boxes(run, tokens=o.tokens),
        _layers,
    ),
    "two-hop": Analysis(
        "last -> image and last -> text -> image", lambda run, o: two_hop(run, source=o.tokens), _layers
    ),
    "rollout": Analysis(
        "attention rollout of one row", lambda run, o: rollout_row(run, tokens=o.tokens), _rollout
    ),
    "heads": Analysis(
        "heads ranked by every criterion", lambda run, o: head_importance(run), _heads, per_sample=False
    ),
    "logit-lens": Analysis(
        "probability of the right option after each layer, and its gap to the best wrong one",
        lambda run, o: logit_lens(run, site=o.site, tokens=o.tokens)[["answer_probability", "logit_gap"]],
        _layers,
    ),
    "rdm": Analysis(
        "representational dissimilarity (correlation) of --target's values at every layer",
        lambda run, o: representational_dissimilarity(run, conditions=o.target, site=o.site, tokens=o.tokens),
        _rdm,
        per_sample=False,
    ),
    "cka": Analysis(
        "linear CKA of every pair of layers",
        lambda run, o: linear_cka(run, site=o.site, tokens=o.tokens),
        per_sample=False,
    ),
    "probe": Analysis(
        "linear probes of --target at every layer, with their controls",
        lambda run, o: linear_probe(run, target=o.target, site=o.site, tokens=o.tokens),
        _probe,
        per_sample=False,
    ),
}


def analyze_run(
    path: str | Path,
    names: Sequence[str],
    output: str | Path,
    options: Options,
    *,
    allow_partial: bool = False,
) -> list[Path]:
    """Compute the analyses called `names` and write, under `output`, NAME.zarr, NAME.csv and NAME*.png.

    CKA has no picture.

    Returns
    -------
    what was written.

    Raises
    ------
    UsageError  an analysis or a split that does not exist; else what the analysis itself raises.
    """
    if unknown := [name for name in names if name not in ANALYSES]:
        raise UsageError(
            f"there is no analysis {', '.join(unknown)}.", f"The analyses are: {', '.join(ANALYSES)}."
        )
    run = open_run(path, allow_partial=allow_partial)
    columns = [
        str(name) for name, column in group(run, "samples").variables.items() if column.dims == ("sample",)
    ]
    if unknown := [name for name in options.by if name not in columns]:
        raise UsageError(
            f"the samples of this run have no column {', '.join(unknown)}.",
            f"They have {', '.join(columns)}.",
        )
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    return [path for name in names for path in _one(run, name, folder, options)]


def _one(run: xr.DataTree, name: str, folder: Path, options: Options) -> list[Path]:
    analysis = ANALYSES[name]
    stored, table = folder / f"{name}.zarr", folder / f"{name}.csv"
    # Numbers of every row may be more than fits into memory: they are written block by block, then read back.
    computed = analysis.compute(run, options)
    write_result(stored, computed)
    result = xr.open_zarr(stored, chunks={}, consolidated=False)[list(computed.data_vars)]
    result = result.assign_coords({name: label.compute() for name, label in result.coords.items()})
    summary = result
    if analysis.per_sample:
        summary = summarize(with_samples(result, run, list(options.by)), by=options.by)
    flat = summary[[v for v in summary.data_vars if not {"class", "sample", "token"} & set(summary[v].dims)]]
    flat.compute().to_dataframe().to_csv(table)
    if analysis.draw is not None:
        analysis.draw(run, result, options, folder / name)
    return [stored, table, *sorted(folder.glob(f"{name}*.png"))]
