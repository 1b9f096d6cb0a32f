"""A study from one TOML: models fine-tuned with several seeds, put together as cascades, compared in one table.

Everything is kept where it was made: a training that is there already is not done again, so an interrupted study
goes on where it was.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cascade_lab.analysis.goals import Goal
from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.thresholds import choose
from cascade_lab.bert.finetune import Flags, Init, finetune
from cascade_lab.cascade import Cascade
from cascade_lab.errors import InfeasibleError, SpecError, did_you_mean
from cascade_lab.evalset import EvalSet
from cascade_lab.provenance import environment, sha256
from cascade_lab.run import Run, write_json
from cascade_lab.spec import CascadeSpec, StageSpec

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_MODEL = ("name", "train", "labels", "leave_out", "seeds", *(field.name for field in dataclasses.fields(Flags)))
_SCHEME = ("name", "stages", "maximize", "at_least", "paper")


def run_study(
    study: str | Path, *, data: str | Path, init: str | Path, output: str | Path, progress: bool = False
) -> dict[str, Any]:
    """Do all that a study's TOML asks for; returns what `results.json` holds.

    Parameters
    ----------
    study : path
        `[finetune]`: flags in common; `[[model]]`: `name`, `train` (a file in `data`), `labels`, `leave_out`,
        `seeds`, and flags of its own; `[[scheme]]`: `name`, `stages` (models, each but the last a gate),
        `maximize` and `at_least` (thresholds are chosen so on validation; without them, or where none can do
        that, gates have 0.5 and the last stage rejects only by label), `paper` (figures to stand beside).
    data : path
        The folder with the data files.
    init : path
        The checkpoint that every model starts from.
    output : path
        Gets `models/<name>-seed<n>`, `runs/<scheme>-seed<n>-<split>` and `results.json`.
    """
    study, data, output = Path(study), Path(data), Path(output)
    recipe = _read(study)
    flags = recipe["finetune"]
    models = {model["name"]: model for model in recipe["model"]}
    curves = {}
    for model in recipe["model"]:
        for seed in model.get("seeds", [0]):
            record = _train(model, flags, seed, data, init, output, progress)
            curves[f"{model['name']}-seed{seed}"] = {
                "curve": record["curve"],
                "best_epoch": record["best_epoch"],
                "flags": record["flags"],
                "train": record["train"],
            }
    rows = []
    for scheme in recipe["scheme"]:
        common = set.intersection(*(set(models[name].get("seeds", [0])) for name in scheme["stages"]))
        for seed in sorted(common):
            rows.append(_score(scheme, models, flags, seed, data, recipe, output, progress))
    results = {
        "study": study.name,
        "sha256": {"study": sha256(study), **{name: sha256(data / name) for name in _files(recipe)}},
        "rows": rows,
        "models": curves,
        **environment(),
    }
    write_json(output / "results.json", results)
    return results


def _read(path: Path) -> dict[str, Any]:
    try:
        recipe = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SpecError(f"{path}: cannot be read ({error.strerror}); give a study's TOML") from error
    except (UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SpecError(f"{path}: not TOML: {error}; mend it there") from error
    for key in ("evaluate", "out_of_scope", "finetune", "model", "scheme"):
        if key not in recipe:
            raise SpecError(f"{path}: {key} is missing; a study has evaluate, out_of_scope, finetune, model and scheme")
    names = [model.get("name") for model in recipe["model"]]
    for kind, known in (("model", _MODEL), ("scheme", _SCHEME)):
        for table in recipe[kind]:
            for key in table:
                if key not in known:
                    raise SpecError(
                        f"{path}: {kind} '{table.get('name')}': unknown key '{key}'{did_you_mean(key, known)}"
                    )
    for scheme in recipe["scheme"]:
        for name in scheme["stages"]:
            if name not in names:
                raise SpecError(f"{path}: scheme '{scheme['name']}': no model '{name}'{did_you_mean(name, names)}")
    return recipe


def _files(recipe: Mapping[str, Any]) -> list[str]:
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
    folder = _folder(output, model["name"], seed)
    own = {key: value for key, value in model.items() if key in {field.name for field in dataclasses.fields(Flags)}}
    flags = Flags(**{**common, **own, "seed": seed})
    sets = [
        EvalSet.read(data / model["train"], split=split).without(model.get("leave_out", []))
        for split in ("train", "val")
    ]
    labels = model.get("labels") or sorted(set(sets[0].column("label")))
    done = folder / "training.json"
    if done.is_file():
        record = json.loads(done.read_text(encoding="utf-8"))
        same = record["flags"] == dataclasses.asdict(flags) and record["labels"] == labels
        if same and record["train"]["sha256"] == sets[0].sha256:
            return record
        raise SpecError(f"{folder} was trained with other flags, labels or data; delete it or choose another output")
    if progress:
        print(f"training {folder.name}", file=sys.stderr)
    return finetune(Init.find(init), *sets, labels, folder, flags=flags, progress=progress)


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
    """Run a scheme on validation and test, choose its thresholds on validation, and replay both at them."""
    out_of_scope = recipe["out_of_scope"]
    stages = []
    for place, name in enumerate(scheme["stages"], 1):
        folder = _folder(output, name, seed)
        is_last = place == len(scheme["stages"])
        stages.append(
            StageSpec(
                name=name,
                init_checkpoint=folder,
                bert_config_file=folder / "bert_config.json",
                vocab_file=folder / "vocab.txt",
                labels=tuple((folder / "labels.txt").read_text(encoding="utf-8").splitlines()),
                max_seq_length=flags["max_seq_length"],
                **({"reject_label": out_of_scope} if is_last else {"pass_label": "in", "threshold": 0.5}),
            )
        )
    spec = CascadeSpec("-".join(scheme["stages"]), tuple(stages))
    runs = {}
    for split in ("val", "test"):
        place = output / "runs" / f"{spec.name}-seed{seed}-{split}"
        if not place.exists():
            with Cascade.load(spec) as cascade:
                evalset = EvalSet.read(data / recipe["evaluate"], split=split)
                # Overwriting, of a run that is not there: what a crash left unfinished.
                cascade.run(evalset, output=place, overwrite=True, progress=progress)
        runs[split] = Run.read(place)
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
        "validation": figures_of(spec, runs["val"].replay(thresholds)),
        "test": figures_of(spec, runs["test"].replay(thresholds)),
        "paper": scheme.get("paper"),
    }
