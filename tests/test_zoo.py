"""One contract for every family: what a run holds, stored and reopened, is what transformers computes itself.

The reference is the library alone: each sample by itself, eager attention, generated with its cache, watched
by plain hooks. The run was captured in one batch of unequal lengths, by teacher forcing.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import xarray as xr
from numpy.typing import NDArray
from PIL import Image
from tiny_models import Listed
from torch import nn
from transformers.image_utils import PILImageResampling
from zoo import NORMED, ZOO, Family, samples
from zoo_parts import tokenizer
from zoo_refused import REFUSED

from mechanistic.analysis import head_importance, logit_attribution
from mechanistic.analysis.attention_pattern import attention_pattern
from mechanistic.capture.batch import Batch, prepare_batch
from mechanistic.capture.dataset import Sample
from mechanistic.capture.failures import SampleError
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel
from mechanistic.capture.token_table import TokenTexts
from mechanistic.store import open_run, site
from mechanistic.store.errors import CaptureError, MissingSiteError, ModelError, SpecificationError
from mechanistic.store.schema import KIND

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

TOLERANCE = 1e-5
# Share of a tensor's largest value by which half precision may differ from single, over two or three layers.
HALF_TOLERANCE = {torch.bfloat16: 6e-2, torch.float16: 1e-2}
ANSWER = 2
SITES = ("resid_pre", "resid_post", "q", "k", "v", "z")
CROSS_SITES = ("xq", "xk", "xv", "xz")
INNER = ("attn_out", "resid_mid", "mlp_out")


@dataclass
class Seen:
    """What one sample did alone: tensors by stack and layer, in the order of the calls."""

    residual: dict[tuple[str, str, int], list[torch.Tensor]] = field(default_factory=dict)
    weights: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    mixed: dict[tuple[str, int], list[torch.Tensor]] = field(default_factory=dict)
    states: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)

    def stream(self, stack: str, end: str, layer: int) -> NDArray[Any]:
        """(token, d_model) over all calls."""
        parts = [part.reshape(-1, part.shape[-1]) for part in self.residual[stack, end, layer]]
        return np.asarray(torch.cat(parts).numpy())


@dataclass
class Captured:
    """A family's model, its reopened run, and the reference of each sample."""

    family: Family
    loaded: LoadedModel
    run: xr.DataTree
    seen: list[Seen]

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


