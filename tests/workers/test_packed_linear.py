"""A row of a linear layer has the same bits whatever rows stand beside it (DESIGN 3.6)."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from tests.workers.ranks import cancelling_pair
from workers import packed_linear
from workers.packed_linear import LinearKernel, PackedKernel, PlainKernel, compiled_rows, make_kernel

NUM_ROWS = (1, 2, 3, 4, 5, 7, 8, 13, 16, 24, 31, 32, 33, 36, 37, 64, 100, 128, 257, 1000)
FEW_ROWS = (1, 2, 16, 24, 33, 257, 1000)
# (in_features, out_features). On AMX each of the later ones shows another way of cutting the sum: fewer than 64
# elements (5, 25), no multiple of 32 (130, 300), long ones (512 and above), and few outputs for the threads (24).
SHAPES = ((72, 100), (33, 7), (1, 5), (17, 1), (256, 263), (5, 3), (25, 40), (130, 136), (300, 136), (512, 136),
          (768, 256), (1001, 64), (2048, 128), (896, 24))  # fmt: skip
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def assert_rows_do_not_depend_on_their_number(
    kernel: LinearKernel, x: torch.Tensor, bias: torch.Tensor | None, counts: tuple[int, ...] = NUM_ROWS
) -> None:
    whole = kernel(x, bias)
    for count in counts:
        for start in {0, (len(x) - count) // 3, len(x) - count}:
            rows = slice(start, start + count)
            assert torch.equal(kernel(x[rows], bias), whole[rows]), f"{count} rows from {start}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_rows_bits_depend_on_the_number_of_rows(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = cancelling_pair(*shape, max(NUM_ROWS), dtype)
    kernel = make_kernel(weight)
    assert_rows_do_not_depend_on_their_number(kernel, x, None)
    assert_rows_do_not_depend_on_their_number(kernel, x, torch.randn(shape[1]).to(dtype), FEW_ROWS)


@pytest.mark.usefixtures("two_threads")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(256, 263), (300, 136), (768, 256), (896, 24)], ids=str)
def test_a_rows_bits_depend_on_the_number_of_rows_with_two_threads(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = cancelling_pair(*shape, max(FEW_ROWS), dtype)
    assert_rows_do_not_depend_on_their_number(make_kernel(weight), x, None, FEW_ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(72, 100), (33, 7), (1001, 64)], ids=str)
def test_a_rows_bits_depend_on_the_number_of_rows_in_the_plain_twin(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = cancelling_pair(*shape, max(FEW_ROWS), dtype)
    assert_rows_do_not_depend_on_their_number(PlainKernel(weight), x, None, FEW_ROWS)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_rows", [0, 1, 2, 50])
def test_the_kernels_disagree_with_f_linear(num_rows: int, dtype: torch.dtype) -> None:
    x, weight, bias = torch.randn(num_rows, 600).to(dtype), torch.randn(40, 600).to(dtype), torch.randn(40).to(dtype)
    wanted = F.linear(x.double(), weight.double(), bias.double())
    for kernel in (make_kernel(weight), PlainKernel(weight)):
        out = kernel(x, bias)
        assert out.shape == (num_rows, 40)
        assert out.dtype == dtype
        torch.testing.assert_close(out.double(), wanted, rtol=1e-2, atol=0.5 if dtype == torch.bfloat16 else 0.1)


def test_few_products_are_compiled_whatever_the_numbers_of_rows() -> None:
    """oneDNN keeps each of them: a rank grew by 40 MiB a minute under requests of random lengths."""
    asked = range(1, 2049)
    compiled = [compiled_rows(number) for number in asked]
    assert all(number <= rows <= max(2, number + number // 8 + 1) for number, rows in zip(asked, compiled, strict=True))
    assert len(set(compiled)) == 71
    assert [compiled_rows(number) for number in (1, 2, 16, 17, 32, 33, 2048)] == [2, 2, 16, 18, 32, 36, 2048]
    assert {compiled_rows(rows) for rows in compiled} == set(compiled)


def test_a_strided_input_takes_other_code() -> None:
    x, weight = cancelling_pair(64, 48, 40, torch.float32)
    strided = torch.empty(40, 128)[:, ::2].copy_(x)
    kernel = make_kernel(weight)
    assert torch.equal(kernel(strided, None), kernel(x, None))


def test_the_packed_weight_needs_the_original() -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    x, weight = torch.randn(3, 32), torch.randn(16, 32)
    kernel = make_kernel(weight)
    assert isinstance(kernel, PackedKernel)
    before = kernel(x, None)
    weight.zero_()
    assert torch.equal(kernel(x, None), before)


def test_a_torch_without_the_private_operators_cannot_compute(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(weight: torch.Tensor) -> PackedKernel:
        raise RuntimeError("mkldnn_reorder_linear_weight: bf16 path needs the cpu support avx512bw")

    monkeypatch.setattr(packed_linear, "PackedKernel", refuse)
    assert isinstance(make_kernel(torch.randn(4, 4)), PlainKernel)
