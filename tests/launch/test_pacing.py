"""A crowd of requests begins a few at a time, in its order; other paths, and who has gone, wait for nothing."""

from __future__ import annotations

import asyncio
from typing import Any

from launch.server.pacing import BEGIN_BATCH, BeginInTurns


class Crowd:
    """An app that notes who begins, under what number the loop's turn had."""

    def __init__(self) -> None:
        self.begun: list[tuple[str, int]] = []
        self.turn = 0
        self._guarded = BeginInTurns(self._app)

    async def _app(self, scope: Any, receive: Any, send: Any) -> None:
        self.begun.append((scope["name"], self.turn))

    def ask(self, name: str, path: str = "/v1/completions") -> asyncio.Task[None]:
        scope: Any = {"type": "http", "path": path, "name": name}
        return asyncio.ensure_future(self._guarded(scope, None, None))  # type: ignore[arg-type]

    async def turns(self, number: int) -> None:
        for _ in range(number):
            await asyncio.sleep(0)
            self.turn += 1


async def test_a_crowd_begins_a_few_at_a_time_and_in_its_order() -> None:
    crowd = Crowd()
    names = [str(number) for number in range(5 * BEGIN_BATCH + 1)]
    tasks = [crowd.ask(name) for name in names]
    probe = crowd.ask("probe", "/livez")
    await crowd.turns(20)
    assert all(task.done() for task in (*tasks, probe))
    assert [name for name, _ in crowd.begun if name != "probe"] == names
    assert dict(crowd.begun)["probe"] == 0, "a probe passes the crowd"
    turns = [turn for name, turn in crowd.begun if name != "probe"]
    assert max(turns.count(turn) for turn in turns) == BEGIN_BATCH
    await crowd.ask("later")
    assert crowd.begun[-1][0] == "later"


async def test_who_goes_away_in_the_crowd_takes_nobodys_turn() -> None:
    crowd = Crowd()
    tasks = [crowd.ask(str(number)) for number in range(3 * BEGIN_BATCH)]
    await crowd.turns(1)
    for task in tasks[BEGIN_BATCH : 2 * BEGIN_BATCH]:
        task.cancel()
    await crowd.turns(10)
    assert len(crowd.begun) == 2 * BEGIN_BATCH
    assert all(task.done() for task in tasks)


async def test_one_at_a_time_waits_for_nothing() -> None:
    crowd = Crowd()
    for number in range(10):
        await crowd.ask(str(number))
        await crowd.turns(2)
    assert [turn for _, turn in crowd.begun] == [2 * number for number in range(10)]
