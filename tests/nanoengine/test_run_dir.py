"""Run directories: private, short enough for sockets, and swept exactly when nobody holds them."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.errors import ConfigError
from nanoengine import run_dir
from nanoengine.run_dir import RunDir, sweep
from tests.nanoengine.process_tools import short_directory


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with short_directory() as path:
        monkeypatch.setenv("XDG_RUNTIME_DIR", str(path))
        yield path


def abandoned(base: Path) -> Path:
    """What an engine leaves when all of its processes are killed at once."""
    made = RunDir.create()
    (made.path / "front").touch()
    os.close(made.lock_fd)
    return made.path


def test_it_is_private_and_random_and_gone_after_remove(base: Path) -> None:
    first, second = RunDir.create(), RunDir.create()
    for made in (first, second):
        assert made.path.parent == base
        assert made.path.stat().st_mode & 0o777 == 0o700
        assert made.path.name.startswith(f"nanoengine-{os.getuid()}-")
        assert not os.get_inheritable(made.lock_fd)
    assert first.path != second.path
    first.remove()
    first.remove()
    assert os.listdir(base) == [second.path.name]
    second.remove()


def test_a_start_sweeps_what_nobody_holds_and_nothing_else(base: Path) -> None:
    held = RunDir.create()
    left = abandoned(base)
    (base / "nanoengine-notours").mkdir()
    (base / f"nanoengine-{os.getuid()}-file").touch()
    fresh = RunDir.create()
    assert not left.exists()
    names = {held.path.name, fresh.path.name, "nanoengine-notours", f"nanoengine-{os.getuid()}-file"}
    assert set(os.listdir(base)) == names
    held.remove()
    fresh.remove()


def test_a_lock_shared_with_another_process_holds_until_both_are_gone(base: Path) -> None:
    owner = RunDir.create()
    scheduler = os.dup(owner.lock_fd)  # what a child that inherits the descriptor holds
    os.close(owner.lock_fd)
    sweep(base)
    assert owner.path.exists()
    os.close(scheduler)
    sweep(base)
    assert not owner.path.exists()


def test_a_directory_in_the_making_is_left_alone_for_a_minute(base: Path) -> None:
    unfinished = base / f"nanoengine-{os.getuid()}-123.new"
    unfinished.mkdir()
    sweep(base)
    assert unfinished.exists()
    old = time.time() - 3600
    os.utime(unfinished, (old, old))
    sweep(base)
    assert not unfinished.exists()


def test_a_link_planted_under_our_name_is_not_followed(base: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").touch()
    (base / f"nanoengine-{os.getuid()}-link").symlink_to(tmp_path)
    sweep(base)
    assert (tmp_path / "precious").exists()


def test_a_base_too_long_for_sockets_is_passed_over(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    long = base / ("x" * 90)
    long.mkdir()
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(long))
    monkeypatch.setattr(tempfile, "tempdir", str(base))
    made = RunDir.create()
    assert made.path.parent == base
    made.remove()


def test_without_a_usable_base_the_error_says_why(base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = base / "missing"
    monkeypatch.setattr(run_dir, "_bases", lambda: [missing, base / ("x" * 90)])
    with pytest.raises(ConfigError, match=r"TMPDIR.*missing \(No such file or directory\).*bytes of 107"):
        RunDir.create()
