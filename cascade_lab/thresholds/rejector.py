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

from cascade_lab.analysis.duplicates import n_different
from cascade_lab.atomic import write_file
from cascade_lab.decisions import RoutingResult, missing_scores_error, route
from cascade_lab.evidence import SCORES, fit_arrays
from cascade_lab.exceptions import GoalError, RunError, SpecError, did_you_mean
from cascade_lab.locks import remove
from cascade_lab.mixed_precision import without_stale_bounds
from cascade_lab.rejector import Rejector, array_names, feature_evidence, logit_evidence, score_of
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import Choice, choose

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
        The run's cascade with the rejector, and with the thresholds that recall the most out-of-scope texts at the
        in-scope accuracy asked for. They are chosen on `run`. Deferral stages keep theirs.
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
        write_with_arrays(self.spec, self.arrays, path)


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

    It is fitted on all texts, whether or not they reach the last stage at the run's thresholds: the rule then does not
    depend on them, and no text is lost. A regression on the texts alone that a deferral stage passes on is no better
    (on CLINC150, with a small stage that answers 83% of the texts, both recall 75% at the same accuracy).

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
    arrays = shared_arrays(run, run.spec.last.name, names, train_run)
    values = evidence_table(run, names, arrays)
    in_scope = is_in_scope(run)
    weights, bias = fit_logistic(values.to_numpy(), in_scope)
    confidence = out_of_fold_confidence(values.to_numpy(), in_scope, run.text_groups, seed)
    counts = {"n_in_scope": int(in_scope.sum()), "n_out_of_scope": int((~in_scope).sum())}
    fitted_on = origin_of(run, train_run if arrays else None) | counts
    rejector = Rejector(tuple(names), tuple(map(float, weights)), float(bias), fitted_on=fitted_on)
    spec = with_rule(run.spec, run.spec.last.name, rejector, arrays)
    fitted = run.with_confidence(spec, confidence, evidence=all_evidence(run, spec.last.name, values))
    at_least = in_scope_accuracy(run) if at_least is None else at_least
    fitted = fitted.with_thresholds(choose_rejecting(fitted, at_least).thresholds)
    return FittedRejector(fitted.spec, arrays, fitted)


def choose_rejecting(run: Run, at_least: float) -> Choice:
    """Return the thresholds of all stages that reject which recall the most at an in-scope accuracy of `at_least`.

    Those of deferral stages stay as they are: they say how much time may be spent, and a stage that answers nothing
    would recall the most.
    """
    goal = Goal(maximize="reject_recall", at_least={"in_scope_accuracy": at_least})
    return choose(run, goal, [stage.name for stage in run.spec.stages if not stage.is_deferral])


def with_rule(spec: CascadeSpec, stage: str, rejector: Rejector, arrays: Mapping[str, np.ndarray]) -> CascadeSpec:
    """Return the cascade with another rejector of a stage. All rejectors share one file of arrays, if they need any.

    `write_with_arrays` writes the file, and gives it its name. A stage whose confidence changes has no
    `precision_bounds` any longer.
    """
    changed = replace(spec, stages=tuple(replace(s, rejector=rejector) if s.name == stage else s for s in spec.stages))
    changed = _with_file(changed, Path("rejector.npz"), _npz(arrays)[1]) if arrays else changed
    return without_stale_bounds(spec, changed)


def _with_file(spec: CascadeSpec, file: Path, digest: str) -> CascadeSpec:
    stages = [
        replace(stage, rejector=replace(stage.rejector, arrays=file, arrays_sha256=digest))
        if stage.rejector is not None and stage.rejector.feature_evidence
        else stage
        for stage in spec.stages
    ]
    return replace(spec, stages=tuple(stages))


def write_with_arrays(spec: CascadeSpec, arrays: Mapping[str, np.ndarray], path: str | Path) -> None:
    """Write a cascade and, beside it, the .npz file of its rejectors' arrays, whose name contains its digest."""
    path = Path(path)
    if arrays:
        content, digest = _npz(arrays)
        file = path.with_name(f"{path.stem}-{digest[:8]}.npz")
        is_new = not file.exists()
        try:
            write_file(file, lambda part: part.write_bytes(content), error=SpecError)
            _with_file(spec, file, digest).write(path)
        except BaseException:
            if is_new:
                remove(file)
            raise
    else:
        spec.write(path)


