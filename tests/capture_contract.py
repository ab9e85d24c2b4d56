"""What every backend owes for every family: a run, stored and reopened, is what transformers computes itself.

A backend's tests inherit `CaptureContract` and give it the fixture `captured`. The reference is the library
alone, sample by sample; the run was captured from requests of unequal lengths that were together in a batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from library_alone import Seen
from numpy.typing import NDArray
from zoo import NORMED, Family

from mechanistic.analysis import head_importance, logit_attribution
from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.capture.models import LoadedModel
from mechanistic.store import site
from mechanistic.store.errors import MissingSiteError

TOLERANCE = 1e-5
INNER = ("attn_out", "resid_mid", "mlp_out")
RESIDUAL = dict.fromkeys(("resid_pre", "resid_post", *INNER), ("d_model",))
# Dimensions of a site behind its layers and tokens.
DIMS = {**RESIDUAL, **dict.fromkeys("qz", ("head", "d_head")), **dict.fromkeys("kv", ("kv_head", "d_head"))}
CROSS_SITES = ("xq", "xk", "xv", "xz")


def sites_of(family: Family) -> list[str]:
    """What a run must hold for the contract."""
    return [
        *(f"{stack}.*.{name}" for stack in family.layers for name in _names(family, stack)),
        *(f"{stack}.*.{name}" for stack in family.cross for name in CROSS_SITES),
    ]


def _names(family: Family, stack: str) -> list[str]:
    return [name for name in DIMS if name not in INNER or family.halves_of(stack) is not None]


@dataclass
class Captured:
    """A family's model, its run, and the reference of each sample."""

    family: Family
    loaded: LoadedModel
    path: Path
    run: xr.DataTree
    seen: list[Seen]
    unembedding: NDArray[Any] | None

    def rows(self, name: str, number: int) -> NDArray[Any]:
        """Values (layer, row, ...) of one sample."""
        data = site(self.run, name)
        array = data[name.split("/")[1]]
        values: NDArray[Any] = array.isel(
            {array.dims[1]: np.flatnonzero(data.sample_index.values == number)}
        ).values
        return values

    def depth(self, stack: str) -> int:
        return len(self.loaded.model.get_submodule(self.family.layers[stack]))

    def attending(self, stack: str) -> list[int]:
        """The layers that attend to tokens of their own stack, as an outsider knows them."""
        return list(self.family.own.get(stack, range(self.depth(stack))))


def close(got: NDArray[Any], expected: NDArray[Any]) -> None:
    """Within `TOLERANCE` of the largest value of this layer of this sample."""
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))


