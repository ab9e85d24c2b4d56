"""Write engines side by side in one run: CPU seconds a GB, the ratio to the codec alone, and memory.

python tests/benchmarks/bench_write.py [--megabytes 512]
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import zarr
from numcodecs import Blosc

from mechanistic.store import ArraySchema, GroupSchema, RunWriter
from mechanistic.store.growing import Threads
from mechanistic.store.layout import BLOSC_BLOCK, compressors, layout

LAYERS, WIDTH = 16, 1024
ATTRIBUTES: dict[str, Any] = {"model": {}, "dataset": {}, "capture": {}}
SCHEMA = ArraySchema(
    "resid_post", ("layer", "token", "d_model"), "float16", {"layer": LAYERS, "d_model": WIDTH}
)


def activations(rows: int) -> np.ndarray[Any, Any]:
    """Numbers that compress like a residual stream: one scale a feature, and a few large features."""
    random = np.random.default_rng(0)
    scales = np.exp(random.normal(0, 1, WIDTH)).astype(np.float32)
    values = random.standard_normal((LAYERS, rows, WIDTH), np.float32) * scales
    return values.astype(np.float16)


def run_writer(values: np.ndarray[Any, Any], path: Path) -> None:
    """The store, everything on: labels apart, it is what a job does."""
    group = GroupSchema("text/resid_post", "token", (SCHEMA,))
    samples = GroupSchema("samples", "sample", (ArraySchema("status", ("sample",), "int8"),))
    with RunWriter.create(path, ATTRIBUTES, [samples, group], samples=1) as writer:
        for first in range(0, values.shape[1], 500):
            writer.append({"text/resid_post": {"resid_post": values[:, first : first + 500]}}, samples=0)
        writer.append({"samples": {"status": np.zeros(1, np.int8)}}, samples=1)
        writer.finish()


def codec_alone(values: np.ndarray[Any, Any], path: Path) -> None:
    """Compress every chunk, in as many threads as the store does, and write nothing."""
    codec = Blosc("zstd", 1, Blosc.SHUFFLE, BLOSC_BLOCK)
    in_threads(lambda chunk: len(codec.encode(chunk)), values)


def codec_and_checksum(values: np.ndarray[Any, Any], path: Path) -> None:
    """All codecs that the array's metadata names, Blosc and CRC-32C; nothing is written."""
    codec = Blosc("zstd", 1, Blosc.SHUFFLE, BLOSC_BLOCK)
    in_threads(lambda chunk: google_crc32c.value(codec.encode(chunk)), values)


def in_threads(encode: Callable[[np.ndarray[Any, Any]], int], values: np.ndarray[Any, Any]) -> None:
    rows = layout(SCHEMA, "token").chunk[1]
    chunks = [
        values[layer, first : first + rows]
        for first in range(0, values.shape[1], rows)
        for layer in range(LAYERS)
    ]
    with Threads() as threads:
        list(threads.encode.map(encode, chunks))


def with_tensorstore(values: np.ndarray[Any, Any], path: Path) -> None:
    """The same layout and codec through tensorstore, two shards in flight."""
    import tensorstore

    plan = layout(SCHEMA, "token")
    assert plan.shard is not None
    zarr.create_array(
        str(path),
        shape=values.shape,
        chunks=plan.chunk,
        shards=plan.shard,
        dtype="float16",
        compressors=compressors("float16"),
    )
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    store: Any = tensorstore.open(spec, open=True).result()
    pending: list[Any] = []
    for first in range(0, values.shape[1], plan.shard[1]):
        block = values[:, first : first + plan.shard[1]]
        pending.append(store[:, first : first + block.shape[1]].write(block))
        if len(pending) > 1:
            pending.pop(0).result()
    for each in pending:
        each.result()


def zarr_python(values: np.ndarray[Any, Any], path: Path) -> None:
    """The same layout and codec through zarr-python, shard by shard."""
    plan = layout(SCHEMA, "token")
    assert plan.shard is not None
    array = zarr.create_array(
        str(path),
        shape=values.shape,
        chunks=plan.chunk,
        shards=plan.shard,
        dtype="float16",
        compressors=compressors("float16"),
    )
    for first in range(0, values.shape[1], plan.shard[1]):
        array[:, first : first + plan.shard[1]] = values[:, first : first + plan.shard[1]]


