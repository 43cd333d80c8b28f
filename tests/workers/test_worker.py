"""A rank's parts put together: devices, communicators, the order of leaving, and the protocol of its process."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.engine import EngineConfig
from configs.errors import ConfigError
from nanoengine.channel import BlockCounts
from nanoengine.control_block import anonymous_file
from nanoengine.step import Epoch, GaveUp, StepInput, StepOutput
from workers import worker as worker_module
from workers.launched_step import LaunchedStep, SampledIds
from workers.parallel import HostCommunicator, SharedMemoryCommunicator, SingleCommunicator, TorchCommunicator
from workers.worker import Worker, create_communicator, create_ranks, pick_device, run_worker

EPOCH = Epoch(1, 1)


def config(**settings: Any) -> EngineConfig:
    return EngineConfig.create(model="demo", **settings)


def gpus(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: number > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: number)


@dataclasses.dataclass
class FakePort:
    """Stands for RankPort: two steps arrive, or the order to leave before anything is allocated."""

    config: EngineConfig
    rank: int = 0
    num_blocks: BlockCounts | None = dataclasses.field(default_factory=lambda: BlockCounts(7, 3))
    collective_fd: int | None = None
    run_dir: Path = Path("/nowhere")
    epoch: Epoch = EPOCH
    num_threads: int = 1
    said: list[Any] = dataclasses.field(default_factory=list)

    @property
    def world_size(self) -> int:
        return self.config.parallel.world_size

    def report_loaded(self, fitting: BlockCounts, dtype: str, device: str) -> BlockCounts | None:
        self.said.append((fitting, dtype, device))
        return self.num_blocks

    def report_ready(self) -> None:
        self.said.append("ready")

    def steps(self, forget: Callable[[], None]) -> Iterator[StepInput]:
        for step_id in (1, 2):
            yield StepInput(self.epoch, step_id, [], [], [])

    def is_command_waiting(self) -> bool:
        return False

    def send_output(self, output: StepOutput) -> None:
        self.said.append(output.step_id)


class FakeRunner:
    """Stands for ModelRunner and writes down what is asked of it."""

    dtype_name = "float32"
    calls: list[Any] = []  # noqa: RUF012

    def __init__(self, config: EngineConfig, device: torch.device, communicator: Any) -> None:
        self.rank = communicator.rank

    def load_model(self) -> None:
        self.calls.append("load_model")

    def max_kv_blocks(self) -> int:
        self.calls.append("max_kv_blocks")
        return 9

    def max_host_blocks(self) -> int:
        return 5

    def allocate(self, num_blocks: int, num_host_blocks: int) -> None:
        self.calls.append(("allocate", num_blocks, num_host_blocks))

    def warm_up(self) -> None:
        self.calls.append("warm_up")

    def launch(self, step: StepInput) -> LaunchedStep:
        return LaunchedStep(step, 0.0, SampledIds.none() if self.rank == 0 else None)

    def __del__(self) -> None:
        self.calls.append("runner gone")


class FakeCommunicator(SingleCommunicator):
    def __init__(self, rank: int) -> None:
        super().__init__()
        self.rank = rank

    def close(self) -> None:
        FakeRunner.calls.append("communicator closed")


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    monkeypatch.setattr(worker_module, "ModelRunner", FakeRunner)
    monkeypatch.setattr(worker_module, "create_communicator", lambda port, device: FakeCommunicator(port.rank))
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    monkeypatch.setattr(FakeRunner, "calls", [])
    return FakeRunner.calls


def test_a_rank_loads_allocates_what_was_agreed_warms_up_and_answers(calls: list[Any]) -> None:
    port = FakePort(config(device="cpu"))
    run_worker(port)  # type: ignore[arg-type]
    assert port.said == [((9, 5), "float32", "cpu"), "ready", 1, 2]
    assert calls[:4] == ["load_model", "max_kv_blocks", ("allocate", 7, 3), "warm_up"]


def test_ranks_other_than_0_send_no_output(calls: list[Any]) -> None:
    port = FakePort(config(device="cpu"), rank=1)
    run_worker(port)  # type: ignore[arg-type]
    assert port.said == [((9, 5), "float32", "cpu"), "ready"]


def test_a_rank_told_to_leave_instead_of_allocating_leaves(calls: list[Any]) -> None:
    port = FakePort(config(device="cpu"), num_blocks=None)
    run_worker(port)  # type: ignore[arg-type]
    assert port.said == [((9, 5), "float32", "cpu")]
    assert ("allocate", 7) not in calls


def test_the_runner_goes_before_the_group_does(calls: list[Any]) -> None:
    """Captured graphs hold collectives; destroyed after the group, they hang the exit."""
    worker = Worker(config(), torch.device("cpu"), FakeCommunicator(0))
    worker.close()
    assert calls == ["runner gone", "communicator closed"]


@pytest.mark.parametrize(
    ("asked", "tp", "number", "device"),
    [
        ("auto", 1, 0, "cpu"),
        ("auto", 2, 1, "cpu"),
        ("auto", 2, 2, "cuda:1"),
        ("cpu", 2, 8, "cpu"),
        ("cuda", 2, 4, "cuda:1"),
    ],
)
def test_every_rank_gets_a_device_of_its_own(
    monkeypatch: pytest.MonkeyPatch, asked: str, tp: int, number: int, device: str
) -> None:
    gpus(monkeypatch, number)
    assert str(pick_device(config(device=asked, tensor_parallel_size=tp), tp - 1)) == device


@pytest.mark.parametrize(("tp", "number"), [(1, 0), (2, 1)])
def test_too_few_gpus_are_a_config_error(monkeypatch: pytest.MonkeyPatch, tp: int, number: int) -> None:
    gpus(monkeypatch, number)
    with pytest.raises(ConfigError, match=rf"GPU for each of {tp} rank.*shows {number}.*device=cpu"):
        pick_device(config(device="cuda", tensor_parallel_size=tp), 0)


def test_the_communicator_fits_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    cpu = torch.device("cpu")
    assert isinstance(create_communicator(FakePort(config()), cpu), SingleCommunicator)  # type: ignore[arg-type]
    fd = anonymous_file("test")
    shared = create_communicator(FakePort(config(tensor_parallel_size=2), collective_fd=fd), cpu)  # type: ignore[arg-type]
    assert isinstance(shared, SharedMemoryCommunicator)
    shared.abort()
    os.close(fd)
    made: list[Any] = []
    monkeypatch.setattr(TorchCommunicator, "__init__", lambda self, *arguments: made.append(arguments))
    port = FakePort(config(tensor_parallel_size=2), rank=1, run_dir=tmp_path, epoch=Epoch(1, 3))
    assert isinstance(create_communicator(port, torch.device("cuda", 1)), TorchCommunicator)  # type: ignore[arg-type]
    assert made == [(1, 2, tmp_path / "store3", torch.device("cuda", 1), 600.0)]


def test_ranks_share_gpus_when_asked_to(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks on two GPUs; NCCL would refuse them, so they meet on the host. With GPUs enough nothing is shared."""
    gpus(monkeypatch, 2)
    sharing = config(device="cuda", tensor_parallel_size=3, share_gpus=True)
    assert [str(pick_device(sharing, rank)) for rank in range(3)] == ["cuda:0", "cuda:1", "cuda:0"]
    fd = anonymous_file("test")
    made = create_communicator(FakePort(sharing, collective_fd=fd), torch.device("cuda", 0))  # type: ignore[arg-type]
    assert isinstance(made, HostCommunicator)
    assert not made.capturable
    made.abort()
    os.close(fd)
    assert str(pick_device(config(device="cuda", tensor_parallel_size=2, share_gpus=True), 1)) == "cuda:1"


