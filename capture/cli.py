"""The command that captures: model + dataset -> run."""

from __future__ import annotations

import argparse
import sys
from typing import Any

from mechanistic.store.errors import UsageError

from .datasets import dataset_names, open_dataset
from .libraries import require_libraries
from .loading_options import add_place_options, parse_options, place_options
from .parts import PartOf
from .question_options import add_question_options, question_options
from .repair_command import add_repair_command
from .specification import ATTENTION_SITES, CROSS_SITES, DEFAULT_SITES, RESIDUAL_SITES, TOKENS, parse_sites

_EPILOG = f"""\
sites: what to keep, as stack.layers.site{{heads}}[tokens]:dtype
  stack    text (the decoder), vision (the image encoder), qformer (BLIP-2's), vision_global (Mllama's second)
  layers   * for all, 5, 8-20, 0+3+8-10; layer 5 is the one with index 5, counted from 0
  site     {", ".join(RESIDUAL_SITES)}: the residual stream and what adds to it
           {", ".join(ATTENTION_SITES)}: queries and keys after rotary positions, values, head outputs
           attn_stats: entropy, strongest keys and mass by kind of each query's attention row
           pattern: the rows themselves; q and k, from which they are rebuilt, are far smaller
           {", ".join(CROSS_SITES)}: the same of layers that read the image encoder's tokens
  heads    {{0+3}}, {{4-7}}; absent: all
  tokens   {", ".join(TOKENS)}, joined with +; absent: all
           text is everything that is not an image token; last is the last prompt token
  dtype    float16 or float32; absent: the model's own (bfloat16 is kept exactly, as float32)
  Quote them, since shells read * and [ ] themselves. Tokens of q, attn_stats and pattern are queries.
  Default: {" ".join(repr(site) for site in DEFAULT_SITES)}

an output folder that exists: an unfinished run of the same job is continued, a finished one is left as it is
(exit code 0), anything else is refused (exit code 2). A sample that cannot be captured keeps its row, with
the reason, and the job goes on; the exit code is then 3. SIGTERM and Ctrl-C commit what is complete first.

examples:
  mechanistic capture --model-name spatial-tiny --dataset shapes --num-samples 400 --output-dir run
  mechanistic capture --model-name llava1.5 --dataset shapes --output-dir run --device cuda --dtype float16 \\
      --sites 'text.*.resid_post[last+subject+object]' 'text.8-20.q[text]' 'text.8-20.k' --plan
  mechanistic capture --model-name llava1.5 --dataset VSR --data-root vsr --output-dir run \\
      --parts 16 --part $SLURM_ARRAY_TASK_ID       # then, once: mechanistic merge run
  mechanistic capture --model-name qwen2.5vl-vllm --dataset shapes --output-dir run --batch-size 64 \
      --engine-option tensor_parallel_size=2
"""


