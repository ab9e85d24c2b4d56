"""The experiment of that name: which part of the image each word of the question looks at."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store import group, open_run
from mechanistic.store.schema import ROLES, STATUS

from .attention_maps import chosen_samples, headline
from .attention_mass import attention_mass
from .cross_attention import cross_attention
from .plot_cross_attention_attribution import plot_cross_attention_attribution
from .plot_layers import plot_layers
from .sample_image import sample_image
from .splits import row_labels, summarize, with_samples

MAX_PANELS = 16


def cross_attn_attribution(run: str | Path, output: str | Path, *, shown: int = 4) -> list[Path]:
    """Figures and a table of what the words of the questions attend to in the images.

    words.csv has a row for each word of each sample: its share of attention on the image, and which patch it
    looks at most, mean of layers and heads. Where the run knows which words name the subject, the object and
    the relation, curves over layers of their share on the image, split by correct and incorrect. For `shown`
    samples a panel a word.

    Returns
    -------
    what was written under `output`.

    Raises
    ------
    MissingSiteError  the run lacks q or k.
    DataError         no sample is whole; a question that its tokens do not spell; see `cross_attention`.
    """
    folder = Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    opened = open_run(run)
    samples = group(opened, "samples")
    chosen = chosen_samples(opened, shown)
    written = [folder / "words.csv"]
    correct = row_labels(samples["correct"])
    with written[0].open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(("sample_id", "relation", "correct", "word", "tokens", "image_share", *_PATCH))
        for sample in np.flatnonzero(np.asarray(samples["status"].values) == STATUS["ok"]).tolist():
            words = cross_attention(opened, sample=sample)
            mean = words["cross_attention"].mean(("layer", "head"), keep_attrs=True).compute()
            about = [str(samples[name][sample].values) for name in ("sample_id", "relation")]
            table.writerows((*about, correct[sample], *row) for row in _rows(mean))
            if sample in chosen:
                written.append(_picture(opened, sample, mean, folder))
    return written + _roles(opened, folder)


_PATCH = ("image_index", "tile", "patch_row", "patch_col")


def _rows(words: xr.DataArray) -> list[tuple[Any, ...]]:
    strongest = words.isel(key=words.argmax("key"))
    share = words.sum("key").values
    patches = [strongest[name].values.tolist() for name in _PATCH]
    names = (str(word) for word in words["word"].values)
    return list(zip(names, words["n_token"].values.tolist(), share.round(6).tolist(), *patches, strict=True))


def _picture(run: xr.DataTree, sample: int, words: xr.DataArray, folder: Path) -> Path:
    name = str(group(run, "samples")["sample_id"][sample].values).replace("/", "_")
    path = folder / f"{name}_words.png"
    plot_cross_attention_attribution(
        sample_image(run, sample),
        None,
        words.isel(word=slice(-MAX_PANELS, None)),
        title=headline(run, sample),
        save_path=path,
    )
    return path


def _roles(run: xr.DataTree, folder: Path) -> list[Path]:
    """A curve of the share on the image for each role that words of this run have."""
    tokens, written = group(run, "tokens/text"), []
    for role in ROLES[:3]:
        if not tokens[f"is_{role}"].values.any():
            continue
        share = attention_mass(run, tokens=role)[["mass_image"]].mean("head", keep_attrs=True)
        path = folder / f"{role}_image_share.png"
        plot_layers(
            summarize(with_samples(share, run, "correct"), by="correct").compute(),
            "mass_image",
            label="attention on image tokens (share)",
            title=f"The words of the {role}, mean of the heads",
            save_path=path,
        )
        written.append(path)
    return written
