"""The command that captures damaged samples again."""

from __future__ import annotations

import argparse
import ast
from functools import partial
from typing import Any

from mechanistic.store.errors import UsageError

from .datasets import open_dataset
from .libraries import require_libraries
from .loading_options import add_place_options, place_options
from .question_options import add_question_options, question_options


def add_repair_command(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Mount `repair`."""
    repair = commands.add_parser(
        "repair",
        help="recapture the samples whose data is damaged",
        description="Find the damaged and missing chunk files of a finished run, as verify does, and capture "
        "exactly the samples whose data they hold again, with the model and the dataset of the run.",
    )
    repair.add_argument("run", metavar="RUN", help="folder of a finished run, in parts or not")
    repair.add_argument("--model-name", metavar="NAME", help="where the model is now (default: as captured)")
    repair.add_argument(
        "--dataset", metavar="NAME", help="where the questions are now (default: as captured)"
    )
    repair.add_argument("--data-root", metavar="DIR", help="where the files of the dataset are")
    add_place_options(repair)
    add_question_options(repair.add_argument_group("how to read the questions, as when they were captured"))
    repair.set_defaults(run_command=_repair)


def _repair(args: argparse.Namespace) -> int:
    from mechanistic.store.parts import root_attributes

    attributes = root_attributes(args.run)
    if not attributes:
        raise UsageError(
            f"there is no run at {args.run}.", "Check the path; `mechanistic capture` makes one."
        )
    about, model, capture = attributes["dataset"], attributes["model"], attributes["capture"]
    dataset = open_dataset(
        args.dataset or about["name"],
        data_root=args.data_root,
        num_samples=about["num_samples"],
        seed=capture["seed"],
        **question_options(args),
    )
    require_libraries(quiet=True)
    from .models import load_model
    from .repair import repair_run

    options = {key: _option(key, value) for key, value in model["options"].items()}
    vllm = model["backend"] == "vllm"
    held: dict[str, Any] = {"engine": options} if vllm else {"attention": model["attention"], **options}
    load = partial(
        load_model,
        args.model_name or model["name"],
        backend=model["backend"],
        dtype=model["dtype"],
        revision=model["revision"] or None,
        **held,
        **place_options(args),
    )
    print(repair_run(args.run, load, dataset).message())
    return 0


def _option(name: str, text: str) -> Any:
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        raise UsageError(
            f"This run's model was loaded with {name}={text}, which cannot be written on a command line.",
            "Load it in Python, and give it to mechanistic.capture.repair.repair_run.",
        ) from None
