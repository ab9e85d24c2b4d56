"""The libraries that a model needs, which an install for analysis alone does not have."""

from __future__ import annotations

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
