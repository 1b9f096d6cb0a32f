"""Turns a display into a picture for a page that has no kernel."""

from __future__ import annotations

import base64
import io

from cascade_lab.displays.drawing import Display


def png(display: Display) -> str:
    """Return a display's picture as a PNG in base64, as a notebook's output has it; no figure is left open."""
    import matplotlib.pyplot as plt

    content = io.BytesIO()
    display.plot()
    try:
        display.figure_.savefig(content, format="png", dpi=110, bbox_inches="tight", metadata={"Software": None})
    finally:
        plt.close(display.figure_)
    return base64.b64encode(content.getvalue()).decode()
