"""Fixtures of the front end's core: a model's directory without weights, its tokenizer, and clients over them.

`fake_process` puts threads that follow a script in the place of scheduler processes, for `llm` and for whoever asks.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Any

import pytest

from configs.engine import EngineConfig
from nanoengine import AsyncLLM
from nanoengine.engine_client import EngineClient
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import Clock, make_client
from tests.nanoengine.fake_engine import VOCAB_SIZE, FakeEngineProcess, write_model


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig.create(model=str(write_model(tmp_path_factory.mktemp("model")))).resolve()


@pytest.fixture(scope="session")
def model(config: EngineConfig) -> str:
    return str(config.model_dir)


@pytest.fixture(scope="session")
def tokenizer(config: EngineConfig) -> Tokenizer:
    return Tokenizer(str(config.model_dir), expected_vocab_size=VOCAB_SIZE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(config: EngineConfig, tokenizer: Tokenizer, clock: Clock) -> EngineClient:
    return make_client(config, tokenizer, clock)


@pytest.fixture
def fake_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr("nanoengine.scheduler_keeper.EngineProcess", FakeEngineProcess)
    FakeEngineProcess.made.clear()
    yield
    for process in FakeEngineProcess.made:
        process.stop()


@pytest.fixture
def settings() -> dict[str, Any]:
    """Of the engine; a test's own stand in its parameters."""
    return {}


@pytest.fixture
async def llm(model: str, settings: dict[str, Any], fake_process: None) -> AsyncIterator[AsyncLLM]:
    async with AsyncLLM(model, **settings) as llm:
        yield llm


@pytest.fixture
def process(llm: object) -> FakeEngineProcess:
    """The scheduler of `llm`, whichever client that is in a module."""
    return FakeEngineProcess.made[-1]
