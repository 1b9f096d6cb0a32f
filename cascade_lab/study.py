"""Runs a study from one TOML file: fine-tunes models with several seeds, combines them to cascades, compares these.

Every training and every run is kept in the output directory. The same call does not repeat them, so an interrupted
study continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade_lab.analysis.metrics import prediction_metrics
from cascade_lab.atomic import write_json
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.cascade import Cascade
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import InfeasibleError, SpecError, did_you_mean
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import Run
from cascade_lab.spec import CascadeSpec, StageSpec
from cascade_lab.thresholds.objective import Goal
from cascade_lab.thresholds.search import choose

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_FLAGS = tuple(field.name for field in dataclasses.fields(Flags))
_MODEL_KEYS = ("name", "train", "labels", "leave_out", "seeds", *_FLAGS)
_SCHEME_KEYS = ("name", "stages", "maximize", "at_least", "paper")


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
        - `[[scheme]]`: `name`; `stages` (names of models; all but the last are gates); `maximize` and `at_least`, by
          which thresholds are chosen on the validation split; `paper` (metrics that a paper reports, for comparison).
          Without `maximize`, or if no thresholds satisfy it, gates have the threshold 0.5, and the last stage rejects
          only by predicting the reject label.
    data : path
        The folder with the data files.
    init : path
        The checkpoint that every training starts from.
    output : path
        The directory for `models/<name>-seed<n>`, `runs/<scheme>-seed<n>-<split>` and `results.json`.
    progress : bool
        Show progress bars.

    Raises
    ------
    SpecError
        The study is not usable, or `output` contains a training with other settings.
    CascadeLabError
        Data, a checkpoint or a training is not usable.
    """
    study, data, output = Path(study), Path(data), Path(output)
    recipe = _read(study)
    flags = recipe["finetune"]
    models = {model["name"]: model for model in recipe["model"]}
    trainings = {}
    for model in recipe["model"]:
        for seed in model.get("seeds", [0]):
            record = _train(model, flags, seed, data, init, output, progress)
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
            rows.append(_score(scheme, models, flags, seed, data, recipe, output, progress))
    results = {
        "study": study.name,
        "sha256": {"study": sha256(study), **{name: sha256(data / name) for name in _data_files(recipe)}},
        "rows": rows,
        "models": trainings,
        **environment(),
    }
    write_json(output / "results.json", results)
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give the TOML file of a study") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not TOML: {error}; fix the file") from error
    for key in ("evaluate", "out_of_scope", "finetune", "model", "scheme"):
        if key not in recipe:
            raise SpecError(
                f"{path}: {key} is missing; a study needs evaluate, out_of_scope, finetune, model and scheme"
            )
    names = [model.get("name") for model in recipe["model"]]
    for kind, known in (("model", _MODEL_KEYS), ("scheme", _SCHEME_KEYS)):
        for table in recipe[kind]:
            for key in table:
                if key not in known:
                    raise SpecError(
                        f"{path}: {kind} '{table.get('name')}': unknown key '{key}'{did_you_mean(key, known)}"
                    )
    for scheme in recipe["scheme"]:
        for name in scheme["stages"]:
            if name not in names:
                raise SpecError(
                    f"{path}: scheme '{scheme['name']}': no model is named '{name}'{did_you_mean(name, names)}"
                )
    return recipe


def _data_files(recipe: Mapping[str, Any]) -> list[str]:
    return sorted({recipe["evaluate"], *(model["train"] for model in recipe["model"])})


def _folder(output: Path, model: str, seed: int) -> Path:
    return output / "models" / f"{model}-seed{seed}"


def _train(
    model: Mapping[str, Any],
    common: Mapping[str, Any],
    seed: int,
    data: Path,
    init: str | Path,
    output: Path,
    progress: bool,
) -> dict[str, Any]:
    """Fine-tune a model with one seed, unless that is done already; return the content of its `training.json`."""
    folder = _folder(output, model["name"], seed)
    model_flags = {key: value for key, value in model.items() if key in _FLAGS}
    flags = Flags(**{**common, **model_flags, "seed": seed})
    train, dev = (
        EvalSet.read(data / model["train"], split=split).without(model.get("leave_out", []))
        for split in ("train", "val")
    )
    labels = model.get("labels") or sorted(set(train.column("label")))
    path = folder / "training.json"
    if path.is_file():
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        is_same = record["flags"] == dataclasses.asdict(flags) and record["labels"] == labels
        if is_same and record["train"]["sha256"] == train.sha256:
            return record
        raise SpecError(f"{folder} was trained with other flags, labels or data; delete it or choose another output")
    if progress:
        print(f"training {folder.name}", file=sys.stderr)
    return finetune(Init.find(init), train, dev, labels, folder, flags=flags, progress=progress)


def _score(
    scheme: Mapping[str, Any],
    models: Mapping[str, Any],
    flags: Mapping[str, Any],
    seed: int,
    data: Path,
    recipe: Mapping[str, Any],
    output: Path,
    progress: bool,
) -> dict[str, Any]:
    """Run a scheme on validation and test, choose its thresholds on validation, and return the metrics of both."""
    stages = []
    for number, name in enumerate(scheme["stages"], 1):
        folder = _folder(output, name, seed)
        is_last = number == len(scheme["stages"])
        role = {"reject_label": recipe["out_of_scope"]} if is_last else {"pass_label": "in", "threshold": 0.5}
        stages.append(
            StageSpec(
                name=name,
                init_checkpoint=folder,
                bert_config_file=folder / "bert_config.json",
                vocab_file=folder / "vocab.txt",
                labels=tuple((folder / "labels.txt").read_text(encoding="utf-8").splitlines()),
                max_seq_length=flags["max_seq_length"],
                **role,
            )
        )
    spec = CascadeSpec("-".join(scheme["stages"]), tuple(stages))
    runs = {}
    for split in ("val", "test"):
        path = output / "runs" / f"{spec.name}-seed{seed}-{split}"
        if not path.exists():
            with Cascade.load(spec) as cascade:
                evalset = EvalSet.read(data / recipe["evaluate"], split=split)
                # There is no finished run; overwrite an unfinished one, which a crash left.
                cascade.run(evalset, output=path, overwrite=True, progress=progress)
        runs[split] = Run.read(path)
    thresholds: dict[str, float] = {}
    infeasible = None
    if "maximize" in scheme:
        try:
            goal = Goal(maximize=scheme["maximize"], at_least=scheme.get("at_least", {}))
            thresholds = choose(runs["val"], goal).thresholds
        except InfeasibleError as error:
            infeasible = str(error).split(": ", 1)[1]
    return {
        "scheme": scheme["name"],
        "stages": scheme["stages"],
        "seed": seed,
        "thresholds": thresholds,
        "infeasible": infeasible,
        "validation": prediction_metrics(spec, runs["val"].replay(thresholds)),
        "test": prediction_metrics(spec, runs["test"].replay(thresholds)),
        "paper": scheme.get("paper"),
    }
