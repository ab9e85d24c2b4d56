"""Path patching: the freeze-everything-else definition ported plainly, planted paths, and the graph."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from hand_built import AT_SQUARE, FIRST, ONLY, SECOND, one_head, pair, pairs, two_steps
from tiny_models import llava, samples
from zoo import ZOO
from zoo import samples as zoo_samples

from mechanistic.analysis import path_graph, path_patching, plot_path_graph
from mechanistic.capture import Shapes, load_model
from mechanistic.capture.answers import to_device
from mechanistic.capture.batch import prepare_batch
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store.errors import DataError, DimensionError, SpecificationError

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

PLAIN: dict[str, Any] = {"quiet": True, "min_difference": 0.0}
NAMES = ("q", "k", "v")


def encoded(model: LoadedModel, sample: Any) -> dict[str, torch.Tensor]:
    """Inputs of one sample alone."""
    batch = prepare_batch(model, [sample], 0, max_new_tokens=0, texts=TokenTexts(model.tokenizer))
    return to_device(batch.inputs, model.model)


class Plain:
    """One pair, one path at a time, with plain hooks: nothing of the library but the encoded prompts."""

    def __init__(self, model: LoadedModel, clean: Any, corrupt: Any) -> None:
        self.model, self.inputs = model.model, encoded(model, clean)
        self.layers = self.model.model.language_model.layers
        ids = model.tokenizer.convert_tokens_to_ids
        self.words = ids(clean.answer), ids(corrupt.answer)
        self.width = self.layers[0].self_attn.head_dim
        self.clean, self.metric = self.record(self.inputs)
        self.corrupt, _ = self.record(encoded(model, corrupt))

    def run(self, inputs: Any, hooks: ExitStack) -> float:
        with hooks, torch.no_grad():
            logits = self.model(**inputs).logits[0, -1]
        return float(logits[self.words[0]] - logits[self.words[1]])

    def record(self, inputs: Any) -> tuple[dict[Any, torch.Tensor], float]:
        """z of all heads (as the output projection reads it) and MLP outputs, by (layer, name)."""
        seen: dict[Any, torch.Tensor] = {}
        hooks = ExitStack()
        for number, layer in enumerate(self.layers):

            def keep_z(_: Any, args: Any, number: int = number) -> None:
                seen[number, "z"] = args[0].clone()

            def keep_mlp(_: Any, args: Any, output: Any, number: int = number) -> None:
                seen[number, "mlp"] = output.clone()

            hooks.callback(layer.self_attn.o_proj.register_forward_pre_hook(keep_z).remove)
            hooks.callback(layer.mlp.register_forward_hook(keep_mlp).remove)
        return seen, self.run(inputs, hooks)

    def send(self, sender: Any, freeze_mlps: bool) -> tuple[dict[Any, torch.Tensor], float]:
        """Step 1: everything frozen but the sender; the projections' outputs, and the metric."""
        seen: dict[Any, torch.Tensor] = {}
        hooks = ExitStack()
        for number, layer in enumerate(self.layers):

            def heads(_: Any, args: Any, number: int = number) -> Any:
                z = self.clean[number, "z"].clone()
                if sender[0] == number and sender[1] != "mlp":
                    own = slice(sender[1] * self.width, (sender[1] + 1) * self.width)
                    z[..., own] = self.corrupt[number, "z"][..., own]
                return (z,)

            def mlp(_: Any, args: Any, output: Any, number: int = number) -> Any:
                if sender == (number, "mlp"):
                    return self.corrupt[number, "mlp"]
                return self.clean[number, "mlp"] if freeze_mlps else output

            hooks.callback(layer.self_attn.o_proj.register_forward_pre_hook(heads).remove)
            hooks.callback(layer.mlp.register_forward_hook(mlp).remove)
            for name in NAMES:

                def keep(_: Any, args: Any, output: Any, key: Any = (number, name)) -> None:
                    seen[key] = output.clone()

                projection = getattr(layer.self_attn, f"{name}_proj")
                hooks.callback(projection.register_forward_hook(keep).remove)
        return seen, self.run(self.inputs, hooks)

    def receive(self, layer: int, head: int, name: str, values: torch.Tensor) -> float:
        """Step 2: one head's query, key or value in place, nothing frozen."""
        own = slice(head * self.width, (head + 1) * self.width)

        def put(_: Any, args: Any, output: Any) -> Any:
            output = output.clone()
            output[..., own] = values[..., own]
            return output

        hooks = ExitStack()
        projection = getattr(self.layers[layer].self_attn, f"{name}_proj")
        hooks.callback(projection.register_forward_hook(put).remove)
        return self.run(self.inputs, hooks)


