"""Throughput of a capture job with and without writing, in one run, on the bundled model.

python tests/benchmarks/bench_job.py [--num-samples 200]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

from mechanistic.capture.batch_job import Job
from mechanistic.capture.batch_plan import windows
from mechanistic.capture.interruption import Interruption
from mechanistic.capture.models import load_model
from mechanistic.capture.progress import Progress
from mechanistic.capture.run_description import CaptureSettings
from mechanistic.capture.shapes import Shapes
from mechanistic.capture.specification import parse_sites

SITES = ("text.*.resid_post", "text.*.q", "text.*.k", "text.*.v")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--num-samples", type=int, default=200)
    count = parser.parse_args().num_samples
    loaded = load_model("spatial-tiny")
    settings = CaptureSettings(parse_sites(SITES), batch_size=16)
    progress = Progress(count, stream=io.StringIO(), quiet=True)
    rates: dict[str, list[float]] = {"without writing": [], "with writing": []}
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(3):
            job = Job(loaded, Shapes(count), Path(folder) / str(repeat), settings)
            with job.open() as writer:
                begun = time.perf_counter()
                for window in windows(job.span, settings.batch_size):
                    job.window(job.plan(window), progress, Interruption())
                rates["without writing"].append(count / (time.perf_counter() - begun))
                begun = time.perf_counter()
                job.run(writer, progress, Interruption())
                rates["with writing"].append(count / (time.perf_counter() - begun))
                written = writer.bytes_written
    for name, found in rates.items():
        print(f"{name:16}{max(found):8.1f} samples/s, best of 3")
    ratio = max(rates["with writing"]) / max(rates["without writing"])
    print(f"ratio {ratio:.2f}, {written / 1e6:.0f} MB a run")


if __name__ == "__main__":
    main()
