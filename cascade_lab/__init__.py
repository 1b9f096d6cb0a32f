"""cascade_lab: the lab bench for cascades of BERT classifiers.

`import cascade_lab` loads next to nothing; each name below brings in what it needs when it is first used, and
only `Cascade` and `Stage` bring in TensorFlow.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from cascade_lab.cascade import Cascade
    from cascade_lab.displays import (
        BatchLatencyDisplay,
        CascadeCalibrationDisplay,
        CascadeConfusionDisplay,
        ComparisonDisplay,
        GhostMatrixDisplay,
        LengthLatencyDisplay,
        OracleLadderDisplay,
        OutcomeFlowDisplay,
        PredictedCostDisplay,
        RiskCoverageDisplay,
        StageLatencyDisplay,
        TextAttributionDisplay,
        ThresholdDisplay,
        ThresholdSurfaceDisplay,
    )
    from cascade_lab.errors import CascadeLabError
    from cascade_lab.evalset import EvalSet
    from cascade_lab.explorer import explore
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec, StageSpec
    from cascade_lab.stage import Stage

__version__ = "0.1.0"

_HOMES = {
    "BatchLatencyDisplay": "displays",
    "Cascade": "cascade",
    "CascadeCalibrationDisplay": "displays",
    "CascadeConfusionDisplay": "displays",
    "CascadeLabError": "errors",
    "CascadeSpec": "spec",
    "ComparisonDisplay": "displays",
    "EvalSet": "evalset",
    "GhostMatrixDisplay": "displays",
    "LengthLatencyDisplay": "displays",
    "OracleLadderDisplay": "displays",
    "OutcomeFlowDisplay": "displays",
    "PredictedCostDisplay": "displays",
    "RiskCoverageDisplay": "displays",
    "Run": "run",
    "Stage": "stage",
    "StageLatencyDisplay": "displays",
    "StageSpec": "spec",
    "TextAttributionDisplay": "displays",
    "ThresholdDisplay": "displays",
    "ThresholdSurfaceDisplay": "displays",
    "explore": "explorer",
}

__all__ = [
    "BatchLatencyDisplay",
    "Cascade",
    "CascadeCalibrationDisplay",
    "CascadeConfusionDisplay",
    "CascadeLabError",
    "CascadeSpec",
    "ComparisonDisplay",
    "EvalSet",
    "GhostMatrixDisplay",
    "LengthLatencyDisplay",
    "OracleLadderDisplay",
    "OutcomeFlowDisplay",
    "PredictedCostDisplay",
    "RiskCoverageDisplay",
    "Run",
    "Stage",
    "StageLatencyDisplay",
    "StageSpec",
    "TextAttributionDisplay",
    "ThresholdDisplay",
    "ThresholdSurfaceDisplay",
    "explore",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'cascade_lab' has no attribute '{name}'")
    return getattr(import_module(f"cascade_lab.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
