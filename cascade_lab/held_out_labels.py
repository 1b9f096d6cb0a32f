"""Runs a study with held-out labels: how well a classifier rejects texts whose labels it was not trained on."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from cascade_lab.analysis.duplicates import n_different, text_groups
from cascade_lab.analysis.open_set import open_set_metrics
from cascade_lab.atomic import locked_file, write_json
from cascade_lab.bert.finetune import Flags, Init
from cascade_lab.evalset import ENDINGS, EvalSet
from cascade_lab.evidence import HIGH_OUT_OF_SCOPE
from cascade_lab.exceptions import EvalSetError, SpecError, did_you_mean
from cascade_lab.provenance import environment, sha256
from cascade_lab.rejector import Rejector
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.study import check_flags, feature_stages, score, stage_of, train
from cascade_lab.thresholds.rejector import (
    N_FOLDS,
    FittedRejector,
    distance_arrays,
    evidence_names,
    evidence_table,
    fit_rejector,
    is_in_scope,
    stratified_folds,
    with_rule,
)

SPLITS = {"train": ("train",), "val": ("val", "dev", "validation", "valid"), "test": ("test",)}
"""The three splits, and the names that each can have."""
STAGE = "classifier"
UNKNOWN = "unknown"
DEFAULT_RULES = (("max_probability",), ("energy",))


def run_held_out_study(
    data: str | Path,
    *,
    init: str | Path,
    output: str | Path,
    known_ratios: Sequence[float] = (0.25, 0.5, 0.75),
    seeds: Sequence[int] = (0, 1, 2),
    rules: Sequence[Sequence[str]] = DEFAULT_RULES,
    accept: float = 0.95,
    out_of_scope: str | None = None,
    flags: Mapping[str, Any] | None = None,
    progress: bool = False,
) -> dict[str, Any]:
    """Hold out a share of the labels, train on the others, and return the content of `results.json`.

    The protocol is that of Zhang et al. (2021). For each ratio and seed, labels are drawn at random as known ones. A
    classifier is trained on the training texts of known labels, and its best epoch is chosen on their validation texts.
    It is tested on all test texts: those of the other labels are out of scope. With one seed, the labels known at a
    lower ratio are known at a higher one too. Each rule is fixed before the test split is scored.

    Parameters
    ----------
    data : path
        Labelled texts: a file, or a folder with a file for each split (see `read_splits`).
    init : path
        The checkpoint that every training starts from.
    output : path
        The directory for `models/known-<ratio>-seed<n>`, `runs/known-<ratio>-seed<n>-<split>`, a cascade for each rule
        in `cascades`, and `results.json`. The same call does not repeat a training or a run that is there.
    known_ratios : sequence of float
        In (0, 1]: the fraction of the labels that are known. 1 needs `out_of_scope`.
    seeds : sequence of int
        Of the choice of labels, and of the training.
    rules : sequence of sequences of str
        Each the names of scores (see `fit_rejector`). One score: the threshold is the highest at which the fraction
        `accept` of the known validation texts is accepted; no text out of scope is needed. Several: a rejector is
        fitted on the validation texts, with those of the label `out_of_scope`, and then the threshold is chosen alike.
    accept : float
        In (0, 1].
    out_of_scope : str, optional
        A label of your own texts out of scope. They are never known and train no classifier; those of the test split
        are tested too.
    flags : mapping, optional
        Flags of the trainings, as `Flags` has them.
    progress : bool
        Show progress bars.

    Raises
    ------
    SpecError
        A ratio, seed, rule or flag is not usable, or `output` contains a training or a run with other settings.
    CascadeLabError
        Data, a checkpoint or a training is not usable, or another process runs a study in `output`.
    """
    data, output = Path(data), Path(output)
    _check_settings(known_ratios, seeds, rules, accept)
    check_flags(flags or {}, "flags")
    splits, files = read_splits(data)
    labels = _labels(splits, out_of_scope)
    known = {ratio: [known_labels(labels, ratio, seed) for seed in seeds] for ratio in sorted(known_ratios)}
    _check_texts(splits, known, len(labels), rules, out_of_scope)
    start = Init.find(init)
    rows, models = [], {}
    with locked_file(output / "results.json", overwrite=True, what="study"):
        for ratio, choices in known.items():
            for seed, chosen in zip(seeds, choices, strict=True):
                name = f"known-{ratio:.12g}-seed{seed}"
                study = _Study(splits, chosen, out_of_scope or UNKNOWN, output, name, progress)
                record = study.train(start, Flags(**{**(flags or {}), "seed": seed}))
                models[name] = {key: record[key] for key in ("curve", "best_epoch", "flags", "labels")}
                rows += [
                    {"known_ratio": ratio, "seed": seed, "n_known_labels": len(chosen), **row}
                    for row in study.rows(rules, accept)
                ]
        results = {
            "study": data.name,
            "sha256": {path.name: sha256(path) for path in files},
            "n_labels": len(labels),
            "n_texts": {split: len(evalset) for split, evalset in splits.items()},
            "accept": accept,
            "out_of_scope": out_of_scope,
            "rows": rows,
            "models": models,
            **environment(),
        }
        write_json(output / "results.json", results)
    return results


def known_labels(labels: Iterable[str], ratio: float, seed: int) -> list[str]:
    """Return the labels that are known: `round(ratio * n_labels)` of them, drawn at random, sorted.

    >>> known_labels(["pay", "play", "stop", "call"], 0.5, seed=0)
    ['call', 'play']
    """
    names = sorted(labels)
    drawn = np.random.default_rng(seed).permutation(len(names))[: round(ratio * len(names))]
    return [names[i] for i in sorted(drawn)]


def read_splits(data: Path) -> tuple[dict[str, EvalSet], list[Path]]:
    """Return the splits `train`, `val` and `test` of labelled texts, and the files that they were read from.

    Parameters
    ----------
    data : path
        A folder with one file for each split, named after it (`train.tsv`, `dev.csv`, ...); a file with a column
        `split`; CLINC150's json; or a file without splits. The latter is dealt with a fixed seed: of each label three
        fifths to train, one to val, one to test; equal texts go to one split.

    Raises
    ------
    EvalSetError
        A split is missing, or a file cannot be read.
    """
    if data.is_dir():
        paths = {split: _file_of(data, split) for split in SPLITS}
        return {split: EvalSet.read(path) for split, path in paths.items()}, list(paths.values())
    try:
        whole = EvalSet.read(data)
    except EvalSetError:
        whole = None  # CLINC150's json cannot be read as a whole; if the file is damaged, it is refused below
    if whole is not None and "split" not in whole.examples:
        return _deal(whole), [data]
    return {split: _read_split(data, names) for split, names in SPLITS.items()}, [data]


@dataclasses.dataclass(frozen=True)
class _Study:
    """One classifier of the study: the known labels, and where its files are."""

    splits: Mapping[str, EvalSet]
    known: Sequence[str]
    open_label: str
    output: Path
    name: str
    progress: bool

    def train(self, init: Init, flags: Flags) -> dict[str, Any]:
        """Train the classifier, unless that is done already; return the content of its `training.json`."""
        training_set, dev = (self._of_known(split) for split in ("train", "val"))
        options: Any = {"init": init, "flags": flags, "progress": self.progress}
        return train(self._folder, training_set, dev, self.known, **options)

    def rows(self, rules: Sequence[Sequence[str]], accept: float) -> list[dict[str, Any]]:
        """Fix each rule on the validation texts, then score the test texts; return the metrics of each rule."""
        spec = CascadeSpec(self.name, (stage_of(self._folder, STAGE, reject_label=self.open_label),))
        evidence = [evidence_names(spec, rule) for rule in rules]
        keep_features = any(feature_stages(names) for names in evidence)
        options: Any = {"keep_features": keep_features, "progress": self.progress}
        runs = self.output / "runs"
        validation = score(spec, self._relabelled("val"), runs / f"{self.name}-val", **options)
        train_run = None
        if keep_features:
            train_run = score(spec, self._of_known("train"), runs / f"{self.name}-train", **options)
        chosen = []
        for rule, names in zip(rules, evidence, strict=True):
            fitted = _at_acceptance(_with_rule(validation, names, train_run), accept)
            path = self.output / "cascades" / f"{self.name}-{'-'.join(rule)}.toml"
            fitted.write(path)
            chosen.append((rule, CascadeSpec.read(path), fitted.run))
        test = score(spec, self._relabelled("test"), runs / f"{self.name}-test", **options)
        return [
            {
                "rule": " + ".join(rule),
                "threshold": rule_spec.last.min_probability,
                "n_known": int(is_in_scope(test).sum()),
                "n_unknown": int((~is_in_scope(test)).sum()),
                "validation": self._metrics(validation_run),
                "test": self._metrics(test.with_spec(rule_spec)),
            }
            for rule, rule_spec, validation_run in chosen
        ]

    @property
    def _folder(self) -> Path:
        return self.output / "models" / self.name

    def _metrics(self, run: Run) -> dict[str, float | None]:
        predicted, confidence = run.predictions["predicted"], run.decision(STAGE).confidence
        metrics = open_set_metrics(run.examples["label"], predicted, confidence, open_label=self.open_label)
        is_known = is_in_scope(run)
        metrics["known_accepted"] = float((predicted != self.open_label).to_numpy()[is_known].mean())
        return {name: None if np.isnan(value) else value for name, value in metrics.items()}

    def _of_known(self, split: str) -> EvalSet:
        """Return the texts of known labels."""
        evalset = self.splits[split]
        return evalset.without(sorted(set(evalset.column("label")) - set(self.known)))

    def _relabelled(self, split: str) -> EvalSet:
        """Return the texts of a split: those of the test split with the label that the classifier should answer.

        Validation has no texts of held-out labels, only your own texts out of scope.
        """
        evalset = self.splits[split]
        if split == "val":
            return evalset.without(sorted(set(evalset.column("label")) - {*self.known, self.open_label}))
        labels = pd.Series(evalset.column("label"), dtype=object)
        answers = labels.where(labels.isin(self.known), self.open_label)
        examples = evalset.examples.drop(columns=f"{STAGE}_label", errors="ignore")
        return dataclasses.replace(evalset, examples=examples.assign(label=answers, original_label=labels))


def _with_rule(run: Run, names: Sequence[str], train_run: Run | None) -> FittedRejector:
    """Return the cascade with the rule of the scores `names`, and the run as that cascade would have made it."""
    if names == [f"{STAGE}.max_probability"]:
        return FittedRejector(run.spec, {}, run)
    if len(names) > 1:
        return fit_rejector(run, names, train_run=train_run, at_least=0.0)
    name = names[0]
    arrays = distance_arrays(run, names, train_run)
    values = evidence_table(run, names, arrays)[name].to_numpy()
    known = values[is_in_scope(run)]
    # One score needs no fit: its values for known texts, standardized, put the confidence into (0, 1).
    weight = (-1.0 if name.rpartition(".")[2] in HIGH_OUT_OF_SCOPE else 1.0) / (known.std() or 1.0)
    fitted_on = {"run_id": run.manifest["run_id"], "n_in_scope": len(known), "n_out_of_scope": 0}
    rejector = Rejector((name,), (float(weight),), float(-weight * known.mean()), fitted_on=fitted_on)
    spec = with_rule(run.spec, run.spec.last.name, rejector, arrays)
    return FittedRejector(
        spec, arrays, run.with_confidence(spec, rejector.confidence({name: values}), evidence={name: values})
    )


def _at_acceptance(fitted: FittedRejector, accept: float) -> FittedRejector:
    """Return the rule at the highest threshold that accepts the fraction `accept` of the texts in scope."""
    confidence = np.sort(fitted.run.decision(STAGE).confidence[is_in_scope(fitted.run)])
    threshold = float(confidence[int((1 - accept) * len(confidence) + 1e-9)])
    run = fitted.run.with_thresholds({STAGE: threshold})
    return dataclasses.replace(fitted, spec=fitted.spec.with_thresholds({STAGE: threshold}), run=run)


def _labels(splits: Mapping[str, EvalSet], out_of_scope: str | None) -> list[str]:
    """Return the labels of the training texts that can be known."""
    labels = set(splits["train"].column("label"))
    seen = labels.union(*(evalset.column("label") for evalset in splits.values()))
    if out_of_scope is not None and out_of_scope not in seen:
        raise SpecError(f"no text has the label '{out_of_scope}'{did_you_mean(out_of_scope, sorted(seen))}")
    if out_of_scope is None and UNKNOWN in seen:
        raise SpecError(f"'{UNKNOWN}' is a label; if it means out of scope, give it as --out-of-scope, else rename it")
    return sorted(labels - {out_of_scope})


def _check_settings(
    known_ratios: Sequence[float], seeds: Sequence[int], rules: Sequence[Sequence[str]], accept: float
) -> None:
    """Raise CascadeLabError for settings that make no sense for any texts."""
    if not (known_ratios and seeds and rules):
        raise SpecError("a study with held-out labels needs a known ratio, a seed and a rule")
    for ratio in known_ratios:
        if not 0 < ratio <= 1:
            raise SpecError(f"the known ratio is {ratio:g}; it must be above 0 and at most 1")
    if len(set(seeds)) < len(seeds) or min(seeds) < 0:
        raise SpecError(f"the seeds are {', '.join(map(str, seeds))}; give different whole numbers from 0")
    if not 0 < accept <= 1:
        raise SpecError(f"accept is {accept:g}; it must be above 0 and at most 1")
    spec = CascadeSpec("study", (StageSpec(STAGE, ("a", "b")),))
    names = [frozenset(evidence_names(spec, rule)) for rule in rules]
    if len(set(names)) < len(names):
        raise SpecError("a rule is given twice; give each once")


def _check_texts(
    splits: Mapping[str, EvalSet],
    known: Mapping[float, Sequence[Sequence[str]]],
    n_labels: int,
    rules: Sequence[Sequence[str]],
    out_of_scope: str | None,
) -> None:
    """Raise SpecError for what would fail only after a training."""
    is_out_of_scope = np.array(splits["val"].column("label")) == out_of_scope
    n_out_of_scope = n_different(text_groups(splits["val"].examples)[is_out_of_scope])
    several = next((rule for rule in rules if len(set(rule)) > 1), None)
    if several is not None and n_out_of_scope < 2 * N_FOLDS:
        raise SpecError(
            f"the rule {','.join(several)} is fitted on validation texts out of scope, and there are {n_out_of_scope} "
            f"different ones; give a label that at least {2 * N_FOLDS} have as --out-of-scope, or one score per rule"
        )
    for ratio, choices in known.items():
        for labels in choices:
            if len(labels) < 2:
                raise SpecError(
                    f"the known ratio {ratio:g} of {n_labels} labels leaves {len(labels)}; a classifier needs 2: give "
                    f"a ratio of at least {min(1.0, 2 / max(n_labels, 1)):.2g}"
                )
            if len(labels) == n_labels and out_of_scope is None:
                raise SpecError(f"the known ratio {ratio:g} of {n_labels} labels holds out none; give a lower ratio")
            for split in SPLITS:
                empty = sorted(set(labels) - set(splits[split].column("label")))
                if empty:
                    raise SpecError(f"label '{empty[0]}' has no text in {split}; add texts, or leave the label out")


def _read_split(data: Path, names: Sequence[str]) -> EvalSet:
    """Read the split of a file that has one of these names."""
    for name in names:
        try:
            return EvalSet.read(data, split=name)
        except EvalSetError as problem:
            error = problem
    others = f" (or {', '.join(names[1:])})" if names[1:] else ""
    raise EvalSetError(f"{error}; a study with held-out labels needs a split {names[0]}{others}") from error


def _deal(evalset: EvalSet) -> dict[str, EvalSet]:
    """Return three splits of a set: of each label three fifths, one and one; equal texts in one split."""
    labels = pd.Series(evalset.column("label"))
    counts = labels.value_counts()
    if counts.min() < N_FOLDS:
        raise EvalSetError(
            f"{evalset.source}: label '{counts.idxmin()}' has {counts.min()} texts; to deal texts to train, val and "
            f"test, each label needs {N_FOLDS}: add texts, leave the label out, or give a column split"
        )
    folds = [test for _, test in stratified_folds(labels.to_numpy(), text_groups(evalset.examples), seed=0)]
    rows = {"train": np.sort(np.concatenate(folds[2:])), "val": folds[1], "test": folds[0]}
    return {split: dataclasses.replace(evalset.take(rows[split].tolist()), split=split) for split in SPLITS}


def _file_of(folder: Path, split: str) -> Path:
    found = sorted(folder / f"{name}{ending}" for name in SPLITS[split] for ending in ENDINGS)
    found = [path for path in found if path.is_file()]
    if len(found) != 1:
        names = ", ".join(path.name for path in found) or "no file"
        raise EvalSetError(
            f"{folder}: has {names} for the split {split}; give a folder with one file named {SPLITS[split][0]}.tsv "
            f"(or {', '.join(ENDINGS[1:])})"
        )
    return found[0]
