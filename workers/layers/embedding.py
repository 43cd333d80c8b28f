"""The token embedding and the language-model head, split by vocabulary; they know no model and no tokenizer.

The vocabulary is padded to a multiple of the number of ranks, so that all shards have one size. Padding rows are
zero; their logits are cut off after the gather, so a padded id can never be sampled.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from workers.layers.linear import LinearBase, native_linear
from workers.layers.parameter import Shard, ShardedParameter, WeightStore
from workers.native import NativeKernels, NativeLinear
from workers.parallel import Communicator


class VocabParallelEmbedding(nn.Module):
    """Looks up the rows that lie on this rank and adds the ranks' results; one of them is not zero.

    Args:
        vocab_size: rows of the whole table.
        hidden_size: columns of it.
        communicator: this rank's.
        dtype: of the table.
        device: where it lies.
        native: kernels of a head that is tied to it. Where they apply, the table lies in the head's packed form alone.

    Attributes:
        packed: that form.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        native: NativeKernels | None = None,
    ) -> None:
        super().__init__()
        self._communicator = communicator
        self._size = shard_size(vocab_size, communicator)
        self._start = communicator.rank * self._size
        self.packed = packed_head(vocab_size, hidden_size, communicator, dtype, native)
        self.weight = vocabulary_shard(vocab_size, hidden_size, communicator, dtype, device, self.packed)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Map (num_tokens,) int64 ids to (num_tokens, hidden_size), whole on every rank."""
        if self._communicator.world_size == 1:
            return self._look_up(input_ids)
        local = input_ids - self._start
        elsewhere = (local < 0) | (local >= self._size)
        hidden = self._look_up(local.masked_fill(elsewhere, 0))
        return self._communicator.all_reduce(hidden.masked_fill_(elsewhere[:, None], 0))

    def _look_up(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.weight) if self.packed is None else self.packed.rows(ids)


class ParallelLMHead(LinearBase):
    """Hidden states to logits. Tied to an embedding, it takes that layer's weight; untied, it has its own.

    The native kernel gives logits in float32, so that they are not rounded on their way.
    """

    def __init__(
        self,
        vocab_size: int,
        hidden_size: int,
        communicator: Communicator,
        dtype: torch.dtype,
        device: torch.device,
        tied_to: VocabParallelEmbedding | None = None,
        native: NativeKernels | None = None,
    ) -> None:
        super().__init__()
        self._communicator, self._vocab_size = communicator, vocab_size
        size = shard_size(vocab_size, communicator)
        self._start = communicator.rank * size
        self._num_own = min(size, max(0, vocab_size - self._start))  # the rest of the shard is padding
        if tied_to is None:
            self._kernel = packed = packed_head(vocab_size, hidden_size, communicator, dtype, native)
            self.weight = vocabulary_shard(vocab_size, hidden_size, communicator, dtype, device, packed)
        else:
            # One storage. What oneDNN packs is a second one: it looks up no rows.
            self._kernel, self.weight = tied_to.packed, tied_to.weight
        self.bias = None

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


def packed_head(
    vocab_size: int, hidden_size: int, communicator: Communicator, dtype: torch.dtype, native: NativeKernels | None
) -> NativeLinear | None:
    """What packs and multiplies by this rank's rows of a head, where `native` is given and applies."""
    return native_linear(native, (shard_size(vocab_size, communicator), hidden_size), dtype, "wide")


def vocabulary_shard(
    vocab_size: int,
    hidden_size: int,
    communicator: Communicator,
    dtype: torch.dtype,
    device: torch.device,
    store: WeightStore | None = None,
) -> ShardedParameter:
    """This rank's rows of a (vocab_size, hidden_size) weight, padded with zero rows to the size all ranks share."""
    size = shard_size(vocab_size, communicator)
    start = min(communicator.rank * size, vocab_size)
    shard = Shard((vocab_size, hidden_size), 0, start, min(size, vocab_size - start))
    return ShardedParameter((size, hidden_size), {"": shard}, dtype, device, store)
