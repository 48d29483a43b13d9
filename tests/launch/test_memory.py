"""Free memory is that of the container, where there is one."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from eplb_core.launch import memory

MIB = 1 << 20


def group(folder: Path, **files: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def looked_at(tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own").write_text(own)
    monkeypatch.setattr(memory, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(memory, "_GROUPS", tmp_path / "groups")


def test_a_limit_of_the_own_group_counts_less_what_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that the kernel can drop are as good as free."""
    looked_at(tmp_path, "0::/job\n", monkeypatch)
    group(
        tmp_path / "groups" / "job",
        memory__max=f"{100 * MIB}\n",
        memory__current=f"{70 * MIB}\n",
        memory__stat=f"anon {30 * MIB}\ninactive_file {40 * MIB}\n",
    )
    assert memory.free_memory() == 70 * MIB
    assert memory.memory_limit() == 100 * MIB


def test_the_tightest_group_above_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at(tmp_path, "0::/pod/job\n", monkeypatch)
    group(tmp_path / "groups" / "pod", memory__max=f"{50 * MIB}\n", memory__current=f"{10 * MIB}\n")
    group(tmp_path / "groups" / "pod" / "job", memory__max="max\n", memory__current=f"{10 * MIB}\n")
    assert (memory.free_memory(), memory.memory_limit()) == (40 * MIB, 50 * MIB)


def test_in_a_container_the_own_group_is_the_one_that_is_mounted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at(tmp_path, "0::/a/path/of/the/host\n", monkeypatch)
    group(tmp_path / "groups", memory__max=f"{60 * MIB}\n", memory__current=f"{20 * MIB}\n")
    assert memory.free_memory() == 40 * MIB


def test_groups_of_the_first_version_count_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at(tmp_path, "5:cpu,cpuacct:/x\n4:memory:/job\n", monkeypatch)
    group(
        tmp_path / "groups" / "memory" / "job",
        memory__limit_in_bytes=f"{80 * MIB}",
        memory__usage_in_bytes=f"{20 * MIB}",
        memory__stat=f"total_inactive_file {5 * MIB}\n",
    )
    assert memory.free_memory() == 65 * MIB


@pytest.mark.parametrize("own", ["0::/job\n", ""], ids=["a group without a limit", "no groups"])
def test_without_a_limit_it_is_that_of_the_host(tmp_path: Path, own: str, monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at(tmp_path, own, monkeypatch)
    group(tmp_path / "groups" / "job", memory__max="max\n", memory__current="5\n")
    assert 0 < memory.free_memory() <= psutil.virtual_memory().total
    assert memory.memory_limit() is None
