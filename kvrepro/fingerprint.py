"""Fingerprints of the code behind a number, so that a stored number is never shown after its code changed.

A fingerprint covers the module that defines the measuring function, every ``kvrepro`` module it imports (directly or
not), the core modules that every forward pass goes through, and the module of the one method measured, with those that
its options build on (:func:`with_bases`). It leaves out the other methods (the registry ``kvrepro.methods`` is not
followed) and the harness that stores and shows numbers.
Comments, docstrings and blank lines do not count.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import inspect
import io
import sys
import tokenize
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import FunctionType
from typing import Any

PACKAGE = "kvrepro"
PACKAGE_DIR = Path(__file__).resolve().parent

#: Modules every measured value goes through, whoever measures it.
CORE = ("slots", "rope", "attention", "cache", "adapter", "evaluate", "methods.base")
#: Modules that fetch, store or show values and cannot change them (data and models are in a record's key by sha256).
HARNESS = frozenset(
    {"records", "fingerprint", "provenance", "executors", "assets", "plots", "book", "cli", "recommend", "__main__"}
)


def normalise(source: str) -> str:
    """Python source without comments, docstrings, blank lines and trailing spaces.

    Works on line and column numbers rather than on ``ast.unparse``, whose output differs between Python versions.

    Args:
        source: the text of a module.

    Returns:
        The remaining lines, joined by newlines.

    Raises:
        SyntaxError: the source does not parse.
    """
    lines = source.splitlines()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    for first, last in _docstring_lines(ast.parse(source), lines):
        lines[first - 1 : last] = [""] * (last - first + 1)
    return "\n".join(line.rstrip() for line in lines if line.strip())


def _docstring_lines(tree: ast.Module, lines: list[str]) -> Iterator[tuple[int, int]]:
    """First and last line (1-based) of each docstring that has its lines to itself."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or not node.body:
            continue
        first = node.body[0]
        if not (isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant)):
            continue
        if not isinstance(first.value.value, str) or first.end_lineno is None:
            continue
        before = lines[first.lineno - 1].encode()[: first.col_offset]
        after = lines[first.end_lineno - 1].encode()[first.end_col_offset :]
        if not before.strip() and not after.strip():
            yield first.lineno, first.end_lineno


def imported_modules(tree: ast.Module, module: str, is_package: bool) -> set[str]:
    """Absolute dotted names a module imports, functions' inner imports included.

    ``from a import b`` gives ``a.b``, which may be a module or a name in ``a``; so does ``import a`` where ``a`` is
    used as ``a.b`` alone.

    Args:
        tree: the parsed source.
        module: dotted name of the module the source belongs to, against which relative imports are resolved.
        is_package: whether the source is an ``__init__.py``.
    """
    nodes = list(ast.walk(tree))  # once: a large module has ten thousand
    named = Counter(node.id for node in nodes if isinstance(node, ast.Name))
    parts: dict[str, list[str]] = defaultdict(list)  # x: [a, b] for x.a and x.b
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            parts[node.value.id].append(node.attr)
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found.update(name for alias in node.names for name in _used_of(alias, named, parts))
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            found.update(f"{base}.{alias.name}" for alias in node.names)
    return found


def _used_of(alias: ast.alias, named: Mapping[str, int], parts: Mapping[str, Sequence[str]]) -> set[str]:
    """What a module uses of one that it imports: ``{a.b, …}``, or ``{a}`` where not every use is of this form.

    Args:
        alias: the import.
        named: how often the source names each variable.
        parts: the attributes that it reads of each variable, one for each time.
    """
    if alias.asname is None and "." in alias.name:
        return {alias.name}
    bound = alias.asname or alias.name
    names = parts.get(bound, ())
    return {f"{alias.name}.{name}" for name in names} if names and len(names) == named[bound] else {alias.name}


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module or ""
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + (1 if is_package else 0)]
    return ".".join([*parents, node.module] if node.module else parents)


