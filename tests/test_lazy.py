"""The lazy public names of both packages, and their twins for type checkers."""

import ast
import importlib
import sys
from pathlib import Path

import pytest

PACKAGES = ("kdiffusion", "kdiffusion.training")


def twins(source):
    """Return the names that type checkers see, and their modules."""
    branches = [node for node in ast.parse(source).body if isinstance(node, ast.If)]
    (branch,) = (node for node in branches if ast.unparse(node.test) == "TYPE_CHECKING")
    return {alias.asname: node.module for node in branch.body for alias in node.names}


@pytest.mark.backend
@pytest.mark.parametrize("name", PACKAGES)
def test_type_checkers_see_the_names_that_are_imported(name):
    package = importlib.import_module(name)
    seen = twins(Path(package.__file__).read_text("utf-8"))
    public = [name for name in package.__all__ if name != "__version__"]
    assert sorted(seen) == sorted(public)
    for public_name, module in seen.items():
        value = getattr(package, public_name)
        assert value is getattr(importlib.import_module(module), public_name)
        assert vars(package)[public_name] is value


@pytest.mark.parametrize("name", PACKAGES)
def test_a_name_that_is_not_there_is_an_attribute_error(name):
    package = importlib.import_module(name)
    with pytest.raises(AttributeError, match=f"module '{name}' has no attribute 'Trainr'"):
        package.Trainr
    assert set(package.__all__) <= set(dir(package))
    assert sys.modules[name] is package
