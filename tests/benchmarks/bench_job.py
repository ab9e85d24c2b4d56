"""A capture job on the bundled model: its throughput with and without writing, and its memory.

python tests/benchmarks/bench_job.py [--num-samples 200]
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from pathlib import Path

from mechanistic.capture.batch_job import Job
from mechanistic.capture.interruption import Interruption
from mechanistic.capture.models import LoadedModel, load_model
from mechanistic.capture.progress import Progress
from mechanistic.capture.run_description import CaptureSettings
from mechanistic.capture.shapes import Shapes
from mechanistic.capture.specification import parse_sites
from mechanistic.store import layout

SITES = ("text.*.resid_post", "text.*.q", "text.*.k", "text.*.v")


def main() -> None:
    formatter = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=formatter)
    parser.add_argument("--num-samples", type=int, default=200)
    count = parser.parse_args().num_samples
    loaded = load_model("spatial-tiny")
    settings = CaptureSettings(parse_sites(SITES), batch_size=16)
    with tempfile.TemporaryDirectory() as folder:
        throughput(loaded, settings, count, Path(folder))
        memory(loaded, settings, count, Path(folder))


def throughput(loaded: LoadedModel, settings: CaptureSettings, count: int, folder: Path) -> None:
    """The same samples with and without writing, by turns."""
    progress = Progress(count, stream=io.StringIO(), quiet=True)
    rates: dict[str, list[float]] = {"without writing": [], "with writing": []}
    for repeat in range(3):
        job = Job(loaded, Shapes(count), folder / str(repeat), settings)
        with job.open() as writer:
            begun = time.perf_counter()
            for window in job.windows(job.span):
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


def memory(loaded: LoadedModel, settings: CaptureSettings, count: int, folder: Path) -> None:
    """The largest resident memory during a run, and during one ten times longer.

    With shards as small as they get, so that the short run too fills every buffer.
    """
    layout.SHARD_BYTES = 1
    for samples in (count, 10 * count):
        progress = Progress(samples, stream=io.StringIO(), quiet=True)
        job = Job(loaded, Shapes(samples), folder / f"memory{samples}", settings)
        # Linux then counts the peak from here on.
        Path("/proc/self/clear_refs").write_text("5")
        with job.open() as writer:
            job.run(writer, progress, Interruption())
            written = writer.bytes_written
        status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
        peak = int(status["VmHWM"].split()[0]) * 1024
        print(f"{samples} samples, {written / 1e6:.0f} MB: peak {peak / 1e6:.0f} MB resident")


if __name__ == "__main__":
    main()
