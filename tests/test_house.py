"""The house rules of docs/contributing.md, as far as the source shows whether they are kept."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import bokeh_ssh

pytestmark = pytest.mark.once

PACKAGE = Path(bokeh_ssh.__file__).parent


@pytest.fixture(scope="module")
def trees() -> dict[str, ast.Module]:
    """All that is written, by its path; not read where these tests are only listed."""
    return {
        str(path.relative_to(PACKAGE)): ast.parse(path.read_text(encoding="utf-8"))
        for path in PACKAGE.glob("**/*.py")
    }


@pytest.fixture(scope="module")
def classes(trees: dict[str, ast.Module]) -> dict[str, ast.ClassDef]:
    """All classes, by name."""
    nodes = (node for tree in trees.values() for node in ast.walk(tree))
    return {node.name: node for node in nodes if isinstance(node, ast.ClassDef)}


def test_map_shows_every_room() -> None:
    """The map of the code for contributors has every module, and none that is no more."""
    docs = Path(__file__).parents[1] / "docs"
    pages = [docs / "architecture.md", *docs.glob("architecture/*.md")]
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    named = set(re.findall(r"`(_[a-z]+(?:\.\w+)+)`", text))
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.glob("_*/**/*.py") if path.stem != "__init__")
    modules = {".".join(path.with_suffix("").parts) for path in paths}
    assert modules - named == set()
    assert named - modules == set()


FOLDERS = sorted(path.parent for path in PACKAGE.glob("_*/**/__init__.py"))


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda path: path.name)
def test_folder_says_what_it_is(folder: Path) -> None:
    """A folder has at most 20 modules; its docstring says what lives there, and where to begin reading."""
    assert len(list(folder.glob("*.py"))) <= 21
    doc = (
        ast.get_docstring(ast.parse((folder / "__init__.py").read_text(encoding="utf-8"))) or ""
    ).splitlines()
    assert len(doc) == 3
    begin = re.findall(r":mod:`(\w+)`", doc[2])
    assert begin
    assert all((folder / f"{name}.py").exists() for name in begin)


def bases(cls: ast.ClassDef, classes: dict[str, ast.ClassDef]) -> set[str]:
    """Return the names of all classes of ours above it."""
    direct = {ast.unparse(base).partition("[")[0] for base in cls.bases} & (classes.keys() - {cls.name})
    return direct.union(*(bases(classes[name], classes) for name in direct))


def attributes(cls: ast.ClassDef) -> set[str]:
    """Return the attributes that its own methods set."""
    return {
        node.attr
        for node in ast.walk(cls)
        if isinstance(node, ast.Attribute)
        and isinstance(node.ctx, ast.Store)
        and ast.unparse(node.value) == "self"
    }


def test_classes_are_small(classes: dict[str, ast.ClassDef]) -> None:
    """A class that is no record has at most 20 attributes and two bases of ours, and no hole to be filled.

    Errors are records, and subclasses of a dependency's class have what that has.
    """
    for name, cls in classes.items():
        above = bases(cls, classes)
        assert len(above) <= 2, name
        if name.endswith("Error") or name in ("Transport", "Packetizer"):
            continue
        every = attributes(cls).union(*(attributes(classes[base]) for base in above))
        assert len(every) <= 20, (name, sorted(every))
        raised = [ast.unparse(node) for node in ast.walk(cls) if isinstance(node, ast.Raise)]
        assert not any("NotImplementedError" in text for text in raised), name


def test_no_module_imports_what_another_keeps_to_itself(trees: dict[str, ast.Module]) -> None:
    """What begins with an underscore is used in its own module alone."""
    folders = {path.name for path in PACKAGE.glob("**/_*") if path.is_dir()} | {"_version"}
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("bokeh_ssh"):
                names = {each.name for each in node.names if re.match(r"_[^_]", each.name)}
                assert names <= folders, path


def test_docstrings_say_it_plainly(trees: dict[str, ast.Module]) -> None:
    """A function's docstring begins with what it does, and not with Give, Have or Tell."""
    for path, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                first = (ast.get_docstring(node) or "").partition(" ")[0].strip(",:;")
                assert first not in ("Give", "Have", "Tell"), f"{path}: {node.name}"
