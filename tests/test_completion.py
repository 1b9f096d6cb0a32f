"""Shell completion: it is installed into a home folder, and the shell then completes commands and options."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

FILES = {"bash": ".bash_completions/cascade-lab.sh", "zsh": ".zfunc/_cascade-lab"}
# What a shell does at the tab key: it sets the words, calls the installed function, and shows what that found.
ASK = {
    "bash": "source ~/.bashrc; COMP_WORDS=({words}); COMP_CWORD=1; _cascade_lab_completion cascade-lab; "
    'printf "%s\\n" "${{COMPREPLY[@]}}"',
    "zsh": "source ~/.zshrc; autoload -Uz _cascade-lab; _arguments() {{ print -r -- $@ }}; compdef() {{ : }}; "
    "words=({words}); CURRENT=2; _cascade-lab; _cascade_lab_completion",
}


@pytest.mark.parametrize("shell", ["bash", "zsh"])
def test_completion_is_installed_and_offers_commands(shell, tmp_path):
    command = Path(sys.executable).parent / "cascade-lab"
    if shutil.which(shell) is None or not command.is_file():
        pytest.skip(f"needs {shell}, and the command installed")
    environment = {**os.environ, "HOME": str(tmp_path), "PATH": f"{command.parent}{os.pathsep}{os.environ['PATH']}"}
    environment.pop("ZDOTDIR", None)

    def run(code: str) -> str:
        done = subprocess.run([shell, "-c", code], capture_output=True, text=True, env=environment, check=True)
        return done.stdout

    assert f"{shell} completion installed in" in run("cascade-lab --install-completion; exit $?")
    assert (tmp_path / FILES[shell]).is_file()
    offered = run(ASK[shell].format(words="cascade-lab comp"))
    assert "compare" in offered
    assert "calibrate" not in offered
