"""Runs a study from one TOML file: fine-tunes models with several seeds, combines them to cascades, compares these.

Every training and every run is kept in the output directory. The same call does not repeat them, so an interrupted
study continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.atomic import check_directory, locked_file, write_json
from cascade_lab.bert.finetune import Flags, Init, finetune, init_origin
from cascade_lab.bert.resume import TRAINING_DIRECTORY, remove_finished
from cascade_lab.cascade import Cascade
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import InfeasibleError, SpecError, did_you_mean
from cascade_lab.json_files import check_keys, read_object
from cascade_lab.provenance import environment, sha256
from cascade_lab.rejector import score_of
from cascade_lab.run import Run
from cascade_lab.run_directory import check_run_output
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.stage_files import stage_file
from cascade_lab.text import printable
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.rejector import evidence_names, fit_rejector, is_correct, is_in_scope
from cascade_lab.thresholds.search import choose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FLAGS: dict[str, Any] = dataclasses.asdict(Flags())
_AT_LEAST = {"num_train_epochs": 1, "train_batch_size": 1, "max_seq_length": 3, "save_checkpoints_steps": 1}
_AT_MOST = {"warmup_proportion": 1, "seed": 2**31 - 1}
_TABLES: dict[str, dict[str, Any]] = {
    "model": {"name": str, "train": str, "labels": list | None, "leave_out": list | None, "seeds": list | None},
    "scheme": {
        "name": str,
        "stages": list,
        "maximize": str | None,
        "at_least": dict | None,
        "evidence": list | None,
        "in_scope_accuracy": float | int | None,
        "paper": dict | None,
    },
}
_ITEMS: dict[str, Any] = {"labels": str, "leave_out": str, "seeds": int, "stages": str, "evidence": str}
_ITEMS |= {"at_least": float | int, "paper": float | int}
_WAY_OUT = "fix the file"


def run_study(
    study: str | Path, *, data: str | Path, init: str | Path, output: str | Path, progress: bool = False
) -> dict[str, Any]:
    """Run a whole study and return the content of `results.json`.

    Parameters
    ----------
    study : path
        A TOML file with these tables:

        - `[finetune]`: the flags of all trainings.
        - `[[model]]`: `name`, `train` (a file in `data`), `labels`, `leave_out`, `seeds`, and flags for this model.
        - `[[scheme]]`: `name`; `stages` (names of models; all but the last are gates); `paper` (metrics that a paper
          reports, for comparison); and how thresholds are chosen on the validation split: `maximize` and `at_least`; or
          `evidence` and `in_scope_accuracy`, as in `fit_rejector`, for a rejector fitted on the validation split.
          Distances need the training texts of the last model, which are then scored too. Without any of these, or if
          no thresholds satisfy them, gates have the threshold 0.5, and the last stage rejects only by predicting the
          reject label.
    data : path
        The folder with the data files.
    init : path
        The checkpoint that every training starts from.
    output : path
        The directory for `models/<name>-seed<n>`, `runs/<stages>-seed<n>-<split>`, the cascades with rejectors, and
        `results.json`.
    progress : bool
        Show progress bars.

    Raises
    ------
    SpecError
        The study is not usable, or `output` contains a training or a run with other settings.
    CascadeLabError
        Data, a checkpoint or a training is not usable, or another process runs a study in `output`.
    """
    study, data, output = Path(study), Path(data), Path(output)
    recipe = read_recipe(study, ("evaluate", "out_of_scope", "finetune", "model", "scheme"))
    files = sorted({recipe["evaluate"], *(model["train"] for model in recipe["model"])})
    try:
        digests = {"study": sha256(study), **{name: sha256(data / name) for name in files}}
    except OSError as error:
        raise SpecError(f"{error.filename}: cannot be read ({error.strerror}); give the data's folder") from error
    start = Init.find(init)
    with locked_file(output / "results.json", overwrite=True, what="study"):
        models = {model["name"]: model for model in recipe["model"]}
        trainings = {}
        for model in recipe["model"]:
            for seed in model.get("seeds", [0]):
                record = _train_model(model, recipe["finetune"], seed, data, start, output, progress)
                trainings[f"{model['name']}-seed{seed}"] = {
                    "curve": record["curve"],
                    "best_epoch": record["best_epoch"],
                    "flags": record["flags"],
                    "train": record["train"],
                }
        rows = []
        for scheme in recipe["scheme"]:
            common_seeds = set.intersection(*(set(models[name].get("seeds", [0])) for name in scheme["stages"]))
            for seed in sorted(common_seeds):
                rows.append(_score(scheme, models, seed, data, recipe, output, progress))
        results = {
            "study": study.name,
            "sha256": digests,
            "rows": rows,
            "models": trainings,
            **environment(),
        }
        write_json(output / "results.json", results)
    return results


def read_recipe(path: Path, required: Sequence[str]) -> dict[str, Any]:
    """Read and check the TOML file of a study; `required` are the keys that it must have."""
    options: Any = {"error": SpecError, "way_out": _WAY_OUT}
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the TOML file of a study") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not TOML
        raise SpecError(f"{path}: not TOML: {error}; {_WAY_OUT}") from error
    for key in required:
        if key not in recipe:
            *others, last = required
            raise SpecError(f"{path}: {key} is missing; a study needs {', '.join(others)} and {last}")
    kinds = {"evaluate": str, "out_of_scope": str | None, "finetune": dict, "model": list | None, "scheme": list | None}
    check_keys(recipe, kinds, str(path), **options)
    check_flags(recipe["finetune"], f"{path}: finetune")
    for kind, known in _TABLES.items():
        flags = _FLAGS if kind == "model" else {}
        for number, table in enumerate(recipe.get(kind, []), 1):
            check_keys({kind: table}, {kind: dict}, f"{path}: {kind} {number}", **options)
            where = f"{path}: {kind} '{table.get('name', number)}'"
            for key in table:
                if key not in (*known, *flags):
                    raise SpecError(f"{where}: unknown key '{key}'{did_you_mean(key, [*known, *flags])}")
            check_keys(table, known, where, **options)
            check_flags({key: value for key, value in table.items() if key in flags}, where)
            for key in table.keys() & _ITEMS.keys():
                values = table[key].values() if isinstance(table[key], dict) else table[key]
                for value in values:
                    check_keys({key: value}, {key: _ITEMS[key]}, where, **options)
            for seed in table.get("seeds", []):
                check_flags({"seed": seed}, where)
    names = [model["name"] for model in recipe.get("model", [])]
    for scheme in recipe.get("scheme", []):
        _check_scheme(scheme, names, f"{path}: scheme '{scheme['name']}'")
    return recipe


def _check_scheme(scheme: Mapping[str, Any], models: Sequence[str], where: str) -> None:
    """Raise CascadeLabError for what would fail only after the trainings."""
    names = scheme["stages"]
    if not names:
        raise SpecError(f"{where}: stages is empty; name at least one model")
    for name in names:
        if name not in models:
            raise SpecError(f"{where}: no model is named '{name}'{did_you_mean(name, models)}")
    if "maximize" in scheme and "evidence" in scheme:
        raise SpecError(f"{where}: has both maximize and evidence; thresholds are chosen by one of them")
    if ("evidence" in scheme) != ("in_scope_accuracy" in scheme):
        raise SpecError(f"{where}: evidence and in_scope_accuracy belong together; give both")
    if "at_least" in scheme and "maximize" not in scheme:
        raise SpecError(f"{where}: at_least needs maximize; give both")
    gates = [{"name": name, "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5} for name in names[:-1]]
    last = {"name": names[-1], "labels": ["a", "b"], "reject_label": "oos"}
    spec = CascadeSpec.from_dict({"stage": [*gates, last]}, where=where)
    if "evidence" in scheme:
        evidence_names(spec, scheme["evidence"])
    if "maximize" in scheme:
        Goal(maximize=scheme["maximize"], at_least=scheme.get("at_least", {}))


def check_flags(flags: Mapping[str, Any], where: str) -> None:
    """Raise SpecError if a flag of a training is unknown, of another type, or out of its range."""
    for key, value in flags.items():
        if key not in _FLAGS:
            raise SpecError(f"{where}: unknown key '{key}'{did_you_mean(key, _FLAGS)}")
        kind = type(_FLAGS[key])
        if type(value) is not kind and not (kind is float and type(value) is int):
            names = {bool: "true or false", int: "a whole number", float: "a number"}
            raise SpecError(f"{where}: {key} is {value!r}; it must be {names[kind]}")
        least, most = _AT_LEAST.get(key, 0), _AT_MOST.get(key)
        if not (value >= least and (most is None or value <= most)):  # NaN too
            limit = f"at least {least}" if most is None else f"from {least} to {most}"
            raise SpecError(f"{where}: {key} is {value}; it must be {limit}")


def train(
    folder: Path,
    train: EvalSet,
    dev: EvalSet,
    labels: Sequence[str],
    *,
    init: Init,
    flags: Flags,
    progress: bool,
) -> dict[str, Any]:
    """Fine-tune a model to `folder`, unless that is done already; return the content of its `training.json`.

    Raises
    ------
    SpecError
        `folder` contains a training with other settings.
    """
    path = folder / "training.json"
    check_directory(folder, overwrite=True, continues=True, **TRAINING_DIRECTORY)
    if path.is_file():
        remove_finished(folder)
        record = read_object(path, error=SpecError, way_out="delete the folder")
        asked = {"flags": dataclasses.asdict(flags), "labels": list(labels), "init": init_origin(init)}
        for name, evalset in (("train", train), ("dev", dev)):
            asked[name] = {key: value for key, value in evalset.origin.items() if key != "source"}
        for key, value in asked.items():
            if record.get(key) != value:
                what = {"train": "training data", "dev": "validation data", "init": "initial weights"}.get(key, key)
                raise SpecError(f"{folder} was trained with other {what}; delete it or choose another output")
        return record
    if progress:
        print(printable(f"training {folder.name}"), file=sys.stderr)
    return finetune(init, train, dev, labels, folder, flags=flags, progress=progress)


def stage_of(folder: Path, name: str, **role: Any) -> StageSpec:
    """Return the stage `name` with the model that was trained to `folder`; `role` are further keys of `StageSpec`."""
    flags = read_object(folder / "training.json", error=SpecError, way_out="delete the folder")["flags"]
    return StageSpec(
        name=name,
        init_checkpoint=folder,
        bert_config_file=folder / "bert_config.json",
        vocab_file=folder / "vocab.txt",
        labels=tuple((folder / "labels.txt").read_text(encoding="utf-8").splitlines()),
        max_seq_length=flags["max_seq_length"],
        do_lower_case=flags["do_lower_case"],
        **role,
    )


def score(spec: CascadeSpec, evalset: EvalSet, path: Path, *, keep_features: bool = False, progress: bool) -> Run:
    """Run a cascade over an eval set, unless the run is at `path` already; return the run.

    Raises
    ------
    SpecError
        The run at `path` has other texts or labels.
    """
    check_run_output(path, overwrite=True)  # removes what a killed process left
    if path.exists():
        run = Run.read(path)
        columns = ("example_id", "text", "label")
        is_same = all(run.examples[name].tolist() == evalset.examples[name].tolist() for name in columns)
        if not is_same or run.spec.labels != spec.labels:
            raise SpecError(f"{path} is a run of other texts or labels; delete it or choose another output")
        if run.has_features or not keep_features:
            return run
    with Cascade.load(spec, keep_features=keep_features) as cascade:
        # There is no finished run, or one without features; overwrite an unfinished one, which a crash left.
        return cascade.run(evalset, output=path, overwrite=True, progress=progress)


def _folder(output: Path, model: str, seed: int) -> Path:
    return output / "models" / f"{stage_file(model)}-seed{seed}"


def _training_set(model: Mapping[str, Any], data: Path, split: str) -> EvalSet:
    return EvalSet.read(data / model["train"], split=split).without(model.get("leave_out", []))


def _train_model(
    model: Mapping[str, Any],
    common: Mapping[str, Any],
    seed: int,
    data: Path,
    init: Init,
    output: Path,
    progress: bool,
) -> dict[str, Any]:
    """Fine-tune a model of the study with one seed; return the content of its `training.json`."""
    own = {key: value for key, value in model.items() if key in _FLAGS}
    training_set, dev = (_training_set(model, data, split) for split in ("train", "val"))
    return train(
        _folder(output, model["name"], seed),
        training_set,
        dev,
        model.get("labels") or sorted(set(training_set.column("label"))),
        init=init,
        flags=Flags(**{**common, **own, "seed": seed}),
        progress=progress,
    )


def _score(
    scheme: Mapping[str, Any],
    models: Mapping[str, Any],
    seed: int,
    data: Path,
    recipe: Mapping[str, Any],
    output: Path,
    progress: bool,
) -> dict[str, Any]:
    """Run a scheme on validation and test, choose its rule on validation, and return the metrics of both."""
    names = scheme["stages"]
    gates = [stage_of(_folder(output, name, seed), name, pass_label="in", threshold=0.5) for name in names[:-1]]
    last = stage_of(_folder(output, names[-1], seed), names[-1], reject_label=recipe["out_of_scope"])
    spec = CascadeSpec("-".join(names), (*gates, last))
    evidence = {
        other["name"]: evidence_names(spec, other["evidence"])
        for other in recipe["scheme"]
        if other["stages"] == names and "evidence" in other
    }
    # The runs serve all schemes of these stages; one of them may need features.
    keep_features = any(feature_stages(scores) for scores in evidence.values())
    of_features = feature_stages(evidence.get(scheme["name"], []))

    def run_of(spec: CascadeSpec, evalset: EvalSet, split: str) -> Run:
        files = "-".join(stage_file(stage.name) for stage in spec.stages)
        path = output / "runs" / f"{files}-seed{seed}-{split}"
        return score(spec, evalset, path, keep_features=keep_features, progress=progress)

    runs = {
        split: run_of(spec, EvalSet.read(data / recipe["evaluate"], split=split), split) for split in ("val", "test")
    }
    chosen, validation, infeasible = spec, runs["val"].predictions, None
    try:
        if "maximize" in scheme:
            goal = Goal(maximize=scheme["maximize"], at_least=scheme.get("at_least", {}))
            chosen = spec.with_thresholds(choose(runs["val"], goal).thresholds)
            validation = runs["val"].with_spec(chosen).predictions
        elif "evidence" in scheme:
            # Distances are usually those of the last stage alone; then the training texts need no gate.
            training_spec = CascadeSpec(last.name, (last,)) if set(of_features) == {last.name} else spec
            training_set = _training_set(models[names[-1]], data, "train")
            train_run = run_of(training_spec, training_set, "train") if of_features else None
            fitted = fit_rejector(
                runs["val"], scheme["evidence"], train_run=train_run, at_least=float(scheme["in_scope_accuracy"])
            )
            parts = [name.rpartition(".") for name in scheme["evidence"]]
            used = [f"{stage_file(stage)}.{score}" if stage else score for stage, _, score in parts]
            name = "-".join([*map(stage_file, names), f"seed{seed}", *used, f"{scheme['in_scope_accuracy']:g}"])
            fitted.write(output / "cascades" / f"{name}.toml")
            chosen, validation = CascadeSpec.read(output / "cascades" / f"{name}.toml"), fitted.run.predictions
    except InfeasibleError as error:
        infeasible = str(error).partition(": ")[2] or str(error)
    rejector = chosen.rejector
    return {
        "scheme": scheme["name"],
        "stages": names,
        "seed": seed,
        "thresholds": {} if chosen is spec else {k: v for k, v in chosen.thresholds.items() if v is not None},
        "rejector": rejector and dict(zip(rejector.evidence, rejector.weights, strict=True)),
        "infeasible": infeasible,
        "validation": prediction_metrics(chosen, validation),
        "test": prediction_metrics(chosen, runs["test"].with_spec(chosen).predictions),
        # The most that any thresholds can reach: the last stage answers every text with its most probable label.
        "without_rejection": {
            name: float(is_correct(runs[split])[is_in_scope(runs[split])].mean())
            for name, split in (("validation", "val"), ("test", "test"))
        },
        "paper": scheme.get("paper"),
    }


def feature_stages(evidence: Sequence[str]) -> list[str]:
    """Return the stages of which scores `<stage>.<score>` need the features."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in evidence if score_of(name).of_features))
