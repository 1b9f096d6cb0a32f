"""Figures of a run, in the manner of scikit-learn's displays; the only room that imports matplotlib."""

from cascade_lab.displays.calibration import CascadeCalibrationDisplay
from cascade_lab.displays.comparison import ComparisonDisplay
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.displays.coverage import RiskCoverageDisplay
from cascade_lab.displays.latency import (
    BatchLatencyDisplay,
    LengthLatencyDisplay,
    PredictedCostDisplay,
    StageLatencyDisplay,
)
from cascade_lab.displays.outcomes import GhostMatrixDisplay, OracleLadderDisplay, OutcomeFlowDisplay
from cascade_lab.displays.text import TextAttributionDisplay
from cascade_lab.displays.thresholds import ThresholdDisplay, ThresholdSurfaceDisplay

__all__ = [
    "BatchLatencyDisplay",
    "CascadeCalibrationDisplay",
    "CascadeConfusionDisplay",
    "ComparisonDisplay",
    "GhostMatrixDisplay",
    "LengthLatencyDisplay",
    "OracleLadderDisplay",
    "OutcomeFlowDisplay",
    "PredictedCostDisplay",
    "RiskCoverageDisplay",
    "StageLatencyDisplay",
    "TextAttributionDisplay",
    "ThresholdDisplay",
    "ThresholdSurfaceDisplay",
]
