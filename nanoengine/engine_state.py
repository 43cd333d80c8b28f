"""What somebody who watches the engine is shown: who runs, who waits, and what lies in each K/V block.

It is made when it is asked for, between two steps, and costs the steps nothing otherwise. Its size is bounded however
large the cache is: several blocks share a cell of the map then. It reads the scheduler and changes nothing; it knows
neither sockets nor colours.
"""

from __future__ import annotations

import bisect
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable
from collections.abc import Sequence as ListOf
from typing import TYPE_CHECKING, NamedTuple

from nanoengine.messages import BlockMap, EngineState, SequenceRow, SharedPrefix
from nanoengine.sequence import SequenceStatus

if TYPE_CHECKING:
    from nanoengine.scheduler import Scheduler
    from nanoengine.sequence import Sequence

MAX_CELLS = 4096
MIN_MAPPED = 512
MAX_ROWS = 64
MAX_PREFIXES = 32
# What a cell can say of the share of its blocks that are in a state.
FULL = 255


class _Family(NamedTuple):
    """Running sequences that share their first block, and how many blocks at the front of each are shared."""

    seqs: list[Sequence]
    num_shared: list[int]


def engine_state(scheduler: Scheduler, incarnation: int, now: float) -> EngineState:
    """The state between two steps. Call it there only: counters and tables agree then.

    `now` is in seconds on the scale of `AddRequest.arrival_time`.
    """
    blocks, running = scheduler.blocks, scheduler.running
    ref_counts = blocks.ref_counts
    device = map_blocks(ref_counts, blocks.cached_blocks)
    families = _families(running, ref_counts)
    prefixes, prefix_cells = _paint(families, device)
    num_shared = {
        seq: number for family in families for seq, number in zip(family.seqs, family.num_shared, strict=True)
    }
    shown = [*running[:MAX_ROWS], *scheduler.waiting[: max(0, MAX_ROWS - len(running))]]
    swapped = sum(seq.status is SequenceStatus.SWAPPED for seq in scheduler.waiting)
    return EngineState(
        incarnation=incarnation,
        time=now,
        num_running=len(running),
        num_waiting=len(scheduler.waiting) - swapped,
        num_swapped=swapped,
        num_preemptions=scheduler.num_preemptions,
        num_generated_tokens=scheduler.totals.num_generated_tokens,
        num_query_tokens=blocks.num_query_tokens,
        num_hit_tokens=blocks.num_hit_tokens,
        device=device,
        host=map_blocks(blocks.host.ref_counts, blocks.host.cached_blocks),
        prefixes=prefixes,
        prefix_cells=prefix_cells,
        rows=[_row(seq, num_shared.get(seq, 0), now) for seq in shown],
    )


def map_blocks(ref_counts: list[int], cached: Collection[int]) -> BlockMap:
    """Count the blocks of a tier by state, in all and for each cell of the map.

    The map ends behind the last block in use, at a power of two, so that a large cache that is little used shows its
    blocks one by one.

    Args:
        ref_counts: how many sequences hold it, for each block.
        cached: the blocks that nobody holds and whose content is known.
    """
    num_blocks = len(ref_counts)
    num_used = max(max(cached, default=-1), _last_held(ref_counts)) + 1
    num_mapped = min(num_blocks, max(MIN_MAPPED, 1 << num_used.bit_length()))
    per_cell = max(1, -(-num_mapped // MAX_CELLS))
    cells = [ref_counts[start : min(start + per_cell, num_mapped)] for start in range(0, num_mapped, per_cell)]
    num_cached = Counter(block // per_cell for block in cached)
    held = [cell.count(1) for cell in cells]
    shared = [len(cell) - cell.count(0) - one for cell, one in zip(cells, held, strict=True)]

    def levels(counts: Iterable[int]) -> bytes:
        # Rounded up, so that one block of thousands still shows, and so that floor(level · per_cell / FULL) is the
        # exact number as long as a cell has at most FULL blocks.
        return bytes(-(-count * FULL // per_cell) for count in counts)

    return BlockMap(
        num_blocks,
        num_mapped,
        per_cell,
        len(cached),
        sum(held),
        sum(shared),
        levels(num_cached[cell] for cell in range(len(cells))),
        levels(held),
        levels(shared),
    )


def _last_held(ref_counts: list[int]) -> int:
    """The last block that somebody holds, or -1."""
    return next((block for block in range(len(ref_counts) - 1, -1, -1) if ref_counts[block]), -1)


def _families(running: ListOf[Sequence], ref_counts: list[int]) -> list[_Family]:
    """Sequences by the first block of their tables, where at least two have it in common; most shared blocks first."""
    by_root: defaultdict[int, list[Sequence]] = defaultdict(list)
    for seq in running:
        if seq.block_table:
            by_root[seq.block_table[0]].append(seq)
    families = [
        _Family(seqs, [_num_shared(seq.block_table, ref_counts) for seq in seqs])
        for seqs in by_root.values()
        if len(seqs) > 1
    ]
    return sorted(families, key=lambda family: -sum(family.num_shared))[:MAX_PREFIXES]


def _num_shared(table: list[int], ref_counts: list[int]) -> int:
    """How many blocks at the front of a table others hold too: whoever shares a block shares those before it."""
    return bisect.bisect_left(table, True, key=lambda block: ref_counts[block] == 1)


def _paint(families: list[_Family], device: BlockMap) -> tuple[list[SharedPrefix], bytes]:
    """The families as they are told, and for each cell the number of one that lies in it, from 1 on; 0: none does."""
    cells = bytearray(len(device.held))
    prefixes = []
    for number, family in enumerate(families, start=1):
        blocks: set[int] = set()
        for seq, num_shared in zip(family.seqs, family.num_shared, strict=True):
            # From the back: before a block that another one has shown already lies nothing new.
            for i in range(num_shared - 1, -1, -1):
                if seq.block_table[i] in blocks:
                    break
                blocks.add(seq.block_table[i])
        for block in blocks:
            cells[block // device.blocks_per_cell] = number
        saved = sum(family.num_shared) - len(blocks)
        prefixes.append(SharedPrefix(family.seqs[0].block_table[0], len(family.seqs), len(blocks), saved))
    return prefixes, bytes(cells)


def _row(seq: Sequence, num_shared: int, now: float) -> SequenceRow:
    return SequenceRow(
        seq.request.request_id,
        seq.index,
        seq.status.value,
        seq.num_prompt_tokens,
        seq.num_computed_tokens,
        seq.num_completion_tokens,
        len(seq.block_table),
        num_shared,
        seq.num_preemptions,
        max(0.0, now - seq.request.arrival_time),
    )
