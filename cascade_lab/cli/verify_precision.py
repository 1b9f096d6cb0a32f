"""`cascade-lab verify-precision` compares a cascade's precision with float32."""

from __future__ import annotations

from cascade_lab.cli.actions import read_evalset
from cascade_lab.cli.console import shows_progress, spinner
from cascade_lab.cli.options import (
    CASCADE,
    COLUMNS,
    ENCODING,
    EVALSET,
    LABEL_COLUMN,
    LABEL_MAP,
    LIMIT,
    SHOWN_TEXTS,
    SPLIT,
    TEXT_COLUMN,
)
from cascade_lab.cli.printing import cell, line, next_step, number, show, table


def verify_precision(
    cascade: CASCADE,
    evalset: EVALSET,
    split: SPLIT = None,
    encoding: ENCODING = None,
    text_column: TEXT_COLUMN = "text",
    label_column: LABEL_COLUMN = "label",
    label_map: LABEL_MAP = None,
    columns: COLUMNS = None,
    limit: LIMIT = None,
    texts: SHOWN_TEXTS = 10,
) -> None:
    """Compare a cascade in its own precision with float32; a cascade in float32 is compared in bfloat16.

    Example: cascade-lab verify-precision cascade.toml data_full.json --split test
    """
    from cascade_lab.spec import CascadeSpec

    spec = CascadeSpec.read(cascade)
    examples = read_evalset(
        evalset,
        spec,
        split=split,
        limit=limit,
        encoding=encoding,
        text_column=text_column,
        label_column=label_column,
        label_map=label_map,
        columns=columns,
    )
    with spinner("loading TensorFlow"):
        from cascade_lab.precision_check import verify_precision as check_precision
    check = check_precision(spec, examples, progress=shows_progress(), quiet=spinner)
    stages = table("stage", "precision", "logits: rms", "p99", "largest", "answers changed")
    for name, row in check.stages.iterrows():
        differences = [number(row[key]) for key in ("rms", "p99", "max")]
        stages.add_row(str(name), row["precision"], *differences, f"{row['n_changed']:,}")
    show(stages)
    line(f"{len(check.changed):,} of {check.n_examples:,} texts get another answer than in float32")
    if len(check.changed) and texts:
        changed = table("text", "true label", "float32", "lower precision")
        for row in check.changed.head(texts).itertuples():
            changed.add_row(cell(row.text), cell(row.label), cell(row.float32), cell(row.lower))
        show(changed)
    next_step("latency", cascade, evalset)
