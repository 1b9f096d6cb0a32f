"""A run of a service's traffic log: its replay equals the served answers, whatever the cascade and the parts."""

from __future__ import annotations

from datetime import datetime, timezone
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from helpers import answered_batches, mixed_run, random_run, run_of_probabilities, served_cascade
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from cascade_lab.cli import app
from cascade_lab.exceptions import EvalSetError, RunError
from cascade_lab.label_files import read_labels
from cascade_lab.run import Run
from cascade_lab.serving.answered import Answered
from cascade_lab.serving.collect import collect
from cascade_lab.serving.log_files import SeenRows, ShadowScores
from cascade_lab.serving.shadow import ShadowQueue, is_chosen
from cascade_lab.serving.traffic_log import TrafficLog
from cascade_lab.stage_output import StageOutput
from cascade_lab.thresholds import Goal, choose

START = 1.75e9


def deferral_run(seed: int, *, n: int = 50) -> Run:
    """Return a run of a gate, a deferral stage and a last stage that rejects by a rejector."""
    rng = np.random.default_rng(seed)
    rejector = {"evidence": ["small.energy", "large.margin"], "weights": [0.4, 0.7], "bias": -1.0}
    labels = ["a", "b", "c"]
    stages = [
        {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": float(rng.random())},
        {"name": "small", "labels": labels, "role": "deferral", "threshold": float(rng.random())},
        {"name": "large", "labels": labels, "reject_label": "oos", "min_probability": 0.4, "rejector": rejector},
    ]
    probabilities = {s["name"]: rng.dirichlet(np.ones(len(s["labels"])), n) + 1e-6 for s in stages}
    without = [{key: value for key, value in stage.items() if key != "rejector"} for stage in stages]
    run = run_of_probabilities(without, rng.choice([*labels, "oos"], n).tolist(), probabilities)
    spec = type(run.spec).from_dict({"name": "deferral", "stage": stages})
    return run.with_spec(spec)


def log_run(folder: Path, run: Run, *, seed: int = 0, shadow: float = 0.0, start: float = START, **options) -> None:
    """Log the texts of a run as a service does, and the shadow scores that it would make of them."""
    with TrafficLog(folder, shadow=shadow, **options) as log:
        for batch in answered_batches(run, seed=seed, start=start, max_size=100):
            log.add(batch)
            if shadow:
                log.add_shadow(shadow_scores(run, batch, shadow))


def shadow_scores(run: Run, batch: Answered, share: float) -> ShadowScores:
    rows = pd.Index(run.examples["example_id"]).get_indexer(batch.ids)
    chosen = np.flatnonzero(is_chosen(batch.ids, share))
    scores = {}
    for name, seen in batch.scores.items():
        missing = np.flatnonzero(~np.isin(chosen, seen.rows))
        scores[name] = SeenRows(missing, run.scores(name).logits[rows[chosen[missing]]])
    return ShadowScores(batch.cascade, [batch.ids[i] for i in chosen], batch.times[chosen], scores, {})


def same_answers(found: Run, run: Run) -> None:
    columns = ["example_id", "predicted", "decided_by", "probability", "confidence"]
    for answers in (found.predictions, found.replay()):
        pd.testing.assert_frame_equal(answers[columns], run.predictions[columns], check_exact=True)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), deferral=st.booleans(), max_size=st.integers(1, 60))
def test_a_replay_equals_the_served_answers(seed, deferral, max_size, tmp_path_factory):
    run = deferral_run(seed) if deferral else mixed_run(seed)
    folder = tmp_path_factory.mktemp("log")
    with TrafficLog(folder) as log:
        for batch in answered_batches(run, seed=seed, max_size=max_size):
            log.add(batch)
    found = collect(folder)
    same_answers(found.run, run)
    assert (found.notes, found.n_lost, found.n_repeated, found.n_differing) == ((), 0, 0, 0)
    for stage in run.spec.stages:
        reached = found.run.scores(stage.name).scored
        np.testing.assert_array_equal(
            found.run.scores(stage.name).logits[reached], run.scores(stage.name).logits[reached]
        )


