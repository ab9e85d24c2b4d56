"""One picture, one text, one call: which patches each word attends to."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import xarray as xr
from numpy.typing import NDArray

from mechanistic.store.errors import CaptureError, UsageError
from mechanistic.store.schema import KIND

from .anatomy import CROSS
from .attention_rows import row_blocks
from .batch import Batch, prepare_batch
from .dataset import ImageSource, Sample
from .forward import last_prompt_logits
from .given import given_model
from .models import LoadedModel
from .prompts import encode_prompts
from .roles import tokens_in
from .tap import AttentionCall, tapped
from .token_table import Columns, TokenTexts

# As in mechanistic.analysis.question_words: letters, digits and what joins them; other marks stand alone.
_WORD = re.compile(r"\w+(?:['’.\-]\w+)*|[^\w\s]")
_LABELS = ("kind", "image_index", "tile", "patch_row", "patch_col", "box_x0", "box_y0", "box_x1", "box_y1")


def extract_cross_attention(
    model: Any,
    image: ImageSource | Sequence[ImageSource],
    text: str,
    *,
    processor: Any = None,
    layer: int | Sequence[int] | None = None,
) -> xr.DataArray:
    """Attention of each word of a text to each patch of its images, the tokens of a word averaged.

    Cross-attention where the decoder has it; in other models text attends to image tokens within
    self-attention, and this is that block. The attribute `computed_from` says which it was. For the same of
    a whole dataset, capture q and k and use `mechanistic.analysis.cross_attention`.

    Parameters
    ----------
    model
        A transformers model, what `load_model` returns, or a name for it.
    text
        The question, as a user would type it; the model's own chat template goes around it.
    processor
        The model's processor; absent, that of the folder or repository that the model came from.
    layer
        True numbers; None means every layer that attends to the image.

    Returns
    -------
    cross_attention (layer, head, word, key), float32, share of the word's attention row.
        The keys are the image's tokens, with kind, image_index, tile, patch_row, patch_col and box_x0 to
        box_y1, which `plot_cross_attention_attribution` reads; a word that occurs again has its number, such
        as ``the (2)``.

    Raises
    ------
    UsageError      there is no processor, no word, or no such layer.
    ImageError      the image cannot be read.
    CaptureError    no layer attends to the image in a way that can be seen.
    """
    loaded = given_model(model, processor, "extract_cross_attention(model, image, text, processor=processor)")
    images = [image] if isinstance(image, ImageSource) else list(image)
    sample = Sample(sample_id="text", images=tuple(images), question=text)
    batch = prepare_batch(loaded, [sample], 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    words = word_tokens(loaded, batch)
    watch = _Watch(loaded, batch, words)
    with tapped(loaded.model, watch):
        last_prompt_logits(loaded.model, batch)
    return watch.result(layer)


class _Watch:
    """Keeps (head, word, key) of every call of the decoder."""

    def __init__(self, loaded: LoadedModel, batch: Batch, words: Mapping[str, NDArray[np.int64]]) -> None:
        self.layers = loaded.anatomy.module_layers(["text", "text" + CROSS])
        self.words = words
        self.decoder = batch.decoder[0]
        keys = batch.further["xk"][0] if "xk" in batch.further else None
        self.read = np.flatnonzero([] if keys is None else keys["kind"] == KIND["image"])
        self.patches = {name: values[self.read] for name, values in (keys or {}).items()}
        self.within: dict[int, NDArray[np.float32]] = {}
        self.across: dict[int, NDArray[np.float32]] = {}

    def __call__(self, call: AttentionCall) -> None:
        if call.module not in self.layers:
            return
        name, layer = self.layers[call.module]
        if name.endswith(CROSS):
            self.across[layer] = self._joined(call)[..., self.read]
        else:
            image = np.flatnonzero(self.decoder["kind"] == KIND["image"])
            self.within[layer] = self._joined(call)[..., image]

    def _joined(self, call: AttentionCall) -> NDArray[np.float32]:
        every = np.unique(np.concatenate(list(self.words.values())))
        blocks = row_blocks(call, 0, torch.from_numpy(every), call.key.shape[2], ahead=True)
        rows = torch.cat([block.weights for block in blocks], dim=1).cpu().numpy()
        places = [np.flatnonzero(np.isin(every, tokens)) for tokens in self.words.values()]
        return np.stack([rows[:, place].mean(1) for place in places], axis=1)

    def result(self, layer: int | Sequence[int] | None) -> xr.DataArray:
        kept, labels = (self.across, self.patches) if self.across else (self.within, self._image_tokens())
        if not kept or not len(labels["kind"]):
            raise CaptureError(
                "No layer of the decoder attends to image tokens that are known by their place.",
                "Give an image, or use a model whose text attends to its image.",
            )
        wanted = sorted(kept) if layer is None else [int(number) for number in np.atleast_1d(layer)]
        if missing := [number for number in wanted if number not in kept]:
            raise UsageError(
                f"No layer {', '.join(map(str, missing))} attends to the image.",
                f"Those that do: {', '.join(map(str, sorted(kept)))}.",
            )
        values = np.stack([kept[number] for number in wanted])
        return xr.DataArray(
            values,
            dims=("layer", "head", "word", "key"),
            coords={
                "layer": np.array(wanted, np.int32),
                "head": np.arange(values.shape[1], dtype=np.int32),
                "word": np.array(list(self.words), object),
                "n_token": ("word", np.array([len(tokens) for tokens in self.words.values()])),
                **{name: ("key", labels[name]) for name in ("position", *_LABELS)},
            },
            name="cross_attention",
            attrs={
                "units": "1",
                "long_name": "attention of the word to the patch",
                "stack": "text",
                "join": "mean",
                "computed_from": "xq and xk" if self.across else "q and k",
            },
        )

    def _image_tokens(self) -> Columns:
        image = self.decoder["kind"] == KIND["image"]
        return {name: values[image] for name, values in self.decoder.items()}


def word_tokens(loaded: LoadedModel, batch: Batch) -> dict[str, NDArray[np.int64]]:
    """The words of the text in order, and the places of their tokens."""
    pixels = [[image.pixels for image in each] for each in batch.images]
    offsets = encode_prompts(loaded.processor, batch.prompts, pixels).offsets[0]
    question = batch.samples[0].question.strip()
    words: dict[str, NDArray[np.int64]] = {}
    seen: dict[str, int] = {}
    for match in _WORD.finditer(question):
        places = np.flatnonzero(tokens_in([match.span()], offsets))
        if not len(places):
            continue
        number = seen[match.group()] = seen.get(match.group(), 0) + 1
        words[match.group() if number == 1 else f"{match.group()} ({number})"] = places
    if not words:
        raise UsageError(f"There is no word in the text {question!r}.", "Write a question about the image.")
    return words
