"""The labels of every token: one row a token, columns as the store's token tables have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError
from mechanistic.store.schema import KIND, ROLES

from .dataset import Sample
from .mask_rules import SequenceLayout
from .patches import ImageLayout, Patches
from .roles import role_spans, tokens_in

Columns = dict[str, NDArray[Any]]

_BOX = ("box_x0", "box_y0", "box_x1", "box_y1")


def decoder_table(
    sample: Sample,
    sample_index: int,
    ids: NDArray[np.int64],
    answer: Sequence[int],
    offsets: NDArray[np.int64],
    images: Sequence[ImageLayout],
    image_token: int | None,
    texts: Mapping[int, str],
    *,
    replaced: bool = True,
) -> Columns:
    """Labels of one sample's prompt and answer tokens.

    Parameters
    ----------
    offsets
        Characters of each prompt token, counted from the first of the question.
    replaced
        Whether image features take the place of the image tokens; if not, those are words like others.

    Raises
    ------
    CaptureError    the prompt does not have one placeholder for each patch that the layouts name.
    """
    prompt, total = len(ids), len(ids) + len(answer)
    all_ids = np.concatenate([ids, np.asarray(answer, np.int64)]).astype(np.int32)
    columns = _blank(total, sample_index)
    columns["token_id"] = all_ids
    columns["token_text"] = np.array([texts[int(token)] for token in all_ids], object)
    kind = columns["kind"]
    kind[:prompt][tokens_in([(0, len(sample.question.strip()))], offsets)] = KIND["text"]
    placeholders = np.flatnonzero(ids == image_token) if image_token is not None else np.zeros(0, np.int64)
    expected = sum(len(layout.decoder) for layout in images)
    if len(placeholders) != expected:
        raise CaptureError(
            f"Sample {sample.sample_id!r}: {len(placeholders)} image tokens in its prompt, not {expected}.",
            "The processor and the model's configuration do not belong together, or a prompt was cut short.",
        )
    kind[placeholders] = KIND["image" if replaced else "special"]
    kind[prompt:] = KIND["answer"]
    _place(columns, placeholders, [layout.decoder for layout in images])
    spans = role_spans(sample)
    for role in ROLES:
        columns[f"is_{role}"] = np.zeros(total, np.bool_)
        if role in spans:
            columns[f"is_{role}"][:prompt] = tokens_in(spans[role], offsets)
    columns["is_last_prompt"][prompt - 1] = True
    return columns


def query_table(sample_index: int, count: int) -> Columns:
    """The table of learned queries about the one image of a sample: no place in it, no word, no role."""
    columns = _blank(count, sample_index)
    columns["kind"][:], columns["image_index"][:] = KIND["image"], 0
    columns["token_id"] = np.full(count, -1, np.int32)
    columns["token_text"] = np.full(count, "", object)
    return columns | {f"is_{role}": np.zeros(count, np.bool_) for role in ROLES}


def no_words(sample_index: int) -> Columns:
    """The table of a sample for a model that reads images alone: every column, no row."""
    columns = _blank(0, sample_index)
    columns["token_id"], columns["token_text"] = np.zeros(0, np.int32), np.zeros(0, object)
    return columns | {f"is_{role}": np.zeros(0, np.bool_) for role in ROLES}


def encoder_table(sample_index: int, images: Sequence[ImageLayout]) -> Columns:
    """Labels of the vision encoder's tokens of one sample's images, in the order of the images."""
    total = sum(len(layout.encoder) for layout in images)
    columns = _blank(total, sample_index)
    _place(columns, np.arange(total), [layout.encoder for layout in images])
    columns["kind"][columns["patch_row"] >= 0] = KIND["image"]
    return columns


def _blank(total: int, sample_index: int) -> Columns:
    columns: Columns = {
        "sample_index": np.full(total, sample_index, np.int32),
        "position": np.arange(total, dtype=np.int32),
        "kind": np.full(total, KIND["special"], np.int8),
    }
    for name in ("image_index", "tile", "patch_row", "patch_col"):
        columns[name] = np.full(total, -1, np.int16)
    for name in _BOX:
        columns[name] = np.full(total, np.nan, np.float32)
    return columns


def _place(columns: Columns, where: NDArray[np.int64], images: Sequence[Patches]) -> None:
    start = 0
    for number, patches in enumerate(images):
        rows = where[start : start + len(patches)]
        columns["image_index"][rows] = number
        columns["tile"][rows] = patches.tile
        columns["patch_row"][rows] = patches.row
        columns["patch_col"][rows] = patches.col
        for edge, name in enumerate(_BOX):
            columns[name][rows] = patches.box[:, edge]
        start += len(patches)


def select(columns: Columns, tokens: Sequence[str]) -> NDArray[np.bool_]:
    """Which rows a token selection means: the union of its parts.

    ``text`` is everything that is not an image token; a role is only where the question mentions it.
    """
    chosen = np.zeros(len(columns["kind"]), np.bool_)
    for name in tokens:
        if name == "all":
            chosen[:] = True
        elif name == "text":
            chosen |= columns["kind"] != KIND["image"]
        elif name in ("image", "answer"):
            chosen |= columns["kind"] == KIND[name]
        else:
            chosen |= columns["is_last_prompt" if name == "last" else f"is_{name}"]
    return chosen


def sequence_layout(columns: Columns) -> SequenceLayout:
    """What the attention mask of this sample's sequence may depend on."""
    image = columns["kind"] == KIND["image"]
    starts = image & ~np.concatenate([[False], image[:-1]])
    blocks = np.where(image, np.cumsum(starts), -1).astype(np.int16)
    answers = int((columns["kind"] == KIND["answer"]).sum())
    return SequenceLayout(blocks, len(blocks) - answers)


def joined(tables: Sequence[Columns]) -> Columns:
    """Tables of consecutive samples, end to end."""
    return {name: np.concatenate([table[name] for table in tables]) for name in tables[0]}


class TokenTexts(dict[int, str]):
    """The text of each token id, decoded once."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__()
        self.tokenizer = tokenizer

    def __missing__(self, token: int) -> str:
        text: str = self.tokenizer.decode([token], skip_special_tokens=False)
        self[token] = text
        return text
