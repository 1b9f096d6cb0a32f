"""Tests that the notebooks run, and that their reports are complete, rebuilt to the same bytes and compared."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from helpers import memory_run, random_run
from test_serving_latency import study_and_run
from typer.testing import CliRunner

import cascade_lab.reporting.report as report_module
from cascade_lab import Cascade, CascadeSpec, EvalSet, Run
from cascade_lab.analysis.tuned_on import WARNING
from cascade_lab.atomic import locked_file
from cascade_lab.cli import app
from cascade_lab.exceptions import RunError
from cascade_lab.provenance import sha256
from cascade_lab.reporting.html import render_page
from cascade_lab.reporting.report import NOTEBOOK, NOTEBOOKS, notebook_path, write_figures, write_report
from cascade_lab.reporting.verify import verify_report
from cascade_lab.thresholds import Goal, tune

DATA = Path(__file__).parents[1] / "data"
FOLDER = notebook_path(NOTEBOOK).parent


def cascade_lab(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The runs of `make demo`, and a run of the tuned cascade on the set that it was tuned on."""
    folder = tmp_path_factory.mktemp("demo")
    dev, test = (EvalSet.read(DATA / f"{name}.tsv") for name in ("dev", "test"))
    with Cascade.load(DATA / "cascade.toml") as cascade:
        run = cascade.run(dev, output=folder / "demo-dev")
        cascade.run(test, output=folder / "demo")
    tune(run, Goal(maximize="accuracy"), n_resamples=50, n_repeats=1).write(folder / "demo-tuned.toml")
    with Cascade.load(CascadeSpec.read(folder / "demo-tuned.toml")) as cascade:
        cascade.run(test, output=folder / "demo-tuned")
        cascade.run(dev, output=folder / "same-texts")
    return folder


@pytest.fixture(scope="module")
def tuned(demo):
    """The run of the tuned cascade, with its report."""
    run = Run.read(demo / "demo-tuned")
    write_report(run)
    return run


@pytest.fixture
def small(tmp_path):
    """A notebook that shows a number in each possible way; it runs faster than the real ones."""
    cells = [
        nbformat.v4.new_markdown_cell("# Why\n\nBecause of [this](#figures)."),
        nbformat.v4.new_code_cell('run_dir = None\nfactor = 1\nother = "../runs/x"', metadata={"tags": ["parameters"]}),
        nbformat.v4.new_code_cell(
            "import warnings\n"
            "import pandas as pd\n"
            "from cascade_lab import Run\n"
            "run = Run.read(run_dir)\n"
            "p = run.predictions['probability']\n"
            "warnings.warn('not for the reader')\n"
            "print(f'mean {p.mean():.6f}', set('abcdefgh'))"
        ),
        nbformat.v4.new_markdown_cell("## Figures\n\n### Below"),
        nbformat.v4.new_code_cell("pd.DataFrame({'p': [p.min(), p.max() * factor]}, index=['least', 'most'])"),
        nbformat.v4.new_code_cell("pd.DataFrame({'p': [p.max()]}).style.background_gradient(vmin=0, vmax=1)"),
        nbformat.v4.new_code_cell(
            "import matplotlib.pyplot as plt\nax = plt.figure().add_subplot(title='a $x$')\nax.plot(sorted(p)[::20]);"
        ),
        nbformat.v4.new_code_cell("run, ax, run.spec.stages[0].__class__.__init__"),
    ]
    path = tmp_path / "small.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_the_first_notebook_runs_a_cascade_from_checkpoints(tiny, tiny_evalset, tmp_path):
    parameters = {"cascade_file": str(tiny), "evalset_file": str(tiny_evalset), "split": None}
    parameters["output_dir"] = str(tmp_path / "run")
    executed = papermill.execute_notebook(
        notebook_path(NOTEBOOK), tmp_path / "executed.ipynb", parameters=parameters, kernel_name="python3",
        progress_bar=False,
    )  # fmt: skip
    run = Run.read(tmp_path / "run")
    assert len(run.examples) == 200
    pictures = [output for output in outputs(executed) if "image/png" in output.get("data", {})]
    assert len(pictures) == 6  # the first screen's two, gate, intent, end to end, latency
    nbformat.validate(executed)


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs(path, demo, tmp_path):
    """After `make demo`, with the runs that the default parameters name."""
    defaults = {
        name: parameter["default"].strip("[]'\"") for name, parameter in papermill.inspect_notebook(str(path)).items()
    }
    parameters = {name: str(demo / Path(value).name) for name, value in defaults.items() if "../runs/" in value}
    parameters |= {"output_dir": str(tmp_path / "run")} if "output_dir" in defaults else {}
    executed = papermill.execute_notebook(
        path, tmp_path / path.name, parameters=parameters, cwd=path.parent, kernel_name="python3", progress_bar=False
    )
    assert outputs(executed)
    assert not [output for output in outputs(executed) if output.output_type == "error"]
    printed = "".join(output.text for output in outputs(executed) if output.output_type == "stream")
    assert "FontWarning" not in printed
    assert "WARNING:tensorflow" not in printed
    assert "missing from" not in printed, "matplotlib says this of each character that it draws as a box"


