"""Changes to other people's modules that can be undone to the last object."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

_MISSING = object()


class Patches:
    """A list of changes; `undo` takes them back, the last one first."""

    def __init__(self) -> None:
        self._undo: list[Callable[[], object]] = []

    def set(self, owner: Any, name: str, value: object) -> None:
        """Set an attribute of a module or a class."""
        before = vars(owner).get(name, _MISSING)
        setattr(owner, name, value)
        self._undo.append(lambda: delattr(owner, name) if before is _MISSING else setattr(owner, name, before))

    def defer(self, undo: Callable[[], object]) -> None:
        """Call a function when the changes are taken back."""
        self._undo.append(undo)

    def replace(self, objects: Mapping[Any, object], skip: tuple[str, ...] = ()) -> None:
        """Exchange objects wherever a module that is imported has a name for them, but not where they are defined.

        Args:
            objects: {object: what takes its place}; compared by identity.
            skip: names of packages that are left alone, besides this one.
        """
        by_id = {id(old): new for old, new in objects.items()}
        for module_name, module in list(sys.modules.items()):
            if not isinstance(module, ModuleType) or _is_in(module_name, (*skip, "ip_plugin")):
                continue
            for name, value in list(vars(module).items()):
                if id(value) in by_id and getattr(value, "__module__", None) != module_name:
                    self.set(module, name, by_id[id(value)])

    def when_imported(self, module_name: str, change: Callable[[ModuleType], object]) -> None:
        """Change a module now if it is imported already, else as soon as it is."""
        if module_name in sys.modules:
            change(sys.modules[module_name])
            return
        finder = _Finder(module_name, change)
        sys.meta_path.insert(0, finder)
        self._undo.append(lambda: sys.meta_path.remove(finder) if finder in sys.meta_path else None)

    def undo(self) -> None:
        """Take everything back."""
        while self._undo:
            self._undo.pop()()


def _is_in(module_name: str, packages: tuple[str, ...]) -> bool:
    return any(module_name == package or module_name.startswith(package + ".") for package in packages)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds one module as it is found without this, and changes it once it is executed."""

    def __init__(self, module_name: str, change: Callable[[ModuleType], object]) -> None:
        self.module_name, self.change = module_name, change

    def find_spec(self, name: str, path: object, target: object = None) -> Any:  # noqa: ARG002
        """The spec of the module that is waited for, whose loader then changes it; None for every other one."""
        if name != self.module_name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            self.change(module)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec
