"""The format of a run: its schema, its writer and its reader. Imports no torch and neither sibling."""

from .derived import write_derived
from .reader import derived_names, group, open_run, read_manifest, site, sites
from .schema import ArraySchema, GroupSchema
from .writer import RunWriter

__all__ = [
    "ArraySchema",
    "GroupSchema",
    "RunWriter",
    "derived_names",
    "group",
    "open_run",
    "read_manifest",
    "site",
    "sites",
    "write_derived",
]