def test_times_are_verified_of_a_saved_study_only(tmp_path):
    """A study of another cascade is refused; a report of times that were measured in the report cannot be verified."""
    study, run = study_and_run()
    study.write(tmp_path / "study")
    run = run.write(tmp_path / "run")
    notebook, given = "05_study_latency", {"latency_dir": str(tmp_path / "study")}
    report = write_report(run, notebook=notebook, parameters=given)
    record = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    assert {output["kind"] for output in record["outputs"]} == {"text", "table", "figure"}
    record["files"] = {}
    report.with_suffix(".json").write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(RunError, match="no second measurement gives the same"):
        verify_report(report, run)
    other = run.with_thresholds({"gate0": 0.4}).write(tmp_path / "other")
    result = cascade_lab("report", other.directory, "--notebook", notebook, "-p", f"latency_dir={tmp_path / 'study'}")
    assert (result.exit_code, result.stderr.count("\n")) == (2, 1)
    assert "the latency study is of another cascade: threshold of stage 'gate0' is 0.3 there" in result.stderr


def test_a_report_is_one_file_that_loads_nothing(clinc150_run):
    html = (clinc150_run.directory / "report.html").read_text(encoding="utf-8")
    assert not re.findall(r'(?:src|href)\s*=\s*["\'](?!data:|#)[^"\']', html)
    assert not re.findall(r"<script|<link|<iframe|@import|url\(|<[^>]* on\w+=", html)
    assert "default-src 'none'" in html
    # the first screen's two, gate, intent twice, end to end twice, latency
    assert len(re.findall(r'<img[^>]*src="data:image/png;base64', html)) == 8
    accuracy = clinc150_run.metrics["end_to_end"]["accuracy"]
    assert re.search(rf"{accuracy:.1%} \([\d.]+% to [\d.]+%\) of the 3,100 texts are answered correctly", html)
    assert "Traceback" not in html


def test_a_report_has_a_table_of_contents_its_numbers_and_its_origin(tuned):
    html = (tuned.directory / "report.html").read_text(encoding="utf-8")
    record = json.loads((tuned.directory / "report.json").read_text(encoding="utf-8"))
    headings = re.findall(r'<h[1-6] id="([^"]+)"', html)
    assert len(headings) == len(set(headings)) == 10
    assert re.findall(r'<a href="#([^"]+)"', html) == headings
    words = re.sub(r"(?<=\d),(?=\d{3})", "", unescape(html))
    shown = {float(number) for number in re.findall(r"-?\d+(?:\.\d+)?", words)}
    tables = [output for output in record["outputs"] if output["kind"] == "table"]
    numbers = [value for table in tables for row in table["rows"] for value in row if value is not None]
    assert len(numbers) > 90
    # The record has ten digits, so a number that ends in 5 can be shown rounded the other way.
    assert not [value for value in numbers if min(abs(value - number) for number in shown) > 0.500001e-4]
    pictures = [output for output in record["outputs"] if output["kind"] == "figure"]
    assert len(pictures) == html.count("<img ") == 6
    assert np.nansum(np.array(pictures[4]["axes"][0]["images"][0], dtype=float)) == len(tuned.examples)
    manifest = tuned.manifest
    for digest in (*manifest["contents"].values(), *manifest["inputs"].values(), manifest["evalset"]["sha256"]):
        assert digest in html
    assert record["runs"]["run_dir"]["contents"] == manifest["contents"]
    assert sha256(tuned.directory / "manifest.json") in html
    assert f"pandas {record['packages']['pandas']}" in html


