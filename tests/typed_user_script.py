"""A user's script over the main public names; `make types` checks it with mypy, and `test_types.py` runs it."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import pandas as pd

from cascade_lab import CascadeConfusionDisplay, CascadeSpec, EvalSet, OracleLadderDisplay, Run, StageSpec
from cascade_lab.analysis import blame_counts, compare, oracle_ladder
from cascade_lab.thresholds import Goal, tune


def make_run(seed: int, n: int = 200) -> Run:
    """Make a run from logits that another program computed: here they are random."""
    rng = np.random.default_rng(seed)
    gate = StageSpec("gate", ("oos", "in"), pass_label="in", threshold=0.5)
    topic = StageSpec("topic", ("pay", "play", "weather"), reject_label="oos")
    examples = pd.DataFrame({"text": [f"text {i}" for i in range(n)], "label": [*topic.labels, "oos"] * (n // 4)})
    logits = {stage.name: rng.normal(size=(n, len(stage.labels))) for stage in (gate, topic)}
    return Run.from_logits(CascadeSpec("example", (gate, topic)), EvalSet.from_frame(examples), logits)


def main(folder: Path) -> dict[str, float]:
    run = make_run(seed=0).write(folder / "run")
    tuning = tune(run, Goal(maximize="accuracy", at_least={"reject_recall": 0.3}), n_resamples=50, n_repeats=1)
    tuned_run = Run.read(folder / "run").with_spec(tuning.spec)
    print(blame_counts(run), oracle_ladder(run), compare(run, tuned_run).metrics, sep="\n")
    CascadeConfusionDisplay.from_run(run, stage="topic").plot().figure_.savefig(folder / "confusion.png")
    ladder: pd.DataFrame = OracleLadderDisplay.from_run(run).frame()
    return {"n_rungs": float(len(ladder)), "accuracy": tuned_run.metrics["end_to_end"]["accuracy"]}


if __name__ == "__main__":
    print(main(Path(sys.argv[1])))
