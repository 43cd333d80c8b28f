"""The files of weights are brought into the kernel's cache once, and whatever else lies there does no harm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from nanoengine.read_ahead import read_ahead

READ = os.sendfile


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> dict[int, int]:
    """Bytes that were read, by the file's inode."""
    found: dict[int, int] = {}

    def count(out: int, file: int, offset: int, count: int) -> int:
        inode = os.fstat(file).st_ino
        assert offset == found.get(inode, 0), "from front to back"
        sent = READ(out, file, offset, count)
        found[inode] = offset + sent
        return sent

    monkeypatch.setattr("nanoengine.read_ahead._PIECE", 1000)
    monkeypatch.setattr(os, "sendfile", count)
    return found


def write(path: Path, size: int) -> int:
    path.write_bytes(bytes(size))
    return path.stat().st_ino


def test_a_part_of_the_weights_is_not_read(tmp_path: Path, read: dict[int, int]) -> None:
    wanted = {write(tmp_path / f"model-{i}.safetensors", size): size for i, size in enumerate((2500, 1000, 1))}
    write(tmp_path / "pytorch_model.bin", 5000)
    read_ahead(tmp_path)
    assert read == wanted


def test_what_nobody_loads_is_read(tmp_path: Path, read: dict[int, int]) -> None:
    wanted = {write(tmp_path / "model.safetensors", 3000): 3000}
    write(tmp_path / "consolidated.safetensors", 3000)
    read_ahead(tmp_path)
    assert read == wanted


def test_weights_that_push_each_other_out_are_read(
    tmp_path: Path, read: dict[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "model.safetensors", 3000)
    sizes = {"SC_PHYS_PAGES": 5, "SC_PAGESIZE": 1000}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    read_ahead(tmp_path)
    assert read == {}
    sizes["SC_PHYS_PAGES"] = 6
    read_ahead(tmp_path)
    assert list(read.values()) == [3000]


def test_what_cannot_be_read_hangs_or_raises(tmp_path: Path, read: dict[int, int]) -> None:
    read_ahead(tmp_path / "absent")
    read_ahead(tmp_path)
    (tmp_path / "a.safetensors").symlink_to(tmp_path / "gone")
    read_ahead(tmp_path)
    (tmp_path / "a.safetensors").unlink()
    os.mkfifo(tmp_path / "b.safetensors")
    read_ahead(tmp_path)
    (tmp_path / "b.safetensors").unlink()
    (tmp_path / "c.safetensors").mkdir()
    read_ahead(tmp_path)
    assert read == {}