def test_the_report_of_a_tuned_cascade_shows_both_sets_with_intervals(tuned, demo):
    record = json.loads((tuned.directory / "report.json").read_text(encoding="utf-8"))
    (table,) = [output for output in record["outputs"] if "on the tuning set / optimism" in output.get("columns", [])]
    row = dict(zip(table["columns"], table["rows"][table["index"].index("reject_recall")], strict=True))
    tuned_on = tuned.manifest["tuned_on"]
    low, high = tuned_on["intervals"]["reject_recall"]
    expected = [tuned_on["figures"]["reject_recall"], low, high, tuned_on["optimism"]["reject_recall"]]
    assert list(row.values())[:4] == pytest.approx(expected)
    assert row["on this set / value"] == pytest.approx(tuned.metrics["end_to_end"]["reject_recall"])
    assert row["on this set / low"] < row["on this set / value"] < row["on this set / high"]
    assert WARNING not in (tuned.directory / "report.html").read_text(encoding="utf-8")
    assert WARNING in write_report(Run.read(demo / "same-texts")).read_text(encoding="utf-8")


def test_a_report_does_not_depend_on_place_or_user(tuned, tmp_path, monkeypatch):
    shutil.copytree(tuned.directory, tmp_path / "elsewhere")
    (tmp_path / "matplotlibrc").write_text("font.size: 30\n")
    monkeypatch.chdir(tmp_path)
    user = {"PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo", "IPYTHONDIR": str(tmp_path / "mine"), "MPLBACKEND": "agg"}
    for name, value in user.items():
        monkeypatch.setenv(name, value)
    startup = tmp_path / "mine" / "profile_default" / "startup"
    startup.mkdir(parents=True)
    (startup / "00-mine.py").write_text("import pandas as pd\npd.set_option('display.precision', 1)\nprint('mine')\n")
    report = write_report(Run.read("elsewhere"), "there/mine.html")
    assert report.read_bytes() == (tuned.directory / "report.html").read_bytes()
    assert report.with_suffix(".json").read_bytes() == (tuned.directory / "report.json").read_bytes()


def test_verify_prints_identical_or_what_differs(tuned, small, tmp_path, monkeypatch):
    run = shutil.copytree(tuned.directory, tmp_path / "run")
    (tmp_path / "file.txt").write_text("a")
    options = ("--notebook", small, "-p", f"other={tmp_path / 'file.txt'}")
    assert cascade_lab("report", run, *options).exit_code == 0
    report = run / "small.html"
    html = report.read_text(encoding="utf-8")
    assert "<title>Why – service-desk</title>" in html
    assert "not for the reader" not in html
    record = json.loads(report.with_suffix(".json").read_text(encoding="utf-8"))
    assert [output["kind"] for output in record["outputs"]] == ["text", "table", "table", "figure", "text"]
    assert record["files"] == {"other": {"file.txt": sha256(tmp_path / "file.txt")}}
    result = cascade_lab("verify", report, "--notebook", small)
    assert result.exit_code == 2
    assert "its notebook read another run or file as other; give it: -p other=PATH" in result.stderr
    result = cascade_lab("verify", report, *options)
    assert result.exit_code == 0
    assert result.stdout == f"{report}: identical\n"
    monkeypatch.setattr(report_module, "environment", lambda: {"packages": {**record["packages"], "pandas": "9.9"}})
    result = cascade_lab("verify", report, *options)
    assert result.exit_code == 0, result.output
    version = record["packages"]["pandas"]
    assert f"identical except for versions of packages (pandas was {version}, is 9.9)" in result.stdout
    report.write_text(html.replace("Because of", "Because off"), encoding="utf-8")
    result = cascade_lab("verify", report, *options)
    assert result.exit_code == 1
    assert "every number is the same, but the HTML is not the page that was written with the JSON" in result.stdout
    change_record(report, page_sha256=sha256(report))
    result = cascade_lab("verify", report, *options)
    assert result.exit_code == 1
    assert "every number is the same, but the page is not: another version of cascade-lab wrote it" in result.stdout


