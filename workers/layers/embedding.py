"""The token embedding and the language-model head, split by vocabulary; they know no model and no tokenizer.

The vocabulary is padded to a multiple of the number of ranks, so that all shards have one size. Padding rows are
zero; their logits are cut off after the gather, so a padded id can never be sampled.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from workers.layers.linear import LinearBase
from workers.layers.parameter import Shard, ShardedParameter
from workers.parallel import Communicator


class VocabParallelEmbedding(nn.Module):
    """Looks up the rows that lie on this rank and adds the ranks' results; one of them is not zero."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__()
        self._communicator = communicator
        self.weight = vocabulary_shard(vocab_size, hidden_size, communicator, dtype, device)
        self._size = self.weight.shape[0]
        self._start = communicator.rank * self._size

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens,) int64 ids to (num_tokens, hidden_size), whole on every rank."""
        if self._communicator.world_size == 1:
            return F.embedding(input_ids, self.weight)
        local = input_ids - self._start
        elsewhere = (local < 0) | (local >= self._size)
        hidden = F.embedding(local.masked_fill(elsewhere, 0), self.weight)
        return self._communicator.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))


class ParallelLMHead(LinearBase):
    """Hidden states to logits. Tied to an embedding, it takes that layer's weight; untied, it has its own."""

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        tied_to: VocabParallelEmbedding | None = None,
    ) -> None:
        super().__init__()
        self._communicator, self._vocab_size = communicator, vocab_size
        if tied_to is None:
            self.weight = vocabulary_shard(vocab_size, hidden_size, communicator, dtype, device)
        else:
            # One storage. On CPU the packed form is a second one: a lookup table cannot be packed.
            self.weight = tied_to.weight
        self.bias = None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Map (num_rows, hidden_size) to (num_rows, vocab_size) float32 on rank 0, to None on the others."""
        logits = self._communicator.gather(self.forward(hidden))
        return None if logits is None else logits[:, : self._vocab_size].float()


def vocabulary_shard(
    vocab_size: int, hidden_size: int, communicator: Communicator, dtype: torch.dtype, device: torch.device
) -> ShardedParameter:
    """This rank's rows of a (vocab_size, hidden_size) weight, padded with zero rows to the size all ranks share."""
    size = -(-vocab_size // communicator.world_size)
    start = min(communicator.rank * size, vocab_size)
    shard = Shard((vocab_size, hidden_size), 0, start, min(size, vocab_size - start))
    return ShardedParameter((size, hidden_size), {"": shard}, dtype, device)
