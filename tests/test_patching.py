"""Patching from a run: the numbers of the loop of hooks that people write, and what must hold of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr
from tiny_models import Listed, llava, picture
from torch import Tensor
from zoo import ZOO

from mechanistic.analysis.patching import patch
from mechanistic.capture.dataset import Sample, open_image
from mechanistic.capture.job import capture_run
from mechanistic.capture.models import LoadedModel, load_model
from mechanistic.capture.prompts import build_prompt, encode_prompts
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run
from mechanistic.store.errors import (
    DataError,
    MissingSiteError,
    ModelError,
    OutputExistsError,
    SpecificationError,
)
from mechanistic.store.sweep_file import sweep_folder
from mechanistic.store.verify import verify_run

SITES = ("resid_pre", "resid_mid", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z")
pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    return load_model("spatial-tiny")


@pytest.fixture(scope="module")
def stored(tiny: LoadedModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("patching") / "run"
    sites = [*(f"text.*.{site}" for site in SITES), "vision.*.resid_post", "vision.*.z"]
    capture_run(tiny, Shapes(32, distractor=0.0), path, sites=sites, max_new_tokens=2, quiet=True)
    return path


@pytest.fixture(scope="module")
def run(stored: Path) -> xr.DataTree:
    return open_run(stored)


def inputs_of(loaded: LoadedModel, sample: Sample) -> dict[str, Tensor]:
    prompt = build_prompt(loaded.processor, sample)
    images = [[open_image(image) for image in sample.images]]
    return encode_prompts(loaded.processor, [prompt], images).inputs


def naive(
    loaded: LoadedModel,
    base: Sample,
    source: Sample,
    path: str,
    rows: Any,
    *,
    before: bool,
    heads: Any = None,
) -> Tensor:
    """The loop of hooks: keep what a module gets or gives in the source's run, put rows into the base's."""
    module = loaded.model.get_submodule(path)
    kept: list[Tensor] = []

    def first(value: Any) -> Tensor:
        return value if isinstance(value, Tensor) else value[0]

    def keep(_: Any, args: Any, kwargs: Any, *output: Any) -> None:
        kept.append(first(output[0]) if output else args[0] if args else kwargs["hidden_states"])

    def put(_: Any, args: Any, kwargs: Any, *output: Any) -> Any:
        had = first(output[0]) if output else args[0] if args else kwargs["hidden_states"]
        new = had.clone(memory_format=torch.contiguous_format)
        columns = slice(None) if heads is None else heads
        flat, other = new.reshape(-1, new.shape[-1]), kept[0].reshape(-1, new.shape[-1])
        flat[rows, columns] = other[rows, columns]
        if not output:
            return ((new, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": new})
        return new if isinstance(output[0], Tensor) else (new, *output[0][1:])

    for sample, hook in ((source, keep), (base, put)):
        if before:
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
        else:
            # Before those of the library, which keep what leaves a layer of the encoder.
            handle = module.register_forward_hook(hook, with_kwargs=True, prepend=True)
        try:
            with torch.no_grad():
                logits = loaded.model(**inputs_of(loaded, sample), use_cache=False).logits
        finally:
            handle.remove()
    result: Tensor = logits[0, -1]
    return result


def difference(loaded: LoadedModel, logits: Tensor, clean: Sample, corrupt: Sample) -> float:
    first, second = (loaded.tokenizer.convert_tokens_to_ids(each.answer) for each in (clean, corrupt))
    return float(logits[first] - logits[second])


LAYERS = "model.language_model.layers"
LOOPS = {
    "resid_pre": (LAYERS + ".2", True),
    "resid_post": (LAYERS + ".1", False),
    "resid_mid": (LAYERS + ".1.post_attention_layernorm", None),
    "attn_out": (LAYERS + ".1.self_attn", False),
    "mlp_out": (LAYERS + ".1.mlp", False),
}


@pytest.mark.parametrize("site", ["resid_pre", "resid_post", "attn_out", "mlp_out", "q", "k", "v", "z"])
def test_patch__is_the_loop_of_hooks(tiny: LoadedModel, run: xr.DataTree, site: str) -> None:
    shapes = Shapes(32, distractor=0.0)
    clean, corrupt = shapes[4], shapes[5]
    rows = [69, 77]
    options: dict[str, Any] = {"base": [5], "source": [4], "sites": site, "positions": rows, "quiet": True}
    if site in ("resid_pre", "resid_post", "attn_out", "mlp_out"):
        path, before = LOOPS[site]
        result = patch(run, tiny, layers=2 if site == "resid_pre" else 1, **options)
        for place, row in enumerate(rows):
            logits = naive(tiny, corrupt, clean, path, [row], before=bool(before))
            got = float(result["patched"].isel(pair=0, layer=0, role=place))
            assert got == pytest.approx(difference(tiny, logits, clean, corrupt), abs=1e-5)
        return
    result = patch(run, tiny, layers=[0, 1], **options)
    path = f"{LAYERS}.1.self_attn.{'o_proj' if site == 'z' else site + '_proj'}"
    if site in ("q", "k"):
        # Turned by position and by nothing else: the same rows before and after.
        assert result.sizes["head" if site == "q" else "kv_head"] == 4
    for head in (0, 3):
        columns = slice(32 * head, 32 * head + 32)
        logits = naive(tiny, corrupt, clean, path, [77], before=site == "z", heads=columns)
        selected = result["patched"].sel(layer=1, role="@77").isel(pair=0)
        got = float(selected.isel({str(selected.dims[0]): head}))
        assert got == pytest.approx(difference(tiny, logits, clean, corrupt), abs=1e-5)


@pytest.mark.parametrize(("site", "layer"), [("resid_post", 1), ("resid_post", 2), ("z", 1)])
def test_patch__of_the_encoder_is_the_loop_of_hooks(
    tiny: LoadedModel, run: xr.DataTree, site: str, layer: int
) -> None:
    shapes = Shapes(32, distractor=0.0)
    clean, corrupt = shapes[4], shapes[5]
    chosen: dict[str, Any] = {"layers": layer, "positions": "image", "quiet": True}
    heads = "all" if site == "z" else None
    result = patch(run, tiny, base=[5], source=[4], sites=f"vision.{site}", heads=heads, **chosen)
    path = f"model.vision_tower.encoder.layers.{layer}" + (".self_attn.out_proj" if site == "z" else "")
    logits = naive(tiny, corrupt, clean, path, list(range(1, 65)), before=site == "z")
    expected = difference(tiny, logits, clean, corrupt)
    assert result["patched"].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("metric", ["logit_diff", "prob", "log_prob", "kl"])
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_patch__everything_recovers_one_and_nothing_zero(
    tiny: LoadedModel, run: xr.DataTree, metric: str, direction: str
) -> None:
    asked: dict[str, Any] = {"direction": direction, "metric": metric, "quiet": True, "min_difference": 0.1}
    result = patch(run, tiny, positions=["all", "@0"], max_pairs=3, **asked)
    everything, nothing = (result["recovered"].sel(role=role).values for role in ("all", "@0"))
    np.testing.assert_allclose(everything, 1, atol=1e-4)
    np.testing.assert_allclose(nothing, 0, atol=1e-4)
    last = patch(run, tiny, sites="resid_post", layers=3, positions="last", max_pairs=3, **asked)
    np.testing.assert_allclose(last["recovered"].values, 1, atol=1e-4)


def test_patch__noise_and_denoise_agree_where_they_must(tiny: LoadedModel, run: xr.DataTree) -> None:
    """Putting the clean image among corrupt words is putting the corrupt words beside the clean image."""
    same: dict[str, Any] = {"positions": ["image", "text"], "max_pairs": 4, "quiet": True}
    denoised, noised = (patch(run, tiny, direction=way, **same) for way in ("denoise", "noise"))
    for role, other in (("image", "text"), ("text", "image")):
        np.testing.assert_allclose(
            denoised["patched"].sel(role=role).values, noised["patched"].sel(role=other).values, atol=1e-4
        )
        total = denoised["recovered"].sel(role=role).values + 1 - noised["recovered"].sel(role=other).values
        np.testing.assert_allclose(total, 2 * denoised["recovered"].sel(role=role).values, atol=1e-4)
    np.testing.assert_allclose(noised["clean"], denoised["clean"])


def test_patch__on_spatial_tiny_goes_from_the_patches_to_the_last_token(
    tiny: LoadedModel, run: xr.DataTree
) -> None:
    result = patch(run, tiny, quiet=True)
    mean = result["recovered_mean"]
    assert list(mean["role"].values) == [
        "subject_box",
        "object_box",
        "background",
        "subject",
        "object",
        "last",
    ]
    boxes = mean.sel(role=["subject_box", "object_box"])
    assert (boxes.sel(layer=0) > 0.8).all()
    assert (boxes.sel(layer=3) < 0.1).all()
    assert float(mean.sel(role="last", layer=3)) > 0.15
    assert float(abs(mean.sel(role="last", layer=[0, 1])).max()) < 0.05
    assert float(abs(mean.sel(role="background")).max()) < 0.15
    assert (result["recovered_mean_low"] <= mean).all()
    assert (result.attrs["n_pair"], result.attrs["n_dropped"]) == (16, 0)
    assert result.attrs["proof"]["stored_states_error"] <= 1e-5


def test_patch__computed_again_is_what_was_stored(tiny: LoadedModel, run: xr.DataTree) -> None:
    for site in ("resid_mid", "z"):
        asked: dict[str, Any] = {
            "sites": site,
            "positions": ["last", "object"],
            "max_pairs": 3,
            "quiet": True,
        }
        from_run, again = (patch(run, tiny, recompute=each, **asked) for each in (False, True))
        np.testing.assert_allclose(from_run["patched"], again["patched"], atol=1e-4)


def test_patch__the_projector_is_the_image_at_the_bottom(tiny: LoadedModel, run: xr.DataTree) -> None:
    first = patch(run, tiny, sites="projector", max_pairs=2, quiet=True)
    second = patch(run, tiny, layers=0, positions="image", max_pairs=2, quiet=True)
    np.testing.assert_allclose(first["recovered"].values, second["recovered"].values)
    assert float(first["recovered"].mean()) > 0.99


def test_patch__several_sites_and_every_position_are_axes(tiny: LoadedModel, run: xr.DataTree) -> None:
    result = patch(
        run,
        tiny,
        sites=["resid_pre", "mlp_out"],
        layers=[1, 3],
        positions="every",
        max_pairs=1,
        batch_size=50,
        quiet=True,
    )
    assert dict(result["recovered"].sizes) == {"pair": 1, "site": 2, "layer": 2, "position": 78}
    one = patch(run, tiny, sites="mlp_out", layers=3, positions=[77], max_pairs=1, quiet=True)
    got = result["patched"].sel(site="mlp_out", layer=3, position=77)
    np.testing.assert_allclose(got.values, one["patched"].values[:, 0, 0], atol=1e-5)


def test_patch__counts_pairs_without_a_difference(tiny: LoadedModel, run: xr.DataTree) -> None:
    every = patch(run, tiny, layers=3, positions="last", quiet=True)
    apart = np.abs(every["clean"] - every["corrupt"]).values
    least = float(np.sort(apart)[5]) + 1e-6
    some = patch(run, tiny, layers=3, positions="last", min_difference=least, quiet=True)
    assert (some.attrs["n_dropped"], some.attrs["n_pair"]) == (6, 10)
    kept = apart >= least
    np.testing.assert_allclose(some["recovered"], every["recovered"][kept], atol=1e-6)
    with pytest.raises(DataError, match=r"All 16 pairs have nearly the same logit_diff.*\n.*min_difference="):
        patch(run, tiny, layers=3, positions="last", min_difference=1e6, quiet=True)


def test_patch__goes_on_after_a_kill_and_is_kept_with_the_run(
    tiny: LoadedModel, stored: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mechanistic.capture.patch_sweep import PatchSweep

    asked: dict[str, Any] = {
        "sites": "z",
        "positions": "last",
        "max_pairs": 4,
        "batch_size": 5,
        "quiet": True,
    }
    whole = patch(open_run(stored), tiny, **asked)
    calls: list[tuple[int, int]] = []
    original = PatchSweep.logits

    def dying(self: Any, stack: str, site: str, layer: int, patches: Any, skip: int) -> Any:
        calls.append((layer, skip))
        for number, found in enumerate(original(self, stack, site, layer, patches, skip)):
            if calls == [(0, 0), (1, 0), (2, 0)] and number == 1:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(PatchSweep, "logits", dying)
    with pytest.raises(KeyboardInterrupt):
        patch(open_run(stored), tiny, name="heads", **asked)
    assert sweep_folder(stored, "heads").exists()
    assert verify_run(stored) == []
    with pytest.raises(OutputExistsError, match="other parameters is under way"):
        patch(open_run(stored), tiny, name="heads", **{**asked, "metric": "prob", "min_difference": 0})
    result = patch(open_run(stored), tiny, name="heads", **asked)
    assert calls == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    np.testing.assert_array_equal(result["patched"], whole["patched"])
    assert not sweep_folder(stored, "heads").exists()
    again = patch(open_run(stored), tiny, name="heads", **asked)
    assert calls == [(0, 0), (1, 0), (2, 0), (2, 1), (3, 0)]
    xr.testing.assert_allclose(again["recovered"].compute(), result["recovered"])
    with pytest.raises(
        OutputExistsError,
        match=r"derived/heads is the result of another sweep: .*direction is",
    ):
        patch(open_run(stored), tiny, name="heads", **{**asked, "direction": "noise"})
    from mechanistic.analysis.head_criteria import head_criteria

    found, _ = head_criteria(open_run(stored), criteria=("patching_heads",))
    assert found["patching_heads"].sizes == {"layer": 4, "sample": 4, "head": 4}
    assert verify_run(stored) == []


def test_patch__says_what_the_ends_were_computed_from(
    tiny: LoadedModel, run: xr.DataTree, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: dict[str, Any] = {"positions": "last", "max_pairs": 2}
    whole = patch(run, tiny, layers=1, **asked)
    assert whole.attrs["ends"] == "the run's states at layer 4"
    shapes = Shapes(4, distractor=0.0)
    for name, sites, says in (
        ("pre", ["text.1-2.resid_pre[all]"], "the run's states at layer 2"),
        ("encoder", ["vision.1.resid_post"], "a forward of each sample"),
    ):
        path = tmp_path / name
        capture_run(tiny, shapes, path, sites=sites, max_new_tokens=0, quiet=True)
        chosen: dict[str, Any] = {"layers": 1, **asked}
        if name == "encoder":
            chosen.update(sites="vision.resid_post", positions="image")
        found = patch(path, tiny, **chosen)
        assert found.attrs["ends"] == says
        line = "no text.*.resid_post[last], which tells its answers: 4 samples are run once"
        assert (line in capsys.readouterr().err) == (name == "encoder")
        np.testing.assert_allclose(found["clean"], whole["clean"], atol=1e-4)
        assert patch(path, tiny, recompute=True, **chosen).attrs["ends"] == "a forward of each sample"
        assert capsys.readouterr().err == ""


def test_patch__sees_an_image_once(tmp_path: Path) -> None:
    """Qwen3-VL adds image features in its first layers, so that forwards from there need them again."""
    loaded = ZOO["qwen3_vl"].build()
    pair = [
        Sample(f"s{n}", (picture(n, 32, 32),), "where is the red square ?", ("left", "right"), answer)
        for n, answer in enumerate(("left", "right"))
    ]
    path = tmp_path / "run"
    capture_run(loaded, Listed(tuple(pair)), path, sites=["text.*.resid_pre"], max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {"base": [1], "source": [0], "min_difference": 0, "batch_size": 4, "quiet": True}
    ran: list[int] = []
    encoder = loaded.model.get_encoder(modality="image")
    handle = encoder.blocks[0].register_forward_hook(lambda *_: ran.append(1))
    patch(path, loaded, layers=0, positions=[0], **asked)
    once = len(ran)
    found = patch(path, loaded, layers=0, positions="every", **asked)
    handle.remove()
    assert len(ran) == 2 * once
    at = f"{ZOO['qwen3_vl'].layers['text']}.0"
    for row in (0, 3, found.sizes["position"] - 1):
        logits = naive(loaded, pair[1], pair[0], at, [row], before=True)
        got = found["patched"].sel(position=row).item()
        scale = float(logits.abs().max())
        assert got == pytest.approx(difference(loaded, logits, *pair), abs=1e-5 * scale)


FAMILIES = (
    "llama",
    "gpt2",
    "llava",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "gemma3",
    "paligemma",
    "internvl",
    "blip2",
)


@pytest.mark.parametrize("name", FAMILIES)
def test_patch__works_on_the_zoo(name: str, tmp_path: Path) -> None:
    family = ZOO[name]
    loaded = family.build()
    pair = [
        Sample(
            f"s{number}",
            (picture(number, 32, 32),) if family.sees else (),
            f"where is the {thing} relative to the blue circle ?",
            ("left", "right"),
            answer,
            group="g",
            subject=thing,
            object="blue circle",
        )
        for number, (answer, thing) in enumerate([("left", "red square"), ("right", "green ring")])
    ]
    path = tmp_path / "run"
    sites = ["text.*.resid_pre", "text.*.z"]
    capture_run(loaded, Listed(tuple(pair)), path, sites=sites, max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {
        "base": [1],
        "source": [0],
        "positions": ["last", "subject"],
        "min_difference": 0,
        "quiet": True,
    }
    result = patch(path, loaded, **asked)
    # Of PaliGemma's prompts every token reads every other.
    assert (result.attrs["proof"]["later_tokens_error"] is None) == (name == "paligemma")
    last = len(inputs_of(loaded, pair[1])["input_ids"][0]) - 1
    for layer in result["layer"].values:
        at = f"{family.layers['text']}.{layer}"
        logits = naive(loaded, pair[1], pair[0], at, [last], before=True)
        got = result["patched"].sel(layer=layer, role="last").item()
        scale = float(logits.abs().max())
        assert got == pytest.approx(difference(loaded, logits, *pair), abs=1e-5 * scale)
    heads = patch(path, loaded, sites="z", **{**asked, "positions": "last"})
    joined = patch(path, loaded, sites="z", heads="all", **{**asked, "positions": "last"})
    assert heads["recovered"].dims[-1] == "head"
    assert float(abs(heads["effect"]).max()) > 0
    assert float(abs(joined["effect"]).max()) > 0


def test_patch__matches_nnsight(tiny: LoadedModel, run: xr.DataTree) -> None:
    import nnsight

    shapes = Shapes(32, distractor=0.0)
    clean, corrupt = shapes[8], shapes[9]
    result = patch(run, tiny, base=[9], source=[8], positions=[69, 77], quiet=True)
    # A model of its own: its wrapper leaves hooks on.
    model = nnsight.NNsight(load_model("spatial-tiny").model)
    layers = model.model.language_model.layers
    for layer in range(1, 4):
        for row in (69, 77):
            with torch.no_grad():
                with model.trace(**inputs_of(tiny, clean), use_cache=False):
                    source = layers[layer - 1].output.save()
                with model.trace(**inputs_of(tiny, corrupt), use_cache=False):
                    layers[layer - 1].output[:, row] = source[:, row]
                    logits = model.lm_head.output[0, -1].save()
            got = result["patched"].sel(layer=layer, role=f"@{row}").item()
            assert got == pytest.approx(difference(tiny, logits, clean, corrupt), abs=1e-4)


def test_patch__leaves_the_model_as_it_was(tiny: LoadedModel, run: xr.DataTree) -> None:
    asked = inputs_of(tiny, Shapes(32, distractor=0.0)[0])

    def hooks() -> int:
        modules = tiny.model.modules()
        return sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in modules)

    with torch.no_grad():
        before = tiny.model(**asked).logits
    # The library installs some of its own in the first forward.
    held = hooks()
    patch(run, tiny, sites="z", max_pairs=1, positions="last", quiet=True)
    with torch.no_grad():
        after = tiny.model(**asked).logits
    torch.testing.assert_close(after, before, rtol=0, atol=0)
    assert hooks() == held


def test_patch__refuses_another_model(run: xr.DataTree) -> None:
    with pytest.raises(ModelError, match=r"captured from 'spatial-tiny' with weights .* 'random-llava-0'"):
        patch(run, llava(), quiet=True)


def test_patch__names_the_capture_that_is_missing(tiny: LoadedModel, tmp_path: Path) -> None:
    path = tmp_path / "run"
    sites = ["text.*.resid_post[text]", "text.1-3.resid_pre[all]"]
    capture_run(tiny, Shapes(4), path, sites=sites, max_new_tokens=0, quiet=True)
    with pytest.raises(MissingSiteError, match=r"not hold text/resid_pre of layer 0") as caught:
        patch(path, tiny, layers=0, positions="last", quiet=True)
    command = "mechanistic capture --model-name spatial-tiny --dataset shapes --num-samples 4 --sites "
    wanted = "'text.*.resid_post[text]' 'text.*.resid_pre[all]' --output-dir OTHER"
    assert command + wanted in str(caught.value)
    assert "recompute=True" in str(caught.value)
    with pytest.raises(MissingSiteError, match=r"does not hold text/z of layer 1"):
        patch(path, tiny, sites="z", layers=1, positions="last", quiet=True)
    with pytest.raises(MissingSiteError, match=r"resid_post of 64 of 78 tokens of sample"):
        patch(path, tiny, sites="resid_post", layers=3, positions="image", quiet=True)
    assert patch(path, tiny, layers=0, positions="last", recompute=True, quiet=True).sizes["pair"] == 2


def test_patch__lengths_may_differ_by_role_alone(tmp_path: Path) -> None:
    loaded = llava()
    questions = ("where is the red square ?", "where is the very red square now ?")
    pair = [
        Sample(f"s{n}", (picture(n),), question, ("left", "right"), answer, subject="red square", group="g")
        for n, (question, answer) in enumerate(zip(questions, ("left", "right"), strict=True))
    ]
    path = tmp_path / "run"
    capture_run(loaded, Listed(tuple(pair)), path, sites=["text.*.resid_pre"], max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {"base": [1], "source": [0], "min_difference": 0, "quiet": True}
    result = patch(path, loaded, positions=["last", "subject", "image"], **asked)
    lengths = [len(inputs_of(loaded, each)["input_ids"][0]) for each in pair]
    assert lengths[0] != lengths[1]
    assert np.isfinite(result["recovered"]).all()
    for positions in (3, "@3", "every", "all"):
        with pytest.raises(DataError, match=r"is not the same place in both.*\n.*roles: positions=\('"):
            patch(path, loaded, positions=positions, **asked)


def test_patch__refuses_answers_that_one_token_does_not_tell_apart(tmp_path: Path) -> None:
    loaded = llava()
    pair = [
        Sample(f"s{number}", (picture(number),), "where ?", ("left of", "left under"), answer)
        for number, answer in enumerate(("left of", "left under"))
    ]
    path = tmp_path / "run"
    capture_run(loaded, Listed(tuple(pair)), path, sites=["text.*.resid_pre"], max_new_tokens=0, quiet=True)
    asked: dict[str, Any] = {"base": [1], "source": [0], "positions": "last", "quiet": True}
    with pytest.raises(DataError, match=r"first tokens do not tell them apart .*\n.*metric='kl'"):
        patch(path, loaded, **asked)
    assert patch(path, loaded, metric="kl", min_difference=0, **asked).attrs["metric"] == "kl"


def test_patch__says_what_does_not_exist(tiny: LoadedModel, run: xr.DataTree) -> None:
    for options, says in (
        ({"sites": "zz"}, "no site 'zz'"),
        ({"sites": ["z", "resid_pre"]}, "do not have the same heads"),
        ({"sites": ["z", "vision.z"]}, "several stacks"),
        ({"heads": [0]}, "resid_pre has no heads"),
        ({"sites": "z", "heads": [0, 9]}, "no head 9; the decoder has"),
        ({"sites": "z", "heads": "each"}, "no head each; the decoder has"),
        ({"layers": [0.5]}, "no layer 0.5"),
        ({"layers": []}, "no layer chosen"),
        ({"layers": 7}, "no layer 7"),
        ({"direction": "up"}, "no direction 'up'"),
        ({"metric": "mse"}, "no metric 'mse'"),
        ({"base": [0]}, "Only one of base and source"),
        ({"batch_size": 0}, "batch_size is 0"),
    ):
        with pytest.raises(SpecificationError, match=says):
            patch(run, tiny, quiet=True, **options)  # type: ignore[arg-type]
