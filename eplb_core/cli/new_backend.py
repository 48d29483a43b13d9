"""`eplb new-backend`: a complete project for a transport of one's own, that works before a line is changed."""

from __future__ import annotations

from pathlib import Path

import click

from eplb_core.cli.output import human_console


@click.command("new-backend")
@click.argument("name")
@click.option(
    "--into",
    type=click.Path(path_type=Path),
    default=Path("."),
    metavar="DIR",
    help="Where to make the project's folder. [default: the current folder]",
)
def new_backend(name: str, into: Path) -> None:
    """Write a project for a backend called NAME into the new folder eplb-NAME.

    It has a slow transport that works and passes the conformance kit, to be replaced by yours: the package with its
    entry point, tests with the kit, and a CI workflow.
    """
    from eplb_core.cli.new_backend_project import ProjectNames, write_project

    names = ProjectNames.of(name)
    project = into / names.distribution
    written = write_project(names, project)
    console = human_console()
    for path in written:
        console.print(path, markup=False)
    console.print(
        f"\nIt works as it is. Next:\n"
        f"  cd {project}\n"
        f"  pip install -e '.[dev]'\n"
        f"  pytest\n"
        f"  eplb bench --backend {names.name} --ranks 2 --device cpu\n"
        f"Then put your transport into src/{names.package}/fabric.py.",
        markup=False,
    )
