"""A calibrator: numbers that correct a stage's probabilities, beside or instead of a temperature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.special import log_expit, logit

from cascade_lab.evidence import energy, log_odds
from cascade_lab.exceptions import SpecError, did_you_mean
from cascade_lab.text import shorten


class Method(NamedTuple):
    """What a method of calibration is for, and the names of its numbers (or lists of numbers)."""

    of_gate: bool
    parameters: tuple[str, ...]
    are_lists: bool = False


METHODS = {
    "platt": Method(of_gate=True, parameters=("weight", "bias")),
    "beta": Method(of_gate=True, parameters=("a", "b", "c")),
    "isotonic": Method(of_gate=True, parameters=("log_odds", "probabilities"), are_lists=True),
    "vector": Method(of_gate=False, parameters=("weights", "biases"), are_lists=True),
}
"""Every method by name. Those of a gate change the log-odds of its pass label; `vector` changes all logits."""


_LARGEST = 1e100  # of a number, so that no product with a logit of float32 overflows


@dataclass(frozen=True)
class Calibrator:
    """How the logits of a stage are changed before the softmax.

    With s the log-odds of a gate's pass label (by its logits), and p its calibrated probability:

    - platt (Platt 1999): log-odds of p = weight · s + bias.
    - beta (Kull et al. 2017): log-odds of p = a · log q - b · log(1 - q) + c, where q is the sigmoid of s.
    - isotonic (Zadrozny and Elkan 2002): p = `probabilities`, interpolated linearly between `log_odds`; before the
      first and after the last of them p is constant.

    The gate's other labels keep their proportions. All three rise with s, so that a threshold can be moved with them.

    - vector (Guo et al. 2017), for a stage with classes: each label's logit becomes weight · logit + bias.

    Attributes
    ----------
    method : str
        A key of `METHODS`.
    parameters : mapping of str to float, or to tuple of float
        The numbers that the method names.
    """

    method: str
    parameters: Mapping[str, Any]

    @classmethod
    def from_dict(cls, content: Any, *, where: str) -> Calibrator:
        """Take the table `[stage.calibrator]` of a `cascade.toml`: `method`, and its numbers.

        Raises
        ------
        SpecError
            Naming the key at fault.
        """
        if not isinstance(content, Mapping):
            raise SpecError(f"{where}: calibrator must be a table, not {_short(content)}")
        name = content.get("method")
        if not isinstance(name, str) or name not in METHODS:
            near = did_you_mean(str(name), METHODS)
            raise SpecError(f"{where}: calibrator.method is {_short(name)}, which is no method{near}")
        method = METHODS[name]
        for key in content:
            if key not in ("method", *method.parameters):
                near = did_you_mean(key, ["method", *method.parameters])
                raise SpecError(f"{where}: unknown key 'calibrator.{key}' of method '{name}'{near}")
        parameters: dict[str, Any] = {}
        for key in method.parameters:
            value = content.get(key)
            numbers = value if method.are_lists else [value]
            if not isinstance(numbers, list | tuple) or not numbers or not all(map(_is_number, numbers)):
                kind = "a list of numbers" if method.are_lists else "a number"
                raise SpecError(f"{where}: calibrator.{key} must be {kind} (at most {_LARGEST:g}), not {_short(value)}")
            parameters[key] = tuple(map(float, numbers)) if method.are_lists else float(numbers[0])
        if method.are_lists and len({len(numbers) for numbers in parameters.values()}) > 1:
            raise SpecError(f"{where}: calibrator.{' and calibrator.'.join(parameters)} must have the same length")
        problem = _not_rising(name, parameters)
        if problem:
            raise SpecError(f"{where}: calibrator.{problem}, so that the probability rises with the log-odds")
        return cls(name, parameters)

    def to_dict(self) -> dict[str, Any]:
        """Return plain data, as `from_dict` takes."""
        numbers = {key: list(v) if isinstance(v, tuple) else v for key, v in self.parameters.items()}
        return {"method": self.method, **numbers}

    def __str__(self) -> str:
        if METHODS[self.method].are_lists:
            n = len(self.parameters[METHODS[self.method].parameters[0]])
            return f"{self.method} ({n} {'labels' if self.method == 'vector' else 'points'})"
        return f"{self.method} ({', '.join(f'{key} {value:.4g}' for key, value in self.parameters.items())})"

    def log_odds(self, s: np.ndarray) -> np.ndarray:
        """Return the calibrated log-odds of a gate's pass label, from those of its logits: float64, same shape.

        >>> Calibrator("platt", {"weight": 2.0, "bias": -1.0}).log_odds(np.array([0.0, 1.5])).tolist()
        [-1.0, 2.0]
        >>> beta = Calibrator("beta", {"a": 1.0, "b": 1.0, "c": 0.5})
        >>> beta.log_odds(np.array([-1.0, 3.0])).round(12).tolist()
        [-0.5, 3.5]
        >>> isotonic = Calibrator("isotonic", {"log_odds": (-1.0, 1.0), "probabilities": (0.2, 0.5)})
        >>> (1 / (1 + np.exp(-isotonic.log_odds(np.array([-9.0, 0.0, 9.0]))))).round(12).tolist()
        [0.2, 0.35, 0.5]
        """
        values = self.parameters
        if self.method == "platt":
            return np.asarray(values["weight"] * s + values["bias"])
        if self.method == "beta":
            return np.asarray(values["a"] * log_expit(s) - values["b"] * log_expit(-s) + values["c"])
        return np.asarray(logit(np.interp(s, values["log_odds"], values["probabilities"])))


def calibrated_logits(stage: Any, logits: np.ndarray) -> np.ndarray:
    """Return the logits that a stage's calibrator gives: shape (n, n_labels).

    Their softmax at the stage's temperature are its probabilities. Without a calibrator they are the logits themselves;
    with one the temperature is 1.

    Parameters
    ----------
    stage : StageSpec
    logits : ndarray, shape (n, n_labels)
        A row of NaN gives a row of NaN.
    """
    calibrator = stage.calibrator
    if calibrator is None:
        return logits
    z = np.array(logits, dtype=np.float64)
    if not stage.is_gate:
        return z * calibrator.parameters["weights"] + calibrator.parameters["biases"]
    column = stage.labels.index(stage.pass_label)
    passes = calibrator.log_odds(log_odds(z, column))
    z[:, column] = np.where(np.isnan(z[:, column]), np.nan, -np.inf)
    z -= energy(z)[:, None]
    z[:, column] = passes
    return z


def check_calibrator(stage: Any, where: str) -> None:
    """Raise SpecError where a stage's calibrator is for another kind of stage, or is combined with a temperature."""
    calibrator = stage.calibrator
    if calibrator is None:
        return
    fitting = methods_of(stage)
    if calibrator.method not in fitting:
        kind = "a gate" if stage.is_gate else "a stage without pass_label"
        raise SpecError(
            f"{where}: calibrator.method is '{calibrator.method}', but {kind} can have: {', '.join(fitting)}"
        )
    if stage.temperature != 1:
        raise SpecError(f"{where}: has a temperature and a calibrator; delete one of them")
    if not stage.is_gate and len(calibrator.parameters["weights"]) != len(stage.labels):
        n_labels = len(stage.labels)
        raise SpecError(f"{where}: calibrator.weights and .biases must have {n_labels} numbers, one for each label")


def methods_of(stage: Any) -> list[str]:
    """Return the methods that a stage can have: those of a gate, or those of classes."""
    return [name for name, method in METHODS.items() if method.of_gate == stage.is_gate]


def _not_rising(name: str, values: Mapping[str, Any]) -> str:
    """Return what is wrong with numbers with which the probability does not rise with the log-odds; "" if nothing."""
    if name == "platt" and values["weight"] <= 0:
        return "weight must be above 0"
    if name == "beta" and (min(values["a"], values["b"]) < 0 or max(values["a"], values["b"]) == 0):
        return "a and calibrator.b must be at least 0, and one of them above 0"
    if name == "isotonic":
        if (np.diff(values["log_odds"]) <= 0).any():
            return "log_odds must rise"
        p = np.array(values["probabilities"])
        if (np.diff(p) < 0).any() or p[0] <= 0 or p[-1] >= 1:
            return "probabilities must be between 0 and 1, each at least the one before"
    return ""


def _short(value: Any) -> str:
    return shorten(repr(value), 80)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= _LARGEST  # NaN is not
