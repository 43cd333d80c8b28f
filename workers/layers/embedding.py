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
from workers.native import NativeKernels, NativeLinear
from workers.packed_linear import native_applies
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
        size = shard_size(vocab_size, communicator)
        self._start = communicator.rank * size
        self._num_own = min(size, max(0, vocab_size - self._start))  # the rest of the shard is padding
        if tied_to is None:
            self.weight = vocabulary_shard(vocab_size, hidden_size, communicator, dtype, device)
        else:
            # One storage. On CPU the packed form is a second one: a lookup table cannot be packed.
            self.weight = tied_to.weight
        self.bias = None

    def finish_loading(self, native: NativeKernels | None = None) -> None:
        """See `LinearBase`. The native kernel gives logits in float32, so that they are not rounded on their way."""
        assert self.weight is not None
        if native is None or not native_applies(self.weight):
            super().finish_loading(native)
            return
        self._kernel = NativeLinear(native, self.weight, "wide")
        self.weight = None

    def compute_logits(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """Map (num_rows, hidden_size) to (num_rows, vocab_size) float32 on rank 0, to None on the others."""
        return self._gather_logits(self.forward(hidden))

    def compute_logits_and_argmax(
        self, hidden: torch.Tensor, num_logits: int
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits of the first rows, and of the other ones only which is the largest.

        For the latter ranks exchange (value, id) pairs instead of logits. The lowest id among the largest logits
        wins, as in an argmax over the gathered ones.

        Args:
            hidden: (num_rows, hidden_size).
            num_logits: how many rows are wanted whole, the same on every rank.

        Returns:
            On rank 0 (num_logits, vocab_size) float32 and (num_rows - num_logits,) int64; None for what has no rows,
            and on the other ranks.
        """
        shard = self.forward(hidden)  # (num_rows, shard_size)
        logits = self._gather_logits(shard[:num_logits]) if num_logits > 0 else None
        ids = self._gather_argmax(shard[num_logits:, : self._num_own]) if num_logits < len(shard) else None
        return logits, ids

    def _gather_logits(self, shard: torch.Tensor) -> torch.Tensor | None:
        logits = self._communicator.gather(shard)
        return None if logits is None else logits[:, : self._vocab_size].float()

    def _gather_argmax(self, shard: torch.Tensor) -> torch.Tensor | None:
        if shard.shape[1]:
            at = _argmax(shard)[:, None]  # (num_rows, 1)
            # float64 holds every id and the value of every dtype, so that one exchange does.
            pairs = torch.cat((shard.gather(1, at).double(), (at + self._start).double()), 1)
        else:  # nothing but padding: no more than an -inf that comes last
            pairs = torch.tensor([-torch.inf, 0.0], dtype=torch.float64, device=shard.device).expand(len(shard), 2)
        everyone = self._communicator.gather(pairs[None], dim=0)  # (world_size, num_rows, 2)
        if everyone is None:
            return None
        best = everyone[:, :, 0].argmax(0, keepdim=True)  # the first of equal ranks has the lower ids
        return everyone[:, :, 1].gather(0, best)[0].long()


def _argmax(logits: torch.Tensor) -> torch.Tensor:
    """(num_rows,) int64: the first of the largest logits of each row; numpy is several times as fast as torch."""
    if logits.device.type != "cpu":
        return logits.argmax(dim=-1)
    return torch.tensor([int(row.float().numpy().argmax()) for row in logits])


def shard_size(vocab_size: int, communicator: Communicator) -> int:
    """Rows of the vocabulary on each rank, padding included."""
    return -(-vocab_size // communicator.world_size)


def vocabulary_shard(
    vocab_size: int, hidden_size: int, communicator: Communicator, dtype: torch.dtype, device: torch.device
) -> ShardedParameter:
    """This rank's rows of a (vocab_size, hidden_size) weight, padded with zero rows to the size all ranks share."""
    size = shard_size(vocab_size, communicator)
    start = min(communicator.rank * size, vocab_size)
    shard = Shard((vocab_size, hidden_size), 0, start, min(size, vocab_size - start))
    return ShardedParameter((size, hidden_size), {"": shard}, dtype, device)
