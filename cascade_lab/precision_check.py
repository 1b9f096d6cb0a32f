"""Compares the logits and answers of one cascade in bfloat16 and in float32 on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.decisions import route
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import RunError
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage
from cascade_lab.stage_output import StageOutput, decide_from_outputs


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
    arrays, with_features = spec.read_arrays(), spec.feature_stages
    n, rows = len(evalset), []
    exact: dict[str, StageOutput] = {}
    other: dict[str, StageOutput] = {}
    with tqdm(total=2 * n * len(spec.stages), unit="score", disable=not progress) as bar:
        for stage in spec.stages:
            in_both = ((other, lower[stage.name]), (exact, replace(stage, precision="float32")))
            for outputs, stage_spec in in_both:
                bar.set_description(f"{stage_spec.name} in {stage_spec.precision}")
                with quiet(f"loading {stage_spec.name}"):
                    loaded = Stage(stage_spec, features=stage.name in with_features)
                with loaded:
                    encodings = loaded.encode(evalset.texts, evalset.texts_b)
                    outputs[stage.name] = loaded.score(encodings, done=bar.update)[0]
            difference = np.abs(other[stage.name].logits - exact[stage.name].logits)
            rms, p99 = np.sqrt(np.mean(difference**2)), np.quantile(difference, 0.99)
            rows.append((stage.name, lower[stage.name].precision, rms, p99, difference.max()))
    table = pd.DataFrame(rows, columns=["stage", "precision", "rms", "p99", "max"]).set_index("stage")
    decisions = [
        {stage.name: decide_from_outputs(spec, stage, outputs, arrays)[0] for stage in spec.stages}
        for outputs in (exact, other)
    ]
    table["n_changed"] = [int((decisions[0][name].label != decisions[1][name].label).sum()) for name in table.index]
    predicted = [route(spec, decided).predicted for decided in decisions]
    differs = np.flatnonzero(predicted[0] != predicted[1])
    texts = evalset.examples.iloc[differs][["text", "label"]].reset_index(drop=True)
    texts["float32"], texts["lower"] = (labels[differs] for labels in predicted)
    return PrecisionCheck(table, texts, n)