def test_a_written_run_is_read_back(tmp_path):
    run = random_run(tmp_path / "run", n=80)
    log_run(tmp_path / "log", run, keep_texts=True)
    written = collect(tmp_path / "log").run.write(tmp_path / "out")
    written.check()
    same_answers(Run.read(tmp_path / "out"), run)
    assert written.manifest["source"] == "service"
    assert written.examples["text"].tolist() == run.examples["text"].tolist()
    assert written.examples["time"][1].isoformat() == "2025-06-15T15:06:40.001000+00:00"
    with pytest.raises(RunError, match="no example has a label"):
        _ = written.labelled


def test_texts_are_logged_only_if_asked_for(tmp_path):
    run = random_run(tmp_path / "run", n=30)
    log_run(tmp_path / "log", run)
    assert all(
        text.encode() not in path.read_bytes() for path in (tmp_path / "log").iterdir() for text in run.examples["text"]
    )
    assert collect(tmp_path / "log").run.examples["text"].tolist() == run.examples["example_id"].tolist()


@pytest.mark.parametrize("deferral", [False, True])
def test_the_sample_replays_at_other_thresholds_like_a_live_run_at_these(deferral, tmp_path):
    run = deferral_run(5, n=1500) if deferral else random_run(tmp_path / "run", n=1500, n_gates=2)
    log_run(tmp_path / "log", run, shadow=0.2)
    found = collect(tmp_path / "log", sample=True)
    rows = np.flatnonzero(is_chosen(run.examples["example_id"].tolist(), 0.2))
    assert 250 < len(rows) < 350
    other = {stage.name: 0.123 for stage in run.spec.stages[:-1]}
    live = run.select(rows).with_thresholds(other)
    same_answers(found.run.with_thresholds(other), live)
    assert found.run.write(tmp_path / "out").replay(other).equals(found.run.replay(other))
    whole = collect(tmp_path / "log").run
    with pytest.raises(RunError, match="never scored"):
        whole.with_thresholds(other)


def test_shadow_scores_that_are_missing_are_counted(tmp_path):
    run = random_run(tmp_path / "run", n=200)
    with TrafficLog(tmp_path / "log", shadow=0.5) as log:
        for i, batch in enumerate(answered_batches(run)):
            log.add(batch)
            if i % 2:
                log.add_shadow(shadow_scores(run, batch, 0.5))
    found = collect(tmp_path / "log", sample=True)
    assert found.n_unscored > 0
    assert len(found.run.examples) + found.n_unscored == is_chosen(run.examples["example_id"], 0.5).sum()
    n_chosen = found.n_unscored + len(found.run.examples)
    assert f"{found.n_unscored} of {n_chosen} texts of the sample are left out" in found.notes[0]
    log_run(tmp_path / "other", run)
    with pytest.raises(RunError, match="no --shadow"):
        collect(tmp_path / "other", sample=True)


def scoring_cascade(run: Run):
    """Return what scores texts as the cascade of a run did."""
    row_of = {text: row for row, text in enumerate(run.examples["text"])}

    def stage(spec):
        logits = run.scores(spec.name).logits
        return SimpleNamespace(
            spec=spec,
            encode=lambda texts, _: [row_of[text] for text in texts],
            score=lambda rows, **_: (StageOutput(logits[rows], None), None),
            exact=None,
        )

    return SimpleNamespace(spec=run.spec, stages=[stage(spec) for spec in run.spec.stages])


@pytest.mark.parametrize("reloaded", [False, True])
def test_the_sample_of_a_busy_service_has_as_many_rejects_as_all_texts(reloaded, tmp_path, monkeypatch):
    """The service gets to about a quarter of the chosen texts: the answers of these are like those of all texts."""
    monkeypatch.setattr("cascade_lab.serving.shadow.MAX_WAITING", 100)
    run = random_run(tmp_path / "run", n=8000)
    cascade, served, queue = scoring_cascade(run), served_cascade(run), ShadowQueue(0.5)
    with TrafficLog(tmp_path / "log", shadow=0.5) as log:
        for i, batch in enumerate(answered_batches(run)):
            log.add(batch)
            queue.add(batch)
            if reloaded and i % 100 > 25:  # by then another cascade answers, and what waits is dropped
                queue.score(cascade, served_cascade(run.with_thresholds({"gate0": 0.9})), n_texts=1000)
            elif reloaded or i % 4 == 0:
                scores = queue.score(cascade, served, n_texts=4)
                if scores is not None:
                    log.add_shadow(scores)
    found = collect(tmp_path / "log", sample=True)
    n, n_chosen = len(found.run.examples), int(is_chosen(run.examples["example_id"], 0.5).sum())
    assert n + found.n_unscored == n_chosen
    assert 0.1 < n / n_chosen < 0.3
    for column in ("decided_by", "predicted"):
        for value in run.predictions[column].unique():
            rate = (run.predictions[column] == value).mean()
            tolerance = 3.5 * np.sqrt(rate * (1 - rate) / n)
            assert abs((found.run.predictions[column] == value).mean() - rate) < tolerance, value
    rows = pd.Index(run.examples["example_id"]).get_indexer(found.run.examples["example_id"])
    same_answers(found.run.with_thresholds({"gate0": 0.9}), run.select(rows).with_thresholds({"gate0": 0.9}))


def test_since_and_until_are_half_open(tmp_path):
    run = random_run(tmp_path / "run", n=100)
    log_run(tmp_path / "log", run)
    since, until = (datetime.fromtimestamp(START + s, tz=timezone.utc) for s in (0.010, 0.030))
    found = collect(tmp_path / "log", since=since, until=until.replace(tzinfo=None))
    assert found.run.examples["example_id"].tolist() == [str(i) for i in range(10, 30)]
    with pytest.raises(RunError, match="none of its texts arrived in that time"):
        collect(tmp_path / "log", since=datetime(2030, 1, 1))


def test_two_cascades_in_a_folder_are_refused_by_name(tmp_path):
    a, b = random_run(tmp_path / "a", n=40), random_run(tmp_path / "b", n=30, n_labels=5)
    log_run(tmp_path / "log", a)
    log_run(tmp_path / "log", b, start=START + 3600)
    digests = [served_cascade(run).digest for run in (a, b)]
    with pytest.raises(RunError, match="2 cascades answered") as error:
        collect(tmp_path / "log")
    assert all(
        f"{digest[:12]} (random, {n} texts" in str(error.value) for digest, n in zip(digests, (40, 30), strict=True)
    )
    same_answers(collect(tmp_path / "log", digest=digests[1][:12].upper()).run, b)
    same_answers(collect(tmp_path / "log", until=datetime.fromtimestamp(START + 100, tz=timezone.utc)).run, a)
    with pytest.raises(RunError, match="no cascade's digest begins with 'zzz'"):
        collect(tmp_path / "log", digest="zzz")


def test_a_cascade_that_changes_between_two_batches_has_parts_of_its_own(tmp_path):
    run = random_run(tmp_path / "run", n=60)
    other = run.with_thresholds({"gate0": 0.9})
    with TrafficLog(tmp_path / "log") as log:
        for one, two in zip(
            answered_batches(run, seed=1), answered_batches(other, seed=1, start=START + 1), strict=True
        ):
            log.add(one)
            log.add(two)
    for expected in (run, other):
        same_answers(collect(tmp_path / "log", digest=served_cascade(expected).digest).run, expected)


def test_of_texts_with_one_id_the_first_is_kept_with_its_own_scores(tmp_path):
    run = random_run(tmp_path / "run", n=100)
    later = random_run(tmp_path / "later", n=100, seed=9)
    log_run(tmp_path / "log", later, shadow=1.0, start=START + 60)
    log_run(tmp_path / "log", run, shadow=1.0)
    found = collect(tmp_path / "log", sample=True)
    assert found.n_repeated == 100
    assert found.notes == (
        "100 texts have the id of an earlier one and are left out; give each request an id of its own (KServe: `id`), "
        "or none",
    )
    same_answers(found.run, run)
    for stage in run.spec.stages:
        np.testing.assert_array_equal(found.run.scores(stage.name).logits, run.scores(stage.name).logits)


