"""cascade_lab: run, replay and analyse cascades of BERT classifiers.

`import cascade_lab` is fast. Each name below loads its own module when it is first used; only `Cascade` and `Stage`
load TensorFlow.
"""

# ruff: noqa: F403
from __future__ import annotations

from typing import TYPE_CHECKING

from cascade_lab.displays import DISPLAYS
from cascade_lab.lazy import lazy_names

if TYPE_CHECKING:
    from cascade_lab.browser import browse as browse
    from cascade_lab.cascade import Cascade as Cascade
    from cascade_lab.displays import *
    from cascade_lab.displays.grouped_texts import open_confusions as open_confusions
    from cascade_lab.displays.grouped_texts import open_slices as open_slices
    from cascade_lab.evalset import EvalSet as EvalSet
    from cascade_lab.exceptions import CascadeLabError as CascadeLabError
    from cascade_lab.explorer import explore as explore
    from cascade_lab.run import Run as Run
    from cascade_lab.spec import CascadeSpec as CascadeSpec
    from cascade_lab.spec import StageSpec as StageSpec
    from cascade_lab.stage import Stage as Stage

__version__ = "0.1.0"

# Type checkers read the imports above; a module's `__getattr__` would hide misspelled names from them.
if not TYPE_CHECKING:
    __getattr__, __dir__, __all__ = lazy_names(
        __name__,
        {
            "Cascade": ".cascade",
            "CascadeLabError": ".exceptions",
            "CascadeSpec": ".spec",
            "EvalSet": ".evalset",
            "Run": ".run",
            "Stage": ".stage",
            "StageSpec": ".spec",
            "browse": ".browser",
            "open_confusions": ".displays.grouped_texts",
            "open_slices": ".displays.grouped_texts",
            "explore": ".explorer",
            **dict.fromkeys(DISPLAYS, ".displays"),
        },
    )