@pytest.mark.parametrize("freeze_mlps", [True, False])
def test_path_patching__is_the_papers_definition(freeze_mlps: bool) -> None:
    model = llava()
    data = samples(8)
    # Samples 0 and 4 ask the same question of different images.
    given = [data[0], replace(data[4], answer="right", relation="right")]
    got = path_patching(given, model, pairs=[(0, 1)], freeze_mlps=freeze_mlps, batch_size=7, **PLAIN)
    plain = Plain(model, *given)
    assert float(got.clean[0]) == pytest.approx(plain.metric, abs=1e-5)
    assert got.sizes["sender"] == 3 * 5
    assert got.sizes["receiver"] == 3 * (4 + 2 + 2) + 1
    for name, layer, head in zip(
        got.sender.values, got.sender_layer.values, got.sender_head.values, strict=True
    ):
        sender = (int(layer), "mlp" if head < 0 else int(head))
        seen, direct = plain.send(sender, freeze_mlps)
        own = got.sel(sender=name).isel(pair=0)
        assert float(own.direct_effect) == pytest.approx(direct - plain.metric, abs=2e-5)
        for receiver in got.receiver.values[:-1:3]:
            value = float(own.effect.sel(receiver=receiver))
            at, to, what = receiver.split(".")
            if int(at) <= layer:
                assert np.isnan(value)
                continue
            expected = plain.receive(int(at), int(to), what, seen[int(at), what])
            assert value == pytest.approx(expected - plain.metric, abs=2e-5)


@pytest.mark.parametrize("via", NAMES)
def test_path_patching__names_the_planted_path_and_nothing_else(via: str) -> None:
    got = path_patching(pairs(2), two_steps(via), pairs=[(0, 1), (2, 3)], quiet=True)
    first, second = (f"{layer}.{head}" for layer, head in (FIRST, SECOND))
    share = got.share.fillna(0).copy()
    for edge in ((first, f"{second}.{via}"), (second, "logits")):
        assert float(share.loc[edge]) == pytest.approx(1, abs=0.01)
        share.loc[edge] = 0
    assert float(np.abs(share).max()) < 0.01
    total = got.total_share.to_series()
    assert total[[first, second]].to_numpy() == pytest.approx([1, 1], abs=0.01)
    assert total.drop([first, second]).abs().max() < 0.01
    indirect = got.indirect_effect.mean("pair") / (got.corrupt - got.clean).mean()
    assert float(indirect.sel(sender=first)) == pytest.approx(1, abs=0.01)
    assert float(indirect.sel(sender=second)) == pytest.approx(0, abs=0.01)


def test_path_patching__one_planted_head_has_a_direct_effect_alone() -> None:
    got = path_patching(pairs(3), one_head(), pairs=[(0, 1), (2, 3), (4, 5)], batch_size=4, quiet=True)
    strong = np.argwhere(np.abs(got.share.fillna(0).values) > 0.01)
    assert strong.shape == (1, 2)
    sender, receiver = strong[0]
    assert (got.sender.values[sender], got.receiver.values[receiver]) == ("{}.{}".format(*ONLY), "logits")
    assert (got.mean_effect_low <= got.mean_effect + 1e-9).where(got.mean_effect.notnull(), True).all()


def test_path_patching__a_sender_acts_where_it_is_told_to() -> None:
    given = {"senders": [FIRST], "receivers": [SECOND, "logits"], "pairs": [(0, 1)], "quiet": True}
    here = path_patching(pairs(1), two_steps("v"), place=AT_SQUARE, **given)
    there = path_patching(pairs(1), two_steps("v"), place="last", **given)
    assert here.receiver.values.tolist() == ["2.3.q", "2.3.k", "2.3.v", "logits"]
    assert float(here.share.sel(receiver="2.3.v")[0]) == pytest.approx(1, abs=0.01)
    assert float(np.abs(there.share).max()) < 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2_vl", "qwen3_vl", "gemma3", "llava", "internvl"])
