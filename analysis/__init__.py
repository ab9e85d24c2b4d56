"""From a run to numbers and pictures: no model, no torch, no more memory than a few blocks."""

# The functions are imported here, not on first use: several share the name of their module, and an attribute
# that is looked up late would be the module once anything has imported that.
from .ablation import ablate
from .accuracy import accuracy
from .apply_probe import apply_probe
from .attention_boxes import attention_boxes
from .attention_concentration import attention_concentration
from .attention_distance import attention_distance
from .attention_entropy import attention_entropy
from .attention_flow import attention_flow
from .attention_knockout import adapt_scale, attention_knockout, scale_attention
from .attention_mass import attention_mass
from .attention_pattern import attention_pattern
from .attention_relevancy import attention_relevancy
from .attention_rollout import attention_rollout, rollout_row
from .attention_rows import AttentionRows, RowStatistic, attention_statistics
from .attention_sparsity import attention_sparsity
from .attribution_patching import attribution_patching
from .attribution_sparsity import attribution_sparsity
from .blocks import align_blocks, map_blocks
from .causal_effect_strength import causal_effect_strength
from .causal_tracing import causal_tracing
from .cka import linear_cka
from .compare_rdms import compare_rdms
from .compare_runs import compare_runs
from .cross_attention import cross_attention
from .directions import class_directions, direction_cosines, project_rows
from .gradcam import gradcam
from .head_importance import head_importance
from .hub_tokens import hub_tokens
from .integrated_gradients import integrated_gradients
from .linear_probe import linear_probe
from .logit_attribution import logit_attribution
from .logit_lens import logit_lens
from .model_rdms import model_dissimilarity
from .noise_ceiling import noise_ceiling
from .patch_activations import patch_activations
from .patching import patch
from .path_graph import path_graph, plot_path_graph
from .path_patching import path_patching
from .plot_attention_heatmap import plot_attention_heatmap
from .plot_attention_on_image import plot_attention_on_image
from .plot_attribution_on_image import plot_attribution_on_image
from .plot_causal_tracing import plot_causal_tracing
from .plot_cross_attention_attribution import plot_cross_attention_attribution
from .plot_head_map import plot_head_map
from .plot_layers import plot_layers
from .plot_logit_lens import plot_logit_lens
from .plot_mds import plot_mds
from .plot_multi_head_attention import plot_multi_head_attention
from .plot_patching import plot_patching
from .plot_pixel_attribution import plot_pixel_attribution
from .plot_probe import plot_probe
from .plot_rdm import plot_rdm
from .principal_components import principal_components
from .question_words import question_words
from .rdm import representational_dissimilarity
from .rdm_store import open_dissimilarity
from .sample_image import sample_image
from .sample_means import sample_means
from .splits import summarize, with_samples
from .steering import steer
from .swapped_pairs import swapped_pairs
from .text_hops import text_hops
from .token_selection import select_layers, select_tokens
from .two_hop import two_hop

__all__ = [
    "AttentionRows",
    "RowStatistic",
    "ablate",
    "accuracy",
    "adapt_scale",
    "align_blocks",
    "apply_probe",
    "attention_boxes",
    "attention_concentration",
    "attention_distance",
    "attention_entropy",
    "attention_flow",
    "attention_knockout",
    "attention_mass",
    "attention_pattern",
    "attention_relevancy",
    "attention_rollout",
    "attention_sparsity",
    "attention_statistics",
    "attribution_patching",
    "attribution_sparsity",
    "causal_effect_strength",
    "causal_tracing",
    "class_directions",
    "compare_rdms",
    "compare_runs",
    "cross_attention",
    "direction_cosines",
    "gradcam",
    "head_importance",
    "hub_tokens",
    "integrated_gradients",
    "linear_cka",
    "linear_probe",
    "logit_attribution",
    "logit_lens",
    "map_blocks",
    "model_dissimilarity",
    "noise_ceiling",
    "open_dissimilarity",
    "patch",
    "patch_activations",
    "path_graph",
    "path_patching",
    "plot_attention_heatmap",
    "plot_attention_on_image",
    "plot_attribution_on_image",
    "plot_causal_tracing",
    "plot_cross_attention_attribution",
    "plot_head_map",
    "plot_layers",
    "plot_logit_lens",
    "plot_mds",
    "plot_multi_head_attention",
    "plot_patching",
    "plot_path_graph",
    "plot_pixel_attribution",
    "plot_probe",
    "plot_rdm",
    "principal_components",
    "project_rows",
    "question_words",
    "representational_dissimilarity",
    "rollout_row",
    "sample_image",
    "sample_means",
    "scale_attention",
    "select_layers",
    "select_tokens",
    "steer",
    "summarize",
    "swapped_pairs",
    "text_hops",
    "two_hop",
    "with_samples",
]
