"""`python -m eplb_prometheus`: one exporter for all processes of a host, and the dashboard."""

from __future__ import annotations

import argparse
import os
import threading
from importlib.resources import files
from pathlib import Path

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.multiprocess import MultiProcessCollector

DIRECTORY = "PROMETHEUS_MULTIPROC_DIR"


def dashboard() -> str:
    """Return the Grafana dashboard, as JSON."""
    return files("eplb_prometheus").joinpath("dashboard.json").read_text(encoding="utf-8")


def main() -> None:
    """Serve until terminated, or print the dashboard."""
    parser = argparse.ArgumentParser(prog="python -m eplb_prometheus", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help=f"export the metrics that all processes have written to {DIRECTORY}")
    serve.add_argument("--port", type=int, default=9410, help="0 takes a free one [default: 9410]")
    serve.add_argument("--address", default="127.0.0.1", help="[default: 127.0.0.1]")
    commands.add_parser("dashboard", help="print the Grafana dashboard")
    given = parser.parse_args()
    if given.command == "dashboard":
        print(dashboard(), end="")
        return
    folder = os.environ.get(DIRECTORY, "")
    if not Path(folder).is_dir() or not folder:
        parser.error(f"{DIRECTORY} must name a directory, the same one as for the ranks; it is {folder!r}")
    registry = CollectorRegistry()
    MultiProcessCollector(registry, path=folder)  # type: ignore[no-untyped-call]
    server, _ = start_http_server(given.port, given.address, registry)
    print(f"serving http://{given.address}:{server.server_port}/metrics", flush=True)
    threading.Event().wait()


if __name__ == "__main__":
    main()
