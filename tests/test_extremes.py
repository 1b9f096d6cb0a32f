"""Tests that extreme runs raise no traceback and no RuntimeWarning: what is undefined is NaN, or an error of one line.

Each extreme run goes through every function of `analysis` and `thresholds`, every display (drawn), and every command
that reads runs.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from helpers import memory_run
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, Run, analysis, displays, thresholds
from cascade_lab.analysis import calibration, classification, coverage
from cascade_lab.analysis.latency import latency_summary, predicted_latency, stage_latencies
from cascade_lab.analysis.text_features import features
from cascade_lab.cli import app
from cascade_lab.decisions import decide, softmax
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.explorer import explore
from cascade_lab.thresholds import Goal

LABELS = ("a", "a ", " a")  # equal once they are stripped
TINY, HUGE = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)
KINDS = {
    "one text": {"n": 1},
    "two texts": {"n": 2},
    "three texts": {"n": 3},
    "one label": {"labels": ["a"]},
    "only out of scope": {"labels": ["oos"]},
    "only one out of scope": {"n": 1, "labels": ["oos"]},
    "none out of scope": {"labels": LABELS},
    "no label": {"labels": [None]},
    "one labelled": {"labels": ["a", *[None] * 11]},
    "labelled out of scope only": {"labels": ["oos", None]},
    "no times": {"timed": False},
    "one text, no times": {"n": 1, "timed": False},
    "nothing passes": {"threshold": 1.0, "logits": "low"},
    "nothing passes, no shadow": {"threshold": 1.0, "logits": "low", "shadow": False},
    "everything passes": {"threshold": 0.0},
    "everything is rejected": {"min_probability": 1.0},
    "equal logits": {"logits": "equal"},
    "huge logits": {"logits": "huge"},
    "tiny logits": {"logits": "tiny"},
    "smallest temperature": {"temperature": 5e-324},
    "smallest temperature, equal logits": {"temperature": 5e-324, "logits": "equal"},
    "smallest temperature, huge logits": {"temperature": 5e-324, "logits": "huge"},
    "largest temperature": {"temperature": 1e308},
    "one stage": {"gates": 0},
    "one stage, one text": {"gates": 0, "n": 1},
    "one stage that cannot reject": {"gates": 0, "reject": False, "labels": LABELS},
    "three gates": {"gates": 3},
    "three gates, two texts": {"gates": 3, "n": 2},
    "cannot reject": {"reject": False},
    "equal texts": {"texts": "equal"},
    "empty texts": {"texts": "empty"},
    "no text": {"n": 0},
    "all right": {"logits": "right"},
    "all wrong": {"logits": "wrong"},
}


def extreme_run(
    *,
    n: int = 24,
    labels: Any = (*LABELS, "oos"),
    gates: int = 1,
    threshold: float = 0.5,
    min_probability: float = 0.4,
    temperature: float = 1.0,
    logits: str = "random",
    reject: bool = True,
    timed: bool = True,
    shadow: bool = True,
    texts: str = "",
) -> Run:
    rng = np.random.default_rng(0)
    stages: list[dict[str, Any]] = [
        {"name": f"gate{i}", "labels": ["oos", "in"], "pass_label": "in", "threshold": threshold} for i in range(gates)
    ]
    last: dict[str, Any] = {"name": "last", "labels": list(LABELS)}
    last |= {"reject_label": "oos", "min_probability": min_probability} if reject else {}
    stages = [{**stage, "temperature": temperature} for stage in (*stages, last)]
    spec = CascadeSpec.from_dict({"name": "extreme", "stage": stages})
    rows = max(n, 1)
    y_true = [labels[i % len(labels)] for i in range(rows)]
    words = {"equal": ["pay"] * rows, "empty": [""] * rows}.get(texts, [f"pay {i}" for i in range(rows)])
    examples = pd.DataFrame({"example_id": [f"{i}" for i in range(rows)], "text": words, "text_b": None})
    examples["label"] = pd.Series(y_true, dtype=object)
    values = {}
    for stage in spec.stages:
        shape = (rows, len(stage.labels))
        target = [stage.labels.index(label) if label in stage.labels else len(stage.labels) - 1 for label in y_true]
        hits = np.eye(len(stage.labels))[target]
        values[stage.name] = {
            "random": rng.normal(size=shape) * 2,
            "equal": np.zeros(shape),
            "low": np.tile(np.arange(len(stage.labels))[::-1], (rows, 1)),
            "huge": np.where(rng.random(shape) < 0.5, HUGE, -HUGE),
            "tiny": np.where(rng.random(shape) < 0.5, TINY, -TINY),
            "right": 9 * hits,
            "wrong": -9 * hits,
        }[logits].astype(np.float32)
    run = memory_run(spec, examples, values, shadow=shadow)
    if not timed:
        scores = {stage.name: run.scores(stage.name) for stage in spec.stages}
        run = Run(run.manifest, run.examples, scores, run.predictions, run.timings.iloc[:0])
    return run.select(np.arange(0)) if n == 0 else run


def computations(run: Run) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Yield everything that is computed of a run, by name."""
    stages = [stage.name for stage in run.spec.stages]
    plain = (
        "blame", "blame_counts", "calibration_metrics", "compare_calibrators", "confident_errors", "confused_pairs",
        "confused_texts", "confusion", "counterfactual_matrix", "coverage_metrics", "error_summary", "find_slices",
        "fit_temperatures", "flow", "label_metrics", "metric_intervals", "oracle_ladder", "reliability",
        "risk_coverage", "run_summary", "slices", "tuning_origin", "audit",
    )  # fmt: skip
    for name in plain:
        yield name, partial(getattr(analysis, name), run)
    for name in (
        "confused_pairs",
        "confusion",
        "label_metrics",
        "metric_intervals",
        "reliability",
        "calibration_metrics",
    ):
        for stage in stages:
            yield f"{name} of {stage}", partial(getattr(analysis, name), run, stage)
    yield "near_threshold", lambda: [analysis.near_threshold(run, stage) for stage in stages]
    yield "compare", lambda: analysis.compare(run, run.with_thresholds({}))
    yield "compare other", lambda: analysis.compare(run, run.with_thresholds({stages[0]: 0.9})).to_dict()
    yield "summary", lambda: (run.metrics, repr(run), features(run))
    yield "latency", lambda: (stage_latencies(run), latency_summary(run))
    yield "predicted_latency", lambda: predicted_latency(run, 0.5)
    yield "coverage.operating_point", lambda: coverage.operating_point(run)
    for goal in (
        Goal(maximize="accuracy"),
        Goal(maximize="reject_recall", at_least={"in_scope_accuracy": 0.9}),
        Goal(minimize="mean_cost", costs={"false accept": 5}),
        Goal(maximize="accuracy", prevalence=0.5),
        Goal(maximize="accuracy", at_most={"mean_ms": 1}),
    ):
        yield f"choose {goal}", partial(thresholds.choose, run, goal)
        yield (
            f"tune {goal}",
            lambda goal=goal: (lambda tuning: (repr(tuning), tuning._repr_html_(), tuning.tuned_on))(
                thresholds.tune(run, goal, n_resamples=20)
            ),
        )
    accuracy = Goal(maximize="accuracy")
    yield "tune by label", lambda: thresholds.tune(run, accuracy, by_label=True, n_resamples=20)
    yield "tune guarantee", lambda: thresholds.tune(run, accuracy, guarantee={"in_scope_accuracy": 0.3}, n_resamples=20)
    yield "surface", lambda: thresholds.surface(run)
    for stage in stages:
        yield f"sweep {stage}", partial(thresholds.sweep, run, stage)
    yield "explore", lambda: explore(run).html