@pytest.fixture(scope="module", params=ZOO)
def captured(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Captured:
    family = ZOO[request.param]
    loaded = family.build()
    asked = samples(family)
    path = tmp_path_factory.mktemp(request.param) / "run"
    sites = [f"{stack}.*.{name}" for stack in family.layers for name in SITES]
    sites += [f"{stack}.*.{name}" for stack in family.layers for name in INNER if family.halves_of(stack)]
    sites += [f"{stack}.*.{name}" for stack in family.cross for name in CROSS_SITES]
    longest = ANSWER if loaded.model.can_generate() else 0
    capture_run(loaded, Listed(asked), path, sites=sites, batch_size=4, max_new_tokens=longest, quiet=True)
    run = open_run(path)
    prompts = run["samples"].to_dataset().prompt.values
    return Captured(
        family,
        loaded,
        run,
        [alone(family, loaded, str(prompt), each) for prompt, each in zip(prompts, asked, strict=True)],
    )


def alone(family: Family, loaded: LoadedModel, prompt: str, sample: Sample) -> Seen:
    """The library by itself on one sample."""
    images = {"images": [list(sample.images)]} if sample.images else {}
    words = {"text": [prompt], **family.text} if "text" in family.layers else {}
    inputs = dict(loaded.processor(**words, return_tensors="pt", **images))
    inputs.pop("labels", None)
    inputs = {name: value for name, value in inputs.items() if isinstance(value, torch.Tensor)}
    seen = Seen()
    with torch.no_grad(), watching(family, loaded.model, seen):
        if not loaded.model.can_generate():
            out = loaded.model(**inputs, output_hidden_states=True)
            seen.states = [out.get("text_model_output", out).get("hidden_states")]
            return seen
        out = loaded.model.generate(
            **inputs,
            max_new_tokens=ANSWER + 1,
            do_sample=False,
            output_hidden_states=True,
            return_dict_in_generate=True,
        )
    seen.states = list(out.hidden_states)
    new = out.sequences[0, inputs["input_ids"].shape[1] - family.unread :].tolist()
    ends = {loaded.tokenizer.eos_token_id, loaded.tokenizer.pad_token_id}
    stop = next((place for place, token in enumerate(new) if token in ends), len(new))
    seen.answer = new[: min(stop, ANSWER)]
    return seen


@contextmanager
def watching(family: Family, model: nn.Module, seen: Seen) -> Iterator[None]:
    """Eager attention, with its weights and outputs and the layers' inputs and outputs recorded."""
    owner: dict[nn.Module, tuple[str, int]] = {}
    with ExitStack() as stack:
        for name, path in family.layers.items():
            for number, layer in enumerate(model.get_submodule(path)):  # type: ignore[arg-type]
                owner |= {
                    part: (f"{name}/x" if "cross" in inside else name, number)
                    for inside, part in layer.named_modules()
                }
                pre, post = (
                    seen.residual.setdefault((name, end, number), []) for end in ("resid_pre", "resid_post")
                )
                before = layer.register_forward_pre_hook(
                    lambda _, args, kwargs, kept=pre: kept.append((args or (kwargs["hidden_states"],))[0]),
                    with_kwargs=True,
                )
                after = layer.register_forward_hook(
                    lambda _, args, out, kept=post: kept.append(
                        out if isinstance(out, torch.Tensor) else out[0]
                    )
                )
                for hook in own_hooks(owner, seen, layer):
                    stack.callback(hook.remove)
                for hook in half_hooks(family, name, number, layer, seen):
                    stack.callback(hook.remove)
                stack.callback(before.remove)
                stack.callback(after.remove)
        modules = {sys.modules[type(part).__module__] for part in owner}
        for module in (module for module in modules if hasattr(module, "eager_attention_forward")):
            honest = module.eager_attention_forward

            def record(part: nn.Module, *args: Any, honest: Any = honest, **kwargs: Any) -> Any:
                out, weights = honest(part, *args, **kwargs)
                if part in owner:
                    seen.weights.setdefault(owner[part], []).append(weights)
                    seen.mixed.setdefault(owner[part], []).append(out)
                return out, weights

            stack.enter_context(mock.patch.object(module, "eager_attention_forward", record))
        own = model.config._attn_implementation  # type: ignore[union-attr]
        model.set_attn_implementation("eager")  # type: ignore[operator]
        stack.callback(model.set_attn_implementation, own)  # type: ignore[arg-type]
        yield


def own_hooks(owner: dict[nn.Module, tuple[str, int]], seen: Seen, layer: nn.Module) -> Iterator[Any]:
    """Record weights and outputs of BLIP's attention, whose code is its own and returns its weights."""
    for part in layer.modules():
        kind = type(part).__name__
        if kind not in ("BlipAttention", "BlipTextSelfAttention"):
            continue
        weights, mixed = (kept.setdefault(owner[part], []) for kept in (seen.weights, seen.mixed))
        yield part.register_forward_hook(lambda _, args, out, kept=weights: kept.append(out[1]))
        if kind == "BlipAttention":
            yield part.projection.register_forward_pre_hook(  # type: ignore[union-attr]
                lambda _, args, kept=mixed: kept.append(args[0])
            )
        else:
            yield part.register_forward_hook(lambda _, args, out, kept=mixed: kept.append(out[0]))


def half_hooks(family: Family, stack: str, number: int, layer: nn.Module, seen: Seen) -> Iterator[Any]:
    """Record what the two halves of a layer give, or what is read between them."""
    halves = family.halves_of(stack, number)
    if halves is None:
        return
    attention, mlp, middle = halves
    if middle:
        kept = seen.residual.setdefault((stack, "resid_mid", number), [])
        yield layer.get_submodule(middle).register_forward_pre_hook(
            lambda _, args, kept=kept: kept.append(args[0])
        )
        return
    for name, child in (("attn_out", attention), ("mlp_out", mlp)):
        kept = seen.residual.setdefault((stack, name, number), [])
        yield layer.get_submodule(child).register_forward_hook(
            lambda _, args, out, kept=kept: kept.append(out if isinstance(out, torch.Tensor) else out[0])
        )


def close(got: NDArray[Any], expected: NDArray[Any]) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=TOLERANCE * float(np.abs(expected).max()))


def test_zoo__answers_are_what_the_library_generates_alone(captured: Captured) -> None:
    table = captured.run["tokens/text"].to_dataset()
    for number, seen in enumerate(captured.seen):
        here = table.isel(token=np.flatnonzero(table.sample_index.values == number))
        assert here.token_id.values[here.kind.values == 3].tolist() == seen.answer
    assert any(seen.answer for seen in captured.seen) == captured.loaded.model.can_generate()


def test_zoo__residuals_are_the_layers_inputs_and_outputs(captured: Captured) -> None:
    for stack in captured.family.layers:
        for number, seen in enumerate(captured.seen):
            for end in ("resid_pre", "resid_post"):
                rows = captured.rows(f"{stack}/{end}", number)
                assert len(rows) == captured.depth(stack)
                for layer, got in enumerate(rows):
                    close(got, seen.stream(stack, end, layer)[: len(got)])


def test_zoo__residuals_are_the_librarys_hidden_states(captured: Captured) -> None:
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


def test_zoo__attention_from_q_and_k_is_the_librarys_eager_attention(captured: Captured) -> None:
    for stack in captured.family.layers:
        expected_of = causal_steps if stack == "text" else blocks
        for number, seen in enumerate(captured.seen):
            pattern = attention_pattern(captured.run, sample=number, stack=stack).attention_pattern
            assert pattern.layer.values.tolist() == captured.attending(stack)
            for layer, got in zip(captured.attending(stack), pattern.values, strict=True):
                close(got, expected_of(seen.weights[stack, layer], got.shape))


