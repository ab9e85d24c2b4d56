"""Write the models that the tests run, and what transformers makes of them: ``reference_runs.py FOLDER``.

In a process of its own: an engine in the same process replaces parts of transformers by its own.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from engine_models import ANSWER, MODELS, QUESTIONS, samples, save, sites
from tiny_models import Listed

from mechanistic.capture.job import capture_run
from mechanistic.capture.shapes import Shapes


def main(folder: Path) -> None:
    """One folder a model, one run beside it, and a longer run of the bundled model."""
    torch.set_num_threads(1)
    for name in MODELS:
        save(name, folder / name)
        capture_run(
            str(folder / name),
            Listed(samples(name)),
            folder / f"{name}-run",
            sites=sites(name),
            batch_size=6,
            max_new_tokens=ANSWER,
            attention="eager",
            quiet=True,
        )
    whole = {"sites": sites("spatial-tiny"), "max_new_tokens": ANSWER, "quiet": True}
    capture_run("spatial-tiny", Shapes(6), folder / "spatial-tiny-run", **whole)
    last = {"sites": ["text.3.resid_post[last]"], "batch_size": 40, "quiet": True}
    capture_run("spatial-tiny", Shapes(QUESTIONS), folder / "shapes-run", **last)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
