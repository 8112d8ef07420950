"""Sphinx configuration: ``python -m sphinx -W -b html docs docs/_build``."""

import dataclasses
import shutil
import sys
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from docutils import nodes
from docutils.parsers.rst import Directive

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

import rcnn  # noqa: E402
from rcnn import config as settings  # noqa: E402

project = "rcnn"
author = "rcnn contributors"
copyright = "2026, rcnn contributors"
release = version = rcnn.__version__

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.doctest",
    "sphinx.ext.napoleon",
    "myst_nb",
]
exclude_patterns = ["_build", "jupyter_execute", "figures/*.py"]

# The notebooks are shown with the outputs that were committed; tests/test_notebooks.py executes them.
shutil.copytree(HERE.parent / "notebooks", HERE / "notebooks", dirs_exist_ok=True)
nb_execution_mode = "off"

# A name of this project that leads nowhere is an error; private names have no page, and others are not looked up.
nitpicky = True
nitpick_ignore_regex = [(r"py:.*", r"(?!rcnn\.).*|.*\._\w+")]
html_theme = "furo"
html_title = f"rcnn {release}"

myst_enable_extensions = ["colon_fence", "deflist", "fieldlist"]
myst_heading_anchors = 3

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
python_display_short_literal_types = True
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_rtype = False
napoleon_custom_sections = ["Source"]


def _plain(kind: Any) -> str:
    """A type as a reader would say it: ``list[float]``, ``sgd or adamw``; None, a cue for the recipe, is left out."""
    if get_origin(kind) is Literal:
        return " or ".join(map(str, get_args(kind)))
    parts = [part for part in get_args(kind) if part is not type(None)]
    if get_origin(kind) in (Union, UnionType):
        return " or ".join(map(_plain, parts))
    if parts:
        return f"{kind.__origin__.__name__}[{', '.join(map(_plain, parts))}]"
    return str(kind.__name__)


def _shown(value: Any) -> str:
    return '""' if value == "" else str(value).replace("'", "")


def _inline(text: str) -> list[nodes.Node]:
    """Text with ``literals`` as docutils nodes."""
    parts = text.split("``")
    return [nodes.literal(text=part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts)]


def _meanings(kind: type) -> dict[str, str]:
    """Field -> its line under ``Args:`` in the docstring."""
    found: dict[str, str] = {}
    name, within = "", False
    for line in (kind.__doc__ or "").splitlines():
        text = line.strip()
        if text == "Args:":
            within = True
        elif within and text:
            head, colon, rest = text.partition(": ")
            if colon and head.isidentifier() and len(line) - len(line.lstrip()) <= 8:
                name, found[head] = head, rest
            else:
                found[name] += " " + text
    return found


class ConfigTable(Directive):
    """``{config-table} CLASS PREFIX``: the fields of a dataclass of ``rcnn.config`` with type, default and meaning.

    A default that depends on the model is given for each of them, from ``rcnn.config.RECIPES``.
    """

    required_arguments = 1
    optional_arguments = 1

    def run(self) -> list[nodes.Node]:
        kind = getattr(settings, self.arguments[0])
        prefix = self.arguments[1] if len(self.arguments) > 1 else ""
        meanings, types = _meanings(kind), get_type_hints(kind)
        table = nodes.definition_list()
        for field in dataclasses.fields(kind):
            if dataclasses.is_dataclass(types[field.name]):
                continue
            term = nodes.term("", "", nodes.literal(text=f"--{prefix}{field.name}"))
            term += nodes.Text(f" \u2013 {_plain(types[field.name])}")
            meaning = nodes.paragraph("", "", *_inline(meanings[field.name]))
            default = nodes.paragraph("", "", *_inline(f"Default: {self._default(field, prefix)}."))
            table += nodes.definition_list_item("", term, nodes.definition("", meaning, default))
        return [table]

    @staticmethod
    def _default(field: "dataclasses.Field[Any]", prefix: str) -> str:
        default = field.default
        if default is dataclasses.MISSING:
            default = field.default_factory()  # type: ignore[misc]
        if default is not None:
            return f"``{_shown(default)}``"
        values: dict[str, list[str]] = {}
        for model, recipe in settings.RECIPES.items():
            value: Any = recipe
            for name in [*prefix.split(".")[:-1], field.name]:
                value = getattr(value, name)
            values.setdefault(_shown(value), []).append(model)
        if len(values) == 1:
            (value,) = values
            return "none" if value == "None" else f"``{value}``"
        return "; ".join(f"``{value}`` for {', '.join(models)}" for value, models in values.items())


def setup(app: Any) -> None:
    app.add_directive("config-table", ConfigTable)
