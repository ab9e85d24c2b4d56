"""A sweep that was killed goes on where it was, and gives what an uninterrupted one gives, bit for bit."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr
from hand_built import one_head, pairs, two_steps
from tiny_models import Listed, llava
from tiny_models import samples as llava_samples

from mechanistic.analysis import (
    ablate,
    attention_knockout,
    attention_relevancy,
    attribution_patching,
    causal_tracing,
    gradcam,
    integrated_gradients,
    patch,
    path_patching,
    scale_attention,
    steer,
)
from mechanistic.analysis.sweep import Steps
from mechanistic.capture.forward_progress import ForwardProgress
from mechanistic.capture.job import capture_run
from mechanistic.store import derived_names, open_run
from mechanistic.store.errors import OutputExistsError, SpecificationError, UsageError
from mechanistic.store.lock import release_lock, take_lock
from mechanistic.store.merge import merge_run
from mechanistic.store.sweep_file import sweep_folder
from mechanistic.store.verify import verify_run

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation doesn't accept a copy keyword")

Call = Callable[..., xr.Dataset]
SMALL: dict[str, Any] = {"batch_size": 2}
PAIRS = [(0, 1), (2, 3)]
DIRECTION = xr.DataArray(np.eye(1, 32)[0] * 3, dims="feature")

SWEEPS: dict[str, tuple[Call, dict[str, Any]]] = {
    "causal_tracing": (causal_tracing, {"sites": ["resid_post", "mlp_out"], "noise_samples": 2, "window": 2}),
    "ablate": (ablate, {"method": "resample", **SMALL}),
    "attention_knockout": (attention_knockout, {"edges": [("last", "subject")], **SMALL}),
    "scale_attention": (scale_attention, {"edge": ("last", "subject"), **SMALL}),
    "steer": (steer, {"direction": DIRECTION, "scale": "norm", **SMALL}),
    "path_patching": (path_patching, {"pairs": PAIRS, "receivers": [(2, 3), "logits"], "batch_size": 4}),
    "attribution_patching": (
        attribution_patching,
        {"pairs": PAIRS, "method": "integrated", "steps": 3, "top": 4, **SMALL},
    ),
}
GRADIENTS: dict[str, tuple[Call, dict[str, Any]]] = {
    "pixels": (integrated_gradients, {"to": "pixels", "steps": 2}),
    "words": (integrated_gradients, {"to": "token_embeddings", "steps": 2}),
    "gradcam": (gradcam, {}),
    "relevancy": (attention_relevancy, {}),
}


def dying(monkeypatch: pytest.MonkeyPatch, after: int) -> list[int]:
    """Sweeps die when they have computed so many steps; counts what they compute."""
    computed = [0]
    original = Steps.__call__

    def step(self: Steps, compute: Callable[[], Any], of: str | None = None) -> Any:
        def counted() -> Any:
            if computed[0] == after:
                raise KeyboardInterrupt
            computed[0] += 1
            return compute()

        return original(self, counted, of)

    monkeypatch.setattr(Steps, "__call__", step)
    return computed


def assert_goes_on(run: Callable[..., xr.Dataset], path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`run` killed in its middle and called again is `run` left alone, and computes no step twice."""
    with monkeypatch.context() as patched:
        every = dying(patched, -1)
        whole = run()
    for after in (0, every[0] // 2, every[0] - 1):
        name = path / f"{after}.zarr"
        with monkeypatch.context() as patched:
            dying(patched, after)
            with pytest.raises(KeyboardInterrupt):
                run(name=name)
        assert not name.exists()
        with monkeypatch.context() as patched:
            rest = dying(patched, -1)
            again = run(name=name)
            assert rest == [every[0] - after]
            held = run(name=name)
            assert rest == [every[0] - after]
        xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())
        xr.testing.assert_identical(held.drop_attrs(), whole.drop_attrs())
        assert set(whole.attrs) < set(held.attrs)
        assert [each.name for each in path.iterdir() if after == int(each.stem)] == [name.name]


