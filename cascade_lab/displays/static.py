"""Turns a display into a picture for a page that has no kernel."""

from __future__ import annotations

import base64
import io
from typing import Any

from cascade_lab.displays.drawing import Display, plain_text
from cascade_lab.reporting.capture import VALUES_MIME


def picture(display: Display) -> dict[str, Any]:
    """Return a display's picture as an output of a notebook has it, by media type; no figure is left open.

    A report takes the title as the description of the picture.
    """
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    display.plot()
    try:
        display.figure_.savefig(content, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    finally:
        plt.close(display.figure_)
    values = {"kind": "figure", "axes": [{"title": plain_text(display.title, 200)}]}
    return {"image/png": base64.b64encode(content.getvalue()).decode(), VALUES_MIME: values}
