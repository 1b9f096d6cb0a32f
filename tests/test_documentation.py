"""README, guides and notebooks: every link leads somewhere, and every command, flag and import in them exists."""

from __future__ import annotations

import ast
import json
import re
import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest
import typer

import cascade_lab

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
GUIDES = ROOT / "data" / "docs"
PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted(GUIDES.glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

LINK = re.compile(r"\]\(<?([^)\s>]+)|\b(?:src|href)=\"([^\"]+)\"")
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
SHOWN_FILE = re.compile(r"`((?:data|tests|notebooks|cascade_lab)/[\w./]+)`")
IMPORT = re.compile(r"`(from cascade_lab[\w.]* import [\w, ]+)`")


def prose(path: Path) -> str:
    """A page's text, or a notebook's text cells, without its code blocks."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".ipynb":
        cells = json.loads(text)["cells"]
        text = "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")
    return FENCE.sub("", text)


def anchors(path: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the site make them."""
    headings = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.replace("`", "").lower()).replace(" ", "-") for heading in headings}


def blocks(path: Path, language: str) -> list[str]:
    return [code for found, code in FENCE.findall(path.read_text(encoding="utf-8")) if found == language]


@pytest.mark.parametrize("path", [*PAGES, *NOTEBOOKS], ids=lambda path: path.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file_and_an_anchor_that_exist(path):
    for groups in LINK.findall(prose(path)):
        address, _, anchor = next(filter(None, groups)).partition("#")
        if re.match(r"https?:|mailto:", address):
            continue
        target = (path.parent / address).resolve() if address else path
        assert target.is_relative_to(ROOT), address
        assert target.exists(), address
        if anchor:
            assert anchor in anchors(target), f"{address}#{anchor}"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_file_of_the_repository_that_a_page_names_exists(path):
    for name in SHOWN_FILE.findall(prose(path)):
        assert (ROOT / name).exists(), name


def test_every_command_and_flag_that_a_page_shows_exists():
    from cascade_lab.cli import app

    commands = typer.main.get_command(app).commands
    shown = set()
    for path in PAGES:
        for block in blocks(path, "console"):
            for line in re.findall(r"^\$ (cascade-lab .*)", block.replace("\\\n", " "), re.MULTILINE):
                name, *words = shlex.split(line, comments=True)[1:]
                assert name in commands, line
                shown.add(name)
                flags = {flag for option in commands[name].params for flag in (*option.opts, *option.secondary_opts)}
                flags.add("--help")
                assert {word for word in words if re.match(r"--?[a-z]", word)} <= flags, line
    text = "\n".join(prose(path) for path in PAGES)
    unnamed = {name for name in commands if name not in shown and not re.search(rf"`(?:cascade-lab )?{name}\b", text)}
    assert not unnamed, "commands that no page names"


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_python_block_compiles_and_imports_what_exists(path):
    for code in [*blocks(path, "python"), *IMPORT.findall(path.read_text(encoding="utf-8"))]:
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and node.module.startswith("cascade_lab"):
                module = import_module(node.module)
                assert [name.name for name in node.names if not hasattr(module, name.name)] == []


def test_the_readme_is_short_and_leads_to_every_guide():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert text.count("\n") <= 160
    assert [path.name for path in GUIDES.glob("*.md") if f"(data/docs/{path.name})" not in text] == []


def test_the_extras_and_the_version_are_the_same_everywhere():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    named = re.search(r"^Extras: .*?\.", readme, re.MULTILINE | re.DOTALL).group()
    assert {*re.findall(r"`(\w+)`", named)} == set(project["optional-dependencies"]) - {"dev"}
    assert project["version"] == cascade_lab.__version__
    assert f"\nversion: {cascade_lab.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_the_pictures_are_small_and_shown():
    pictures = list((GUIDES / "pictures").iterdir())
    assert sum(path.stat().st_size for path in pictures) < 1_000_000
    text = "\n".join(path.read_text(encoding="utf-8") for path in PAGES)
    assert [path.name for path in pictures if f"pictures/{path.name})" not in text] == []


@pytest.mark.slow
def test_the_site_is_built_without_dead_links(tmp_path):
    """With notebooks as they are committed; `make docs` executes them, which takes minutes."""
    if sys.version_info < (3, 11):
        pytest.skip("Zensical needs Python 3.11")
    command = [sys.executable, ROOT / "data" / "make_docs.py", "--runs", tmp_path, "--site", tmp_path / "site"]
    subprocess.run([*command, "--no-execute"], check=True)
    page = (tmp_path / "site" / "api" / "thresholds.html").read_text(encoding="utf-8")
    assert 'id="cascade_lab.thresholds.tuning.tune"' in page