@dataclass
class CodeIndex:
    """The sources of one package, read once a process: what runs is what was there at the first look.

    Attributes:
        folder: the package's folder.
        package: its import name.
        core: modules (relative to the package) that belong to every fingerprint when they exist.
        harness: modules and subpackages that never do.
    """

    folder: Path = PACKAGE_DIR
    package: str = PACKAGE
    core: tuple[str, ...] = CORE
    harness: frozenset[str] = HARNESS
    _modules: dict[str, tuple[str, set[str]] | None] = field(default_factory=dict, repr=False)

    def path(self, module: str) -> Path | None:
        """File of a module of the package, or None where the name is no module of it."""
        parts = module.split(".")
        if parts[0] != self.package:
            return None
        base = self.folder.joinpath(*parts[1:])
        for candidate in (base.with_suffix(".py") if len(parts) > 1 else None, base / "__init__.py"):
            if candidate is not None and candidate.is_file():
                return candidate
        return None

    def _read(self, module: str) -> tuple[str, set[str]] | None:
        """(sha256 of the normalised source, names it imports), or None where the name is no module."""
        if module not in self._modules:
            path = self.path(module)
            self._modules[module] = None if path is None else self._parse(path, module)
        return self._modules[module]

    def _parse(self, path: Path, module: str) -> tuple[str, set[str]]:
        source = path.read_text(encoding="utf-8")
        imports = imported_modules(ast.parse(source), module, path.name == "__init__.py")
        return hashlib.sha256(normalise(source).encode()).hexdigest(), {self._resolve(name) for name in imports}

    def _resolve(self, name: str) -> str:
        """The module that an imported name is, or is defined in; for one of the package's public names, its origin."""
        parent, _, own = name.rpartition(".")
        if self.path(name) is not None or self.path(parent) is None:
            return name
        return self._public.get(own, parent) if parent == self.package else parent

    @functools.cached_property
    def _public(self) -> dict[str, str]:
        """The module of each name that the package's own ``__init__`` takes from one: ``{name: module}``."""
        path = self.path(self.package)
        tree = ast.parse("" if path is None else path.read_text(encoding="utf-8"))
        return {
            alias.asname or alias.name: _absolute(node, self.package, is_package=True)
            for node in tree.body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }

    def closure(self, modules: Iterable[str]) -> dict[str, str]:
        """Sources reached from some modules by imports: ``{module: sha256}``.

        The registry ``<package>.methods`` is neither hashed nor followed, the package's own ``__init__`` is followed
        for the names that are used of it but not hashed (it only re-exports), and the harness is left out.

        Args:
            modules: dotted names to start from; names outside the package are ignored.
        """
        registry = f"{self.package}.methods"
        seen: dict[str, str] = {}
        queue = [self._resolve(module) for module in modules]
        visited: set[str] = set()
        while queue:
            module = queue.pop()
            if module in visited or module == registry or self._is_harness(module):
                continue
            visited.add(module)
            entry = self._read(module)
            if entry is None:
                continue
            if module != self.package:
                seen[module] = entry[0]
            queue.extend(entry[1])
        return seen

    def _is_harness(self, module: str) -> bool:
        package, _, rest = module.partition(".")
        return package == self.package and rest.partition(".")[0] in self.harness

    def fingerprint(self, modules: Iterable[str], methods: str, own: str = "") -> str:
        """The sha256 of everything a value depends on in the package's code.

        Args:
            modules: dotted names of the modules that measure.
            methods: name of the method measured, or several joined by ``+``.
            own: text of measuring code outside the package, normalised.

        Raises:
            ValueError: a method that is neither a module of ``<package>.methods`` nor registered there.
        """
        measured = [self._method_module(name) for name in methods.split("+")]
        start = [*modules, *measured, *(f"{self.package}.{name}" for name in self.core)]
        parts = [f"{name} {sha}" for name, sha in sorted(self.closure(start).items())]
        foreign = [_normalised(inspect.getsource(sys.modules[name])) for name in measured if self.path(name) is None]
        return hashlib.sha256("\n".join([own, *foreign, *parts]).encode()).hexdigest()

    def _method_module(self, name: str) -> str:
        module = f"{self.package}.methods.{name}"
        if self.path(module) is not None:
            return module
        # Not in a module of its own name: only the registry knows where, or lists the valid names.
        registry: Any = importlib.import_module(f"{self.package}.methods")
        return str(registry.get(name).__module__)


_INDEX = CodeIndex()


