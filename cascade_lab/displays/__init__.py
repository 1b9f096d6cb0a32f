"""Displays draw what is computed of runs, in the manner of scikit-learn; each is imported when it is first used."""

# ruff: noqa: F403
from __future__ import annotations

from typing import TYPE_CHECKING

from cascade_lab.lazy import lazy_names

if TYPE_CHECKING:
    from cascade_lab.displays.calibration import *
    from cascade_lab.displays.comparison import *
    from cascade_lab.displays.confusion import *
    from cascade_lab.displays.cost_front import *
    from cascade_lab.displays.coverage import *
    from cascade_lab.displays.latency import *
    from cascade_lab.displays.monitor import *
    from cascade_lab.displays.outcomes import *
    from cascade_lab.displays.reject_score import *
    from cascade_lab.displays.study import *
    from cascade_lab.displays.text import *
    from cascade_lab.displays.threshold_surface import *
    from cascade_lab.displays.thresholds import *

# The one list of displays: the class, and the module that defines it.
DISPLAYS = {
    "BatchLatencyDisplay": "latency",
    "CascadeCalibrationDisplay": "calibration",
    "CascadeConfusionDisplay": "confusion",
    "ComparisonDisplay": "comparison",
    "CostFrontDisplay": "cost_front",
    "CounterfactualMatrixDisplay": "outcomes",
    "HeldOutDisplay": "study",
    "LeaderboardDisplay": "comparison",
    "LengthLatencyDisplay": "latency",
    "MonitorDisplay": "monitor",
    "OracleLadderDisplay": "outcomes",
    "OutcomeFlowDisplay": "outcomes",
    "PredictedCostDisplay": "latency",
    "RejectScoreDisplay": "reject_score",
    "RiskCoverageDisplay": "coverage",
    "StageLatencyDisplay": "latency",
    "StudyDisplay": "study",
    "TextAttributionDisplay": "text",
    "ThresholdDisplay": "thresholds",
    "ThresholdSurfaceDisplay": "threshold_surface",
}

# Type checkers read the imports above; a module's `__getattr__` would hide misspelled names from them.
if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(__name__, {name: f".{module}" for name, module in DISPLAYS.items()})
