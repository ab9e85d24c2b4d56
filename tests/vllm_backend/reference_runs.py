"""Write the models that the tests run, and what transformers makes of them: ``reference_runs.py FOLDER``.

In a process of its own: an engine in the same process replaces parts of transformers by its own.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from engine_models import FAMILIES, LONG, LONG_ANSWER, MODELS, QUESTIONS, dataset, save, sites, some_sites
from library_alone import ANSWER, alone, unembedding

from mechanistic.capture.job import capture_run
from mechanistic.capture.models import load_model
from mechanistic.capture.shapes import Shapes
from mechanistic.store import open_run


def main(folder: Path) -> None:
    """One folder a model; beside it a run, and the library alone; and a longer run of the bundled model."""
    torch.set_num_threads(1)
    settings: dict[str, Any] = {"batch_size": 6, "max_new_tokens": ANSWER, "quiet": True}
    for name, family in FAMILIES.items():
        if name in MODELS:
            save(name, folder / name)
        source, data, run = (
            str(folder / name) if name in MODELS else name,
            dataset(name),
            folder / f"{name}-run",
        )
        loaded = load_model(source, attn_implementation="eager")
        capture_run(loaded, data, run, sites=sites(name), **settings)
        prompts = open_run(run)["samples"].to_dataset().prompt.values.tolist()
        seen = [alone(family, loaded, prompt, data[number]) for number, prompt in enumerate(prompts)]
        torch.save((seen, unembedding(family, loaded)), folder / f"{name}-alone.pt")
        if name in LONG:
            longer = {**settings, "max_new_tokens": LONG_ANSWER, "sites": some_sites(name)}
            capture_run(loaded, data, folder / f"{name}-long-run", **longer)
    last = {"sites": ["text.3.resid_post[last]"], "batch_size": 40, "quiet": True}
    capture_run("spatial-tiny", Shapes(QUESTIONS), folder / "shapes-run", **last)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
