"""Chooses the two pictures that say most about a run, for the first screen of a report."""

from __future__ import annotations

from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import pandas as pd

from cascade_lab.analysis.errors import GOES_ON
from cascade_lab.analysis.latency import is_timed
from cascade_lab.analysis.outcomes import OUTCOMES, outcomes
from cascade_lab.analysis.verdict import RunVerdict
from cascade_lab.displays.confusion import CascadeConfusionDisplay
from cascade_lab.displays.latency import StageLatencyDisplay
from cascade_lab.displays.outcomes import OracleLadderDisplay, OutcomeFlowDisplay
from cascade_lab.exceptions import RunError
from cascade_lab.text import shorten

if TYPE_CHECKING:
    from cascade_lab.displays.drawing import Display
    from cascade_lab.run import Run

N_CONFUSED = 7  # labels of the confusion matrix: more do not fit beside the verdict


def overview(run: Run, verdict: RunVerdict) -> list[Display]:
    """Return at most two pictures: where the texts end, and what is most useful beside it.

    The second one is the confusion matrix of the last stage if that causes most errors, or if there is no other stage;
    else the oracle ladder. Without shadow scores, the first picture does not say which stage is at fault. Without
    labels, there is only the latency, if it was measured.

    Parameters
    ----------
    run : Run
    verdict : RunVerdict
        What `run_verdict` returns of the run.
    """
    if not verdict.n_labelled:
        return [StageLatencyDisplay.from_run(run)] if is_timed(run) else []
    try:
        displays: list[Display] = [OutcomeFlowDisplay.from_run(run)]
    except RunError:  # the later stages did not score a text that ended before them
        displays = [_flow_without_fault(run)]
    last, faults = run.spec.last.name, verdict.faults
    n_errors = verdict.n_labelled - int(verdict.outcomes[list(OUTCOMES[:2])].sum())
    if len(faults) > 1 and faults["n_errors"].idxmax() != last:
        displays.append(_narrow(OracleLadderDisplay.from_run(run)))
    elif n_errors:
        matrix = CascadeConfusionDisplay.from_run(run, stage=last)
        displays.append(matrix if len(matrix.display_labels) <= N_CONFUSED else matrix.most_confused(N_CONFUSED))
    return displays


def _narrow(ladder: OracleLadderDisplay) -> OracleLadderDisplay:
    """Draw the ladder in a figure that fits beside another picture."""
    size = (5.6, 1.2 + 0.42 * len(ladder.ladder))
    return ladder.plot(plt.subplots(figsize=size, layout="constrained")[1])


def _flow_without_fault(run: Run) -> OutcomeFlowDisplay:
    """Return the flow from the predictions alone: which stage is at fault needs shadow scores."""
    predictions = run.labelled.predictions
    kinds = outcomes(run.spec, predictions["label"], predictions["predicted"])
    counts = pd.crosstab(predictions["decided_by"], kinds)
    names, n_going, rows = [stage.name for stage in run.spec.stages], len(predictions), []
    counts = counts.reindex(index=names, columns=list(OUTCOMES), fill_value=0)
    for name in names:
        n_going -= int(counts.loc[name].sum())
        rows += [(name, GOES_ON, n_going)] if name != names[-1] else []
        rows += [(name, outcome, int(n)) for outcome, n in counts.loc[name].items() if n]
    table = pd.DataFrame(rows, columns=["stage", "outcome", "n_examples"])
    table.insert(2, "fault", None)
    table["fraction"] = table["n_examples"] / len(predictions)
    title = f"{shorten(run.spec.name, 40)}: what happens to {len(predictions):,} texts"
    return OutcomeFlowDisplay(table, names, title=title)
