"""Compares the logits and answers of one cascade in bfloat16 and in float32 on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.decisions import decide, route
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import RunError
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage


class PrecisionCheck(NamedTuple):
    """A cascade in a lower precision against itself in float32; every stage scored every text.

    Attributes
    ----------
    stages : DataFrame
        One row per stage: `precision`; the root mean square, the 99th percentile and the maximum of the absolute
        differences of logits (`rms`, `p99`, `max`); and `n_changed`, how many of the stage's own decisions differ.
    changed : DataFrame
        The texts whose final answer differs: `text`, `label`, and the answers `float32` and `lower`.
    n_examples : int
    """

    stages: pd.DataFrame
    changed: pd.DataFrame
    n_examples: int


def verify_precision(
    spec: CascadeSpec,
    evalset: EvalSet,
    *,
    progress: bool = False,
    quiet: Callable[[str], AbstractContextManager[None]] = lambda doing: nullcontext(),
) -> PrecisionCheck:
    """Score an eval set in float32 and in the cascade's own precision, or in bfloat16 where that is float32.

    Parameters
    ----------
    spec : CascadeSpec
    evalset : EvalSet
    progress : bool
        Show a progress bar.
    quiet : callable
        Returns a context manager in which a stage is loaded; takes a description of what is being done.

    Raises
    ------
    CheckpointError
        The processor cannot multiply bfloat16, or a stage's files are not usable.
    RunError
        A stage has the reference engine, which computes in float32 only.
    """
    from tqdm.auto import tqdm

    for stage in spec.stages:
        if stage.engine != "fast":
            raise RunError(f"stage '{stage.name}': the reference engine has float32 only; set engine = \"fast\"")
    in_float32 = all(stage.precision == "float32" for stage in spec.stages)
    lower = {s.name: replace(s, precision="bfloat16") if in_float32 else s for s in spec.stages}
    n, rows = len(evalset), []
    exact: dict[str, np.ndarray] = {}
    other: dict[str, np.ndarray] = {}
    with tqdm(total=2 * n * len(spec.stages), unit="score", disable=not progress) as bar:
        for stage in spec.stages:
            in_both = ((other, lower[stage.name]), (exact, replace(stage, precision="float32")))
            for logits, stage_spec in in_both:
                bar.set_description(f"{stage_spec.name} in {stage_spec.precision}")
                with quiet(f"loading {stage_spec.name}"):
                    loaded = Stage(stage_spec)
                with loaded:
                    encodings = loaded.encode(evalset.texts, evalset.texts_b)
                    logits[stage.name] = loaded.score(encodings, done=bar.update)[0].logits
            difference = np.abs(other[stage.name] - exact[stage.name])
            changed = int((decide(stage, exact[stage.name]).label != decide(stage, other[stage.name]).label).sum())
            rms, p99 = np.sqrt(np.mean(difference**2)), np.quantile(difference, 0.99)
            rows.append((stage.name, lower[stage.name].precision, rms, p99, difference.max(), changed))
    columns = ["stage", "precision", "rms", "p99", "max", "n_changed"]
    predicted = [
        route(spec, {stage.name: decide(stage, logits[stage.name]) for stage in spec.stages}).predicted
        for logits in (exact, other)
    ]
    differs = np.flatnonzero(predicted[0] != predicted[1])
    texts = evalset.examples.iloc[differs][["text", "label"]].reset_index(drop=True)
    texts["float32"], texts["lower"] = (labels[differs] for labels in predicted)
    return PrecisionCheck(pd.DataFrame(rows, columns=columns).set_index("stage"), texts, n)
