"""Entropy and masses of every attention row, and two hops, of a store larger than the memory allowed.

Beside them in one run: reading q and k alone, the causal matrix product alone, and the scripts that people
write today (torch.load of one file a sample, softmax over the full square, -sum p log p; the mean over heads
for what gets from the image to the last token through text). CPU seconds are those of one thread, all on one
core: two threads of a machine slow each other, by how much is printed beside. The product is timed before and
after each of the others, and the median taken.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mechanistic.store import ArraySchema, GroupSchema, RunWriter
from mechanistic.store.schema import KIND, sample_columns, token_columns

if TYPE_CHECKING:
    import torch

LAYERS, HEADS, KV_HEADS, WIDTH, TOKENS, IMAGE = 4, 28, 4, 128, 1024, 576
LIMIT = 1 << 30
FILES = 6


def build(path: Path, samples: int) -> None:
    """A run of random q and k, float16; the content does not matter to the time."""
    rules = {
        str(n): {"mask": "causal", "window": None, "scale": WIDTH**-0.5, "softcap": None}
        for n in range(LAYERS)
    }
    rules = {n: {**rule, "sinks": False} for n, rule in rules.items()}
    sites = [("q", "head", HEADS), ("k", "kv_head", KV_HEADS)]
    groups = [GroupSchema("samples", "sample", sample_columns(2))]
    for name, heads, count in sites:
        array = ArraySchema(
            name,
            ("layer", "token", heads, "d_head"),
            "float16",
            {"layer": LAYERS, heads: count, "d_head": WIDTH},
        )
        attrs = {
            "site": name,
            "stack": "text",
            "tokens": "all",
            "attention": rules,
            "source_dtype": "float16",
        }
        coords = {"layer": np.arange(LAYERS, dtype=np.int32), heads: np.arange(count, dtype=np.int32)}
        groups.append(GroupSchema(f"text/{name}", "token", (array, *token_columns("token")), attrs, coords))
    attributes = {"model": {"name": "random"}, "dataset": {"name": "random"}, "capture": {"sites": []}}
    random = np.random.default_rng(0)
    pool = {
        name: random.standard_normal((LAYERS, TOKENS, count, WIDTH)).astype("f2") for name, _, count in sites
    }
    with RunWriter.create(path, attributes, groups, samples=samples) as writer:
        for sample in range(samples):
            table = blank(token_columns("token"), "token", TOKENS)
            table["sample_index"][:] = sample
            table["position"][:] = np.arange(TOKENS)
            table["kind"][:] = np.where(np.arange(TOKENS) < IMAGE, KIND["image"], KIND["text"])
            table["is_last_prompt"][-1] = True
            rows = {
                f"text/{name}": {name: np.roll(pool[name], sample, axis=1), **table} for name, _, _ in sites
            }
            writer.append({"samples": blank(sample_columns(2), "sample", 1), **rows}, samples=1)
        writer.finish()


def blank(columns: tuple[ArraySchema, ...], axis: str, rows: int) -> dict[str, np.ndarray]:
    kind = {"string": object}
    return {c.name: np.full(c.shape(axis, rows), c.fill_value, kind.get(c.dtype, c.dtype)) for c in columns}


def limited() -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (LIMIT, LIMIT))


def task(name: str, path: str, threads: int) -> None:
    """One measured task, in a process of its own; prints CPU seconds and peak memory as JSON."""
    import dask

    from mechanistic.analysis import attention_statistics, two_hop
    from mechanistic.analysis.attention_entropy import entropy_statistic
    from mechanistic.analysis.attention_mass import mass_statistic
    from mechanistic.store import open_run

    if threads == 1:
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    dask.config.set(scheduler="threads", num_workers=threads)
    begun = time.process_time()
    if name == "read":
        run = open_run(path)
        # Nothing is done with what is read: a maximum of float16 would cost more than reading it.
        arrays = [run["text/q"]["q"].data, run["text/k"]["k"].data]
        dask.compute(
            *(a.map_blocks(lambda block: block[:1, :1, :1, :1].copy(), dtype=a.dtype) for a in arrays)
        )
    elif name == "ours":
        rows = attention_statistics(open_run(path), [entropy_statistic(), mass_statistic()])
        # Of 8 GB, the numbers of every row alone would take half of the memory.
        rows.mean("token").compute()
    elif name == "two_hop":
        two_hop(open_run(path)).compute()
    elif name == "product":
        causal_product()
    else:
        usual_script(Path(path), usual_entropy if name == "usual" else usual_two_hop)
    cpu = time.process_time() - begun
    print(json.dumps({"cpu": cpu, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}))


def causal_product(block: int = 128) -> None:
    """q k' of one layer of FILES samples, causal blocks only: the physical limit."""
    random = np.random.default_rng(0)
    q = random.standard_normal((KV_HEADS, HEADS // KV_HEADS * TOKENS, WIDTH)).astype("f4")
    k = random.standard_normal((KV_HEADS, WIDTH, TOKENS)).astype("f4")
    group = HEADS // KV_HEADS
    for _ in range(FILES * LAYERS):
        for start in range(0, TOKENS, block):
            rows = q[:, start * group : (start + block) * group]
            np.matmul(rows, k[:, :, : start + block])


def usual_script(folder: Path, measure: Callable[[torch.Tensor], None]) -> None:
    """Every sample and layer: the whole pattern (head, query, key), then what is made of it."""
    import torch

    for sample in range(FILES):
        data = torch.load(folder / f"{sample}.pt", weights_only=True)
        for layer in range(LAYERS):
            q = data["q"][layer].float().transpose(0, 1)
            k = data["k"][layer].float().transpose(0, 1).repeat_interleave(HEADS // KV_HEADS, 0)
            scores = q @ k.transpose(1, 2) * WIDTH**-0.5
            scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), float("-inf"))
            measure(scores.softmax(-1))


def usual_entropy(weights: torch.Tensor) -> None:
    entropy = -(weights * weights.clamp_min(1e-12).log()).sum(-1)
    image, text, first = weights[..., :IMAGE].sum(-1), weights[..., IMAGE:].sum(-1), weights[..., 0]
    assert entropy.shape == image.shape == text.shape == first.shape


def usual_two_hop(weights: torch.Tensor) -> None:
    mean = weights.mean(0)
    on_image = mean[IMAGE:-1, :IMAGE].sum(-1)
    direct, indirect = mean[-1, :IMAGE].sum(), mean[-1, IMAGE:-1] @ on_image
    assert float(direct) > 0
    assert float(indirect) > 0


def measure(name: str, path: Path, *, limit: bool = False, threads: int = 1) -> dict[str, float]:
    command = [sys.executable, __file__, "--task", name, str(path), str(threads)]
    done = subprocess.run(command, capture_output=True, text=True, preexec_fn=limited if limit else None)
    if done.returncode:
        raise SystemExit(f"{name} failed:\n{done.stderr}")
    return dict(json.loads(done.stdout.splitlines()[-1]))


def main(gigabytes: float) -> None:
    import torch

    sample_bytes = LAYERS * TOKENS * (HEADS + KV_HEADS) * WIDTH * 2
    samples = max(FILES, int(gigabytes * 1e9 / sample_bytes))
    folder = Path(tempfile.mkdtemp(prefix="bench-attention-"))
    try:
        build(folder / "small", max(FILES, samples // 10))
        build(folder / "run", samples)
        random = torch.Generator().manual_seed(0)
        for sample in range(FILES):
            shapes = {"q": (LAYERS, TOKENS, HEADS, WIDTH), "k": (LAYERS, TOKENS, KV_HEADS, WIDTH)}
            torch.save(
                {n: torch.randn(s, generator=random).half() for n, s in shapes.items()},
                folder / f"{sample}.pt",
            )
        # What was just written is still on its way to the disk, which others would pay for.
        os.sync()
        products = [measure("product", folder)["cpu"]]
        legs = {}
        for name in ("read", "ours", "usual", "two_hop", "usual_two_hop"):
            where = folder if name.startswith("usual") else folder / "run"
            legs[name] = measure(name, where, limit=where != folder)
            products.append(measure("product", folder)["cpu"])
        small = measure("ours", folder / "small", limit=True, threads=2)
        both = measure("ours", folder / "run", limit=True, threads=2)
        small_hops = measure("two_hop", folder / "small", limit=True)
    finally:
        shutil.rmtree(folder)
    hops = legs["two_hop"]
    counts = {name: FILES if name.startswith("usual") else samples for name in legs}
    each = {name: leg["cpu"] / counts[name] for name, leg in legs.items()}
    each |= {"product": statistics.median(products) / FILES, "ours, two threads": both["cpu"] / samples}
    stored = samples * sample_bytes / 1e9
    print(f"q and k of {samples} samples x {LAYERS} layers x {TOKENS} tokens: {stored:.1f} GB")
    print("CPU s a sample: " + ", ".join(f"{k} {v:.3f}" for k, v in each.items()))
    print("entropy and masses of every row")
    print(f"  the usual script / ours       {each['usual'] / each['ours']:.2f}x   (target 4x)")
    print(f"  ours / causal product alone   {each['ours'] / each['product']:.2f}x   (target 2.5x)")
    print(f"  (ours - reading) / product    {(each['ours'] - each['read']) / each['product']:.2f}x")
    print(f"  in two threads / in one       {each['ours, two threads'] / each['ours']:.2f}x")
    peaks = f"{both['peak']:.0f} MiB; with a tenth of the store: {small['peak']:.0f} MiB"
    print(f"  peak memory, limit 1,024 MiB: {peaks}")
    print("two hops, every head and layer")
    print(f"  the usual script / ours       {each['usual_two_hop'] / each['two_hop']:.2f}x")
    peaks = f"{hops['peak']:.0f} MiB; with a tenth of the store: {small_hops['peak']:.0f} MiB"
    print(f"  peak memory, limit 1,024 MiB: {peaks}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--gigabytes", type=float, default=8.0, help="size of the store (default: 8)")
    parser.add_argument("--task", nargs=3, metavar=("NAME", "PATH", "N"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        task(args.task[0], args.task[1], int(args.task[2]))
    else:
        main(args.gigabytes)
