"""A stage whose logits are NaN or infinite stops in one line that names the text and the stage, wherever it runs."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from helpers import texts, write_cascade, write_checkpoint
from typer.testing import CliRunner

from cascade_lab import Cascade, CascadeSpec, EvalSet, Stage
from cascade_lab.bert import finetune
from cascade_lab.bert.attributions import attribute
from cascade_lab.bert.finetune import Flags, Init
from cascade_lab.cli import app
from cascade_lab.exceptions import CheckpointError, TrainingError
from cascade_lab.latency_benchmark import measure
from cascade_lab.precision_check import verify_precision

N = 40


def head(n_labels: int) -> np.ndarray:
    """Finite weights with which some texts' logits overflow: those whose sum of these pooled values is large."""
    weights = np.zeros((n_labels, 32), np.float32)
    weights[1, [0, 1, 13, 20, 28]] = 1.26e38
    return weights


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A cascade whose last stage overflows for some texts but not for the first one."""
    folder = tmp_path_factory.mktemp("overflow")
    write_cascade(folder)
    write_checkpoint(folder / "intent", 4, seed=4, output_weights=head(4), output_bias=np.zeros(4))
    return folder


@pytest.fixture(scope="module")
def spec(folder):
    # Every text reaches the last stage.
    return CascadeSpec.read(folder / "cascade.toml").with_thresholds({"gate": 0.0})


@pytest.fixture(scope="module")
def evalset(folder):
    lines = ["text\tlabel", *(f"{text}\t0" for text in texts(N))]
    (folder / "set.tsv").write_text("\n".join(lines) + "\n")
    return EvalSet.read(folder / "set.tsv")


@pytest.fixture(scope="module")
def first_text(spec):
    """The first text whose logits overflow, from a scoring of each text alone."""
    with Stage(spec.last) as stage:
        logits = np.concatenate([stage.logits(stage.encode([text])) for text in texts(N)])
    is_bad = ~np.isfinite(logits).all(axis=1)
    assert 0 < is_bad.sum() < N
    assert not is_bad[0]
    return texts(N)[int(is_bad.argmax())]


def message(first_text: str) -> str:
    # The text as the tokenizer reads it: at most 24 wordpieces.
    shown = " ".join(first_text.split()[:22])
    shown = shown if len(shown) <= 60 else shown[:59] + "…"
    return f"stage 'intent': the text '{shown}' (as wordpieces) gets the logit"


def stopped(call, *parts: str, error: type[Exception] = CheckpointError) -> None:
    with pytest.raises(error) as caught:
        call()
    assert "\n" not in str(caught.value)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("engine", ["fast", pytest.param("reference", marks=pytest.mark.slow)])
def test_run_and_predict(engine, spec, evalset, first_text, tmp_path):
    stages = tuple(dataclasses.replace(stage, engine=engine) for stage in spec.stages)
    with Cascade.load(dataclasses.replace(spec, stages=stages)) as cascade:
        stopped(
            lambda: cascade.run(evalset, output=tmp_path / "run"), message(first_text), "take an earlier checkpoint"
        )
        stopped(lambda: cascade.predict(evalset.texts), message(first_text))
        stopped(lambda: cascade.predict([first_text]), message(first_text))  # both stages at once
        assert len(cascade.predict(evalset.texts[:1])) == 1
        stopped_at_gate = cascade.spec.with_thresholds({"gate": 1.0})
        cascade.spec = stopped_at_gate
        assert cascade.predict([first_text])["decided_by"].tolist() == ["gate"]
    assert not list(tmp_path.iterdir())


def test_shadow_scores(spec, evalset, first_text, tmp_path):
    with Cascade.load(spec.with_thresholds({"gate": 1.0})) as cascade:
        stopped(lambda: cascade.run(evalset, output=tmp_path / "run"), message(first_text))
        assert len(cascade.run(evalset, output=tmp_path / "run", shadow=False).examples) == N


def test_the_latency_benchmark(spec, evalset, first_text):
    with Cascade.load(spec) as cascade:
        stopped(lambda: measure(cascade, evalset, batch_sizes=[1], repeats=1, batches=2), message(first_text))


@pytest.mark.slow
def test_precision_and_attributions(spec, evalset, first_text):
    stopped(lambda: verify_precision(spec, evalset), "stage 'intent'")
    shown = first_text[:40]
    stopped(lambda: attribute(spec.last, [first_text]), f"stage 'intent': a logit of the text '{shown}")


def test_the_command(folder, evalset, first_text):
    toml = folder / "open.toml"
    toml.write_text((folder / "cascade.toml").read_text().replace("threshold = 0.5", "threshold = 0"))
    shown = CliRunner().invoke(app, ["predict", str(toml), first_text])
    assert shown.exit_code == 2
    assert shown.stderr.startswith(f"error: {message(first_text)}")
    assert len(shown.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_evaluation_of_a_training(folder, evalset, tmp_path, monkeypatch):
    def overflowing(session, network, dev):
        logits = np.zeros((len(dev), 2))
        logits[3:, 1] = np.nan
        return logits

    monkeypatch.setattr(finetune, "_dev_logits", overflowing)
    sets = EvalSet.from_frame(evalset.examples.assign(label=["a", "b"] * (N // 2)))
    flags = Flags(num_train_epochs=1, max_seq_length=16)
    stopped(
        lambda: finetune.finetune(Init.find(folder / "gate"), sets, sets, ["a", "b"], tmp_path / "out", flags=flags),
        f"a logit of the text '{sets.texts[3][:50]}",
        "is NaN or infinite after step 2: the training diverged; no checkpoint had been saved yet; lower learning_rate",
        error=TrainingError,
    )
