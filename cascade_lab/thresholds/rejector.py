"""Fits a rejector on a run: a logistic regression over scores of the stages that tells what is out of scope."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from scipy.special import expit

from cascade_lab.analysis.duplicates import text_groups
from cascade_lab.evidence import SCORES, fit_arrays
from cascade_lab.exceptions import GoalError, RunError, did_you_mean
from cascade_lab.rejector import Rejector, array_names, feature_evidence, logit_evidence, score_of
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import choose

if TYPE_CHECKING:
    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec

N_FOLDS = 5


@dataclass(frozen=True, eq=False)
class FittedRejector:
    """A rejector, and the cascade that has it.

    Attributes
    ----------
    spec : CascadeSpec
        The run's cascade with the rejector, and with the thresholds of all stages that recall the most out-of-scope
        texts at the in-scope accuracy asked for. They are chosen on `run`.
    arrays : mapping of str to ndarray
        What scores of features need: `<stage>.<array>`.
    run : Run
        The run as that cascade would have made it if each text's confidence came from a rejector that was fitted
        without that text: thresholds may be chosen on it.
    """

    spec: CascadeSpec
    arrays: Mapping[str, np.ndarray]
    run: Run

    def write(self, path: str | Path) -> None:
        """Write the cascade and, beside it, the .npz file of its arrays, whose name contains its digest.

        Raises
        ------
        SpecError
            A file cannot be written.
        """
        from cascade_lab.atomic import write_file
        from cascade_lab.exceptions import SpecError

        spec, path = self.spec, Path(path)
        if self.arrays and spec.rejector is not None:
            content, digest = _npz(self.arrays)
            file = path.with_name(f"{path.stem}-{digest[:8]}.npz")
            write_file(file, lambda part: part.write_bytes(content), error=SpecError)
            rejector = replace(spec.rejector, arrays=file, arrays_sha256=digest)
            spec = with_rejector(spec, rejector)
        spec.write(path)


def evidence_names(spec: CascadeSpec, names: Sequence[str]) -> list[str]:
    """Return scores as `<stage>.<score>`: the name of a gate means its log-odds, that of a score the last stage's.

    Raises
    ------
    GoalError
        No score, or a name that is neither a gate nor a score.
    """
    gates = [stage.name for stage in spec.stages if stage.is_gate]
    known = [*gates, *SCORES, *(f"{stage.name}.{score}" for stage in spec.stages for score in SCORES)]
    result = []
    for name in names:
        if name not in known:
            raise GoalError(f"no evidence is named '{name}'{did_you_mean(name, known)}; give gates or scores")
        result.append(f"{name}.log_odds" if name in gates else name if "." in name else f"{spec.last.name}.{name}")
    if not result:
        raise GoalError("a rejector needs evidence; name a gate or a score, such as energy")
    return list(dict.fromkeys(result))


def fit_rejector(
    run: Run, evidence: Sequence[str], *, train_run: Run | None = None, at_least: float | None = None, seed: int = 0
) -> FittedRejector:
    """Fit a logistic regression that tells in-scope from out-of-scope texts, from scores of the stages.

    Scores are standardized, and scikit-learn's regression has its default penalty (C = 1). The weights of the result
    are those of the scores themselves.

    Parameters
    ----------
    run : Run
        A tuning set with texts in scope and out of scope, and shadow scores.
    evidence : sequence of str
        See `evidence_names`.
    train_run : Run, optional
        The training set with features; scores of features (`mahalanobis`, `relative_mahalanobis`, `knn`) need it.
    at_least : float, optional
        The in-scope accuracy for which thresholds are chosen; by default the run's own.
    seed : int
        Of the folds.

    Raises
    ------
    GoalError
        Unknown evidence.
    InfeasibleError
        No thresholds reach the in-scope accuracy.
    RunError
        Too few texts out of scope or in scope, missing shadow scores or features, or no label to reject with.
    """
    run = prepared_run(run)
    names = evidence_names(run.spec, evidence)
    arrays = distance_arrays(run, names, train_run)
    values = evidence_table(run, names, arrays)
    in_scope = is_in_scope(run)
    weights, bias = fit_logistic(values.to_numpy(), in_scope)
    confidence = out_of_fold_confidence(values.to_numpy(), in_scope, text_groups(run.examples), seed)
    origin = run.manifest["evalset"]
    fitted_on = {
        "run_id": run.manifest["run_id"],
        "n_in_scope": int(in_scope.sum()),
        "n_out_of_scope": int((~in_scope).sum()),
        **{key: origin[key] for key in ("path", "split", "sha256") if origin.get(key) is not None},
    }
    if train_run is not None and arrays:
        fitted_on["train_run_id"] = train_run.manifest["run_id"]
    rejector = Rejector(tuple(names), tuple(map(float, weights)), float(bias), fitted_on=fitted_on)
    if arrays:
        rejector = replace(rejector, arrays=Path("rejector.npz"), arrays_sha256=_npz(arrays)[1])
    spec = with_rejector(run.spec, rejector)
    kept = {name: values[name].to_numpy() for name in names}
    fitted = run.with_confidence(spec, confidence, evidence=kept)
    at_least = in_scope_accuracy(run) if at_least is None else at_least
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": at_least})
    fitted = fitted.with_thresholds(choose(fitted, goal).thresholds)
    return FittedRejector(fitted.spec, arrays, fitted)


def out_of_fold_run(run: Run, *, seed: int = 0) -> Run:
    """Return a run whose rejector was fitted on itself with each text's confidence from a fit without that text.

    The scores are those of the run's own rejector; the folds are those of `fit_rejector`.
    """
    rejector = run.spec.rejector
    if rejector is None:
        return run
    run = run.labelled
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    of_logits = [name for name in rejector.evidence if not score_of(name).of_features]
    values = logit_evidence(run.spec.stages, of_logits, logits) | dict(run.evidence(rejector))
    table = np.column_stack([values[name] for name in rejector.evidence])
    confidence = out_of_fold_confidence(table, is_in_scope(run), text_groups(run.examples), seed)
    return run.with_confidence(run.spec, confidence, evidence=run.evidence(rejector))


def fitted_on_itself(run: Run) -> bool:
    """Return whether the run's rejector was fitted on this run, or on a run of the same eval set."""
    rejector = run.spec.rejector
    if rejector is None:
        return False
    fitted, origin = rejector.fitted_on, run.manifest["evalset"]
    same_file = fitted.get("sha256") is not None and all(
        fitted.get(key) == origin.get(key) for key in ("sha256", "split")
    )
    return bool(same_file or fitted.get("run_id") == run.manifest["run_id"])


