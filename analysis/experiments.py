"""Experiments in one command: capture a model on a dataset, unless that is done, and draw what it shows."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SITES = ("text.*.q[text]", "text.*.k")
_CAPTURE = ("data_root", "num_samples", "seed", "dtype", "device", "batch_size")


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Mount `attention_maps`, `cross_attn_attribution` and `activation_patching` beside `capture`."""
    _add(
        commands,
        "attention_maps",
        "where the last token looks: over layers and heads, and on the images",
        "entropy, concentration and the share of attention on image, text and other tokens over layers, "
        "split by correct and incorrect; a map of heads; attention on the image, among words, head by head "
        "for some samples of each relation and outcome",
        _attention_maps,
    )
    _add(
        commands,
        "cross_attn_attribution",
        "which part of the image each word of the question looks at",
        "a table of every word of every question with its share of attention on the image and its strongest "
        "patch; curves over layers for the subject, the object and the relation; a panel a word for some "
        "samples of each relation and outcome",
        _cross_attn_attribution,
    )
    _add(
        commands,
        "activation_patching",
        "which layers, places and heads carry the answer, by patching minimal pairs",
        "maps and tables of the share of the answer that patching recovers, by layer and role and by layer "
        "and head, which are also kept in the run",
        _activation_patching,
        sites=("text.*.resid_pre", "text.*.resid_post[last]", "text.*.z"),
    )


def _add(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    summary: str,
    contents: str,
    draw: Callable[[Path, Path, int], list[Path]],
    sites: Sequence[str] = SITES,
) -> None:
    command = commands.add_parser(
        name,
        help=f"experiment: {summary}",
        description="Capture what it needs of a model on a dataset into DIR/run, unless that run is "
        f"there, and write into DIR: {contents}. Interrupted, the same command continues.",
    )
    command.add_argument("--model-name", metavar="NAME", help="as for `mechanistic capture`")
    command.add_argument("--dataset", metavar="NAME", help="as for `mechanistic capture`")
    command.add_argument("--run", metavar="RUN", help="instead of both: a run that was captured already")
    command.add_argument(
        "--output-dir", metavar="DIR", default=f"plots/mechanistic/{name}", help="default: %(default)s"
    )
    command.add_argument("--data-root", metavar="DIR", help="where the files of the dataset are")
    command.add_argument("--num-samples", metavar="N", help="only the first N samples (default: all)")
    command.add_argument("--seed", metavar="N", help="seed of the dataset (default: 0)")
    command.add_argument("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16")
    command.add_argument("--device", metavar="DEVICE", help="such as cpu, cuda, cuda:1 (default: cpu)")
    command.add_argument("--batch-size", metavar="N", help="samples a forward (default: 8)")
    command.add_argument(
        "--sites", nargs="+", metavar="SITE", default=sites, help=f"default: {' '.join(sites)}"
    )
    command.add_argument(
        "--num-shown", type=int, default=4, metavar="N", help="samples to draw one by one (default: 4)"
    )
    command.add_argument("--quiet", action="store_true", help="show no progress")
    command.set_defaults(run_command=lambda args: _experiment(args, commands.choices["capture"], draw))


def _experiment(
    args: argparse.Namespace,
    capture: argparse.ArgumentParser,
    draw: Callable[[Path, Path, int], list[Path]],
) -> int:
    from mechanistic.store.errors import UsageError

    if bool(args.run) == bool(args.model_name and args.dataset):
        raise UsageError(
            "an experiment needs a model and a dataset, or a run.",
            "Give --model-name and --dataset, or --run RUN.",
        )
    folder = Path(args.output_dir)
    run, code = Path(args.run) if args.run else folder / "run", 0
    if not args.run:
        code = _capture(args, capture, run)
        # 3: some samples could not be captured; what was is drawn.
        if code not in (0, 3):
            return code
    print("\n".join(map(str, draw(run, folder, args.num_shown))))
    return code


def _capture(args: argparse.Namespace, capture: argparse.ArgumentParser, run: Path) -> int:
    """What `mechanistic capture` does, which leaves a finished run of the same job as it is."""
    given = [(name, getattr(args, name)) for name in _CAPTURE]
    options = [text for name, value in given if value for text in (f"--{name.replace('_', '-')}", value)]
    command: list[Any] = ["--model-name", args.model_name, "--dataset", args.dataset, *options]
    command += ["--output-dir", str(run), "--sites", *args.sites]
    job = capture.parse_args([*command, *(["--quiet"] if args.quiet else [])])
    return int(job.run_command(job))


def _attention_maps(run: Path, folder: Path, shown: int) -> list[Path]:
    from .attention_maps import attention_maps

    return attention_maps(run, folder, shown=shown)


def _cross_attn_attribution(run: Path, folder: Path, shown: int) -> list[Path]:
    from .cross_attn_attribution import cross_attn_attribution

    return cross_attn_attribution(run, folder, shown=shown)


def _activation_patching(run: Path, folder: Path, shown: int) -> list[Path]:
    from .activation_patching import activation_patching

    return activation_patching(run, folder)
