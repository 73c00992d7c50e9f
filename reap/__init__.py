"""REAP: how much every expert of a mixture-of-experts model contributes, and pruning by it.

    with torch.no_grad(), reap.observe(model) as stats:  # any forward loop works inside
        for batch in batches:
            model(**batch)
    scores = reap.saliency(stats, "reap")  # {layer: [E]}
    reap.prune(folder, reap.make_plan(stats, ratio=0.5), "pruned")

Names are imported on first use, so that `import reap` and `reap --help` do not pay for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from reap.errors import ReapError
from reap.versions import OWN as __version__

__all__ = [
    "CRITERIA",
    "Batch",
    "Coalitions",
    "Evaluation",
    "Group",
    "LayerErrors",
    "LayerInfo",
    "LayerStatistics",
    "Merge",
    "MergeReport",
    "ModelInfo",
    "Mtp",
    "PairErrors",
    "Plan",
    "PruneReport",
    "ReapError",
    "Stable",
    "Statistics",
    "Trace",
    "__version__",
    "batches",
    "calibrate",
    "calibrate_streamed",
    "compare",
    "decompose",
    "evaluate",
    "load_model",
    "load_mtp",
    "make_merge",
    "make_plan",
    "masked",
    "merge",
    "merged",
    "observe",
    "prune",
    "router_similarity",
    "saliency",
    "similarity",
    "standard_errors",
    "verify",
    "write_report",
]

if TYPE_CHECKING:
    from reap.checkpoint.pruning import PruneReport, prune
    from reap.checkpoint.verification import verify
    from reap.merging.choosing import make_merge
    from reap.merging.decomposition import LayerErrors, decompose
    from reap.merging.mergeplan import Group, Merge
    from reap.merging.pairerrors import PairErrors
    from reap.merging.rewriting import MergeReport, merge
    from reap.merging.similarity import router_similarity
    from reap.merging.tying import merged
    from reap.model.info import LayerInfo, ModelInfo
    from reap.model.load import load_model, load_mtp
    from reap.model.mtplayer import Mtp
    from reap.observation.patch import observe
    from reap.planning.cosines import similarity
    from reap.planning.criteria import CRITERIA, saliency, standard_errors
    from reap.planning.differences import compare
    from reap.planning.plan import Plan, make_plan
    from reap.report.page import write_report
    from reap.runs.calibration import calibrate
    from reap.runs.evaluation import Evaluation, evaluate
    from reap.runs.masking import masked
    from reap.runs.stability import Stable
    from reap.runs.waves import calibrate_streamed
    from reap.statistics.layerstats import LayerStatistics
    from reap.statistics.setcounts import Coalitions
    from reap.statistics.stats import Statistics
    from reap.statistics.trace import Trace
    from reap.text.batching import Batch, batches
else:  # a type checker that saw __getattr__ would believe any name
    _HOMES = {
        "checkpoint.pruning": ("PruneReport", "prune"),
        "checkpoint.verification": ("verify",),
        "merging.decomposition": ("LayerErrors", "decompose"),
        "merging.choosing": ("make_merge",),
        "merging.mergeplan": ("Group", "Merge"),
        "merging.pairerrors": ("PairErrors",),
        "merging.rewriting": ("MergeReport", "merge"),
        "merging.similarity": ("router_similarity",),
        "merging.tying": ("merged",),
        "model.info": ("LayerInfo", "ModelInfo"),
        "model.load": ("load_model", "load_mtp"),
        "model.mtplayer": ("Mtp",),
        "observation.patch": ("observe",),
        "planning.cosines": ("similarity",),
        "planning.criteria": ("CRITERIA", "saliency", "standard_errors"),
        "planning.differences": ("compare",),
        "planning.plan": ("Plan", "make_plan"),
        "report.page": ("write_report",),
        "runs.calibration": ("calibrate",),
        "runs.evaluation": ("Evaluation", "evaluate"),
        "runs.masking": ("masked",),
        "runs.stability": ("Stable",),
        "runs.waves": ("calibrate_streamed",),
        "statistics.layerstats": ("LayerStatistics",),
        "statistics.setcounts": ("Coalitions",),
        "statistics.stats": ("Statistics",),
        "statistics.trace": ("Trace",),
        "text.batching": ("Batch", "batches"),
    }
    _HOME = {name: module for module, names in _HOMES.items() for name in names}

    def __getattr__(name):
        if name not in _HOME:
            raise AttributeError(f"module 'reap' has no attribute {name!r}")
        return getattr(import_module(f"reap.{_HOME[name]}"), name)

    def __dir__():
        return sorted([*globals(), *__all__])
