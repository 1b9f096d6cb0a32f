"""Monitoring of runs: what is compared, by day, and the thresholds that are proposed; the command `monitor`."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from helpers import logits_of, memory_run, random_run, random_spec
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, MonitorDisplay, Run
from cascade_lab.analysis.monitoring import FEWER_REJECTS, LOW_CONFIDENCE, MORE_REJECTS, monitor
from cascade_lab.cli import app
from cascade_lab.exceptions import GoalError, RunError
from cascade_lab.thresholds import Goal, choose, propose_thresholds

N = 1200


def traffic(
    seed: int, *, out_of_scope: float = 0.1, n: int = N, labelled: bool = True, days: int = 0, moved: float = 0.0
) -> Run:
    """Return a run of a gate and four labels; `moved` is added to the gate's log-odds of texts in scope."""
    rng, spec = np.random.default_rng(seed), random_spec()
    labels = np.where(rng.random(n) < out_of_scope, "oos0", rng.choice(spec.last.labels, n))
    inside = labels != "oos0"
    last = rng.normal(size=(n, 4)) + 4 * (labels[:, None] == np.array(spec.last.labels))
    gate = np.stack([np.zeros(n), rng.normal(np.where(inside, 3 + moved, -2), 1.5)], axis=1)
    ids = [f"{seed}-{i}" for i in range(n)]
    examples = pd.DataFrame({"example_id": ids, "text": ids, "text_b": None, "label": labels if labelled else None})
    if days:
        starts = pd.date_range("2026-11-01", periods=days, tz="UTC").repeat(n // days)
        examples["time"] = starts + pd.Timedelta(hours=23, minutes=59)
    return memory_run(spec, examples, {"gate0": gate.astype(np.float32), "last": last.astype(np.float32)}, seed=seed)


@pytest.fixture(scope="module")
def reference():
    return traffic(0)


def cascade_lab(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def test_the_quantities_are_those_of_the_two_runs(reference):
    run = traffic(1, labelled=False)
    found = monitor(run, reference, n_resamples=5)
    rejected = [(each.predictions["predicted"] == "oos0").mean() for each in (reference, run)]
    assert found.changes.loc["reject rate", ["then", "now"]].tolist() == pytest.approx(rejected)
    reach = [(each.decision("gate0").confidence >= 0.5).mean() for each in (reference, run)]
    assert found.changes.loc["reach of last", ["then", "now"]].tolist() == pytest.approx(reach)
    assert found.changes.loc["confidence of last", "n_now"] == (run.decision("gate0").confidence >= 0.5).sum()
    assert len(found.changes) == 6
    assert found.labels["now"].sum() == pytest.approx(1)


def test_quiet_traffic_raises_nothing_and_its_estimates_are_near_the_truth(reference):
    found = monitor(traffic(2, days=4), reference)
    assert found.raised.empty
    assert (found.changes["p_holm"] > 0.05).all()
    assert found.only_prevalence
    accuracy = found.run.metrics["end_to_end"]["accuracy"]
    truth = [(found.run.examples["label"] == "oos0").mean()] * 2 + [accuracy] * 2
    assert ((found.estimates["low"] <= truth) & (truth <= found.estimates["high"])).all()
    assert "No alarm" in found.summary()[0]


def test_more_texts_out_of_scope_raise_an_alarm_and_the_new_prevalence_is_estimated(reference):
    run = traffic(3, out_of_scope=0.35, labelled=False, days=4)
    found = monitor(run, reference)
    assert MORE_REJECTS in found.raised["watch"].tolist()
    assert FEWER_REJECTS not in found.raised["watch"].tolist()
    assert found.alarms.loc[MORE_REJECTS].index.tolist() == [f"2026-11-0{day}" for day in range(1, 5)]
    assert found.raised["began"].iloc[0] == "2026-11-01"
    em, black_box = found.estimates["now"].iloc[:2]
    assert em == pytest.approx(0.35, abs=0.06)
    assert black_box == pytest.approx(0.35, abs=0.06)
    assert found.only_prevalence
    assert "the change began about 2026-11-01" in found.summary()[0]


def test_texts_that_look_different_are_not_taken_for_another_prevalence(reference):
    found = monitor(traffic(4, moved=-2.0, labelled=False), reference)
    assert not found.only_prevalence
    assert any("do not hold" in sentence for sentence in found.summary())


def test_a_reference_with_other_thresholds_is_replayed_at_those_of_the_run(reference):
    run = traffic(5)
    at_other = reference.with_thresholds({"gate0": 0.9})
    pd.testing.assert_frame_equal(
        monitor(run, at_other, n_resamples=2).changes, monitor(run, reference, n_resamples=2).changes
    )


def test_a_reference_without_labels_shows_changes_and_alarms_only(reference):
    found = monitor(reference, traffic(6, labelled=False))
    assert found.estimates is None
    assert found.only_prevalence is None
    assert "no labels" in found.summary()[-1]
    assert len(found.alarms.loc[LOW_CONFIDENCE]) == 1
    assert not found.has_days


def test_one_text_gives_no_estimate_and_no_thresholds(reference, tmp_path):
    reference.write(tmp_path / "val")
    traffic(9, n=1).write(tmp_path / "one")
    options = ("monitor", tmp_path / "one", "--against", tmp_path / "val")
    shown = cascade_lab(*options).stdout
    assert "100.0%" not in shown
    assert "Prevalence and accuracy are not estimated: at least 20 labelled texts" in shown
    assert "the prevalence is not known" in shown
    assert cascade_lab(*options, "--output", tmp_path / "new.toml").exit_code == 2


def test_the_summary_says_which_texts_the_accuracy_leaves_out(reference):
    only_gate = reference.select(np.flatnonzero(reference.predictions["decided_by"] == "gate0"))
    found = monitor(reference, only_gate, n_resamples=2)
    n = (reference.predictions["decided_by"] == "last").sum()
    assert f"leaves out {n:,} of 1,200 texts" in found.summary()[-1]


def test_one_text_is_counted_in_the_singular(reference):
    found = monitor(traffic(9, n=1), reference, n_resamples=2)
    assert "(1 text against 1,200;" in found.summary()[0]
    assert MonitorDisplay(monitor(reference, traffic(9, n=1))).title.endswith("against 1 text")


def test_labels_that_changed_together_only_are_in_the_summary(reference):
    found = monitor(traffic(2), reference, n_resamples=2)
    assert "No quantity differs by more than chance" in str(found.summary())
    changes = found.changes.copy()
    changes.loc["predicted labels", ["difference", "p_holm"]] = 0.125, 0.01
    summary = replace(found, changes=changes, labels=found.labels.assign(p_holm=0.2)).summary()
    assert (
        "Changed: predicted labels (total variation distance 0.125), but no single label differs by more than chance."
        in summary
    )
    assert "No quantity differs" not in str(summary)
    singly = replace(found, changes=changes, labels=found.labels.assign(p_holm=0.01)).summary()
    assert "Changed: predicted labels" not in str(singly)


def test_unequal_weights_of_labels_are_named_where_they_are_left_out(reference, tmp_path):
    """A reference and traffic whose labels have the weights 1 and 2; with equal weights nothing is said."""
    sides = {"val": reference, "week": traffic(2, n=300)}
    for name, run in sides.items():
        for kind, weights in (("equal", 2.0), ("unequal", np.arange(len(run.examples)) % 2 + 1.0)):
            examples = run.examples.assign(label_weight=weights)
            memory_run(run.spec, examples, logits_of(run), seed=0).write(tmp_path / f"{name}-{kind}")
    for val, week, named in (
        ("unequal", "equal", "the reference"),
        ("equal", "unequal", "the run"),
        ("unequal", "unequal", "the reference and of the run"),
        ("equal", "equal", None),
    ):
        found = monitor(Run.read(tmp_path / f"week-{week}"), Run.read(tmp_path / f"val-{val}"), n_resamples=2)
        said = [sentence for sentence in found.summary() if "unequal weights" in sentence]
        assert len(said) == (named is not None)
        assert named is None or f"The labels of {named} have unequal weights" in said[0]
    shown = cascade_lab("monitor", tmp_path / "week-equal", "--against", tmp_path / "val-unequal").stdout
    assert "The labels of the reference have unequal weights" in shown
    assert "the labels have unequal weights, which these metrics leave out" in shown


def test_runs_that_cannot_be_compared_are_refused(reference, tmp_path):
    with pytest.raises(RunError, match="stages or their labels"):
        monitor(random_run(tmp_path / "a", n=20, n_labels=3), reference)
    with pytest.raises(RunError, match="one day per text"):
        monitor(reference, reference, days=[1, 2])
    with pytest.raises(RunError, match="no texts"):
        monitor(reference.select(np.array([], dtype=int)), reference)


def test_proposed_thresholds_are_those_of_the_goal_at_the_prevalence(reference):
    proposal = propose_thresholds(reference, Goal("accuracy"), (0.4, 0.3, 0.5))
    chosen = choose(reference, Goal("accuracy", prevalence=0.4))
    assert proposal.thresholds["chosen"].to_dict() == chosen.thresholds
    assert proposal.metrics["chosen"].to_dict() == pytest.approx(chosen.metrics)
    own = choose(reference, Goal("accuracy", prevalence=0.3)).thresholds
    assert proposal.thresholds["at_low"].to_dict() == own
    assert proposal.depends_on_prevalence
    assert not propose_thresholds(reference, Goal("reject_recall"), (0.0, 0.0, 1.0)).depends_on_prevalence
    with pytest.raises(GoalError, match="prevalence is not known"):
        propose_thresholds(reference, Goal("accuracy"), (np.nan,) * 3)


def test_the_command_shows_all_and_writes_only_where_it_is_told(reference, tmp_path):
    reference.write(tmp_path / "val")
    traffic(7, out_of_scope=0.3, labelled=False, days=3).write(tmp_path / "week")
    result = cascade_lab("monitor", tmp_path / "week", "--against", tmp_path / "val")
    assert result.exit_code == 0, result.output
    for part in ("reject rate", "more rejects", "2026-11-01", "prevalence_em", "proposed", "Alarm, more rejects"):
        assert part in result.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["val", "week"]
    result = cascade_lab(
        "monitor", tmp_path / "week", "--against", tmp_path / "val", "--output", tmp_path / "new.toml",
        "--maximize", "coverage", "--at-most", "risk=0.2",
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    spec = CascadeSpec.read(tmp_path / "new.toml")
    assert spec.tuned_on["prevalence"] == pytest.approx(0.3, abs=0.06)


def test_the_command_says_that_a_watch_needs_all_its_days(reference, tmp_path):
    for name, run in (("val", reference), ("day", traffic(2, n=100))):
        run.write(tmp_path / name)
    shown = cascade_lab("monitor", tmp_path / "day", "--against", tmp_path / "val").stdout
    assert "if each run has all days since the watch began" in " ".join(shown.split())
    assert "a run of one day alone starts the watch anew" in " ".join(cascade_lab("monitor", "--help").stdout.split())


def test_the_command_refuses_in_one_line(reference, tmp_path):
    traffic(8, labelled=False, n=100).write(tmp_path / "week")
    options = ("monitor", tmp_path / "week", "--against", tmp_path / "week")
    assert "no thresholds are proposed" in cascade_lab(*options).stdout
    for extra in (("--output", tmp_path / "new.toml"), ("--maximize", "x"), ("--alpha", "2"), ("--cost", "x=1")):
        result = cascade_lab(*options, *extra)
        assert result.exit_code == 2
        assert "Traceback" not in result.output
        assert not (tmp_path / "new.toml").exists()
    assert cascade_lab(*options[:3], tmp_path / "no").exit_code == 2


def test_the_display_shows_the_days_and_the_alarm(reference):
    found = monitor(traffic(3, out_of_scope=0.35), reference, days=np.arange(N) // 300, n_resamples=2)
    display = MonitorDisplay(found).plot()
    rates = next(line for line in display.ax_.lines if line.get_label() == "rate of the day")
    assert rates.get_ydata() == pytest.approx(found.alarms.loc[MORE_REJECTS, "rate"].to_numpy())
    assert any(text.get_text().startswith("alarm, ") for text in display.ax_.get_legend().get_texts())
    quiet = MonitorDisplay.from_run(traffic(2), reference, low_confidence=True, n_resamples=2).plot()
    assert quiet.frame().index.unique("watch").tolist() == [LOW_CONFIDENCE]
    assert not any(text.get_text().startswith("alarm, ") for text in quiet.ax_.get_legend().get_texts())
