"""The modules that a file imports, itself and through others, read from the sources alone."""

import ast
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("kdiffusion", "weights_conversion")
# Where tests and acceptance commands find their helpers.
HELPERS = ("tests", "tests/images", "tests/parity", "tests/acceptance", "")


def trees(folders: Iterable[str] = PACKAGES) -> dict[Path, ast.Module]:
    """Return the syntax trees of all Python files below some folders, by path from the root."""
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*.py")))
    return {path.relative_to(ROOT): ast.parse(path.read_bytes(), path) for path in paths}


class ImportGraph:
    """The files of the checkout and what they import, also inside functions.

    A lazy public name, as in `from kdiffusion import Sampler`, is an import of the module that has
    it. Imports for type checkers alone do not count.
    """

    def __init__(self):
        self._imports: dict[Path, set[Path]] = {}
        self._lazy: dict[Path, dict[str, Path]] = {}

    def imports(self, path: Path) -> set[Path]:
        """Return the files of the checkout that a file imports itself.

        Args:
            path: path from the root, as all that are returned; what is no module imports nothing.
        """
        if path.suffix != ".py":
            return set()
        if path not in self._imports:
            tree = ast.parse((ROOT / path).read_bytes(), path)
            found = {self._file_of(*name) for name in _names(tree, path)}
            self._imports[path] = found - {path, None}
        return self._imports[path]

    def reachable(self, path: Path) -> set[Path]:
        """Return all files that run when a file is imported, its packages' among them."""
        found, open_ones = {path}, [path]
        while open_ones:
            some = {open_ones.pop()}
            some |= {file for path in some for file in (*self.imports(path), *_packages(path))}
            open_ones.extend(some - found)
            found |= some
        return found

    def circle(self, paths: Iterable[Path]) -> list[Path]:
        """Return the files of a circle of imports among some files; empty if there is none."""
        clear: set[Path] = set()
        for path in paths:
            if circle := self._circle_from(path, [], clear):
                return circle
        return []

    def _circle_from(self, path, way, clear):
        if path in way:
            return way[way.index(path) :]
        if path not in clear:
            for imported in sorted(self.imports(path)):
                if circle := self._circle_from(imported, [*way, path], clear):
                    return circle
            clear.add(path)
        return []

    def _file_of(self, module, name):
        for folder in HELPERS:
            path = Path(folder, *module.split("."))
            if file := _file(path):
                return name and (_file(path / name) or self._owner(file, name)) or file
        return None

    def _owner(self, package, name):
        if package not in self._lazy:
            tree = ast.parse((ROOT / package).read_bytes())
            self._lazy[package] = {
                alias.asname: _file(Path(*node.module.split(".")))
                for branch in filter(_is_for_type_checkers, tree.body)
                for node in ast.walk(branch)
                if isinstance(node, ast.ImportFrom)
                for alias in node.names
            }
        return self._lazy[package].get(name)


def _file(path):
    """Return the file of a module: a name without an ending."""
    for candidate in (path.with_suffix(".py"), path / "__init__.py"):
        if (ROOT / candidate).is_file():
            return candidate
    return None


def _packages(path):
    """Return the packages that a file is in: they are imported before it."""
    files = (folder / "__init__.py" for folder in path.parents)
    return [file for file in files if (ROOT / file).is_file()]


def _is_for_type_checkers(node):
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def _names(node, path) -> Iterator[tuple[str, str]]:
    """Yield module and name of each import, and of each attribute of a package's root."""
    if _is_for_type_checkers(node):
        return
    if isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        above = ".".join(path.parts[: -node.level]) if node.level else ""
        module = ".".join(filter(None, (above, node.module)))
        yield from ((module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
        if node.value.id in PACKAGES:
            yield node.value.id, node.attr
    for child in ast.iter_child_nodes(node):
        yield from _names(child, path)
