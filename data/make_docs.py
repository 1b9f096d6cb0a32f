"""Builds the documentation's site from the README, the guides, the notebooks and the docstrings: `make docs`.

The notebooks are executed on the demo's runs. Everything that is generated goes to one folder; from there, Zensical
builds the site and refuses dead links.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path

import tomli
import tomli_w
from typer.main import get_command

from cascade_lab.cli import app

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "data" / "docs"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
LINK = re.compile(r"(\]\(|\bsrc=\")([^)\s\"#]+)")

# The order of the guides in the site; a guide that is not named here comes after them.
ORDER = (
    "first_cascade",
    "checkpoints",
    "errors",
    "thresholds",
    "rejectors",
    "comparison",
    "reports",
    "service",
    "traffic",
    "batch",
    "log_elsewhere",
    "speed",
    "study",
    "files",
    "map",
    "guide_zh",
)
# The public names: all of these packages, and the functions that the commands call.
PACKAGES = {
    "Core": "cascade_lab",
    "Analysis": "cascade_lab.analysis",
    "Thresholds": "cascade_lab.thresholds",
    "Displays": "cascade_lab.displays",
}
FUNCTIONS = {
    "Files and models": (
        "cascade_lab.draft.draft_cascade",
        "cascade_lab.bert.finetune.finetune",
        "cascade_lab.bert.huggingface.import_directory",
        "cascade_lab.export.export_cascade",
        "cascade_lab.leaderboard.leaderboard",
        "cascade_lab.reporting.report.write_report",
        "cascade_lab.reporting.verify.verify_report",
        "cascade_lab.tracking.log_run",
    ),
    "Scoring and serving": (
        "cascade_lab.batch.job.score",
        "cascade_lab.serving.app.create_app",
        "cascade_lab.serving.batching.Batcher",
        "cascade_lab.serving.collect.collect",
        "cascade_lab.latency_benchmark.measure",
        "cascade_lab.precision_check.verify_precision",
        "cascade_lab.bert.attributions.attribute",
        "cascade_lab.study.run_study",
        "cascade_lab.held_out_labels.run_held_out_study",
    ),
}


def target(path: Path) -> str:
    """Return where a file of the repository is in the site's sources."""
    name = path.relative_to(ROOT).as_posix()
    if name == "README.md":
        return "index.md"
    if name.startswith("data/docs/"):
        return name.removeprefix("data/docs/")
    if path in NOTEBOOKS:
        return f"notebooks/{path.stem}.md"
    return f"repository/{name}"


def with_links(text: str, page: Path, sources: Path) -> str:
    """Return a page's text with its relative links pointing into the site; files that have no page are copied there."""

    def link(match: re.Match[str]) -> str:
        before, address = match.groups()
        path = (page.parent / address).resolve()
        if ":" in address:
            return match.group()
        if path.is_dir():
            path = path / "README.md"
        if not path.is_file():
            raise SystemExit(f"error: {page.relative_to(ROOT)}: the link to {address} is dead")
        new = target(path)
        if new.startswith("repository/") and not (sources / new).exists():
            copy(path, sources)
        return before + "../" * target(page).count("/") + new

    return LINK.sub(link, text)


def copy(path: Path, sources: Path) -> None:
    """Copy a file of the repository into the site's sources; a page with its links changed."""
    new = sources / target(path)
    new.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".md":
        new.write_text(with_links(path.read_text(encoding="utf-8"), path, sources), encoding="utf-8")
    else:
        shutil.copy(path, new)


def write_notebook(notebook: Path, runs: Path | None, sources: Path) -> None:
    """Execute a notebook on the demo's runs, if given, and write it as a page, with its pictures beside it."""
    import nbformat
    from nbconvert import MarkdownExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    book = nbformat.read(notebook, as_version=4)
    for cell in book.cells:
        if cell.cell_type == "markdown":
            cell.source = with_links(cell.source, notebook, sources)
    if runs is not None:
        print(f"executing {notebook.name}", flush=True)
        shown = [cell.source for cell in book.cells]
        for cell in book.cells:
            if "parameters" in cell.metadata.get("tags", []) and runs.resolve() != ROOT / "runs":
                cell.source = cell.source.replace("../runs/", f"{runs.resolve().as_posix()}/")
        ExecutePreprocessor(timeout=1200).preprocess(book, {"metadata": {"path": str(notebook.parent)}})
        for cell, source in zip(book.cells, shown, strict=True):
            cell.source = source
    page = sources / "notebooks" / f"{notebook.stem}.md"
    page.parent.mkdir(parents=True, exist_ok=True)
    exporter = MarkdownExporter()
    text, resources = exporter.from_notebook_node(
        book, {"unique_key": notebook.stem, "output_files_dir": f"{notebook.stem}_files"}
    )
    for name, content in resources["outputs"].items():
        (page.parent / name).parent.mkdir(exist_ok=True)
        (page.parent / name).write_bytes(content)
    page.write_text(text.replace('<table border="1" class="dataframe">', "<table>"), encoding="utf-8")


