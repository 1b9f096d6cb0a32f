"""The fast graph, compared with float64 arithmetic and with bert-tensorflow's graph; which nodes really run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from time import sleep

import numpy as np
import pytest
import tensorflow as tf
from helpers import texts, write_checkpoint
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import erf, softmax
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet, Stage
from cascade_lab.bert import fast
from cascade_lab.bert.batching import MANY_BATCHES, MAX_TOKENS, make_batches, round_up
from cascade_lab.bert.checkpoint import read_checkpoint
from cascade_lab.bert.fast_inputs import feed
from cascade_lab.cli import app
from cascade_lab.decisions import decide, route
from cascade_lab.exceptions import CheckpointError, SpecError
from cascade_lab.precision_check import verify_precision

tf1 = tf.compat.v1
FUSED = pytest.mark.skipif(not fast.has_fused_nodes(), reason="oneDNN's fused nodes are not on this machine")
BFLOAT16 = pytest.mark.skipif(not fast.has_bfloat16(), reason="this processor does not multiply bfloat16")
ACTIVATIONS = {
    "gelu": lambda x: 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3))),
    "gelu_erf": lambda x: 0.5 * x * (1 + erf(x / np.sqrt(2))),
    "relu": lambda x: np.maximum(x, 0),
    "tanh": np.tanh,
    "linear": lambda x: x,
}


def logits_in_float64(config, w, encoding):
    """Compute BERT's logits for one text, as Devlin et al. (2018) describe it, in numpy's float64 throughout."""
    assert {value.dtype for value in w.values()} == {np.dtype(np.float64)}
    heads, hidden = config["num_attention_heads"], config["hidden_size"]

    def norm(x, scope):
        mean, variance = x.mean(axis=-1, keepdims=True), x.var(axis=-1, keepdims=True)
        normal = (x - mean) / np.sqrt(variance + config.get("layer_norm_eps", 1e-12))
        return normal * w[f"{scope}/LayerNorm/gamma"] + w[f"{scope}/LayerNorm/beta"]

    def dense(x, scope):
        return x @ w[f"{scope}/kernel"] + w[f"{scope}/bias"]

    def split(x):
        return x.reshape(len(x), heads, hidden // heads).transpose(1, 0, 2)

    n = len(encoding.input_ids)
    segments = (np.arange(n) >= encoding.n_first).astype(int)
    table = "bert/embeddings"
    x = w[f"{table}/word_embeddings"][encoding.input_ids] + w[f"{table}/position_embeddings"][:n]
    x = norm(x + w[f"{table}/token_type_embeddings"][segments], table)
    for number in range(config["num_hidden_layers"]):
        layer = f"bert/encoder/layer_{number}"
        query, key, value = (split(dense(x, f"{layer}/attention/self/{part}")) for part in ("query", "key", "value"))
        weights_ = softmax(query @ key.transpose(0, 2, 1) / np.sqrt(hidden // heads), axis=-1)
        context = (weights_ @ value).transpose(1, 0, 2).reshape(n, hidden)
        x = norm(x + dense(context, f"{layer}/attention/output/dense"), f"{layer}/attention/output")
        inner = ACTIVATIONS[config["hidden_act"]](dense(x, f"{layer}/intermediate/dense"))
        x = norm(x + dense(inner, f"{layer}/output/dense"), f"{layer}/output")
    pooled = np.tanh(dense(x[0], "bert/pooler/dense"))
    return pooled @ w["output_weights"].T + w["output_bias"]


def in_float64(weights):
    return {name: value.astype(np.float64) for name, value in weights.items()}


def run_graph(spec, encodings, *, fused):
    """Score a batch with fused or with portable nodes, whichever a stage would use on this machine."""
    checkpoint = read_checkpoint(spec)
    network = fast.fast_graph(checkpoint.config, checkpoint.weights, fused=fused)
    assert not checkpoint.weights, "every weight is taken out, so that none is in memory twice"
    name, arrays = feed(encodings, checkpoint.config["type_vocab_size"], small=network.small is not None)
    form = getattr(network, name)
    with tf1.Session(graph=network.graph) as session:
        network.load(session)
        return session.run(form.logits_t, dict(zip(form.inputs, arrays, strict=True)))[: len(encodings)]


@pytest.mark.parametrize("n", [60, pytest.param(200, marks=pytest.mark.slow)])
def test_logits_are_within_2e_5_of_float64_arithmetic_on_clinc150(clinc150, n):
    batch = EvalSet.read(clinc150 / "data_full.json", split="test").limit(n).texts
    batch[:2] = ["", " ".join(batch[:20])]
    for spec in CascadeSpec.read(clinc150 / "cascade.toml").stages:
        checkpoint = read_checkpoint(spec)
        weights = in_float64(checkpoint.weights)
        with Stage(spec) as stage:
            encodings = stage.encode(batch)
            got = stage.score(encodings)[0].logits
        lengths = {len(encoding.input_ids) for encoding in encodings}
        assert len(lengths) > 10
        assert max(lengths) == 64
        expected = [logits_in_float64(checkpoint.config, weights, encoding) for encoding in encodings]
        np.testing.assert_allclose(got, expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("fused", [pytest.param(True, marks=FUSED), False])
@pytest.mark.parametrize(
    ("hidden_act", "scale"), [("gelu", 0.3), ("gelu", 1e-4), ("gelu_erf", 0.3), ("relu", 0.3), ("tanh", 0.3)]
)
def test_fused_and_portable_nodes_agree_with_float64_even_if_embeddings_hardly_vary(tmp_path, hidden_act, scale, fused):
    """With a variance as small as 1e-8, a LayerNorm with a wrong epsilon would give other logits."""
    rng = np.random.default_rng(5)
    small = {
        "bert__embeddings__position_embeddings": rng.normal(0, scale, (48, 32)),
        "bert__embeddings__token_type_embeddings": rng.normal(0, scale, (2, 32)),
    }
    write_checkpoint(tmp_path / "model", 4, seed=3)
    vocab_size = json.loads((tmp_path / "model/bert_config.json").read_text())["vocab_size"]
    small["bert__embeddings__word_embeddings"] = rng.normal(0, scale, (vocab_size, 32))
    write_checkpoint(tmp_path / "model", 4, seed=3, **small)
    config = json.loads((tmp_path / "model/bert_config.json").read_text()) | {"hidden_act": hidden_act}
    (tmp_path / "model/bert_config.json").write_text(json.dumps(config))
    content = {"name": "only", "init_checkpoint": "model", "bert_config_file": "model/bert_config.json"}
    content |= {"vocab_file": "model/vocab.txt", "labels": list("abcd"), "max_seq_length": 24}
    spec = CascadeSpec.from_dict({"stage": [content]}, folder=tmp_path).last
    weights = in_float64(read_checkpoint(spec).weights)
    with Stage(replace(spec, engine="reference")) as stage:
        encodings = stage.encode(texts(12), [None, "what is my bill"] * 6)
        reference = stage.logits(encodings)
    expected = [logits_in_float64(config, weights, encoding) for encoding in encodings]
    for batch in (slice(None), slice(0, 1)):
        got = run_graph(spec, encodings[batch], fused=fused)
        np.testing.assert_allclose(got, expected[batch], atol=2e-5, rtol=0)
        np.testing.assert_allclose(got, reference[batch], atol=5e-5, rtol=0)


@FUSED
def test_all_dense_layers_run_fused_and_layer_norm_has_the_configs_epsilon(tiny):
    spec = CascadeSpec.read(tiny).last
    with Stage(spec) as stage:
        forms = (["pay my bill"] * 20, "uniform"), (["pay", "pay my bill now"] * 10, "ragged"), (["pay"], "small")
        for batch, expected in forms:
            name, arrays = feed(stage.encode(batch), 2, small=True)
            assert name == expected
            checkpoint = read_checkpoint(spec)
            network = fast.fast_graph(checkpoint.config, checkpoint.weights)
            form = getattr(network, name)
            with tf1.Session(graph=network.graph) as session:
                network.load(session)
                options, metadata = tf1.RunOptions(output_partition_graphs=True), tf1.RunMetadata()
                session.run(form.logits_t, dict(zip(form.inputs, arrays, strict=True)), options, metadata)
            nodes = [node for graph in metadata.partition_graphs for node in graph.node]
            counts = Counter(node.op for node in nodes)
            # First layer: query-key-value, attention, intermediate, output. Last layer: query, key and value are
            # separate. Then the pooler and the head.
            assert counts["_MklNativeFusedMatMul"] == 4 + 6 + 2
            assert counts["_MklLayerNorm"] == 1 + 2 * 2
            assert not {"MatMul", "BiasAdd", "Tanh", "Erf", "FusedBatchNormV3", "Mean"} & set(counts)
            fused = Counter(
                tuple(op.decode() for op in node.attr["fused_ops"].list.s)
                for node in nodes
                if node.op == "_MklNativeFusedMatMul"
            )
            assert fused == {
                ("BiasAdd",): 5, ("BiasAdd", "Add"): 4, ("BiasAdd", "GeluApproximate"): 2, ("BiasAdd", "Tanh"): 1,
            }  # fmt: skip
            epsilons = {node.attr["epsilon"].f for node in nodes if node.op == "_MklLayerNorm"}
            assert epsilons == {np.float32(1e-12)}


@FUSED
def test_small_batches_pack_the_weights_once():
    """oneDNN's log names every change of a layout. The demo's dense layers are known by the shape of their weights."""
    script = """
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage
with Stage(CascadeSpec.read("cascade.toml").stages[0]) as stage:
    for texts in (["pay"], ["pay my bill"], ["pay", "what is my balance"], ["pay my bill now please"] * 7):
        print("scores", flush=True)
        stage.logits(stage.encode(texts))
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"ONEDNN_VERBOSE": "1"},
        cwd=Path(__file__).parents[1] / "data",
        capture_output=True,
        text=True,
        check=True,
    )
    loading, *scoring = result.stdout.split("scores\n")
    weights = {"128x128", "384x128", "512x128", "128x512"}

    def packed(log):
        return [line for line in log.splitlines() if ",exec,cpu,reorder," in line and line.split(",")[-2] in weights]

    assert len(packed(loading)) == 4 + 5 + 1  # two layers and the pooler; the last query is read as it is
    assert len(scoring) == 4
    assert all("matmul" in log for log in scoring)
    assert not any(packed(log) for log in scoring)


