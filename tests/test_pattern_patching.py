"""Rows of attention patched from a run, and every site of an image encoder: the numbers of plain hooks."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from attention_by_hand import patched_by_hand
from hand_built import AT_COLOUR, AT_LAST, SECOND, one_head, pairs, two_steps
from test_patching import difference, naive
from tiny_models import Listed, picture
from torch import Tensor
from zoo import ZOO, Family

from mechanistic.analysis.patching import patch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel, load_model
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run
from mechanistic.store.errors import DataError, MissingSiteError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

FAMILIES = ("llava", "qwen2_vl", "qwen2_5_vl", "qwen3_vl", "gemma3", "internvl")
QWEN = {"q": "attn.qkv", "k": "attn.qkv", "v": "attn.qkv", "z": "attn.proj"}
CLIP = {**{site: f"self_attn.{site}_proj" for site in "qkv"}, "z": "self_attn.out_proj"}
INTERN = {**{site: f"attention.{site}_proj" for site in "qkv"}, "z": "attention.projection_layer"}


def projections(name: str) -> dict[str, str]:
    """Where the queries, keys and values of an encoder's layer come from, and its heads' outputs go to."""
    return QWEN if "qwen" in name else INTERN if name == "internvl" else CLIP


@dataclass(frozen=True)
class Stored:
    """A family's model, two samples alike in length, and the run of both."""

    name: str
    family: Family
    loaded: LoadedModel
    pair: tuple[Sample, ...]
    run: xr.DataTree

    def patched(self, **how: Any) -> xr.Dataset:
        asked = {"base": [1], "source": [0], "min_difference": 0, "quiet": True, "layers": 1}
        return patch(self.run, self.loaded, **asked | how)

    def close(self, got: float, logits: Tensor) -> bool:
        expected = difference(self.loaded, logits, *self.pair)
        return bool(got == pytest.approx(expected, abs=1e-5 * float(logits.abs().max())))


def two_samples() -> tuple[Sample, ...]:
    corners = ("x0", "y0", "x1", "y1")
    box = {f"subject_{corner}": edge for corner, edge in zip(corners, (0, 0, 16, 32), strict=True)}
    return tuple(
        Sample(
            f"s{number}",
            (picture(number, 32, 32), picture(10 + number, 32, 32)),
            f"where is the {thing} relative to the blue circle ?",
            ("left", "right"),
            answer,
            group="g",
            subject=thing,
            object="blue circle",
            extra=box,
        )
        for number, (answer, thing) in enumerate([("left", "red square"), ("right", "green ring")])
    )


