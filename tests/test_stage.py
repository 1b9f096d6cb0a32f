"""A stage: equal to an independent implementation, isolated from other sessions, and freed when closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from itertools import permutations

import numpy as np
import pytest
from helpers import texts

from cascade_lab import Cascade, CascadeSpec, EvalSet, Stage
from cascade_lab.exceptions import CheckpointError


def score(stage, batch):
    return stage.logits(stage.encode(batch))


@pytest.mark.parametrize("batch_size", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 7)), 64])
def test_logits_equal_pytorchs_on_clinc150_at_every_batch_size(clinc150, batch_size):
    """expected_val.npz was made by PyTorch and transformers in float32, from the same weights."""
    expected = np.load(clinc150 / "expected_val.npz")
    batch = EvalSet.read(clinc150 / "data_full.json", split="val").examples["text"].tolist()
    assert batch == expected["text"].tolist()
    # Small batches are slow: score only some of the texts with them.
    rows = np.arange(len(batch))[:: {1: 25, 7: 5, 64: 1}[batch_size]]
    rows = np.random.default_rng(batch_size).permutation(rows)
    for spec in CascadeSpec.read(clinc150 / "cascade.toml").stages:
        with Stage(spec) as stage:
            for start in range(0, len(rows), batch_size):
                part = rows[start : start + batch_size]
                got = score(stage, [batch[row] for row in part])
                np.testing.assert_allclose(got, expected[spec.name][part], atol=1e-4, rtol=0)


def test_stages_with_the_same_variable_names_do_not_mix(tiny):
    """With a shared graph or session, one stage would get the weights of the other, or an error."""
    specs = CascadeSpec.read(tiny).stages
    alone = {}
    for spec in specs:
        with Stage(spec) as stage:
            alone[spec.name] = score(stage, texts(5))
    assert not np.allclose(alone["gate"], alone["intent"][:, :2])
    for _ in range(3):
        for order in permutations(specs):
            opened = {spec.name: Stage(spec) for spec in order}
            graphs = {id(stage.graph) for stage in opened.values()}
            sessions = {id(stage.session) for stage in opened.values()}
            assert len(graphs) == len(sessions) == 2
            for name, stage in opened.items():
                np.testing.assert_array_equal(score(stage, texts(5)), alone[name])
            first, second = opened.values()
            first.close()  # the other still works
            np.testing.assert_array_equal(score(second, texts(5)), alone[second.spec.name])
            second.close()


def test_a_text_scores_the_same_alone_and_padded_beside_a_longer_one(tiny):
    with Stage(CascadeSpec.read(tiny).last) as stage:
        long = "pay my bill now please " * 4
        np.testing.assert_allclose(score(stage, ["sing", long])[0], score(stage, ["sing"])[0], atol=1e-5)


def test_pairs_reach_the_second_segment(tiny):
    with Stage(CascadeSpec.read(tiny).last) as stage:
        joined, single = stage.encode(["pay my", "pay my"], ["bill", None])
        assert joined.n_first < len(joined.input_ids)
        flat = joined._replace(n_first=len(joined.input_ids))
        assert not np.allclose(stage.logits([joined]), stage.logits([flat]))
        assert np.isfinite(stage.logits([joined, single])).all()


CALLERS_STATE = """
import sys, os, json
first = sys.argv[2]
if first == "tensorflow first":
    import tensorflow as tf
    import bert.tokenization  # the caller's own copy, with its absl flag
if first == "graph mode":
    import tensorflow as tf
    tf.compat.v1.disable_eager_execution()
from cascade_lab import CascadeSpec, Stage
environ = dict(os.environ)
import tensorflow as tf
before = (tf.executing_eagerly(), tf.keras.__version__)
default = tf.compat.v1.get_default_graph()
n = len(default.get_operations())
with Stage(CascadeSpec.read(sys.argv[1]).stages[0]) as stage:
    logits = stage.logits(stage.encode(["pay my bill"])).tolist()
after = (tf.executing_eagerly(), tf.keras.__version__)
assert before == after, (before, after)
assert tf.compat.v1.get_default_graph() is default
assert len(default.get_operations()) == n, "the caller's default graph grew"
assert dict(os.environ) == environ
assert "tensorflow.contrib" not in sys.modules
if first == "cascade_lab first":
    import bert.tokenization
print(json.dumps(logits))
"""


def test_the_tensorflow_of_the_caller_does_not_change_whoever_imports_first(tiny):
    results = []
    for first in ("cascade_lab first", "tensorflow first", "graph mode"):
        command = [sys.executable, "-c", CALLERS_STATE, str(tiny), first]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr[-2000:]
        results.append(json.loads(done.stdout))
    np.testing.assert_allclose(results, [results[0]] * 3, atol=1e-6)


QUIET = """
import os, sys
before = dict(os.environ)
from cascade_lab import Cascade
with Cascade.load(sys.argv[1]) as cascade:
    cascade.predict(["pay my bill"])
assert dict(os.environ) == before
print("heard", file=sys.stderr)
"""


def test_tensorflow_prints_nothing(tiny):
    environ = {key: value for key, value in os.environ.items() if key != "TF_CPP_MIN_LOG_LEVEL"}
    done = subprocess.run(
        [sys.executable, "-c", QUIET, str(tiny)], env=environ, capture_output=True, text=True, check=True
    )
    assert done.stderr == "heard\n"


MEMORY = """
import gc, sys, psutil
from cascade_lab import Cascade
process = psutil.Process()
sizes = []
for _ in range(11):
    with Cascade.load(sys.argv[1]) as cascade:
        cascade.predict(["what is my balance", "sing me a song"] * 32)
    del cascade
    gc.collect()
    sizes.append(process.memory_info().rss)
print(sizes[-1] / sizes[0], [size >> 20 for size in sizes])
"""


@pytest.mark.slow
def test_opening_and_closing_ten_times_grows_the_process_by_less_than_a_tenth(clinc150):
    command = [sys.executable, "-c", MEMORY, str(clinc150 / "cascade.toml")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout.split()[0]) < 1.1, done.stdout


def test_a_cascade_that_was_scored_elsewhere_cannot_be_loaded(tiny):
    """The whole message is one line that names the stage and the keys to add."""
    spec = CascadeSpec.read(tiny)
    without_files = {"init_checkpoint": None, "bert_config_file": None, "vocab_file": None}
    elsewhere = replace(spec, stages=(spec.stages[0], replace(spec.last, **without_files)))
    message = (
        "^stage 'intent': has no init_checkpoint: its logits were computed elsewhere; add init_checkpoint, "
        "bert_config_file and vocab_file to run it$"
    )
    with pytest.raises(CheckpointError, match=message):
        Cascade.load(elsewhere)