def write_api(sources: Path) -> None:
    """Write a page for each public package, with every public name in it, and pages of further functions."""
    for title, package in PACKAGES.items():
        module = import_module(package)
        objects = [getattr(module, name) for name in module.__all__]
        if package == "cascade_lab":
            objects = [entry for entry in objects if not entry.__module__.startswith("cascade_lab.displays")]
        about = (module.__doc__ or "").split("\n\n")[0] + f" Import these names from `{package}`."
        write_names(sources, title, about, [f"{entry.__module__}.{entry.__qualname__}" for entry in objects])
    for title, names in FUNCTIONS.items():
        write_names(sources, title, "Functions that commands call, each with the module to import it from.", names)


def write_names(sources: Path, title: str, about: str, names: Iterable[str]) -> None:
    """Write a page of public names, from their docstrings."""
    page = sources / api_page(title)
    page.parent.mkdir(parents=True, exist_ok=True)
    directives = [f"::: {name}" for name in names]
    if title in FUNCTIONS:
        directives = [f"{directive}\n    options:\n      show_root_full_path: true" for directive in directives]
    page.write_text("\n\n".join([f"# {title}", about, *directives]) + "\n", encoding="utf-8")


def api_page(title: str) -> str:
    """Return where a page of public names is in the site's sources."""
    return f"api/{title.lower().replace(' ', '_')}.md"


def write_commands(sources: Path) -> None:
    """Write the page of all commands, from their help."""
    command = [sys.executable, "-m", "typer", "cascade_lab.cli", "utils", "docs", "--name", "cascade-lab"]
    text = subprocess.run(command, capture_output=True, text=True, check=True, cwd=ROOT).stdout
    text = text.replace("# `cascade-lab`", "# Commands", 1)
    for name, entry in get_command(app).commands.items():
        about = entry.get_short_help_str(limit=1000)
        text = re.sub(rf"^\* `{name}`: .*", f"* [`{name}`](#cascade-lab-{name}): {about}", text, flags=re.MULTILINE)
    (sources / "commands.md").write_text(text, encoding="utf-8")


def navigation(sources: Path) -> list[dict[str, object]]:
    """Return the site's table of contents: guides in their order, notebooks, commands, public names."""
    guides = sorted(
        (path.stem for path in GUIDES.glob("*.md")),
        key=lambda stem: (ORDER.index(stem) if stem in ORDER else len(ORDER), stem),
    )
    pages = {path.stem: path for path in (sources / "notebooks").glob("*.md")}
    return [
        {"Home": "index.md"},
        {"Guides": [{heading(sources / f"{stem}.md"): f"{stem}.md"} for stem in guides]},
        {
            "Notebooks": [
                {f"{stem[:2]} {heading(path)}": f"notebooks/{stem}.md"} for stem, path in sorted(pages.items())
            ]
        },
        {"Commands": "commands.md"},
        {"Python": [{title: api_page(title)} for title in (*PACKAGES, *FUNCTIONS)]},
    ]


def heading(page: Path) -> str:
    """Return a page's first heading."""
    return next(line[2:].strip() for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("# "))


def main() -> None:
    """Write the site's sources and build it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--runs", type=Path, default=ROOT / "runs", help="the folder with the demo's runs")
    parser.add_argument("--site", type=Path, default=ROOT / "site", help="the folder to write")
    parser.add_argument("--no-execute", action="store_true", help="show the notebooks without their results")
    arguments = parser.parse_args()
    if sys.version_info < (3, 11):
        sys.exit("error: Zensical, which builds the site, needs Python 3.11 or newer; make .venv with it")
    sources = arguments.runs.resolve() / "docs"
    shutil.rmtree(sources, ignore_errors=True)
    copy(ROOT / "README.md", sources)
    for path in sorted(GUIDES.rglob("*")):
        if path.suffix in (".md", ".png", ".svg"):
            copy(path, sources)
    for notebook in NOTEBOOKS:
        write_notebook(notebook, None if arguments.no_execute else arguments.runs, sources)
    write_api(sources)
    write_commands(sources)
    config = tomli.loads((GUIDES / "zensical.toml").read_text(encoding="utf-8"))
    config["project"] |= {"docs_dir": "docs", "site_dir": "docs-site", "nav": navigation(sources)}
    python = config["project"]["plugins"]["mkdocstrings"]["handlers"]["python"]
    python["paths"] = [str(ROOT)]
    python["options"]["extensions"] = [str(GUIDES / name) for name in python["options"]["extensions"]]
    (sources.parent / "docs.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    command = ["zensical", "build", "--clean", "--strict", "--config-file", str(sources.parent / "docs.toml")]
    subprocess.run([sys.executable, "-m", *command], check=True, cwd=sources.parent)
    shutil.rmtree(arguments.site, ignore_errors=True)
    shutil.move(sources.parent / "docs-site", arguments.site)
    print(f"site: {arguments.site / 'index.html'}")


if __name__ == "__main__":
    main()
