"""The examples in docstrings, private modules included."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import bokeh_ssh

#: Run elsewhere as a program; importing it here would start it.
_PROGRAMS = {"__main__", "_demo.demo_app"}
#: Loads the public names, which then belong to the package itself, where doctest finds them.
_PUBLIC = [getattr(bokeh_ssh, name) for name in bokeh_ssh.__all__]
_FOUND = pkgutil.walk_packages(bokeh_ssh.__path__, "bokeh_ssh.")
_MODULES = ["", *(name for m in _FOUND if (name := m.name.removeprefix("bokeh_ssh.")) not in _PROGRAMS)]


@pytest.mark.parametrize("name", _MODULES)
def test_examples_do_what_they_show(name: str) -> None:
    """Each example in a docstring gives what stands below it."""
    module = importlib.import_module(f"bokeh_ssh.{name}".rstrip("."))
    found = doctest.testmod(module)
    assert found.failed == 0


def test_there_are_examples() -> None:
    """The test above is about something."""
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        example
        for name in _MODULES
        for found in finder.find(importlib.import_module(f"bokeh_ssh.{name}".rstrip(".")))
        for example in found.examples
    ]
    assert len(examples) > 10
