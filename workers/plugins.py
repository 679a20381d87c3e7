"""Plug-in folders: one file is one plug-in, found by scanning its package. There is no central list."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from functools import cache
from types import ModuleType
from typing import Protocol, TypeVar, runtime_checkable

from workers.errors import UnknownPluginError


@runtime_checkable
class Plugin(Protocol):
    """What every plug-in has: a name for recipes and a label for people."""

    name: str
    label: str


P = TypeVar("P", bound=Plugin)


@cache
def _modules(package_name: str) -> tuple[ModuleType, ...]:
    package = importlib.import_module(package_name)
    return tuple(
        importlib.import_module(f"{package_name}.{found.name}")
        for found in sorted(pkgutil.iter_modules(package.__path__), key=lambda found: found.name)
        if not found.name.startswith("_")
    )


def discover(package_name: str, kind: type[P]) -> dict[str, P]:
    """Every plug-in of a package by its name, in the order of their file names.

    A plug-in module assigns its instance to `PLUGIN`. Files that begin with an underscore are helpers.
    """
    found: dict[str, P] = {}
    for module in _modules(package_name):
        plugin = getattr(module, "PLUGIN", None)
        assert isinstance(plugin, kind), f"{module.__name__} must assign a {kind.__name__} to PLUGIN"
        assert plugin.name not in found, f"two plug-ins in {package_name} are called {plugin.name}"
        found[plugin.name] = plugin
    return found


def look_up(plugins: dict[str, P], name: str, *, what: str, field: str) -> P:
    """The plug-in called `name`.

    Raises:
        UnknownPluginError: nothing of that name was found by scanning; a name is never imported.
    """
    if name in plugins:
        return plugins[name]
    near = difflib.get_close_matches(name, plugins, n=1)
    hint = f'Did you mean "{near[0]}"? ' if near else ""
    raise UnknownPluginError(
        f'There is no {what} called "{name}".',
        next_step=f"{hint}Choose among: {', '.join(plugins)}.",
        field=field,
    )
