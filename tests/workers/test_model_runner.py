"""ModelRunner on tiny checkpoints: bits whatever the batch, ids against transformers, previous samples, warm-up."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from configs.engine import EngineConfig
from configs.errors import CapacityError, EngineError
from nanoengine.step import (
    DEVICE_TO_DEVICE,
    PREVIOUS_SAMPLE,
    Epoch,
    RowExtras,
    RowParams,
    SequenceState,
    StepInput,
    StepOutput,
)
from tests.workers.tiny_models import load_reference, make_tiny_checkpoint
from workers.input_batch import Batch
from workers.model_runner import ModelRunner
from workers.parallel import SingleCommunicator, ThreadCommunicator

CPU = torch.device("cpu")
GREEDY = RowParams(0.0, 0, 1.0, 0.0, 0, 0)
RANDOM = RowParams(1.0, 0, 1.0, 0.0, 11, 0)
BLOCK_SIZE, NUM_BLOCKS = 16, 150


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Qwen3 with grouped heads; 263 tokens."""
    return make_tiny_checkpoint(tmp_path_factory.mktemp("tiny"), "qwen3")


def make_config(path: Path, dtype: str = "float32", **settings: object) -> EngineConfig:
    settings = {"block_size": BLOCK_SIZE, "num_kv_blocks": NUM_BLOCKS, "max_model_len": 1024, **settings}
    return EngineConfig.create(
        model=str(path), dtype=dtype, skip_tokenizer_init=True, device="cpu", **settings
    ).resolve()


def make_runner(path: Path, dtype: str = "float32", **settings: object) -> ModelRunner:
    runner = ModelRunner(make_config(path, dtype, **settings), CPU, SingleCommunicator())
    runner.load_model()
    runner.allocate(runner.max_kv_blocks())
    return runner