def test_an_id_that_one_request_gives_twice_takes_no_shadow_scores(tmp_path):
    run = random_run(tmp_path / "run", n=40)
    batch = next(one for one in answered_batches(run, max_size=40) if len(one.ids) > 5)
    stopped = np.flatnonzero(~np.isin(np.arange(len(batch.ids)), batch.scores["last"].rows))[:2]
    ids = ["twice" if i in stopped else one for i, one in enumerate(batch.ids)]
    twice = Answered(
        batch.cascade, ids, np.full(len(ids), START), batch.texts, None, batch.predictions, batch.scores, {}
    )
    shadow = ShadowScores(
        batch.cascade, ["twice"], np.array([START]), {"last": SeenRows(np.array([0]), np.ones((1, 4)))}, {}
    )
    with TrafficLog(tmp_path / "log", shadow=1.0) as log:
        log.add(twice)
        log.add_shadow(shadow)
    found = collect(tmp_path / "log")
    assert not found.run.scores("last").shadow.any()
    assert found.n_repeated == 1


# Labels that come later.


def test_labels_are_joined_by_id(tmp_path):
    run = random_run(tmp_path / "run", n=50)
    log_run(tmp_path / "log", run)
    rows = [7, 3, 20, 41]
    lines = [f"{i}\t{run.examples['label'][i]}\t{2.5 * i}\ttext of {i}" for i in rows]
    path = tmp_path / "labels.tsv"
    path.write_text("example_id\tlabel\tweight\ttext\n" + "\n".join([*lines, "nobody\toos0\t1\tx", "9\t\t1\tx"]))
    found = collect(tmp_path / "log", labels=read_labels(path)).run.write(tmp_path / "out")
    assert found.labelled.examples["example_id"].tolist() == ["3", "7", "20", "41"]
    assert found.labelled.examples["label"].tolist() == run.examples["label"][sorted(rows)].tolist()
    assert found.labelled.examples["label_weight"].tolist() == [7.5, 17.5, 50.0, 102.5]
    assert found.examples["text"][7] == "text of 7"
    assert found.metrics["n_labelled"] == 4
    same_answers(found, run)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("example_id\tlabel\n1\tno such\n", "line 2: label 'no such' belongs to no stage"),
        ("example_id\tlabel\n1\toos0\n1\toos0\n", "line 3: example_id '1' is at .* line 2 too"),
        ("example_id\tlabel\nx\toos0\n", "none of its 1 ids is one of the 50 texts"),
        ("example_id\tlabel\n1\t\n", "has no label"),
        ("label\toos0\n1\toos0\n", "no column 'example_id'"),
        ("example_id\tlabel\tweight\n1\toos0\t0\n", "line 2: weight is '0'; it must be a number above 0"),
        ("example_id\tlabel\tweight\n1\toos0\t2\n2\toos0\n", "line 3: weight is None"),
        ("example_id\tlabel\n\toos0\n", "line 2: has no example_id"),
    ],
)
def test_unusable_labels_are_refused(content, message, tmp_path):
    run = random_run(tmp_path / "run", n=50)
    log_run(tmp_path / "log", run)
    (tmp_path / "labels.tsv").write_text(content)
    with pytest.raises(EvalSetError, match=message):
        collect(tmp_path / "log", labels=read_labels(tmp_path / "labels.tsv"))


# What is no log.


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(RunError, match="No such file"):
        collect(tmp_path / "nowhere")
    with pytest.raises(RunError, match="it has no text"):
        collect(tmp_path)


def test_a_part_whose_logits_were_changed_is_noticed(tmp_path):
    run = random_run(tmp_path / "run", n=50)
    log_run(tmp_path / "log", run)
    path = next((tmp_path / "log").iterdir())
    content, logits = path.read_bytes(), run.scores("gate0").logits
    place = content.index(logits[4].tobytes())
    path.write_bytes(content[:place] + logits[4][::-1].tobytes() + content[place + 8 :])
    found = collect(tmp_path / "log")
    assert found.n_differing == 1
    assert "for 1 texts a replay gives another answer" in found.notes[0]


