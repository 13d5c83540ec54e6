"""Import the project's modules where a package that they do not need for these checks is not installed."""

from __future__ import annotations

import contextlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

# Packages of requirements.txt by the name that is imported. torch and numpy have to be there.
REPLACEABLE = ("datasets", "pyarrow", "xxhash", "sklearn", "scipy", "safetensors", "tqdm", "yaml", "filelock")


class StandIn(Exception):
    """A class of a package that is not installed. Making one raises ModuleNotFoundError, once modules are
    imported. It is an exception, so that `except package.Error` is possible.
    """

    is_importing = False

    def __new__(cls, *arguments: Any, **named: Any) -> StandIn:
        """An empty object while modules are imported."""
        if not StandIn.is_importing:
            package = cls.__module__.split(".")[0]
            raise ModuleNotFoundError(f"{package} is not installed", name=package)
        return super().__new__(cls)


class StandInModule(ModuleType):
    """A module of a package that is not installed: every public name in it is a `StandIn`."""

    def __init__(self, name: str):
        super().__init__(name)
        self.__path__ = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(name)
        return type(name, (StandIn,), {"__module__": self.__name__})


class StandInFinder:
    """Gives `StandInModule`s for packages that no other finder knows."""

    def __init__(self, packages: tuple[str, ...]):
        self.packages = packages

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        """The way to import a module of the packages; None for all others."""
        if name.split(".")[0] not in self.packages:
            return None
        return importlib.machinery.ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """The module, empty."""
        return StandInModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing: names are made when they are asked for."""


def missing_packages() -> tuple[str, ...]:
    """Those of REPLACEABLE that are not installed."""
    return tuple(name for name in REPLACEABLE if importlib.util.find_spec(name) is None)


@contextlib.contextmanager
def stand_ins(packages: tuple[str, ...]) -> Iterator[None]:
    """Within this context modules that import these packages can be imported.

    Whatever they do with such a package later raises ModuleNotFoundError.
    """
    finder: Any = StandInFinder(packages)
    sys.meta_path.append(finder)
    StandIn.is_importing = True
    try:
        yield
    finally:
        StandIn.is_importing = False
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, StandInModule)]:
            del sys.modules[name]
