"""How far bfloat16 can move what a stage decides with: the measured bounds of a stage with mixed precision."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from cascade_lab.exceptions import SpecError, did_you_mean
from cascade_lab.text import shorten

_WAY_OUT = "let `cascade-lab verify-precision --calibrate` write it, or delete the table"


@dataclass(frozen=True)
class PrecisionBounds:
    """The largest differences between float32 and bfloat16 that were seen at a stage.

    Neither depends on the stage's thresholds.

    Attributes
    ----------
    labels : float
        Of the differences float32 - bfloat16 of a text's logits, after temperature or calibrator: the largest minus the
        smallest over the labels that the stage chooses from (a gate's without its pass label).
    confidence : float
        The absolute difference of log(c / (1 - c)), where c is what the stage compares with its threshold.
    digest : str
        Of what the differences depend on; see `mixed_precision.bounds_digest`.
    measured_on : mapping
        Which texts they were measured on and what they promise, for the reader.
    """

    labels: float
    confidence: float
    digest: str
    measured_on: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> PrecisionBounds:
        """Take the table `[stage.precision_bounds]` of a `cascade.toml`.

        Raises
        ------
        SpecError
            Naming the key at fault.
        """
        where = f"{where}: precision_bounds"
        if not isinstance(content, Mapping):
            raise SpecError(f"{where} must be a table, not {_short(content)}; {_WAY_OUT}")
        known = list(cls.__dataclass_fields__)
        for key in content:
            if key not in known:
                raise SpecError(f"{where}: unknown key '{key}'{did_you_mean(key, known)}")
        for key in ("labels", "confidence"):
            value = content.get(key)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise SpecError(f"{where}.{key} is {_short(value)}; it must be a number, at least 0: {_WAY_OUT}")
        if not isinstance(content.get("digest"), str):
            raise SpecError(f"{where}.digest is {_short(content.get('digest'))}; it must be a string: {_WAY_OUT}")
        measured_on = content.get("measured_on", {})
        if not isinstance(measured_on, Mapping):
            raise SpecError(f"{where}.measured_on must be a table, not {_short(measured_on)}; {_WAY_OUT}")
        return cls(float(content["labels"]), float(content["confidence"]), content["digest"], dict(measured_on))

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `from_dict` takes."""
        content = {"labels": self.labels, "confidence": self.confidence, "digest": self.digest}
        return content | ({"measured_on": dict(self.measured_on)} if self.measured_on else {})


def _short(value: Any) -> str:
    return shorten(repr(value), 80)