@pytest.fixture(scope="module", params=FAMILIES)
def stored(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Stored:
    family = ZOO[request.param]
    loaded, pair = family.build(), two_samples()
    path = tmp_path_factory.mktemp("patterns") / "run"
    encoder = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
    sites = ["text.*.resid_pre", "text.*.q", "text.*.k", *(f"vision.*.{site}" for site in encoder)]
    capture_run(loaded, Listed(pair), path, sites=sites, max_new_tokens=0, quiet=True)
    return Stored(request.param, family, loaded, pair, open_run(path))


def patches_in_box(stored: Stored) -> list[int]:
    """The encoder's tokens whose patch lies in the left half."""
    table = stored.run["tokens/vision"].to_dataset()
    mine = table.isel({str(table["position"].dims[0]): table["sample_index"].values == 1})
    found = np.flatnonzero((mine["box_x1"].values <= 16) & (mine["image_index"].values == 0)).tolist()
    assert 0 < len(found) < (mine["image_index"].values == 0).sum()
    return found


@pytest.mark.parametrize("heads", ["all", 1])
def test_patch__rows_of_attention_are_those_put_in_by_hand(stored: Stored, heads: Any) -> None:
    chosen = slice(None) if heads == "all" else heads
    path = f"{stored.family.layers['text']}.1.{stored.family.halves_of('text')[0]}"  # type: ignore[index]
    path = path if stored.name != "gemma3" else f"{stored.family.layers['text']}.1.self_attn"
    result = stored.patched(sites="text/pattern", positions=["last", "subject"], heads=heads)
    table = stored.run["tokens/text"].to_dataset()
    mine = table.isel(token=table["sample_index"].values == 1)
    for role, column in (("last", "is_last_prompt"), ("subject", "is_subject")):
        rows = np.flatnonzero(mine[column].values).tolist()
        logits = patched_by_hand(stored.loaded, stored.pair[1], stored.pair[0], path, rows, chosen)
        assert stored.close(result["patched"].sel(role=role).item(), logits)
    again = stored.patched(sites="pattern", positions=["last", "subject"], heads=heads, recompute=True)
    np.testing.assert_allclose(again["patched"], result["patched"], atol=1e-5)
    assert float(abs(result["effect"]).max()) > 1e-4


@pytest.mark.parametrize("layer", [0, 1])
def test_patch__rows_of_the_encoders_attention_are_those_put_in_by_hand(stored: Stored, layer: int) -> None:
    path = f"{stored.family.layers['vision']}.{layer}.{stored.family.halves_of('vision')[0]}"  # type: ignore[index]
    rows = patches_in_box(stored)
    asked: dict[str, Any] = {"sites": "vision/pattern", "positions": "subject_box", "layers": layer}
    for heads, chosen in (("all", slice(None)), (1, 1)):
        result = stored.patched(**asked, heads=heads)
        logits = patched_by_hand(stored.loaded, stored.pair[1], stored.pair[0], path, rows, chosen)
        assert stored.close(result["patched"].item(), logits)
    again = stored.patched(**asked, heads=1, recompute=True)
    np.testing.assert_allclose(again["patched"], result["patched"], atol=1e-5)
    assert float(abs(result["effect"]).max()) > 1e-6


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"])
def test_patch__every_site_of_the_encoder_is_the_loop_of_hooks(stored: Stored, site: str) -> None:
    layer, rows = f"{stored.family.layers['vision']}.1", patches_in_box(stored)
    attention, mlp, _ = stored.family.halves_of("vision") or ("", "", "")
    before, columns, heads = site in ("resid_pre", "z"), None, None
    if site in "qkvz":
        paths = projections(stored.name)
        stack = stored.loaded.anatomy.stack("vision")
        start = stack.head_width + (
            0 if paths is not QWEN or site == "z" else "qkv".index(site) * stack.width
        )
        layer, heads = f"{layer}.{paths[site]}", 1
        columns = slice(start, start + stack.head_width)
    elif site in ("attn_out", "mlp_out"):
        layer = f"{layer}.{attention if site == 'attn_out' else mlp}"
    logits = naive(stored.loaded, stored.pair[1], stored.pair[0], layer, rows, before=before, heads=columns)
    asked = {"sites": f"vision/{site}", "positions": "subject_box", "heads": heads}
    result = stored.patched(**asked)
    assert stored.close(result["patched"].item(), logits)
    again = stored.patched(**asked, recompute=True)
    np.testing.assert_allclose(again["patched"], result["patched"], atol=1e-5)


def test_patch__all_of_the_encoder_is_the_other_image(stored: Stored) -> None:
    sites = ["vision/resid_pre", "vision/resid_mid", "vision/resid_post"]
    first = stored.patched(sites=sites, layers=0, positions="all")
    projector = stored.patched(sites="projector", layers=None)
    together = first["patched"].values[0, :, 0, 0]
    np.testing.assert_allclose(together, together[0], atol=1e-5)
    # In Qwen3-VL what leaves the first layer enters the decoder by itself, too.
    if stored.name != "qwen3_vl":
        last = stored.patched(sites="vision/resid_post", positions="all")["patched"].item()
        np.testing.assert_allclose([*together, last], projector["patched"].item(), atol=1e-4)


def test_patch__rows_of_attention_name_the_planted_head(tmp_path: Path) -> None:
    for model, planted in ((one_head(), None), (two_steps("k"), SECOND)):
        path = tmp_path / f"run-{planted}"
        capture_run(model, Listed(pairs(1)), path, sites=["text.*.resid_pre"], max_new_tokens=0, quiet=True)
        asked: dict[str, Any] = {"base": [1], "source": [0], "recompute": True, "quiet": True}
        result = patch(path, model, sites="text/pattern", positions=[AT_LAST, AT_COLOUR], **asked)
        strong = np.argwhere(np.abs(result["recovered_mean"].values) > 0.05).tolist()
        # The one head looks at the same place in both; where a key was moved, the look tells them apart.
        assert strong == ([] if planted is None else [[planted[0], 0, planted[1]]])
        if planted is not None:
            found = result["recovered_mean"].sel(layer=planted[0], head=planted[1], role=f"@{AT_LAST}")
            assert float(found) == pytest.approx(1, abs=0.02)


def test_patch__rows_of_attention_of_the_bundled_model_are_those_put_in_by_hand(tmp_path: Path) -> None:
    tiny, shapes = load_model("spatial-tiny"), Shapes(4, distractor=0.0)
    sites = ["text.*.resid_pre", *(f"{stack}.*.{site}" for stack in ("text", "vision") for site in "qk")]
    capture_run(tiny, shapes, tmp_path / "run", sites=sites, max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {"layers": 2, "max_pairs": 1, "heads": "all", "quiet": True}
    for site, rows, path in (
        ("text/pattern", [77, 70], "model.language_model.layers.2.self_attn"),
        ("vision/pattern", [20, 41], "model.vision_tower.encoder.layers.2.self_attn"),
    ):
        result = patch(tmp_path / "run", tiny, sites=site, positions=rows, **asked)
        (clean,), (corrupt,) = result["clean_id"].values, result["corrupt_id"].values
        named = {sample.sample_id: sample for sample in shapes}
        for place, row in enumerate(rows):
            logits = patched_by_hand(tiny, named[corrupt], named[clean], path, [row])
            expected = difference(tiny, logits, named[clean], named[corrupt])
            assert float(result["patched"][0, 0, place]) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("stored", ["llava", "qwen2_5_vl"], indirect=True)
def test_patch__stored_rows_of_attention_are_enough(stored: Stored, tmp_path: Path) -> None:
    sites = ["text.*.resid_pre", "text.*.pattern[last]", "vision.*.pattern"]
    capture_run(
        stored.loaded, Listed(stored.pair), tmp_path / "run", sites=sites, max_new_tokens=0, quiet=True
    )
    rows = replace(stored, run=open_run(tmp_path / "run"))
    for how in (
        {"sites": "pattern", "positions": "last"},
        {"sites": "vision.pattern", "positions": "subject_box", "heads": "all"},
    ):
        np.testing.assert_allclose(
            rows.patched(**how)["patched"], stored.patched(**how)["patched"], atol=1e-5
        )
    with pytest.raises(MissingSiteError, match=r"text/pattern of 2 of 2 tokens of sample"):
        rows.patched(sites="pattern", positions="subject")
    with pytest.raises(
        MissingSiteError, match=r"does not hold vision/z of layer 1.*\n.*'vision\.\*\.z\[all\]'"
    ):
        rows.patched(sites="vision/z", positions="image")


@pytest.mark.parametrize("stored", ["qwen2_vl"], indirect=True)
def test_patch__refuses_attention_between_samples_of_other_lengths(stored: Stored, tmp_path: Path) -> None:
    longer = replace(stored.pair[1], question="where is the very green ring relative to the blue circle ?")
    wider = replace(stored.pair[1], images=(picture(7, 64, 32),))
    taller = replace(stored.pair[0], images=(picture(7, 32, 64),))
    listed = Listed((stored.pair[0], longer, wider, taller))
    sites = ["text.*.resid_pre", "text.*.q", "text.*.k"]
    capture_run(stored.loaded, listed, tmp_path / "run", sites=sites, max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {"sites": "pattern", "positions": "last", "quiet": True}
    run = open_run(tmp_path / "run")
    with pytest.raises(
        DataError, match=r"have \d+ and \d+ tokens, so a row of attention.*\n.*patch z, q or k"
    ):
        patch(run, stored.loaded, base=[1], source=[0], **asked)
    with pytest.raises(DataError, match=r"have images in different places"):
        patch(run, stored.loaded, base=[2], source=[3], **asked)
