"""`cascade-lab fit-rejector` compares rejectors on a run, or fits one and writes the cascade that has it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cascade_lab.cli.options import NEW_CASCADE, OVERWRITE, RUN
from cascade_lab.cli.printing import interval, line, next_step, number, print_dropped_bounds, show, table
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.thresholds import FittedRejector, RejectorComparison


def fit_rejector(
    run: RUN,
    output: NEW_CASCADE,
    evidence: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME",
            help="Gates and scores, such as gate,energy [default: compare them all, and take the proposed ones].",
        ),
    ] = None,
    train_run: Annotated[
        Path | None,
        typer.Option(help="A run of the training set, made with --keep-features: the distances need it."),
    ] = None,
    in_scope_accuracy: Annotated[
        float | None,
        typer.Option(min=0, max=1, help="The in-scope accuracy to keep [default: that of the run]."),
    ] = None,
    overwrite: OVERWRITE = False,
) -> None:
    """Fit a rejector: a logistic regression over scores of all stages that tells what is out of scope.

    RUN is a run of a tuning set, not of the test set, with shadow scores. The rejector's output replaces the highest
    probability as the last stage's confidence. The thresholds of the gates and of the last stage are chosen again; a
    deferral stage keeps its threshold, and what it answers counts as accepted.

    Scores of the last stage: max_probability, max_logit, energy, margin, entropy, gen, log_odds; with --train-run also
    mahalanobis, relative_mahalanobis and knn. The name of a gate means its log-odds.

    Example: cascade-lab fit-rejector runs/val --evidence gate,energy --output rejector.toml
    """
    from cascade_lab.atomic import locked_file
    from cascade_lab.run import Run
    from cascade_lab.thresholds import compare_rejectors
    from cascade_lab.thresholds import fit_rejector as fit

    with locked_file(output, overwrite=overwrite, what="cascade with a rejector"):
        tuned_run, training = Run.read(run), None if train_run is None else Run.read(train_run)
        comparison = None
        if evidence is None:
            comparison = compare_rejectors(tuned_run, train_run=training, at_least=in_scope_accuracy)
            evidence = comparison.proposed.replace(" + ", ",")
        names = [name.strip() for name in evidence.split(",") if name.strip()]
        fitted = fit(tuned_run, names, train_run=training, at_least=in_scope_accuracy)
        fitted.write(output)
    if comparison is not None:
        _print_comparison(comparison)
    _print_fitted(fitted)
    has_dropped = print_dropped_bounds(tuned_run.spec, fitted.spec, output)
    line(f"cascade: {output}")
    if not has_dropped:
        next_step("run", output, "EVALSET", "--output", "RUN")


def _print_comparison(comparison: RejectorComparison) -> None:
    rules = table("rule", "recall", "95% of the difference", "AUROC", "AUPR", "FPR at 95%", fold_first=True)
    for name, row in comparison.table.iterrows():
        difference = interval(row["recall_low"], row["recall_high"], "+.3f") if row["n_scores"] else ""
        metrics = [number(row[key], ".3f") for key in ("auroc", "aupr", "fpr95")]
        rules.add_row(str(name), number(row["recall"], ".3f"), difference, *metrics)
    show(rules)
    line(f"recall: of out-of-scope texts, at an in-scope accuracy of {comparison.at_least:.4g}; by cross-validation")
    line("95% of the difference: of the recall, from the rule that the cascade has now")
    line(f"proposed: {comparison.proposed}, the rule with the fewest scores within one standard error of the best")


def _print_fitted(fitted: FittedRejector) -> None:
    rejector = fitted.spec.rejector
    assert rejector is not None, "fit_rejector gives the cascade a rejector"
    weights = table("evidence", "weight")
    for name, weight in zip(rejector.evidence, rejector.weights, strict=True):
        weights.add_row(name, f"{weight:.4g}")
    thresholds = table("stage", "threshold", "reached")
    for name, value in fitted.spec.thresholds.items():
        reached = fitted.run.metrics["stages"][name]["reach"]
        thresholds.add_row(name, exact(value), number(reached, ".1%"))
    metrics = fitted.run.metrics["end_to_end"]
    whole = table("by cross-validation", "accuracy", "in scope", "reject recall")
    keys = ("accuracy", "in_scope_accuracy", "reject_recall")
    whole.add_row(f"{fitted.run.metrics['n_examples']:,} texts", *(number(metrics[key]) for key in keys))
    show(weights, thresholds, whole)
