"""Drives the error browser in a real JupyterLab and in a real marimo, as a person does, in a headless Chromium.

Slow, because each server, its kernel and the page start anew. Skipped where `playwright`, Chromium or marimo is missing
(`pip install playwright marimo`, and a `chromium` on the path).
"""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import nbformat
import pytest
from helpers import random_run
from typer.testing import CliRunner

from cascade_lab import EvalSet
from cascade_lab.analysis import confused_pairs
from cascade_lab.cli import app

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MAX_MS = 300
CODE = 'from cascade_lab import Run, browse\nbrowser = browse(Run.read("{run}"))\n'
MARIMO = """import marimo
app = marimo.App(width="full")
@app.cell
def _():
    import marimo as mo
{code}
    mo.ui.anywidget(browser)
    return
"""
# The time from a click to the first picture of the page with the title of the clicked cell, in milliseconds. Shadow
# roots are entered, because marimo puts a widget into one.
TIMER = """() => {
  const find = (root, query) => {
    const found = root.querySelector(query);
    if (found) return found;
    for (const element of root.querySelectorAll("*")) {
      const inner = element.shadowRoot && find(element.shadowRoot, query);
      if (inner) return inner;
    }
    return null;
  };
  window.findIn = (query) => find(document, query);
  const texts = window.findIn(".cb-texts");
  window.findIn(".cascade-browser canvas").addEventListener("click", () => {
    window.clicked = performance.now();
    window.shown = null;
  }, true);
  new MutationObserver(() => requestAnimationFrame(() => {
    window.shown ??= { title: texts.dataset.title, ms: performance.now() - window.clicked };
  })).observe(texts, { childList: true });
}"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(find_spec("playwright") is None, reason="needs playwright: pip install playwright"),
    pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium on the path"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run with as many labels and texts as CLINC150's test set: a matrix of 151 × 151."""
    folder = tmp_path_factory.mktemp("runs")
    run = random_run(folder / "large", n=5500, n_labels=150, seed=3, skill=3.5)
    assert len(run.spec.labels) == 151
    return run


@contextmanager
def server(command, path, folder, **environment):
    """Start a server in `folder`; give the address of `path` there, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    settings = {f"JUPYTER_{name}_DIR": str(folder / name) for name in ("CONFIG", "DATA", "RUNTIME")}
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *command, str(port)], cwd=folder, env={**os.environ, **settings, **environment},
            stdout=log, stderr=subprocess.STDOUT,
        )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}{path}"
            for _ in range(240):
                try:
                    urlopen(address, timeout=5).close()
                    break
                except (URLError, OSError):
                    assert process.poll() is None, (folder / "server.log").read_text()
                    time.sleep(0.5)
            yield address
        finally:
            process.terminate()
            process.wait(30)


@contextmanager
def page_of(address):
    """Open a page in Chromium; no script of it may raise."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--disable-quic", "--disable-background-networking"]
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = chromium.new_page(viewport={"width": 1600, "height": 1200})
        page.set_default_timeout(60_000)
        problems = []
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.goto(address)
        yield page
        chromium.close()
        assert not problems


def click_cells(page, run, n=5):
    """Click the cells of the most frequent confusions; return the milliseconds until their texts are seen."""
    page.evaluate(TIMER)
    labels, times = list(run.spec.labels), []
    canvas = page.locator(".cascade-browser canvas")
    for pair in confused_pairs(run, n=n).itertuples():
        row, column = labels.index(pair.label), labels.index(pair.predicted)
        # The margin is 14 pixels and a cell is 4: `matrixPanel` in browser.js.
        canvas.click(position={"x": 14 + 4 * (column + 0.5), "y": 14 + 4 * (row + 0.5)})
        page.wait_for_function("window.shown")
        shown = page.evaluate("window.shown")
        assert shown["title"].replace("\u2068", "").replace("\u2069", "") == f"{pair.label} → {pair.predicted}"
        assert page.locator(".cb-row").count() == pair.n_examples
        times.append(shown["ms"])
    print(f"milliseconds from click to texts: {', '.join(f'{ms:.0f}' for ms in times)}")
    return times


