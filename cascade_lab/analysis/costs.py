"""What decisions cost: the same for every text of an outcome, or by the text's true and predicted label.

With a cost matrix, the code of a text has its outcome and its cost: outcome + 6 * the index of the cost in
`CostMatrix.units`. Counts of texts by outcome then have two more numbers, the sums of the costs of the texts in scope
and of those out of scope (`COST_SUMS`). Nothing else differs: `metric_from_counts` computes the mean cost from both.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd

from cascade_lab.analysis.outcomes import COST_SUMS, OUT_OF_SCOPE, OUTCOMES, Scope, has_outcome, outcome_codes
from cascade_lab.exceptions import GoalError, did_you_mean
from cascade_lab.text import exact

if TYPE_CHECKING:
    from cascade_lab.run import Run

_N_DIGITS = 9  # of the largest cost: the sums of nine million costs are then exact
_N = len(OUTCOMES)


@dataclass(frozen=True)
class CostMatrix:
    """What each predicted label costs for each true label.

    To reject is to predict a reject label, so the column of a reject label has the costs of rejecting (Chow 1970), and
    its row the costs of the answers to texts out of scope.

    Attributes
    ----------
    labels : tuple of str
        The labels of the rows and, in the same order, of the columns.
    rows : tuple of tuple of float
        One row per true label, one number per predicted label; none is negative.
    name : str
        What it was read from, for messages.

    Raises
    ------
    GoalError
        A cost that is no number, negative or infinite; no label, a label twice, or costs that are all equal.

    Examples
    --------
    >>> matrix = CostMatrix(("pay", "oos"), ((0, 1), (5, 0)))
    >>> float(matrix.of(["pay", "oos", "oos"], ["oos", "pay", "oos"]).sum())
    6.0
    """

    labels: tuple[str, ...]
    rows: tuple[tuple[float, ...], ...]
    name: str = field(default="cost_matrix", compare=False)

    def __post_init__(self) -> None:
        _check_labels(self.labels, self.name, "row")
        for label, costs in zip(self.labels, self.rows, strict=True):
            for other, cost in zip(self.labels, costs, strict=True):
                if not 0 <= cost < np.inf:
                    raise GoalError(
                        f"{self.name}: the cost of answering '{other}' for '{label}' is {cost!r}; give a number that "
                        "is not negative"
                    )
        if len(self.units) == 1:
            raise GoalError(f"{self.name}: all costs are {self.rows[0][0]:g}, so no thresholds are better than others")

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, name: str = "cost_matrix") -> CostMatrix:
        """Take the costs from a table: the index has the true labels, the columns the predicted labels, in any order.

        Raises
        ------
        GoalError
            The rows and the columns have other labels, or a label twice; or a cost is not usable.
        """
        rows, columns = ([str(label) for label in axis] for axis in (frame.index, frame.columns))
        for labels, kind in ((rows, "row"), (columns, "column")):
            _check_labels(labels, name, kind)
        for here, there, kind in ((columns, rows, "row"), (rows, columns, "column")):
            missing = [label for label in here if label not in set(there)]
            if missing:
                raise GoalError(f"{name}: {_listed(missing)} {_has(missing)} no {kind}; add it")
        values = frame.set_axis(rows, axis=0).set_axis(columns, axis=1)[rows]
        numbers = [[_number(cost, name, row, column) for column, cost in values.loc[row].items()] for row in rows]
        return cls(tuple(rows), tuple(map(tuple, numbers)), name)

    @classmethod
    def read(cls, path: str | Path) -> CostMatrix:
        """Read a csv file: the first line has the predicted labels, the first column the true labels.

        What the first cell says does not matter. Each cell must have a number: an empty one is refused.

        Raises
        ------
        GoalError
            The file cannot be read; or as `from_frame`.
        """
        try:
            lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            reason = error.strerror if isinstance(error, OSError) else error
            raise GoalError(f"{path}: cannot be read: {reason}; give a csv file in UTF-8") from error
        return cls.from_lines(lines, str(path))

    @classmethod
    def from_lines(cls, lines: Sequence[str], name: str = "cost_matrix") -> CostMatrix:
        """Read the lines of a csv file, such as those of `lines`; otherwise as `read`."""
        try:
            text = io.StringIO("\n".join(lines), newline="")
            header, *body = [cells for cells in csv.reader(text, strict=True) if any(cells)] or [[]]
        except csv.Error as error:
            raise GoalError(f"{name}: cannot be read: {error}; give csv") from error
        if not body or len(header) < 2:
            raise GoalError(
                f"{name}: has no costs; give a line of predicted labels, then one line per true label, with commas "
                "between the cells"
            )
        for cells in body:
            if len(cells) != len(header):
                raise GoalError(
                    f"{name}: the row of '{cells[0]}' has {len(cells) - 1} costs, for {len(header) - 1} columns; give "
                    "one cost for each column"
                )
        frame = pd.DataFrame([cells[1:] for cells in body], [cells[0] for cells in body], header[1:], dtype=object)
        return cls.from_frame(frame, name)

    def lines(self) -> list[str]:
        """Return the matrix as the lines of a csv file.

        >>> CostMatrix(("pay", "oos"), ((0, 1), (5, 0))).lines()
        ['label,pay,oos', 'pay,0,1', 'oos,5,0']
        """
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["label", *self.labels])
        for label, costs in zip(self.labels, self.rows, strict=True):
            writer.writerow([label, *map(exact, costs)])
        return text.getvalue().rstrip("\n").split("\n")

    def frame(self) -> pd.DataFrame:
        """Return the costs as a table: true labels as index, predicted labels as columns."""
        return pd.DataFrame(self.rows, self.labels, self.labels)

    def __repr__(self) -> str:
        n = len(self.labels)
        return f"<CostMatrix {self.name}: {n} × {n} costs up to {max(map(max, self.rows)):g}>"

    def check(self, spec: Scope) -> None:
        """Raise GoalError if the labels are not those that a cascade can answer."""
        needed = [*spec.in_scope_labels, *spec.reject_labels]
        missing = [label for label in needed if label not in self._places]
        unknown = [label for label in self.labels if label not in set(needed)]
        if missing:
            raise GoalError(f"{self.name}: {_listed(missing)} {_has(missing)} no row and no column; add them")
        if unknown:
            raise GoalError(
                f"{self.name}: the cascade cannot answer {_listed(unknown)}{did_you_mean(unknown[0], needed)}; take "
                "out the row and the column"
            )

    @property
    def prices(self) -> dict[str, float]:
        """What a unit of each of `COST_SUMS` costs."""
        return dict.fromkeys(COST_SUMS, self._unit)

    @property
    def bounds(self) -> tuple[float, float]:
        """The lowest and the highest cost."""
        return float(self.units[0] * self._unit), float(self.units[-1] * self._unit)

    @cached_property
    def units(self) -> np.ndarray:
        """The different costs as whole multiples of a power of ten, ascending: sums of them are exact."""
        return np.unique(self._multiples)

    def of(self, y_true: Sequence[str] | np.ndarray, y_pred: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the cost of each text: float, shape (n,).

        Raises GoalError for a label that the matrix lacks.
        """
        return self.units[self.indices(y_true, y_pred)] * self._unit

    def indices(self, y_true: Sequence[str] | np.ndarray, y_pred: Sequence[str] | np.ndarray) -> np.ndarray:
        """Return the cost of each text as an index into `units`: int, shape (n,)."""
        row, column = (self._places.get_indexer(labels) for labels in (y_true, y_pred))
        for places, labels in ((row, y_true), (column, y_pred)):
            if (places < 0).any():
                missing = [str(label) for label in pd.unique(np.asarray(labels, dtype=object)[places < 0])]
                raise GoalError(f"{self.name}: {_listed(missing)} {_has(missing)} no row and no column; add them")
        return np.searchsorted(self.units, self._multiples)[row, column]

    @cached_property
    def _places(self) -> pd.Index:
        return pd.Index(self.labels, dtype=object)

    @cached_property
    def _n_decimals(self) -> int:
        """The decimals that all costs have; fewer where that would be more than nine digits."""
        costs = np.array(self.rows, dtype=np.float64)
        at_most = min(_N_DIGITS - int(np.ceil(np.log10(costs.max()))), 300) if costs.max() > 0 else 0
        return next((n for n in range(at_most) if (np.round(costs, n) == costs).all()), at_most)

    @property
    def _unit(self) -> float:
        return float(10.0**-self._n_decimals)

    @cached_property
    def _multiples(self) -> np.ndarray:
        return np.round(np.array(self.rows, dtype=np.float64) * 10.0**self._n_decimals).astype(np.int64)