def tokens(length: int, seed: int = 0) -> list[int]:
    return torch.randint(263, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def table(seq_id: int, length: int) -> list[int]:
    """Block ids that go downwards and differ between sequences 0, 1 and 2."""
    return [NUM_BLOCKS - 1 - 3 * i - seq_id for i in range(-(-length // BLOCK_SIZE))]


@dataclasses.dataclass
class Steps:
    """Counts the steps of one runner."""

    runner: ModelRunner
    step_id: int = 0

    def step(self, *rows: SequenceState, finished: tuple[int, ...] = (), copies: tuple = ()) -> StepInput:
        self.step_id += 1
        return StepInput(Epoch(1, 1), self.step_id, list(copies), list(rows), list(finished))

    def logits(self, *rows: SequenceState, finished: tuple[int, ...] = ()) -> torch.Tensor | None:
        return self.runner.compute_logits(self.step(*rows, finished=finished))[1]

    def run(self, *rows: SequenceState, **more: tuple) -> list[list[int]]:
        output = self.runner.execute(self.step(*rows, **more))
        assert output is not None
        return output.token_ids


def chunk(
    seq_id: int, ids: list[int], first: int, end: int, params: RowParams | None = GREEDY, sample: bool = True
) -> SequenceState:
    """Tokens first..end of a sequence; the whole table and the parameters with position 0."""
    fresh = first == 0
    return SequenceState(
        seq_id,
        ids[first:end],
        first,
        table(seq_id, len(ids)) if fresh else [],
        sample,
        params=params if fresh else None,
    )


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_logits_bits_do_not_depend_on_chunks_batch_or_cache(checkpoint: Path, dtype: str) -> None:
    """Chunks of 1, 3, 7, 64 and all, alone and beside other sequences, a resumed one and a cached prefix."""
    ids, others = tokens(150), [tokens(90, 1), tokens(75, 2)]
    steps = Steps(make_runner(checkpoint, dtype))
    (alone,) = steps.logits(chunk(0, ids, 0, 150))
    for size in (1, 3, 7, 64):
        for first in range(0, 150, size):
            last = steps.logits(chunk(0, ids, first, min(first + size, 150)))
        assert torch.equal(last[0], alone), f"chunks of {size}"
    for size in (7, 64):  # a decode and a chunk beside it, in changing order
        steps.logits(chunk(1, others[0], 0, 70), chunk(2, others[1], 0, 5))
        for step, first in enumerate(range(0, 150, size)):
            own = chunk(0, ids, first, min(first + size, 150))
            decode = chunk(1, others[0], 70 + step % 20, 71 + step % 20) if step < 20 else None
            prefill = chunk(2, others[1], 5 + 3 * step, 8 + 3 * step) if step < 20 else None
            rows = [row for row in ((decode, own, prefill) if step % 2 else (prefill, decode, own)) if row]
            last = steps.logits(*rows)
        assert torch.equal(last[rows.index(own)], alone), f"mixed, chunks of {size}"
    # A new row that finds 144 tokens in the cache, as after a prefix hit; then a lone last token.
    for cached in (144, 149):
        hit = SequenceState(5, ids[cached:], cached, table(0, 150), True, params=GREEDY)
        (last,) = steps.logits(hit, finished=(5,))
        assert torch.equal(last, alone), f"{cached} cached"
    assert steps.runner.dtype_name == dtype


def test_every_row_of_a_batch_of_decodes_has_the_bits_it_has_alone(checkpoint: Path) -> None:
    """1 to 40 sequences that decode together: matrix libraries pick kernels by the number of rows."""
    prompts = [tokens(3 + i, seed=i) for i in range(40)]

    def row(i: int) -> SequenceState:
        return SequenceState(i, prompts[i], 0, [3 * i, 3 * i + 1, 3 * i + 2], True, params=GREEDY)

    steps = Steps(make_runner(checkpoint))
    alone = [steps.logits(row(i))[0] for i in range(40)]
    for count in (2, 3, 5, 17, 40):
        together = steps.logits(*[row(i) for i in range(count)])
        assert all(torch.equal(together[i], alone[i]) for i in range(count)), count


def generate(
    runner: ModelRunner, prompt: list[int], count: int, params: RowParams, ahead: bool, extras: RowExtras | None = None
) -> list[int]:
    """Tokens of one sequence; with `ahead` every decode leaves its token to the step before."""
    steps = Steps(runner)
    whole = table(0, len(prompt) + count)
    first = SequenceState(0, prompt, 0, whole, True, len(prompt), params, extras, prompt if extras else [])
    out = steps.run(first)[0]
    for _ in range(count - 1):
        token = PREVIOUS_SAMPLE if ahead else out[-1]
        out += steps.run(SequenceState(0, [token], len(prompt) + len(out) - 1, [], True))[0]
    steps.run(finished=(0,))
    return out


def test_greedy_ids_equal_transformers(checkpoint: Path) -> None:
    prompt = tokens(37)
    expected = load_reference(checkpoint).generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
    assert generate(make_runner(checkpoint), prompt, 12, GREEDY, ahead=False) == expected[0, 37:].tolist()


def test_logits_equal_transformers(checkpoint: Path) -> None:
    """Within 1e-4 of the largest, across the kernel's key tile of 512."""
    ids = tokens(700)
    with torch.inference_mode():
        expected = load_reference(checkpoint)(torch.tensor([ids])).logits[0, -1]
    (ours,) = Steps(make_runner(checkpoint)).logits(chunk(0, ids, 0, 700))
    assert (ours - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("params", [GREEDY, RANDOM])
def test_previous_sample_equals_the_value(checkpoint: Path, params: RowParams) -> None:
    """A step submitted before the one before it returned computes the same."""
    runner = make_runner(checkpoint)
    ids = generate(runner, tokens(20), 8, params, ahead=False)
    assert generate(runner, tokens(20), 8, params, ahead=True) == ids
    extras = RowExtras(presence_penalty=2.0, repetition_penalty=3.0, bad_words=((ids[0], ids[1]),))
    others = generate(runner, tokens(20), 8, params, ahead=False, extras=extras)
    assert others != ids
    assert generate(runner, tokens(20), 8, params, ahead=True, extras=extras) == others, "its past lacks a sample"


def test_parameters_that_look_back_need_the_past(checkpoint: Path) -> None:
    """Trap 54: without the tokens behind a prefix hit a penalty would be wrong, silently."""
    extras = RowExtras(repetition_penalty=1.5)
    with pytest.raises(EngineError, match="look at its past"):
        Steps(make_runner(checkpoint)).run(SequenceState(0, [1, 2], 0, [1], True, 2, GREEDY, extras, [1]))


def test_a_seed_gives_the_same_tokens_in_any_batch_and_after_a_resumption(checkpoint: Path) -> None:
    """The counter's position is absolute, so prompt and output computed again draw what they drew (traps 14, 44)."""
    runner, prompt = make_runner(checkpoint), tokens(20)
    ids = generate(runner, prompt, 8, RANDOM, ahead=False)
    steps = Steps(runner)
    for done in range(8):
        resumed = SequenceState(0, prompt + ids[:done], 0, table(0, 28), True, params=RANDOM)
        other = SequenceState(1, tokens(5, done), 0, table(1, 28), True, params=RANDOM._replace(seed=done))
        assert steps.run(other, resumed)[1] == [ids[done]]


def test_ranks_agree_and_only_rank_0_answers(checkpoint: Path) -> None:
    """Two ranks as threads, previous samples included: rank 0 tells the other what it drew."""
    config = make_config(checkpoint, tensor_parallel_size=2)
    expected = generate(make_runner(checkpoint), tokens(20), 6, GREEDY, ahead=False)
    answers: list[object] = [None, None]

    def rank(communicator: ThreadCommunicator) -> None:
        runner = ModelRunner(config, CPU, communicator)
        runner.load_model()
        runner.allocate(runner.max_kv_blocks())
        runner.warm_up()
        steps, outputs = Steps(runner), []
        rows = [SequenceState(0, tokens(20), 0, table(0, 26), True, params=GREEDY)]
        rows += [SequenceState(0, [PREVIOUS_SAMPLE], 20 + i, [], True) for i in range(5)]
        outputs = [runner.execute(steps.step(row)) for row in rows]
        answers[communicator.rank] = outputs

    run_in_threads(rank, ThreadCommunicator.group(2))
    assert answers[1] == [None] * 6
    assert isinstance(answers[0], list)
    assert [output.token_ids[0][0] for output in answers[0] if isinstance(output, StepOutput)] == expected


def test_ranks_that_keep_greedy_rows_logits_answer_otherwise(checkpoint: Path) -> None:
    """Greedy, random and telling rows mixed, decoding from samples of the step before, at tp 2 with pairs and without.

    Each rank decides from the step alone which rows it keeps; were they to differ, they would wait for each other.
    """
    config = make_config(checkpoint, tensor_parallel_size=2)
    told = RowExtras(num_logprobs=2)
    answers: dict[bool, list[tuple[list[list[int]], dict]]] = {True: [], False: []}

    def rank(communicator: ThreadCommunicator) -> None:
        for all_logits in answers:
            runner = ModelRunner(config, CPU, communicator)
            assert not runner.all_logits
            runner.all_logits = all_logits
            runner.load_model()
            runner.allocate(runner.max_kv_blocks())
            steps = Steps(runner)
            rows = [
                SequenceState(0, tokens(20), 0, table(0, 26), True, 20, GREEDY),
                SequenceState(1, tokens(9, 1), 0, table(1, 26), True, 9, RANDOM),
                SequenceState(2, tokens(5, 2), 0, table(2, 26), True, 5, GREEDY, told),
            ]
            lengths = [20, 9, 5]
            for i in range(5):
                output = runner.execute(steps.step(*rows))
                if output is not None:
                    answers[all_logits].append((output.token_ids, output.logprobs))
                order = ([0, 1, 2], [2, 0], [0], [1, 0, 2])[i % 4]  # all that a step may hold, greedy rows alone too
                seen = [row.seq_id for row in rows]
                for seq_id in seen:
                    lengths[seq_id] += i > 0
                rows = [
                    SequenceState(seq_id, [PREVIOUS_SAMPLE if seq_id in seen else 7], lengths[seq_id], [], True)
                    for seq_id in order
                ]

    run_in_threads(rank, ThreadCommunicator.group(2))
    assert answers[True] == answers[False]
    assert [len(ids) for ids, _ in answers[True]] == [3, 3, 2, 1, 3]


def run_in_threads(rank: Callable[[ThreadCommunicator], None], communicators: list[ThreadCommunicator]) -> None:
    threads = [threading.Thread(target=rank, args=(communicator,)) for communicator in communicators]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_partial_prompts_are_not_sampled(checkpoint: Path) -> None:
    """Trap 11, and a step in which nobody samples."""
    ids, steps = tokens(30), Steps(make_runner(checkpoint))
    assert steps.run(chunk(0, ids, 0, 9, sample=False)) == [[]]
    out = steps.run(chunk(0, ids, 9, 20, sample=False), chunk(1, ids, 0, 5))
    assert [len(row) for row in out] == [0, 1]


def test_a_step_that_only_drops_rows_is_legal(checkpoint: Path) -> None:
    steps = Steps(make_runner(checkpoint))
    steps.run(chunk(0, tokens(5), 0, 5))
    assert steps.run(finished=(0, 99)) == []
    with pytest.raises(EngineError, match="sequence 0 is unknown"):
        steps.run(SequenceState(0, [1], 5, [], True))


def test_a_previous_sample_that_was_never_made_is_refused(checkpoint: Path) -> None:
    """Only the step right before counts; anything else would continue with a stale token."""
    steps = Steps(make_runner(checkpoint))
    steps.run(chunk(0, tokens(5), 0, 5), chunk(1, tokens(9), 0, 5))
    steps.run(chunk(1, tokens(9), 5, 6))
    with pytest.raises(EngineError, match="sequence 0 continues a sample"):
        steps.run(SequenceState(0, [PREVIOUS_SAMPLE], 5, [], True))


def test_copies_come_before_the_forward_pass(checkpoint: Path) -> None:
    """A fork: the child's last block is a copy, and computes the same bits (DESIGN.md, 2)."""
    ids, steps = tokens(20), Steps(make_runner(checkpoint))
    expected = steps.run(chunk(0, ids, 0, 20), finished=())[0]
    first, last = table(0, 20)
    child = SequenceState(1, ids[19:], 19, [first, 1], True, params=GREEDY)
    assert steps.run(child, copies=((DEVICE_TO_DEVICE, last, 1),)) == [expected]


@pytest.mark.parametrize(
    "settings",
    [{}, {"max_model_len": 1}, {"num_kv_blocks": 1, "block_size": 1}, {"max_num_batched_tokens": 1}, {"block_size": 7}],
)
def test_warm_up_leaves_no_row_and_fits_any_setting(checkpoint: Path, settings: dict[str, int]) -> None:
    runner = make_runner(checkpoint, **settings)
    runner.warm_up()
    runner.warm_up_mixed()  # on a GPU a part of it
    assert len(runner._batch) == 0
    with pytest.raises(EngineError, match="unknown"):
        Steps(runner).run(SequenceState(-1, [1], 0, [], True))


def test_warm_up_runs_decodes_of_few_and_of_many_keys(checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each is a kernel of its own on a GPU, which would be compiled while requests wait."""
    runner = make_runner(checkpoint)
    seen: list[tuple[list[int], list[int]]] = []
    forward = runner._forward

    def watched(batch: Batch, caches: list[torch.Tensor]) -> torch.Tensor | None:
        seen.append((batch.metadata.query_lens, batch.metadata.seq_lens))
        return forward(batch, caches)

    monkeypatch.setattr(runner, "_forward", watched)
    runner.warm_up_mixed()
    assert seen == [([4], [4]), ([1, 160], [5, 160]), ([1, 4], [161, 4]), ([1], [162])]


def test_the_largest_step_runs_on_one_block(checkpoint: Path) -> None:
    """What a GPU's memory is measured with; here only that it runs."""
    make_runner(checkpoint, max_num_seqs=10, max_num_batched_tokens=150)._run_largest_step()


def test_more_blocks_than_memory_is_refused(checkpoint: Path) -> None:
    with pytest.raises(CapacityError, match="num_kv_blocks=2000000000 needs"):
        make_runner(checkpoint, num_kv_blocks=2_000_000_000)
