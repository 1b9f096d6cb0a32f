"""Decides which labels the two stages of a drafted cascade have, from what the checkpoints and an eval set name."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cascade_lab.exceptions import SpecError
from cascade_lab.text import shorten

_INSIDE = {
    "in",
    "inscope",
    "indomain",
    "inside",
    "ins",
    "id",
    "known",
    "pass",
    "accept",
    "yes",
    "true",
    "positive",
    "1",
}
_OUTSIDE = {"oos", "ood", "out", "outofscope", "outofdomain", "outside", "unknown", "other", "none", "reject"}
_NO = {"no", "false", "negative", "0"}  # of a gate only: an intent may have such a name too


@dataclass(frozen=True)
class DraftLabels:
    """The labels of a gate and of the stage after it.

    Attributes
    ----------
    gate, intent : tuple of str
        In the order of the rows of the heads.
    pass_label, reject_label : str
        Two of the gate's labels.
    assumptions : tuple of str
        What was guessed, one line each.
    other : DraftLabels or None
        The same with the other row of the gate as its pass label, where only a guess says which of the two it is.
    """

    gate: tuple[str, ...]
    intent: tuple[str, ...]
    pass_label: str
    reject_label: str
    assumptions: tuple[str, ...]
    other: DraftLabels | None = None

    @property
    def pass_row(self) -> int:
        return self.gate.index(self.pass_label)


def draft_labels(
    gate: tuple[Sequence[str] | None, int],
    intent: tuple[Sequence[str] | None, int],
    *,
    seen: Sequence[str],
    where: str,
    pass_label: str | None = None,
) -> DraftLabels:
    """Decide the labels of both stages.

    Parameters
    ----------
    gate, intent : tuple
        The names of a stage's labels in the order of its rows (None where unknown), and their number.
    seen : sequence of str
        The labels in the eval set.
    where : str
        The eval set, for messages.
    pass_label : str, optional
        The gate's label for texts that go on.

    Raises
    ------
    SpecError
        The labels of the eval set and those of the checkpoints do not fit together.

    Examples
    --------
    >>> labels = draft_labels((None, 2), (("pay", "play"), 2), seen=["pay", "play", "oos"], where="set.csv")
    >>> labels.gate, labels.pass_label, labels.other.gate
    (('oos', 'in'), 'in', ('in', 'oos'))
    """
    if pass_label is not None and not pass_label.strip():
        raise SpecError("--pass-label is empty; give one of the gate's labels")
    seen = sorted(set(seen), key=_number_or_text)
    gate_names, _ = gate
    intents, assumptions = _intent_labels(intent, seen, gate_names, where)
    outside = [label for label in seen if label not in intents]
    unknown = [label for label in outside if label not in (gate_names or ())]
    if len(unknown) > 1 or (unknown and len(outside) > 1):
        raise SpecError(
            f"{where}: no stage has the labels {_listed(unknown)}, and one at most can stand for texts out of scope; "
            "rename labels with --label-map, or give the stages' labels with --gate-labels and --intent-labels"
        )
    if gate_names is None:
        return _unnamed_gate(gate[1], intents, unknown, assumptions, where, pass_label)
    names = list(gate_names)
    if pass_label is not None and pass_label not in names:
        raise SpecError(f"--pass-label '{pass_label}' is no label of the gate ({_listed(names)}); give one of them")
    is_known = pass_label is not None
    if pass_label is None:
        rejects = [name for name in names if name in outside or name in intents]
        pass_label, is_known = _pass_label(names, rejects)
        if not rejects and (is_known or len(names) > 2):
            why = "its name says so" if is_known else "it is the last one of the gate's labels"
            assumptions.append(f"stage gate: pass_label = '{pass_label}' ({why})")
    own = _named_gate(names, pass_label, intents, unknown, assumptions, where)
    if is_known or len(names) > 2:
        return own
    first = next(name for name in names if name != pass_label)
    return replace(own, other=_named_gate(names, first, intents, unknown, assumptions, where))


def _named_gate(
    names: Sequence[str],
    pass_label: str,
    intents: Sequence[str],
    unknown: Sequence[str],
    assumptions: Sequence[str],
    where: str,
) -> DraftLabels:
    """Return the labels of a gate with names; the eval set may have another one for texts out of scope."""
    others = [name for name in names if name != pass_label]
    if not unknown:
        return DraftLabels(tuple(names), tuple(intents), pass_label, others[0], tuple(assumptions))
    if len(others) > 1:
        raise SpecError(
            f"{where}: label '{unknown[0]}' belongs to no stage (gate: {_listed(names)}); rename it with "
            "--label-map, or give the gate's labels with --gate-labels"
        )
    renamed = tuple(unknown[0] if name == others[0] else name for name in names)
    line = f"stage gate: its label '{others[0]}' is called '{unknown[0]}', as in {where}"
    return DraftLabels(renamed, tuple(intents), pass_label, unknown[0], (*assumptions, line))


def _intent_labels(
    intent: tuple[Sequence[str] | None, int], seen: Sequence[str], gate: Sequence[str] | None, where: str
) -> tuple[list[str], list[str]]:
    names, n_labels = intent
    if names is not None:
        return list(names), []
    inside = [label for label in seen if label not in (gate or ())]
    if len(inside) == n_labels + 1:
        inside = [label for label in inside if _folded(label) not in _OUTSIDE]
    if len(inside) != n_labels:
        raise SpecError(
            f"{where}: has {len(inside)} labels in scope, but the intent checkpoint has {n_labels} labels without "
            "names; give them with --intent-labels, in the order of its head"
        )
    return inside, [f"stage intent: its labels have no names; those of {where} are taken in sorted order"]


def _unnamed_gate(
    n_labels: int,
    intents: Sequence[str],
    outside: Sequence[str],
    assumptions: Sequence[str],
    where: str,
    pass_label: str | None,
) -> DraftLabels:
    if n_labels != 2:
        raise SpecError(
            f"the gate has {n_labels} labels without names; give them with --gate-labels, in the order of its head"
        )
    inside = pass_label or "in"
    reject = outside[0] if outside else "oos"
    if inside in (*intents, reject):
        raise SpecError(
            f"{where}: '{inside}' is a label already, so it cannot be the gate's pass label; choose another one with "
            "--pass-label"
        )
    line = f"stage gate: its labels have no names; they are called '{reject}' and '{inside}'"
    own = DraftLabels((reject, inside), tuple(intents), inside, reject, (*assumptions, line))
    return replace(own, other=replace(own, gate=(inside, reject)))


def _pass_label(names: Sequence[str], rejects: Sequence[str]) -> tuple[str, bool]:
    """Return the pass label, and whether anything but its place says so."""
    left = [name for name in names if name not in rejects]
    if not left:
        raise SpecError(
            f"every label of the gate ({_listed(names)}) is an answer too; name its pass label with --gate-labels"
        )
    if len(left) == 1:
        return left[0], True
    inside = [name for name in left if _folded(name) in _INSIDE]
    not_outside = [name for name in left if _folded(name) not in _OUTSIDE | _NO]
    for found in (inside, not_outside):
        if len(found) == 1:
            return found[0], True
    return left[-1], False


def _folded(label: str) -> str:
    return "".join(char for char in label.casefold() if char.isalnum())


def _number_or_text(label: str) -> tuple[bool, int, str]:
    """Sort "10" after "9"."""
    is_number = label.isdecimal() and len(label) < 10
    return (not is_number, int(label) if is_number else 0, label)


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(f"'{shorten(label, 40)}'" for label in labels[:5])
    return shown + (f" and {len(labels) - 5} more" if len(labels) > 5 else "")
