"""How ranks work together: splitting dimensions and the collectives between ranks; knows no model.

The communicator is an object handed to the layers, never a module global, so that ranks can also be threads. On CPU
every sum is taken in rank order with float32 in between, so its bits depend neither on timing nor on the batch.
"""

from workers.parallel.base import (
    Communicator,
    SingleCommunicator,
    StepGivenUp,
    divide,
    divide_kv_heads,
    sum_in_rank_order,
)
from workers.parallel.host import HostCommunicator
from workers.parallel.shared_memory import SharedMemoryCommunicator
from workers.parallel.threads import ThreadCommunicator
from workers.parallel.torch_distributed import TorchCommunicator

__all__ = [
    "Communicator",
    "HostCommunicator",
    "SharedMemoryCommunicator",
    "SingleCommunicator",
    "StepGivenUp",
    "ThreadCommunicator",
    "TorchCommunicator",
    "divide",
    "divide_kv_heads",
    "sum_in_rank_order",
]
