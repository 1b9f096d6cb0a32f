import numpy as np
import pandas as pd
from random_runs import random_run

from cascade_lab.analysis.metrics import figures_of
from cascade_lab.analysis.outcomes import ERRORS, OUTCOMES, RIGHT, RIGHT_REJECT, outcome_counts, outcomes


def test_six_hand_written_texts_have_the_six_outcomes(tmp_path):
    """Two gates with rejects oos0 and oos1, then label0 to label3."""
    spec = random_run(tmp_path / "run", n_gates=2).spec
    y_true = ["label0", "oos1", "label1", "oos0", "label2", "oos1"]
    y_pred = ["label0", "oos1", "oos1", "label1", "label3", "oos0"]
    assert outcomes(spec, y_true, y_pred).tolist() == list(OUTCOMES)


def test_outcomes_add_up_to_the_figures_of_the_run(tmp_path):
    for n_gates in (0, 1, 3):
        run = random_run(tmp_path / f"run{n_gates}", n_gates=n_gates)
        counts = outcome_counts(run.spec, run.predictions)
        figures = figures_of(run.spec, run.predictions)
        assert counts.sum() == len(run.examples)
        assert np.isclose((counts[RIGHT] + counts[RIGHT_REJECT]) / counts.sum(), figures["accuracy"])
        wrong = run.predictions["label"] != run.predictions["predicted"]
        assert counts[list(ERRORS)].sum() == wrong.sum()


def test_no_texts_have_no_outcomes(tmp_path):
    spec = random_run(tmp_path / "run").spec
    nothing = pd.DataFrame({"label": [], "predicted": []}, dtype=object)
    assert outcome_counts(spec, nothing).sum() == 0
