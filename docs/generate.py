"""Draws the pictures of these pages, and writes the parts that come from the code.

    python docs/generate.py            # everything; needs Graphviz (`dot`) and the extras cli and plot
    python docs/generate.py contract   # one of: contract, diagrams, strip

What it makes is kept in the repository, so that building the pages needs neither Graphviz nor a run.
"""

from __future__ import annotations

import io
import os
import pty
import re
import select
import subprocess
import sys
import tempfile
from pathlib import Path

DOCS = Path(__file__).parent
STATIC = DOCS / "_static"
LIGHT = {"ink": "#22262b", "line": "#5b6470", "fill": "#eef2f6", "strong": "#1769aa", "on_strong": "#ffffff"}
DARK = {"ink": "#e6e9ed", "line": "#98a2b0", "fill": "#2b3138", "strong": "#5aa9e6", "on_strong": "#10151b"}

DIAGRAMS = {
    "overview": """
        loads -> policy -> new
        old -> plan
        new -> plan [constraint=true]
        plan -> steps -> communicator
        communicator -> {nixl nccl gloo yours}
        loads [label="recorded loads", shape=plain]
        policy [label="policy"]
        old [label="old placement", shape=plain]
        new [label="new placement", shape=plain]
        plan [label="plan\\nwhat must move", STRONG]
        steps [label="steps\\nbounded memory", STRONG]
        communicator [label="communicator\\none string chooses it", STRONG]
        nixl [label="nixl, cuda_ipc, shm"]
        nccl [label="torch_nccl, pynccl"]
        gloo [label="torch_gloo"]
        yours [label="your package"]
    """,
    "step": """
        queue -> execute -> agree -> commit
        queue [label="1  queue sends and receives\\ninto the window, or into empty slots"]
        execute [label="2  execute()\\nbytes move", STRONG]
        agree [label="3  all ranks have their bytes?\\none record decides"]
        commit [label="4  commit\\nwindow -> slot, slot -> slot", STRONG]
        agree -> kept [label="a rank died"]
        kept [label="nothing is copied:\\nthe placement stays", style="rounded,dashed"]
    """,
}
"""Name -> edges and nodes, in Graphviz's language; STRONG stands for the look of what matters most."""


def diagrams() -> None:
    """Draw every diagram twice, for light pages and for dark ones."""
    for name, body in DIAGRAMS.items():
        for theme, colors in (("light", LIGHT), ("dark", DARK)):
            strong = (
                f'style="rounded,filled", fillcolor="{colors["strong"]}", '
                f'fontcolor="{colors["on_strong"]}", color="{colors["strong"]}"'
            )
            font = 'fontname="Helvetica,Arial,sans-serif", fontsize=11'
            source = f"""digraph {{
                rankdir=LR; bgcolor=transparent; nodesep=0.2; ranksep=0.35;
                node [shape=box, style="rounded,filled", fillcolor="{colors["fill"]}", color="{colors["line"]}",
                      fontcolor="{colors["ink"]}", {font}, margin="0.12,0.06"];
                edge [color="{colors["line"]}", fontcolor="{colors["ink"]}", {font}, arrowsize=0.7];
                {body.replace("STRONG", strong)}
            }}"""
            drawn = subprocess.run(["dot", "-Tsvg"], input=source, capture_output=True, text=True, check=True).stdout
            (STATIC / f"{name}-{theme}.svg").write_text(re.sub(r"<!--.*?-->\n?", "", drawn, flags=re.DOTALL))


def contract() -> None:
    """Write the page of the contract, check by check."""
    (DOCS / "contract.md").write_text(contract_page())


def contract_page() -> str:
    """Return the page: what the conformance kit holds a backend to, in the order in which it does."""
    from eplb_core.testing.catalogue import all_checks

    titles = {
        "installed": "What is installed",
        "lifetime": "From creation to the end",
        "delivery": "What arrives",
        "refusal": "What must not be moved",
        "sharing": "Who else is there",
        "streams": "Stream order",
        "failure": "When a rank does not do its part",
    }
    lines = [
        "# The contract, check by check",
        "",
        "What `eplb conformance` holds a backend to. A check that fails names its promise, what came instead, and its",
        "section here. The docstrings of {py:class}`~eplb_core.EplbCommunicator` are the contract itself;",
        "[What the contract asks](write-a-backend.md#what-the-contract-asks) says which part of your code keeps it.",
        "",
        "This page is written by `docs/generate.py` out of the checks.",
    ]
    room = ""
    for check in all_checks():
        module = check.function.__module__.rpartition(".")[2]
        if module != room:
            room = module
            lines += ["", f"## {titles[module]}"]
        needs = {"cuda": "a CUDA device", "background": "`background=True`", "stateless": "`stateless_groups=True`"}
        notes = [f"{check.least_ranks} ranks"] if check.least_ranks > 2 else []
        notes += [needs.get(each, f"`{each}`") for each in check.needs]
        notes += ["`--thorough`"] if check.thorough else []
        lines += ["", f"### {check.name}", "", check.promise]
        lines += ["", f"Applies with {', '.join(notes)}."] if notes else []
    return "\n".join(lines) + "\n"


def strip() -> None:
    """Record `eplb demo` on a terminal: the live bar, and the tables. Draw its plot too."""
    from rich.console import Console
    from rich.text import Text

    with tempfile.TemporaryDirectory() as folder:
        plot = Path(folder, "plot.svg")
        shown = run_on_a_terminal(["demo", "--backend", "torch_gloo", "--plot", str(plot)])
        (STATIC / "rebalance.svg").write_text(plot.read_text())
    console = Console(record=True, width=88, file=io.StringIO(), force_terminal=True)
    console.print(Text("$ eplb demo", style="bold"))
    for line in shown:
        console.print(Text.from_ansi(line))
    (STATIC / "demo.svg").write_text(console.export_svg(title="eplb demo", clear=False))


def run_on_a_terminal(arguments: list[str]) -> list[str]:
    """Return what the command shows: the last state of its bars, and then its report, as lines with colours."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "88", "LINES": "60", "COLORTERM": "truecolor"}
    shown = b""
    with subprocess.Popen(
        [sys.executable, "-m", "eplb_core", *arguments], stdin=theirs, stdout=theirs, stderr=theirs, env=environment
    ) as process:
        os.close(theirs)
        while select.select([ours], [], [], 120)[0]:
            try:
                chunk = os.read(ours, 1 << 16)
            except OSError:  # the terminal is gone with the process
                break
            if not chunk:
                break
            shown += chunk
    if process.returncode:
        raise SystemExit(shown.decode())
    text = shown.decode().replace("\r\n", "\n")
    bars = re.findall(r"[^\n\r\x1b]*(?:\x1b\[[\d;]*m[^\n\r\x1b]*)*(?:move experts|compare bytes)[^\n\r]*", text)
    live = {("move experts" in bar): bar for bar in bars if "/" in bar}
    report = text[text.rindex("checkpoint checkpoint") if "checkpoint checkpoint" in text else 0 :]
    clean = re.sub(r"\x1b\[[\d;?]*[A-HJKSTfhl]", "", report)
    return [*(live[key] for key in (True, False) if key in live), "", *clean.rstrip().split("\n")]


def main() -> None:
    """Make what is named, or everything."""
    makers = {"contract": contract, "diagrams": diagrams, "strip": strip}
    for name in sys.argv[1:] or makers:
        makers[name]()


if __name__ == "__main__":
    main()
