"""How the documentation is built. ``nox -s docs`` builds it, and runs the examples in it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util import inspect, logging
from typer.main import get_command

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "docs")]

import bokeh_ssh  # noqa: E402 - found by that path
from bokeh_ssh._cli.app import app as cli  # noqa: E402

project = "bokeh_ssh"
author = "the bokeh_ssh contributors"
copyright = author
version = release = bokeh_ssh.__version__

extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.autosummary",
    "sphinx.ext.doctest",
    "sphinx_copybutton",
    "screens",
]
exclude_patterns = ["_build", "_static/*.md"]
myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_default_options = {
    "members": True,
    # What a base class of ours or of Python documents is not said again at each class.
    "inherited-members": "BokehSSHError, Exception, BaseException, str",
}
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 80
doctest_global_setup = "from bokeh_ssh import *; from bokeh_ssh.testing import machine"

# A name that leads nowhere is an error (-n); these are Python's own, whose documentation is not at hand.
# Those of ours are private: what they are is said where they occur.
nitpick_ignore_regex = [("py:.*", r"(collections\.abc|os|pathlib|typing|bokeh_ssh\._\w+)\..*")]

# What is copied is what is typed.
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# "--upload" and quoted words stay what is typed.
smartquotes = False

html_theme = "furo"
html_title = "bokeh_ssh"
html_static_path = ["_static"]
html_css_files = ["screens.css"]
html_theme_options = {"footer_icons": []}

for name in bokeh_ssh.__all__:
    getattr(bokeh_ssh, name)  # each is loaded at first use, and only then has its public path


class CommandHelp(Directive):
    """``command-help:: direct``: what ``bokeh-ssh direct --help-all`` says, as lists that fit any screen."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        command: Any = get_command(cli).commands[self.arguments[0]]  # type: ignore[attr-defined]
        arguments = [each for each in command.params if each.param_type_name == "argument"]
        words = [each.metavar if each.required else f"[{each.metavar}]" for each in arguments]
        usage = " ".join(["bokeh-ssh", self.arguments[0], "[OPTIONS]", *words])
        shown: list[nodes.Node] = [nodes.literal_block(usage, usage, language="text")]
        paragraphs = (" ".join(each.split()) for each in command.help.split("\n\n"))
        shown += [nodes.paragraph("", "", *marked(each)) for each in paragraphs]
        if command.epilog and "Examples" in command.epilog:
            lines = command.epilog.partition("[/bold]")[2].strip("\n").splitlines()
            text = "\n".join(line.strip().replace("\\[", "[") for line in lines)
            shown += [nodes.rubric("", "Examples"), nodes.literal_block(text, text, language="sh")]
        groups: dict[str, list[Any]] = {}
        for each in command.params:
            panel = "Arguments" if each in arguments else each.rich_help_panel or "Most used"
            groups.setdefault(panel, []).append(each)
        for title, members in groups.items():
            shown += [nodes.rubric("", title), nodes.definition_list("", *map(entry, members))]
        return shown


def entry(param: Any) -> nodes.Node:
    """Show one option: how it is written, and what it does."""
    names = [param.metavar] if param.param_type_name == "argument" else [*param.opts, *param.secondary_opts]
    term = nodes.term("", "")
    for number, name in enumerate(names):
        term += [nodes.Text(", "), nodes.literal("", name)] if number else [nodes.literal("", name)]
    if param.param_type_name == "option" and param.metavar:
        term += [nodes.Text(" "), nodes.literal("", param.metavar)]
    text = nodes.paragraph("", "", *marked(param.help or ""))
    return nodes.definition_list_item("", term, nodes.definition("", text))


def marked(text: str) -> list[nodes.Node]:
    """Show what is between backquotes as code."""
    parts = text.replace("\\[", "[").split("`")
    return [nodes.literal("", part) if number % 2 else nodes.Text(part) for number, part in enumerate(parts)]


def tidy(app: Sphinx, kind: str, name: str, obj: Any, options: Any, signature: str, returns: str) -> Any:
    """Leave out how errors are made, since who reads this catches them; show how all else is."""
    if kind == "exception":
        return "", None
    if kind == "class":  # some have a __new__ that takes anything and hands it on
        made_of = inspect.signature(obj.__init__, bound_method=True)
        text = inspect.stringify_signature(made_of, show_return_annotation=False, unqualified_typehints=True)
        return text, None
    return signature, "typing.Self" if returns and returns.endswith("._Self") else returns


def check_complete(app: Sphinx, env: BuildEnvironment) -> None:
    """Complain of public names that the reference has not."""
    documented = {name.removeprefix("bokeh_ssh.") for name in env.domains["py"].data["objects"]}
    for missing in sorted(set(bokeh_ssh.__all__) - documented - {"__version__"}):
        logging.getLogger(__name__).warning("%s is not in the API reference", missing)


def setup(app: Sphinx) -> None:
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-signature", tidy)
    app.connect("env-check-consistency", check_complete)