Costs: TypeAlias = Mapping[str, float] | CostMatrix
"""What each outcome costs (one that is not named costs nothing), or what each pair of labels costs."""


def outcome_cost_matrix(spec: Scope, costs: Mapping[str, float]) -> pd.DataFrame:
    """Return the cost matrix in which every outcome has one cost, such as to change some of its cells.

    Parameters
    ----------
    spec : CascadeSpec or LabelScope
    costs : mapping of str to float
        What each outcome costs, of `OUTCOMES`; one that is not named costs nothing.

    Examples
    --------
    >>> from cascade_lab.analysis.outcomes import LabelScope
    >>> scope = LabelScope(in_scope_labels=("pay", "play"), reject_labels=("oos",))
    >>> outcome_cost_matrix(scope, {"false reject": 1, "wrong class": 2, "false accept": 5})
          pay  play  oos
    pay   0.0   2.0  1.0
    play  2.0   0.0  1.0
    oos   5.0   5.0  0.0
    """
    labels = [*spec.in_scope_labels, *spec.reject_labels]
    of_outcome = np.array([costs.get(outcome, 0.0) for outcome in OUTCOMES])
    rows = [of_outcome[outcome_codes(spec, [label] * len(labels), labels)] for label in labels]
    return pd.DataFrame(rows, labels, labels)


