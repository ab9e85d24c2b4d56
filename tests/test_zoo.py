"""The zoo through transformers: the contract for every family, and what is about this backend alone."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from capture_contract import TOLERANCE, CaptureContract, Captured, sites_of
from library_alone import ANSWER, Seen, alone, unembedding, watching
from numpy.typing import NDArray
from PIL import Image
from tiny_models import Listed
from transformers.image_utils import PILImageResampling
from zoo import ZOO, Family, samples
from zoo_parts import tokenizer
from zoo_refused import REFUSED

from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.failures import SampleError
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run, site
from mechanistic.store.errors import CaptureError, ModelError, SpecificationError
from mechanistic.store.schema import KIND

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

# Share of a tensor's largest value by which half precision may differ from single, over two or three layers.
HALF_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}


@pytest.fixture(scope="module", params=ZOO)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    family = ZOO[request.param]
    loaded = family.build()
    asked = samples(family)
    path = tmp_path_factory.mktemp(request.param) / "run"
    longest = ANSWER if loaded.model.can_generate() else 0
    settings: dict[str, Any] = {"batch_size": 4, "max_new_tokens": longest, "quiet": True}
    capture_run(loaded, Listed(asked), path, sites=sites_of(family), **settings)
    run = open_run(path)
    prompts = run["samples"].to_dataset().prompt.values
    seen = [alone(family, loaded, str(prompt), each) for prompt, each in zip(prompts, asked, strict=True)]
    return Captured(family, loaded, path, run, seen, unembedding(family, loaded))


class TestTransformers(CaptureContract):
    """All families; one forward over prompt and answer."""

    def test_zoo__what_edits_change_is_in_the_run(self, captured: Captured) -> None:
        proven, family = captured.run.attrs["proven"], captured.family
        assert proven["forwards"] == 3 + len(family.layers) + len(family.cross)
        for name in (*family.layers, *(f"{stack}/x" for stack in family.cross)):
            assert proven["stacks"][name]["logits_change_by_edited_row"] > 0
        for stack, layers in family.cross.items():
            report = proven["stacks"][f"{stack}/x"]
            assert report["taps"] == len(layers)
            assert report["attention_output_error"] < TOLERANCE


SEEING = [name for name, family in ZOO.items() if family.sees]


@pytest.fixture(scope="module", params=SEEING)
def still(request: pytest.FixtureRequest) -> tuple[Family, LoadedModel]:
    """A model whose encoder layers do nothing and whose processor keeps pixels as they are."""
    family = ZOO[request.param]
    loaded = family.build()
    for stack in family.layers:
        for layer in loaded.model.get_submodule(family.layers[stack]) if "vision" in stack else ():
            layer.forward = lambda hidden_states, *args, **kwargs: hidden_states
    images = getattr(loaded.processor, "image_processor", loaded.processor)
    # Nearest: what comes out of the resize depends on single pixels, so nothing is spread to neighbours.
    images.resample = PILImageResampling.NEAREST
    return family, loaded


# What the tokens that cross-attention reads are called by the library.
STATES = ("cross_attention_states", "encoder_hidden_states")


def first_inputs(
    family: Family, loaded: LoadedModel, images: list[Image.Image]
) -> tuple[Batch, dict[str, Any]]:
    """A batch, and (token, d_model) that goes into the first layer of each stack, and what is crossed to."""
    sample = Sample("s", tuple(images), "where is the red square ?")
    batch = prepare_batch(loaded, [sample], 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    seen = Seen()
    crossed: list[torch.Tensor] = []
    with ExitStack() as hooks, torch.no_grad(), watching(family, loaded.model, seen):
        for stack, layers in family.cross.items():
            layer = loaded.model.get_submodule(family.layers[stack])[layers[0]]
            cross = next(part for path, part in layer.named_children() if "cross" in path)
            handle = cross.register_forward_pre_hook(
                lambda _, args, kwargs: crossed.extend(kwargs[name] for name in STATES if name in kwargs),
                with_kwargs=True,
            )
            hooks.callback(handle.remove)
        loaded.model(**batch.inputs)
    before = {stack: seen.stream(stack, "resid_pre", 0) for stack in family.layers}
    return batch, before | ({"xk": crossed[0].flatten(0, 1).numpy()} if crossed else {})


def test_zoo__a_pixel_moves_the_tokens_whose_boxes_hold_it(still: tuple[Family, LoadedModel]) -> None:
    family, loaded = still
    rng = np.random.default_rng(0)
    informative = dict.fromkeys([*family.layers, "xk"], 0)
    for width, height in family.sizes:
        other = Image.fromarray(rng.integers(0, 256, (40, 40, 3), np.uint8))
        pixels = rng.integers(0, 256, (height, width, 3), np.uint8)
        two = width == height and family.most > 1
        images = [other, Image.fromarray(pixels)] if two else [Image.fromarray(pixels)]
        batch, before = first_inputs(family, loaded, images)
        for share in (4, 4, 4, 2, 2, 2):
            side_x, side_y = width // share, height // share
            x, y = int(rng.integers(0, width - side_x + 1)), int(rng.integers(0, height - side_y + 1))
            changed = pixels.copy()
            changed[y : y + side_y, x : x + side_x] ^= 255
            _, after = first_inputs(family, loaded, [*images[:-1], Image.fromarray(changed)])
            region = (x, y, x + side_x, y + side_y)
            for stack in before:
                columns = batch.table("vision" if "vision" in stack else stack)[0]
                moved = np.abs(after[stack] - before[stack]).max(-1) > 0
                if family.placeless and stack in ("text", "qformer"):
                    seen = columns["kind"] == KIND["image"]
                    assert (columns["patch_row"] == -1).all()
                    assert np.isnan(columns["box_x0"]).all()
                    assert not moved[~seen].any()
                    assert stack == "qformer" or moved[seen].all()
                else:
                    certain, possible = overlapping(columns, len(images) - 1, region)
                    assert not (certain & ~moved).any(), (stack, width, height, region)
                    assert not (moved & ~possible).any(), (stack, width, height, region)
                    informative[stack] += int(certain.any())
    # The words of two towers side by side hold no image, and those of a model that crosses over none either.
    placed = {stack for stack in family.layers if "vision" in stack} | ({"xk"} if family.cross else set())
    if loaded.model.can_generate() and not family.cross:
        placed.add("text")
    assert min(informative[stack] for stack in placed) >= 6


def overlapping(
    columns: dict[str, NDArray[Any]], image: int, region: tuple[int, ...]
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Tokens of one image whose box shares a good part with a region, and those that share any of it."""
    x0, y0, x1, y1 = (columns[f"box_{edge}"] for edge in ("x0", "y0", "x1", "y1"))
    across = np.minimum(x1, region[2]) - np.maximum(x0, region[0])
    down = np.minimum(y1, region[3]) - np.maximum(y0, region[1])
    mine = columns["image_index"] == image
    with np.errstate(invalid="ignore"):
        possible = mine & (across > 0) & (down > 0)
        certain = mine & (across > (x1 - x0) * 0.5) & (down > (y1 - y0) * 0.5)
    return certain, possible


