"""The page of a report, and the summary of one page: first screen, glossary, csv, phones, dark pages, print."""

from __future__ import annotations

import base64
import json
import re
import shutil
import subprocess
from html import escape, unescape
from pathlib import Path

import pandas as pd
import pytest
from helpers import HOSTILE, hostile_pair, logits_of, random_run, write_run
from test_verdict import KINDS, runs
from typer.testing import CliRunner

from cascade_lab.cli import app
from cascade_lab.reporting.capture import VALUES_MIME, table_values
from cascade_lab.reporting.glossary import GLOSSARY, anchor, link_terms
from cascade_lab.reporting.html import render_page
from cascade_lab.reporting.report import write_report
from cascade_lab.reporting.sanitize import sanitize
from cascade_lab.reporting.summary import build_summary, write_summary

needs_chromium = pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")


def chromium(*arguments, profile: Path) -> str:
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", f"--user-data-dir={profile}", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout


def measure(html: str, folder: Path, width: int, script: str, *options: str):
    """Return the value of a script in a page in a frame of this width: a window cannot be as narrow as a phone's."""
    report = f"<script>onload = () => {{ parent.document.title = JSON.stringify({script}) }}</script></body>"
    html = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", report)
    frame = f'<iframe srcdoc="{escape(html)}" style="width: {width}px; height: 800px; border: 0"></iframe>'
    (folder / "frame.html").write_text(f"<title></title>{frame}", encoding="utf-8")
    options = (*options, "--window-size=1400,900", "--dump-dom", (folder / "frame.html").as_uri())
    return json.loads(unescape(re.findall("<title>(.*?)</title>", chromium(*options, profile=folder / "profile"))[0]))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return random_run(tmp_path_factory.mktemp("run") / "run", n=150, skill=2)


@pytest.fixture(scope="module")
def page(run):
    return write_report(run).read_text(encoding="utf-8")


