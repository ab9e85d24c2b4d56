"""From a run to numbers and pictures: no model, no torch, no more memory than a few blocks."""

# The functions are imported here, not on first use: several share the name of their module, and an attribute
# that is looked up late would be the module once anything has imported that.
from .attention_concentration import attention_concentration
from .attention_entropy import attention_entropy
from .attention_mass import attention_mass
from .attention_pattern import attention_pattern
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .blocks import align_blocks, map_blocks
from .linear_probe import linear_probe
from .plot_attention_heatmap import plot_attention_heatmap
from .plot_attention_on_image import plot_attention_on_image
from .plot_layers import plot_layers
from .plot_probe import plot_probe
from .sample_image import sample_image
from .splits import sample_means, summarize, with_samples
from .token_selection import select_layers, select_tokens

__all__ = [
    "AttentionRows",
    "RowStatistic",
    "align_blocks",
    "attention_concentration",
    "attention_entropy",
    "attention_mass",
    "attention_pattern",
    "attention_statistics",
    "linear_probe",
    "map_blocks",
    "plot_attention_heatmap",
    "plot_attention_on_image",
    "plot_layers",
    "plot_probe",
    "sample_image",
    "sample_means",
    "select_layers",
    "select_tokens",
    "summarize",
    "with_samples",
]
