"""Writes the model cards of an export: README.md with metadata and evaluation results, as Hugging Face reads it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from cascade_lab.analysis.metrics import metric_intervals
from cascade_lab.analysis.tuned_on import WARNING, is_tuning_set
from cascade_lab.provenance import package_version
from cascade_lab.text import escape_markdown, exact, printable, shorten

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

    from cascade_lab.run import Run
    from cascade_lab.spec import CascadeSpec, StageSpec

_MAX_LENGTH = 200  # characters of a name
_TASK = "text-classification"
# The key in `metrics.json`: the name in Hugging Face's list of metrics where it has one, a title, and arguments.
_METRICS: dict[str, tuple[str, str, dict[str, Any] | None]] = {
    "accuracy": ("accuracy", "accuracy", None),
    "macro_f1": ("f1", "macro F1", {"average": "macro"}),
    "in_scope_accuracy": ("in_scope_accuracy", "accuracy on texts in scope", None),
    "reject_recall": ("reject_recall", "recall of texts out of scope, with the right label", None),
    "reject_precision": ("reject_precision", "precision of the rejections", None),
    "auroc": ("roc_auc", "AUROC, the texts to stop as positives", None),
    "average_precision": ("average_precision", "average precision, the texts to stop as positives", None),
}


def stage_card(spec: CascadeSpec, stage: StageSpec, run: Run | None = None) -> str:
    """Return the model card of one stage; with a run, the stage's metrics on the texts that reached it."""
    name, of = _plain(stage.name), _plain(spec.name)
    text = [
        f"# {of}: stage {name}",
        f"The stage {name} of the cascade {of}: a fine-tuned BERT classifier with {len(stage.labels):,} "
        "labels, exported by cascade-lab. " + _rule(stage),
        f"Texts are cut to {stage.max_seq_length} tokens. The stages in series, with their thresholds, are described "
        "in `export.json`, one folder up.",
    ]
    return _card(f"{spec.name}-{stage.name}", text, run, stage.name)


def cascade_card(spec: CascadeSpec, run: Run | None = None) -> str:
    """Return the model card of a whole cascade; with a run, its metrics end to end."""
    text = [
        f"# {_plain(spec.name)}",
        f"A cascade of {len(spec.stages)} BERT classifiers in series, exported by cascade-lab. Each folder is one "
        "stage, which `AutoModelForSequenceClassification` and `AutoTokenizer` load; `export.json` says what connects "
        "the stages.",
        "\n".join(
            f"{i}. **{_plain(stage.name)}** ({stage.role}). {_rule(stage)}" for i, stage in enumerate(spec.stages, 1)
        ),
    ]
    return _card(spec.name, text, run, None)


def _rule(stage: StageSpec) -> str:
    """Return what a stage does with a text, as a sentence."""
    score = "confidence (of its rejector)" if stage.rejector else "highest probability"
    if stage.is_gate:
        sentence = (
            f"A text goes on to the next stage where the probability of `{_code(stage.pass_label or '')}` is at least "
            f"{exact(stage.threshold)}; otherwise the answer is the most probable other label."
        )
    elif stage.is_deferral:
        sentence = (
            f"It answers with its most probable label where its {score} is at least {exact(stage.threshold)}; "
            "otherwise the text goes on to the next stage."
        )
    elif stage.reject_label is not None and (stage.min_probability is not None or stage.min_probabilities):
        minimum = exact(stage.min_probability) if stage.min_probability is not None else "the minimum of the label"
        sentence = (
            f"It answers with its most probable label, or with `{_code(stage.reject_label)}` where its {score} is "
            f"below {minimum}."
        )
    else:
        sentence = "It answers with its most probable label."
    if stage.calibrator is not None:
        return f"{sentence} The logits are corrected by the calibrator in `export.json`."
    return sentence if stage.temperature == 1 else f"{sentence} The logits are divided by {stage.temperature:.6g}."


def _card(name: str, text: list[str], run: Run | None, stage: str | None) -> str:
    from huggingface_hub import ModelCardData

    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=_TASK,
        tags=["bert", "cascade-lab"],
        model_name=_line(name),
        eval_results=None if run is None else _results(run, stage),
    )
    if run is None:
        data.pop("model_name")
        text.append("This card has no evaluation results: no run was given (`cascade-lab export --run`).")
    else:
        text += _evaluation(run, stage)
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(text) + "\n"


def _metrics(run: Run, stage: str | None) -> Mapping[str, float]:
    """Return the metrics of `metrics.json` that a card has: those that are defined."""
    metrics = run.metrics["end_to_end"] if stage is None else run.metrics["stages"][stage]
    return {key: metrics[key] for key in _METRICS if key in metrics and np.isfinite(metrics[key])}


def _results(run: Run, stage: str | None) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    evalset = run.manifest["evalset"]
    source = PurePath(str(evalset.get("source") or evalset.get("path") or "a table"))
    where = "" if stage is None else f", the texts that reach {stage}"
    return [
        EvalResult(
            task_type=_TASK,
            task_name="Text classification",
            dataset_type=re.sub(r"[^\w.-]+", "-", source.stem).strip(".-") or "table",
            dataset_name=_line(f"{source.name}{where}"),
            dataset_split=evalset.get("split"),
            dataset_args={"sha256": evalset["sha256"]} if evalset.get("sha256") else None,
            metric_type=kind,
            metric_name=title,
            metric_args=arguments,
            metric_value=float(value),
        )
        for key, value in _metrics(run, stage).items()
        for kind, title, arguments in [_METRICS[key]]
    ]


def _evaluation(run: Run, stage: str | None) -> list[str]:
    """Return the paragraphs about the metrics, and where they come from."""
    intervals, manifest = metric_intervals(run, stage), run.manifest
    n = len(run.labelled.examples) if stage is None else run.metrics["stages"][stage]["n_with_target"]
    texts = f"{n:,} texts with a label" if stage is None else f"the {n:,} texts with a target that reached the stage"
    rows = []
    for key, value in _metrics(run, stage).items():
        low, high = intervals.loc[key, ["low", "high"]]
        ends = "–" if np.isnan(low) else f"{low:.4f} to {high:.4f}"
        rows.append(f"| {_METRICS[key][1]} | {value:.4f} | {ends} |")
    evalset = manifest["evalset"]
    source = PurePath(str(evalset.get("source") or evalset.get("path") or "a table")).name
    origin = {
        "run": manifest["run_id"],
        "eval set": " ".join(filter(None, (source, evalset.get("split")))),
        "SHA-256 of the eval set": evalset.get("sha256") or "unknown",
        "cascade-lab": package_version("cascade-lab") or "unknown",
    }
    return [
        "## Evaluation",
        *([f"**{WARNING}**"] if is_tuning_set(run) else []),
        f"On {texts}, with 95% intervals.",
        "\n".join(["| metric | value | interval |", "|---|---|---|", *rows]),
        "\n".join(f"- {key}: {_plain(str(value))}" for key, value in origin.items()),
    ]


def _line(text: str) -> str:
    return shorten(printable(text), _MAX_LENGTH)


def _plain(text: str) -> str:
    """Return a text of a user as Markdown that shows it as it is, on one line."""
    return escape_markdown(_line(text))


def _code(text: str) -> str:
    return _line(text).replace("`", "'")
