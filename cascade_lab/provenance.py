"""Records where a result comes from: digests of files, versions of packages, the git commit, the processor."""

from __future__ import annotations

import hashlib
import platform
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

PACKAGES = (
    "cascade-lab",
    "tensorflow",
    "bert-tensorflow",
    "tokenizers",
    "numpy",
    "pandas",
    "pyarrow",
    "scikit-learn",
)


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def environment() -> dict[str, Any]:
    """Return what a result depends on besides its inputs: git commit, Python, packages, platform, processor."""
    return {
        "git": git_state(Path.cwd()),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "processor": processor(),
        "packages": {name: package_version(name) for name in PACKAGES},
    }


def git_state(folder: Path) -> dict[str, Any]:
    """Return the git commit of `folder`, and whether files differ from it; both None if it is not in a repository."""

    def git(*args: str) -> str | None:
        try:
            result = subprocess.run(["git", *args], cwd=folder, capture_output=True, text=True, timeout=10)
        except (OSError, subprocess.TimeoutExpired):
            return None
        return result.stdout.strip() if result.returncode == 0 else None

    commit = git("rev-parse", "HEAD")
    return {"commit": commit, "dirty": None if commit is None else bool(git("status", "--porcelain"))}


def processor() -> str:
    """Return the processor's model name."""
    if sys.platform == "linux":
        model = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        if model:
            return model[1]
    return platform.processor() or platform.machine()


def package_version(name: str) -> str | None:
    """Return the version of an installed package; None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None
