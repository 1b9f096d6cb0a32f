"""Runs of random cascades, written without TensorFlow: any number of gates, logits drawn by chance."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from cascade_lab.run import SCHEMA_VERSION, Run, Scores, write_json, write_tables
from cascade_lab.serial import serve
from cascade_lab.spec import CascadeSpec


def random_run(
    folder: Path, *, n: int = 200, n_gates: int = 1, n_labels: int = 4, seed: int = 0, skill: float = 1.5
) -> Run:
    """Write a run of `n` texts through `n_gates` gates and a last stage that may reject, with shadow scores.

    Every gate rejects with a label of its own, `oos0`, `oos1`, …; the last stage with `oos0`. `skill` is how far the
    gold label's logit stands above the others.
    """
    rng = np.random.default_rng(seed)
    rejects = [f"oos{i}" for i in range(max(n_gates, 1))]
    common = {"init_checkpoint": "none", "bert_config_file": "none", "vocab_file": "none"}
    tables = [
        {"name": f"gate{i}", "labels": [rejects[i], "in"], "pass_label": "in", "threshold": 0.5, **common}
        for i in range(n_gates)
    ]
    labels = [f"label{i}" for i in range(n_labels)]
    tables.append({"name": "last", "labels": labels, "reject_label": "oos0", **common})
    spec = CascadeSpec.from_dict({"name": "random", "stage": tables})
    gold = rng.choice([*labels, *rejects[:n_gates], *rejects[:n_gates]], n) if n_gates else rng.choice(labels, n)
    examples = pd.DataFrame(
        {
            "example_id": [f"{i}" for i in range(n)],
            "text": [" ".join(rng.choice(["pay", "the", "bill", "now"], rng.integers(1, 9))) for _ in range(n)],
            "text_b": None,
            "label": gold,
        }
    )
    logits = {}
    for stage in spec.stages:
        scores = rng.normal(size=(n, len(stage.labels)))
        for row, label in enumerate(gold):
            if label in stage.labels:
                scores[row, stage.labels.index(label)] += skill
            elif stage.is_gate and not label.startswith("oos"):
                scores[row, stage.labels.index(stage.pass_label)] += skill
        logits[stage.name] = scores.astype(np.float32)
    return write_run(folder, spec, examples, logits, seed=seed)


def write_run(
    folder: Path,
    spec: CascadeSpec,
    examples: pd.DataFrame,
    logits: dict[str, np.ndarray],
    *,
    seed: int = 0,
    shadow: bool = True,
) -> Run:
    """Write the run that a cascade makes of `examples` if its stages say `logits`, rows as in `examples`."""
    n = len(examples)
    answers = serve(spec, logits)
    place = [stage.name for stage in spec.stages]
    stopped_at = answers["decided_by"].map(place.index).to_numpy()
    kept = {}
    for name in place:
        off = stopped_at < place.index(name)
        rows = np.arange(n) if shadow else np.flatnonzero(~off)
        kept[name] = Scores(rows, logits[name][rows], off[rows])
    timings = pd.DataFrame(
        {
            "stage": place,
            "batch": 0,
            "n_examples": [int((stopped_at >= i).sum()) for i in range(len(place))],
            "sequence_length": 9,
            "n_tokens": 9,
            "tokenize_seconds": 0.001,
            "run_seconds": 0.01,
        }
    )
    folder.mkdir(parents=True)
    contents = write_tables(folder, examples, kept, answers, timings)
    write_json(
        folder / "manifest.json",
        {
            "schema_version": SCHEMA_VERSION,
            "run_id": f"random-{seed}",
            "cascade": spec.to_dict(),
            "thresholds": spec.thresholds,
            "tuned_on": None,
            "evalset": {"path": "random.tsv", "sha256": f"{seed:064x}", "split": None, "n_examples": n},
            "inputs": {},
            "contents": contents,
            "stages": {},
            "batch_size": 32,
            "shadow": shadow,
        },
    )
    return Run.read(folder)
