"""Lets a package import the module of a public name when the name is first used."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any


def lazy_names(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]], list[str]]:
    """Return the `__getattr__`, `__dir__` and `__all__` of a package whose names load when they are first used.

    Parameters
    ----------
    package : str
        The package's `__name__`.
    modules : mapping of str to str
        Public name to the module that defines it, relative to the package, such as ".search".
    """
    names = sorted(modules)

    def get(name: str) -> Any:
        if name not in modules:
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        return getattr(import_module(modules[name], package), name)

    return get, lambda: names, names
