"""`cascade-lab study` fine-tunes the models of a study and compares cascades of them, or rules with held-out labels."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from cascade_lab.cli.console import shows_progress, spinner
from cascade_lab.cli.options import NEW_DIRECTORY
from cascade_lab.cli.printing import cell, line, next_step, number, show, table
from cascade_lab.exceptions import CascadeLabError

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T")


def study(
    recipe: Annotated[
        Path,
        typer.Argument(
            metavar="STUDY",
            help="The TOML file of a study; with --known-ratio also labelled texts: a file, or a folder with a file "
            "for each split.",
            show_default=False,
        ),
    ],
    init: Annotated[str, typer.Option(help="The checkpoint that every model starts from.", show_default=False)],
    output: NEW_DIRECTORY,
    data: Annotated[
        Path | None, typer.Option(help="The folder with the data files [default: the folder of STUDY].")
    ] = None,
    known_ratio: Annotated[
        str | None,
        typer.Option(metavar="R,R", help="Hold out labels: the fractions of the labels that are known, 0.25,0.5,0.75."),
    ] = None,
    seeds: Annotated[
        str | None, typer.Option(metavar="N,N", help="With --known-ratio: the random seeds [default: 0,1,2].")
    ] = None,
    evidence: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME,NAME",
            help="With --known-ratio: the scores of one rule, as in fit-rejector. Can be given several times [default: "
            "max_probability, and energy].",
        ),
    ] = None,
    accept: Annotated[
        float | None,
        typer.Option(help="With --known-ratio: the fraction of known validation texts to accept [default: 0.95]."),
    ] = None,
    out_of_scope: Annotated[
        str | None,
        typer.Option(
            metavar="LABEL",
            help="With --known-ratio: the label of your texts out of scope [default: out_of_scope of the TOML file].",
        ),
    ] = None,
) -> None:
    """Fine-tune the models of a study, build cascades of them, and compare the cascades in one table.

    With --known-ratio, a share of the labels is held out instead: a classifier is trained on the other labels, and must
    reject the test texts of those held out. Flags of the training come from [finetune] of the TOML file.

    The output gets the models, the runs and results.json. After an interruption, the same command resumes the study.

    Example: cascade-lab study data/clinc150/study.toml --data clinc150 --init minilm --output runs/study

    Example: cascade-lab study texts.csv --known-ratio 0.25,0.5,0.75 --init minilm --output runs/held-out
    """
    of_ratio = {"--seeds": seeds, "--evidence": evidence, "--accept": accept, "--out-of-scope": out_of_scope}
    given = [name for name, value in of_ratio.items() if value is not None]
    if known_ratio is None and given:
        raise CascadeLabError(f"{given[0]} belongs to a study with held-out labels; give --known-ratio too")
    if known_ratio is None and recipe.suffix.lower() != ".toml":
        raise CascadeLabError(f"{recipe}: is no TOML file of a study; to hold out labels of texts, give --known-ratio")
    folder = recipe.parent if data is None else data
    if known_ratio is None:
        _compare_schemes(recipe, folder, init, output)
        return
    options: dict[str, Any] = {
        "known_ratios": _list(known_ratio, float, "--known-ratio 0.25,0.5,0.75"),
        "seeds": None if seeds is None else _list(seeds, int, "--seeds 0,1,2"),
        "rules": evidence and [_list(rule, str, "--evidence energy,knn") for rule in evidence],
        "accept": accept,
        "out_of_scope": out_of_scope,
    }
    given_options = {key: value for key, value in options.items() if value is not None}
    _hold_out(recipe, folder, init, output, given_options)


def _compare_schemes(recipe: Path, data: Path, init: str, output: Path) -> None:
    with spinner("loading TensorFlow"):
        from cascade_lab.study import run_study
    results = run_study(recipe, data=data, init=init, output=output, progress=shows_progress())
    shown = table("scheme", "seed", "in scope", "reject recall", "paper: in scope", "reject recall")
    for row in results["rows"]:
        sides = (row["test"], row["paper"] or {})
        metrics = [side.get(metric) for side in sides for metric in ("in_scope_accuracy", "reject_recall")]
        shown.add_row(cell(row["scheme"]), str(row["seed"]), *[number(value, ".3f") for value in metrics])
    show(shown)
    line(f"results: {output / 'results.json'}")
    next_step("runs", output)


def _hold_out(recipe: Path, folder: Path, init: str, output: Path, options: dict[str, Any]) -> None:
    with spinner("loading TensorFlow"):
        from cascade_lab.analysis.open_set import OPEN_SET_METRICS
        from cascade_lab.analysis.study_results import HeldOutResults
        from cascade_lab.held_out_labels import run_held_out_study
        from cascade_lab.study import read_recipe
    texts = recipe
    if recipe.suffix.lower() == ".toml":
        content = read_recipe(recipe, ("evaluate", "finetune"))
        texts, own = folder / content["evaluate"], content.get("out_of_scope")
        options = {"flags": content["finetune"], **({} if own is None else {"out_of_scope": own}), **options}
    results = run_held_out_study(texts, init=init, output=output, progress=shows_progress(), **options)
    shown = table("rule", "known", "seeds", *OPEN_SET_METRICS.values(), fold_first=True)
    for (ratio, rule), part in HeldOutResults(results).metrics().groupby(["known_ratio", "rule"], sort=False):
        means = (number(value, ".3f") for value in part["mean"])
        shown.add_row(cell(rule), f"{ratio:g}", str(part["n_seeds"].iloc[0]), *means)
    show(shown)
    line("on test, the mean over the seeds; AUROC: how well the rule ranks known labels above unknown ones")
    line(f"results: {output / 'results.json'}")
    next_step("runs", output)


def _list(text: str, kind: Callable[[str], T], example: str) -> list[T]:
    try:
        return [kind(part.strip()) for part in text.split(",")]
    except ValueError as error:
        raise CascadeLabError(f"'{text}' is not a list of numbers; write it like {example}") from error