def pictures(run: Run) -> Iterator[tuple[str, Callable[[], Any]]]:
    stages = [None, *(stage.name for stage in run.spec.stages)]
    goal = Goal(maximize="accuracy")
    for stage in stages:
        yield f"calibration {stage}", partial(displays.CascadeCalibrationDisplay.from_run, run, stage=stage)
        yield f"confusion {stage}", partial(displays.CascadeConfusionDisplay.from_run, run, stage=stage)
        yield f"threshold {stage}", partial(displays.ThresholdDisplay.from_run, run, stage=stage, n_resamples=20)
    yield "most confused", lambda: displays.CascadeConfusionDisplay.from_run(run).most_confused()
    yield "normalized", lambda: displays.CascadeConfusionDisplay.from_run(run, normalize="true")
    yield "comparison", lambda: displays.ComparisonDisplay.from_runs(run, run)
    yield "counterfactual", lambda: displays.CounterfactualMatrixDisplay.from_run(run)
    yield "oracle", lambda: displays.OracleLadderDisplay.from_run(run)
    yield "flow", lambda: displays.OutcomeFlowDisplay.from_run(run)
    yield "coverage", lambda: displays.RiskCoverageDisplay.from_run(run)
    yield "latency", lambda: displays.StageLatencyDisplay.from_run(run)
    yield "surface", lambda: displays.ThresholdSurfaceDisplay.from_run(run, goal)


