"""The checks by name: `nox` runs those for every change, `nox -s NAME` one, `nox -l` lists them.

They run in the environment that CONTRIBUTING.md sets up, not in one each: torch alone is hundreds of megabytes.
`.ci/run` runs the same sessions in a fresh environment.
"""

from __future__ import annotations

from pathlib import Path

import nox

nox.options.default_venv_backend = "none"
nox.options.sessions = ["lint", "tests"]

ROOT = Path(__file__).parent
PLUGINS = sorted(path.parent for path in ROOT.glob("plugins/*/pyproject.toml"))


@nox.session
def lint(session: nox.Session) -> None:
    """Style, spelling, types, and what may import what."""
    session.run("ruff", "check", ".")
    session.run("ruff", "format", "--check", "-q", ".")
    session.run("codespell")
    session.run("mypy")
    session.run("lint-imports", silent=True)


@nox.session
def tests(session: nox.Session) -> None:
    """The tests; arguments after -- go to pytest."""
    session.run("python", "-m", "pytest", "-n", "2", *session.posargs)


@nox.session
def nightly(session: nox.Session) -> None:
    """The long campaigns, with more ranks, and twenty times as many examples of each property."""
    session.run("python", "-m", "pytest", "-m", "nightly", *session.posargs)
    properties = ["-m", "hypothesis and not nightly", "--timeout", "1200"]
    session.run("python", "-m", "pytest", *properties, *session.posargs, env={"EPLB_TEST_EXAMPLES": "20"})


@nox.session
def coverage(session: nox.Session) -> None:
    """What the tests cover, in all their processes: ranks, the server that forks them, programs of the docs."""
    data = ROOT / ".coverage"
    data.mkdir(exist_ok=True)
    session.run("coverage", "erase")
    session.run("coverage", "run", "-m", "pytest", *session.posargs)
    session.run("coverage", "combine", "-q")
    session.run("coverage", "report")
    session.run("coverage", "html", "-q", "-d", "htmlcov")


@nox.session
def plugins(session: nox.Session) -> None:
    """Tests, types and imports of each plugin, installed from this checkout: all at first, since some try others."""
    editable = [word for plugin in PLUGINS for word in ("-e", f"{plugin}[test]")]
    session.run("pip", "install", "-q", "-c", "constraints.txt", *editable)
    for plugin in PLUGINS:
        with session.chdir(plugin):
            session.run("python", "-m", "pytest")
            session.run("mypy")
            session.run("lint-imports", silent=True)


@nox.session
def docs(session: nox.Session) -> None:
    """The pages, with every warning an error, into docs/_build/html."""
    session.run("sphinx-build", "-q", "-W", "-n", "-b", "html", "docs", "docs/_build/html")


@nox.session
def wheels(session: nox.Session) -> None:
    """Build what is published and try it in an empty environment; a folder after -- keeps it."""
    session.run(".ci/wheels", *session.posargs, external=True)


@nox.session
def types(session: nox.Session) -> None:
    """The same, and then whether a type checker of a user knows the type of every promised name (needs npm)."""
    session.run(".ci/wheels", *session.posargs, env={"VERIFY_TYPES": "1"}, external=True)
