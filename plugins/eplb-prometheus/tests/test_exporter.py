"""Real ranks transfer, and their exporters are scraped over HTTP meanwhile: each rank's own, and one for all."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families

from eplb_core import Rearranger, TransferError
from eplb_core.testing import Check, RankContext, Report, Status, Subject, expect, run_conformance

RANKS = 2
CONFIG = "torch_gloo"
WAIT_S = 30.0
NBYTES = 1000
EPOCHS = 5

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def scrape(url: str) -> Samples:
    with urllib.request.urlopen(url, timeout=WAIT_S) as answer:
        text = answer.read().decode()
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(samples: Samples, name: str, rank: int, **labels: object) -> float:
    given = {"backend": CONFIG, "rank": str(rank), **{key: str(each) for key, each in labels.items()}}
    return samples.get((f"eplb_{name}", frozenset(given.items())), 0.0)


def scraped_until(url: str, holds: Callable[[Samples], bool]) -> Samples:
    """Scrape until it holds: events are counted, and an exporter started, a moment after they happen."""
    ends = time.monotonic() + WAIT_S
    samples: Samples = {}
    while True:
        with contextlib.suppress(urllib.error.URLError):
            samples = scrape(url)
        if holds(samples) or time.monotonic() > ends:
            return samples
        time.sleep(0.02)


# --- what the ranks do -----------------------------------------------------------------------------------------------


def transfer(context: RankContext) -> None:
    communicator, peer = context.communicator, 1 - context.rank
    communicator.add_send(torch.full((NBYTES,), context.rank, dtype=torch.uint8), peer)
    communicator.add_recv(torch.empty(2 * NBYTES, dtype=torch.uint8)[:NBYTES], peer)
    communicator.execute()


def peers_see_each_transfer_while_more_are_to_come(context: RankContext) -> None:
    """A rank scrapes its peer's exporter between transfers and sees as many as there were, with their bytes."""
    peer = 1 - context.rank
    url = f"http://127.0.0.1:{int(os.environ['EPLB_PROMETHEUS_PORT']) + peer}/metrics"
    for number in range(1, EPOCHS + 1):
        transfer(context)
        samples = scraped_until(url, lambda seen, due=number: value(seen, "transfers_total", peer) >= due)
        told = {
            "transfers_total": value(samples, "transfers_total", peer),
            "transfer_sent_bytes_total": value(samples, "transfer_sent_bytes_total", peer, peer=context.rank),
            "transfer_received_bytes_total": value(samples, "transfer_received_bytes_total", peer, peer=context.rank),
            "transfer_messages_total": value(samples, "transfer_messages_total", peer),
            "transfer_seconds_count": value(samples, "transfer_seconds_count", peer),
        }
        expect(list(told.values()) == [number, number * NBYTES, number * NBYTES, 2 * number, number], f"{told}")
        context.meet(f"scraped {number}")


def peers_see_failures(context: RankContext) -> None:
    """A transfer that does not match is counted by the class of its error."""
    peer = 1 - context.rank
    url = f"http://127.0.0.1:{int(os.environ['EPLB_PROMETHEUS_PORT']) + peer}/metrics"
    if context.rank == 0:
        context.communicator.add_send(torch.zeros(1), 1)
    phase = ""
    try:
        context.communicator.execute()
    except TransferError as error:
        phase = error.phase
    labels = {"error": "TransferMismatchError", "phase": phase}
    seen = scraped_until(url, lambda samples: value(samples, "transfer_failures_total", peer, **labels) > 0)
    expect(value(seen, "transfer_failures_total", peer, **labels) == 1, f"{seen}")
    context.meet("scraped the failure")


def peers_see_rearrangements(context: RankContext) -> None:
    """A rearrangement is counted with its steps, bytes and experts."""
    peer = 1 - context.rank
    url = f"http://127.0.0.1:{int(os.environ['EPLB_PROMETHEUS_PORT']) + peer}/metrics"
    weights = [[torch.full((2, 500), float(context.rank))]]
    result = Rearranger(context.communicator, weights).run(np.array([[0, 1, 2, 3]]), np.array([[3, 2, 1, 0]]))
    seen = scraped_until(url, lambda samples: value(samples, "rearrangements_total", peer) > 0)
    told = [
        value(seen, "rearrangements_total", peer),
        value(seen, "rearrangement_steps_total", peer),
        value(seen, "rearrangement_received_bytes_total", peer),
        value(seen, "rearrangement_in_progress", peer),
    ]
    expect(told == [1, result.steps, 2 * 500 * 4, 0], f"{told}")
    if peer == 0:
        expect(value(seen, "rearrangement_experts_moved_total", 0) == 4, f"{seen}")
    context.meet("scraped the rearrangement")


