"""Records the numbers behind each table and picture that a notebook shows; runs inside the notebook's kernel."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd
    from IPython.core.interactiveshell import InteractiveShell
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.collections import Collection
    from matplotlib.figure import Figure

VALUES_MIME = "application/vnd.cascade-lab.values+json"
"""The media type under which an output of a cell carries its numbers."""

_DIGITS = 10  # significant digits; the last ones of a float64 depend on the order in which a processor adds


def record_outputs(shell: InteractiveShell) -> None:
    """Make every output of an IPython shell carry its numbers, and look the same whatever the user's settings are."""
    import pandas as pd
    from IPython.core.formatters import JSONFormatter
    from matplotlib_inline.backend_inline import set_matplotlib_formats

    pd.reset_option("^display")
    pd.reset_option("^styler")
    for option, value in (("max_rows", 200), ("max_columns", 60), ("max_colwidth", 300), ("width", 200)):
        pd.set_option(f"display.{option}", value)
    set_matplotlib_formats("retina", bbox_inches="tight", metadata={"Software": None})

    display_formatter: Any = shell.display_formatter
    formatter: Any = JSONFormatter(parent=display_formatter)
    formatter.format_type, formatter.print_method = VALUES_MIME, "_cascade_lab_values_"
    formatter.for_type_by_name("pandas", "DataFrame", table_values)
    formatter.for_type_by_name("pandas", "Series", lambda series: table_values(series.to_frame()))
    formatter.for_type_by_name("pandas.io.formats.style", "Styler", lambda styler: table_values(styler.data))
    formatter.for_type_by_name("matplotlib.figure", "Figure", figure_values)
    display_formatter.formatters[VALUES_MIME] = formatter


def table_values(frame: pd.DataFrame) -> dict[str, Any]:
    """Return a DataFrame as `columns`, `index` and `rows`.

    >>> import pandas as pd
    >>> table_values(pd.DataFrame({"a": [0.5, float("nan")]}, index=["x", "y"]))
    {'kind': 'table', 'columns': ['a'], 'index': ['x', 'y'], 'rows': [[0.5], [None]]}
    """
    columns, index = ([_key_text(key) for key in keys] for keys in (frame.columns, frame.index))
    rows = [[plain_value(value) for value in row] for row in frame.itertuples(index=False, name=None)]
    return {"kind": "table", "columns": columns, "index": index, "rows": rows}


def figure_values(figure: Figure) -> dict[str, Any]:
    """Return what a matplotlib figure shows: the texts, lines, bars, points and images of each of its axes."""
    visible = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    return {"kind": "figure", "axes": [dict(_axes_values(ax)) for ax in visible]}


def plain_value(value: Any) -> Any:
    """Return a value as JSON has it: 10 significant digits, None for what is undefined, text for other types.

    >>> plain_value(np.float32(0.5)), plain_value(1 / 3), plain_value(np.array([1.0, np.nan]))
    (0.5, 0.3333333333, [1.0, None])
    """
    if isinstance(value, np.ma.MaskedArray):
        value = np.ma.filled(value.astype(float), np.nan)
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, bool | int | str) or value is None:
        return value
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    if isinstance(value, list | tuple):
        return [plain_value(part) for part in value]
    if isinstance(value, dict):
        return {_key_text(key): plain_value(part) for key, part in value.items()}
    return None if value != value else _key_text(value)


def _key_text(key: Any) -> str:
    return " / ".join(map(_key_text, key)) if isinstance(key, tuple) else str(key)


def _axes_values(ax: Axes) -> Iterator[tuple[str, Any]]:
    """Yield the content of one Axes by kind; a kind that it does not have is left out."""
    titles = [ax.get_title("left"), ax.get_title("center"), ax.get_title("right")]
    for key, parts in (("title", titles), ("x", [ax.get_xlabel()]), ("y", [ax.get_ylabel()])):
        if text := _unescaped(" ".join(filter(None, parts))):
            yield key, text
    for key, axis in (("x_labels", ax.xaxis), ("y_labels", ax.yaxis)):
        labels = [_unescaped(label.get_text()) for label in axis.get_ticklabels()]
        if any(not _is_number(label) for label in labels):
            yield key, labels
    patches: list[Any] = list(ax.patches)
    bars = [patch for patch in patches if hasattr(patch, "get_width")]
    contents: dict[str, list[Any]] = {
        "lines": [{"label": _label(line), "points": plain_value(line.get_xydata())} for line in ax.lines],
        "bars": [plain_value([bar.get_x(), bar.get_y(), bar.get_width(), bar.get_height()]) for bar in bars],
        "shapes": [plain_value(patch.get_path().vertices) for patch in patches if patch not in bars],
        "groups": [_collection_values(collection) for collection in ax.collections],
        "images": [plain_value(image.get_array()) for image in ax.images],
        "texts": [_unescaped(text.get_text()) for text in ax.texts if text.get_text()],
    }
    yield from ((key, content) for key, content in contents.items() if content)


def _collection_values(collection: Collection) -> dict[str, Any]:
    """Return artists that are drawn together: a scatter's points, or outlines; and the values that colours show."""
    offsets = np.asarray(collection.get_offsets())
    points = offsets if offsets.any() else [path.vertices for path in collection.get_paths()]
    values = collection.get_array()
    colours = {} if values is None else {"values": plain_value(values)}
    return {"label": _label(collection), "points": plain_value(points), **colours}


def _label(artist: Artist) -> str | None:
    """Return an artist's label; None where matplotlib made the label itself."""
    label = str(artist.get_label() or "")
    return None if not label or label.startswith("_") else _unescaped(label)


def _unescaped(text: str) -> str:
    return text.replace(r"\$", "$")


def _is_number(text: str) -> bool:
    """Return whether a tick label is a number, or empty."""
    try:
        float(text.replace("\N{MINUS SIGN}", "-") or 0)
    except ValueError:
        return False
    return True
