"""Builders that the tests share: random checkpoints, and runs of random cascades written without TensorFlow."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from textwrap import dedent

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from cascade_lab.decisions import decide, route
from cascade_lab.provenance import sha256
from cascade_lab.run import SCHEMA_VERSION, Run, StageScores
from cascade_lab.run_tables import examples_frame, predictions_frame
from cascade_lab.serving.answered import Answered, SeenRows, ServedCascade
from cascade_lab.spec import CascadeSpec

WORDS = [
    "pay",
    "bill",
    "card",
    "lost",
    "play",
    "music",
    "weather",
    "what",
    "is",
    "my",
    "the",
    "a",
    "sing",
    "song",
    "please",
    "now",
]
CONFIG = {
    "attention_probs_dropout_prob": 0.1,
    "hidden_act": "gelu",
    "hidden_dropout_prob": 0.1,
    "hidden_size": 32,
    "initializer_range": 0.02,
    "intermediate_size": 64,
    "max_position_embeddings": 48,
    "num_attention_heads": 4,
    "num_hidden_layers": 2,
    "type_vocab_size": 2,
}


def write_checkpoint(
    folder: Path, num_labels: int, *, seed: int, scale: float = 0.3, leave_out: str = "", **change: np.ndarray
) -> None:
    """Write a checkpoint as run_classifier leaves it: random weights, Adam slots, global_step.

    `leave_out` names a variable that is not written; `change` gives others another value (`__` stands for `/`).
    """
    import tensorflow as tf

    from cascade_lab.bert.checkpoint import variable_shapes

    folder.mkdir(parents=True, exist_ok=True)
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS, *"abcdefghijklmnopqrstuvwxyz.?!"]
    tokens = list(dict.fromkeys(tokens)) + [f"##{letter}" for letter in "abcdefghijklmnopqrstuvwxyz"]
    (folder / "vocab.txt").write_text("\n".join(tokens) + "\n")
    config = {**CONFIG, "vocab_size": len(tokens)}
    (folder / "bert_config.json").write_text(json.dumps(config))
    rng = np.random.default_rng(seed)
    tf1 = tf.compat.v1
    with tf.Graph().as_default(), tf1.Session() as session:
        for name, shape in variable_shapes(config, num_labels).items():
            if name == leave_out:
                continue
            center = 1.0 if name.endswith("gamma") else 0.0
            value = change.get(name.replace("/", "__"), center + rng.normal(0, scale, shape))
            for slot in ("", "/adam_m", "/adam_v"):
                tf1.get_variable(name + slot, initializer=np.float32(value))
        tf1.get_variable("global_step", initializer=np.int64(7))
        session.run(tf1.global_variables_initializer())
        tf1.train.Saver().save(session, str(folder / "model.ckpt"), global_step=7)


SPEC = """
    name = "tiny"
    max_seq_length = 24

    [[stage]]
    name = "gate"
    init_checkpoint = "gate"
    bert_config_file = "gate/bert_config.json"
    vocab_file = "gate/vocab.txt"
    labels = ["oos", "in"]
    pass_label = "in"
    threshold = 0.5

    [[stage]]
    name = "intent"
    init_checkpoint = "intent"
    bert_config_file = "intent/bert_config.json"
    vocab_file = "intent/vocab.txt"
    labels = ["0", "1", "2", "3"]
