"""Tests in a browser that hostile texts and labels (HTML, scripts, formulas) do no harm and are shown as they are."""

from __future__ import annotations

import json
import os
import shutil
import socket
import struct
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import pandas as pd
import papermill
import pytest

from cascade_lab import Cascade, CascadeSpec, EvalSet
from cascade_lab.reporting.report import notebook_path, write_figures, write_report
from cascade_lab.text import visible

NOTEBOOKS = notebook_path("01_run_cascade").parent


@pytest.fixture(scope="module")
def trap():
    """A small web server on this machine: its address, and the requests that it received."""
    requests: list[bytes] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def listen() -> None:
            while True:
                try:
                    connection, _ = server.accept()
                except OSError:
                    return
                with connection:
                    connection.settimeout(5)
                    requests.append(connection.recv(1000))
                    connection.sendall(b"HTTP/1.0 204 No Content\r\n\r\n")

        threading.Thread(target=listen, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}", requests
        server.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def browse(tmp_path_factory):
    """Return a function that opens a file in headless Chromium and returns the page after 2 s of virtual time."""
    program = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if program is None:
        assert not os.environ.get("CI"), "the tests need Chromium in CI: .ci/run installs it"
        pytest.skip("needs Chromium")
    profile = tmp_path_factory.mktemp("profile")

    def opened(path: Path) -> str:
        quiet = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-quic"]
        command = [program, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", *quiet]
        command += [f"--user-data-dir={profile}", "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
        return subprocess.run(command, capture_output=True, timeout=120, check=True).stdout.decode()

    return opened


def hostile(address: str) -> list[str]:
    ran = "document.title='RAN';document.documentElement.setAttribute('data-ran','yes')"
    return [
        f"<script>{ran}</script>",
        f'<img src=x onerror="{ran}">',
        f'<img src="{address}/image"><link rel=stylesheet href="{address}/style">',
        f'<iframe src="{address}/frame"></iframe><object data="{address}/object"></object>',
        f"<style>@import url({address}/import); body {{ background: url({address}/background) }}</style>",
        f'<meta http-equiv="refresh" content="0;url={address}/refresh">',
        f'<svg onload="{ran}"><a xlink:href="javascript:{ran}">x</a></svg>',
        f'=HYPERLINK("{address}/sheet")',
        f"[a link]({address}/link) ![a picture]({address}/picture) <{address}/auto> [x]: {address}/ref",
        "$x_1$ and $\\frac and \\(a\\) and $$\\sum$$",
        "</table></div></body></html> <!-- ]]> -->",
        "{{ 7 * 7 }} {% raw %} ${jndi} %s {0}",
        "**bold** _under_ `code` # no heading | a | b |",
        "\u202eright to left\u202c שלום עולם مرحبا",
        "😀 👩‍👩‍👧 é",
        "a\x00b\x07c\x1b[31md\x7fe",
        "-1+1|cmd' /C calc'!A0 @SUM(1)",
    ]


@pytest.fixture(scope="module")
def texts(trap):
    return hostile(trap[0])


@pytest.fixture(scope="module")
def runs(tiny, texts, tmp_path_factory):
    """Two runs of the tiny cascade, whose texts, labels, name and additional column are hostile."""
    content = CascadeSpec.read(tiny).to_dict()
    content["name"] = texts[1] + texts[9]
    gate, intent = content["stage"]
    gate["labels"] = [texts[2], "in"]
    intent["labels"] = [texts[0], texts[8] + " long" * 10_000, texts[9], texts[13] + texts[14]]
    labels = [*intent["labels"], texts[2]]
    every = [*texts, "long " * 10_000, "x" * 50_000] * 8
    rows = pd.DataFrame({"text": every, "text_b": None})
    rows["label"] = [labels[i % 5] for i in range(len(every))]
    rows["channel"] = [every[i % 7] for i in range(len(every))]
    folder = tmp_path_factory.mktemp("hostile")
    with Cascade.load(CascadeSpec.from_dict(content)) as cascade:
        yield (
            cascade.run(EvalSet.from_frame(rows), output=folder / "run"),
            cascade.run(EvalSet.from_frame(rows.assign(text="other " + rows["text"])), output=folder / "other"),
        )


SHOWN = """
from IPython.display import HTML, Latex
texts = run.examples["text"].drop_duplicates()
display(texts, texts.to_frame().set_index("text", drop=False).head(20))
print(*texts.str[:300], sep="\\n")
for text in texts.str[:300]:
    display(Markdown(text), HTML(text), Latex(text), {text: text})
display(pd.DataFrame({"text": texts.str[:300]}).style.set_properties(color="red"))
"""


@pytest.fixture(scope="module")
def report(runs, tmp_path_factory):
    """One report of all notebooks that read a run, and of cells that show the texts without escaping."""
    folder = tmp_path_factory.mktemp("report")
    parameters, cells = {}, []
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        known = {name: parameter["default"] for name, parameter in papermill.inspect_notebook(str(path)).items()}
        if any(name.startswith("run") for name in known) and "latency_dir" not in known:
            parameters |= known
            cells += [
                cell for cell in nbformat.read(path, 4).cells if "parameters" not in cell.metadata.get("tags", [])
            ]
    first = nbformat.v4.new_code_cell(
        "\n".join(f"{name} = {default}" for name, default in parameters.items()), metadata={"tags": ["parameters"]}
    )
    cells = [first, *cells, nbformat.v4.new_code_cell(SHOWN)]
    for number, cell in enumerate(cells):
        cell["id"] = f"cell-{number}"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / "all.ipynb")
    others = {name for name, default in parameters.items() if "../runs/" in default and not name.startswith("output")}
    given = {name: str(runs[name == "test_dir"].directory) for name in others - {"run_dir"}}
    given["other_runs"] = str(runs[0].with_thresholds({"gate": 0.4}).write(folder / "other").directory)
    return write_report(runs[0], folder / "all.html", notebook=folder / "all.ipynb", parameters=given)


class PageText(HTMLParser):
    """The text and the tags of a page."""

    def __init__(self, html: str):
        super().__init__()
        self.text, self.tags, self.hidden = "", set(), False
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.hidden = tag in ("style", "script")

    def handle_endtag(self, tag):
        self.hidden = False

    def handle_data(self, data):
        self.text += "" if self.hidden else data


def test_the_browser_runs_and_loads_texts_that_are_not_escaped(browse, trap, texts, tmp_path):
    """This shows that the next test can fail: here the same texts are in a page that does not escape them."""
    requests = trap[1]
    (tmp_path / "careless.html").write_text("<p>" + "</p><p>".join(texts[:3]), encoding="utf-8")
    dom = browse(tmp_path / "careless.html")
    assert 'data-ran="yes"' in dom
    assert any(b"/image" in request for request in requests)
    requests.clear()


def test_a_report_of_hostile_texts_runs_nothing_loads_nothing_and_shows_them(browse, trap, texts, report):
    requests = trap[1]
    dom = browse(report)
    assert not requests
    assert 'data-ran="yes"' not in dom
    assert "<title>RAN" not in dom
    page = PageText(dom)
    assert not page.tags & {"script", "iframe", "object", "svg", "link"}
    for text in texts:
        assert visible(text) in page.text, text
    assert "x" * 200 in page.text
    record = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    tables = [output for output in record["outputs"] if output.get("columns") == ["text"]]
    assert [row[0] for row in tables[0]["rows"]][: len(texts)] == texts


@pytest.mark.filterwarnings("ignore:Glyph")  # a box stands for a character that the font lacks
def test_hostile_texts_are_kept_in_tables_and_drawn_in_figures(runs, texts, tmp_path):
    run = runs[0]
    assert run.examples["text"].tolist()[: len(texts)] == texts
    assert run.replay()["predicted"].tolist() == run.predictions["predicted"].tolist()
    assert set(run.predictions["predicted"]) <= set(run.spec.labels)
    for path in write_figures(run, tmp_path):
        width, height = struct.unpack(">II", path.read_bytes()[16:24])  # the header of a PNG
        assert max(width, height) < 4000, path.name
