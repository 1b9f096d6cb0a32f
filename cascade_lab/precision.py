"""What another precision changes: logits and answers of one cascade in bfloat16 and in float32, on the same texts."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import pandas as pd

from cascade_lab.errors import RunError
from cascade_lab.evalset import EvalSet
from cascade_lab.serial import answer, serve
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage


class PrecisionCheck(NamedTuple):
    """A cascade in a lower precision against itself in float32; every stage scored every text.

    Attributes
    ----------
    stages : DataFrame
        A stage a row: `precision`, the root of the mean square, the 99th percentile and the maximum of the logits'
        differences (`rms`, `p99`, `max`), and `n_changed`, how many of its own answers differ.
    changed : DataFrame
        The texts that the cascade answers otherwise: `text`, `label`, and the answers, `float32` and `lower`.
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
        A context in which a stage is loaded; takes what is being done.

    Raises
    ------
    CheckpointError
        The processor does not multiply bfloat16, or a stage's files are not usable.
    RunError
        A stage has the reference engine, which has float32 alone.
    """
    from tqdm.auto import tqdm

    for stage in spec.stages:
        if stage.engine != "fast":
            raise RunError(f"stage '{stage.name}': the reference engine has float32 alone; set engine = \"fast\"")
    in_float32 = all(stage.precision == "float32" for stage in spec.stages)
    lower = {s.name: replace(s, precision="bfloat16") if in_float32 else s for s in spec.stages}
    n, rows = len(evalset), []
    exact: dict[str, np.ndarray] = {}
    other: dict[str, np.ndarray] = {}
    with tqdm(total=2 * n * len(spec.stages), unit="score", disable=not progress) as bar:
        for stage in spec.stages:
            for kept, one in ((other, lower[stage.name]), (exact, replace(stage, precision="float32"))):
                bar.set_description(f"{one.name} in {one.precision}")
                with quiet(f"loading {one.name}"):
                    loaded = Stage(one)
                with loaded:
                    encodings = loaded.encode(evalset.texts, evalset.texts_b)
                    kept[stage.name], _ = loaded.score(encodings, done=bar.update)
            difference = np.abs(other[stage.name] - exact[stage.name])
            said = [answer(stage, kept[stage.name]) for kept in (exact, other)]
            words = [np.where(one.passes, stage.pass_label, one.predicted) for one in said]
            rms, p99 = np.sqrt(np.mean(difference**2)), np.quantile(difference, 0.99)
            changed = int((words[0] != words[1]).sum())
            rows.append((stage.name, lower[stage.name].precision, rms, p99, difference.max(), changed))
    columns = ["stage", "precision", "rms", "p99", "max", "n_changed"]
    answers = [serve(spec, kept) for kept in (exact, other)]
    differ = np.flatnonzero(answers[0]["predicted"] != answers[1]["predicted"])
    changed = evalset.examples.iloc[differ][["text", "label"]].reset_index(drop=True)
    changed["float32"], changed["lower"] = (one["predicted"].to_numpy()[differ] for one in answers)
    return PrecisionCheck(pd.DataFrame(rows, columns=columns).set_index("stage"), changed, n)
