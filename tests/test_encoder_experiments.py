"""Knock-out, scaling, steering and causal tracing inside an image encoder: the numbers of plain hooks."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from attention_by_hand import logits_by_hand
from numpy.typing import NDArray
from one_patch import CARRIED, CARRIES, bright_sample, carried_patch
from test_patching import inputs_of, naive
from test_pattern_patching import FAMILIES, projections, two_samples
from torch import Tensor
from zoo import ZOO, Family

from mechanistic.analysis import ablate, attention_knockout, causal_tracing, scale_attention, steer
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")
ENCODER: dict[str, Any] = {"stack": "vision", "quiet": True}


@dataclass(frozen=True)
class Seen:
    """A family's model, two samples of unequal images, and the labels of their patches."""

    name: str
    family: Family
    loaded: LoadedModel
    samples: tuple[Sample, ...]
    tables: list[dict[str, NDArray[Any]]]

    @property
    def attention(self) -> str:
        return f"{self.family.layers['vision']}.1.{self.family.halves_of('vision')[0]}"  # type: ignore[index]

    def boxed(self, row: int) -> NDArray[np.bool_]:
        """The patches of the first image in its left half, as `two_samples` has its box."""
        table = self.tables[row]
        width = np.nanmax(np.where(table["image_index"] == 0, table["box_x1"], np.nan))
        first = (table["patch_row"] >= 0) & (table["image_index"] == 0) & (table["box_x1"] <= 16)
        assert width == 32
        return np.asarray(first)

    def image(self, row: int) -> NDArray[np.bool_]:
        return np.asarray(self.tables[row]["patch_row"] >= 0)

    def prob(self, row: int, logits: Tensor) -> float:
        answer = self.loaded.tokenizer.convert_tokens_to_ids(self.samples[row].answer)
        return float(logits.float().softmax(-1)[answer])

    def hooked(self, row: int, changes: dict[int, Any], *, before: bool = False) -> Tensor:
        """Logits where what enters, or leaves, some layers is changed: (token of all crops, d_model)."""
        layers = self.loaded.model.get_submodule(self.family.layers["vision"])

        def hook(change: Any) -> Any:
            def run(_: Any, args: Any, *output: Any) -> Any:
                had = output[0] if output else args
                first = had if isinstance(had, Tensor) else had[0]
                new = change(first.reshape(-1, first.shape[-1])).reshape(first.shape)
                return new if isinstance(had, Tensor) else (new, *had[1:])

            return run

        with ExitStack() as hooks, torch.no_grad():
            for layer, change in changes.items():
                module = layers[layer]
                # Before those of the library, which keep what leaves a layer.
                add = module.register_forward_pre_hook if before else module.register_forward_hook
                hooks.callback(add(hook(change), prepend=True).remove)
            asked = inputs_of(self.loaded, self.samples[row])
            logits: Tensor = self.loaded.model(**asked, use_cache=False).logits[0, -1]
        return logits


@pytest.fixture(scope="module", params=FAMILIES)
def seen(request: pytest.FixtureRequest) -> Seen:
    family = ZOO[request.param]
    loaded, samples = family.build(), two_samples()
    # One image and two: patches of the second sample lie behind those of the first.
    samples = (replace(samples[0], images=samples[0].images[:1]), samples[1])
    texts = TokenTexts(loaded.tokenizer)
    batch = prepare_batch(loaded, samples, 0, max_new_tokens=0, texts=texts, generate=False)
    return Seen(request.param, family, loaded, samples, batch.encoder)


def rewritten(seen: Seen, row: int, query: NDArray[Any], key: NDArray[Any], factor: float | None) -> Tensor:
    """Scores between patches multiplied, or closed, by the seam in the library's own attention."""
    begins: list[int] = [0]

    def change(_: int, scores: Tensor) -> Tensor:
        crops, _, size, _ = scores.shape
        here = slice(begins[-1], begins[-1] + crops * size)
        begins.append(here.stop)
        own, other = (torch.from_numpy(each[here].reshape(crops, size)) for each in (query, key))
        chosen = (own[:, :, None] & other[:, None, :])[:, None]
        return (
            scores.masked_fill(chosen, -torch.inf)
            if factor is None
            else scores.where(~chosen, scores * factor)
        )

    return logits_by_hand(seen.loaded, seen.samples[row], seen.attention, scores=change)