def mark_three(page, path):
    page.locator("button", has_text="All texts").click()
    page.locator("label:has-text('show') select").select_option("errors")
    page.locator(".cb-title", has_text="all texts").wait_for()
    page.locator(".cb-row").nth(20).wait_for()
    for tick in page.locator(".cb-row > input").all()[:3]:
        tick.check()
    page.locator(".cb-mark").click()
    page.locator(".cb-status", has_text="marked 3 with relabel").wait_for()
    page.locator(".cb-path").fill(str(path))
    page.locator(".cb-write").click()
    page.locator(".cb-status", has_text="wrote 3 marks").wait_for()


def correct(run, marks, output):
    """Read the marks with the command; return how many labels it changed."""
    result = CliRunner().invoke(app, ["correct", str(run.directory), str(marks), "--output", str(output)])
    assert result.exit_code == 0, result.output
    return int((EvalSet.read(output).examples["label"] != run.examples["label"]).sum())


def test_a_click_in_jupyterlab_leads_to_texts_that_are_marked_and_corrected(run, tmp_path):
    code = CODE.format(run=run.directory) + "browser"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}  # else JupyterLab asks for one
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)], metadata={"kernelspec": kernel})
    nbformat.write(notebook, tmp_path / "x.ipynb")
    options = [
        f"--ServerApp.root_dir={tmp_path}",
        "--IdentityProvider.token=",
        "--allow-root",
        "--no-browser",
        "--port",
    ]
    with server(["jupyterlab", *options], "/lab/tree/x.ipynb", tmp_path) as address, page_of(address) as page:
        page.locator(".jp-Notebook .jp-CodeCell").wait_for()
        page.locator("#jp-main-statusbar", has_text="Idle").wait_for()
        page.locator(".jp-Notebook .jp-CodeCell .cm-content").click()
        canvas = page.locator(".cascade-browser canvas")
        for _ in range(20):  # a key that comes before the kernel is ready does nothing
            page.keyboard.press("Control+Enter")
            page.wait_for_timeout(3000)
            if canvas.count() or page.locator(".jp-InputPrompt", has_text="[*]").count():
                break
        canvas.wait_for()
        assert sorted(click_cells(page, run))[2] <= MAX_MS
        mark_three(page, tmp_path / "marks.csv")
        page.locator(".cb-tabs button", has_text="Flow").click()
        page.locator(".cb-bar .cb-error").first.click()
        page.locator(".cb-title", has_text="recoverable reject").wait_for()
        page.locator(".cb-row details summary").first.click()
        page.locator(".cb-similar div").first.wait_for()
        page.locator(".cb-tabs button", has_text="Slices").click()
        first_slice = page.locator(".cb-list button:visible", has_text="wrong (").first
        rule = first_slice.inner_text().split(":")[0]
        first_slice.click()
        page.locator(".cb-title", has_text=rule).wait_for()
        page.locator(".cascade-browser input[type=search]").press_sequentially("bill")
        found = "[...document.querySelectorAll('.cb-row')].every((row) => row.textContent.includes('bill'))"
        page.wait_for_function(found)
    assert correct(run, tmp_path / "marks.csv", tmp_path / "corrected.tsv") == 3


@pytest.mark.skipif(find_spec("marimo") is None, reason="needs marimo: pip install marimo")
def test_it_works_in_marimo(run, tmp_path):
    code = "".join(f"    {line}\n" for line in CODE.format(run=run.directory).splitlines())
    (tmp_path / "x.py").write_text(MARIMO.format(code=code.rstrip()), encoding="utf-8")
    command = ["marimo", "run", "x.py", "--headless", "--no-token", "--port"]
    with server(command, "/", tmp_path) as address, page_of(address) as page:
        page.locator(".cascade-browser canvas").wait_for()
        assert sorted(click_cells(page, run))[2] <= MAX_MS
        mark_three(page, Path(tmp_path) / "marks.csv")
    assert correct(run, tmp_path / "marks.csv", tmp_path / "corrected.tsv") == 3
