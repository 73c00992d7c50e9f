"""REAP: how much every expert of a mixture-of-experts model contributes, and pruning by it.

    with torch.no_grad(), reap.observe(model) as stats:  # any forward loop works inside
        for batch in batches:
            model(**batch)
    scores = reap.saliency(stats, "reap")  # {layer: [E]}
    reap.prune(folder, reap.make_plan(stats, ratio=0.5), "pruned")

Names are imported on first use, so that `import reap` and `reap --help` do not pay for torch.
"""

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

from reap.errors import ReapError

if TYPE_CHECKING:
    from reap.calibrate import calibrate
    from reap.checkpoint import prune
    from reap.data import batches
    from reap.evaluate import evaluate
    from reap.observe import observe
    from reap.plan import Plan, make_plan
    from reap.saliency import CRITERIA, saliency, standard_errors
    from reap.stats import LayerStatistics, Statistics

__version__ = "0.1.0"

_HOME = {
    "CRITERIA": "saliency",
    "LayerStatistics": "stats",
    "Plan": "plan",
    "Statistics": "stats",
    "batches": "data",
    "calibrate": "calibrate",
    "evaluate": "evaluate",
    "make_plan": "plan",
    "observe": "observe",
    "prune": "checkpoint",
    "saliency": "saliency",
    "standard_errors": "saliency",
}

__all__ = [
    "CRITERIA",
    "LayerStatistics",
    "Plan",
    "ReapError",
    "Statistics",
    "batches",
    "calibrate",
    "evaluate",
    "make_plan",
    "observe",
    "prune",
    "saliency",
    "standard_errors",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'reap' has no attribute {name!r}")
    return getattr(import_module(f"reap.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])


class _Package(ModuleType):
    """Keeps `reap.saliency` the function: importing a submodule would bind the module over it."""

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and name in _HOME:
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
