"""Every row of the table in docs/factory.md, tried for real in a group of one rank."""

from __future__ import annotations

import builtins
import importlib.util
import logging
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from eplb_backends.nixl import has_nixl
from eplb_core import errors
from eplb_core.contract.communicator import EplbCommunicator
from eplb_core.control.groups import StatelessGroup, TorchGroups, is_stateless
from eplb_core.factory.create import create_eplb_communicator
from eplb_core.hooks import PluginHost
from eplb_core.registry.registry import Registry

PAGE = Path(__file__).parents[2] / "docs" / "factory.md"
PACKAGES = {"nixl": ("nixl", "nixl_rocm", "rixl"), "pynccl": ("nccl",), "torch_nccl": ("nccl",)}
HAS_GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Row:
    """One row of the table."""

    group: str
    tensors: str
    backend: str
    installed: str
    result: str
    also: str

    def __str__(self) -> str:
        return f"{self.group}, {self.tensors}, {self.backend}, installed {self.installed}"


def rows() -> list[Row]:
    lines = PAGE.read_text().split("\n## Rows\n")[1].split("\n## ")[0].splitlines()
    cells = [
        [cell.strip().replace("`", "") for cell in line.strip("|").split("|")] for line in lines if line[:1] == "|"
    ]
    return [Row(*row) for row in cells[2:]]


def marked(row: Row) -> Any:
    on_gpu = row.tensors.startswith("cuda")
    marks = [pytest.mark.gpu, pytest.mark.skipif(not HAS_GPU, reason="torch sees no CUDA device")] if on_gpu else []
    if row.installed == "yes":
        modules = PACKAGES[row.backend.partition("?")[0].replace("None", "torch_nccl")]
        there = any(importlib.util.find_spec(module) for module in modules)
        needed = on_gpu or "Unavailable" not in row.result
        marks.append(pytest.mark.skipif(needed and not there, reason=f"{modules[0]} is not installed"))
    return pytest.param(row, marks=marks, id=str(row))


ROWS = [marked(row) for row in rows()]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    """A default process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def group_for(row: Row) -> Any:
    if row.group == "stateless":
        return StatelessGroup(0, 1, dist.HashStore())
    if row.group == "stateless, own process group":
        return SimpleNamespace(
            rank_in_group=0,
            world_size=1,
            cpu_group=dist.ProcessGroup(dist.HashStore(), 0, 1),
            device_group=None,
            device_communicator=None,
            store=dist.HashStore(),
        )
    groups = TorchGroups()
    if row.tensors.startswith("cuda") and row.group != "torch, no device group":
        groups.device_group = dist.new_group(backend="nccl")
    if "engine NCCL" in row.group:
        carried = SimpleNamespace(disabled="disabled" in row.group, available="unavailable" not in row.group)
        groups.device_communicator = SimpleNamespace(pynccl_comm=carried)
    return groups


def weights_for(row: Row) -> list[torch.Tensor]:
    if row.tensors == "none":
        return []
    device, _, dtype = row.tensors.partition(" ")
    return [torch.zeros(2, 3, device=device, dtype=getattr(torch, dtype or "float32"))]


@pytest.mark.parametrize("row", ROWS)
def test_the_factory_does_what_the_table_says(
    row: Row, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in PACKAGES[row.backend.partition("?")[0]] if row.installed == "no" else ():
        monkeypatch.setitem(sys.modules, module, None)  # what Python itself takes for "not there"
    monkeypatch.delenv("EPLB_BACKEND", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "0")
    backend = None if row.backend == "None" else row.backend
    group, weights = group_for(row), weights_for(row)
    expected, _, warned = row.result.partition(", ")

    with caplog.at_level(logging.INFO, "eplb_core.factory.create"):
        outcome: EplbCommunicator | errors.EplbError
        try:
            outcome = create_eplb_communicator(group, backend, weights, registry=Registry(), plugins=PluginHost())
        except errors.EplbError as error:
            outcome = error

    assert type(outcome).__name__ == expected, outcome
    initialized = []
    if isinstance(outcome, EplbCommunicator):
        with outcome:
            outcome.execute()
        initialized = [f"initialized, {expected} ({outcome.binding.config})"]
    else:
        assert isinstance(outcome, getattr(builtins, row.also))
    said = [
        (record.levelname, record.getMessage())
        for record in caplog.records
        if record.name == "eplb_core.factory.create"
    ]
    assert [text for level, text in said if level == "INFO"] == initialized
    warnings = [text for level, text in said if level == "WARNING"]
    assert len(warnings) == (1 if warned else 0)
    assert all("torch_nccl" in text and "pynccl" in text for text in warnings)


def test_the_table_has_every_backend_in_every_kind_of_group() -> None:
    pairs = {(row.group.partition(",")[0], row.tensors[:4], row.backend.partition("?")[0]) for row in rows()}
    for group in ("torch", "stateless"):
        for tensors in ("cpu", "cuda"):
            for backend in ("None", "torch_nccl", "torch_gloo", "pynccl", "nixl"):
                assert (group, tensors, backend) in pairs


@pytest.mark.parametrize("local_rank", ["1", "7"])
def test_other_local_ranks_log_neither_the_line_nor_the_warning(
    local_rank: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with caplog.at_level(logging.INFO, "eplb_core.factory.create"):
        create_eplb_communicator(TorchGroups(), "torch_gloo", plugins=PluginHost()).close()
        with pytest.raises(errors.BackendUnavailableError):
            create_eplb_communicator(StatelessGroup(0, 1, dist.HashStore()), "torch_nccl", plugins=PluginHost())
    assert [record for record in caplog.records if record.name == "eplb_core.factory.create"] == []


def test_options_of_torch_nccl_are_those_of_its_substitute_too() -> None:
    group = StatelessGroup(0, 1, dist.HashStore())
    config = "torch_nccl?abort=off&coalesce=1MiB&timeout=5s&warm_up=group"
    with pytest.raises(errors.BackendUnavailableError, match="moves tensors on cuda"):
        create_eplb_communicator(group, config, plugins=PluginHost())


def test_a_group_without_process_group_or_store_is_refused() -> None:
    group = group_for(Row("stateless, own process group", "cpu", "nixl", "yes", "", ""))
    del group.store
    with pytest.raises(errors.InputError, match="neither a store nor"):
        create_eplb_communicator(group, "nixl", plugins=PluginHost())


def test_a_group_is_stateless_if_torch_does_not_know_its_process_group() -> None:
    assert not is_stateless(TorchGroups())
    assert is_stateless(StatelessGroup(0, 1, dist.HashStore()))
    assert is_stateless(group_for(Row("stateless, own process group", "cpu", "nixl", "yes", "", "")))


def test_has_nixl_looks_for_either_build(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in PACKAGES["nixl"]:
        monkeypatch.setitem(sys.modules, module, None)
    assert not has_nixl()
    monkeypatch.setitem(sys.modules, "rixl", SimpleNamespace(__spec__=SimpleNamespace()))
    assert has_nixl()


def test_every_error_of_the_table_says_how_to_mend_it() -> None:
    group = StatelessGroup(0, 1, dist.HashStore())
    with pytest.raises(errors.StatelessGroupError) as raised:
        create_eplb_communicator(group, "torch_gloo", plugins=PluginHost())
    assert re.search("needs a process group", str(raised.value))
    assert raised.value.remedy
