"""Names to specs: one file per name, imported only when it is asked for.

A built-in's name is its file's name (`softmax-window` lies in `softmax_window.py`). A user's own thing comes in as
`path/to/file.py:Class`, as a dotted path `package.module:Class` (or `package.module.Class`), or through an entry-point
group of an installed package, and then appears everywhere with no edit to hhbench.
"""

import hashlib
import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Generic, TypeVar

from hhbench.errors import HHBenchError, UsageError, in_one_line, unknown_name

SpecT = TypeVar("SpecT")


def is_code_reference(name: str) -> bool:
    """Whether resolving this name imports code that is neither hhbench's nor an installed plug-in's."""
    return name.endswith(".py") or ":" in name or "." in name or "/" in name


def source_hash(cls: type) -> str | None:
    """sha256 of the file that holds a user's own class; None for hhbench's own, which go by their version."""
    if cls.__module__.startswith("hhbench."):
        return None
    return hashlib.sha256(Path(inspect.getfile(cls)).read_bytes()).hexdigest()


class Registry(Generic[SpecT]):
    """The known specs of one kind.

    Args:
        kind: what the specs describe, for messages: "attention", "task".
        package: the package whose modules are the built-ins.
        entry_points: the entry-point group through which other packages add theirs.
        adopt: makes a spec of a class that a user named but did not register; gets the class and its display name.
    """

    def __init__(self, kind: str, *, package: str, entry_points: str, adopt: Callable[[type, str], SpecT]) -> None:
        self.kind, self.package, self.entry_points, self._adopt = kind, package, entry_points, adopt
        self._specs: dict[str, SpecT] = {}
        self._external: dict[str, SpecT] = {}

    def add(self, name: str, spec: SpecT, *, external: bool = False) -> None:
        """Register a spec. A name that is taken is refused; a built-in's is, imported or not."""
        if name in self._specs or (external and name in self._builtins()):
            raise UsageError(f"{self.kind} {name!r} is already registered")
        self._specs[name] = spec

    def names(self) -> list[str]:
        """The built-ins and the installed plug-ins, sorted. Imports none of them."""
        return sorted({*self._builtins(), *self._plugins()})

    def get(self, name: str, *, allow_code: bool = True) -> SpecT:
        """The spec of a name, a file or a dotted path.

        Args:
            name: a registered name, `file.py:Class`, or `package.module:Class`.
            allow_code: False refuses files and dotted paths: a name that was read from a configuration, a result
                or a downloaded folder must not decide what is imported.

        Raises:
            UsageError: nobody has the name (the nearest one is offered), or it may not be imported.
            HHBenchError: the user's file raised while it was imported.
        """
        if name in self._specs:
            return self._specs[name]
        if module := self._builtins().get(name):
            importlib.import_module(module)
            return self._specs[name]
        if plugin := self._plugins().get(name):
            return self._of_class(_loaded(plugin.load, f"plug-in {plugin.value}"), name)
        if not is_code_reference(name):
            raise unknown_name(self.kind, name, self.names())
        if not allow_code:
            raise UsageError(
                f"{self.kind} {name!r} would import code that a file names. Pass --allow-code if you trust that file."
            )
        location, _, class_name = name.rpartition(":")
        # The same words mean another file in another folder.
        place = f"{Path(location).resolve()}:{class_name}" if location.endswith(".py") else name
        if place not in self._external:
            self._external[place] = self._imported(name)
        return self._external[place]

    def _builtins(self) -> dict[str, str]:
        package = importlib.import_module(self.package)
        names = (m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))
        return {name.replace("_", "-"): f"{self.package}.{name}" for name in names}

    def _plugins(self) -> dict[str, importlib.metadata.EntryPoint]:
        return {point.name: point for point in importlib.metadata.entry_points(group=self.entry_points)}

    def _imported(self, name: str) -> SpecT:
        location, _, class_name = name.rpartition(":")
        if not location:
            location, _, class_name = name.rpartition(".")
        if class_name in ("", "py"):
            raise UsageError(f"say which class of {name!r} you mean: {name}:ClassName")
        if location.endswith(".py"):
            module = _loaded(lambda: _module_of_file(Path(location)), location)
            shown = f"{Path(location).name}:{class_name}"
        else:
            module = _loaded(lambda: importlib.import_module(location), location)
            shown = name
        cls = getattr(module, class_name, None)
        if not inspect.isclass(cls):
            classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
            raise unknown_name(f"class in {location}", class_name, classes)
        return self._of_class(cls, shown)

    def _of_class(self, cls: type, name: str) -> SpecT:
        """The spec that the class registered itself under, or a plain one."""
        for spec in self._specs.values():
            if getattr(spec, "part", spec) is cls:
                return spec
        return self._adopt(cls, name)


def _module_of_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise UsageError(f"no file {path}")
    # The name carries the path's hash: two files of one name don't meet, and nobody's import finds it by accident.
    name = f"hhbench_external_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:12]}_{path.stem}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


LoadedT = TypeVar("LoadedT")


def _loaded(load: Callable[[], LoadedT], what: str) -> LoadedT:
    try:
        return load()
    except HHBenchError:
        raise
    except Exception as error:  # a user's file may raise anything: it is named, and the trace shows with --debug
        raise HHBenchError(f"importing {what} failed: {in_one_line(error)}") from error