def test_report_and_verify_refuse_a_changed_logit(tuned, tmp_path):
    run = shutil.copytree(tuned.directory, tmp_path / "run")
    path = run / "scores" / "gate.parquet"
    table = pq.read_table(path)
    logits = table["logits"].to_pylist()
    logits[0] = logits[0][::-1]
    kind = table.schema.field("logits").type
    pq.write_table(table.set_column(1, "logits", pa.array(logits, kind)), path)
    for command in ("report", "verify"):
        result = cascade_lab(command, run / "report.html" if command == "verify" else run)
        assert result.exit_code == 2
        assert result.stderr.startswith(f"error: {path}: changed since the run")
        assert result.stderr.count("\n") == 1
    manifest = json.loads((run / "manifest.json").read_text(encoding="utf-8"))
    manifest["contents"]["scores/gate.parquet"] = sha256(path)
    (run / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    changed_values = verify_report(tuned.directory / "report.html", Run.read(run)).changed_values
    names = {name for name, *_ in changed_values}
    assert "runs › run_dir › contents › scores/gate.parquet" in names
    assert "Each stage › table 2 › accuracy › gate / value" in names
    # One text is decided the other way: a cell of the gate's matrix has one fewer, another one more.
    cells = [name for name in names if name.startswith("What each stage confuses › figure 1 ") and name.count("›") == 4]
    assert sorted(new - old for name, old, new in changed_values if name in cells) == [-1, 1]


def test_an_error_of_a_report_is_one_line(tuned, demo, small, tmp_path):
    def refused(message, *arguments):
        result = cascade_lab(*arguments)
        assert result.exit_code == 2, result.output
        assert result.stderr.startswith("error: ")
        assert message in result.stderr
        assert result.stderr.count("\n") == 1

    run = tuned.directory
    refused("no notebook is named '01_run'; did you mean '01_run_cascade'?", "report", run, "--notebook", "01_run")
    refused("no such notebook", "report", run, "--notebook", tmp_path / "no.ipynb")
    refused("no parameter takes a run", "report", run, "--notebook", FOLDER / "02_study_clinc150.ipynb")
    refused("has no parameter 'faktor'; did you mean 'factor'?", "report", run, "--notebook", small, "-p", "faktor=2")
    refused("other is another run that it reads; give it: -p other=RUN", "report", run, "--notebook", small)
    refused("'factor' is not NAME=VALUE", "report", run, "--notebook", small, "-p", "factor")
    refused("give a name that ends in .html", "report", run, "--output", tmp_path / "report.pdf")
    refused("exists, and is not the JSON of a report", "report", run, "--output", run / "manifest.html")
    refused("TypeError", "report", run, "--notebook", small, "-p", "factor=null", "-p", "other=x")
    refused(f"is of run {tuned.manifest['run_id']}", "verify", run / "report.html", "--run", demo / "demo")
    refused("not the JSON of a report", "verify", run / "metrics.json")
    refused("cannot be read", "verify", tmp_path / "no.html")
    (run / "timings.parquet").rename(tmp_path / "timings.parquet")
    try:
        refused("timings.parquet: cannot be read", "report", run, "--notebook", small, "-p", "other=x")
    finally:
        (tmp_path / "timings.parquet").rename(run / "timings.parquet")


def test_figures_are_beside_the_report(clinc150_run):
    assert sorted(path.name for path in (clinc150_run.directory / "figures").iterdir()) == [
        "confusion-end-to-end-most-confused.png", "confusion-end-to-end.png", "confusion-gate.png",
        "confusion-intent-most-confused.png", "confusion-intent.png", "latency.png",
    ]  # fmt: skip


def test_a_report_that_cannot_be_written_leaves_no_file(tiny_run, small, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"cannot be written \(.*; choose another output"):
        write_figures(tiny_run, tmp_path / "file" / "figures")
    with pytest.raises(RunError, match=r"cannot be written \(.*; choose another output"):
        write_report(tiny_run, tmp_path / "file" / "report.html", notebook=small, parameters={"other": None})
    assert not list(tmp_path.glob(".*"))
    # Both files or none: a page that cannot be written leaves no JSON, and a JSON that cannot be written no page.
    for blocked in (".html", ".json"):
        (tmp_path / f"report{blocked}").mkdir()
        with pytest.raises(RunError):
            write_report(tiny_run, tmp_path / "report.html", notebook=small, parameters={"other": None})
        (tmp_path / f"report{blocked}").rmdir()
        assert not list(tmp_path.glob("report.*"))


def test_figures_of_a_run_without_timings_or_labels(tmp_path):
    run = random_run(tmp_path / "run", n=60)
    logits = {stage.name: run.scores(stage.name).logits for stage in run.spec.stages}
    timeless = Run.from_logits(run.spec, run.examples, logits)
    names = [path.name for path in write_figures(timeless, tmp_path / "timeless")]
    assert names == ["confusion-end-to-end.png", "confusion-gate0.png", "confusion-last.png"]
    unlabelled = memory_run(run.spec, run.examples.assign(label=None), logits)
    assert [path.name for path in write_figures(unlabelled, tmp_path / "unlabelled")] == ["latency.png"]


def logits_run(folder, seed):
    """Write a run made from the logits of a random cascade: it has no timings, checkpoints or digests of inputs."""
    source = random_run(folder / f"source{seed}", n=120, seed=seed)
    logits = {stage.name: source.scores(stage.name).logits for stage in source.spec.stages}
    examples = source.examples.assign(example_id=[f"{seed}-{i}" for i in range(120)])
    return Run.from_logits(source.spec, examples, logits).write(folder / f"run{seed}")


NOT_FROM_LOGITS = ("02_study_clinc150", "05_study_latency", "08_chinese")


@pytest.mark.parametrize("notebook", [name for name in NOTEBOOKS if name not in NOT_FROM_LOGITS])
def test_a_run_from_logits_has_the_reports(notebook, tmp_path):
    run = logits_run(tmp_path, seed=1)
    defaults = papermill.inspect_notebook(str(notebook_path(notebook)))
    others = {"test_dir", "against_dir"} & defaults.keys()
    parameters = {name: str(logits_run(tmp_path, seed=2).directory) for name in others}
    if "other_runs" in defaults:
        parameters["other_runs"] = str(run.with_thresholds({"gate0": 0.3}).write(tmp_path / "other").directory)
    report = write_report(run, notebook=notebook, parameters=parameters)
    assert "<td>logits</td>" in report.read_text(encoding="utf-8")


def test_a_run_in_memory_is_written_before_its_report(small, tmp_path):
    written = random_run(tmp_path / "run", n=60)
    logits = {stage.name: written.scores(stage.name).logits for stage in written.spec.stages}
    run = Run.from_logits(written.spec, written.examples, logits)
    for write in (write_report, write_figures):
        with pytest.raises(RunError, match=rf"^run {run.manifest['run_id']} is only in memory; write the run first"):
            write(run)
    with pytest.raises(RunError, match="write the run first"):
        write_report(run, tmp_path / "report.html", notebook=small, parameters={"other": None})
    with pytest.raises(RunError, match="write the run first"):
        write_report(written.with_thresholds({"gate0": 0.9}), notebook=small, parameters={"other": None})
    report = write_report(run.write(tmp_path / "written"), notebook=small, parameters={"other": None})
    assert report == tmp_path / "written" / "small.html"
    assert verify_report(report, notebook=small, parameters={"other": None}).holds


def test_a_report_of_an_older_schema_version_may_be_replaced(tiny_run, small, tmp_path):
    report = write_report(tiny_run, tmp_path / "report.html", notebook=small, parameters={"other": None})
    json_path = report.with_suffix(".json")
    record = json.loads(json_path.read_text(encoding="utf-8"))
    json_path.write_text(json.dumps({**record, "schema_version": 1}), encoding="utf-8")
    with pytest.raises(RunError, match="has schema version 1, and this package reads 3; write the report again"):
        verify_report(report, tiny_run, notebook=small)
    write_report(tiny_run, report, notebook=small, parameters={"other": None})
    assert json.loads(json_path.read_text(encoding="utf-8")) == record


@pytest.fixture
def handed(tiny_run, small, tmp_path):
    """A report that somebody hands over: in the directory of its run, made with the notebook `small`."""
    run = Run.read(shutil.copytree(tiny_run.directory, tmp_path / "run"))
    return write_report(run, notebook=small, parameters={"other": None})


def change_record(report, **changes):
    path = report.with_suffix(".json")
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")


def refused_line(*arguments):
    result = cascade_lab(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr


def one_cell_notebook(path, code, *, parameters="run_dir = None\nother = None"):
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]}), nbformat.v4.new_code_cell(code)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def test_verify_executes_no_notebook_that_only_the_json_names(handed, small, tmp_path, monkeypatch):
    marker = tmp_path / "executed"
    evil = one_cell_notebook(tmp_path / "evil.ipynb", f"open({str(marker)!r}, 'w').close()")
    shutil.copy(evil, tmp_path / "run" / "evil.ipynb")
    monkeypatch.chdir(tmp_path)
    climbing = os.path.relpath(evil, FOLDER)
    for name in (evil, evil.with_suffix(""), climbing, climbing.removesuffix(".ipynb"), "evil.ipynb", "evil", ""):
        change_record(handed, notebook=str(name))
        message = refused_line("verify", handed)
        assert "is not one of this package, so it is not executed; if you trust it, give it: --notebook PATH" in message
    # Nor is a notebook that was given but is not the one of the report.
    assert "nothing was executed" in refused_line("verify", handed, "--notebook", evil)
    assert not marker.exists()
    report = write_report(Run.read(tmp_path / "run"), notebook=evil)
    marker.unlink()
    assert cascade_lab("verify", report, "--notebook", evil).exit_code == 0
    assert marker.exists()


