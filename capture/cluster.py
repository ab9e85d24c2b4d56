"""The parts of a job on a dask.distributed cluster: one model a worker, a part at a time on each."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mechanistic.store import read_manifest
from mechanistic.store.errors import CaptureError, UsageError

from .backend import backend_of
from .dataset import Dataset
from .failures import failed_samples
from .job import CaptureSummary, capture_run, known
from .models import LoadedModel, load_model
from .outputs import find_output
from .parts import PartOf
from .progress import Progress
from .run_description import CaptureSettings
from .specification import parse_sites

# How often a part is begun again after its worker died; it goes on where that one had committed.
RETRIES = 3


class WorkerModel:
    """The one model that a worker process holds, and whose turn it is to use it."""

    def __init__(self) -> None:
        self.turn = threading.Lock()
        self.key: Any = None
        self.loaded: LoadedModel | None = None

    def load(self, name: str, loading: dict[str, Any]) -> LoadedModel:
        """The model, loaded on first use."""
        key = (name, sorted(loading.items(), key=str))
        if self.loaded is None or self.key != key:
            if self.loaded is not None:
                backend_of(self.loaded).close()
            self.loaded = None
            self.loaded, self.key = load_model(name, **loading), key
        return self.loaded


def capture_on_cluster(
    address: str,
    model: str,
    dataset: Dataset,
    path: str | Path,
    *,
    parts: int,
    quiet: bool = False,
    log_json: bool = False,
    **settings: Any,
) -> CaptureSummary:
    """Capture every part of a run on the workers of a cluster, which all see the folder `path`.

    Parameters
    ----------
    address
        Of the scheduler, such as tcp://host:8786.
    settings
        Everything else that `capture_run` takes.

    Raises
    ------
    UsageError           the scheduler does not answer.
    OutputExistsError    as `capture_run`, for any of the parts, before a worker loads the model.
    CaptureError         workers kept dying; the run continues with the same command.
    """
    from distributed import KilledWorker

    begun = time.monotonic()
    folder = Path(path).absolute()
    left = _left(model, dataset, folder, parts, settings)
    progress = Progress(len(dataset), quiet=quiet, log_json=log_json)
    captured = 0
    with _client(address) as client:
        try:
            for done in _parts_done(client, (model, dataset, str(folder)), left, settings):
                captured += done.captured
                progress.failed += done.failed
                progress.advance(done.captured, None, lambda: read_manifest(folder).stored_bytes)
        except KilledWorker as cause:
            raise CaptureError(
                f"Workers died again and again over one part of {path} ({cause}).",
                "See their logs (memory?); the same command continues what is committed.",
            ) from cause
    manifest = read_manifest(folder)
    progress.close(manifest.stored_bytes)
    failed = len(failed_samples(folder))
    seconds = time.monotonic() - begun
    return CaptureSummary(Path(path), manifest.samples, captured, seconds, manifest.stored_bytes, failed)


def _left(model: str, dataset: Dataset, folder: Path, parts: int, settings: dict[str, Any]) -> list[PartOf]:
    """The parts that have something left to do; of a merged run, which is all of them, one."""
    names = ("batch_size", "max_new_tokens", "images", "seed")
    given = {name: settings[name] for name in names if name in settings}
    capture = CaptureSettings(parse_sites(settings.get("sites")), **given).to_dict()
    left: dict[Path, PartOf] = {}
    for part in (PartOf(index, parts) for index in range(parts)):
        held, finished = find_output(folder, known(model, settings), dataset, capture, part)
        if not finished or (settings.get("retry_failed") and failed_samples(held)):
            left.setdefault(held, part)
    return list(left.values())


def _client(address: str) -> Any:
    from distributed import Client

    try:
        return Client(address, timeout="10s", set_as_default=False)
    except (OSError, TimeoutError, ValueError) as cause:
        raise UsageError(
            f"No dask scheduler answers at {address}.", "Start one (dask scheduler), and give its address."
        ) from cause


def _parts_done(
    client: Any, job: tuple[str, Dataset, str], parts: list[PartOf], settings: dict[str, Any]
) -> Iterator[CaptureSummary]:
    """What became of each part, in the order in which they end; when one cannot be done, the others stop."""
    from distributed import as_completed

    futures = [
        client.submit(capture_part, *job, (part.index, part.count), settings, pure=False, retries=RETRIES)
        for part in parts
    ]
    try:
        for future in as_completed(futures, loop=client.loop):
            yield future.result()
    finally:
        client.cancel(futures)


def capture_part(
    model: str, dataset: Dataset, path: str, part: tuple[int, int], settings: dict[str, Any]
) -> CaptureSummary:
    """Capture one part, on a worker, with the worker's own model."""
    own = inspect.signature(capture_run).parameters
    loading = {name: value for name, value in settings.items() if name not in own}
    rest = {name: value for name, value in settings.items() if name in own}
    state = _worker_model()
    # A worker with several threads still has one model, whose hooks serve one job at a time.
    with state.turn:
        return capture_run(state.load(model, loading), dataset, path, part=part, quiet=True, **rest)


def _worker_model() -> WorkerModel:
    from distributed import get_worker

    state: WorkerModel = vars(get_worker()).setdefault("mechanistic_model", WorkerModel())
    return state
