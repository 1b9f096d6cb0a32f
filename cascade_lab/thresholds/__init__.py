"""Chooses the thresholds of a cascade on the kept logits of a run.

`tune(run, goal)` does all of it. Each name below loads its own module when it is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cascade_lab.lazy import lazy_names

if TYPE_CHECKING:
    from cascade_lab.analysis.costs import CostMatrix as CostMatrix
    from cascade_lab.analysis.costs import outcome_cost_matrix as outcome_cost_matrix
    from cascade_lab.thresholds.deferral_rules import compare_deferral_rules as compare_deferral_rules
    from cascade_lab.thresholds.deferral_rules import deferral_summary as deferral_summary
    from cascade_lab.thresholds.grid import ThresholdGrid as ThresholdGrid
    from cascade_lab.thresholds.grid import swept_stages as swept_stages
    from cascade_lab.thresholds.guarantee import Guarantee as Guarantee
    from cascade_lab.thresholds.guarantee import choose_with_guarantee as choose_with_guarantee
    from cascade_lab.thresholds.objective import Goal as Goal
    from cascade_lab.thresholds.pareto import cost_front as cost_front
    from cascade_lab.thresholds.pareto import cost_summary as cost_summary
    from cascade_lab.thresholds.per_label import PerLabelThresholds as PerLabelThresholds
    from cascade_lab.thresholds.per_label import per_label_thresholds as per_label_thresholds
    from cascade_lab.thresholds.proposal import Proposal as Proposal
    from cascade_lab.thresholds.proposal import propose_thresholds as propose_thresholds
    from cascade_lab.thresholds.rejector import FittedRejector as FittedRejector
    from cascade_lab.thresholds.rejector import fit_rejector as fit_rejector
    from cascade_lab.thresholds.rejector_comparison import RejectorComparison as RejectorComparison
    from cascade_lab.thresholds.rejector_comparison import compare_rejectors as compare_rejectors
    from cascade_lab.thresholds.resampling import ThresholdBootstrap as ThresholdBootstrap
    from cascade_lab.thresholds.resampling import bootstrap_thresholds as bootstrap_thresholds
    from cascade_lab.thresholds.resampling import cross_validate as cross_validate
    from cascade_lab.thresholds.search import Choice as Choice
    from cascade_lab.thresholds.search import choose as choose
    from cascade_lab.thresholds.surfaces import Surface as Surface
    from cascade_lab.thresholds.surfaces import surface as surface
    from cascade_lab.thresholds.surfaces import sweep as sweep
    from cascade_lab.thresholds.tuning import Tuning as Tuning
    from cascade_lab.thresholds.tuning import tune as tune
    from cascade_lab.thresholds.validation import choose_by_prevalence as choose_by_prevalence
    from cascade_lab.thresholds.validation import compare_without_gate as compare_without_gate
    from cascade_lab.thresholds.validation import held_out as held_out
    from cascade_lab.thresholds.validation import metrics_at as metrics_at

# Type checkers read the imports above; a module's `__getattr__` would hide misspelled names from them.
if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "Choice": ".search",
            "CostMatrix": "..analysis.costs",
            "FittedRejector": ".rejector",
            "Goal": ".objective",
            "Guarantee": ".guarantee",
            "PerLabelThresholds": ".per_label",
            "Proposal": ".proposal",
            "RejectorComparison": ".rejector_comparison",
            "Surface": ".surfaces",
            "ThresholdBootstrap": ".resampling",
            "ThresholdGrid": ".grid",
            "Tuning": ".tuning",
            "bootstrap_thresholds": ".resampling",
            "choose": ".search",
            "choose_by_prevalence": ".validation",
            "choose_with_guarantee": ".guarantee",
            "compare_deferral_rules": ".deferral_rules",
            "compare_without_gate": ".validation",
            "compare_rejectors": ".rejector_comparison",
            "cost_front": ".pareto",
            "cost_summary": ".pareto",
            "cross_validate": ".resampling",
            "deferral_summary": ".deferral_rules",
            "fit_rejector": ".rejector",
            "held_out": ".validation",
            "metrics_at": ".validation",
            "outcome_cost_matrix": "..analysis.costs",
            "per_label_thresholds": ".per_label",
            "propose_thresholds": ".proposal",
            "surface": ".surfaces",
            "sweep": ".surfaces",
            "swept_stages": ".grid",
            "tune": ".tuning",
        },
    )