def test_the_fast_and_the_reference_engine_predict_the_same_on_clinc150(clinc150, clinc150_run):
    """Texts within 1e-4 of the threshold are left out. The run of the fixture was made by the fast engine."""
    examples = clinc150_run.examples
    spec = clinc150_run.spec
    assert {stage["engine"] for stage in clinc150_run.manifest["stages"].values()} == {"fast"}
    with Cascade.load(replace(spec, stages=tuple(replace(stage, engine="reference") for stage in spec.stages))) as slow:
        expected = slow.predict(examples["text"].tolist())
    clear = (expected["gate_probability"] - spec.stages[0].threshold).abs() > 1e-4
    assert clear.mean() > 0.999
    predictions = clinc150_run.predictions
    assert (predictions["predicted"] == expected["predicted"])[clear].all()


@BFLOAT16
def test_bfloat16_changes_at_most_one_prediction_in_a_thousand(clinc150, clinc150_run):
    spec = clinc150_run.spec
    half = replace(spec, stages=tuple(replace(stage, precision="bfloat16") for stage in spec.stages))
    with Cascade.load(half) as cascade:
        encoded = cascade.stages[0].encode(clinc150_run.examples["text"].tolist())
        logits = {stage.spec.name: stage.score(encoded)[0].logits for stage in cascade.stages}
    for stage in spec.stages:
        difference = np.abs(logits[stage.name] - clinc150_run.scores(stage.name).logits)
        assert 1e-4 < difference.max() < 0.5, "the precision differs, but not the network"
    predicted = route(spec, {stage.name: decide(stage, logits[stage.name]) for stage in spec.stages}).predicted
    assert (predicted != clinc150_run.predictions["predicted"]).mean() <= 0.001


