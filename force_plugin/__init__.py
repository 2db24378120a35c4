"""Prune a network before it is trained: a plugin for :mod:`torch.nn.utils.prune`."""

from force_plugin.masks import apply_masks, get_masks, load_masks, save_masks
from force_plugin.methods import (
    FORCE,
    METHODS,
    SNIP,
    GraSP,
    GraSPIt,
    IterSNIP,
    Magnitude,
    Random,
    SaliencyMethod,
    SNIPIt,
    SynFlow,
)
from force_plugin.pruning import force_prune, saliency
from force_plugin.report import LayerReport, SparsityReport, sparsity_report

__version__ = "0.1.0"

__all__ = [
    "FORCE",
    "METHODS",
    "SNIP",
    "GraSP",
    "GraSPIt",
    "IterSNIP",
    "LayerReport",
    "Magnitude",
    "Random",
    "SNIPIt",
    "SaliencyMethod",
    "SparsityReport",
    "SynFlow",
    "apply_masks",
    "force_prune",
    "get_masks",
    "load_masks",
    "saliency",
    "save_masks",
    "sparsity_report",
]
