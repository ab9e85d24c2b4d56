"""Analyses that only read: their CPU seconds beside those of reading the same arrays and doing nothing.

    OMP_NUM_THREADS=1 python tests/benchmarks/bench_reading.py [--megabytes 400]

A run of random residuals of every token, and one of the entropy of every attention row as capture stores it.
Each time is the median of several, taken in turn in one process. Reading alone forgets what it read, as the
analyses do; an analysis that returns all that it read is held against reading into memory. Linear CKA has no
target: it does more than read, it multiplies every pair of layers.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import dask
import numpy as np
import xarray as xr

from mechanistic.analysis import (
    attention_entropy,
    class_directions,
    linear_cka,
    logit_lens,
    project_rows,
    summarize,
    with_samples,
)
from mechanistic.analysis.attention_entropy import entropy_statistic
from mechanistic.store import ArraySchema, GroupSchema, RunWriter, open_run, site
from mechanistic.store.schema import KIND, STATUS, sample_columns, token_columns

LAYERS, TOKENS, WIDTH, HEADS, RUNS = 8, 256, 512, 28, 3
RELATIONS = ("left", "right", "above", "below")
TARGET = 2.0
NOT_ONLY_READING = {"linear CKA of the layers"}
RETURNS_ALL = {"stored entropy of every row"}
ENTROPY = dict(entropy_statistic().variables["attention_entropy"])


def main(megabytes: int) -> None:
    """Print a ratio for every analysis."""
    folder = Path(tempfile.mkdtemp(prefix="bench-reading-"))
    print(f"{TOKENS} tokens a sample x {LAYERS} layers; CPU s, times reading (target {TARGET:g})")
    try:
        build(folder / "residuals", "resid_post", megabytes)
        run = open_run(folder / "residuals")
        compare(run, "text/resid_post", "resid_post", residual_analyses(run))
        shutil.rmtree(folder / "residuals")
        build(folder / "statistics", "attn_stats", megabytes)
        run = open_run(folder / "statistics")
        compare(run, "text/attn_stats", "attention_entropy", statistic_analyses(run))
    finally:
        shutil.rmtree(folder)


def residual_analyses(run: xr.DataTree) -> dict[str, Callable[[], Any]]:
    with dask.config.set(scheduler="synchronous"):
        means = class_directions(run, target="relation", tokens="all", axes={"x": RELATIONS[:2]}).compute()
    directions = means["direction"]
    return {
        "class means and directions": lambda: class_directions(
            run, target="relation", tokens="all"
        ).compute(),
        "projection on a direction": lambda: project_rows(run, directions, tokens="all").compute(),
        "logit lens of every token": lambda: logit_lens(run, tokens="all").compute(),
        "linear CKA of the layers": lambda: linear_cka(run, tokens="all", route="covariance").compute(),
    }


def statistic_analyses(run: xr.DataTree) -> dict[str, Callable[[], Any]]:
    return {
        "stored entropy of every row": lambda: attention_entropy(run).compute(),
        "its mean in every split": lambda: summarize(
            with_samples(attention_entropy(run), run, "relation"), by="relation"
        ).compute(),
    }


def compare(run: xr.DataTree, group: str, name: str, analyses: dict[str, Callable[[], Any]]) -> None:
    array = site(run, group)[name]
    tasks = {
        "reading alone": lambda: array.data.map_blocks(_first, dtype=array.dtype).compute(),
        "reading into memory": array.data.compute,
        **analyses,
    }
    if not RETURNS_ALL & set(analyses):
        del tasks["reading into memory"]
    times: dict[str, list[float]] = {task: [] for task in tasks}
    with dask.config.set(scheduler="threads", num_workers=2):
        for _ in range(RUNS):
            for task, work in tasks.items():
                begun = time.process_time()
                work()
                times[task].append(time.process_time() - begun)
    taken = {task: statistics.median(each) for task, each in times.items()}
    print(f"{group}, {array.nbytes / 1e6:.0f} MB", flush=True)
    for task, seconds in taken.items():
        ratio = seconds / taken["reading into memory" if task in RETURNS_ALL else "reading alone"]
        note = " (matrix products)" if task in NOT_ONLY_READING else " over" * (ratio > TARGET)
        print(f"  {task:<30} {seconds:7.3f} s  {ratio:6.2f}x{note if task in analyses else ''}")


def _first(block: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    # A copy, as a view would keep the whole block.
    return block[(slice(1),) * block.ndim].copy()


def build(path: Path, site_name: str, megabytes: int) -> None:
    sizes: dict[str, Any] = {"layer": LAYERS, "d_model": WIDTH, "head": HEADS}
    arrays = {
        "resid_post": ArraySchema("resid_post", ("layer", "token", "d_model"), "float32", sizes),
        "attn_stats": ArraySchema("attention_entropy", ("layer", "token", "head"), "float32", sizes, ENTROPY),
    }
    array = arrays[site_name]
    array = replace(array, sizes={dim: sizes[dim] for dim in array.dims if dim in sizes})
    coords = {dim: np.arange(sizes[dim], dtype=np.int32) for dim in array.dims if dim in ("layer", "head")}
    attrs = {"site": site_name, "stack": "text", "tokens": "all", "source_dtype": "float32"}
    groups = [
        GroupSchema("samples", "sample", sample_columns(len(RELATIONS))),
        GroupSchema(f"text/{site_name}", "token", (array, *token_columns("token")), attrs, coords),
    ]
    attributes = {"model": {"name": "random"}, "dataset": {"name": "random"}, "capture": {"sites": []}}
    random = np.random.default_rng(0)
    values = random.standard_normal((LAYERS, TOKENS, sizes[array.dims[-1]])).astype("f4")
    samples = max(8, int(megabytes * 1e6 / values.nbytes))
    with RunWriter.create(path, attributes, groups, samples=samples) as writer:
        writer.put_static("readout", readout(random), {"norm_kind": "rms", "eps": 1e-6, "weight_offset": 0.0})
        for sample in range(samples):
            table = blank(token_columns("token"), "token", TOKENS)
            table["sample_index"][:] = sample
            table["position"][:] = np.arange(TOKENS)
            table["kind"][:] = KIND["text"]
            asked = blank(sample_columns(len(RELATIONS)), "sample", 1)
            asked["status"][:] = STATUS["ok"]
            asked["options"][:] = RELATIONS
            asked["answer"][:] = asked["relation"][:] = RELATIONS[sample % 4]
            rows = {array.name: np.roll(values, sample, axis=1), **table}
            writer.append({"samples": asked, f"text/{site_name}": rows}, samples=1)
        writer.finish()


def readout(random: np.random.Generator) -> xr.Dataset:
    return xr.Dataset(
        {
            "final_norm_weight": ("d_model", np.ones(WIDTH, np.float32)),
            "unembed": (("word", "d_model"), random.standard_normal((4, WIDTH)).astype("f4")),
        },
        {"word": np.array(RELATIONS, object), "word_token_id": ("word", np.arange(4, dtype=np.int32))},
    )


def blank(columns: tuple[ArraySchema, ...], axis: str, rows: int) -> dict[str, np.ndarray[Any, Any]]:
    kind: dict[str, Any] = {"string": object}
    return {c.name: np.full(c.shape(axis, rows), c.fill_value, kind.get(c.dtype, c.dtype)) for c in columns}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=400, help="size of each store (default: 400)")
    main(parser.parse_args().megabytes)