def test_attention_knockout__in_the_encoder_is_the_scores_closed_by_hand(seen: Seen) -> None:
    with torch.no_grad():
        before = seen.loaded.model(**inputs_of(seen.loaded, seen.samples[1])).logits
    edges = [("subject_box", "image"), ("image", "subject_box")]
    got = attention_knockout(seen.samples, seen.loaded, edges=edges, layers=[1], metric="prob", **ENCODER)
    scaled = scale_attention(
        seen.samples, seen.loaded, edge=edges[1], layers=[1], factors=[1.0, 1.7], metric="prob", **ENCODER
    )
    for row in range(2):
        sides = {"subject_box": seen.boxed(row), "image": seen.image(row)}
        for place, (query, key) in enumerate(edges):
            logits = rewritten(seen, row, sides[query], sides[key], None)
            mine = got.knocked_out.isel(edge=place, layer=0)[row]
            assert float(mine) == pytest.approx(seen.prob(row, logits), abs=1e-6)
        logits = rewritten(seen, row, sides["image"], sides["subject_box"], 1.7)
        assert float(scaled.scaled.sel(factor=1.7)[row]) == pytest.approx(seen.prob(row, logits), abs=1e-6)
    np.testing.assert_allclose(scaled.scaled.sel(factor=1.0), scaled.clean, atol=1e-6)
    assert float(abs(got.effect).max()) > 1e-6
    with torch.no_grad():
        assert torch.equal(seen.loaded.model(**inputs_of(seen.loaded, seen.samples[1])).logits, before)


def test_steer__in_the_encoder_is_the_vector_added_by_hand(seen: Seen) -> None:
    width = seen.loaded.anatomy.stack("vision").width
    vectors = np.random.default_rng(0).standard_normal((2, width)).astype(np.float32)
    direction = xr.DataArray(vectors, {"class": ["left", "right"]}, ("class", "feature"))
    got = steer(
        seen.samples,
        seen.loaded,
        direction=direction,
        towards="answer",
        strengths=[0.0, 3.0],
        layers=0,
        place="subject_box",
        metric="prob",
        **ENCODER,
    )
    np.testing.assert_allclose(got.effect.sel(strength=0.0), 0, atol=1e-6)
    for row in range(2):
        chosen = torch.from_numpy(seen.boxed(row))

        def add(rows: Tensor, chosen: Tensor = chosen, row: int = row) -> Tensor:
            return rows + 3 * chosen[:, None] * torch.from_numpy(vectors[row])

        logits = seen.hooked(row, {0: add})
        mine = got.steered.sel(strength=3.0, layer=0)[row]
        assert float(mine) == pytest.approx(seen.prob(row, logits), abs=1e-6)


def test_causal_tracing__in_the_encoder_is_the_papers_definition(seen: Seen) -> None:
    got = causal_tracing(
        seen.samples,
        seen.loaded,
        corrupt="image",
        noise_samples=2,
        sites=["resid_post"],
        places=["subject_box", "image", "all"],
        **ENCODER,
    )
    entering: list[Tensor] = []
    clean: list[dict[int, Tensor]] = []
    for row in range(2):
        kept: dict[int, Tensor] = {}

        def keep(layer: int, kept: dict[int, Tensor] = kept) -> Any:
            return lambda rows: kept.setdefault(layer, rows.clone())

        seen.hooked(row, {0: keep(-1)}, before=True)
        seen.hooked(row, {0: keep(0), 1: keep(1)})
        entering.append(kept[-1][torch.from_numpy(seen.image(row))])
        clean.append(kept)
    deviation = 3 * float(torch.cat(entering).std())
    assert got.attrs["noise_standard_deviation"] == pytest.approx(deviation, rel=1e-5)
    for row in range(2):
        image = torch.from_numpy(seen.image(row))
        places = {"subject_box": torch.from_numpy(seen.boxed(row)), "image": image, "all": image | True}
        found: dict[Any, list[float]] = {}
        for copy in range(2):
            rng = np.random.default_rng([0, row, copy])
            noise = torch.zeros_like(clean[row][-1])
            noise[image] = torch.from_numpy(rng.standard_normal(entering[row].shape) * deviation).float()
            layers = seen.loaded.model.get_submodule(seen.family.layers["vision"])

            def spoil(_: Any, args: Any, noise: Tensor = noise) -> Any:
                return (args[0] + noise.reshape(args[0].shape), *args[1:])

            handle = layers[0].register_forward_pre_hook(spoil)
            try:
                found.setdefault("", []).append(seen.prob(row, seen.hooked(row, {})))
                for layer in (0, 1):
                    for place, where in places.items():
                        state = clean[row][layer]
                        restore = {layer: lambda rows: torch.where(where[:, None], state, rows)}  # noqa: B023
                        logits = seen.hooked(row, restore)
                        found.setdefault((layer, place), []).append(seen.prob(row, logits))
            finally:
                handle.remove()
        assert float(got.corrupted[row]) == pytest.approx(np.mean(found.pop("")), abs=1e-6)
        for (layer, place), values in found.items():
            mine = got.restored.sel(layer=layer, place=place, site="resid_post")[row]
            assert float(mine) == pytest.approx(np.mean(values), abs=1e-6)
    alone = causal_tracing(
        seen.samples,
        seen.loaded,
        corrupt="image",
        noise_samples=2,
        sites=["attn_out", "mlp_out"],
        batch_size=2,
        **ENCODER,
    )
    np.testing.assert_allclose(alone.corrupted, got.corrupted, atol=1e-6)
    assert alone.place.values.tolist() == ["subject_box", "background"]
    if seen.name != "qwen3_vl":
        # There the first layer enters the decoder by itself, too.
        np.testing.assert_allclose(got.recovered.sel(place="all", layer=1), 1, atol=1e-3)