def test_verify_uses_no_file_that_only_the_json_names(handed, small, tmp_path):
    """Not a run, not a file, not a value with which the notebook could open or write one."""
    options = ("--notebook", small)
    record = json.loads(handed.with_suffix(".json").read_text(encoding="utf-8"))
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    values = (str(secret), "../../secret.txt", "~", "..", ["a", {"b": str(secret)}], {str(secret): 1}, "C:secret.txt")
    for value in values:
        change_record(handed, parameters={"other": value})
        assert "its parameter other = " in (message := refused_line("verify", handed, *options))
        assert "may name a file, so it is used only if you give it: -p other=VALUE" in message
    change_record(handed, parameters={}, runs=record["runs"] | {"other": {"run_id": "x"}})
    assert "give it: -p other=PATH" in refused_line("verify", handed, *options)
    change_record(handed, runs=record["runs"], files={"other": {"secret.txt": sha256(secret)}})
    assert "give it: -p other=PATH" in refused_line("verify", handed, *options)
    # A text is used as a text, even where a file has that name.
    change_record(handed, files={}, parameters={"other": "secret.txt"})
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(tmp_path)
        changed = verify_report(handed, notebook=small).changed_values
    assert changed == []
    change_record(handed, parameters={"other": str(secret)})
    result = cascade_lab("verify", handed, *options, "-p", f"other={secret}")
    assert "files › other › secret.txt: was missing" in result.stdout


