"""Fixtures of the front end's core: a model's directory without weights, its tokenizer, and a client over them."""

from __future__ import annotations

import pytest

from configs.engine import EngineConfig
from nanoengine.engine_client import EngineClient
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.engine_clients import Clock, make_client
from tests.nanoengine.fake_engine import VOCAB_SIZE, write_model


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> EngineConfig:
    return EngineConfig.create(model=str(write_model(tmp_path_factory.mktemp("model")))).resolve()


@pytest.fixture(scope="session")
def tokenizer(config: EngineConfig) -> Tokenizer:
    return Tokenizer(str(config.model_dir), expected_vocab_size=VOCAB_SIZE)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def client(config: EngineConfig, tokenizer: Tokenizer, clock: Clock) -> EngineClient:
    return make_client(config, tokenizer, clock)