def only_transfers(context: RankContext) -> None:
    """Transfers, and waits until the parent has scraped them while this process runs."""
    for _ in range(EPOCHS):
        transfer(context)
    Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], f"rank-{context.rank}-transferred").touch()
    ends = time.monotonic() + WAIT_S
    while not Path(os.environ["PROMETHEUS_MULTIPROC_DIR"], "scraped").exists():
        expect(time.monotonic() < ends, "nobody has scraped")
        time.sleep(0.02)


def nobody_can_listen(context: RankContext) -> None:
    """Transfers go on although the exporter's port is taken."""
    for _ in range(EPOCHS):
        transfer(context)


# --- one exporter for each rank --------------------------------------------------------------------------------------


def free_ports() -> int:
    """Return the first of RANKS ports in a row that are free."""
    for _ in range(100):
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            try:
                second.bind(("127.0.0.1", first.getsockname()[1] + 1))
            except OSError:
                continue
            port: int = first.getsockname()[1]
            return port
    raise RuntimeError("no two ports in a row are free")


@pytest.fixture(scope="module")
def own_exporters() -> Iterator[Report]:
    checks = [
        Check(peers_see_each_transfer_while_more_are_to_come),
        Check(peers_see_failures),
        Check(peers_see_rearrangements),
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("EPLB_PROMETHEUS_PORT", str(free_ports()))
        yield run_conformance([Subject(config=CONFIG)], RANKS, checks)


def passes(report: Report, check: Callable[[RankContext], None]) -> None:
    result = report.of(check.__name__)
    assert result.status is Status.PASSED, result.detail


def test_a_rank_that_transfers_is_scraped_with_what_it_has_done(own_exporters: Report) -> None:
    passes(own_exporters, peers_see_each_transfer_while_more_are_to_come)


def test_a_failed_transfer_is_scraped_by_the_class_of_its_error(own_exporters: Report) -> None:
    passes(own_exporters, peers_see_failures)


def test_a_rearrangement_is_scraped_with_its_steps_and_bytes(own_exporters: Report) -> None:
    passes(own_exporters, peers_see_rearrangements)


def test_a_port_that_is_taken_harms_no_transfer(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        monkeypatch.setenv("EPLB_PROMETHEUS_PORT", str(taken.getsockname()[1]))
        passes(run_conformance([Subject(config=CONFIG)], RANKS, [Check(nobody_can_listen)]), nobody_can_listen)


# --- one exporter for all --------------------------------------------------------------------------------------------


def test_one_exporter_serves_what_all_ranks_of_the_host_have_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", str(tmp_path))
    exporter = subprocess.Popen(
        [sys.executable, "-m", "eplb_prometheus", "serve", "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    ranks = subprocess.Popen([sys.executable, __file__])  # in a process of its own, since this one has to scrape
    try:
        assert exporter.stdout is not None
        served = re.fullmatch(r"serving (http://\S+)\n", exporter.stdout.readline())
        assert served
        ends = time.monotonic() + 2 * WAIT_S
        while len(list(tmp_path.glob("rank-*-transferred"))) < RANKS and time.monotonic() < ends:
            assert ranks.poll() is None
            time.sleep(0.05)
        samples = scraped_until(
            served[1], lambda seen: all(value(seen, "transfers_total", rank) == EPOCHS for rank in range(RANKS))
        )
        for rank in range(RANKS):
            assert value(samples, "transfers_total", rank) == EPOCHS
            assert value(samples, "transfer_sent_bytes_total", rank, peer=1 - rank) == EPOCHS * NBYTES
        (tmp_path / "scraped").touch()
        assert ranks.wait(WAIT_S) == 0
    finally:
        for process in (exporter, ranks):
            process.kill()
            process.wait(WAIT_S)
        if exporter.stdout is not None:
            exporter.stdout.close()


def test_without_a_directory_the_exporter_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PROMETHEUS_MULTIPROC_DIR", raising=False)
    done = subprocess.run(
        [sys.executable, "-m", "eplb_prometheus", "serve"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "PROMETHEUS_MULTIPROC_DIR must name a directory" in done.stderr


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    import test_exporter  # the ranks import it by this name

    results = run_conformance([Subject(config=CONFIG)], RANKS, [Check(test_exporter.only_transfers)])
    sys.exit(results.of("only_transfers").status is not Status.PASSED)
