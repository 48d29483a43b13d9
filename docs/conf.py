"""How the documentation is built: `sphinx-build -W -n -b html docs docs/_build/html`."""

from __future__ import annotations

import ast
import importlib
import inspect
import shutil
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy.typing

import eplb_core

project = "eplb"
author = "the authors of eplb"
project_copyright = "2026, the authors of eplb"
version = release = eplb_core.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
myst_enable_extensions = ["deflist"]

html_theme = "furo"
html_title = f"eplb {release}"

# Docstrings are written for people who read them in the source: single backticks are code, nothing else.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True  # dataclass fields are described once, in the class
autodoc_member_order = "bysource"
autodoc_typehints_format = "short"
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100

# Objects of other projects and of the standard library. Their inventories would have to be fetched from the network,
# and building these pages needs none.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|numpy|click|pluggy|collections|multiprocessing|socket|types)\..*"),
    ("py:class", r"eplb_core\.control\.store_connection\.StoreConnection"),  # the core's own
    # What ranks of one host agree in; no page is about it.
    ("py:class", r"eplb_core\.control\.board\.Board"),
    # Type variables.
    ("py:class", r"eplb_core\.(transport\.deadline\.Result|testing\.(context\._T|in_process\.Result))"),
]

T = TypeVar("T")


class ArrayLike:
    """Stands for numpy's, whose definition fills five lines of every signature."""


class NDArray(Generic[T]):
    """Stands for numpy's, which shows as an ndarray of a tuple and a dtype."""


for stand_in in (ArrayLike, NDArray):
    stand_in.__module__ = "numpy.typing"
    setattr(numpy.typing, stand_in.__name__, stand_in)


def import_what_type_checkers_see() -> None:
    """Run the `if TYPE_CHECKING:` blocks of the modules that are documented, so that types in signatures are found."""
    root = Path(eplb_core.__file__).parent
    rooms = "contract control registry hooks transport planning scheduling policies rearrange factory launch doctor"
    files = [*root.glob("[a-z]*.py"), *(file for room in rooms.split() for file in root.glob(f"{room}/*.py"))]
    names = [".".join(file.relative_to(root.parent).with_suffix("").parts) for file in files]
    modules = [importlib.import_module(name.removesuffix(".__init__")) for name in names]
    for module in modules:
        for node in ast.parse(inspect.getsource(module)).body:
            if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
                exec(compile(ast.Module(node.body, []), str(module.__file__), "exec"), vars(module))  # noqa: S102


import_what_type_checkers_see()


def keep_colons(app: object, what: str, name: str, obj: object, options: object, lines: list[str]) -> None:
    """Keep napoleon from reading `Bytes of the window: what is allowed` as a type and a description."""
    if what in ("property", "attribute", "data"):
        lines[:0] = ["..", ""]  # a comment without text, and so without a colon
    if "Returns:" in lines[:-1]:
        first = lines.index("Returns:") + 1
        lines[first] = lines[first].replace(": ", " \N{EN DASH} ")


def publish_schemas(app: Any, exception: Exception | None) -> None:
    """Put the schemas where their `$id` says that they are."""
    if exception is None and app.builder.format == "html":
        shutil.copytree(Path(app.srcdir) / "schemas", Path(app.outdir) / "schemas", dirs_exist_ok=True)


def setup(app: Any) -> None:
    """Connect what happens before napoleon, which has the priority 500, and at the end."""
    app.connect("autodoc-process-docstring", keep_colons, priority=400)
    app.connect("build-finished", publish_schemas)
