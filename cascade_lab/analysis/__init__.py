"""Analysis of runs: metrics, errors, slices, calibration, coverage and comparison. Each name loads when first used.

Most functions take a `Run`; `confusion_matrix_frame` and `paired_metrics` take plain arrays, and further functions on
arrays are in the modules.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade_lab.lazy import lazy_names

if TYPE_CHECKING:
    from cascade_lab.analysis.calibration import calibration_metrics as calibration_metrics
    from cascade_lab.analysis.calibration import reliability as reliability
    from cascade_lab.analysis.calibrators import compare_calibrators as compare_calibrators
    from cascade_lab.analysis.classification import confusion_matrix_frame as confusion_matrix_frame
    from cascade_lab.analysis.comparison import compare as compare
    from cascade_lab.analysis.coverage import coverage_metrics as coverage_metrics
    from cascade_lab.analysis.coverage import risk_coverage as risk_coverage
    from cascade_lab.analysis.deferral import deferrals as deferrals
    from cascade_lab.analysis.errors import blame as blame
    from cascade_lab.analysis.errors import blame_counts as blame_counts
    from cascade_lab.analysis.errors import counterfactual_matrix as counterfactual_matrix
    from cascade_lab.analysis.errors import flow as flow
    from cascade_lab.analysis.errors import oracle_ladder as oracle_ladder
    from cascade_lab.analysis.examples import confident_errors as confident_errors
    from cascade_lab.analysis.examples import confused_texts as confused_texts
    from cascade_lab.analysis.examples import near_threshold as near_threshold
    from cascade_lab.analysis.examples import surest_first as surest_first
    from cascade_lab.analysis.label_audit import audit as audit
    from cascade_lab.analysis.many_runs import compare_many as compare_many
    from cascade_lab.analysis.metrics import confused_pairs as confused_pairs
    from cascade_lab.analysis.metrics import confusion as confusion
    from cascade_lab.analysis.metrics import label_metrics as label_metrics
    from cascade_lab.analysis.metrics import metric_intervals as metric_intervals
    from cascade_lab.analysis.monitoring import monitor as monitor
    from cascade_lab.analysis.paired import paired_metrics as paired_metrics
    from cascade_lab.analysis.slicing import find_slices as find_slices
    from cascade_lab.analysis.slicing import slices as slices
    from cascade_lab.analysis.summary import error_summary as error_summary
    from cascade_lab.analysis.summary import interval_notes as interval_notes
    from cascade_lab.analysis.summary import run_summary as run_summary
    from cascade_lab.analysis.temperature import fit_temperatures as fit_temperatures
    from cascade_lab.analysis.tuned_on import tuning_origin as tuning_origin
    from cascade_lab.analysis.verdict import run_verdict as run_verdict
    from cascade_lab.thresholds import tune as tune

# Type checkers read the imports above; a module's `__getattr__` would hide misspelled names from them.
if not TYPE_CHECKING:
    # No module here has the name of one of these functions: importing it would replace the function on the package.
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "audit": ".label_audit",
            "blame": ".errors",
            "blame_counts": ".errors",
            "calibration_metrics": ".calibration",
            "compare": ".comparison",
            "compare_calibrators": ".calibrators",
            "compare_many": ".many_runs",
            "confident_errors": ".examples",
            "confused_pairs": ".metrics",
            "confused_texts": ".examples",
            "confusion": ".metrics",
            "confusion_matrix_frame": ".classification",
            "counterfactual_matrix": ".errors",
            "coverage_metrics": ".coverage",
            "deferrals": ".deferral",
            "error_summary": ".summary",
            "find_slices": ".slicing",
            "fit_temperatures": ".temperature",
            "flow": ".errors",
            "interval_notes": ".summary",
            "label_metrics": ".metrics",
            "metric_intervals": ".metrics",
            "monitor": ".monitoring",
            "near_threshold": ".examples",
            "oracle_ladder": ".errors",
            "paired_metrics": ".paired",
            "reliability": ".calibration",
            "risk_coverage": ".coverage",
            "run_summary": ".summary",
            "run_verdict": ".verdict",
            "slices": ".slicing",
            "surest_first": ".examples",
            "tune": "..thresholds",
            "tuning_origin": ".tuned_on",
        },
    )
