"""Lets a served model call Python functions through OpenAI's client, until it answers in words.

python -m launch --model Qwen/Qwen3-0.6B --allow-download     # a model whose chat template knows tools
python examples/tools_client.py "What is 17 + 25, and what is the time in Tokyo?"      # in another terminal

The demo model knows no tools, and its server says so.
"""

from __future__ import annotations

import argparse
import datetime
import zoneinfo
from typing import Any

import pydantic

try:
    import openai
except ImportError:
    raise SystemExit("this example needs OpenAI's client: pip install openai") from None


class Add(pydantic.BaseModel):
    """Add two numbers."""

    a: float
    b: float

    def run(self) -> str:
        """The sum."""
        return str(self.a + self.b)


class Time(pydantic.BaseModel):
    """Tell the time in a time zone such as Asia/Tokyo."""

    zone: str

    def run(self) -> str:
        """Hours and minutes, or what is wrong with the zone."""
        try:
            return datetime.datetime.now(zoneinfo.ZoneInfo(self.zone)).strftime("%H:%M")
        except (zoneinfo.ZoneInfoNotFoundError, ValueError) as error:
            return f"error: {error}"


TOOLS = {"Add": Add, "Time": Time}


def main() -> None:
    """Stream each answer, run what it calls, and send the results back."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="address of the server's API")
    parser.add_argument("--api-key", default="none", help="the key it was started with, if it was")
    parser.add_argument("--max-turns", type=int, default=8, help="answers to ask for")
    arguments = parser.parse_args()
    client = openai.OpenAI(base_url=arguments.base_url, api_key=arguments.api_key)
    model = client.models.list().data[0].id
    messages: list[Any] = [{"role": "user", "content": arguments.question}]
    # strict, as pydantic_function_tool makes them: the arguments are kept to the schema while they are generated.
    tools = [openai.pydantic_function_tool(tool) for tool in TOOLS.values()]
    for _ in range(arguments.max_turns):
        with client.chat.completions.stream(model=model, messages=messages, tools=tools) as stream:
            for event in stream:
                if event.type == "content.delta":
                    print(event.delta, end="", flush=True)
        message = stream.get_final_completion().choices[0].message
        print()
        if not message.tool_calls:
            return
        messages.append(message)
        for call in message.tool_calls:
            tool = call.function.parsed_arguments
            result = tool.run() if isinstance(tool, Add | Time) else f"error: {call.function.name} cannot be read"
            print(f"[{call.function.name} {call.function.arguments} → {result}]")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})


if __name__ == "__main__":
    main()