def test_zoo__the_image_changes_the_logits(captured: Captured) -> None:
    if not captured.family.sees:
        return
    sample = samples(captured.family)[0]
    texts = TokenTexts(captured.loaded.tokenizer)
    logits = []
    for image in (sample.images[0], Image.new("RGB", sample.images[0].size, (200, 30, 90))):
        asked = Sample("s", (image,), sample.question)
        batch = prepare_batch(captured.loaded, [asked], 0, max_new_tokens=0, texts=texts)
        with torch.no_grad():
            out = captured.loaded.model(**batch.inputs)
        names = ("logits", "logits_per_image", "itm_score", "last_hidden_state")
        logits.append(next(out[name] for name in names if name in out).flatten(0, -2)[-1])
    assert float((logits[0] - logits[1]).abs().max()) > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_zoo__a_family_without_an_adapter_is_refused_before_anything_is_written(
    name: str, tmp_path: Path
) -> None:
    build, says = REFUSED[name]
    loaded = LoadedModel(build().eval(), tokenizer(image_token="<image>"), name)
    with pytest.raises(ModelError, match=says):
        capture_run(loaded, Listed(samples(ZOO["llava"])), tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "name", ["qwen2_5_vl", "qwen2_vl", "gemma3", "llava", "llama", "mllama", "blip", "blip2"]
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zoo__half_precision_stays_close_to_single(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    family, values = ZOO[name], {}
    groups = [f"{stack}/{what}" for stack in family.layers for what in ("resid_post", "q", "k")]
    groups += [f"{stack}/{what}" for stack in family.cross for what in ("xq", "xk")]
    sites = [group.replace("/", ".*.") for group in groups]
    for precision in (dtype, torch.float32):
        loaded = family.build()
        loaded.model.to(dtype).to(precision)
        if "qformer" in family.layers:
            # As from_pretrained leaves it.
            loaded.model.qformer.float()
            loaded.model.query_tokens.data = loaded.model.query_tokens.float()
        path = tmp_path / str(precision)
        asked = Listed(samples(family)[:2])
        capture_run(loaded, asked, path, sites=sites, max_new_tokens=0, quiet=True)
        values[precision] = open_run(path)
    for name in groups:
        got, exact = (site(values[precision], name) for precision in (dtype, torch.float32))
        array = name.split("/")[1]
        computed = torch.float32 if name.startswith("qformer") else dtype
        # bfloat16 is kept as float32, which holds it exactly; float16 as it is.
        assert got.attrs["source_dtype"] == str(computed).removeprefix("torch.")
        assert got[array].dtype == (np.float16 if computed == torch.float16 else np.float32)
        difference = np.abs(got[array].values.astype(np.float32) - exact[array].values)
        assert float(difference.max()) <= HALF_TOLERANCE[dtype] * float(np.abs(exact[array].values).max())


def test_zoo__a_prompt_too_long_for_a_model_of_one_length_is_named() -> None:
    loaded = ZOO["siglip"].build()
    asked = [Sample("short", (), "where ?"), Sample("long", (), "red " * 30)]
    with pytest.raises(CaptureError, match=r"'long': a prompt has 32 tokens; this model reads 24") as caught:
        prepare_batch(loaded, asked, 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    assert isinstance(caught.value, SampleError)
    assert caught.value.row == 1


@pytest.mark.parametrize(
    ("name", "answer", "says"),
    [
        ("clip", 0, "prompt has 52 tokens; this model reads 40"),
        ("gpt2", 2000, "prompt has 51 tokens and up to 2000 of its answer; this model reads 1024"),
        ("blip2", 60, "prompt has 55 tokens and up to 60 of its answer; this model reads 99"),
    ],
)
def test_zoo__a_prompt_with_more_tokens_than_positions_is_named(name: str, answer: int, says: str) -> None:
    loaded = ZOO[name].build()
    images = samples(ZOO[name])[0].images
    asked = [Sample("short", images, "where ?"), Sample("long", images, "red " * 50)]
    if answer:
        asked = asked[1:]
    with pytest.raises(SampleError, match=f"'long': its {says}") as caught:
        prepare_batch(loaded, asked, 0, max_new_tokens=answer, texts=TokenTexts(loaded.tokenizer))
    assert caught.value.row == len(asked) - 1


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "gemma3"])
def test_zoo__rotary_positions_have_no_end(name: str) -> None:
    assert ZOO[name].build().anatomy.positions is None


@pytest.mark.parametrize(("name", "count"), [("blip", 0), ("blip2", 2), ("instructblip", 0), ("mllama", 0)])
def test_zoo__a_sample_with_another_number_of_images_is_named(name: str, count: int) -> None:
    loaded = ZOO[name].build()
    asked = [samples(ZOO[name])[0], Sample("odd", (Image.new("RGB", (32, 32)),) * count, "where ?")]
    with pytest.raises(SampleError, match=rf"'odd' has {count} images; .* reads 1") as caught:
        prepare_batch(loaded, asked, 0, max_new_tokens=0, texts=TokenTexts(loaded.tokenizer))
    assert caught.value.row == 1


def test_zoo__a_layer_that_does_not_attend_so_is_named(tmp_path: Path) -> None:
    loaded, asked = ZOO["mllama"].build(), Listed(samples(ZOO["mllama"]))
    for sites, says in (
        (["text.1.q"], "'text.1.q\\[all\\]': text has self-attention in layer 0, 2 only"),
        (["text.0.xk"], "text has cross-attention in layer 1 only.*\n.*text.*.xk"),
        (["vision.*.xq"], "no layer of vision has cross-attention in this model.*\n.*vision.*.q,"),
    ):
        with pytest.raises(SpecificationError, match=says):
            capture_run(loaded, asked, tmp_path / "run", sites=sites, quiet=True)


def test_zoo__a_model_that_writes_nothing_is_not_asked_for_answers(tmp_path: Path) -> None:
    loaded = ZOO["bert"].build()
    with pytest.raises(ModelError, match=r"BertForMaskedLM does not write text.*\n.*max_new_tokens=0"):
        capture_run(loaded, Listed(samples(ZOO["bert"])), tmp_path / "run", quiet=True)
