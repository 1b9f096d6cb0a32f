"""The table of all texts: against blame, flow and the matrix on random cascades, and its searches and orders."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from helpers import GATE, mixed_run, run_of_probabilities
from hypothesis import given, settings
from hypothesis import strategies as st
from test_errors import five_texts

from cascade_lab.analysis import confusion, flow, surest_first
from cascade_lab.analysis.errors import GOES_ON
from cascade_lab.analysis.examples import stage_probabilities
from cascade_lab.analysis.text_table import ORDERS, TextTable
from cascade_lab.decisions import probabilities, stage_targets
from cascade_lab.exceptions import RunError


@settings(max_examples=6, deadline=None)
@given(st.integers(0, 10_000))
def test_bands_and_cells_hold_the_texts_that_flow_and_matrix_count(seed):
    run = mixed_run(seed)
    table = TextTable(run)
    expected = flow(run)[["stage", "outcome", "fault", "n_examples"]]
    counted = {tuple(row) for row in table.bands().fillna("").itertuples(index=False)}
    assert counted == {tuple(row) for row in expected.fillna("").itertuples(index=False)}
    for row in expected.itertuples():
        conditions = {"stage": row.stage, "outcome": row.outcome}
        conditions |= {"fault": row.fault} if isinstance(row.fault, str) else {}
        assert table.mask(conditions).sum() == row.n_examples
    matrix = confusion(run)
    for label in matrix.index:
        assert table.mask({"label": label}).sum() == matrix.loc[label].sum()
        for predicted in matrix.columns:
            assert table.mask({"label": label, "predicted": predicted}).sum() == matrix.loc[label, predicted]


@settings(max_examples=5, deadline=None)
@given(st.integers(0, 10_000))
def test_probabilities_of_each_stage_are_those_of_its_logits(seed):
    run = mixed_run(seed)
    table = stage_probabilities(run)
    for stage in run.spec.stages:
        p = probabilities(stage, run.scores(stage.name).logits)
        assert table[f"{stage.name}_probability"].tolist() == pytest.approx(p.max(axis=1).tolist())
        assert table[f"{stage.name}_label"].tolist() == [stage.labels[k] for k in p.argmax(axis=1)]
        assert (table[f"{stage.name}_reached"] == ~run.scores(stage.name).shadow).all()
        target = stage_targets(run.spec, stage.name, run.examples["label"], assume_reached=True)
        for row, label in enumerate(target):
            expected = p[row, stage.labels.index(label)] if label in stage.labels else np.nan
            assert table[f"{stage.name}_true_probability"][row] == pytest.approx(expected, nan_ok=True)


def test_without_shadow_scores_there_are_outcomes_but_no_faults():
    table = TextTable(five_texts(shadow=False))
    assert table.frame["outcome"].tolist() == ["right", "false reject", "false reject", "false accept", "wrong class"]
    assert table.frame["fault"].isna().all()
    assert table.frame["intent_label"].isna().tolist() == [False, True, True, False, False]
    bands = table.bands()
    assert bands[["stage", "outcome", "n_examples"]].to_numpy().tolist() == [
        ["gate", GOES_ON, 3], ["gate", "false reject", 2],
        ["intent", "right", 1], ["intent", "false accept", 1], ["intent", "wrong class", 1],
    ]  # fmt: skip


def test_searches_filters_and_orders():
    texts = ["Pay the BILL", "查余额 bill", "x", "a longer text about a bill", "مرحبا"]
    table = TextTable(five_texts(texts=texts))
    found = lambda **keys: [texts[row] for row in table.rows({}, **keys)]  # noqa: E731
    assert found(search="bill", order="order of the set") == [texts[0], texts[1], texts[3]]
    assert found(search="余额 BILL") == [texts[1]]
    assert found(search="t3") == ["x"]
    assert found(search=".*") == []
    assert found(shown="right") == [texts[0]]
    assert len(found(shown="errors")) == 4
    assert found(shown="marked", marked=["t2"]) == [texts[1]]
    assert found(order="shortest first")[0] == "x"
    assert found(order="longest first")[0] == texts[3]
    surest = surest_first(table.run, table.run.predictions)["example_id"].tolist()
    assert table.frame["example_id"].iloc[table.rows({})].tolist() == surest
    assert table.frame["example_id"].iloc[table.rows({}, order=ORDERS[1])].tolist() == surest[::-1]


def test_a_rule_is_a_query_over_the_features():
    run = five_texts(texts=["one", "one two", "one two three", "x", "y z"])
    table = TextTable(run)
    assert table.mask({"rule": "n_tokens >= 2"}).tolist() == [False, True, True, False, True]
    assert table.mask({"rule": "n_tokens >= 2", "predicted": "oos"}).tolist() == [False, True, True, False, False]
    assert table.mask({"rule": "text.str.startswith('x')"}).tolist() == [False, False, False, True, False]
    with pytest.raises(RunError, match="use the columns of features"):
        table.mask({"rule": "no_such_column > 1"})


def test_unknown_conditions_name_the_nearest():
    table = TextTable(five_texts())
    for conditions, message in [
        ({"label": "A"}, "there is no label 'A'"),
        ({"stage": "gaet"}, "did you mean 'gate'"),
        ({"outcome": "false rejects"}, "did you mean 'false reject'"),
        ({"true": "a"}, "not selected by 'true'"),
    ]:
        with pytest.raises(RunError, match=message):
            table.mask(conditions)


def test_unlabelled_texts_are_left_out():
    run = run_of_probabilities([GATE, {"name": "i", "labels": ["a", "b"]}], ["a", None, "b"], {
        "gate": [[0.1, 0.9]] * 3, "i": [[0.9, 0.1]] * 3,
    })  # fmt: skip
    frame = TextTable(run).frame
    assert frame["example_id"].tolist() == ["t1", "t3"]
    assert isinstance(frame, pd.DataFrame)
