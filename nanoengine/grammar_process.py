"""The process in which grammars are compiled for checking, so that a hostile one can be killed; knows no request.

It reads JSON lines (`StructuredOutputsParams.to_dict()`) from a socket and answers each with a line: the grammar as
llguidance reads it, or what is wrong with it. A grammar is not only compiled: the first tokens of some output are
walked through with it, because a lazy automaton shows its cost only then. The other side, with the deadline, is
`nanoengine.grammar_compiler`.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import llguidance

from configs.errors import RequestError, to_wire
from nanoengine import processes
from nanoengine.grammar import error_of, load_tokenizer, new_matcher
from nanoengine.structured_outputs import FIELD, StructuredOutputsParams
from nanoengine.watched import start_thread

# What compiling may take of memory, beside what the process has with its tokenizer. A worker has more.
MEMORY_BYTES = 2**30
# The same of the stack: less than any thread that will run the matcher has, so that too deep a grammar ends here.
STACK_BYTES = 2**20
# CPU time of compiling and of the walk together. Nothing that is slower is let through to the workers.
CPU_SECONDS = 0.5
WALK_TOKENS = 16
# On a machine whose cores are all taken, the streams that are served come before this.
NICENESS = 5


def compile_grammar(tokenizer: llguidance.LLTokenizer, params: StructuredOutputsParams) -> str:
    """The grammar for the workers. Raises RequestError, which says what is wrong with it."""
    began = time.thread_time()
    grammar = params.to_grammar()
    matcher = new_matcher(tokenizer, grammar)
    picks = random.Random(0)
    for _ in range(WALK_TOKENS):
        if matcher.is_error() or matcher.is_stopped():
            break
        mask = matcher.compute_bitmask()
        if time.thread_time() - began > CPU_SECONDS:
            raise _refusal(params, "is too complex to be matched in time")
        if not matcher.is_error():
            matcher.consume_token(_pick(mask, picks))
    if matcher.is_error():
        raise _refusal(params, f"cannot be matched: {error_of(matcher) or 'it allows no output at all'}")
    return grammar


def _refusal(params: StructuredOutputsParams, message: str) -> RequestError:
    return RequestError(f"{FIELD}.{params.form} {message}", FIELD)


def _pick(mask: bytes, picks: random.Random) -> int:
    """Some token of a bit mask that has one."""
    start = picks.randrange(len(mask))
    rest = mask[start:].lstrip(b"\0") or mask.lstrip(b"\0")
    place = len(mask) - len(rest)
    return 8 * place + picks.choice([bit for bit in range(8) if mask[place] >> bit & 1])


def _answer(tokenizer: llguidance.LLTokenizer, line: bytes) -> dict[str, Any]:
    try:
        params = StructuredOutputsParams(**json.loads(line))
        return {"grammar": compile_grammar(tokenizer, params)}
    except RequestError as error:
        return {"error": to_wire(error)}
    except MemoryError:
        return {"error": to_wire(RequestError(f"{FIELD} needs too much memory", FIELD))}
    except BaseException as error:  # a panic of the library is no Exception
        return {"error": to_wire(RequestError(f"{FIELD} cannot be compiled: {str(error)[:300]}", FIELD))}


def _limit_memory() -> None:
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if sys.platform == "linux":  # where the size that it counts is known
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + MEMORY_BYTES
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _serve(connection: socket.socket, path: Path, eos_token_ids: tuple[int, ...]) -> None:
    def send(data: dict[str, Any]) -> None:
        connection.sendall(json.dumps(data).encode() + b"\n")

    try:
        tokenizer = load_tokenizer(path, eos_token_ids)
    except Exception as error:
        send({"error": to_wire(error)})
        return
    _limit_memory()
    send({"ready": True})
    for line in connection.makefile("rb"):
        send(_answer(tokenizer, line))


def main() -> None:
    """Process entry; ends when the other side of the socket is closed, or is killed."""
    parser = argparse.ArgumentParser(description="Checks grammars for nanoengine, which starts it.")
    parser.add_argument("--socket-fd", type=int, required=True)
    parser.add_argument("--owner-pid", type=int, required=True)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--eos", type=int, nargs="+", required=True)
    args = parser.parse_args()
    processes.ignore_interrupts()
    processes.name_process("nano-grammar")
    os.nice(NICENESS)
    if not processes.set_death_signal(signal.SIGKILL, args.owner_pid):
        return
    connection = socket.socket(fileno=args.socket_fd)
    threading.stack_size(STACK_BYTES)
    eos = tuple(args.eos)
    start_thread(lambda: _serve(connection, args.tokenizer, eos), "compiler", processes.end_process).join()
    os._exit(0)  # nothing to put away, and nobody waits


if __name__ == "__main__":
    main()
