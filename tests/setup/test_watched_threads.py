"""Every thread, task, pool and callback of the product, and who sees it die: nothing may end by an exception unseen.

Whoever adds one says here what follows when it raises, and puts an exception into it in
`tests/nanoengine/test_watched.py` or `tests/launch/test_watched_server.py`.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator

from tests.setup.repository import ROOT

# What runs something that its caller does not wait for.
STARTERS = {
    "Thread", "start_new_thread", "Timer", "start_thread", "on_end_of", "ThreadPoolExecutor", "ProcessPoolExecutor",
    "run_in_executor", "create_task", "ensure_future", "TaskGroup", "run_coroutine_threadsafe", "call_soon",
    "call_later", "call_at", "add_reader", "add_writer",
}  # fmt: skip
AWAITED = "its result is taken by the function that started it"
ENDS_PROCESS = "the process ends with code 1, and its owner replaces it"
BREAKS_DOWN = "AsyncLLM.break_down: streams end with an error, the server with code 1, a front end is replaced"
FUTURE = "what it raises is in the future, whose result whoever asked takes"
SEEN = {
    # Ranks.
    ("nanoengine/rank_process.py", "run_rank", "start_thread"): ENDS_PROCESS,
    ("nanoengine/rank_process.py", "_start_reading_ahead", "start_thread"): "logged; the rank reads without it",
    ("workers/structured.py", "GrammarMatchers.__init__", "ThreadPoolExecutor"): FUTURE,
    # Any process of ours.
    ("nanoengine/watched.py", "start_thread", "Thread"): "what whoever starts it says",
    ("nanoengine/processes.py", "on_end_of", "start_thread"): ENDS_PROCESS,
    ("nanoengine/processes.py", "_LastingThread.__init__", "start_thread"): "what waits raises; another one is started",
    ("nanoengine/bootstrap.py", "receive_bootstrap", "on_end_of"): ENDS_PROCESS,
    ("launch/front_end_process.py", "main", "on_end_of"): ENDS_PROCESS,
    ("nanoengine/grammar_process.py", "main", "start_thread"): ENDS_PROCESS,
    # Clients.
    ("nanoengine/grammar_compiler.py", "GrammarCompiler.compile", "ThreadPoolExecutor"): "the request ends with it",
    ("nanoengine/inprocess_executor.py", "InProcessExecutor.start", "ThreadPoolExecutor"): FUTURE,
    ("nanoengine/remote.py", "RemoteEngine.__init__", "ThreadPoolExecutor"): "the request ends with it",
    ("nanoengine/async_llm.py", "AsyncLLM.start", "create_task"): "`start` raises it, and `failure` tells it",
    ("nanoengine/scheduler_keeper.py", "SchedulerKeeper.wait_ready", "start_thread"): "the engine ends with an error",
    ("nanoengine/async_link.py", "AsyncLink.__init__", "add_reader"): BREAKS_DOWN,
    ("nanoengine/async_link.py", "AsyncLink._connect", "add_reader"): BREAKS_DOWN,
    ("nanoengine/async_link.py", "AsyncLink.pump", "call_soon"): BREAKS_DOWN,
    ("nanoengine/async_llm.py", "AsyncLLM.close", "create_task"): "`close` raises it; it is logged",
    ("nanoengine/async_llm.py", "AsyncLLM.engine_view", "create_task"): "`engine_view` raises it",
    ("nanoengine/async_llm.py", "AsyncLLM._wake_some", "call_soon"): BREAKS_DOWN,
    ("nanoengine/async_llm.py", "AsyncLLM._start_watchdog", "call_later"): BREAKS_DOWN,
    # The server.
    ("launch/supervisor.py", "_serve", "create_task"): "the server ends with code 1",
    ("launch/front_end.py", "FrontEnd.run", "create_task"): "the server ends with code 1, or a front end is replaced",
    ("launch/front_end.py", "FrontEnd._load", "create_task"): AWAITED,
    ("launch/front_group.py", "FrontGroup._load", "create_task"): AWAITED,
    # One request of it. uvicorn's own task for a request answers 500 or breaks the connection off, and logs it.
    ("launch/server/events.py", "EventStream.__call__", "create_task"): AWAITED,
    ("launch/server/generation.py", "respond", "ensure_future"): AWAITED,
    ("launch/server/generation.py", "_all_outputs", "create_task"): "what it raises is in the queue that is read",
    ("launch/server/generation.py", "_begin_stream", "ensure_future"): AWAITED,
    ("launch/server/generation.py", "_unless", "create_task"): AWAITED,
    ("launch/server/peers.py", "Relayed.__call__", "ensure_future"): AWAITED,
    ("launch/server/peers.py", "Relayed.__call__", "create_task"): AWAITED,
    ("launch/server/streams.py", "KeptStream.__init__", "create_task"): "its readers get an error",
    ("launch/server/streams.py", "KeptStream._wait_for_reader", "call_later"): "logged; the store's bounds hold",
    ("launch/server/pacing.py", "BeginInTurns._turn", "call_soon"): "all that wait begin at once",
    ("launch/server/pacing.py", "BeginInTurns._next_turn", "call_soon"): "all that wait begin at once",
    ("launch/server/protocol.py", "BoundedProtocol._arm", "call_later"): "logged; the connection stays open",
    ("launch/server/shared_numbers.py", "SharedNumbers._write_soon", "call_later"): "logged; it goes on",
}


def _starts(tree: ast.AST, names: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Function and starter of each call."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield from _starts(node, (*names, node.name))
            continue
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if name in STARTERS:
                yield ".".join(names), name
        yield from _starts(node, names)


def test_each_thread_task_and_callback_is_known_with_what_follows_when_it_dies() -> None:
    found = set()
    for package in ("nanoengine", "workers", "launch"):
        for path in (ROOT / package).rglob("*.py"):
            where = str(path.relative_to(ROOT))
            if not where.startswith("launch/bench/"):  # programs that measure, and no part of a server
                found |= {(where, *each) for each in _starts(ast.parse(path.read_text(encoding="utf-8")))}
    assert found == SEEN.keys()
