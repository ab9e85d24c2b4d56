"""The `mechanistic` command: one subcommand a task, mounted from each folder's own cli.py."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from types import FrameType
from typing import Any

from mechanistic.store.cli import add_commands as add_store_commands
from mechanistic.store.errors import MechanisticError

DESCRIPTION = """\
Capture a vision-language model's attention and residual tensors once, into a labelled Zarr store;
analyse them for ever after on CPUs; go back to the model only for causal work.

  mechanistic demo                    the whole way in a minute, on a small model that comes with it
  mechanistic capture --plan ...      what a capture will cost, before it runs
  mechanistic info RUN                what is inside a store
  mechanistic analyze RUN mass probe  numbers and pictures from a store, without the model
  mechanistic attention_maps ...      capture and pictures of attention, in one command
  mechanistic compare RUN_A RUN_B     how far two runs of the same samples are apart, as a certificate
"""
EXIT_CODES = (
    "exit codes: 0 done, 1 failed, 2 wrong usage, 3 finished with failed samples, 130/143 interrupted"
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand; an error of ours is two lines on stderr, and a traceback only with --debug."""
    args = build_parser().parse_args(argv)
    signal.signal(signal.SIGTERM, _terminate)
    try:
        return int(args.run_command(args))
    except MechanisticError as error:
        if args.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        print("interrupted; what was committed is kept, and the same command continues it", file=sys.stderr)
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def build_parser() -> argparse.ArgumentParser:
    from mechanistic.capture.cli import add_commands as add_capture_commands

    from .attribute import add_command as add_attribute_command
    from .experiments import add_commands as add_experiment_commands

    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="mechanistic", description=DESCRIPTION, epilog=EXIT_CODES, formatter_class=formatter
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_demo(commands)
    _add_analyze(commands)
    _add_compare(commands)
    add_attribute_command(commands)
    add_experiment_commands(commands)
    add_capture_commands(commands)
    add_store_commands(commands)
    for command in commands.choices.values():
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    return parser


def _add_demo(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    demo = commands.add_parser(
        "demo",
        help="capture, analyse and show a small model that learned left from right, in a minute",
        description="Capture 400 drawn scenes with the bundled model, analyse the store, and write the run, "
        "the figures and one HTML page that reads from top to bottom. Needs no network and no GPU.",
    )
    demo.add_argument("--output-dir", default="demo", help="where to write (default: demo)")
    demo.add_argument("--num-samples", type=int, default=400, help="scenes to capture (default: 400)")
    demo.add_argument("--seed", type=int, default=0, help="which scenes are drawn (default: 0)")
    demo.set_defaults(run_command=_demo)


def _demo(args: argparse.Namespace) -> int:
    from .demo import run_demo

    return run_demo(args.output_dir, num_samples=args.num_samples, seed=args.seed)


def _add_analyze(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    from .analyze import ANALYSES, Options

    width = max(map(len, ANALYSES))
    listed = "\n".join(f"  {name.ljust(width)}  {analysis.meaning}" for name, analysis in ANALYSES.items())
    command = commands.add_parser(
        "analyze",
        help="compute analyses of a run, without its model, and save numbers and pictures",
        description="Compute analyses of a run, out of core and without its model or torch. Each one writes "
        "NAME.zarr (the labelled result), NAME.csv (its mean, interval and n in each split) and, "
        "but for cka, NAME*.png.",
        epilog=f"analyses:\n{listed}\n\nexample:\n  mechanistic analyze RUN mass probe --by correct",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    default = Options()
    command.add_argument("run", metavar="RUN", help="folder or URL of a run")
    command.add_argument("names", metavar="NAME", nargs="+", help="which analyses, see below")
    command.add_argument("--tokens", default=default.tokens, help="query tokens or rows (default: last)")
    command.add_argument(
        "--by", nargs="+", default=[], metavar="COLUMN", help="split samples by their columns"
    )
    command.add_argument("--target", default=default.target, help="what a probe reads (default: relation)")
    command.add_argument(
        "--site", default=default.site, help="what a probe reads from (default: %(default)s)"
    )
    command.add_argument(
        "--output-dir", default="analysis-results", metavar="DIR", help="default: %(default)s"
    )
    command.add_argument("--scheduler", metavar="ADDRESS", help="compute on a running dask cluster")
    command.add_argument("--allow-partial", action="store_true", help="also analyse an unfinished run")
    command.set_defaults(run_command=_analyze)


def _analyze(args: argparse.Namespace) -> int:
    from contextlib import nullcontext

    from threadpoolctl import threadpool_limits

    from .analyze import Options, analyze_run

    options = Options(args.tokens, tuple(args.by), args.target, args.site)
    client: Any = nullcontext()
    if args.scheduler:
        from distributed import Client

        client = Client(args.scheduler)
    # One BLAS thread in each of dask's: more would wait for each other, for twice the CPU time.
    with client, threadpool_limits(1, user_api="blas"):
        written = analyze_run(
            args.run, args.names, args.output_dir, options, allow_partial=args.allow_partial
        )
    print("\n".join(map(str, written)))
    return 0


def _add_compare(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    command = commands.add_parser(
        "compare",
        help="compare two runs of the same samples, site by site and layer by layer",
        description="Compare two runs of the same samples, such as float32 and bfloat16 or two backends: "
        "per site and layer the largest difference, absolute and relative to the largest value of RUN_A, "
        "cosines, and the worst token; and whether both answer the same. Prints a table and stores it with "
        "RUN_A as derived/compare_<run id of RUN_B>.",
    )
    command.add_argument("first", metavar="RUN_A", help="folder or URL of a run")
    command.add_argument("second", metavar="RUN_B", help="folder or URL of a run of the same samples")
    command.add_argument("--sites", nargs="+", metavar="SITE", help="only these, such as text/resid_post")
    command.add_argument(
        "--tolerance", type=float, metavar="X", help="exit code 1 where a relative difference exceeds X"
    )
    command.add_argument("--no-store", action="store_true", help="print only, and leave RUN_A as it is")
    command.set_defaults(run_command=_compare)


def _compare(args: argparse.Namespace) -> int:
    from .certificate import certify_runs

    return certify_runs(
        args.first, args.second, names=args.sites, tolerance=args.tolerance, store=not args.no_store
    )


def _terminate(signum: int, frame: FrameType | None) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