"""


def write_cascade(folder: Path) -> Path:
    """Write a two-stage cascade with random weights; return its cascade.toml."""
    write_checkpoint(folder / "gate", 2, seed=1)
    write_checkpoint(folder / "intent", 4, seed=2)
    path = folder / "cascade.toml"
    path.write_text(dedent(SPEC))
    return path


def texts(n: int, *, seed: int = 0) -> list[str]:
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDS, rng.integers(1, 30))) for _ in range(n)]


def random_spec(*, n_gates: int = 1, n_labels: int = 4) -> CascadeSpec:
    """Return a cascade whose stages were scored elsewhere.

    Every gate rejects with a label of its own, `oos0`, `oos1`, …; the last stage with `oos0`.
    """
    gates = [
        {"name": f"gate{i}", "labels": [f"oos{i}", "in"], "pass_label": "in", "threshold": 0.5} for i in range(n_gates)
    ]
    last = {"name": "last", "labels": [f"label{i}" for i in range(n_labels)], "reject_label": "oos0"}
    return CascadeSpec.from_dict({"name": "random", "stage": [*gates, last]})


def random_run(
    folder: Path, *, n: int = 200, n_gates: int = 1, n_labels: int = 4, seed: int = 0, skill: float = 1.5
) -> Run:
    """Write a run of `n` texts through `n_gates` gates and a last stage that may reject, with shadow scores.

    `skill` is how far the logit of the right label stands above the others.
    """
    rng = np.random.default_rng(seed)
    spec = random_spec(n_gates=n_gates, n_labels=n_labels)
    labels, rejects = list(spec.last.labels), [f"oos{i}" for i in range(n_gates)]
    y_true = rng.choice([*labels, *rejects, *rejects], n) if n_gates else rng.choice(labels, n)
    examples = pd.DataFrame(
        {
            "example_id": [f"{i}" for i in range(n)],
            "text": [
                " ".join([*rng.choice(["pay", "the", "bill", "now"], rng.integers(1, 9)), f"{i}"]) for i in range(n)
            ],
            "text_b": None,
            "label": y_true,
        }
    )
    logits = {}
    for stage in spec.stages:
        scores = rng.normal(size=(n, len(stage.labels)))
        for row, label in enumerate(y_true):
            if label in stage.labels:
                scores[row, stage.labels.index(label)] += skill
            elif stage.is_gate and not label.startswith("oos"):
                scores[row, stage.labels.index(stage.pass_label)] += skill
        logits[stage.name] = scores.astype(np.float32)
    return write_run(folder, spec, examples, logits, seed=seed)


def write_run(
    folder: Path,
    spec: CascadeSpec,
    examples: pd.DataFrame,
    logits: dict[str, np.ndarray],
    *,
    seed: int = 0,
    shadow: bool = True,
) -> Run:
    """Write the run that a cascade makes of `examples` if its stages compute `logits`, rows as in `examples`."""
    return memory_run(spec, examples, logits, seed=seed, shadow=shadow).write(folder)


def memory_run(
    spec: CascadeSpec,
    examples: pd.DataFrame,
    logits: dict[str, np.ndarray],
    *,
    seed: int = 0,
    shadow: bool = True,
) -> Run:
    """Return the run that `write_run` writes."""
    n = len(examples)
    routed = route(spec, {stage.name: decide(stage, logits[stage.name]) for stage in spec.stages})
    scores = {}
    for name, arrived in routed.reached.items():
        scored = ~np.isnan(logits[name][:, 0]) & (arrived | shadow)
        values = np.where(scored[:, None], logits[name], np.nan).astype(np.float32)
        scores[name] = StageScores(values, scored, scored & ~arrived)
    timings = pd.DataFrame(
        {
            "stage": list(routed.reached),
            "batch": 0,
            "n_examples": [int(arrived.sum()) for arrived in routed.reached.values()],
            "sequence_length": 9,
            "n_tokens": 9,
            "tokenize_seconds": 0.001,
            "run_seconds": 0.01,
        }
    )
    manifest = {
        "schema_version": SCHEMA_VERSION,
        "run_id": f"random-{seed}",
        "source": "evaluation",
        "cascade": spec.to_dict(),
        "thresholds": spec.thresholds,
        "tuned_on": None,
        "evalset": {"path": "random.tsv", "sha256": f"{seed:064x}", "split": None, "n_examples": n},
        "inputs": {},
        "contents": {},
        "stages": {},
        "batch_size": 32,
        "shadow": shadow,
    }
    predictions = predictions_frame(examples, routed.frame())
    return Run(manifest, examples_frame(examples), scores, predictions, timings)


def rewrite_table(run: Path, name: str, table: pa.Table | bytes) -> None:
    """Replace a table of a run directory, and its digest in the manifest."""
    if isinstance(table, bytes):
        (run / name).write_bytes(table)
    else:
        pq.write_table(table, run / name)
    path = run / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["contents"][name] = sha256(run / name)
    path.write_text(json.dumps(manifest), encoding="utf-8")


GATE = {"name": "gate", "labels": ["oos", "in"], "pass_label": "in", "threshold": 0.5}


def run_of_probabilities(
    stages: list[dict],
    labels: list[str | None],
    probabilities: dict[str, list[list[float]] | np.ndarray],
    *,
    texts: list[str] | None = None,
    shadow: bool = True,
    name: str = "by hand",
) -> Run:
    """Return a run in memory of examples `t1`, `t2`, …, from the probabilities that each stage computes for them."""
    n = len(labels)
    examples = pd.DataFrame(
        {
            "example_id": [f"t{i + 1}" for i in range(n)],
            "text": [f"text {i + 1}" for i in range(n)] if texts is None else texts,
            "text_b": None,
            "label": labels,
        }
    )
    logits = {stage: np.log(np.array(rows)).astype(np.float32) for stage, rows in probabilities.items()}
    return memory_run(CascadeSpec.from_dict({"name": name, "stage": stages}), examples, logits, shadow=shadow)


def mixed_run(seed: int, *, n: int = 50) -> Run:
    """Return a run in memory of a random cascade of any kind.

    It has 1 to 3 gates, which may share a reject label or have two, and a last stage that rejects with a class, with
    `min_probability`, with both or not at all; thresholds and temperatures are random.
    """
    rng = np.random.default_rng(seed)
    stages: list[dict] = []
    for i in range(int(rng.integers(1, 4))):
        rejects = ["oos"] if rng.random() < 0.4 else [f"oos{i}", "abuse"] if rng.random() < 0.5 else [f"oos{i}"]
        gate = {"name": f"gate{i}", "labels": [*rejects, "in"], "pass_label": "in", "threshold": rng.random()}
        stages.append({**gate, "temperature": float(rng.uniform(0.5, 2))})
    labels = [f"label{i}" for i in range(int(rng.integers(2, 5)))]
    last: dict = {"name": "last", "labels": labels + (["oos"] if rng.random() < 0.4 else [])}
    if rng.random() < 0.6:
        last |= {"reject_label": str(rng.choice(["oos", "unsure"])), "min_probability": rng.random() * 0.6}
        last["min_probabilities"] = {"label0": rng.random()}
    spec = CascadeSpec.from_dict({"name": "x", "stage": [*stages, last]})
    probabilities = {s.name: rng.dirichlet(np.full(len(s.labels), 0.7), n) + 1e-6 for s in spec.stages}
    return run_of_probabilities([*stages, last], rng.choice(spec.labels, n).tolist(), probabilities)


HOSTILE = [
    "<script>alert(1)</script>",
    '=HYPERLINK("http://x")',
    "$x_1$",
    "[bold]b[/bold]\x1b[31m",
    "مرحبا 🙂",
    "y" * 50_000,
]
"""Texts that must not do anything on a terminal, in a browser, in a spreadsheet or in matplotlib."""


def without_texts(table: pd.DataFrame) -> pd.DataFrame:
    """Return what `replay` or `predict` answers, without the texts."""
    return table.drop(columns=["text", "text_b"], errors="ignore")


def logits_of(run: Run) -> dict[str, np.ndarray]:
    return {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}


def perturbed_run(
    run: Run,
    folder: Path,
    *,
    seed: int = 0,
    noise: float = 1.5,
    order: np.ndarray | None = None,
    thresholds: dict[str, float] | None = None,
    shadow: bool = True,
    examples: pd.DataFrame | None = None,
) -> Run:
    """Write a run of the same texts by a cascade with other logits, with the rows of `run` in another order."""
    rng = np.random.default_rng(seed)
    logits = {name: scores + rng.normal(0, noise, scores.shape) for name, scores in logits_of(run).items()}
    order = np.arange(len(run.examples)) if order is None else order
    examples = (run.examples if examples is None else examples).iloc[order].reset_index(drop=True)
    logits = {name: scores[order].astype(np.float32) for name, scores in logits.items()}
    return write_run(folder, run.spec.with_thresholds(thresholds or {}), examples, logits, shadow=shadow)


def one_stage_run(run: Run, folder: Path, *, seed: int = 5, reject_label: str | None = None) -> Run:
    """Write a run of the same texts through a single stage, whose labels are those of the last one and oos0."""
    stage = replace(run.spec.last, name="all", labels=(*run.spec.last.labels, "oos0"), reject_label=reject_label)
    scores = np.random.default_rng(seed).normal(size=(len(run.examples), len(stage.labels)))
    scores[np.arange(len(scores)), [stage.labels.index(label) for label in run.examples["label"]]] += 2
    return write_run(folder, CascadeSpec("one", (stage,)), run.examples, {"all": scores.astype(np.float32)})


def hostile_pair(folder: Path) -> tuple[Run, Run]:
    """Write two runs whose texts, labels, columns and names are `HOSTILE`."""
    run = random_run(folder / "run", n=200, n_labels=len(HOSTILE), seed=7)
    names = {f"label{i}": text for i, text in enumerate(HOSTILE)}
    last = replace(run.spec.last, labels=tuple(HOSTILE))
    spec = CascadeSpec(HOSTILE[3], (*run.spec.stages[:-1], last))
    texts = np.array(HOSTILE, dtype=object)[np.arange(200) % len(HOSTILE)]
    examples = run.examples.assign(text=texts, text_b=texts, label=run.examples["label"].replace(names), source=texts)
    a = write_run(folder / "a$b$", spec, examples, logits_of(run))
    return a, perturbed_run(a, folder / "[bold]b")


def served_cascade(run: Run) -> ServedCascade:
    """Return what a service says of the cascade of a run."""
    manifest = {key: run.manifest[key] for key in ("cascade", "thresholds", "tuned_on", "inputs", "stages")}
    return ServedCascade(hashlib.sha256(json.dumps(manifest["cascade"]).encode()).hexdigest(), manifest)


def answered_batches(run: Run, *, seed: int = 0, max_size: int = 16, start: float = 1.75e9) -> list[Answered]:
    """Return what a service hands to its traffic log if it answers the texts of a run as the run does.

    The texts arrive in the order of the run, one each millisecond from `start` on (seconds since 1970), and are
    answered in batches of 1 to `max_size`.
    """
    rng, batches, first = np.random.default_rng(seed), [], 0
    reached = route(run.spec, {stage.name: run.decision(stage.name) for stage in run.spec.stages}).reached
    at_last = reached[run.spec.last.name]
    second = [text if isinstance(text, str) else None for text in run.examples["text_b"]]
    cascade, n = served_cascade(run), len(run.examples)
    columns = ("predicted", "decided_by", "probability", "confidence")
    answers = {name: np.array(run.predictions[name].tolist()) for name in columns}
    while first < n:
        rows = np.arange(first, min(n, first + int(rng.integers(1, max_size + 1))))
        first = rows[-1] + 1
        seen = {name: np.flatnonzero(arrived[rows]) for name, arrived in reached.items()}
        evidence = {name: np.where(at_last, values, np.nan)[rows] for name, values in run.evidence(run.spec).items()}
        batches.append(
            Answered(
                cascade,
                run.examples["example_id"].iloc[rows].tolist(),
                start + rows / 1000,
                run.examples["text"].iloc[rows].tolist(),
                [second[row] for row in rows] if any(second[row] for row in rows) else None,
                {name: values[rows] for name, values in answers.items()},
                {name: SeenRows(own, run.scores(name).logits[rows[own]]) for name, own in seen.items()},
                evidence,
            )
        )
    return batches
