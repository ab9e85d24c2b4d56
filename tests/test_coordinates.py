"""Image-token coordinates, proven from outside: pixels are changed, and the tokens that move are looked up.

With the encoder's layers made the identity, a token depends on its own patch alone. Where the coordinates say
that a pixel lies is compared with the token that the pixel really moves; nothing is expected from the code.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from tiny_models import llava, picture
from transformers.image_utils import PILImageResampling
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from zoo import ZOO

from mechanistic.capture.coordinates import image_layout
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.patches import Geometry, square_grid
from mechanistic.store.errors import CaptureError, ModelError

HALF = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
SQUARE = {"height": 64, "width": 64}
PROCESSORS: dict[str, Any] = {
    "squeezed": lambda: CLIPImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_center_crop=False, **HALF),
    "cropped": lambda: CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=SQUARE, **HALF),
    "cropped smaller": lambda: CLIPImageProcessorPil(size={"shortest_edge": 81}, crop_size=SQUARE, **HALF),
    "padded": lambda: LlavaImageProcessorPil(size=SQUARE, crop_size=SQUARE, do_pad=True, **HALF),
    "cropped beyond": lambda: CLIPImageProcessorPil(size={"shortest_edge": 50}, crop_size=SQUARE, **HALF),
}
SIZES = [(64, 64), (150, 100), (90, 211), (40, 31)]


@pytest.fixture(scope="module")
def loaded() -> LoadedModel:
    found = llava()
    for layer in found.anatomy.stack("vision").layers:
        layer.forward = lambda hidden_states, *args, **kwargs: hidden_states  # type: ignore[method-assign]
    return found


def inputs_of_layers(loaded: LoadedModel, images: list[Image.Image]) -> tuple[Any, Any]:
    """What goes into the first decoder layer at image tokens, and into the first encoder layer, by image."""
    kept: dict[str, torch.Tensor] = {}
    handles = [
        loaded.anatomy.stack(name)
        .layers[0]
        .register_forward_pre_hook(lambda _, args, name=name: kept.__setitem__(name, args[0]))
        for name in ("text", "vision")
    ]
    texts = ["<image> ?"] * len(images)
    inputs = loaded.processor(text=texts, images=[[image] for image in images], return_tensors="pt")
    with torch.no_grad():
        loaded.model(**inputs)
    for handle in handles:
        handle.remove()
    placeholders = inputs["input_ids"] == loaded.anatomy.image_token_id
    return kept["text"][placeholders].unflatten(0, (len(images), -1)).numpy(), kept["vision"].numpy()


def moved(before: NDArray[Any], after: NDArray[Any]) -> NDArray[np.float64]:
    """How far each token moved."""
    return np.asarray(np.abs(after - before).max(-1), np.float64)


def inverted(image: Image.Image, x: int, y: int, side: int) -> Image.Image:
    """The image with a square of its pixels inverted."""
    pixels = np.array(image)
    pixels[y : y + side, x : x + side] ^= 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("kind", PROCESSORS)
def test_image_layout__boxes_hold_the_pixels_that_move_their_token(
    loaded: LoadedModel, kind: str, size: tuple[int, int]
) -> None:
    loaded.processor.image_processor = PROCESSORS[kind]()
    # Nearest: what comes out of the resize depends on single pixels, so nothing is spread to neighbours.
    loaded.processor.image_processor.resample = PILImageResampling.NEAREST
    width, height = size
    image = picture(1, width, height)
    layout = image_layout(loaded.model, loaded.processor, width, height)
    points = np.random.default_rng(0).integers(0, (width, height), (30, 2)).tolist()
    seen = inputs_of_layers(loaded, [image, *(inverted(image, x, y, 1) for x, y in points)])
    informative = 0
    for patches, values in zip((layout.decoder, layout.encoder), seen, strict=True):
        for (x, y), now in zip(points, values[1:], strict=True):
            tokens = np.flatnonzero(moved(values[0], now))
            informative += len(tokens) > 0
            x0, y0, x1, y1 = patches.box[tokens].T
            assert ((x0 < x + 1) & (x < x1) & (y0 < y + 1) & (y < y1)).all(), (x, y)
    assert informative >= 6


def test_image_layout__every_patch_moves_exactly_its_own_token(loaded: LoadedModel) -> None:
    loaded.processor.image_processor = PROCESSORS["squeezed"]()
    image = picture(2)
    layout = image_layout(loaded.model, loaded.processor, 64, 64)
    places = [(row, col) for row in range(8) for col in range(8)]
    seen = inputs_of_layers(loaded, [image, *(inverted(image, 8 * col, 8 * row, 8) for row, col in places)])
    for patches, values in zip((layout.decoder, layout.encoder), seen, strict=True):
        for (row, col), now in zip(places, values[1:], strict=True):
            tokens = np.flatnonzero(moved(values[0], now))
            assert len(tokens) == 1
            assert (patches.row[tokens[0]], patches.col[tokens[0]]) == (row, col)
            assert patches.box[tokens[0]].tolist() == [8 * col, 8 * row, 8 * col + 8, 8 * row + 8]
            assert patches.tile[tokens[0]] == 0


def test_image_layout__class_token_has_no_place(loaded: LoadedModel) -> None:
    loaded.processor.image_processor = PROCESSORS["squeezed"]()
    encoder = image_layout(loaded.model, loaded.processor, 64, 64).encoder
    assert (encoder.tile[0], encoder.row[0], encoder.col[0]) == (0, -1, -1)
    assert np.isnan(encoder.box[0]).all()
    assert len(encoder) == 65


def test_image_layout__crop_covers_the_middle_and_padding_has_no_box(loaded: LoadedModel) -> None:
    loaded.processor.image_processor = PROCESSORS["cropped"]()
    cropped = image_layout(loaded.model, loaded.processor, 128, 64).decoder.box
    assert (np.nanmin(cropped[:, 0]), np.nanmax(cropped[:, 2])) == (32, 96)
    loaded.processor.image_processor = PROCESSORS["padded"]()
    padded = image_layout(loaded.model, loaded.processor, 128, 64).decoder
    outside = np.isnan(padded.box).any(1)
    assert set(padded.row[outside].tolist()) == {0, 1, 6, 7}
    assert np.nanmax(padded.box[:, 3]) == 64


def test_square_grid__counts_rows_first_and_cuts_at_the_edge() -> None:
    patches = square_grid(Geometry(30, 20, 2.0, 1.0, -2.0, 0.0), 2, 2, 10)
    assert patches.row.tolist() == [0, 0, 1, 1]
    assert patches.col.tolist() == [0, 1, 0, 1]
    assert patches.box.tolist() == [[0, 0, 18, 10], [18, 0, 30, 10], [0, 10, 18, 20], [18, 10, 30, 20]]


def test_image_layout__names_the_families_it_knows(loaded: LoadedModel) -> None:
    class Unknown:
        class config:  # noqa: N801
            model_type = "cubist"

    with pytest.raises(ModelError, match=r"'cubist'.*\n.*llava"):
        image_layout(Unknown(), loaded.processor, 64, 64)


def test_image_layout__a_blurred_image_is_refused() -> None:
    loaded = ZOO["llava_onevision"].build()
    loaded.model.config.vision_aspect_ratio = "anyres_max_1"
    with pytest.raises(CaptureError, match=r"64 x 64 pixels is blurred into fewer tokens.*\n.*down"):
        image_layout(loaded.model, loaded.processor, 64, 64)
    assert len(image_layout(loaded.model, loaded.processor, 64, 64, images=2).decoder) == 17


@pytest.mark.parametrize("name", ["llava_next", "internvl", "qwen2_vl", "idefics3"])
def test_image_layout__model_and_processor_must_belong_together(name: str) -> None:
    loaded = ZOO[name].build()
    vision = loaded.model.config.vision_config
    if name == "qwen2_vl":
        vision.patch_size = 5
    else:
        vision.image_size = [40, 40] if name == "internvl" else 40
    with pytest.raises(ModelError, match="from the same folder"):
        image_layout(loaded.model, loaded.processor, 64, 64)


def test_image_layout__pan_and_scan_puts_crops_behind_the_image() -> None:
    loaded = ZOO["gemma3_cropping"].build()
    square, long, tall = (
        image_layout(loaded.model, loaded.processor, *size).decoder for size in ((64, 60), (98, 40), (20, 90))
    )
    assert set(square.tile.tolist()) == {0}
    assert np.nanmax(long.box[long.tile == 0, 2]) == 98
    edges = [
        (float(long.box[long.tile == n, 0].min()), float(long.box[long.tile == n, 2].max())) for n in (1, 2)
    ]
    assert edges == [(0, 49), (49, 98)]
    # Three at most, though it is more than four times as tall as it is wide.
    assert [float(tall.box[tall.tile == n, 1].min()) for n in (1, 2, 3)] == [0, 30, 60]
    loaded.processor.images_kwargs = {**loaded.processor.images_kwargs, "do_pan_and_scan": False}
    assert set(image_layout(loaded.model, loaded.processor, 98, 40).decoder.tile.tolist()) == {0}
