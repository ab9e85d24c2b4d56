"""The commands on stores: info, verify, merge."""

from __future__ import annotations

import argparse
import json

from .info import format_info, run_info
from .merge import merge_run
from .verify import verify_run


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    info = commands.add_parser(
        "info",
        help="print what is inside a run: model, dataset, sites, shapes, bytes, completeness",
        description="Print what is inside a run. Reads metadata only, also while the run is written.",
    )
    info.add_argument("run", metavar="RUN", help="folder or URL of a run")
    info.add_argument("--json", action="store_true", help="print it for machines")
    info.set_defaults(run_command=_info)

    verify = commands.add_parser(
        "verify",
        help="check a run against the format and its checksums",
        description="Read every byte of a run and check it against the format and its checksums. "
        "Exit code 0: sound. 1: problems, each printed with its array and samples.",
    )
    verify.add_argument("run", metavar="RUN", help="folder of a run")
    verify.add_argument("--json", action="store_true", help="print the problems for machines")
    verify.set_defaults(run_command=_verify)

    merge = commands.add_parser(
        "merge",
        help="make one plain store of a run that was captured in parts",
        description="Make one plain store of a run that was captured in parts. Streams in bounded memory, "
        "needs the size of the run once more on disk, continues where it was killed, and leaves a merged run "
        "as it is. Exit code 1 while a part is missing or unfinished.",
    )
    merge.add_argument("run", metavar="RUN", help="folder of a run of several parts")
    merge.add_argument(
        "--output-dir", metavar="DIR", help="write there and keep the parts (default: in place of the parts)"
    )
    merge.set_defaults(run_command=_merge)


def _info(args: argparse.Namespace) -> int:
    info = run_info(args.run)
    print(json.dumps(info, indent=1) if args.json else format_info(info))
    return 0


def _verify(args: argparse.Namespace) -> int:
    problems = verify_run(args.run)
    if args.json:
        rows = [{"path": p.path, "what": p.what, "samples": list(p.samples)} for p in problems]
        print(json.dumps({"run": args.run, "problems": rows}, indent=1))
    elif problems:
        print("\n".join(str(problem) for problem in problems))
        print(f"{len(problems)} problems in {args.run}")
    else:
        print(f"{args.run} is sound")
    return 1 if problems else 0


def _merge(args: argparse.Namespace) -> int:
    print(f"{merge_run(args.run, args.output_dir)} is one plain store")
    return 0