class SlowIds(SampledIds):
    """Ids that are there once `arrive` is called."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(0, dtype=torch.int64))
        self.arrived = False

    @property
    def are_there(self) -> bool:
        return self.arrived


def test_a_step_is_launched_before_the_one_before_it_is_finished(calls: list[Any]) -> None:
    """While ids are under way the next step goes to the device; outputs come in order, each of them once."""
    worker = Worker(config(), torch.device("cpu"), FakeCommunicator(0))
    ids = {step_id: SlowIds() for step_id in (1, 2, 3)}

    def launch(step: StepInput) -> LaunchedStep:
        calls.append(("launch", step.step_id))
        return LaunchedStep(step, 0.0, ids[step.step_id])

    worker.runner.launch = launch  # type: ignore[method-assign]

    def outputs(step_id: int, is_more_waiting: bool) -> list[int]:
        def look() -> bool:
            ids[step_id].arrived = not is_more_waiting  # nothing comes: wait for the device
            return is_more_waiting

        made = worker.outputs(StepInput(EPOCH, step_id, [], [], []), look)
        return [output.step_id for output in made if isinstance(output, StepOutput)]

    assert outputs(1, is_more_waiting=True) == []
    assert outputs(2, is_more_waiting=True) == [1]
    assert outputs(3, is_more_waiting=False) == [2, 3]
    assert calls == [("launch", 1), ("launch", 2), ("launch", 3)]


def test_a_step_under_way_is_void_when_all_is_forgotten(calls: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its output would be that of a step that the scheduler has taken back."""
    worker = Worker(config(), torch.device("cpu"), FakeCommunicator(0))
    monkeypatch.setattr(worker.runner, "forget_rows", lambda: None, raising=False)
    step = StepInput(EPOCH, 1, [], [], [])
    monkeypatch.setattr(worker.runner, "launch", lambda step: LaunchedStep(step, 0.0, SlowIds()))
    assert list(worker.outputs(step, lambda: True)) == []
    worker.forget()
    monkeypatch.setattr(worker.runner, "launch", lambda step: LaunchedStep(step, 0.0, SampledIds.none()))
    told = worker.outputs(StepInput(EPOCH, 2, [], [], []), lambda: True)
    assert [output.step_id for output in told] == [2]


def test_a_step_under_way_is_told_of_although_the_next_one_finds_no_memory(
    calls: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The scheduler hears of a step that was given up once it has what came before it."""
    worker = Worker(config(), torch.device("cpu"), SingleCommunicator())
    ids = SlowIds()
    monkeypatch.setattr(worker.runner, "launch", lambda step: LaunchedStep(step, 0.0, ids))
    assert list(worker.outputs(StepInput(EPOCH, 1, [], [], []), lambda: True)) == []
    ids.arrived = True

    def launch(step: StepInput) -> LaunchedStep:
        raise MemoryError

    monkeypatch.setattr(worker.runner, "launch", launch)
    told = list(worker.outputs(StepInput(EPOCH, 2, [], [], []), lambda: False))
    assert [type(each) for each in told] == [StepOutput, GaveUp]
    assert [each.step_id for each in told] == [1, 2]
    assert list(worker.outputs(StepInput(EPOCH, 3, [], [], []), lambda: False)) == [], "it waits to begin anew"


@pytest.mark.parametrize("tp", [1, 2])
def test_ranks_of_one_process_know_each_other(calls: list[Any], tp: int) -> None:
    ranks = create_ranks(config(device="cpu", tensor_parallel_size=tp))
    assert [rank._communicator.rank for rank in ranks] == list(range(tp))
    assert {rank._communicator.world_size for rank in ranks} == {tp}
