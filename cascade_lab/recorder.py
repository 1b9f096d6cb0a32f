"""What a notebook's tables and figures show, as plain numbers beside each output; runs inside the kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

MIME = "application/vnd.cascade-lab.shown+json"

_DIGITS = 10  # significant; the last ones of a float64 hang on the order in which a processor sums


def start(shell: Any) -> None:
    """Let every output of an IPython shell carry its numbers, and look the same whoever starts it."""
    import pandas as pd
    from IPython.core.formatters import JSONFormatter
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    pd.reset_option("^display")
    pd.reset_option("^styler")
    for option, value in (("max_rows", 200), ("max_columns", 60), ("max_colwidth", 300), ("width", 200)):
        pd.set_option(f"display.{option}", value)
    set_matplotlib_formats("retina", bbox_inches="tight", metadata={"Software": None})

    formatter = JSONFormatter(parent=shell.display_formatter)
    formatter.format_type, formatter.print_method = MIME, "_cascade_lab_shown_"
    formatter.for_type_by_name("pandas", "DataFrame", table)
    formatter.for_type_by_name("pandas", "Series", lambda series: table(series.to_frame()))
    formatter.for_type_by_name("pandas.io.formats.style", "Styler", lambda styler: table(styler.data))
    formatter.for_type_by_name("matplotlib.figure", "Figure", figure)
    shell.display_formatter.formatters[MIME] = formatter


def table(frame: Any) -> dict[str, Any]:
    """Return a DataFrame as `columns`, `index` and `rows`.

    >>> import pandas as pd
    >>> table(pd.DataFrame({"a": [0.5, float("nan")]}, index=["x", "y"]))
    {'kind': 'table', 'columns': ['a'], 'index': ['x', 'y'], 'rows': [[0.5], [None]]}
    """
    columns, index = ([_name(key) for key in keys] for keys in (frame.columns, frame.index))
    rows = [[plain(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return {"kind": "table", "columns": columns, "index": index, "rows": rows}


def figure(drawn: Any) -> dict[str, Any]:
    """Return what a matplotlib figure shows: for each of its axes the words, lines, bars, points and images."""
    shown = [ax for ax in drawn.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    return {"kind": "figure", "axes": [dict(_of_axes(ax)) for ax in shown]}


def plain(value: Any) -> Any:
    """Return a value as JSON has it: 10 significant digits, None for what is undefined, text for the rest.

    >>> plain(np.float32(0.5)), plain(1 / 3), plain(np.array([1.0, np.nan])), plain(np.bool_(True))
    (0.5, 0.3333333333, [1.0, None], True)
    """
    if isinstance(value, np.ma.MaskedArray):
        value = value.astype(float).filled(np.nan)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain(part) for part in value]
    if isinstance(value, dict):
        return {_name(key): plain(part) for key, part in value.items()}
    return None if value != value else _name(value)


def _name(key: Any) -> str:
    return " / ".join(map(_name, key)) if isinstance(key, tuple) else str(key)


def _of_axes(ax: Any) -> Iterator[tuple[str, Any]]:
    """Give what one Axes holds, by kind; nothing for a kind of which it has none."""
    words = {"title": [ax.get_title(side) for side in ("left", "center", "right")]}
    words |= {"x": [ax.get_xlabel()], "y": [ax.get_ylabel()]}
    yield from ((key, said) for key, parts in words.items() if (said := _unescaped(" ".join(filter(None, parts)))))
    for key, axis in (("x_labels", ax.xaxis), ("y_labels", ax.yaxis)):
        labels = [_unescaped(label.get_text()) for label in axis.get_ticklabels()]
        if any(map(_is_word, labels)):
            yield key, labels
    bars = [patch for patch in ax.patches if hasattr(patch, "get_width")]
    kinds = {
        "lines": [{"label": _label(line), "points": plain(line.get_xydata())} for line in ax.lines],
        "bars": [plain([bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()]) for bar in bars],
        "shapes": [plain(patch.get_path().vertices) for patch in ax.patches if patch not in bars],
        "groups": [_collection(some) for some in ax.collections],
        "images": [plain(image.get_array()) for image in ax.images],
        "texts": [_unescaped(text.get_text()) for text in ax.texts if text.get_text()],
    }
    yield from ((key, found) for key, found in kinds.items() if found)


def _collection(some: Any) -> dict[str, Any]:
    """Return many artists drawn as one: the points of a scatter, else the outlines; and the values of their colours."""
    offsets = np.asarray(some.get_offsets())
    places = offsets if offsets.any() else [path.vertices for path in some.get_paths()]
    values = some.get_array()
    colours = {} if values is None else {"values": plain(values)}
    return {"label": _label(some), "points": plain(places), **colours}


def _label(artist: Any) -> str | None:
    """Return an artist's label, unless matplotlib made it up."""
    label = str(artist.get_label() or "")
    return None if not label or label.startswith("_") else _unescaped(label)


def _unescaped(text: str) -> str:
    return text.replace(r"\$", "$")


def _is_word(text: str) -> bool:
    try:
        float(text.replace("\N{MINUS SIGN}", "-") or 0)
    except ValueError:
        return True
    return False
