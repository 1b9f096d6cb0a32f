"""The model cards of an export: read by Hugging Face's own parser, with the numbers of `metrics.json`."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from helpers import write_run
from huggingface_hub import EvalResult, ModelCard
from typer.testing import CliRunner

from cascade_lab import CascadeSpec, EvalSet, Run
from cascade_lab.analysis.tuned_on import WARNING
from cascade_lab.cli import app
from cascade_lab.exceptions import CascadeLabError
from cascade_lab.export import export_cascade
from cascade_lab.model_card import cascade_card, stage_card

KEYS = {"f1": "macro_f1", "roc_auc": "auroc"}  # Hugging Face's name to that in metrics.json, where they differ


def cascade_lab(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def values(results: list[EvalResult]) -> dict[str, float]:
    return {KEYS.get(result.metric_type, result.metric_type): result.metric_value for result in results}


@pytest.fixture(scope="module")
def exported(tiny, tiny_run, tmp_path_factory):
    output = tmp_path_factory.mktemp("cards") / "hf"
    result = cascade_lab("export", tiny, "--format", "hf", "--run", tiny_run.directory, "--output", output)
    assert result.exit_code == 0, result.output
    return output


def test_the_values_are_those_of_the_runs_metrics(exported, tiny_run, tiny_evalset):
    metrics = json.loads((tiny_run.directory / "metrics.json").read_text(encoding="utf-8"))
    parts = {"": metrics["end_to_end"], "gate": metrics["stages"]["gate"], "intent": metrics["stages"]["intent"]}
    for folder, expected in parts.items():
        card = ModelCard.load(exported / folder / "README.md")
        assert card.data.library_name == "transformers"
        assert card.data.pipeline_tag == "text-classification"
        assert card.data.model_name == (f"tiny-{folder}" if folder else "tiny")
        found = values(card.data.eval_results)
        assert len(found) == {"": 5, "gate": 4, "intent": 2}[folder]
        assert found == {key: expected[key] for key in found}
        for result in card.data.eval_results:
            assert result.dataset_name.startswith(tiny_evalset.name)
            assert result.dataset_args == {"sha256": EvalSet.read(tiny_evalset).sha256}
            assert f"| {result.metric_name} | {result.metric_value:.4f} | 0." in card.text
        assert tiny_run.manifest["run_id"] in card.text
    assert "probability of `in` is at least 0.5" in ModelCard.load(exported / "gate" / "README.md").text
    described = json.loads((exported / "export.json").read_text(encoding="utf-8"))["stages"]
    assert [stage["directory"] for stage in described] == ["gate", "intent"]


def test_without_a_run_a_card_has_no_results(tiny, tmp_path):
    export_cascade(CascadeSpec.read(tiny), tmp_path / "hf", format="hf")
    for path in (tmp_path / "hf").rglob("README.md"):
        card = ModelCard.load(path)
        assert (card.data.eval_results, "model-index" in card.content) == (None, False)
        assert "no run was given" in card.text
    export_cascade(CascadeSpec.read(tiny), tmp_path / "saved", format="saved_model")
    assert not list((tmp_path / "saved").rglob("README.md"))


def test_a_run_of_another_cascade_or_without_labels_is_refused_in_one_line(tiny, tiny_run, tmp_path):
    unlabelled = write_run(
        tmp_path / "unlabelled", tiny_run.spec, tiny_run.examples.assign(label=None),
        {name: tiny_run.scores(name).logits for name in ("gate", "intent")},
    )  # fmt: skip
    moved = tiny_run.with_thresholds({"gate": 0.7}).write(tmp_path / "moved")
    imported = Run({**tiny_run.manifest, "source": "logits"}, tiny_run.examples, {
        name: tiny_run.scores(name) for name in ("gate", "intent")
    }, tiny_run.predictions, tiny_run.timings).write(tmp_path / "imported")  # fmt: skip
    for run, words in (
        (moved, "threshold of stage 'gate' is 0.5 here and 0.7 in the run"),
        (imported, "its logits were computed elsewhere"),
        (unlabelled, "is a run of another cascade"),
    ):
        options = ("--run", run.directory, "--output", tmp_path / "hf")
        result = cascade_lab("export", tiny, "--format", "hf", *options)
        assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
        assert words in result.stderr
        assert not (tmp_path / "hf").exists()
    with pytest.raises(CascadeLabError, match="has no model card"):
        export_cascade(tiny_run.spec, tmp_path / "x", format="saved_model", run=tiny_run)
    without = Run({**tiny_run.manifest}, tiny_run.examples.assign(label=None), {
        name: tiny_run.scores(name) for name in ("gate", "intent")
    }, tiny_run.predictions.assign(label=None), tiny_run.timings)  # fmt: skip
    with pytest.raises(CascadeLabError, match="no example has a label"):
        export_cascade(tiny_run.spec, tmp_path / "x", format="hf", run=without)


def test_hostile_names_stay_text(tiny_run):
    evil = "<img src=x>\n---\n# [a](b) `c` $d$ 付款 \x1b[31m: {e}"
    gate, intent = tiny_run.spec.stages
    gate = replace(gate, labels=("oos", evil), pass_label=evil)
    spec = replace(tiny_run.spec, name=evil, stages=(gate, intent))
    for text in (cascade_card(spec), stage_card(spec, gate)):
        card = ModelCard(text)
        assert card.data.tags == ["bert", "cascade-lab"]
        assert "\x1b" not in text
        assert "付款" in card.text
        assert "\n---\n" not in card.text
        plain = card.text.replace("\\<", "").split("`")[::2]  # outside code
        assert not any("<img" in part for part in plain)
    named = Run({**tiny_run.manifest, "evalset": {"source": f"/a/{evil}", "sha256": None}}, tiny_run.examples, {
        name: tiny_run.scores(name) for name in ("gate", "intent")
    }, tiny_run.predictions, tiny_run.timings)  # fmt: skip
    card = ModelCard(cascade_card(replace(tiny_run.spec, name=evil), named))
    assert "付款" in card.data.model_name
    assert values(card.data.eval_results)["accuracy"] == tiny_run.metrics["end_to_end"]["accuracy"]


def test_a_card_warns_where_the_thresholds_were_tuned_on_the_same_texts(tiny_run):
    tuned_on = {"run_id": tiny_run.manifest["run_id"], "evalset": {"n_examples": 200}, "goal": "maximize accuracy"}
    run = tiny_run.with_spec(replace(tiny_run.spec, tuned_on=tuned_on))
    assert WARNING in cascade_card(run.spec, run)
    assert WARNING not in cascade_card(tiny_run.spec, tiny_run)