@pytest.mark.parametrize("name", SWEEPS)
def test_sweep__goes_on_after_an_exception_at_any_step(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options = SWEEPS[name]
    model, data = two_steps("v"), pairs(2)

    def run(**more: Any) -> xr.Dataset:
        return call(data, model, quiet=True, **options, **more)

    assert_goes_on(run, tmp_path, monkeypatch)


@pytest.mark.parametrize("name", GRADIENTS)
def test_sweep__of_attributions_goes_on_after_an_exception(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    call, options = GRADIENTS[name]
    model, data = llava(), llava_samples(3)

    def run(**more: Any) -> xr.Dataset:
        return call(model, data, quiet=True, **options, **more)

    assert_goes_on(run, tmp_path, monkeypatch)


KILLED = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
from hand_built import pairs, two_steps
from mechanistic.analysis import ablate
from mechanistic.analysis.sweep import Steps

original, calls = Steps.__call__, []

def step(self, compute, of=None):
    calls.append(1)
    if len(calls) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return original(self, compute, of)

Steps.__call__ = step
ablate(pairs(2), two_steps("v"), method="resample", batch_size=2, name=sys.argv[2], quiet=True)
"""


def test_sweep__goes_on_after_sigkill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "ablation.zarr"
    here = str(Path(__file__).parent)
    done = subprocess.run([sys.executable, "-c", KILLED, here, str(path)], env=dict(os.environ))
    assert done.returncode == -signal.SIGKILL
    asked: dict[str, Any] = {"method": "resample", "batch_size": 2, "quiet": True}
    whole = ablate(pairs(2), two_steps("v"), **asked)
    counted = dying(monkeypatch, -1)
    again = ablate(pairs(2), two_steps("v"), name=path, **asked)
    xr.testing.assert_identical(again.drop_attrs(), whole.drop_attrs())
    assert counted == [2 * 13 - 8]


def test_sweep__refuses_what_is_not_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, model = tmp_path / "a.zarr", one_head()
    asked: dict[str, Any] = {"method": "zero", "quiet": True}
    others: list[tuple[Any, Any, dict[str, Any], str]] = [
        (pairs(1), model, {"method": "mean"}, "method is 'zero', not 'mean'"),
        (pairs(1), model, {"layers": [0, 1]}, r"layers is None, not \[0, 1\]"),
        (pairs(1), model, {"level": 0.9}, "level is 0.95, not 0.9"),
        (pairs(1), two_steps("v"), {}, "weights_sha256 is "),
        (pairs(2), model, {}, "samples_sha256 is "),
    ]
    with monkeypatch.context() as patched:
        dying(patched, 3)
        with pytest.raises(KeyboardInterrupt):
            ablate(pairs(1), model, name=path, **asked)
    for data, loaded, changed, says in [
        *others,
        (pairs(1), model, {"batch_size": 1}, "batch_size is 8, not 1"),
    ]:
        with pytest.raises(OutputExistsError, match=f"other parameters is under way: {says}"):
            ablate(data, loaded, name=path, **{**asked, **changed})
    result = ablate(pairs(1), model, name=path, **asked)
    for data, loaded, changed, says in others:
        with pytest.raises(OutputExistsError, match=f"result of another sweep: {says}"):
            ablate(data, loaded, name=path, **{**asked, **changed})
    # How they are batched decides nothing of what is finished.
    held = ablate(pairs(1), model, name=path, batch_size=1, **asked)
    xr.testing.assert_identical(held.drop_attrs(), result.drop_attrs())
    (tmp_path / "b").mkdir()
    with pytest.raises(OutputExistsError, match="is not the result of a sweep"):
        ablate(pairs(1), model, name=tmp_path / "b", **asked)
    with pytest.raises(UsageError, match="is a URL"):
        ablate(pairs(1), model, name="s3://bucket/a.zarr", **asked)


def test_sweep__counts_what_was_done_before_out_of_the_rate(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: dict[str, Any] = {"method": "zero", "quiet": True}
    with monkeypatch.context() as patched:
        dying(patched, 10)
        with pytest.raises(KeyboardInterrupt):
            ablate(pairs(1), one_head(), name=tmp_path / "a", **asked)
    seen: list[tuple[int, int, int]] = []
    original = ForwardProgress.advance

    def advance(self: ForwardProgress, count: int, tokens: int, written: Any) -> None:
        original(self, count, tokens, written)
        seen.append((self.done, self.first, self.total))
        assert self.state()["seconds_left"] is not None

    monkeypatch.setattr(ForwardProgress, "advance", advance)
    ablate(pairs(1), one_head(), name=tmp_path / "a", **asked)
    assert seen == [(11, 10, 13), (12, 10, 13), (13, 10, 13)]


@pytest.fixture
def parts(tmp_path: Path) -> Path:
    path = tmp_path / "run"
    for part in range(2):
        capture_run(
            one_head(),
            Listed(pairs(2)),
            path,
            sites=["text.*.resid_pre"],
            part=(part, 2),
            max_new_tokens=0,
            quiet=True,
        )
    return path


def test_sweep__of_a_run_is_kept_there_and_goes_on_after_a_merge(
    parts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = one_head()
    calls: dict[str, Callable[..., xr.Dataset]] = {
        "ablation": lambda **more: ablate(open_run(parts), model, method="zero", quiet=True, **more),
        "patched": lambda **more: patch(
            open_run(parts), model, base=[1, 3], source=[0, 2], positions="last", quiet=True, **more
        ),
    }
    whole = {name: call() for name, call in calls.items()}
    for name, call in calls.items():
        with monkeypatch.context() as patched:
            dying(patched, 2)
            with pytest.raises(KeyboardInterrupt):
                call(name=name)
    with pytest.raises(SpecificationError, match="cannot be called"):
        calls["ablation"](name="../a")
    finished = calls["patched"](name="finished")
    elsewhere = merge_run(parts, parts.with_name("merged"))
    assert derived_names(open_run(elsewhere)) == ["finished"]
    assert not sweep_folder(elsewhere, "patched").exists()
    lock = take_lock(sweep_folder(parts, "patched"))
    with pytest.raises(OutputExistsError, match=r"sweep 'patched' reads .*\n.*goes on afterwards"):
        merge_run(parts)
    release_lock(sweep_folder(parts, "patched"), lock)
    assert open_run(parts).attrs["parts"] == 2
    merge_run(parts)
    assert "parts" not in open_run(parts).attrs
    assert derived_names(open_run(parts)) == ["finished"]
    xr.testing.assert_identical(calls["patched"](name="finished").drop_attrs(), finished.drop_attrs())
    for name, call in calls.items():
        with monkeypatch.context() as patched:
            again = dying(patched, -1)
            result = call(name=name)
            assert again[0] > 0
        xr.testing.assert_identical(result.drop_attrs(), whole[name].drop_attrs())
    assert derived_names(open_run(parts)) == ["ablation", "finished", "patched"]
    assert verify_run(parts) == []
