"""One pass over a dataset before the job: what its tables need, which words can be answers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mechanistic.store.errors import DatasetError

from .answers import option_tokens
from .dataset import Dataset, Sample, Scalar

OPTION_NOTE = "option_note"
# How many samples shared a sample's forward; fewer where a batch was halved for memory, 0 for a failed one.
FORWARD_SAMPLES = "forward_samples"
_DTYPES: tuple[tuple[type, str], ...] = ((bool, "bool"), (int, "int64"), (float, "float32"), (str, "string"))


@dataclass(frozen=True)
class Survey:
    """What all samples together look like; `columns` maps the dataset's own columns to stored dtypes.

    `first_with_images` is the first sample that shows every stack of the model at work, 0 if none has images.
    """

    samples: int
    options: int
    columns: Mapping[str, str]
    answers: tuple[str, ...]
    has_images: bool
    first_with_images: int = 0


def survey(dataset: Dataset) -> Survey:
    """Read every sample once, without decoding its images.

    Raises
    ------
    DatasetError    there are no samples, or a column is missing in some or changes its type.
    """
    if len(dataset) == 0:
        raise DatasetError(f"The dataset {dataset.name} has no samples.", "Check its files or --num-samples.")
    options = 1
    with_images: list[int] = []
    columns: dict[str, str] | None = None
    answers: dict[str, None] = {}
    for number in range(len(dataset)):
        sample = dataset[number]
        options = max(options, len(sample.options))
        with_images += [number] if sample.images else []
        own = {name: _dtype(value, name, sample) for name, value in sample.extra.items()}
        columns = own if columns is None else _merge(columns, own, sample)
        answers |= dict.fromkeys(sample.options or ((sample.answer,) if sample.answer else ()))
    return Survey(
        samples=len(dataset),
        options=options,
        columns={**(columns or {}), OPTION_NOTE: "string", FORWARD_SAMPLES: "int64"},
        answers=tuple(answers),
        has_images=bool(with_images),
        first_with_images=with_images[0] if with_images else 0,
    )


def answer_words(tokenizer: Any, prompt: str, answers: tuple[str, ...]) -> dict[int, str]:
    """Token id -> text of the first token of every possible answer, as written and capitalised."""
    words: dict[int, str] = {}
    for answer in answers:
        for spelling in (answer, answer[:1].upper() + answer[1:]):
            tokens = option_tokens(tokenizer, prompt, (spelling,))
            if tokens.ids[0] is not None:
                words.setdefault(tokens.ids[0], spelling)
    return words


def _dtype(value: Scalar, name: str, sample: Sample) -> str:
    for kind, dtype in _DTYPES:
        if isinstance(value, kind):
            return dtype
    raise DatasetError(
        f"Sample {sample.sample_id!r}: its column '{name}' holds a {type(value).__name__}.",
        "Columns are text, whole numbers, numbers or true/false; convert it or leave it out.",
    )


def _merge(columns: dict[str, str], own: dict[str, str], sample: Sample) -> dict[str, str]:
    if columns.keys() != own.keys():
        odd = sorted(columns.keys() ^ own.keys())
        raise DatasetError(
            f"Sample {sample.sample_id!r} and the one before it differ in their columns: {', '.join(odd)}.",
            "Give every sample the same columns.",
        )
    merged = dict(columns)
    for name, dtype in own.items():
        if dtype == columns[name]:
            continue
        if {dtype, columns[name]} != {"int64", "float32"}:
            raise DatasetError(
                f"Sample {sample.sample_id!r}: its column '{name}' is {dtype}, before {columns[name]}.",
                "Give every sample the same type in a column.",
            )
        merged[name] = "float32"
    return merged
