"""Drafts a cascade.toml from two checkpoints and an eval set, checks it on the eval set, and says what was assumed."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os.path import relpath
from pathlib import Path
from typing import Any

import numpy as np
import tomli_w
from sklearn.metrics import roc_auc_score

from cascade_lab.atomic import check_directory, locked_file, write_text
from cascade_lab.bert.checkpoint import read_json
from cascade_lab.bert.checkpoint_facts import CheckpointFacts, checkpoint_facts, is_huggingface
from cascade_lab.bert.huggingface import import_directory
from cascade_lab.bert.tokenization import Tokenizer
from cascade_lab.decisions import check_labels, probabilities
from cascade_lab.draft_labels import DraftLabels, draft_labels
from cascade_lab.evalset import EvalSet
from cascade_lab.exceptions import CheckpointError, SpecError
from cascade_lab.provenance import sha256
from cascade_lab.spec import CascadeSpec
from cascade_lab.stage import Stage
from cascade_lab.text import printable, shorten

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LENGTHS = (16, 32, 64, 128, 256, 512)
NAMES = ("gate", "intent")


@dataclass(frozen=True)
class Draft:
    """A cascade.toml that was drafted.

    Attributes
    ----------
    spec : CascadeSpec
    imported : tuple of Path
        The directories that hold converted Hugging Face checkpoints.
    assumptions : tuple of str
        What was guessed, one line each.
    checks : tuple of str
        What scoring some texts showed, one line each.
    warnings : tuple of str
        What looks wrong, one line each.
    """

    spec: CascadeSpec
    imported: tuple[Path, ...]
    assumptions: tuple[str, ...]
    checks: tuple[str, ...]
    warnings: tuple[str, ...]


def draft_cascade(
    gate: str | Path,
    intent: str | Path,
    evalset: EvalSet,
    output: str | Path,
    *,
    gate_labels: Sequence[str] | None = None,
    intent_labels: Sequence[str] | None = None,
    pass_label: str | None = None,
    limit: int = 500,
    overwrite: bool = False,
) -> Draft:
    """Write a commented cascade.toml of a gate and a classifier, whose labels and lengths fit an eval set.

    A Hugging Face directory is converted to `<output>-gate` or `<output>-intent` beside the output (without its
    ending). A conversion of the same files that is there already is used again.

    Parameters
    ----------
    gate, intent : path
        TensorFlow 1 checkpoints (directories or prefixes), or Hugging Face directories.
    evalset : EvalSet
        Labelled texts.
    output : path
        The cascade.toml.
    gate_labels, intent_labels : sequence of str, optional
        The labels in the order of the head's rows; by default those that the checkpoint names.
    pass_label : str, optional
        The gate's label for texts that go on.
    limit : int
        The most texts to score, to check the labels.
    overwrite : bool
        Replace a file that is at `output`.

    Raises
    ------
    CheckpointError, SpecError, EvalSetError
        Something is not usable, or does not fit together. Nothing was written then.
    """
    output = Path(output)
    where = Path(evalset.source).name if evalset.source else "the eval set"
    given = dict(zip(NAMES, (gate_labels, intent_labels), strict=True))
    with locked_file(output, overwrite=overwrite, what="cascade", error=SpecError), _new_directories() as made:
        facts, imported = {}, []
        for name, path in zip(NAMES, (Path(gate), Path(intent)), strict=True):
            if is_huggingface(path):
                path = _imported(path, output.with_name(f"{output.stem}-{name}"), made)
                imported.append(path)
            facts[name] = checkpoint_facts(path)
        heads = {name: _labels_of(name, facts[name], given[name]) for name in NAMES}
        labels = draft_labels(**heads, seen=evalset.column("label"), where=where, pass_label=pass_label)
        notes = _Notes([], [], [])
        lengths = {name: _length(name, facts[name], evalset, notes) for name in NAMES}
        spec = _spec(_toml(output, facts, labels, lengths, where), output)
        check_labels(spec, evalset.examples, evalset.locations)
        sample = evalset.limit(limit)
        labels = _checked_gate(spec, labels, sample, notes)
        text = _toml(output, facts, labels, lengths, where)
        spec = _spec(text, output)
        _check_intent(spec, sample, notes)
        write_text(output, text, error=SpecError)
        made.clear()
    assumptions = (*labels.assumptions, *notes.assumptions)
    return Draft(spec, tuple(imported), assumptions, tuple(notes.checks), tuple(notes.warnings))


@dataclass
class _Notes:
    assumptions: list[str]
    checks: list[str]
    warnings: list[str]


@contextmanager
def _new_directories() -> Iterator[list[Path]]:
    """Give a list for directories that are made; those that are still in it at the end are deleted."""
    made: list[Path] = []
    try:
        yield made
    finally:
        for path in made:
            shutil.rmtree(path, ignore_errors=True)


def _imported(source: Path, target: Path, made: list[Path]) -> Path:
    """Convert a Hugging Face directory, or take an earlier conversion of the same files."""
    record = target / "import.json"
    if record.is_file():
        what: Any = {"marker": "import.json", "what": "converted checkpoint", "error": CheckpointError}
        check_directory(target, overwrite=True, **what)  # removes what a killed process left
        files = read_json(record).get("files")
        if (
            isinstance(files, dict)
            and files
            and all((source / name).is_file() and sha256(source / name) == digest for name, digest in files.items())
        ):
            return target
        raise CheckpointError(
            f"{target}: was converted from other files than {source} has; delete it, or choose another output"
        )
    if target.exists():
        raise CheckpointError(
            f"{target}: is in the way: {source} is to be converted to it; rename it, or choose another output"
        )
    made.append(target)
    return import_directory(source, target)


def _labels_of(name: str, facts: CheckpointFacts, given: Sequence[str] | None) -> tuple[Sequence[str] | None, int]:
    if given is not None and len(given) != facts.n_labels:
        raise SpecError(
            f"--{name}-labels names {len(given)} labels, but {facts.init_checkpoint} has {facts.n_labels}; give one "
            "per row of its head"
        )
    if given is not None and ("" in given or len(set(given)) < len(given)):
        raise SpecError(f"--{name}-labels: a label is empty or occurs twice; give every class its own name")
    return facts.labels if given is None else given, facts.n_labels


def _length(name: str, facts: CheckpointFacts, evalset: EvalSet, notes: _Notes) -> int:
    """Return a max_seq_length in which every text fits, as far as the model has positions."""
    if facts.case_file is None:
        why = "has no capital letters" if facts.do_lower_case else "has capital letters"
        lower = str(facts.do_lower_case).lower()
        notes.assumptions.append(f"stage {name}: do_lower_case = {lower} ({facts.vocab_file.name} {why})")
    tokenizer = Tokenizer(facts.vocab_file, do_lower_case=facts.do_lower_case, max_seq_length=10**9)
    n_tokens = [len(encoding.input_ids) for encoding in tokenizer.encode(evalset.texts, evalset.texts_b)]
    longest, positions = max(n_tokens), facts.max_position_embeddings
    length = min(next((length for length in LENGTHS if length >= longest), LENGTHS[-1]), positions)
    n_cut = sum(n > length for n in n_tokens)
    cut = f"; {n_cut:,} of {len(n_tokens):,} texts are cut" if n_cut else ""
    notes.assumptions.append(f"stage {name}: max_seq_length = {length} (the longest text has {longest:,} tokens{cut})")
    return length


def _checked_gate(spec: CascadeSpec, labels: DraftLabels, sample: EvalSet, notes: _Notes) -> DraftLabels:
    """Compare the gate with the true labels; return the labels that fit better, where only a guess chose them."""
    stage = spec.stages[0]
    is_outside = np.isin(sample.column("label"), spec.reject_labels)
    if is_outside.all() or not is_outside.any():
        which = "all" if is_outside.all() else "none"
        notes.checks.append(f"gate: not checked, {which} of {len(sample):,} texts are out of scope")
        if labels.other is not None:
            notes.assumptions.append(
                f"stage gate: pass_label '{labels.pass_label}' is row {labels.pass_row} of its head"
            )
        return labels
    passes = probabilities(stage, _logits(spec, stage.name, sample))[:, labels.pass_row]
    auroc = float(roc_auc_score(is_outside, -passes))
    if labels.other is not None:
        if auroc < 0.5:
            labels, auroc = labels.other, 1 - auroc
        notes.assumptions.append(
            f"stage gate: pass_label '{labels.pass_label}' is row {labels.pass_row} of its head, which fits the true "
            "labels better than the other row"
        )
    elif auroc < 0.5:
        notes.warnings.append(
            f"the labels of the gate look swapped: its AUROC on {len(sample):,} texts is {auroc:.4f}, below 0.5; if "
            f"they are, pass --gate-labels {','.join(labels.gate[::-1])}"
        )
    notes.checks.append(f"gate: AUROC {auroc:.4f} on {len(sample):,} texts")
    return labels


def _check_intent(spec: CascadeSpec, sample: EvalSet, notes: _Notes) -> None:
    """Compare the last stage with the true labels in scope."""
    y_true = np.array(sample.column("label"), dtype=object)
    rows = np.flatnonzero(np.isin(y_true, spec.in_scope_labels))
    if not len(rows):
        notes.checks.append(f"intent: not checked, none of {len(sample):,} texts is in scope")
        return
    y_true = y_true[rows]
    predicted = np.array(spec.last.labels, dtype=object)[
        _logits(spec, spec.last.name, sample.take(rows.tolist())).argmax(axis=1)
    ]
    accuracy = float((predicted == y_true).mean())
    notes.checks.append(f"intent: accuracy {accuracy:.4f} on {len(rows):,} texts in scope")
    counts = np.unique(y_true.astype(str), return_counts=True)[1]
    if len(counts) > 1 and accuracy <= counts.max() / len(rows):
        notes.warnings.append(
            f"the intent stage is right on {accuracy:.1%} of the texts in scope, no better than always answering with "
            "the most frequent label; if the order of its labels is another one, pass --intent-labels"
        )


def _logits(spec: CascadeSpec, name: str, texts: EvalSet) -> np.ndarray:
    with Stage(spec.stage(name)) as stage:
        return stage.logits(stage.encode(texts.texts, texts.texts_b))


def _spec(text: str, output: Path) -> CascadeSpec:
    return CascadeSpec.from_dict(tomllib.loads(text), where=str(output), folder=output.parent)


def _toml(
    output: Path,
    facts: Mapping[str, CheckpointFacts],
    labels: DraftLabels,
    lengths: Mapping[str, int],
    where: str,
) -> str:
    """Return the text of the cascade.toml; each comment says where the next line comes from."""
    folder = output.parent.resolve()

    def path(target: Path) -> str:
        return Path(relpath(target.resolve(), folder)).as_posix()

    def stage(name: str, own: Mapping[str, tuple[Any, str]], names: Sequence[str]) -> str:
        fact = facts[name]
        if fact.case_file is None:
            case = f"a guess: {fact.vocab_file.name} has {'no ' if fact.do_lower_case else ''}capital letters"
        else:
            case = f"as recorded in {fact.case_file.name}"
        length = f"in tokens; the texts of {where} fit, as far as the model has positions"
        listed: Any = list(names)
        if fact.labels_file is not None and tuple(names) == fact.labels:
            listed = path(fact.labels_file)
        lines = {
            "name": (name, ""),
            "init_checkpoint": (path(fact.init_checkpoint), ""),
            "bert_config_file": (path(fact.bert_config_file), ""),
            "vocab_file": (path(fact.vocab_file), ""),
            "do_lower_case": (fact.do_lower_case, case),
            "max_seq_length": (lengths[name], length),
            **own,
            "labels": (listed, "in the order of the head's rows"),
        }
        return "[[stage]]\n" + "".join(_line(key, *value) for key, value in lines.items())

    of_gate = {
        "pass_label": (labels.pass_label, "a text goes on if probability(pass_label) >= threshold"),
        "threshold": (0.5, "a start; `cascade-lab tune` chooses it on a run"),
    }
    of_intent = {"reject_label": (labels.reject_label, "the answer where no label reaches min_probability (below)")}
    name = output.stem if output.stem != "cascade" else folder.name or "cascade"
    return (
        f"# Drafted by `cascade-lab init` for the texts of {_comment(where)}. Paths are relative to this file.\n"
        + _line("name", name, "")
        + "\n"
        + stage("gate", of_gate, labels.gate)
        + "\n"
        + stage("intent", of_intent, labels.intent)
        + "# min_probability = 0.3\n"
    )


def _line(key: str, value: Any, comment: str) -> str:
    return (f"# {_comment(comment)}\n" if comment else "") + tomli_w.dumps({key: value})


def _comment(text: str) -> str:
    return printable(shorten(text, 200))
