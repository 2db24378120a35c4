"""Prune a network before it is trained: a plugin for :mod:`torch.nn.utils.prune`."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

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
from force_plugin.masks.apply import apply_masks, get_masks
from force_plugin.masks.files import load_masks, load_metadata, save_masks
from force_plugin.masks.permanent import make_permanent
from force_plugin.masks.sanity import reinitialise, shuffle_masks
from force_plugin.masks.state_dicts import load_pruned_state_dict
from force_plugin.methods.base import SaliencyMethod
from force_plugin.methods.criteria import (
    FORCE,
    SNIP,
    GraSP,
    GraSPIt,
    IterSNIP,
    Magnitude,
    Random,
    SNIPIt,
    SynFlow,
)
from force_plugin.methods.registry import METHODS
from force_plugin.methods.steady_force import SteadyFORCE
from force_plugin.pruning.advice import Advice
from force_plugin.pruning.diagnosis import Diagnosis, StageDiagnosis, diagnose
from force_plugin.pruning.loop import force_prune, saliency
from force_plugin.report.sparsity import LayerReport, SparsityReport, sparsity_report

if TYPE_CHECKING:
    from force_plugin.sparse.model import densify, execution_report, sparsify
    from force_plugin.sparse.report import ExecutionReport, LayerExecution
    from force_plugin.structure.compact_report import (
        CompactReport,
        LayerSize,
        compact_report,
    )
    from force_plugin.structure.compaction import compact
    from force_plugin.structure.files import (
        load_compact,
        load_sparse,
        save_compact,
        save_sparse,
    )
    from force_plugin.structure.importance import SaliencyImportance
    from force_plugin.structure.snap import snap_prune

__version__ = "0.1.0"

__all__ = [
    "FORCE",
    "METHODS",
    "SNIP",
    "Advice",
    "BatchError",
    "CollapseError",
    "CompactReport",
    "CompactionError",
    "Diagnosis",
    "ExecutionReport",
    "FileFormatError",
    "GraSP",
    "GraSPIt",
    "IterSNIP",
    "LayerExecution",
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
    "SteadyFORCE",
    "SynFlow",
    "apply_masks",
    "compact",
    "compact_report",
    "densify",
    "diagnose",
    "execution_report",
    "force_prune",
    "get_masks",
    "load_compact",
    "load_masks",
    "load_metadata",
    "load_pruned_state_dict",
    "load_sparse",
    "make_permanent",
    "reinitialise",
    "saliency",
    "save_compact",
    "save_masks",
    "save_sparse",
    "shuffle_masks",
    "snap_prune",
    "sparsify",
    "sparsity_report",
]

# Imported at first use, because torch-pruning takes as long to import as torch, and
# llvmlite is an extra.
_LATER = {
    "CompactReport": "structure.compact_report",
    "ExecutionReport": "sparse.report",
    "LayerExecution": "sparse.report",
    "LayerSize": "structure.compact_report",
    "SaliencyImportance": "structure.importance",
    "compact": "structure.compaction",
    "compact_report": "structure.compact_report",
    "densify": "sparse.model",
    "execution_report": "sparse.model",
    "load_compact": "structure.files",
    "load_sparse": "structure.files",
    "save_compact": "structure.files",
    "save_sparse": "structure.files",
    "snap_prune": "structure.snap",
    "sparsify": "sparse.model",
}


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_LATER[name]}")
    return getattr(module, name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