def test_zoo__cross_attention_from_xq_and_xk_is_the_librarys(captured: Captured) -> None:
    for stack, layers in captured.family.cross.items():
        for number, seen in enumerate(captured.seen):
            pattern = attention_pattern(captured.run, sample=number, stack=stack, cross=True)
            assert pattern.layer.values.tolist() == list(layers)
            xz, xv = captured.rows(f"{stack}/xz", number), captured.rows(f"{stack}/xv", number)
            for place, layer in enumerate(layers):
                got = pattern.attention_pattern.values[place]
                calls = torch.cat(seen.weights[f"{stack}/x", layer], dim=2)[0].numpy()
                close(got, calls[:, : got.shape[1]])
                mixed = torch.cat([call.flatten(0, 1) for call in seen.mixed[f"{stack}/x", layer]]).numpy()
                close(xz[place], mixed[: len(xz[place])].reshape(xz[place].shape))
                values = np.repeat(xv[place], xz.shape[2] // xv.shape[2], axis=1)
                close(np.einsum("hqk,khd->qhd", got, values), xz[place])


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


def test_zoo__head_outputs_and_values_are_the_librarys(captured: Captured) -> None:
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


def test_zoo__halves_of_a_layer_are_what_its_modules_give(captured: Captured) -> None:
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
                name: captured.rows(f"{stack}/{name}", number) for name in ("resid_pre", "resid_post", *INNER)
            }
            for layer in range(captured.depth(stack)):
                at = {name: values[layer] for name, values in got.items()}
                halves = every[layer]
                assert halves is not None
                for name in ("resid_mid",) if halves[2] else ("attn_out", "mlp_out"):
                    close(at[name], seen.stream(stack, name, layer)[: len(at[name])])
                close(at["resid_pre"] + at["attn_out"], at["resid_mid"])
                close(at["resid_mid"] + at["mlp_out"], at["resid_post"])


def final_weight(norm: nn.Module) -> torch.Tensor:
    """What a final norm multiplies by, found with an input of which every number is 1 or -1."""
    signs = torch.ones(norm.weight.shape)  # type: ignore[arg-type]
    signs[::2] = -1
    with torch.no_grad():
        return (norm(signs) - norm(-signs)) / 2 * signs


def test_zoo__heads_sum_to_what_attention_writes_into_the_logits(captured: Captured) -> None:
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
    model, anatomy = captured.loaded.model, captured.loaded.anatomy
    assert anatomy.final_norm is not None
    rows = model.get_output_embeddings().weight[readout.word_token_id.values].detach()
    rows = rows * final_weight(anatomy.final_norm)
    if isinstance(anatomy.final_norm, nn.LayerNorm):
        rows = rows - rows.mean(-1, keepdim=True)
    for number, seen in enumerate(captured.seen):
        z = captured.rows("text/z", number)
        heads = np.einsum("ltho,lhow->ltw", z, readout.head_readout.values)
        every = heads + readout.attn_bias_readout.values[:, None]
        for layer, got in zip(captured.attending("text"), every, strict=True):
            written = seen.stream("text", "attn_out", layer)[: len(got)]
            close(got, written @ rows.numpy().T)


def test_zoo__heads_are_ranked_by_what_they_write(captured: Captured) -> None:
    if "head_readout" not in (captured.run["readout"] if "/readout" in captured.run.groups else ()):
        return
    found = logit_attribution(captured.run)["logit_attribution"]
    whole = logit_attribution(captured.run, of="attn_out")["logit_attribution"].sel(layer=found.layer).values
    if not np.any(captured.run["readout"].to_dataset().attn_bias_readout):
        close(found.sum("head").values, whole)
    ranked = head_importance(captured.run, criteria=["logit_attribution"], resamples=2)
    assert ranked["mean_rank"].notnull().all()


def test_zoo__masks_are_those_of_the_family(captured: Captured) -> None:
    for stack, masks in captured.family.masks.items():
        rules = site(captured.run, f"{stack}/q").attrs["attention"]
        found = [rules[str(layer)]["mask"] for layer in captured.attending(stack)]
        assert found == list(masks) * (len(found) // len(masks))


def test_zoo__what_was_proven_is_in_the_run(captured: Captured) -> None:
    proven = captured.run.attrs["proven"]
    assert proven["logits_change"] <= TOLERANCE
    assert proven["forwards"] == 3 + len(captured.family.layers) + len(captured.family.cross)
    for stack, path in captured.family.layers.items():
        report = proven["stacks"][stack]
        assert (report["path"], report["taps"]) == (path, len(captured.attending(stack)))
        assert report["row_sum_error"] < TOLERANCE
        assert report["attention_output_error"] < TOLERANCE
        assert report["logits_change_by_edited_row"] > 0
    for stack, layers in captured.family.cross.items():
        report = proven["stacks"][f"{stack}/x"]
        assert report["taps"] == len(layers)
        assert report["attention_output_error"] < TOLERANCE
        assert report["logits_change_by_edited_row"] > 0


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
        names = ("logits", "logits_per_image", "last_hidden_state")
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
