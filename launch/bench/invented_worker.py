"""A rank without a model, for `control-plane`: answers each step with invented tokens at once; knows no tensor.

`control_plane.py` names `run_worker` as a string, as the product names its own worker's entry.
"""

from __future__ import annotations

from nanoengine.channel import BlockCounts, RankPort
from nanoengine.step import StepInput, StepOutput

VOCAB_SIZE = 151_936
"""Qwen's: large enough that token ids take the bytes they take in earnest."""

UNBOUNDED_BLOCKS = 2**31 - 1


def invented_tokens(step: StepInput) -> list[list[int]]:
    """A token for each row that samples: a cheap function of its last one."""
    return [[(row.token_ids[-1] * 31 + 7) % VOCAB_SIZE] if row.sample else [] for row in step.rows]


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process."""
    if port.report_loaded(BlockCounts(UNBOUNDED_BLOCKS), "none", "none") is None:
        return
    port.report_ready()
    for step in port.steps():
        if port.rank == 0:
            port.send_output(
                StepOutput(step.epoch, step.step_id, [row.seq_id for row in step.rows], invented_tokens(step))
            )