def test_ablate__in_the_encoder_is_the_rows_replaced_by_hand(seen: Seen) -> None:
    vision = seen.loaded.anatomy.stack("vision")
    how: dict[str, Any] = {"layers": [1], "place": "subject_box", "metric": "prob", **ENCODER}
    other = ablate(seen.samples, seen.loaded, method="resample", site="z", heads=[1], **how)
    columns = slice(vision.head_width, 2 * vision.head_width)
    module = f"{seen.family.layers['vision']}.1.{projections(seen.name)['z']}"
    kept: list[Tensor] = []
    for row in range(2):
        rows = np.flatnonzero(seen.boxed(row)).tolist()
        assert rows == np.flatnonzero(seen.boxed(0)).tolist()
        pair = (seen.samples[row], seen.samples[1 - row])
        logits = naive(seen.loaded, *pair, module, rows, before=True, heads=columns)
        assert float(other.ablated[row, 0, 0]) == pytest.approx(seen.prob(row, logits), abs=1e-6)
        seen.hooked(row, {1: lambda rows: kept.append(rows.clone()) or rows})
    for method in ("mean", "zero"):
        got = ablate(seen.samples, seen.loaded, method=method, site="resid_post", **how)
        for row in range(2):
            here = torch.from_numpy(seen.boxed(row))
            new = kept[row].clone()
            new[here] = 0
            if method == "mean":
                new[here] = (
                    kept[0][torch.from_numpy(seen.boxed(0))] + kept[1][torch.from_numpy(seen.boxed(1))]
                ) / 2
            logits = seen.hooked(row, {1: lambda _, new=new: new})
            assert float(got.ablated[row, 0]) == pytest.approx(seen.prob(row, logits), abs=1e-6)


def test_encoder__its_planted_head_and_patches_are_named() -> None:
    """The brightness of patch 12 goes to patch 27 by one head of the second layer; behind the class token."""
    model, source, marked, other = carried_patch(12, 27), 13, 28, 40
    bright = replace(bright_sample(only=12)[0], answer="left")
    cut = attention_knockout(
        [bright],
        model,
        edges=[(marked, source), (source, marked), (marked, other), (other, source)],
        per_head=True,
        **ENCODER,
    )
    assert np.argwhere(np.abs(cut.effect.values[0]) > 0.05).tolist() == [[0, *CARRIES]]
    assert float(cut.knocked_out.min()) == pytest.approx(0, abs=0.1)
    traced = causal_tracing(
        [bright],
        model,
        corrupt=f"@{source}",
        noise_scale=0.5,
        noise_samples=3,
        sites=["resid_pre", "resid_post"],
        places=[source, marked, other],
        metric="logit_diff",
        **ENCODER,
    )
    assert abs(float(traced.average_total_effect)) > 0.01
    before, behind = [1, 0, 0], [0, 1, 0]
    expected = [[before, before], [before, behind]]
    np.testing.assert_allclose(traced.recovered, expected, atol=0.02)
    vector = np.zeros(48)
    vector[CARRIED] = -1
    steered = steer(
        [bright],
        model,
        direction=xr.DataArray(vector, dims="feature"),
        strengths=[1.0],
        place=marked,
        **ENCODER,
    )
    # What the answer is read from is taken out, before and after the head has written it.
    np.testing.assert_allclose(steered.effect, -2, atol=0.05)
    elsewhere = steer(
        [bright],
        model,
        direction=xr.DataArray(vector, dims="feature"),
        strengths=[1.0],
        place=other,
        **ENCODER,
    )
    np.testing.assert_allclose(elsewhere.effect, 0, atol=0.01)


def test_encoder__says_which_places_it_has() -> None:
    model, samples = ZOO["llava"].build(), two_samples()
    with pytest.raises(DimensionError, match=r"no 'is_last_prompt'.*\n.*only decoder tokens have texts"):
        attention_knockout(samples, model, **ENCODER)
    with pytest.raises(DataError, match=r"no token at 'object_box', of its 34 tokens.\n.* subject_box"):
        attention_knockout(samples, model, edges=[("image", "object_box")], **ENCODER)
    with pytest.raises(SpecificationError, match=r"no stack 'ears' to change.\n  Choose 'text'"):
        scale_attention(samples, model, stack="ears")  # type: ignore[arg-type]
    with pytest.raises(SpecificationError, match="no layer 2; the vision stack has 2"):
        causal_tracing(samples, model, corrupt="image", layers=2, **ENCODER)
    with pytest.raises(DimensionError, match="the residual stream has 16 numbers"):
        steer(samples, model, direction=xr.DataArray(np.ones(3), dims="feature"), place="image", **ENCODER)
