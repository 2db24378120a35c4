"""Prune a network before it is trained: a plugin for :mod:`torch.nn.utils.prune`."""

from force_plugin.compact_files import load_compact, save_compact
from force_plugin.compaction import compact
from force_plugin.diagnosis import Diagnosis, StageDiagnosis, diagnose
from force_plugin.errors import (
    BatchError,
    CollapseError,
    CompactionError,
    FileFormatError,
    MaskMismatchError,
    MethodError,
    NoGradientError,
    NotFiniteError,
    NothingToPruneError,
    NotPrunedError,
    PruningError,
    RankError,
    Remark,
)
from force_plugin.masks import (
    apply_masks,
    get_masks,
    load_masks,
    load_metadata,
    save_masks,
)
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
from force_plugin.permanent import make_permanent
from force_plugin.pruning import force_prune, saliency
from force_plugin.report import LayerReport, SparsityReport, sparsity_report
from force_plugin.sanity import reinitialise, shuffle_masks
from force_plugin.size import CompactReport, LayerSize, compact_report
from force_plugin.state_dicts import load_pruned_state_dict
from force_plugin.structured import SaliencyImportance, snap_prune

__version__ = "0.1.0"

__all__ = [
    "FORCE",
    "METHODS",
    "SNIP",
    "BatchError",
    "CollapseError",
    "CompactReport",
    "CompactionError",
    "Diagnosis",
    "FileFormatError",
    "GraSP",
    "GraSPIt",
    "IterSNIP",
    "LayerReport",
    "LayerSize",
    "Magnitude",
    "MaskMismatchError",
    "MethodError",
    "NoGradientError",
    "NotFiniteError",
    "NotPrunedError",
    "NothingToPruneError",
    "PruningError",
    "Random",
    "RankError",
    "Remark",
    "SNIPIt",
    "SaliencyImportance",
    "SaliencyMethod",
    "SparsityReport",
    "StageDiagnosis",
    "SynFlow",
    "apply_masks",
    "compact",
    "compact_report",
    "diagnose",
    "force_prune",
    "get_masks",
    "load_compact",
    "load_masks",
    "load_metadata",
    "load_pruned_state_dict",
    "make_permanent",
    "reinitialise",
    "saliency",
    "save_compact",
    "save_masks",
    "shuffle_masks",
    "snap_prune",
    "sparsity_report",
]
