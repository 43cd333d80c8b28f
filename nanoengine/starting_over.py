"""A scheduler begins anew: on other ranks, on ranks that forgot everything, or itself, after a fault of its own.

What it changes is the scheduler that it is handed; it knows no process and no socket.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nanoengine.scheduler import Scheduler


def forget_computation(scheduler: Scheduler) -> None:
    """The cache is empty, so every sequence is computed again.

    Steps in flight are forgotten, and so is every block hash, the host's too: a hit on one would be a lie.
    """
    scheduler.in_flight.clear()
    scheduler.steady.clear()
    scheduler.dropped.clear()
    for seq in scheduler.running:
        seq.num_preemptions += 1
        scheduler.enqueue(seq)
    scheduler.running.clear()
    for seq in (seq for request in scheduler.requests.values() for seq in request.seqs if not seq.is_finished):
        seq.block_table.clear()
        seq.forget_computation()
        seq.num_pending_tokens = 0
    scheduler.blocks.reset(scheduler.limits.num_kv_blocks, scheduler.limits.num_host_blocks)


def successor(scheduler: Scheduler) -> Scheduler:
    """A scheduler for the same ranks that knows no request, and counts on where this one stopped.

    Nothing else of it is taken over: whatever broke off in the middle may have left it in any state.
    """
    made = type(scheduler)(scheduler.limits, scheduler.epoch, scheduler.clock)
    made.step_id, made.seq_ids = scheduler.step_id, scheduler.seq_ids
    made.totals, made.cap = scheduler.totals, scheduler.cap
    made.num_preemptions, made.num_swaps = scheduler.num_preemptions, scheduler.num_swaps
    made.blocks.count_on(scheduler.blocks)
    return made
