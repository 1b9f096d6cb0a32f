"""A notebook that runs a live cascade shows none of TensorFlow's messages, which go to file descriptor 2."""

from __future__ import annotations

import os

import nbformat
from nbclient import NotebookClient

CELLS = """
from cascade_lab import Cascade, EvalSet
cascade = Cascade.load({tiny!r})
# ---
cascade.predict(["pay my bill", "play a song"])
# ---
run = cascade.run(EvalSet.read({evalset!r}), output={output!r})
# ---
cascade.close()
run
# ---
import os
_ = os.write(2, b"written to file descriptor 2")
"""


def test_a_live_cascade_in_a_notebook_shows_no_message_of_tensorflow(tiny, tiny_evalset, tmp_path):
    sources = CELLS.format(tiny=str(tiny), evalset=str(tiny_evalset), output=str(tmp_path / "run")).split("# ---\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    # As a user's kernel has it: under pytest, kernels do not show what is written to file descriptor 2.
    settings = ("PYTEST_CURRENT_TEST", "TF_CPP_MIN_LOG_LEVEL")
    environment = {name: value for name, value in os.environ.items() if name not in settings}
    NotebookClient(notebook, kernel_name="python3", timeout=300).execute(env=environment)
    shown = [
        "".join(output.text for output in cell.outputs if output.get("name") == "stderr") for cell in notebook.cells
    ]
    assert shown == ["", "", "", "", "written to file descriptor 2"]
