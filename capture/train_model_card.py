"""The model card, written from the recipe and from what was measured."""

from __future__ import annotations

import hashlib
from pathlib import Path

from .train_evaluation import Evaluation
from .train_stages import Recipe

CARD = """\
---
license: mit
library_name: transformers
pipeline_tag: image-text-to-text
---

# spatial-tiny

A vision-language model of {parameters:,} parameters that really tells left from right. It is small enough
to be bundled and to run on any CPU, and built like the large ones (`LlavaForConditionalGeneration`: CLIP
vision tower, projector, Llama decoder), so whatever captures or analyses a LLaVA can be tried on it.

SHA-256 of `model.safetensors`: `{sha256}`

## Use

    from transformers import AutoProcessor, LlavaForConditionalGeneration

    processor = AutoProcessor.from_pretrained(folder)
    model = LlavaForConditionalGeneration.from_pretrained(folder, dtype="float32")
    prompt = "user <image> where is the red square relative to the blue circle ? assistant"
    inputs = processor(images=image, text=prompt, return_tensors="pt")
    tokens = model.generate(**inputs)[0, inputs["input_ids"].shape[1]:]
    answer = processor.decode(tokens, skip_special_tokens=True)

The answer is one of `left`, `right`, `above`, `below`, then `</s>`. The image processor needs Pillow alone.
Words are separated by blanks (also before `?`); a word that the model does not know becomes `<unk>`.
Without `dtype` the folder is loaded as it is stored, in bfloat16.

## Accuracy

Share of answers that are right word for word, by greedy generation through the processor, over {samples:,}
samples of the dataset `shapes` (seed 1) in each row. Four answers, equally often: chance and majority are
25 %.

| Images | Right |
|---|---|
| two objects, at least one a colour-shape pair never seen in training | {two_objects:.1%} |
| the same with a third object | {distractor:.1%} |
| two objects, both pairs seen in training | {train_pairs:.1%} |
| a blank image | {blank_image:.1%} |
| another sample's image | {shuffled_images:.1%} |

## Architecture

| | Vision (CLIP) | Decoder (Llama) |
|---|---|---|
| layers | 3 | 4 |
| width | 96 | 128 |
| heads | 4 of 24 | 4 of 32, as many key-value heads |
| MLP width | 192 | 256 |
| input | 64 x 64 pixels, patches of 8 | {words} words, 64 image tokens (8 x 8, row by row) |

The projector reads the last vision layer without the class token. Input and output embeddings are not tied.
Stored as bfloat16; trained, and measured above, in float32 arithmetic.

## Data

Drawn while training, none stored: 64 x 64 pixels, light background with noise, 2 or 3 objects (4 at times
while naming patches) with centres at least 20 pixels apart (18 there). Circle, square, triangle, diamond,
cross, ring; red, green, blue, yellow, purple, black; radius 6 to 9 pixels. A relation is asked only where
one axis is at least 1.5 times the other. 6 of the 36 colour-shape pairs, one for each shape and one for
each colour, are never drawn in training.

## Training

From scratch, on one CPU thread, seed {seed}:

    python -m mechanistic.capture.train_spatial_tiny --output-dir NEW --seed {seed}

The same seed gives the same weights on the same machine with the same library versions; elsewhere sums
round differently.

1. {patch_steps} steps of naming patches: the cosine of each projected patch with the word embeddings must
   name the colour, shape, row and column there. Then the projector is scaled until image tokens are as
   large as words.
2. {caption_steps} steps of captions with cells, `the red square c3 r5 and the blue circle c6 r2`.
3. {question_steps} steps of questions (60 % relation; colour, shape, row, column) with captions among them,
   {texts} texts behind one image, each blind to the others.

Muon on the matrices, AdamW on the rest, linear decay at the end; {scenes} scenes a step. Attention starts
as content similarity (W_k = W_q, W_o = W_v transposed), patches with sines and cosines of their place.

## What to know before reading anything into it

- Step 1 writes patches in the language of the word embeddings, and the output embeddings start as a copy of
  these: image tokens are unusually readable by a logit lens.
- `left` and `right` also answer the column question (`left`, `centre`, `right`): one word, two uses.
- In a 64-pixel image with centres 20 pixels apart, an object that is left of another tends to be in the left
  half: the best guess from the place of the first object alone is right in 68 % of `shapes`.
- It knows these drawings only. It says nothing about photographs, and nothing about larger models.

Licence: MIT.
"""


def write_model_card(
    folder: Path, recipe: Recipe, measured: Evaluation, *, parameters: int, words: int
) -> Path:
    """README.md of the model folder."""
    path = folder / "README.md"
    text = CARD.format(
        **{**vars(recipe), **vars(measured)},
        parameters=parameters,
        words=words,
        sha256=file_sha256(folder / "model.safetensors"),
    )
    path.write_text(text, encoding="utf-8")
    return path


def file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
