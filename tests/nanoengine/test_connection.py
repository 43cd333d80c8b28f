"""The connection to the scheduler, where a message cannot be sent."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import zmq

from configs.engine import EngineConfig
from nanoengine.connection import SchedulerConnection
from nanoengine.engine_client import EngineClient
from nanoengine.messages import AddRequest, decode
from nanoengine.prompts import Prompt
from tests.nanoengine.fake_engine import write_model


@pytest.fixture
def client(tmp_path: Path) -> EngineClient:
    config = EngineConfig.create(model=str(write_model(tmp_path / "model")), skip_tokenizer_init=True).resolve()
    return EngineClient(config, None, "front")


@pytest.fixture
def router(tmp_path: Path) -> Iterator[zmq.Socket[bytes]]:
    with zmq.Context() as context, context.socket(zmq.ROUTER) as socket:
        socket.bind(f"ipc://{tmp_path}/front")
        yield socket


def test_what_cannot_be_sent_fails_alone(client: EngineClient, router: zmq.Socket[bytes], tmp_path: Path) -> None:
    """It must not stay in front of everybody else's messages for ever."""
    connection = SchedulerConnection(f"ipc://{tmp_path}/front", client)
    checked = client.check(Prompt(token_ids=[1, 2]))
    bad, good = client.add(checked), client.add(checked)
    first = client.outbox[0]
    assert isinstance(first, AddRequest)
    first.seed = 2**70
    updated, _ = connection.pump()
    assert updated == [bad]
    assert bad.finished
    assert "cannot be sent" in str(bad.failure)
    assert router.poll(2000)
    _, frame = router.recv_multipart()
    message = decode(frame)
    assert isinstance(message, AddRequest)
    assert message.request_id == good.wire_id
    assert client.num_unfinished == 1
    assert connection.pump()[0] == []
    connection.close()