def with_rejector(spec: CascadeSpec, rejector: Rejector | None) -> CascadeSpec:
    """Return the cascade with another rejector of its last stage."""
    return replace(spec, stages=(*spec.stages[:-1], replace(spec.last, rejector=rejector)))


def in_scope_accuracy(run: Run) -> float:
    """Return the in-scope accuracy of a run, of its labelled texts."""
    predicted = run.predictions["predicted"].to_numpy(dtype=object)
    return float((predicted == run.examples["label"].to_numpy(dtype=object))[is_in_scope(run)].mean())


def prepared_run(run: Run) -> Run:
    """Return the labelled texts, with a label to reject with; raise RunError where a rejector cannot be fitted."""
    run = run.labelled
    spec = run.spec
    if any(stage.is_deferral for stage in spec.stages):
        raise RunError(
            f"{run.name}: its cascade has a deferral stage, whose answers no rejector of the last stage can reject; "
            "fit the rejector on a run of the other stages alone"
        )
    if spec.last.reject_label is None:
        if not spec.reject_labels:
            raise RunError(f"{run.name}: no stage has a label to reject with; give the last stage a reject_label")
        last = replace(spec.last, reject_label=spec.reject_labels[0])
        run = run.with_spec(replace(spec, stages=(*spec.stages[:-1], last)))
    for stage in run.spec.stages:
        missing = ~run.scores(stage.name).scored
        if missing.any():
            from cascade_lab.decisions import missing_scores_error

            raise missing_scores_error(run.name, stage.name, int(missing.sum()))
    in_scope, groups = is_in_scope(run), text_groups(run.examples)
    for kind, rows in (("in scope", in_scope), ("out of scope", ~in_scope)):
        n = len(np.unique(groups[rows]))  # equal texts are in one fold
        if n < 2 * N_FOLDS:
            raise RunError(
                f"{run.name}: has {n:,} different labelled texts {kind}; a rejector needs at least {2 * N_FOLDS}"
            )
    return run


