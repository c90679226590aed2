"""How the documentation is built: ``sphinx-build -W --keep-going docs docs/_build``, which needs no network.

With ``DOCS_INTERSPHINX=1`` names of Python and torch become links to their documentation, which must be reachable then.
"""

from __future__ import annotations

import os
import re
from typing import Any

from docutils import nodes
from docutils.statemachine import StringList
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from typer.main import get_command

import ip_plugin
from ip_plugin.cli import app as command_line
from ip_plugin.launcher.command import parser as run_options

project, author, copyright = "ip_plugin", "the authors of ip_plugin", "the authors of ip_plugin"  # noqa: A001
version = release = ip_plugin.__version__
extensions = [
    "myst_parser", "sphinx.ext.autodoc", "sphinx.ext.autosummary", "sphinx.ext.intersphinx", "sphinx.ext.napoleon",
    "sphinx_copybutton",
]  # fmt: skip
exclude_patterns = ["_build"]

myst_heading_anchors = 3
suppress_warnings = ["myst.strikethrough"]
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True

# A name in single backticks is a link if it is documented here.
default_role = "py:obj"
autosummary_generate = False  # tables alone, of what the pages beside them document
autodoc_default_options = {"members": True}
autodoc_member_order = "bysource"
autodoc_preserve_defaults = True
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_maximum_signature_line_length = 88
python_use_unqualified_type_names = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
napoleon_use_rtype = False

if os.environ.get("DOCS_INTERSPHINX"):
    intersphinx_mapping = {
        "python": ("https://docs.python.org/3", None),
        "torch": ("https://docs.pytorch.org/docs/stable", None),
    }

html_theme = "furo"
html_title = f"ip_plugin {release}"
html_static_path = ["_static"]
html_css_files = ["project.css"]
html_copy_source = False
html_show_sphinx = False


class CommandOptions(SphinxDirective):
    """``command-options``: the options of a command of ``ip-plugin``, read from the command."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Parse the definitions where the directive stands."""
        if self.arguments[0] == "run":
            text = run_options().format_help()
            return [nodes.literal_block(text, text, language="none")]
        lines = StringList()
        group: Any = get_command(command_line)
        for option in group.commands[self.arguments[0]].params:
            name = ", ".join(option.opts) if option.param_type_name == "option" else option.name.upper()
            text = (getattr(option, "help", None) or "").replace("`", "``")
            value = shown if isinstance(shown := getattr(option, "show_default", None), str) else option.default
            default = "" if value in (None, False, "", ..., []) else f" Default: ``{value}``."
            lines.extend(StringList([f"``{name}``", f"    {text}{default}"], "options"))
        container = nodes.container()
        self.state.nested_parse(lines, self.content_offset, container)
        return [container]


def is_foreign(documented: Any) -> bool:
    """Whether an object is another library's: its documentation stands there."""
    return not (getattr(documented, "__module__", None) or "ip_plugin").startswith("ip_plugin")


def skip_member(app: Sphinx, what: str, name: str, documented: Any, skip: bool, options: Any) -> bool | None:
    """Leave out what a class inherits of another library."""
    return True if is_foreign(documented) else None


def refer(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Replace the docstring of another library's object by a reference to it."""
    if what != "module" and is_foreign(documented):
        lines[:] = [f"``{documented.__module__}.{documented.__name__}``: see the documentation of that library."]


def part_attributes(app: Sphinx, what: str, name: str, documented: Any, options: Any, lines: list[str]) -> None:
    """Give each of several attributes that a docstring explains together a line: the last one has the explanation."""
    for place in reversed(range(len(lines))):
        if several := re.fullmatch(r":ivar ([\w, ]+), (\w+):(.*)", lines[place]):
            last, text = several[2], several[3]
            others = [f":ivar {other}: see ``{last}``" for other in several[1].split(", ")]
            lines[place : place + 1] = [*others, f":ivar {last}:{text}"]


def setup(app: Sphinx) -> None:
    """Called by Sphinx."""
    app.add_directive("command-options", CommandOptions)
    app.connect("autodoc-skip-member", skip_member)
    app.connect("autodoc-process-docstring", refer, priority=100)
    app.connect("autodoc-process-docstring", part_attributes, priority=900)