def origin_of(run: Run, train_run: Run | None) -> dict[str, Any]:
    """Return what a rule is fitted on, for `Rejector.fitted_on`."""
    origin = run.manifest["evalset"]
    return {
        "run_id": run.manifest["run_id"],
        **{key: origin[key] for key in ("path", "split", "sha256") if origin.get(key) is not None},
        **({} if train_run is None else {"train_run_id": train_run.manifest["run_id"]}),
    }


def in_scope_accuracy(run: Run) -> float:
    """Return the in-scope accuracy of a run, of its labelled texts."""
    predicted = run.predictions["predicted"].to_numpy(dtype=object)
    return float((predicted == run.examples["label"].to_numpy(dtype=object))[is_in_scope(run)].mean())


def prepared_run(run: Run) -> Run:
    """Return the labelled texts, with a label to reject with; raise RunError where a rejector cannot be fitted."""
    run = run.labelled
    spec = run.spec
    if spec.last.reject_label is None:
        if not spec.reject_labels:
            raise RunError(f"{run.name}: no stage has a label to reject with; give the last stage a reject_label")
        last = replace(spec.last, reject_label=spec.reject_labels[0])
        run = run.with_spec(replace(spec, stages=(*spec.stages[:-1], last)))
    for stage in run.spec.stages:
        missing = ~run.scores(stage.name).scored
        if missing.any():
            raise missing_scores_error(run.name, stage.name, int(missing.sum()))
    in_scope, groups = is_in_scope(run), run.text_groups
    for kind, rows in (("in scope", in_scope), ("out of scope", ~in_scope)):
        n = n_different(groups[rows])  # equal texts are in one fold
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


def shared_arrays(run: Run, stage: str, names: Sequence[str], train_run: Run | None) -> dict[str, np.ndarray]:
    """Return the arrays that a new rule of `stage` and the rejectors of all other stages need; none if it needs none.

    Raises
    ------
    RunError
        The training texts are not those that another stage's rejector was fitted with.
    """
    if not any(score_of(name).of_features for name in names):
        return {}  # the other stages' rejectors keep their file
    needed = _of_other_stages(run, stage)
    arrays = distance_arrays(run, list(dict.fromkeys([*names, *needed])), train_run)
    if needed:
        kept, again = run.evidence(run.spec), evidence_table(run, needed, arrays)
        for name in needed:
            if not np.allclose(kept[name], again[name], rtol=1e-3, atol=1e-3, equal_nan=True):
                raise RunError(
                    f"{run.name}: {name} of another stage's rejector is of other training texts; give the run that it "
                    "was fitted with as --train-run"
                )
    return arrays


def all_evidence(run: Run, stage: str, values: pd.DataFrame) -> dict[str, np.ndarray]:
    """Return the scores of features of a new rule of `stage`, and those of the other stages' rejectors as they are."""
    own = {name: values[name].to_numpy() for name in values if score_of(name).of_features}
    needed = _of_other_stages(run, stage)
    return own | ({name: run.evidence(run.spec)[name] for name in needed} if needed else {})


def _of_other_stages(run: Run, stage: str) -> list[str]:
    """Return the scores of features that the rejectors of all stages but one need."""
    others = [s.rejector for s in run.spec.stages if s.name != stage and s.rejector is not None]
    return list(dict.fromkeys(name for rejector in others for name in rejector.feature_evidence))


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
    if n_different(groups) < len(groups):
        yield from StratifiedGroupKFold(**options).split(y, y, groups)
    else:
        yield from StratifiedKFold(**options).split(y, y)


def is_in_scope(run: Run) -> np.ndarray:
    return np.asarray(pd.Index(run.examples["label"]).isin(run.spec.in_scope_labels))


def without_rejection(run: Run) -> RoutingResult:
    """Return the way of the texts if nothing is rejected: all gates stand open, and the last stage accepts every text.

    A deferral stage answers as it does in the run. Needs shadow scores (`prepared_run` checks them).
    """
    decisions = {stage.name: run.decision(stage.name) for stage in run.spec.stages}
    return route(run.spec, decisions, force={stage.name: True for stage in run.spec.stages if not stage.is_deferral})


def is_correct(run: Run) -> np.ndarray:
    """Return whether the cascade's label is the true one if nothing is rejected: bool, shape (n,)."""
    return np.asarray(without_rejection(run).predicted == run.examples["label"].to_numpy(dtype=object))


def _npz(arrays: Mapping[str, np.ndarray]) -> tuple[bytes, str]:
    """Return the content of an .npz file and its SHA-256; the same arrays give the same bytes."""
    buffer = io.BytesIO()
    np.savez(buffer, **dict(arrays), allow_pickle=False)
    return buffer.getvalue(), sha256(buffer.getvalue()).hexdigest()
