"""The experiment of that name: where a model looks, over layers and heads, when it is right and when not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import xarray as xr

from mechanistic.store import group, open_run
from mechanistic.store.errors import DataError
from mechanistic.store.schema import STATUS

from .analyze import Options, analyze_run
from .attention_mass import attention_mass
from .attention_pattern import attention_pattern
from .plot_attention_heatmap import plot_attention_heatmap
from .plot_attention_on_image import plot_attention_on_image
from .plot_head_map import plot_head_map
from .plot_multi_head_attention import plot_multi_head_attention
from .sample_image import sample_image
from .splits import row_labels

CURVES = ("entropy", "concentration", "mass")


def attention_maps(run: str | Path, output: str | Path, *, shown: int = 4) -> list[Path]:
    """Figures and tables of the last prompt token's attention.

    Curves over layers of entropy, top-5 concentration and the share on each kind of token, split by correct
    and incorrect; a map of the share on the image (layer, head); and for `shown` samples, of each relation
    and outcome in turn, the attention on the image, among the words and head by head, in the layer that looks
    at the image most.

    Returns
    -------
    what was written under `output`.

    Raises
    ------
    MissingSiteError  the run holds neither q and k nor patterns.
    DataError         no sample is whole, or the run has no images; see also `analyze_run`.
    """
    folder = Path(output)
    written = analyze_run(run, CURVES, folder, Options(tokens="last", by=("correct",)))
    opened = open_run(run)
    of_sample = attention_mass(opened, tokens="last")["mass_image"].compute()
    share = of_sample.mean("token", keep_attrs=True)
    layer = int(share["layer"][int(np.argmax(share.mean("head").values))])
    path = folder / "image_share_by_head.png"
    known = int(of_sample.notnull().any(("layer", "head")).sum())
    plot_head_map(share, title="Share of the last token's attention on the image", n=known, save_path=path)
    written.append(path)
    for sample in chosen_samples(opened, shown):
        written += _one(opened, sample, layer, folder)
    return written


def chosen_samples(run: xr.DataTree, count: int) -> list[int]:
    """Whole samples, of each relation and outcome in turn, as many as there are."""
    samples = group(run, "samples")
    columns = [row_labels(samples[name]) for name in ("relation", "correct") if name in samples.variables]
    good = np.asarray(samples["status"].values) == STATUS["ok"]
    if not good.any():
        raise DataError("no sample of this run is whole.", "Capture those that failed: --retry-failed.")
    kinds: dict[tuple[str, ...], list[int]] = {}
    for sample in np.flatnonzero(good).tolist():
        kinds.setdefault(tuple(str(column[sample]) for column in columns), []).append(sample)
    turns = [list(kind) for kind in kinds.values()]
    chosen: list[int] = []
    while len(chosen) < count and any(turns):
        chosen += [kind.pop(0) for kind in turns if kind]
    return chosen[:count]


def headline(run: xr.DataTree, sample: int) -> str:
    """A sample's question, its answer and whether that is right."""
    samples = group(run, "samples")
    said = [str(samples[name][sample].values) for name in ("question", "prediction")]
    outcome = row_labels(samples["correct"])[sample]
    return f"{said[0]} {said[1].strip()} ({outcome})"


def _one(run: xr.DataTree, sample: int, layer: int, folder: Path) -> list[Path]:
    name = str(group(run, "samples")["sample_id"][sample].values).replace("/", "_")
    paths = [folder / f"{name}_{what}.png" for what in ("image", "words", "heads")]
    title = headline(run, sample)
    row = attention_pattern(run, sample=sample, layer=layer, query="last")["attention_pattern"].compute()
    plot_attention_on_image(
        sample_image(run, sample),
        row.mean("head", keep_attrs=True).squeeze("query"),
        title=f"{title}\nlast prompt token, layer {layer}, mean of {row.sizes['head']} heads",
        save_path=paths[0],
    )
    square = attention_pattern(run, sample=sample, layer=layer)["attention_pattern"].compute()
    words = square.isel(key=np.flatnonzero(np.isin(square["key_position"], square["query_position"])))
    words = words.transpose("head", "query", "key")
    about = f"layer {layer}, without the image tokens"
    plot_attention_heatmap(words, layer_name=about, save_path=paths[1])
    plot_multi_head_attention(words, layer_name=about, save_path=paths[2])
    return paths
