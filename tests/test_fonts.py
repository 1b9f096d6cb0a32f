"""Fonts: labels in any script are drawn, the user's settings stay, and what no font has is said once."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import matplotlib as mpl
import matplotlib.pyplot as plt
import nbformat
import pytest
from typer.testing import CliRunner

from cascade_lab import CascadeConfusionDisplay
from cascade_lab.cli import app
from cascade_lab.displays.fonts import add_fonts, font_digests
from cascade_lab.reporting import report as report_module
from cascade_lab.reporting.report import write_report

CJK = "NotoSansCJK-Regular.ttc"
NO_FONT_HAS = "\U00018b00"  # a letter of the Khitan small script, of which there is no Noto Sans


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def families(text, **style):
    """Return the font families with which a text is drawn, after `add_fonts`."""
    ax = plt.figure().add_subplot()
    artist = ax.text(0, 0, text, **style)
    add_fonts(ax)
    return artist.get_fontfamily()


def test_labels_in_any_script_are_drawn():
    labels = ["查询余额", "残高を確認", "잔액 조회", "انتقال", "העברה", "โอนเงิน", "देश", "🙂 🦄", "Größe −5", "привет"]
    settings = dict(mpl.rcParams)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # matplotlib warns of each character that it has no glyph for
        display = CascadeConfusionDisplay.from_predictions(labels, labels[::-1], labels=labels, title="银行客服").plot()
        display.figure_.savefig(io.BytesIO())
    assert dict(mpl.rcParams) == settings
    assert [label.get_text() for label in display.ax_.get_xticklabels()] == labels


def test_a_text_gets_only_the_fonts_that_it_needs():
    assert families("pay −5 €") == ["sans-serif"]
    assert families("门") == ["sans-serif", "Noto Sans CJK SC"]
    assert families("门", family="monospace", weight="bold") == ["monospace", "Noto Sans CJK SC"]
    assert families("ไทย") == ["sans-serif", "Noto Sans Thai"]


def test_kana_and_hangul_put_their_languages_first():
    assert families("開くドア") == ["sans-serif", "Noto Sans CJK JP"]
    assert families("문 門") == ["sans-serif", "Noto Sans CJK KR"]


def test_the_users_own_fonts_come_first():
    with mpl.rc_context({"font.family": ["DejaVu Serif"]}):
        assert families("pay") == ["DejaVu Serif"]
        assert families("门") == ["DejaVu Serif", "Noto Sans CJK SC"]
    path = Path(find_spec("noto_cjk_sans_otc").submodule_search_locations[0]) / CJK
    assert families("门", font=path) == ["sans-serif"]


def run_python(code, tmp_path, **environment):
    """Run code in a new process; return the warnings on its stderr."""
    environment = {**os.environ, "MPLCONFIGDIR": str(tmp_path), "MPLBACKEND": "agg", **environment}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [line for line in result.stderr.splitlines() if "Warning: " in line]


DRAW = """import io, sys
{before}
from cascade_lab import CascadeConfusionDisplay
for labels in (["{label}", "灯", "b"], ["花", "b"]):
    figure = CascadeConfusionDisplay.from_predictions(labels, labels).plot().figure_
    figure.savefig(io.BytesIO())
    figure.savefig(io.BytesIO(), format="svg")
"""


def test_what_no_font_has_is_said_once_with_the_way_out(tmp_path):
    without = 'sys.modules["noto_cjk_sans_otc"] = sys.modules["manimgx_fonts"] = None  # as if they were not installed'
    code = DRAW.format(before=without, label="门")
    (warning,) = run_python(code, tmp_path, MPL_IGNORE_SYSTEM_FONTS="1")
    assert "no font of this machine has 灯 门, so figures show boxes" in warning
    assert "pip install 'cascade-lab[cjk]'" in warning
    (warning,) = run_python(DRAW.format(before="", label=NO_FONT_HAS), tmp_path)
    assert f"no font of this machine has {NO_FONT_HAS}, so" in warning
    assert "pip" not in warning


@pytest.mark.filterwarnings("ignore::cascade_lab.exceptions.FontWarning")
def test_a_report_records_its_fonts_and_verify_names_one_that_differs(tiny_run, tmp_path, monkeypatch):
    source = (
        "from cascade_lab import CascadeConfusionDisplay\n"
        f'CascadeConfusionDisplay.from_predictions(["门", "{NO_FONT_HAS}"], ["门", "门"])'
    )
    cells = [
        nbformat.v4.new_code_cell("run_dir = None", metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(source),
    ]
    notebook = tmp_path / "doors.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), notebook)
    report = write_report(tiny_run, tmp_path / "doors.html", notebook=notebook)
    fonts = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))["fonts"]
    file = Path(find_spec("noto_cjk_sans_otc").submodule_search_locations[0]) / CJK
    assert fonts[CJK] == sha256(file.read_bytes()).hexdigest()
    assert f"font {CJK} {fonts[CJK][:12]}" in report.read_text(encoding="utf-8")

    others = {name: digest for name, digest in font_digests("门").items() if name != CJK} | {"Other.otf": "ab" * 32}
    monkeypatch.setattr(report_module, "font_digests", lambda text: others)
    options = ["--run", str(tiny_run.directory), "--notebook", str(notebook)]
    result = CliRunner().invoke(app, ["verify", str(report), *options])
    assert result.exit_code == 0, result.output
    changed = f"font {CJK} was {fonts[CJK][:12]}, is missing; font Other.otf was missing, is {'ab' * 6}"
    assert result.stdout == f"{report}: identical except for fonts ({changed})\n"