def test_damaged_parts_are_read_as_far_as_they_are_whole_or_refused(tmp_path):
    """Bytes are changed, cut off or added anywhere: the part is refused, or whole texts are read."""
    run = random_run(tmp_path / "run", n=60)
    log_run(tmp_path / "log", run)
    path = next((tmp_path / "log").iterdir())
    content, rng = path.read_bytes(), np.random.default_rng(0)
    n_read = n_refused = 0
    for _ in range(100):
        changed = bytearray(content)
        kind, place = rng.integers(3), int(rng.integers(len(content)))
        if kind == 0:
            changed[place] = int(rng.integers(256))
        elif kind == 1:
            del changed[place:]
        else:
            changed[place : place + int(rng.integers(1, 40))] = rng.bytes(8)
        path.write_bytes(changed)
        try:
            found = collect(tmp_path / "log")
        except RunError:
            n_refused += 1
        else:
            assert 0 < len(found.run.examples) <= 60
            n_read += 1
    assert n_read > 5
    assert n_refused > 5


# The command.


def run_collect(*arguments: object):
    return CliRunner().invoke(app, ["collect", *map(str, arguments)])


def test_the_command_writes_a_run_and_prints_weighted_metrics(tmp_path):
    run = random_run(tmp_path / "run", n=300)
    log_run(tmp_path / "log", run, shadow=0.3, keep_texts=True)
    drawn = run.examples.iloc[::3].assign(weight=[1.0, 5.0] * 50)
    drawn[["example_id", "label", "weight"]].to_csv(tmp_path / "labels.csv", index=False)
    arguments = ("--labels", tmp_path / "labels.csv", "--since", "2025-06-15T17:06:40+02:00", "--until", "2025-06-16Z")
    result = run_collect(tmp_path / "log", *arguments, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = Run.read(tmp_path / "out")
    same_answers(found, run)
    expected = np.average(found.labelled.predictions.eval("label == predicted"), weights=[1.0, 5.0] * 50)
    assert f"accuracy             {expected:.4f}  " in result.output
    assert "metrics: on the 100 of 300 texts that have a label" in result.output
    assert "labels: 100 of the 100 ids" in result.output
    assert "the labels have unequal weights, which these metrics leave out" in result.output
    again = run_collect(tmp_path / "log", "--output", tmp_path / "out")
    assert (again.exit_code, "exists already" in again.output) == (2, True)


def test_the_sample_of_a_log_can_be_tuned(tmp_path):
    """Tuning on the sample finds what tuning on the same texts of a run with all shadow scores finds."""
    run = random_run(tmp_path / "run", n=600)
    log_run(tmp_path / "log", run, shadow=0.5)
    run.examples[["example_id", "label"]].to_csv(tmp_path / "labels.tsv", sep="\t", index=False)
    found = collect(tmp_path / "log", sample=True, labels=read_labels(tmp_path / "labels.tsv")).run
    rows = np.flatnonzero(is_chosen(run.examples["example_id"].tolist(), 0.5))
    goal = Goal(maximize="accuracy")
    own, expected = choose(found, goal), choose(run.select(rows), goal)
    assert (own.thresholds, own.counts.tolist()) == (expected.thresholds, expected.counts.tolist())
    unlabelled = collect(tmp_path / "log", sample=True).run
    with pytest.raises(RunError, match="; collect with --labels"):
        choose(unlabelled, goal)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--since", "yesterday"), "--since yesterday: is not a time; write it like 2026-11-26"),
        (("--since", "0001-01-01T00:00+05:00"), "--since 0001-01-01T00:00+05:00: is not a time"),
        (("--until", "9999-12-31T23:00-05:00"), "--until 9999-12-31T23:00-05:00: is not a time"),
        (("--digest", "ff"), "no cascade's digest begins with 'ff'"),
        (("--sample",), "the service had no --shadow"),
        (("--labels", "nowhere.tsv"), "nowhere.tsv: cannot be read"),
        (("--labels", "labels.pdf"), "unknown format of labels"),
    ],
)
def test_bad_input_is_one_line(arguments, message, tmp_path):
    log_run(tmp_path / "log", random_run(tmp_path / "run", n=20))
    result = run_collect(tmp_path / "log", *arguments, "--output", tmp_path / "out")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert message in result.stderr
    assert not (tmp_path / "out").exists()