def test_a_damaged_record_is_an_error_of_one_line(handed, small):
    path = handed.with_suffix(".json")
    whole = json.loads(path.read_text(encoding="utf-8"))
    deep = "[" * 100_000 + "]" * 100_000
    texts = [
        "",
        "null",
        "[]",
        "3",
        "{}",
        deep,
        json.dumps({**whole, "outputs": 0}).replace('"outputs": 0', f'"x": {deep}'),
    ]
    texts += [json.dumps({key: value for key, value in whole.items() if key != name}) for name in whole]
    texts += [json.dumps(whole | {name: value}) for name in whole for value in (None, 3, [3], {"a": 3}, "a", [[]])]
    table = {"section": "a", "kind": "table", "columns": ["a"], "index": ["b", "c"], "rows": [[1, 2]]}
    damaged_outputs = [
        {},
        {"section": 1},
        table,
        {**table, "rows": 3},
        {"section": [], "kind": {}},
        {**table, "section": {}},
    ]
    texts += [json.dumps(whole | {"outputs": [output]}) for output in damaged_outputs]
    for text in texts:
        path.write_text(text, encoding="utf-8")
        # `--notebook` is not given: a record that is read at all ends at its notebook.
        refused_line("verify", handed)


def test_verify_of_a_report_outside_its_run_names_the_option(handed, small, tmp_path):
    (tmp_path / "sent").mkdir()
    for suffix in (".html", ".json"):
        shutil.copy(handed.with_suffix(suffix), tmp_path / "sent")
    report = tmp_path / "sent" / handed.name
    message = refused_line("verify", report, "--notebook", small)
    assert f"{report}: is not in the directory of its run; give the run: --run RUN" in message
    assert cascade_lab("verify", report, "--notebook", small, "--run", tmp_path / "run").exit_code == 0


