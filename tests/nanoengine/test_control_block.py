"""The words that scheduler and ranks share."""

from __future__ import annotations

import os
import time

import pytest

from nanoengine.control_block import ControlBlock, Phase, anonymous_file
from tests.nanoengine.process_tools import shared_memory


def test_what_one_side_writes_the_other_reads() -> None:
    before = shared_memory()
    fd = anonymous_file("test")
    scheduler, rank = ControlBlock(fd, 3), ControlBlock(fd, 3)
    os.close(fd)
    assert shared_memory() == before
    assert (scheduler.submitted, scheduler.stop_requested, scheduler.ranks[2].phase) == (0, False, Phase.STARTING)
    scheduler.submitted = 2**40
    scheduler.request_stop()
    assert (rank.submitted, rank.stop_requested) == (2**40, True)
    for number in range(3):
        rank.ranks[number].begin(10 + number)
    rank.ranks[1].end(11)
    rank.ranks[2].beat()
    assert [words.begun for words in scheduler.ranks] == [10, 11, 12]
    assert [words.ended for words in scheduler.ranks] == [0, 11, 0]
    assert [words.phase for words in scheduler.ranks] == [Phase.COMPUTING, Phase.IDLE, Phase.COMPUTING]
    assert 0 <= time.monotonic_ns() - scheduler.ranks[2].heartbeat < 10**9
    assert scheduler.ranks[0].heartbeat == 0
    assert scheduler.ranks[1].describe() == "idle after step 11"
    assert scheduler.ranks[0].describe().startswith("computing step 10 for 0.")
    for side in (scheduler, rank):
        side.close()
        side.close()


def test_a_closed_block_cannot_be_read_by_mistake() -> None:
    fd = anonymous_file("test")
    block = ControlBlock(fd, 1)
    os.close(fd)
    block.close()
    with pytest.raises(ValueError, match="released"):
        block.ranks[0].beat()