class CaptureContract:
    """Inherited by the tests of each backend."""

    def test_contract__every_number_has_its_layer_token_and_head(self, captured: Captured) -> None:
        for stack in captured.family.layers:
            layers = {
                name: captured.attending(stack) if name in "qkvz" else range(captured.depth(stack))
                for name in _names(captured.family, stack)
            }
            for name, expected in layers.items():
                data = site(captured.run, f"{stack}/{name}")
                assert data[name].dims[2:] == DIMS[name]
                assert data.layer.values.tolist() == list(expected)
                counts = np.bincount(data.sample_index.values, minlength=len(captured.seen))
                assert data.position.values.tolist() == [at for count in counts for at in range(count)]
                # SigLIP pads every text to one length, and reads the padding.
                uneven = stack == "text" and "padding" not in captured.family.text
                assert not uneven or len(set(counts.tolist())) > 1
                for dim in DIMS[name][:-1]:
                    assert data[dim].values.tolist() == list(range(data.sizes[dim]))

    def test_contract__answers_are_what_the_library_generates_alone(self, captured: Captured) -> None:
        table = captured.run["tokens/text"].to_dataset()
        for number, seen in enumerate(captured.seen):
            here = table.isel(token=np.flatnonzero(table.sample_index.values == number))
            assert here.token_id.values[here.kind.values == 3].tolist() == seen.answer
        assert any(seen.answer for seen in captured.seen) == captured.loaded.model.can_generate()

    def test_contract__residuals_are_the_layers_inputs_and_outputs(self, captured: Captured) -> None:
        for stack in captured.family.layers:
            for number, seen in enumerate(captured.seen):
                for end in ("resid_pre", "resid_post"):
                    rows = captured.rows(f"{stack}/{end}", number)
                    assert len(rows) == captured.depth(stack)
                    for layer, got in enumerate(rows):
                        close(got, seen.stream(stack, end, layer)[: len(got)])

    def test_contract__residuals_are_the_librarys_hidden_states(self, captured: Captured) -> None:
        stack = "text" if "text" in captured.family.layers else "vision"
        for number, seen in enumerate(captured.seen):
            first, after = (
                captured.rows(f"{stack}/resid_pre", number)[0],
                captured.rows(f"{stack}/resid_post", number),
            )
            # The last one has been through the final norm.
            for layer, got in enumerate([first, *after[:-1]]):
                states = torch.cat([step[layer].flatten(0, 1) for step in seen.states])
                close(got, states[: len(got)].numpy())

    def test_contract__attention_from_q_and_k_is_the_librarys_eager_attention(
        self, captured: Captured
    ) -> None:
        for stack in captured.family.layers:
            expected_of = causal_steps if stack == "text" else blocks
            for number, seen in enumerate(captured.seen):
                pattern = attention_pattern(captured.run, sample=number, stack=stack).attention_pattern
                assert pattern.layer.values.tolist() == captured.attending(stack)
                for layer, got in zip(captured.attending(stack), pattern.values, strict=True):
                    close(got, expected_of(seen.weights[stack, layer], got.shape))

    def test_contract__cross_attention_from_xq_and_xk_is_the_librarys(self, captured: Captured) -> None:
        for stack, layers in captured.family.cross.items():
            for number, seen in enumerate(captured.seen):
                pattern = attention_pattern(captured.run, sample=number, stack=stack, cross=True)
                assert pattern.layer.values.tolist() == list(layers)
                xz, xv = captured.rows(f"{stack}/xz", number), captured.rows(f"{stack}/xv", number)
                for place, layer in enumerate(layers):
                    got = pattern.attention_pattern.values[place]
                    calls = torch.cat(seen.weights[f"{stack}/x", layer], dim=2)[0].numpy()
                    close(got, calls[:, : got.shape[1]])
                    mixed = torch.cat(
                        [call.flatten(0, 1) for call in seen.mixed[f"{stack}/x", layer]]
                    ).numpy()
                    close(xz[place], mixed[: len(xz[place])].reshape(xz[place].shape))
                    values = np.repeat(xv[place], xz.shape[2] // xv.shape[2], axis=1)
                    close(np.einsum("hqk,khd->qhd", got, values), xz[place])

    def test_contract__head_outputs_and_values_are_the_librarys(self, captured: Captured) -> None:
        for stack in captured.family.layers:
            for number, seen in enumerate(captured.seen):
                z, v = captured.rows(f"{stack}/z", number), captured.rows(f"{stack}/v", number)
                pattern = attention_pattern(captured.run, sample=number, stack=stack).attention_pattern.values
                for place, layer in enumerate(captured.attending(stack)):
                    got = z[place]
                    mixed = torch.cat([call.flatten(0, 1) for call in seen.mixed[stack, layer]]).numpy()
                    close(got, mixed[: len(got)].reshape(got.shape))
                    values = np.repeat(v[place], got.shape[1] // v.shape[2], axis=1)
                    close(np.einsum("hqk,khd->qhd", pattern[place], values), got)

    def test_contract__halves_of_a_layer_are_what_its_modules_give(self, captured: Captured) -> None:
        for stack in captured.family.layers:
            if captured.family.halves_of(stack) is None:
                assert captured.run.attrs["proven"]["stacks"][stack]["halves"] is None
                continue
            every = [captured.family.halves_of(stack, layer) for layer in range(captured.depth(stack))]
            for halves in filter(None, every):
                assert halves[0] in site(captured.run, f"{stack}/attn_out").attrs["definition"]
                assert halves[1] in site(captured.run, f"{stack}/mlp_out").attrs["definition"]
            for number, seen in enumerate(captured.seen):
                got = {
                    name: captured.rows(f"{stack}/{name}", number)
                    for name in ("resid_pre", "resid_post", *INNER)
                }
                for layer in range(captured.depth(stack)):
                    at = {name: values[layer] for name, values in got.items()}
                    halves = every[layer]
                    assert halves is not None
                    for name in ("resid_mid",) if halves[2] else ("attn_out", "mlp_out"):
                        close(at[name], seen.stream(stack, name, layer)[: len(at[name])])
                    close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
                    close(at["resid_mid"] + at["mlp_out"], at["resid_post"])

    def test_contract__heads_sum_to_what_attention_writes_into_the_logits(self, captured: Captured) -> None:
        if "/readout" not in captured.run.groups:
            return
        readout = captured.run["readout"].to_dataset()
        if captured.family.halves_of("text") is None:
            assert "no two modules of a layer add up" in readout.attrs["no_head_readout"]
            return
        if captured.family.halves_of("text") == NORMED["text"]:
            assert "normed or scaled" in readout.attrs["no_head_readout"]
            with pytest.raises(MissingSiteError, match="normed or scaled before it is added"):
                logit_attribution(captured.run)
            return
        assert captured.unembedding is not None
        rows = captured.unembedding[readout.word_token_id.values]
        for number, seen in enumerate(captured.seen):
            z = captured.rows("text/z", number)
            heads = np.einsum("ltho,lhow->ltw", z, readout.head_readout.values)
            every = heads + readout.attn_bias_readout.values[:, None]
            for layer, got in zip(captured.attending("text"), every, strict=True):
                written = seen.stream("text", "attn_out", layer)[: len(got)]
                close(got, written @ rows.T)

    def test_contract__heads_are_ranked_by_what_they_write(self, captured: Captured) -> None:
        if "head_readout" not in (captured.run["readout"] if "/readout" in captured.run.groups else ()):
            return
        found = logit_attribution(captured.run)["logit_attribution"]
        whole = (
            logit_attribution(captured.run, of="attn_out")["logit_attribution"].sel(layer=found.layer).values
        )
        if not np.any(captured.run["readout"].to_dataset().attn_bias_readout):
            close(found.sum("head").values, whole)
        ranked = head_importance(captured.run, criteria=["logit_attribution"], resamples=2)
        assert ranked["mean_rank"].notnull().all()

    def test_contract__masks_are_those_of_the_family(self, captured: Captured) -> None:
        for stack, masks in captured.family.masks.items():
            rules = site(captured.run, f"{stack}/q").attrs["attention"]
            found = [rules[str(layer)]["mask"] for layer in captured.attending(stack)]
            assert found == list(masks) * (len(found) // len(masks))

    def test_contract__what_was_proven_is_in_the_run(self, captured: Captured) -> None:
        proven = captured.run.attrs["proven"]
        assert proven["logits_change"] <= TOLERANCE
        for stack, path in captured.family.layers.items():
            report = proven["stacks"][stack]
            assert (report["path"], report["taps"]) == (path, len(captured.attending(stack)))
            assert report["row_sum_error"] < TOLERANCE
            assert report["attention_output_error"] < TOLERANCE


def causal_steps(calls: list[torch.Tensor], shape: tuple[int, ...]) -> NDArray[Any]:
    """(head, query, key) from the prompt's call and one for each answer token, whose cache may be short."""
    expected = np.zeros(shape, np.float32)
    at = 0
    for weights in calls:
        queries, keys = weights.shape[2:]
        if at + queries <= shape[1]:
            expected[:, at : at + queries, at + queries - keys : at + queries] = weights[0].numpy()
        at += queries
    return expected


def blocks(calls: list[torch.Tensor], shape: tuple[int, ...]) -> NDArray[Any]:
    """(head, query, key) from calls whose rows are separate sequences, end to end."""
    expected = np.zeros(shape, np.float32)
    at = 0
    for weights in (row for call in calls for row in call):
        size = weights.shape[1]
        expected[:, at : at + size, at : at + size] = weights.numpy()
        at += size
    assert at == shape[1]
    return expected
