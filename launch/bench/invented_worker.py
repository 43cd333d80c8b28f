"""A rank without a model, for `control-plane`: answers each step with invented tokens at once; knows no tensor.

`control_plane.py` names `run_worker` as a string, as the product names its own worker's entry.
"""

from __future__ import annotations

from array import array

import numpy as np

from nanoengine.channel import BlockCounts, RankPort
from nanoengine.step import PREVIOUS_SAMPLE, StepInput, StepOutput, TokenLists

VOCAB_SIZE = 151_936
"""Qwen's: large enough that token ids take the bytes they take in earnest."""

UNBOUNDED_BLOCKS = 2**31 - 1


def invented_output(step: StepInput) -> StepOutput:
    """A token for each row that samples: a cheap function of its last one."""
    decodes, states = step.decodes, step.states
    last = [PREVIOUS_SAMPLE] * len(decodes) if decodes.token_ids is None else decodes.token_ids
    ids = (np.asarray(last, dtype=np.int64) * 31 + 7) % VOCAB_SIZE
    tokens = TokenLists(array("i", ids.astype(np.int32).tobytes()))
    if not states:
        return StepOutput(step.epoch, step.step_id, decodes.seq_ids, tokens)
    others = [[(row.token_ids[-1] * 31 + 7) % VOCAB_SIZE] if row.sample else [] for row in states]
    seq_ids = [*decodes.seq_ids, *(row.seq_id for row in states)]
    return StepOutput(step.epoch, step.step_id, seq_ids, [*tokens, *others])


def run_worker(port: RankPort) -> None:
    """Entry of a rank's process."""
    if port.report_loaded(BlockCounts(UNBOUNDED_BLOCKS), "none", "none") is None:
        return
    port.report_ready()
    for step in port.steps():
        if port.rank == 0:
            port.send_output(invented_output(step))