def rendered(*outputs) -> str:
    """Return the body of a page with these outputs, each a mapping of media type to content."""
    cells = [
        {"cell_type": "markdown", "source": "# Why\n\nA gate [rejects](#why)."},
        {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": data} for data in outputs]},
    ]
    record = {"runs": {}, "notebook": "x", "notebook_sha256": "", "parameters": {}, "packages": {}}
    return render_page(cells, record).partition("<body")[2]


@needs_chromium
def test_the_first_screen_has_verdict_metrics_and_pictures(page, tmp_path):
    script = """[...['.findings', '.tries', '.tiles', '.pictures img', '.pictures label:last-child img'].map(
        name => document.querySelector(name)?.getBoundingClientRect().bottom), innerWidth, innerHeight,
        document.querySelectorAll('.tiles > div').length]"""
    findings, tries, tiles, first, second, width, height, n_tiles = measure(page, tmp_path, 1280, script)
    assert (width, height, n_tiles) == (1280, 800, 5)
    assert tiles < findings < height
    assert tries is None or tries < height  # no suggestion where no interval supports one
    assert max(findings, tries or 0) < min(first, second) <= max(first, second) < height


@needs_chromium
def test_a_phone_shows_the_whole_width_and_the_contents_on_demand(page, tmp_path):
    script = """[document.documentElement.scrollWidth, document.querySelector('nav ul').clientHeight,
        (document.getElementById('show-contents').click(), document.querySelector('nav ul').clientHeight),
        Math.max(...[...document.images].map(image => image.clientWidth)),
        (document.querySelector('.picture').click(), document.images[0].clientWidth)]"""
    width, closed, opened, images, enlarged = measure(page, tmp_path, 390, script)
    assert width <= 390
    assert closed == 0 < opened
    assert images <= 390 < enlarged


@needs_chromium
@pytest.mark.parametrize(("scheme", "is_dark"), [(0, True), (1, False)])
def test_a_page_follows_the_preferred_colours(page, tmp_path, scheme, is_dark):
    script = "['backgroundColor', 'color'].map(name => getComputedStyle(document.body)[name])"
    option = f"--blink-settings=preferredColorScheme={scheme}"
    background, ink = (
        sum(map(int, re.findall(r"\d+", color)[:3])) for color in measure(page, tmp_path, 1280, script, option)
    )
    assert (background < ink) == is_dark


def test_each_term_is_linked_once_to_its_meaning(page):
    links = re.findall(r'<a class="term" href="#([^"]+)"', page.partition('<dl class="glossary">')[0])
    assert len(links) == len(set(links)) > 15
    meanings = re.findall(r'<dt id="(term:[^"]+)"', page)
    assert set(links) <= set(meanings)
    assert set(re.findall(r'href="#(term:[^"]+)"', page)) == set(meanings) & set(re.findall(r'"#(term:[^"]+)"', page))
    assert all(f'"{target}"' in page for target in re.findall(r'href="#([^"]+)"', page))
    for tag in ("table", "code", "pre", "h2", 'dl class="facts"'):
        inside = "".join(re.findall(rf"<{tag}\b.*?</{tag.split()[0]}>", page, flags=re.DOTALL))
        assert 'class="term"' not in inside, tag


def test_links_of_terms_leave_texts_of_users_and_tags_alone():
    html = '<p title="a > reach">Reach <code>gate</code> <a href="#x">gate</a></p><table><td>gate</td></table>'
    linked, terms = link_terms(html)
    assert terms == ["reach"]
    assert linked == html.replace(">Reach", f'><a class="term" href="#{anchor("reach")}">Reach</a>')
    assert link_terms("<p>a 95% confidence interval; reject recall; investigate; pre-gate</p>")[1] == [
        "confidence interval",
        "reject recall",
    ]
    assert list(GLOSSARY) == sorted(GLOSSARY, key=str.lower)


def test_every_table_has_its_csv():
    frame = pd.DataFrame({"=SUM(A1)": [1 / 3, -0.5], "label": ["=1+1", 'a "b", c']}, index=["x", "y"])
    whole = {"text/html": frame.to_html(), VALUES_MIME: table_values(frame)}
    rows = "<tr><td>a<br>b</td><td>-0.5</td></tr><tr><td>=1+1</td><td>1,451</td></tr>"
    shown = {"text/html": f"<details><summary>s</summary><table><tr><th>k</th><th>n</th></tr>{rows}</table></details>"}
    html = rendered(whole, shown)
    links = re.findall(r'<a class="csv" download="([^"]+)" href="data:text/csv;base64,([^"]+)">', html)
    assert [name for name, _ in links] == ["why-1.csv", "why-2.csv"]
    first, second = (base64.b64decode(content).decode("utf-8-sig") for _, content in links)
    assert first == ',\'=SUM(A1),label\r\nx,0.3333333333,\'=1+1\r\ny,-0.5,"a ""b"", c"\r\n'
    assert second == 'k,n\r\n"a\nb",-0.5\r\n\'=1+1,"1,451"\r\n'


def test_every_table_of_a_report_has_its_csv(page, run):
    record = json.loads((run.directory / "report.json").read_text(encoding="utf-8"))
    n_tables = sum(output["kind"] == "table" for output in record["outputs"])
    assert page.count('<a class="csv"') == n_tables >= 3


def test_details_stay_and_are_closed():
    given = '<details open ontoggle="x()"><summary onclick="y()">a → b</summary>'
    given += "<table><tr><td>t</td></tr></table></details>"
    assert sanitize(given).startswith("<details><summary>a → b</summary><table>")
    html = rendered({"text/html": given})
    assert '<details><summary>a → b</summary><div class="table" tabindex="0"><table>' in html
    origin = html.partition('<section class="origin">')[2]
    assert "<details><summary>" in origin
    assert "<details open" not in html


def test_a_run_without_labels_has_a_report(run, tmp_path):
    labels = run.examples.assign(label=None)
    unlabelled = write_run(tmp_path / "run", run.spec, labels, logits_of(run))
    html = write_report(unlabelled).read_text(encoding="utf-8")
    assert "No text has a label, so it is not known how many answers are correct." in html
    assert html.count("<img ") == 2  # the latency, on the first screen and in its section


@pytest.fixture(scope="module")
def every_run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return {kind: run if run.directory else run.write(folder / kind) for kind, (run, _) in runs(folder).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_has_a_summary_without_unexplained_terms(every_run, kind):
    html, record = build_summary(every_run[kind])
    body = re.sub(r"<(style|code)\b.*?</\1>", "", html.partition("<main>")[2], flags=re.DOTALL)
    words = unescape(re.sub("<[^>]*>", " ", body))
    assert link_terms(f"<p>{escape(words)}</p>")[1] == []
    assert "nan" not in words
    sections = re.findall("<h2>(.*?)</h2>", html)
    assert sections == ["What it does", "How often it is right", "What it costs", "What to do next", "Keep in mind"]
    widths = [float(width) for width in re.findall(r'style="width: ([\d.]+)%"', html)]
    assert sum(widths) == pytest.approx(100 if kind != "no labels" else 0, abs=0.01)
    assert len(record["outputs"]) == 3
    assert not re.findall(r"(?:src|href)\s*=|<script|url\(", html)


def test_a_summary_says_how_often_the_cascade_is_right(every_run):
    run = every_run["two stages"]
    html = build_summary(run)[0]
    accuracy = run.metrics["end_to_end"]["accuracy"]
    assert f"{round(150 * accuracy)} answers were right: {accuracy:.1%}" in html
    assert "Nobody has noted the right answers" in build_summary(every_run["no labels"])[0]
    assert "The right answer is known for 75 of 150 texts only" in build_summary(every_run["some labels"])[0]


def test_a_summary_is_written_verified_and_refused_with_a_notebook(run, tmp_path):
    def cascade_lab(*arguments):
        return CliRunner().invoke(app, [str(argument) for argument in arguments])

    directory = shutil.copytree(run.directory, tmp_path / "run")
    result = cascade_lab("report", directory, "--summary")
    assert (result.exit_code, result.stdout) == (0, f"summary: {directory / 'summary.html'}\n")
    assert (directory / "summary.html").read_bytes() == write_summary(run, tmp_path / "other.html").read_bytes()
    assert cascade_lab("verify", directory / "summary.html").stdout == f"{directory / 'summary.html'}: identical\n"
    json_path = directory / "summary.json"
    json_path.write_text(json_path.read_text(encoding="utf-8").replace("0.", "0.9", 1), encoding="utf-8")
    assert cascade_lab("verify", directory / "summary.html").exit_code == 1
    result = cascade_lab("report", directory, "--summary", "--notebook", "01_run_cascade")
    assert result.exit_code == 2
    assert result.stderr == (
        "error: a summary executes no notebook; leave out --notebook and --parameter, or --summary\n"
    )


@needs_chromium
@pytest.mark.parametrize("size", ["A4", "letter"])
def test_a_summary_prints_on_one_page(every_run, tmp_path, size):
    """The one with the most rows and suggestions: three stages, and texts of users that are long."""
    run = every_run["three stages"]
    examples = run.examples.assign(text=run.examples["text"] + " and so on" * 50)
    html = build_summary(write_run(tmp_path / "run", run.spec, examples, logits_of(run)))[0]
    (tmp_path / "page.html").write_text(html.replace("size: auto", f"size: {size}"), encoding="utf-8")
    pdf = tmp_path / "page.pdf"
    chromium(f"--print-to-pdf={pdf}", (tmp_path / "page.html").as_uri(), profile=tmp_path / "profile")
    assert len(re.findall(rb"/Type\s*/Page\b", pdf.read_bytes())) == 1


def test_a_summary_of_hostile_texts_is_harmless(tmp_path):
    run, _ = hostile_pair(tmp_path)
    html = build_summary(run)[0]
    assert "<script" not in html
    assert "\x1b" not in html
    assert escape(HOSTILE[0]) in html
