"""The libraries that a model needs, which an install for analysis alone does not have."""

from __future__ import annotations

import sys
from typing import Any

from mechanistic.store.errors import UsageError


def require_model_libraries() -> None:
    """UsageError, with what to install, where torch or transformers is missing."""
    try:
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ImportError as cause:
        raise UsageError(
            f"This needs torch and transformers; {cause.name or 'one of them'} is not installed.",
            'Install them: pip install "mechanistic[capture]"',
        ) from cause


def require_libraries(*, quiet: bool) -> None:
    """The same for a command; `quiet`, or with output to a file, models then load without progress bars."""
    require_model_libraries()
    if quiet or not sys.stderr.isatty():
        import transformers

        library: Any = transformers
        library.utils.logging.disable_progress_bar()
