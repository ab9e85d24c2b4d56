"""What a capture will cost on disk, before it runs."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mechanistic.store.errors import DiskFullError, UsageError

from .batch import Batch
from .forward import rows_of
from .progress import human_bytes
from .row_sites import RowSite
from .sites import ResolvedSite
from .specification import ROW_SITES

LARGE = 100e9
# Uncompressed over compressed, measured on residuals with the store's codec; bfloat16 is kept as float32.
COMPRESSION = {"float16": 1.15, "float32": 1.15, "bfloat16": 2.7}
# A token's labels and a sample's texts, compressed; images come as they are.
TOKEN_BYTES = 12
SAMPLE_BYTES = 400


@dataclass(frozen=True)
class SitePrice:
    """Cost of one group: rows and bytes of a sample on average, uncompressed and as estimated on disk."""

    group: str
    site: str
    rows: float
    raw: float
    stored: float

    def cells(self, samples: int) -> tuple[str, str, str]:
        """Bytes of a sample, of all, and of all on disk, for people."""
        return human_bytes(self.raw), human_bytes(self.raw * samples), human_bytes(self.stored * samples)


@dataclass(frozen=True)
class Price:
    """Cost of a job; `other` is labels, texts and images of one sample, `free` what the disk has now."""

    samples: int
    sites: tuple[SitePrice, ...]
    other: float
    free: int

    @property
    def sample(self) -> float:
        """Bytes of one sample, uncompressed."""
        return sum(site.raw for site in self.sites) + self.other

    @property
    def raw(self) -> float:
        """Bytes of the whole job, uncompressed."""
        return self.samples * self.sample

    @property
    def stored(self) -> float:
        """Bytes of the whole job on disk, as estimated."""
        return self.samples * (sum(site.stored for site in self.sites) + self.other)

    def table(self) -> str:
        """The price as a table for people."""
        total = self.samples
        rows = [
            ("group", "rows/sample", "bytes/sample", "total", "on disk, about"),
            *(
                (f"{site.group}  ({site.site})", f"{site.rows:.1f}", *site.cells(total))
                for site in self.sites
            ),
            ("labels, texts, images", "", human_bytes(self.other), *[human_bytes(self.other * total)] * 2),
            (f"all {total} samples", "", "", human_bytes(self.raw), human_bytes(self.stored)),
        ]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows]
        return "\n".join([*lines, f"free on that disk: {human_bytes(self.free)}"])


def price(
    sites: Sequence[ResolvedSite], probes: Sequence[Batch], samples: int, path: Path, *, images: bool
) -> Price:
    """Price a job from a few of its samples, prepared with answers as long as they may get.

    Parameters
    ----------
    probes
        Batches of one sample, spread over the dataset.
    """
    count = len(probes)
    priced = []
    for site in sites:
        rows = float(np.mean([len(rows_of(site, batch)[0]) for batch in probes]))
        values = rows
        if site.spec.kind == "pattern":
            values = float(np.mean([RowSite(site, batch).entries for batch in probes]))
        computed = "float32" if site.spec.site in ROW_SITES else site.source_dtype
        raw = values * site.row_bytes + rows * TOKEN_BYTES
        stored = values * site.row_bytes / COMPRESSION[computed] + rows * TOKEN_BYTES
        priced.append(SitePrice(site.group, site.spec.to_string(), rows, raw, stored))
    tokens = sum(len(table["position"]) for batch in probes for table in (*batch.decoder, *batch.encoder))
    encoded = sum(len(image.encoded) for batch in probes for each in batch.images for image in each)
    other = SAMPLE_BYTES + (TOKEN_BYTES * tokens + encoded * images) / count
    return Price(samples, tuple(priced), other, free_bytes(path))


def free_bytes(path: Path) -> int:
    """Room on the disk that `path` is, or would be, on."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    return shutil.disk_usage(existing).free


def check_price(cost: Price, *, yes: bool) -> None:
    """Stop a job that will not fit, or is large and was not confirmed.

    Raises
    ------
    DiskFullError    the estimate exceeds the free disk.
    UsageError       it exceeds 100 GB and `yes` is False.
    """
    needed = f"{human_bytes(cost.stored)} on disk ({human_bytes(cost.raw)} uncompressed)"
    if cost.stored > cost.free:
        raise DiskFullError(
            f"This job needs about {needed}; {human_bytes(cost.free)} are free. Nothing was written.",
            "Capture fewer sites, layers or tokens (see --plan), fewer samples, or write to another disk.",
        )
    if cost.stored > LARGE and not yes:
        raise UsageError(
            f"This job needs about {needed}, which is more than {human_bytes(LARGE)}. Nothing was written.",
            "Add --yes (yes=True) if you mean it, or see with --plan what costs most.",
        )