def tried(name: str, compute: Callable[[], Any], *, draw: bool = False) -> str:
    """Compute something; return "computed" or "refused", or fail on any other exception and on a RuntimeWarning."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            result = compute()
            if draw:
                result.plot()
                result.frame()
                result.figure_.canvas.draw()
                plt.close("all")
    except CascadeLabError as error:
        n_lines = 1 + str(error).count("\n")
    except Exception as error:
        raise AssertionError(f"{name}: {error!r}") from error
    else:
        return "computed"
    assert n_lines == 1, name
    return "refused"


def commands(run: Path, output: Path) -> list[list[str]]:
    return [
        ["inspect", str(run)],
        ["tune", str(run), "--maximize", "accuracy", "--output", f"{output}.toml", "--overwrite"],
        ["tune", str(run), "--maximize", "accuracy", "--by-label", "--output", f"{output}.toml", "--overwrite"],
        ["calibrate", str(run), "--output", f"{output}.toml", "--overwrite"],
        ["calibrate", str(run), "--method", "auto", "--output", f"{output}.toml", "--overwrite"],
        ["compare", str(run), str(run), "--output", f"{output}.json", "--overwrite"],
        ["audit", str(run), "--output", f"{output}.csv", "--overwrite"],
    ]


def invoke(arguments: list[str]) -> str:
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        result = CliRunner().invoke(app, arguments)
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise AssertionError(f"{arguments}: {result.exception!r}") from result.exception
    assert result.exit_code == 0 or (result.exit_code == 2 and result.stderr.count("\n") == 1), result.output
    assert "nan" not in result.stdout.split(), result.stdout
    return "computed" if result.exit_code == 0 else "refused"


COMPACT = ("one text", "none out of scope", "no label", "nothing passes", "smallest temperature", "no text")


@pytest.fixture(params=[pytest.param(k, marks=() if k in COMPACT else pytest.mark.fuzz) for k in KINDS])
def kind(request) -> str:
    return request.param


@pytest.mark.filterwarnings("ignore:.*slices by wordpieces are left out", "ignore:Glyph")
def test_everything_is_computed_of_an_extreme_run_or_refused_in_one_line(kind):
    run = extreme_run(**KINDS[kind])
    outcomes = Counter(tried(f"{kind}: {name}", compute) for name, compute in computations(run))
    assert outcomes["computed"] >= (1 if kind in ("no text", "no label") else 15), outcomes


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:Glyph")
def test_every_display_of_an_extreme_run_is_drawn_or_refused(kind):
    run = extreme_run(**KINDS[kind])
    outcomes = Counter(tried(f"{kind}: {name}", make, draw=True) for name, make in pictures(run))
    print(f"\n{kind}: displays {dict(outcomes)}")


@pytest.mark.fuzz
@pytest.mark.filterwarnings("ignore:.*slices by wordpieces are left out")
def test_every_command_takes_an_extreme_run_or_refuses_it(kind, tmp_path):
    run = extreme_run(**KINDS[kind])
    if not len(run.examples):
        with pytest.raises(CascadeLabError, match="no example"):
            run.write(tmp_path / "run")
        return
    run.write(tmp_path / "run")
    print(
        f"\n{kind}: commands {dict(Counter(invoke(command) for command in commands(tmp_path / 'run', tmp_path / 'o')))}"
    )


@pytest.mark.filterwarnings("ignore:Glyph")
def test_a_display_of_one_text_is_drawn():
    outcomes = Counter(tried(name, make, draw=True) for name, make in pictures(extreme_run(n=1)))
    assert outcomes["computed"] > 10


@pytest.mark.parametrize("temperature", [5e-324, 1e-300, 1.0, 1e308])
def test_probabilities_at_extreme_logits_and_temperatures(temperature):
    """The highest logit has the highest probability; a row that has no distribution is NaN, without a warning."""
    rows = np.array(
        [[0, 1], [-HUGE, HUGE], [HUGE, HUGE], [-np.inf, 0], [np.nan, 0], [np.inf, 0], [np.inf, np.inf], [-np.inf] * 2]
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p = softmax(rows, temperature)
        scores = calibration.class_confidences([1] * 4, rows[:4], temperature=temperature)
    assert (p[:2, 1] >= 0.5).all()
    np.testing.assert_array_equal(p[2], [0.5, 0.5])
    np.testing.assert_array_equal(p[3], [0, 1])
    assert np.isnan(p[4:]).all()
    np.testing.assert_allclose(scores.confidence, p[:4].max(axis=1))
    assert (scores.log_loss >= 0).all()
    if temperature == 1e308:
        np.testing.assert_allclose(p[0], [0.5, 0.5])
    if temperature < 1:
        np.testing.assert_array_equal(p[0], [0, 1])


def test_statistics_of_no_value_are_nan():
    nothing = np.array([], dtype=float)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert calibration.calibration_error(nothing, nothing).isna().all(axis=None)
        assert np.isnan(classification.macro_f1_score(np.array([], dtype=object), np.array([], dtype=object)))
        assert len(decide(extreme_run().spec.last, np.zeros((0, 3))).label) == 0