def text_codes(spec: Scope, y_true: Any, y_pred: Any, costs: Costs | None = None) -> np.ndarray:
    """Return the code of each text: int, shape (n,); without a cost matrix that of `outcome_codes`.

    Raises GoalError for a label that the matrix lacks.
    """
    codes = outcome_codes(spec, y_true, y_pred)
    return with_costs(codes, y_true, y_pred, costs)


def with_costs(codes: np.ndarray, y_true: Any, y_pred: Any, costs: Costs | None) -> np.ndarray:
    """Return codes with the costs of a matrix, in place of those that the codes may have: int, shape (n,)."""
    return codes % _N + (_N * costs.indices(y_true, y_pred) if isinstance(costs, CostMatrix) else 0)


def run_codes(run: Run, costs: Costs | None = None) -> np.ndarray:
    """Return the code of each text of a run, all of whose texts have labels: int, shape (n,)."""
    return text_codes(run.spec, run.examples["label"], run.predictions["predicted"], costs)


def n_codes(costs: Costs | None = None) -> int:
    """Return how many codes there are: 6, or with a matrix 6 for each different cost."""
    return _N * (len(costs.units) if isinstance(costs, CostMatrix) else 1)


def count_codes(codes: np.ndarray, weights: np.ndarray | None = None, costs: Costs | None = None) -> np.ndarray:
    """Count texts by outcome: shape (6,), or with a matrix (8,), with the sums of their costs (`COST_SUMS`).

    Parameters
    ----------
    codes : ndarray of int, shape (n,)
    weights : ndarray of int, shape (n,), optional
        How often each text counts.
    costs : mapping or CostMatrix, optional
        With which the codes were made.

    Examples
    --------
    >>> matrix = CostMatrix(("pay", "oos"), ((0, 1), (5, 0)))
    >>> scope = (("pay",), ("oos",))
    >>> from cascade_lab.analysis.outcomes import LabelScope
    >>> codes = text_codes(LabelScope(*scope), ["pay", "oos", "oos"], ["oos", "pay", "oos"], matrix)
    >>> count_codes(codes, costs=matrix).tolist()
    [0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 1.0, 5.0]
    """
    return count_by_place(np.zeros(len(codes), dtype=np.int64), 1, codes, weights, costs)[0]


def count_by_place(
    places: np.ndarray,
    n_places: int,
    codes: np.ndarray,
    weights: np.ndarray | None = None,
    costs: Costs | None = None,
) -> np.ndarray:
    """Count the texts at each place as `count_codes` does: shape (n_places, 6) or (n_places, 8).

    `places`, int of shape (n,), has the place of each text, such as a cell of a histogram.
    """
    # bincount returns floats where there are weights.
    counts = np.bincount(places * _N + codes % _N, weights, n_places * _N).reshape(n_places, _N).astype(np.int32)
    if not isinstance(costs, CostMatrix):
        return counts
    cost = costs.units[codes // _N] * (1 if weights is None else weights)
    sums = np.bincount(places * 2 + has_outcome(codes, OUT_OF_SCOPE), cost, n_places * 2)
    return np.concatenate([counts, sums.reshape(n_places, 2)], axis=1)


def counts_of_codes(costs: Costs | None = None) -> np.ndarray:
    """Return what one text of each code counts: shape (n_codes, 6) or (n_codes, 8)."""
    codes = np.arange(n_codes(costs))
    return count_by_place(codes, len(codes), codes, None, costs)


def prices(costs: Costs | None) -> Mapping[str, float]:
    """Return costs as `metric_from_counts` takes them."""
    return costs.prices if isinstance(costs, CostMatrix) else costs or {}


def cost_bounds(costs: Costs | None) -> tuple[float, float]:
    """Return the lowest and the highest cost of a text."""
    if isinstance(costs, CostMatrix):
        return costs.bounds
    all_costs = [(costs or {}).get(outcome, 0.0) for outcome in OUTCOMES]
    return min(all_costs), max(all_costs)


def _check_labels(labels: Sequence[str], name: str, kind: str) -> None:
    repeated = pd.Index(labels)[pd.Index(labels).duplicated()].unique().tolist()
    if repeated:
        raise GoalError(f"{name}: {_listed(repeated)} {_has(repeated)} more than one {kind}; leave one")
    if not len(labels) or "" in labels:
        raise GoalError(f"{name}: a {kind} has no label; name it")


def _number(cost: Any, name: str, row: str, column: str) -> float:
    try:
        return float(cost)
    except (TypeError, ValueError) as error:
        what = "empty" if cost is None or not str(cost).strip() else f"'{cost}'"
        raise GoalError(f"{name}: the cost of answering '{column}' for '{row}' is {what}; give a number") from error


def _listed(labels: Sequence[str]) -> str:
    shown = ", ".join(f"'{label}'" for label in labels[:3])
    return shown if len(labels) <= 3 else f"{shown} and {len(labels) - 3} more labels"


def _has(labels: Sequence[str]) -> str:
    return "has" if len(labels) == 1 else "have"
