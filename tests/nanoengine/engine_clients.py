"""An EngineClient without a transport: what tests send through it, and what they have a scheduler say to it."""

from __future__ import annotations

from typing import Any

from configs.engine import EngineConfig
from nanoengine.engine_client import EngineClient
from nanoengine.journal import RequestJournal
from nanoengine.messages import Deltas, Message, Ready, TokenDelta
from nanoengine.prompts import Prompt
from nanoengine.sampling_params import SamplingParams
from nanoengine.tokenizer import Tokenizer
from tests.nanoengine.fake_engine import MAX_MODEL_LEN

IDS = Prompt(token_ids=[1, 2, 3])


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def make_client(config: EngineConfig, tokenizer: Tokenizer | None, clock: Clock | None = None) -> EngineClient:
    """A client whose scheduler is ready."""
    client = EngineClient(config, tokenizer, "front", clock or Clock())
    client.handle(ready(1))
    return client


def ready(incarnation: int) -> Ready:
    return Ready(incarnation, 8, 16, MAX_MODEL_LEN, "float32", "cpu")


def add(client: EngineClient, prompt: Prompt = IDS, request_id: str | None = None, **params: Any) -> RequestJournal:
    return client.add(client.check(prompt, SamplingParams(**params)), request_id)


def sent(client: EngineClient) -> list[Message]:
    """What waits to be sent; it is taken away."""
    messages = list(client.outbox)
    client.outbox.clear()
    return messages


def tell(
    client: EngineClient, journal: RequestJournal, start: int, ids: list[int], reason: str | None = None, **more: Any
) -> list[RequestJournal]:
    """The scheduler sends tokens of the request's only sequence; returns what has news."""
    return client.handle(Deltas(1, [TokenDelta(journal.wire_id, 0, start, ids, reason, **more)]))


def ids_of(journal: RequestJournal) -> list[int]:
    return journal.output().outputs[0].token_ids