def test_path_patching__works_on_every_kind_of_decoder(name: str) -> None:
    family = ZOO[name]
    model, (sample, *_) = family.build(), zoo_samples(family)
    other = replace(sample, sample_id="other", answer="right", images=sample.images[::-1])
    if family.sees:
        other = replace(other, images=tuple(image.rotate(180) for image in sample.images))
    else:
        other = replace(other, question=sample.question.replace("red", "green"))
    inputs = encoded(model, sample)
    with torch.no_grad():
        before = model.model(**inputs).logits
    got = path_patching(
        [sample, other],
        model,
        pairs=[(0, 1)],
        senders=[(0, 1), (0, "mlp"), (1, 3)],
        receivers=[(1, 2), "logits"],
        **PLAIN,
    )
    # Key heads are shared by two, except where a path ends directly.
    assert got.receiver.values.tolist() == ["1.2.q", "1.1.k", "1.1.v", "logits"]
    assert np.isfinite(got.effect.sel(sender=["0.1", "0.mlp"])).all()
    assert np.abs(got.effect).max() > 0
    with torch.no_grad():
        assert torch.equal(model.model(**inputs).logits, before)


def test_path_patching__finds_the_minimal_pairs_of_a_dataset() -> None:
    model = load_model("spatial-tiny")
    got = path_patching(Shapes(8), model, senders=[(2, 0), (3, "mlp")], receivers=["logits"], quiet=True)
    assert got.sizes["pair"] + got.attrs["n_dropped"] == 4
    assert got.clean_id.values[0] == "shapes-held_out-0-00000"
    assert got.corrupt_id.values[0] == "shapes-held_out-0-00001"
    assert got.attrs["dataset"] == "shapes"


def test_path_patching__refuses_what_cannot_be_patched() -> None:
    model, given = one_head(), pairs(1)
    for wrong, message in (
        ({"senders": [(3, 0)]}, r"no sender \(3, 0\); the decoder has 3 layers of 4 heads"),
        ({"senders": [(0, "attn")]}, "no sender"),
        ({"receivers": [(0, 9)]}, r"no receiver \(0, 9\)"),
        ({"receivers": ["loss"]}, "no receiver 'loss'"),
        ({"inputs": ["z"]}, "A head has no input 'z'"),
    ):
        with pytest.raises(SpecificationError, match=message):
            path_patching(given, model, pairs=[(0, 1)], **wrong, **PLAIN)
    with pytest.raises(DimensionError, match="no sample 2; there are 2"):
        path_patching(given, model, pairs=[(0, 2)], **PLAIN)
    with pytest.raises(DataError, match="no minimal pair among these 2 samples"):
        path_patching(given, model, **PLAIN)
    with pytest.raises(DataError, match="All 1 pairs have nearly the same logit difference"):
        path_patching(given, model, pairs=[(0, 1)], min_difference=100.0, quiet=True)
    longer = replace(pair(1)[1], question="where is the green square and relative to the circle ?")
    with pytest.raises(DataError, match=r"'0-red' and '1-green' have 11 and 12 tokens"):
        path_patching([given[0], longer], model, pairs=[(0, 1)], **PLAIN)
    with pytest.raises(DataError, match="has no token at '@11'"):
        path_patching(given, model, pairs=[(0, 1)], place=11, **PLAIN)


def test_path_graph__holds_the_edges_that_carry_the_answer() -> None:
    got = path_patching(pairs(1), two_steps("k"), pairs=[(0, 1)], quiet=True)
    graph = path_graph(got, threshold=0.5)
    edges = set(zip(graph.source.values, graph.target.values, graph.input.values, strict=True))
    assert edges == {("0.1", "2.3", "k"), ("2.3", "logits", "logits")}
    assert graph.node.values.tolist() == ["0.1", "2.3", "logits"]
    assert graph.node_layer.values.tolist() == [0, 2, 3]
    np.testing.assert_allclose(graph.total_share.values, [1, 1, np.nan], atol=0.01)
    figure, axes = plot_path_graph(graph)
    assert {"0.1", "2.3", "logits", "k 1.00", "1.00"} <= {text.get_text() for text in axes.texts}
    figure.canvas.draw()
    with pytest.raises(DimensionError, match="no path to draw"):
        plot_path_graph(path_graph(got, threshold=5.0))
    with pytest.raises(DimensionError, match="no shares of paths"):
        path_graph(xr.Dataset())
