"""The plan of the house holds: layers, no circle, private members stay inside, small files.

    python tests/acceptance/structure.py

Runs the import linter, then reads the sources of both packages and counts, in each case against a
bar of 0: circles of imports, private members used from outside their module, docstrings that begin
with a question word, folders of more than 15 modules, files of more than 400 lines. Counts too how
many rows the invented family of tests/test_invented_family.py adds outside its network, at most 3,
and in how many places a setting of the generating methods is named, at most 2. Needs the extra
`lint`.
"""

import ast
import subprocess
import sys
from collections import Counter

from import_graph import ROOT, ImportGraph, trees

MOST_MODULES, MOST_LINES = 15, 400
MOST_ROWS_OF_A_FAMILY, MOST_PLACES_OF_A_SETTING = 3, 2
NETWORKS = ("KINDS", "MODELS")  # tables whose rows are a new network's own
QUESTION_WORDS = ("What", "Where", "How", "Which", "Whether")

EVERYWHERE = ("kdiffusion", "weights_conversion", "tests", "benchmarks")
# Members of other libraries that have no public name.
OTHERS = {
    "_SubParsersAction",  # argparse: a type
    "_exit",  # os: documented
    "_flatten_layers",  # Keras: all layers inside a layer
    "_remat_mode",  # Keras: whether a layer is computed again for its gradients
    "_replace",  # named tuples: documented
}


def main():
    sources = trees()
    circle = ImportGraph().circle(sources)
    faults = {
        "import layers": [] if layers_hold() else ["see lint-imports above"],
        "circles of imports": [" -> ".join(map(str, circle))] if circle else [],
        "private members used from outside": [*private_uses(sources)],
        "docstrings that begin with a question word": [*questions(trees(EVERYWHERE))],
        f"folders of more than {MOST_MODULES} modules": [*crowded(sources)],
        f"files of more than {MOST_LINES} lines": [*long(sources)],
        f"rows of a family beyond {MOST_ROWS_OF_A_FAMILY}": [*rows_of_a_family()],
        f"places of a setting beyond {MOST_PLACES_OF_A_SETTING}": [*places_of_a_setting(sources)],
    }
    for title, found in faults.items():
        print(f"{title}: {len(found)}")
        print(*(f"  {fault}\n" for fault in found), sep="", end="")
    failed = sum(map(bool, faults.values()))
    print(f"{len(faults) - failed} passed, {failed} failed")
    sys.exit(bool(failed))


def layers_hold():
    return subprocess.run(["lint-imports", "--no-cache"], cwd=ROOT).returncode == 0


def private_uses(sources):
    """Yield the private names that a module takes from another, and members of its objects.

    A member belongs to the module if a class of it has it. `self`, `cls` and `super()` may use what
    their base classes have.
    """
    for path, tree in sources.items():
        own = members(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom):
                names = [alias.name for alias in node.names if is_private(alias.name)]
            elif isinstance(node, ast.Attribute) and is_private(node.attr):
                names = [] if is_own(node.value) or node.attr in own | OTHERS else [node.attr]
            else:
                continue
            yield from (f"{path}:{node.lineno} {name}" for name in names)


def is_private(name):
    return name.startswith("_") and not name.endswith("__")


def is_own(value):
    """Tell whether an expression is `self`, `cls`, `super()` or `type(self)`."""
    return ast.unparse(value) in ("self", "cls", "super()", "type(self)")


def members(tree):
    """Return the private members of a module's classes: methods, fields, assigned attributes."""
    found = set()
    for scope in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
        for node in ast.walk(scope):
            if isinstance(node, ast.FunctionDef):
                found.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                found.add(node.id)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                found.add(node.attr)
    return found


def questions(sources):
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    for path, tree in sources.items():
        for node in ast.walk(tree):
            text = isinstance(node, kinds) and ast.get_docstring(node)
            if text and text.split()[0].rstrip(",:;?") in QUESTION_WORDS:
                yield f"{path}:{getattr(node, 'lineno', 1)} {text.splitlines()[0]}"


def rows_of_a_family():
    """Yield the tables that the invented family is a row of, beyond as many as it may be."""
    tree = ast.parse((ROOT / "tests" / "test_invented_family.py").read_text("utf-8"))
    tables = [
        ast.unparse(node.args[0])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".setitem")
    ]
    rows = [table for table in tables if table not in NETWORKS]
    print(f"an invented family: {len(rows)} rows, {', '.join(rows)}")
    return rows[MOST_ROWS_OF_A_FAMILY:]


def places_of_a_setting(sources):
    """Yield the places where pipelines name a setting, beyond as many as there may be.

    A place is a field of a class, or a parameter of a method that shares the settings.
    """
    places = {}
    for path, tree in sources.items():
        if path.parent.name != "pipelines":
            continue
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef) and node.name in ("DrawSettings", "Settings"):
                named = [x.target.id for x in node.body if isinstance(x, ast.AnnAssign)]
            elif isinstance(node, ast.FunctionDef) and any(
                ast.unparse(decorator) == "shares_settings" for decorator in node.decorator_list
            ):
                named = [argument.arg for argument in (*node.args.args, *node.args.kwonlyargs)]
            else:
                continue
            for name in named:
                places.setdefault(name, []).append(f"{path}:{node.lineno} {name}")
    fields = [name for name, found in places.items() if any("settings.py" in x for x in found)]
    own = ("num_steps", "seed")  # KerasCV's, which stay explicit in every method
    counts = {name: places[name] for name in fields if name not in own}
    print(f"settings: {len(counts)}, each in {max(map(len, counts.values()))} places")
    for found in counts.values():
        yield from found[MOST_PLACES_OF_A_SETTING:]


def crowded(sources):
    counts = Counter(path.parent for path in sources if path.name != "__init__.py")
    return (f"{folder}: {count}" for folder, count in counts.items() if count > MOST_MODULES)


def long(sources):
    counts = {path: len((ROOT / path).read_bytes().splitlines()) for path in sources}
    return (f"{path}: {count}" for path, count in counts.items() if count > MOST_LINES)


if __name__ == "__main__":
    main()
