"""What would have Triton compile a kernel again while requests wait: addresses and strides that change with a batch.

A kernel is specialised to whether a tensor begins at a multiple of 16 bytes, and to integers that are 1 or multiples of
16. A compilation takes seconds, so whatever a step hands to a kernel must look alike in all steps.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch

from workers.attention.triton_backend import TritonBackend
from workers.forward_context import AttentionMetadata
from workers.kernels import attention, is_interpreted
from workers.kernels.sampling import DeviceRows
from workers.sampler import SamplingRows
from workers.staging import Staging

CPU = torch.device("cpu")


@pytest.mark.parametrize("sizes", [(1, 1, 1), (3, 2, 5), (4, 8, 0)])
def test_parts_of_a_transfer_begin_at_16_bytes(sizes: tuple[int, ...]) -> None:
    arrays = tuple(np.arange(size, dtype=np.int64) + 10 * at for at, size in enumerate(sizes))
    arrays += (np.arange(15, dtype=np.int64).reshape(3, 5), np.array([7]))
    base = None
    for array, part in zip(arrays, Staging(CPU).send(arrays), strict=True):
        assert part.shape == array.shape
        assert part.numpy().tolist() == array.tolist()
        base = part.data_ptr() if base is None else base
        assert (part.data_ptr() - base) % 16 == 0


@pytest.mark.parametrize("number", [1, 2, 3, 4, 7])
def test_columns_of_sampling_parameters_begin_at_16_bytes(number: int) -> None:
    each = np.arange(1, number + 1)
    seeds = each.astype(np.uint64)
    rows = SamplingRows(each / 10, each, each / 100, each / 1000, seeds, seeds, seeds)
    sent = DeviceRows.make(rows, CPU)
    np.testing.assert_allclose(sent.temperature.numpy(), each / 10, rtol=1e-6)
    np.testing.assert_allclose(sent.least.numpy(), np.log(each / 1000), rtol=1e-6)
    assert sent.top_k.tolist() == each.tolist()
    assert sent.top_p.tolist() == (each / 100).tolist()
    columns = (sent.temperature, sent.top_k, sent.top_p, sent.least, sent.uniform)
    first = min(column.data_ptr() for column in columns)
    assert {(column.data_ptr() - first) % 16 for column in columns} == {0}
    assert {column.shape for column in columns} == {(number,)}


@pytest.mark.parametrize("num_decodes", [1, 2, 3])
def test_lists_of_a_mixed_step_begin_at_16_bytes(num_decodes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("workers.attention.triton_backend.is_interpreted", lambda: True)
    lens = [1] * num_decodes + [3]
    metadata = AttentionMetadata(
        lens, [5] * len(lens), torch.zeros(sum(lens), dtype=torch.int64), torch.zeros((len(lens), 1)), 16
    )
    plan = TritonBackend(CPU)._make_plan(metadata, torch.zeros(sum(lens), 2, 16), 1)
    assert plan.which is not None
    assert plan.tiles is not None
    assert [each.tolist() for each in plan.which] == [[*range(num_decodes)]] * 2
    assert plan.tiles.tolist() == [num_decodes, num_decodes, 2, 3]
    starts = [each.data_ptr() for each in (*plan.which, plan.tiles)]
    assert {(start - starts[0]) % 16 for start in starts} == {0}


def test_numbers_that_change_from_step_to_step_are_not_compiled_in() -> None:
    """The stride of block tables and the number of shares; neither is a constant of the kernels that take it."""
    for kernel in (attention._decode, attention._merge_splits, attention._prefill):
        # Triton's interpreter keeps what the decorator was told; its compiler has it as an attribute.
        told = kernel.kwargs["do_not_specialize"] if is_interpreted() else kernel.do_not_specialize
        changing = {"table_stride", "splits"} & set(kernel.arg_names)
        assert changing
        assert changing <= set(told)
