"""Checks the tables `[tuned_on]` and `[calibrated_on]` of a `cascade.toml`, which people may write by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cascade_lab.analysis.costs import CostMatrix
from cascade_lab.exceptions import GoalError, SpecError
from cascade_lab.json_files import check_keys

_EVALSET = {"n_examples": int, "source": str | None, "split": str | None, "sha256": str | None}
_TUNED_ON = {
    "run_id": str,
    "goal": str,
    "evalset": dict,
    "figures": dict | None,
    "optimism": dict | None,
    "intervals": dict | None,
    "costs": dict | None,
    "cost_matrix": list | None,
    "prevalence": float | int | None,
}
_NUMBER = float | int


def check_tuned_on(table: Any, where: str) -> None:
    """Raise SpecError where `[tuned_on]` is not what a tuning writes; None and an empty table are right."""
    if table is None:
        return
    if not isinstance(table, Mapping):
        raise SpecError(f"{where}: tuned_on must be a table, not {table!r}")
    if not table:
        return
    options: Any = {"error": SpecError, "way_out": "let `cascade-lab tune` write it, or delete the table"}
    where = f"{where}: tuned_on"
    check_keys(table, _TUNED_ON, where, **options)
    check_keys(table["evalset"], _EVALSET, f"{where}.evalset", **options)
    for key in ("figures", "optimism", "costs"):
        numbers = table.get(key) or {}
        check_keys(numbers, dict.fromkeys(numbers, _NUMBER), f"{where}.{key}", **options)
    if table.get("cost_matrix"):
        lines = {f"line {i}": line for i, line in enumerate(table["cost_matrix"], 1)}
        check_keys(lines, dict.fromkeys(lines, str), f"{where}.cost_matrix", **options)
        try:
            CostMatrix.from_lines([*lines.values()], f"{where}.cost_matrix")
        except GoalError as error:
            raise SpecError(f"{error}, or delete the table") from error
    for name, ends in (table.get("intervals") or {}).items():
        if not (isinstance(ends, list) and len(ends) == 2):
            raise SpecError(f"{where}.intervals: {name} must be two numbers; {options['way_out']}")
        check_keys(dict(zip(("low", "high"), ends, strict=True)), {"low": _NUMBER, "high": _NUMBER}, where, **options)


def check_calibrated_on(tables: Any, where: str) -> None:
    """Raise SpecError where `[calibrated_on]` has anything but a table for each stage."""
    if tables is None:
        return
    if not isinstance(tables, Mapping) or not all(isinstance(table, Mapping) for table in tables.values()):
        raise SpecError(f"{where}: calibrated_on must have a table for each stage, not {tables!r}")
    for name, table in tables.items():
        if not isinstance(table.get("evalset", {}), Mapping):
            raise SpecError(f"{where}: calibrated_on.{name}: evalset must be a table; delete calibrated_on.{name}")
