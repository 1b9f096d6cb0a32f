"""The files of the command line: one per command, none imports another command, each shared option written once."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
from typer.models import ParameterInfo

import cascade_lab.cli
from cascade_lab.cli import COMMANDS
from cascade_lab.cli.options import read_numbers, read_pair, read_parameters
from cascade_lab.exceptions import CascadeLabError

FOLDER = Path(cascade_lab.cli.__file__).parent
SHARED = {"actions", "console", "options", "printing"}


def imported_by(path: Path) -> set[str]:
    nodes = [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.ImportFrom)]
    prefix = "cascade_lab.cli."
    return {node.module.removeprefix(prefix) for node in nodes if (node.module or "").startswith(prefix)}


def test_a_command_is_in_the_file_of_its_name_and_imports_no_other_command():
    names = {command.__name__ for command in COMMANDS}
    assert {path.stem for path in FOLDER.glob("*.py")} == names | SHARED | {"__init__"}
    for command in COMMANDS:
        assert command.__module__ == f"cascade_lab.cli.{command.__name__}"
        assert imported_by(FOLDER / f"{command.__name__}.py") <= SHARED
    for name in SHARED:
        assert not imported_by(FOLDER / f"{name}.py") & names


def test_an_option_of_several_commands_is_written_once():
    written = defaultdict(set)
    for command in COMMANDS:
        for hint in get_type_hints(command, include_extras=True).values():
            for info in get_args(hint):
                if isinstance(info, ParameterInfo):
                    written[info.help].add(id(info))
    assert len(written) > 40
    assert [text for text, places in written.items() if len(places) > 1] == []


def test_every_command_shows_an_example_of_itself():
    for command in COMMANDS:
        assert f"Example: cascade-lab {command.__name__.replace('_', '-')} " in command.__doc__


def test_pairs_are_read_or_refused_in_one_line():
    assert read_pair("gate=a=b.npy", "STAGE=FILE") == ("gate", "a=b.npy")
    assert read_numbers(None) == read_parameters(None) == {}
    assert read_parameters(["run=runs/x", "n=2", "on=true"]) == {"run": "runs/x", "n": 2, "on": True}
    for read, pair in ((read_numbers, "coverage"), (read_numbers, "coverage=high"), (read_parameters, "=2")):
        with pytest.raises(CascadeLabError, match=f"'{pair}' is not NAME="):
            read([pair])