def distance_arrays(run: Run, names: Sequence[str], train_run: Run | None) -> dict[str, np.ndarray]:
    """Return the arrays that scores of features need, from the features of the training texts in scope."""
    of_features = [name for name in names if score_of(name).of_features]
    if not of_features:
        return {}
    if train_run is None:
        raise RunError(
            f"{of_features[0]} needs the features of the training texts; give a run of the training set, made with "
            "`cascade-lab run --keep-features`, as --train-run"
        )
    labelled = train_run.labelled
    rows = np.flatnonzero(pd.Index(labelled.examples["label"]).isin(run.spec.in_scope_labels))
    y_true = labelled.examples["label"].to_numpy(dtype=object)[rows]
    arrays: dict[str, np.ndarray] = {}
    for stage in dict.fromkeys(name.rpartition(".")[0] for name in of_features):
        features = labelled.features(stage)[rows]
        known = ~np.isnan(features[:, 0])
        if known.sum() < 2:
            raise RunError(f"{train_run.name}: has features of fewer than 2 texts in scope at '{stage}'; run it again")
        wanted = {a.rpartition(".")[2] for name in of_features for a in array_names(name) if a.startswith(f"{stage}.")}
        fitted = fit_arrays(features[known], y_true[known], wanted)
        arrays |= {f"{stage}.{name}": values for name, values in fitted.items()}
    return arrays


def evidence_table(run: Run, names: Sequence[str], arrays: Mapping[str, np.ndarray]) -> pd.DataFrame:
    """Return one column per score, one row per text."""
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    of_features = [name for name in names if score_of(name).of_features]
    features = {stage: run.features(stage) for stage in {name.rpartition(".")[0] for name in of_features}}
    of_logits = [name for name in names if not score_of(name).of_features]
    values = logit_evidence(run.spec.stages, of_logits, logits) | feature_evidence(of_features, features, arrays)
    return pd.DataFrame({name: values[name] for name in names})


def fit_logistic(values: np.ndarray, in_scope: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the weights and the bias of a logistic regression, for the values as they are."""
    from sklearn.linear_model import LogisticRegression

    mean, scale = values.mean(axis=0), values.std(axis=0)
    scale[scale == 0] = 1.0
    model = LogisticRegression(max_iter=1000).fit((values - mean) / scale, in_scope)
    weights = model.coef_[0] / scale
    return weights, float(model.intercept_[0] - weights @ mean)


def out_of_fold_confidence(values: np.ndarray, in_scope: np.ndarray, groups: np.ndarray, seed: int) -> np.ndarray:
    """Return each text's confidence from a regression that was fitted on the other folds: shape (n,)."""
    confidence = np.empty(len(values))
    for train, test in stratified_folds(in_scope, groups, seed=seed):
        weights, bias = fit_logistic(values[train], in_scope[train])
        confidence[test] = expit(values[test] @ weights + bias)
    return confidence


def stratified_folds(y: np.ndarray, groups: np.ndarray, *, seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the rows of training and of test of each fold: all values of `y` in each, equal `groups` in one."""
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    options: dict[str, Any] = {"n_splits": N_FOLDS, "shuffle": True, "random_state": seed}
    if len(np.unique(groups)) < len(groups):
        yield from StratifiedGroupKFold(**options).split(y, y, groups)
    else:
        yield from StratifiedKFold(**options).split(y, y)


def is_in_scope(run: Run) -> np.ndarray:
    return np.asarray(pd.Index(run.examples["label"]).isin(run.spec.in_scope_labels))


def is_correct(run: Run) -> np.ndarray:
    """Return whether the last stage's most probable label is the true one: bool, shape (n,)."""
    label_above = run.decision(run.spec.last.name).label_above
    return np.asarray(label_above == run.examples["label"].to_numpy(dtype=object))


def _npz(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, str]:
    """Return the content of an .npz file and its SHA-256; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays), allow_pickle=False)
    return buffer.getvalue(), sha256(buffer.getvalue()).hexdigest()
