"""A small run written straight through RunWriter: no model, no torch, every value a function of its place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from mechanistic.store import ArraySchema, GroupSchema, RunWriter
from mechanistic.store.schema import image_groups, sample_columns, token_columns

LAYERS, WIDTH, OPTIONS = 3, 8, 4
ATTRIBUTES: dict[str, Any] = {
    "model": {"name": "made-up", "dtype": "float32"},
    "dataset": {"name": "made-up", "hash": "0"},
    "capture": {"sites": ["text.*.resid_post[all]"]},
}


def groups() -> list[GroupSchema]:
    tokens = token_columns("token")
    sizes = {"layer": LAYERS, "d_model": WIDTH}
    layers = {"layer": np.arange(LAYERS, dtype=np.int32)}
    site = ArraySchema("resid_post", ("layer", "token", "d_model"), "float32", sizes)
    last = ArraySchema("resid_post_last", ("layer", "sample", "d_model"), "float32", sizes)
    return [
        GroupSchema("samples", "sample", sample_columns(OPTIONS, {"distance": "float32"})),
        *image_groups(stored=True),
        GroupSchema("tokens/text", "token", tokens),
        GroupSchema(
            "text/resid_post",
            "token",
            (site, *tokens),
            {"site": "resid_post", "stack": "text", "tokens": "all", "source_dtype": "float32"},
            layers,
        ),
        GroupSchema("text/resid_post_last", "sample", (last,), {"site": "resid_post_last"}, layers),
    ]


def token_count(sample: int) -> int:
    return 300 + 57 * (sample % 5)


def rows(sample: int) -> dict[str, dict[str, np.ndarray]]:
    """Everything one sample adds to a run."""
    count = token_count(sample)
    table: dict[str, np.ndarray] = {}
    for column in token_columns("token"):
        table[column.name] = np.full(
            count, column.fill_value, object if column.dtype == "string" else column.dtype
        )
    table["sample_index"][:] = sample
    table["position"][:] = np.arange(count)
    table["kind"][:] = 0
    table["token_id"][:] = (np.arange(count) * 7 + sample) % 97
    table["token_text"][:] = [f"wörd{i % 97}" for i in table["token_id"]]
    table["is_last_prompt"][-1] = True
    random = np.random.default_rng(sample)
    values = random.standard_normal((LAYERS, count, WIDTH)).astype(np.float32)
    samples = {}
    for column in sample_columns(OPTIONS, {"distance": "float32"}):
        shape = column.shape("sample", 1)
        samples[column.name] = np.full(
            shape, column.fill_value, object if column.dtype == "string" else column.dtype
        )
    samples["sample_id"][:] = f"s{sample}"
    samples["correct"][:] = sample % 2
    samples["status"][:] = 0
    samples["distance"][:] = sample / 2
    data = np.frombuffer(f"image {sample}".encode(), np.uint8)
    image = {
        "sample_index": np.array([sample], np.int32),
        "image_index": np.array([0], np.int16),
        "width": np.array([64], np.int32),
        "height": np.array([64], np.int32),
        "sha256": np.array([f"{sample:064x}"], object),
        "start": np.array([sum(len(f"image {s}") for s in range(sample))], np.int64),
        "length": np.array([len(data)], np.int64),
    }
    return {
        "samples": samples,
        "images": image,
        "image_bytes": {"data": data},
        "tokens/text": table,
        "text/resid_post": {"resid_post": values, **table},
        "text/resid_post_last": {"resid_post_last": values[:, -1:]},
    }


def write_run(path: Path, samples: int = 12, commit_every: int = 5) -> Path:
    """A finished run of `samples` samples."""
    with RunWriter.create(path, ATTRIBUTES, groups(), samples=samples) as writer:
        for sample in range(samples):
            writer.append(rows(sample), samples=1)
            if (sample + 1) % commit_every == 0:
                writer.commit()
        writer.finish()
    return path