@BFLOAT16
def test_verify_precision_measures_the_differences_of_the_logits(tiny, tiny_evalset):
    result = CliRunner().invoke(app, ["verify-precision", str(tiny), str(tiny_evalset)])
    assert result.exit_code == 0, result.output
    assert "of 200 texts get another answer than in float32" in result.output
    check = verify_precision(CascadeSpec.read(tiny), EvalSet.read(tiny_evalset))
    batch = EvalSet.read(tiny_evalset).texts
    for name, row in check.stages.iterrows():
        spec = CascadeSpec.read(tiny).stage(name)
        with Stage(replace(spec, engine="reference")) as exact, Stage(replace(spec, precision="bfloat16")) as lower:
            difference = np.abs(lower.score(lower.encode(batch))[0].logits - exact.score(exact.encode(batch))[0].logits)
        assert row["max"] == pytest.approx(difference.max(), abs=1e-4)
        assert 0 < row["rms"] < row["p99"] < row["max"]
    result = CliRunner().invoke(app, ["verify-precision", str(tiny), str(tiny_evalset), "--split", "none"])
    assert result.exit_code == 2


def test_missing_bfloat16_is_refused_in_one_line(tiny, monkeypatch):
    spec = replace(CascadeSpec.read(tiny).last, precision="bfloat16")
    monkeypatch.setattr(fast, "has_bfloat16", lambda: False)
    with pytest.raises(CheckpointError, match=r"stage 'intent': precision bfloat16 needs .*; set precision = "):
        Stage(spec)


def test_engine_and_precision_are_checked(tiny):
    content = CascadeSpec.read(tiny).to_dict()
    for key, value, message in (
        ("engine", "quick", "engine is 'quick'; it is one of fast, reference"),
        ("precision", "int8", "precision is 'int8'; it is one of float32, bfloat16"),
    ):
        with pytest.raises(SpecError, match=message):
            CascadeSpec.from_dict({**content, "stage": [{**stage, key: value} for stage in content["stage"]]})
    reference = {"engine": "reference", "precision": "bfloat16"}
    with pytest.raises(SpecError, match="the reference engine computes in float32 only"):
        CascadeSpec.from_dict({**content, "stage": [{**stage, **reference} for stage in content["stage"]]})


