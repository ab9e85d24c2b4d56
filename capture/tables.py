"""The rows that a batch adds to the tables of samples and of images."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.growing import Values
from mechanistic.store.schema import STATUS

from .batch import Batch
from .survey import FORWARD_SAMPLES, OPTION_NOTE, Survey

Rows = Mapping[str, Mapping[str, Values]]


def sample_rows(
    batch: Batch,
    survey: Survey,
    *,
    predictions: Sequence[str],
    correct: Sequence[int],
    logits: NDArray[np.float32],
    notes: Sequence[str],
) -> dict[str, NDArray[Any]]:
    """Rows of samples/; `logits` is (sample, option)."""
    samples = batch.samples
    texts: dict[str, list[str]] = {
        "sample_id": [sample.sample_id for sample in samples],
        "question": [sample.question for sample in samples],
        "answer": [sample.answer or "" for sample in samples],
        "relation": [sample.relation for sample in samples],
        "subject": [sample.subject for sample in samples],
        "object": [sample.object for sample in samples],
        "group": [sample.group for sample in samples],
        "prompt": [prompt.text for prompt in batch.prompts],
        "prediction": list(predictions),
        "error": [""] * len(samples),
    }
    rows: dict[str, NDArray[Any]] = {name: np.array(column, object) for name, column in texts.items()}
    options = np.full((len(samples), survey.options), "", object)
    for row, sample in enumerate(samples):
        options[row, : len(sample.options)] = sample.options
    rows["options"] = options
    rows["option_logits"] = logits
    rows["answer_index"] = np.array([sample.answer_index for sample in samples], np.int8)
    rows["correct"] = np.array(correct, np.int8)
    rows["status"] = np.full(len(samples), STATUS["ok"], np.int8)
    own = {OPTION_NOTE: notes, FORWARD_SAMPLES: [len(samples)] * len(samples)}
    for name, dtype in survey.columns.items():
        values = own[name] if name in own else [sample.extra[name] for sample in samples]
        rows[name] = np.array(values, object if dtype == "string" else dtype)
    return rows


def image_rows(batch: Batch, start: int, *, stored: bool) -> Rows:
    """Rows of images/ and, where they are stored, of image_bytes/, of which `start` are there already."""
    entries = [
        (batch.start + row, number, image)
        for row, images in enumerate(batch.images)
        for number, image in enumerate(images)
    ]
    lengths = np.array([len(image.encoded) for _, _, image in entries], np.int64)
    starts = start + np.cumsum(lengths) - lengths
    none = np.full(len(entries), -1, np.int64)
    table: dict[str, NDArray[Any]] = {
        "sample_index": np.array([row for row, _, _ in entries], np.int32),
        "image_index": np.array([number for _, number, _ in entries], np.int16),
        "width": np.array([image.width for _, _, image in entries], np.int32),
        "height": np.array([image.height for _, _, image in entries], np.int32),
        "sha256": np.array([image.sha256 for _, _, image in entries], object),
        "start": starts if stored else none,
        "length": lengths if stored else none,
    }
    if not stored:
        return {"images": table}
    encoded = b"".join(image.encoded for _, _, image in entries)
    return {"images": table, "image_bytes": {"data": np.frombuffer(encoded, np.uint8)}}
