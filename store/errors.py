"""The errors a user meets: what happened, what was expected, and what to type next, in two lines."""

from __future__ import annotations


class MechanisticError(Exception):
    """Base of every error raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1

    def __init__(self, what: str, hint: str) -> None:
        super().__init__(what, hint)
        self.what = what
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.what}\n  {self.hint}"


class UsageError(MechanisticError):
    """The request itself is wrong: a name, an option, an output that exists."""

    exit_code = 2


class StoreError(MechanisticError):
    """A store could not be read or written."""


class FormatError(StoreError):
    """The bytes are there but are not a run of this format."""


class CorruptError(StoreError):
    """A checksum, a size or a shard does not agree with the manifest."""


class IncompleteRunError(StoreError):
    """The run is unfinished and was not opened with allow_partial=True."""


class DiskFullError(StoreError):
    """The file system has no room; what was committed is intact."""


class CaptureError(MechanisticError):
    """The model ran, but what came out is not what was promised."""


class OutputExistsError(UsageError):
    """The output path holds something that this job must not touch."""


class MissingSiteError(UsageError, KeyError):
    """The run does not hold the requested site."""


class DatasetError(UsageError):
    """A dataset is unknown, incomplete or malformed."""


class ModelError(UsageError):
    """A model is unknown, incomplete or cannot be captured."""


class SpecificationError(UsageError):
    """A site, layer or token selection that does not parse or does not exist in this model."""


class DimensionError(UsageError, ValueError):
    """An array lacks a dimension, or has one that the analysis cannot use."""


class DataError(UsageError, ValueError):
    """The values cannot be analysed as asked: one class, NaN, a group of one member."""