def memmap(values: np.ndarray[Any, Any], path: Path) -> None:
    """Uncompressed, through the page cache."""
    file = np.memmap(path, np.float16, "w+", shape=values.shape)
    file[:] = values
    file.flush()


def safetensors(values: np.ndarray[Any, Any], path: Path) -> None:
    """Uncompressed, one file."""
    from safetensors.numpy import save_file

    save_file({"resid_post": values}, path)


def torch_save(values: np.ndarray[Any, Any], path: Path) -> None:
    """What a first script does."""
    import torch

    torch.save(torch.from_numpy(values), path)


ENGINES: dict[str, Callable[[np.ndarray[Any, Any], Path], None]] = {
    "RunWriter": run_writer,
    "codec alone": codec_alone,
    "with CRC-32C": codec_and_checksum,
    "tensorstore": with_tensorstore,
    "zarr-python": zarr_python,
    "np.memmap": memmap,
    "safetensors": safetensors,
    "torch.save": torch_save,
}


def cpu_seconds() -> float:
    """User and system time of all threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def compare(values: np.ndarray[Any, Any], folder: Path, repeats: int) -> None:
    """Each engine in turn, `repeats` times over; the best of each."""
    best = dict.fromkeys(ENGINES, (np.inf, np.inf))
    size = {}
    for repeat in range(repeats + 1):
        for name, write in ENGINES.items():
            path = folder / name.replace(" ", "_")
            begun, cpu = time.perf_counter(), cpu_seconds()
            write(values, path)
            taken = cpu_seconds() - cpu, time.perf_counter() - begun
            # The first round imports libraries.
            best[name] = min(best[name], taken) if repeat else best[name]
            files = [path] if path.is_file() else list(path.rglob("*"))
            size[name] = sum(file.stat().st_size for file in files if file.is_file())
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    gigabytes = values.nbytes / 1e9
    print(f"{gigabytes:.2f} GB of float16 {values.shape}, best of {repeats}")
    print(f"{'engine':14}{'CPU s/GB':>10}{'x codec':>9}{'wall s/GB':>11}{'on disk':>9}")
    for name, (cpu, wall) in best.items():
        ratio = cpu / best["codec alone"][0]
        print(f"{name:14}{cpu / gigabytes:10.2f}{ratio:9.2f}{wall / gigabytes:11.2f}", end="")
        print(f"{size[name] / values.nbytes:9.2f}")


class PeakMemory:
    """The largest resident memory of this process while active, sampled."""

    def __enter__(self) -> PeakMemory:
        self.peak, self._stop = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            pages = int(Path("/proc/self/statm").read_text().split()[1])
            self.peak = max(self.peak, pages * resource.getpagesize())


def memory(values: np.ndarray[Any, Any], folder: Path) -> None:
    """Peak memory of a run and of one ten times longer, from the same buffer."""
    piece = values[:, :500]
    group = GroupSchema("text/resid_post", "token", (SCHEMA,))
    samples = GroupSchema("samples", "sample", (ArraySchema("status", ("sample",), "int8"),))
    for appends in (20, 200):
        path = folder / f"memory{appends}"
        with (
            PeakMemory() as memory,
            RunWriter.create(path, ATTRIBUTES, [samples, group], samples=appends) as writer,
        ):
            for number in range(appends):
                rows = {"resid_post": piece}
                writer.append(
                    {"text/resid_post": rows, "samples": {"status": np.zeros(1, np.int8)}}, samples=1
                )
                if number % 10 == 9:
                    writer.commit()
            writer.finish()
        written = appends * piece.nbytes / 1e9
        print(f"{written:6.2f} GB written: peak {memory.peak / 1e6:.0f} MB resident")
        shutil.rmtree(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=2)
    arguments = parser.parse_args()
    values = activations(arguments.megabytes * 1_000_000 // (LAYERS * WIDTH * 2))
    with tempfile.TemporaryDirectory() as folder:
        compare(values, Path(folder), arguments.repeats)
        memory(values, Path(folder))


if __name__ == "__main__":
    main()
