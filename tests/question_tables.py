"""A small table of questions about drawn pictures, as rows and as Hugging Face `datasets` stores it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pyarrow as pa
from published_sets import draw

OPTIONS = ["left", "right", "above"]


def rows(count: int = 4) -> list[dict[str, Any]]:
    return [
        {
            "image": f"pictures/{number}.png",
            "question": f"Where is thing {number}? Choose left, right, or above.",
            "options": OPTIONS,
            "answer": OPTIONS[number % 3],
            "size": number,
            "distance": number / 2,
            "seen": number % 2 == 0,
            "source": f"camera {number}",
        }
        for number in range(count)
    ]


def draw_pictures(folder: Path) -> Path:
    for number in range(4):
        draw(folder / f"pictures/{number}.png", number)
    return folder


def table_with_images(folder: Path, *, as_list: bool = False) -> pa.Table:
    """The rows as `datasets` stores them: {"bytes", "path"} of the encoded file, and a class label."""
    table = rows()
    for number, row in enumerate(table):
        cell = {"bytes": (folder / row["image"]).read_bytes(), "path": f"{number}.png"}
        row["image"] = [cell, cell] if as_list else cell
        row["place"] = number % 2
    stored = pa.Table.from_pylist(table)
    features = {
        "place": {"names": ["indoors", "outdoors"], "_type": "ClassLabel"},
        "image": {"_type": "Image"},
    }
    return stored.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})


def save_to_disk(table: pa.Table, folder: Path, shards: int = 2) -> Path:
    """A directory as `Dataset.save_to_disk` writes it: Arrow streams, state.json, dataset_info.json."""
    folder.mkdir(parents=True)
    names = [f"data-{number:05d}-of-{shards:05d}.arrow" for number in range(shards)]
    step = math.ceil(len(table) / shards)
    for number, name in enumerate(names):
        part = table.slice(number * step, step)
        with pa.ipc.new_stream(str(folder / name), part.schema) as writer:
            writer.write_table(part, max_chunksize=1)
    state = {"_data_files": [{"filename": name} for name in names], "_fingerprint": "0", "_split": None}
    (folder / "state.json").write_text(json.dumps(state))
    features = {"place": {"names": ["indoors", "outdoors"], "_type": "ClassLabel"}}
    (folder / "dataset_info.json").write_text(json.dumps({"features": features}))
    return folder