def add_commands(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Mount `capture` and `repair`."""
    parser = commands.add_parser(
        "capture",
        help="run a model over a dataset and keep what it computes",
        description="Run a vision-language model over a dataset, once, and keep what it computes as a run: "
        "labelled tensors of chosen sites, layers and tokens, with answers and their correctness.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _what(parser.add_argument_group("what to capture"))
    add_question_options(parser.add_argument_group("how to read the questions"))
    _how(parser.add_argument_group("how to run"))
    _survive(parser.add_argument_group("failures, and many processes"))
    parser.set_defaults(run_command=_capture)
    add_repair_command(commands)


def _what(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--model-name",
        required=True,
        metavar="NAME",
        help="spatial-tiny (bundled), another known name, a folder, or a hub id such as owner/model",
    )
    group.add_argument(
        "--dataset",
        required=True,
        metavar="NAME",
        help=f"the questions: {', '.join(dataset_names())}; or a .jsonl or .parquet file or folder",
    )
    group.add_argument(
        "--data-root", metavar="DIR", help="where the files of a named dataset are, or the images of a file"
    )
    group.add_argument("--output-dir", required=True, metavar="RUN", help="folder of the run")
    group.add_argument(
        "--num-samples", type=_positive, metavar="N", help="only the first N samples (default: all)"
    )
    group.add_argument("--sites", nargs="+", metavar="SITE", help="what to keep, see below")
    group.add_argument("--no-images", action="store_true", help="do not store the images in the run")
    group.add_argument("--seed", type=int, default=0, help="seed of the dataset (default: 0)")
    group.add_argument(
        "--max-new-tokens",
        type=int,
        default=8,
        metavar="N",
        help="longest answer to generate, greedily; 0 for none (default: 8)",
    )


def _how(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--plan", action="store_true", help="print what every site costs on disk, and capture nothing"
    )
    group.add_argument("--yes", action="store_true", help="go on although the run will exceed 100 GB")
    group.add_argument(
        "--batch-size", type=_positive, default=8, metavar="N", help="samples a forward (default: 8)"
    )
    group.add_argument(
        "--dtype",
        choices=("float32", "float16", "bfloat16"),
        help="what the model computes in (default: as its weights are stored)",
    )
    group.add_argument(
        "--backend",
        choices=("transformers", "vllm"),
        help="what runs the model (default: transformers, or vllm for names that end in -vllm)",
    )
    group.add_argument(
        "--engine-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of vLLM, such as tensor_parallel_size=2; may be repeated",
    )
    group.add_argument(
        "--model-option",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="an option of transformers' from_pretrained, such as"
        ' \'quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}\'; may be repeated',
    )
    group.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    add_place_options(group)
    group.add_argument("--quiet", action="store_true", help="show no progress")
    group.add_argument("--log-json", action="store_true", help="progress as a JSON object a line")


def _survive(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--fail-fast", action="store_true", help="stop at the first sample that cannot be captured"
    )
    group.add_argument(
        "--retry-failed",
        action="store_true",
        help="try the samples of the run that failed again, and append those that succeed",
    )
    group.add_argument(
        "--parts", type=_positive, metavar="N", help="capture in N parts, each a slice of the dataset"
    )
    group.add_argument(
        "--part",
        type=int,
        metavar="I",
        help="capture part I of --parts, from 0, such as $SLURM_ARRAY_TASK_ID",
    )
    group.add_argument(
        "--scheduler", metavar="ADDRESS", help="capture all --parts on this dask.distributed cluster"
    )


def _capture(args: argparse.Namespace) -> int:
    """Run the command; errors are the caller's to print."""
    parse_sites(args.sites)
    _check_parts(args)
    dataset = open_dataset(
        args.dataset,
        data_root=args.data_root,
        num_samples=args.num_samples,
        seed=args.seed,
        **question_options(args),
    )
    loading: dict[str, Any] = {
        name: getattr(args, name) for name in ("backend", "dtype", "revision") if getattr(args, name)
    }
    loading |= place_options(args)
    if args.engine_option:
        loading["engine"] = parse_options("--engine-option", args.engine_option)
    loading |= parse_options("--model-option", args.model_option, besides=loading)
    # torch and transformers load here, after everything that can be refused without them.
    require_libraries(quiet=args.quiet)
    from .job import capture_run, price_run

    settings: dict[str, Any] = {
        "sites": args.sites,
        "max_new_tokens": args.max_new_tokens,
        "images": not args.no_images,
        **loading,
    }
    if args.plan:
        print(price_run(args.model_name, dataset, args.output_dir, **settings).table())
        return 0
    report = getattr(dataset, "problem_report", str)()
    if report and not args.quiet:
        print(report, file=sys.stderr)
    settings |= {
        name: getattr(args, name)
        for name in ("batch_size", "seed", "fail_fast", "retry_failed", "yes", "quiet", "log_json")
    }
    if args.scheduler:
        from .cluster import capture_on_cluster

        done = capture_on_cluster(
            args.scheduler, args.model_name, dataset, args.output_dir, parts=args.parts, **settings
        )
    else:
        part = (args.part, args.parts) if args.parts else None
        done = capture_run(args.model_name, dataset, args.output_dir, part=part, **settings)
    print(done.message())
    return 3 if done.failed else 0


def _check_parts(args: argparse.Namespace) -> None:
    given = [args.part is not None, bool(args.scheduler)]
    if args.parts and sum(given) == 1:
        PartOf(args.part or 0, args.parts)
    elif args.parts or any(given):
        raise UsageError(
            "--parts goes with either --part or --scheduler, and they with it.",
            "One part of 16: --parts 16 --part 3. All on a cluster: --parts 16 --scheduler tcp://host:8786.",
        )


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be 1 or more, not {number}")
    return number