def test_equal_texts_are_scored_once_and_every_text_gets_its_logits(tiny):
    with Stage(CascadeSpec.read(tiny).last) as stage:
        encodings = stage.encode([*texts(40), *texts(40), "pay", "pay"])
        counts = []
        (logits, *_), batches = stage.score(encodings, done=counts.append)
        assert sum(counts) == sum(batch.n_examples for batch in batches) == 82
        assert sum(batch.n_tokens for batch in batches) <= sum(len(e.input_ids) for e in encodings[:41])
        np.testing.assert_array_equal(logits[:40], logits[40:80])
        alone = [stage.logits([encoding])[0] for encoding in encodings]
        np.testing.assert_allclose(logits, alone, atol=1e-5)


def test_many_texts_are_scored_and_counted_once_though_the_last_batch_is_filled_up(tiny):
    with Stage(CascadeSpec.read(tiny).last) as stage:
        encodings = stage.encode(texts(2000))
        assert sum(len(encoding.input_ids) for encoding in encodings) > MANY_BATCHES * MAX_TOKENS
        (logits, *_), batches = stage.score(encodings)
        distinct = {tuple(encoding.input_ids) for encoding in encodings}
        assert sum(batch.n_tokens for batch in batches) > sum(map(len, distinct))  # the last batch is filled up
        assert sum(batch.n_examples for batch in batches) == 2000
        alone = [stage.logits([encoding])[0] for encoding in encodings[::50]]
        np.testing.assert_allclose(logits[::50], alone, atol=1e-5)


def test_no_batch_runs_after_an_interruption(tiny, monkeypatch):
    with Stage(CascadeSpec.read(tiny).last) as stage:
        started, ended, logits = [], [], Stage.logits

        def slow(stage, batch):
            started.append(batch)
            sleep(0.02)
            ended.append(logits(stage, batch))
            return ended[-1]

        def interrupt(n: int) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(Stage, "logits", slow)
        encodings = stage.encode(texts(120))
        assert len({tuple(encoding.input_ids) for encoding in encodings}) > 100
        with pytest.raises(KeyboardInterrupt):
            stage.score(encodings, batch_size=1, done=interrupt)
        n_ended = len(ended)
        assert n_ended == len(started) < 50
        sleep(0.1)
        assert len(started) == n_ended


def test_the_same_run_twice_gives_the_same_bytes(tiny, tiny_evalset, tmp_path):
    for name in ("one", "two"):
        with Cascade.load(tiny) as cascade:
            cascade.run(EvalSet.read(tiny_evalset), output=tmp_path / name)
    for stage in ("gate", "intent"):
        one, two = ((tmp_path / name / "scores" / f"{stage}.parquet").read_bytes() for name in ("one", "two"))
        assert one == two


@given(
    st.lists(st.integers(1, 40), max_size=200),
    st.one_of(st.none(), st.integers(1, 50)),
    st.integers(1, 200),
)
def test_every_text_is_in_one_batch_and_no_batch_is_too_large(lengths, max_texts, max_tokens):
    batches = make_batches(lengths, max_texts=max_texts, max_tokens=max_tokens)
    times = np.bincount(np.concatenate([np.zeros(0, int), *batches]), minlength=len(lengths))
    are_many = sum(lengths) >= MANY_BATCHES * max_tokens
    assert (times >= 1).all() if are_many else (times == 1).all()
    assert sum(len(set(batch.tolist())) < len(batch) for batch in batches) <= 1  # only the last is filled up
    sizes = [sum(lengths[row] for row in batch) for batch in batches]
    assert sizes == sorted(sizes, reverse=True)
    for batch, size in zip(batches, sizes, strict=True):
        assert size <= max_tokens or len(batch) == 1
        assert max_texts is None or len(batch) <= max_texts


def test_many_batches_have_few_shapes():
    rng = np.random.default_rng(0)
    shapes = set()
    for n in range(6000, 8192, 100):
        lengths = rng.gamma(9, 1.2, n).astype(int) + 2
        shapes |= {(len(batch), lengths[batch].max()) for batch in make_batches(lengths)}
    assert len(shapes) <= 40  # about one for each length
    assert all(n == MAX_TOKENS // length for n, length in shapes)


@given(st.integers(1, 10**6))
def test_a_rounded_size_is_one_of_eight_per_power_of_two_and_at_most_an_eighth_more(n):
    assert n <= round_up(n) <= n * 9 / 8
    assert round_up(round_up(n)) == round_up(n)
    power = 1 << (n.bit_length() - 1)
    assert power < 8 or round_up(n) % (power // 8) == 0
