"""The questions of a run, made from the run alone, so that a model can be asked them again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr

from mechanistic.store import group
from mechanistic.store.errors import DataError, ModelError
from mechanistic.store.schema import STATUS, sample_columns

from .batch import Batch, prepare_batch
from .dataset import Sample
from .models import LoadedModel
from .token_table import TokenTexts

_KNOWN = {column.name for column in sample_columns(1)} | {"option_note", "forward_samples"}


def run_samples(run: xr.DataTree, numbers: Sequence[int]) -> list[Sample]:
    """The samples with these rows of samples/, with the images that the run keeps.

    Raises
    ------
    DataError    one failed when it was captured, or the run does not hold its images.
    """
    rows = group(run, "samples").isel(sample=list(numbers)).compute()
    failed = np.flatnonzero(rows["status"].values == STATUS["failed"])
    if failed.size:
        name = str(rows["sample_id"].values[failed[0]])
        raise DataError(f"Sample {name!r} failed when it was captured.", "Leave it out.")
    images = _images(run, numbers)
    extra = [str(name) for name in rows.variables if name not in _KNOWN and rows[name].dims == ("sample",)]
    return [_sample(rows.isel(sample=place), images[number], extra) for place, number in enumerate(numbers)]


def asked_again(loaded: LoadedModel, run: xr.DataTree, numbers: Sequence[int]) -> dict[int, Batch]:
    """Each of these samples, encoded for the model by itself.

    Raises
    ------
    ModelError    the model's processor makes another prompt of a question than the run has.
    """
    texts = TokenTexts(loaded.tokenizer)
    prompts = group(run, "samples")["prompt"].isel(sample=list(numbers)).values
    encoded: dict[int, Batch] = {}
    for number, sample, prompt in zip(numbers, run_samples(run, numbers), prompts, strict=True):
        batch = prepare_batch(loaded, [sample], number, max_new_tokens=0, texts=texts, generate=False)
        if batch.prompts[0].text != str(prompt):
            raise ModelError(
                f"Sample {sample.sample_id!r}: this model's processor makes another prompt of its question "
                "than the run has.",
                "Load the model with the processor that the run was captured with.",
            )
        encoded[number] = batch
    return encoded


def _sample(row: xr.Dataset, images: list[bytes], extra: Sequence[str]) -> Sample:
    text = {name: str(row[name].item()) for name in ("relation", "subject", "object", "group")}
    return Sample(
        sample_id=str(row["sample_id"].item()),
        images=tuple(images),
        question=str(row["question"].item()),
        options=tuple(str(option) for option in row["options"].values if option),
        answer=str(row["answer"].item()) or None,
        extra={name: row[name].item() for name in extra},
        **text,
    )


def _images(run: xr.DataTree, numbers: Sequence[int]) -> dict[int, list[bytes]]:
    found: dict[int, list[bytes]] = {number: [] for number in numbers}
    if "/images" not in run.groups:
        return found
    table = group(run, "images")[["sample_index", "start", "length"]].compute()
    stored: Any = group(run, "image_bytes")["data"] if "/image_bytes" in run.groups else None
    for place in np.flatnonzero(np.isin(table["sample_index"].values, list(numbers))):
        start, length = int(table["start"].values[place]), int(table["length"].values[place])
        if stored is None or start < 0:
            raise DataError(
                "This run does not hold its images, so its questions cannot be asked again.",
                "Capture it without --no-images.",
            )
        data = stored.isel(byte=slice(start, start + length)).values.tobytes()
        found[int(table["sample_index"].values[place])].append(data)
    return found
