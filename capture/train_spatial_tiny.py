"""Train spatial-tiny: `python -m mechanistic.capture.train_spatial_tiny --output-dir NEW --seed 0`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging

from mechanistic.store.errors import MechanisticError, OutputExistsError

from .train_architecture import VOCABULARY, build_processor
from .train_evaluation import Evaluation, evaluate
from .train_model_card import write_model_card
from .train_stages import Recipe, Report, one_thread_deterministic, train


def train_spatial_tiny(folder: Path, recipe: Recipe, report: Report, *, samples: int = 2000) -> Evaluation:
    """Train, save as bfloat16 with the processor, measure what was saved, and write the model card.

    Raises
    ------
    OutputExistsError    `folder` exists and is not empty.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise OutputExistsError(
            f"{str(folder)!r} exists and is not an empty folder.", "Name a new folder with --output-dir."
        )
    model = train(recipe, report)
    save(model, folder)
    report(f"measuring on {samples} samples of each kind")
    with one_thread_deterministic():
        measured = evaluate(folder, samples)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    write_model_card(folder, recipe, measured, parameters=parameters, words=len(VOCABULARY))
    return measured


def save(model: Any, folder: Path) -> None:
    """The model in bfloat16 and its processor, as from_pretrained reads them."""
    folder.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    # save_pretrained writes the weights for their owner alone; an installed package is read by others.
    (folder / "model.safetensors").chmod(0o644)
    build_processor().save_pretrained(folder)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mechanistic.capture.train_spatial_tiny",
        description="Train spatial-tiny from scratch on drawn scenes: a quarter of an hour on one thread.",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="a new folder for the model")
    parser.add_argument("--seed", type=int, default=0, help="of weights and scenes (default 0)")
    options = parser.parse_args(arguments)

    def report(line: str) -> None:
        print(line, flush=True)

    logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        measured = train_spatial_tiny(options.output_dir, Recipe(seed=options.seed), report)
    except MechanisticError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    report(
        f"held-out pairs, two objects: {measured.two_objects:.1%} right; with a distractor: "
        f"{measured.distractor:.1%}; blank images: {measured.blank_image:.1%} (chance 25%)"
    )
    report(f"saved {options.output_dir}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