def with_bases(methods: str, options: Mapping[str, Any]) -> str:
    """The methods whose code a value depends on: those measured, and those that their options build on.

    Args:
        methods: name of the method measured, or several joined by ``+``.
        options: its options; of several methods, a mapping of each one's options.

    Returns:
        The names, joined by ``+``. A name that is not registered stays, and builds on nothing.
    """
    registry: Any = importlib.import_module(f"{PACKAGE}.methods")
    names = methods.split("+")
    each = [options] if len(names) == 1 else [x for x in options.values() if isinstance(x, Mapping)]
    known = set(registry.names())
    choosing = {option for name in names if name in known for option in registry.get(name).builds_on}
    named = {str(mine[option]) for mine in each for option in choosing & mine.keys()}
    return "+".join([*names, *sorted((named & known) - set(names))])


def measuring_module(function: Callable[..., Any]) -> str:
    """Dotted name of the module that defines a function, through ``partial``, ``wraps``, methods and lambdas."""
    return _innermost(function).__module__


def _innermost(function: Callable[..., Any]) -> FunctionType | type:
    while isinstance(function, functools.partial):
        function = function.func
    function = inspect.unwrap(function)
    if inspect.ismethod(function):
        function = function.__func__
    return function if inspect.isfunction(function) or inspect.isclass(function) else type(function)


def fingerprint(function: Callable[..., Any], method: str, index: CodeIndex | None = None) -> str:
    """Fingerprint of the code that measures one value.

    Args:
        function: the measuring function. A ``functools.partial`` or a closure counts as the module that defines it; a
            function outside the package (a notebook, a script) counts with its own source.
        method: name of the method measured, or several joined by ``+``.
        index: the sources to look in; kvrepro's own by default.

    Returns:
        A sha256 in hexadecimal.

    Raises:
        ValueError: an unknown method, or a function whose source is nowhere to be read.
    """
    index = index or _INDEX
    modules, own = origin(function, index)
    return index.fingerprint(modules, method, own)


def origin(function: Callable[..., Any], index: CodeIndex | None = None) -> tuple[list[str], str]:
    """Where the code of a measuring function begins: what :meth:`CodeIndex.fingerprint` is to be given.

    Args:
        function: the measuring function.
        index: the sources to look in; kvrepro's own by default.

    Returns:
        The modules of the package that measure, and the function's own source where it is not part of the package.

    Raises:
        ValueError: a function whose source is nowhere to be read.
    """
    index = index or _INDEX
    module = measuring_module(function)
    if index.path(module) is not None:
        return [module], ""
    source = _normalised(_outside_source(_innermost(function), module))
    # What a notebook imported elsewhere is unknown: take all that the package itself imports.
    return [index.package, *sorted(_imports_of_script(source, module))], source


@functools.cache
def code_at_start() -> CodeIndex:
    """The package as it is now, read whole: for a process that runs for long and has to know what code it runs."""
    index = CodeIndex()
    for path in sorted(index.folder.rglob("*.py")):
        parts = path.relative_to(index.folder).with_suffix("").parts
        index.closure([".".join([index.package, *parts[: -1 if parts[-1] == "__init__" else None]])])
    return index


@functools.lru_cache(maxsize=64)
def _normalised(source: str) -> str:
    """Normalised source; a fragment that does not parse alone (a lambda inside a call) is taken as it is."""
    try:
        return normalise(source)
    except (SyntaxError, tokenize.TokenError):
        return source


@functools.lru_cache(maxsize=64)
def _imports_of_script(source: str, module: str) -> frozenset[str]:
    try:
        return frozenset(imported_modules(ast.parse(source), module, is_package=False))
    except SyntaxError:
        return frozenset()


def _outside_source(function: FunctionType | type, module: str) -> str:
    """Source of a measuring function outside the package: its whole module, or itself in a notebook."""
    try:
        if module == "__main__" or module not in sys.modules:
            return inspect.cleandoc(inspect.getsource(function))
        return inspect.getsource(sys.modules[module])
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {function.__qualname__} (module {module}) cannot be read, so a record of it could not "
            "tell when its code changes; define it in a file"
        ) from error


def is_current(module: str, method: str, code: str, index: CodeIndex | None = None) -> bool:
    """Whether a stored fingerprint is the one that the present sources give.

    Args:
        module: the measuring module that the record names; one outside the package is never current.
        method: the record's method.
        code: the record's fingerprint.
        index: the sources to look in; kvrepro's own by default.
    """
    index = index or _INDEX
    if index.path(module) is None:
        return False
    try:
        return index.fingerprint([module], method) == code
    except ValueError:
        return False