def test_a_kernel_that_dies_is_an_error_of_one_line(tiny_run, tmp_path, monkeypatch):
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    code = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"
    notebook = one_cell_notebook(tmp_path / "killed.ipynb", code)
    arguments = ("report", tiny_run.directory, "--notebook", notebook, "--output", tmp_path / "out.html")
    message = refused_line(*arguments, "-p", "other=1")
    assert "the report's notebook failed: its kernel died in cell 2 (out of memory?)" in message
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.ipynb", "temporary"]
    assert not list((tmp_path / "temporary").iterdir())


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
@pytest.mark.parametrize(
    ("moment", "number"),
    [
        ("in a cell", signal.SIGTERM),
        ("while the kernel starts", signal.SIGINT),
        pytest.param("in a cell", signal.SIGINT, marks=pytest.mark.slow),
        pytest.param("while the kernel starts", signal.SIGTERM, marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_a_report_and_its_kernel(tiny_run, tmp_path, number, moment):
    (tmp_path / "temporary").mkdir()
    pid_file = tmp_path / "pid"
    code = f"import os, time\nopen({str(pid_file)!r}, 'w').write(str(os.getpid()))\ntime.sleep(600)"
    notebook = one_cell_notebook(tmp_path / "slow.ipynb", code)
    # A suite that runs in the background of a shell ignores SIGINT, and a report keeps what it inherits.
    start = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    start += "from cascade_lab.cli import main; main()"
    command = [sys.executable, "-c", start, "report", str(tiny_run.directory)]
    command += ["--notebook", str(notebook), "--output", str(tmp_path / "out.html")]
    env = {**os.environ, "TMPDIR": str(tmp_path / "temporary")}
    process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    awaited = f"{pid_file}" if moment == "in a cell" else "temporary/*/notebooks"
    deadline = time.monotonic() + 120
    while not list(tmp_path.glob(awaited.removeprefix(f"{tmp_path}/"))):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.3)
    process.send_signal(number)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 128 + number, stderr
    assert stderr == f"error: stopped by {number.name}\n"
    assert not list((tmp_path / "temporary").iterdir())
    assert not list(tmp_path.glob("out*"))
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert str(tmp_path / "temporary") not in processes


def wide_page(record, *, n_columns):
    """A page with a table as notebook 03 shows it, with long texts, and with a wide table in Markdown."""
    names = ["example_id", "text", "label", "predicted", "decided_by", "probability", "confidence", "would_become"]
    names = [names[i] if i < len(names) else f"missed_by_{i}" for i in range(n_columns)]
    texts = {"text": "a text of many words that a user wrote to the service desk about the very same laptop"}
    row = [texts.get(name, "label_of_a_class") for name in names]
    index = pd.MultiIndex.from_tuples([("intent", "unrecoverable reject")] * 3, names=["fault", "kind"])
    data = {"text/html": pd.DataFrame([row] * 3, columns=names, index=index).to_html()}
    markdown = "\n".join(["|".join(f"column{i}" for i in range(40)), "|".join(["---"] * 40), "|".join(["cell"] * 40)])
    cells = [
        {"cell_type": "code", "outputs": [{"output_type": "display_data", "data": data}]},
        {"cell_type": "markdown", "source": f"# Wide\n\n{markdown}\n"},
    ]
    return render_page(cells, record)


def test_every_table_scrolls_by_itself(handed):
    html = wide_page(json.loads(handed.with_suffix(".json").read_text(encoding="utf-8")), n_columns=30)
    assert len(re.findall(r"<table\b", html)) >= 3
    assert len(re.findall(r'<div class="table"[^>]*><table\b', html)) == len(re.findall(r"<table\b", html))
    assert "overflow-x: auto" in html


@pytest.mark.skipif(not shutil.which("chromium"), reason="needs chromium")
@pytest.mark.parametrize(("width", "n_columns", "fits"), [(1280, 8, True), (1280, 40, False), (500, 8, False)])
def test_no_column_of_a_wide_table_is_out_of_reach(handed, tmp_path, width, n_columns, fits):
    """The page is never wider than the window; a table is, and then it scrolls inside it."""
    html = wide_page(json.loads(handed.with_suffix(".json").read_text(encoding="utf-8")), n_columns=n_columns)
    measure = (
        "<script>onload = () => { const t = document.querySelector('.table'); document.title = JSON.stringify("
        "[innerWidth, document.documentElement.scrollWidth, t.clientWidth, t.scrollWidth]) }</script></body>"
    )
    html = re.sub("<meta http-equiv[^>]*>", "", html).replace("</body>", measure)
    (tmp_path / "page.html").write_text(html, encoding="utf-8")
    command = ["chromium", "--headless", "--no-sandbox", "--disable-gpu", f"--window-size={width},900", "--dump-dom"]
    command += [f"--user-data-dir={tmp_path / 'profile'}", (tmp_path / "page.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    window, page, visible, table = json.loads(re.findall("<title>(.*)</title>", dom)[0])
    assert page <= window
    assert (table <= visible) == fits


@pytest.mark.skipif(os.name != "posix", reason="needs signals")
def test_a_signal_that_this_process_ignores_does_not_end_a_report(tiny_run, tmp_path):
    """As under `nohup`, or in the background of a script."""
    code = f"import os, signal\nos.kill({os.getpid()}, signal.SIGINT)"
    notebook = one_cell_notebook(tmp_path / "signals.ipynb", code)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        report = write_report(tiny_run, tmp_path / "out.html", notebook=notebook, parameters={"other": 1})
        assert report.is_file()
        assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN
        report.unlink()
        # A handler that returns: the report has stopped, and says so.
        seen = []
        signal.signal(signal.SIGINT, lambda *_: seen.append("seen"))
        slow = one_cell_notebook(tmp_path / "slow.ipynb", f"{code}\nimport time\ntime.sleep(600)")
        with pytest.raises(RunError, match="the report's notebook was stopped by SIGINT"):
            write_report(tiny_run, report, notebook=slow, parameters={"other": 1})
        assert seen == ["seen"]
        assert not report.exists()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_report_to_the_same_file_is_refused_at_once(tiny_run, tmp_path):
    with locked_file(tmp_path / "out.html", overwrite=False, what="report"):
        message = refused_line("report", tiny_run.directory, "--output", tmp_path / "out.html")
        assert f"process {os.getpid()} is writing this report; wait until it has ended" in message
    assert not list(tmp_path.iterdir())


def test_a_page_without_its_json_is_not_overwritten(tiny_run, small, tmp_path):
    (tmp_path / "out.html").write_text("<p>mine</p>")
    options = ("--notebook", small, "-p", "other=1", "--output", tmp_path / "out.html")
    message = refused_line("report", tiny_run.directory, *options)
    assert "has no JSON of a report beside it, so it is not overwritten; delete it" in message
    assert (tmp_path / "out.html").read_text() == "<p>mine</p>"


def test_a_report_of_a_run_that_is_replaced_meanwhile_is_not_written(tiny_run, tmp_path):
    """The notebook may have read one table of the old run and the next one of the new run."""
    directory = shutil.copytree(tiny_run.directory, tmp_path / "run")
    code = f"from cascade_lab import Run\nRun.read(r'{tiny_run.directory}').write(r'{directory}', overwrite=True)"
    code += f"\nimport json, pathlib; path = pathlib.Path(r'{directory}', 'manifest.json')"
    code += "\npath.write_text(json.dumps({**json.loads(path.read_text()), 'run_id': 'another'}))"
    notebook = one_cell_notebook(tmp_path / "replaces.ipynb", code)
    message = refused_line("report", directory, "--notebook", notebook, "-p", "other=1")
    assert "run: the run was replaced while its report was made; make the report again" in message
    assert not list(directory.glob("*.html"))


@pytest.mark.parametrize("name", ["../secret.txt", "/dev/zero", "scores/../../secret.txt", "pipe", "a\0b", "."])
def test_a_manifest_names_no_file_outside_its_run(handed, small, tmp_path, name):
    (tmp_path / "secret.txt").write_text("secret")
    os.mkfifo(tmp_path / "run" / "pipe")
    path = tmp_path / "run" / "manifest.json"
    manifest = json.loads(path.read_text(encoding="utf-8"))
    manifest["contents"][name] = sha256(tmp_path / "secret.txt")
    path.write_text(json.dumps(manifest), encoding="utf-8")
    message = refused_line("verify", handed, "--notebook", small)
    assert "which is not a file of the run" in message
    assert "which is not a file of the run" in refused_line("report", path.parent, "--notebook", small, "-p", "other=1")
