"""A conversation in the terminal, token by token. /reset forgets it, /exit ends it, Ctrl-C stops an answer.

python examples/chat.py --tp 2
"""

from __future__ import annotations

import argparse
import sys

from nanoengine import LLM, RequestError, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo", help="a name in the registry, or a model directory")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the model")
    parser.add_argument("--system", default="", help="what the model is told first")
    parser.add_argument("--max-tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    params = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)
    with LLM(arguments.model, tensor_parallel_size=arguments.tp) as llm:
        talk(llm, params, arguments.system)


def talk(llm: LLM, params: SamplingParams, system: str) -> None:
    """Read lines until there are no more, and answer each in the light of those before."""
    opening = [{"role": "system", "content": system}] if system else []
    messages = list(opening)
    while (line := read_line()) is not None:
        if line == "/exit":
            return
        if line == "/reset":
            messages = list(opening)
        elif line:
            messages.append({"role": "user", "content": line})
            try:
                messages.append({"role": "assistant", "content": answer(llm, params, messages)})
            except RequestError as error:  # the conversation has grown too long, say
                print(f"({error}; /reset begins anew)")
                messages.pop()


def answer(llm: LLM, params: SamplingParams, messages: list[dict[str, str]]) -> str:
    """Print the answer while it comes; Ctrl-C keeps what there is."""
    request_id = llm.add_request(llm.get_tokenizer().apply_chat_template(messages), params)
    text = ""
    while llm.has_unfinished_requests():
        try:
            outputs = llm.step()
        except KeyboardInterrupt:
            llm.abort(request_id)
            continue
        for output in outputs:
            new = output.outputs[0].text
            print(new[len(text) :], end="", flush=True)
            text = new
    print()
    return text


def read_line() -> str | None:
    """One line without its end; None when there are no more."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except (EOFError, KeyboardInterrupt):
        return None


if __name__ == "__main__":
    main()
