"""Print a running server's answer while it is made, with OpenAI's own client (`pip install openai`).

python -m launch --tp 2                                       # in one terminal
python examples/stream_client.py 中国的首都是哪里？             # in another
python examples/stream_client.py --completion 中国的首都是
"""

from __future__ import annotations

import argparse

try:
    from openai import OpenAI
except ImportError:
    raise SystemExit("this example needs OpenAI's client: pip install openai") from None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompt", nargs="?", default="中国的首都是哪里？")
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1", help="address of the server's API")
    parser.add_argument("--api-key", default="none", help="the key it was started with, if it was")
    parser.add_argument("--completion", action="store_true", help="continue the text instead of answering it")
    parser.add_argument("--max-tokens", type=int, default=64)
    arguments = parser.parse_args()

    with OpenAI(base_url=arguments.base_url, api_key=arguments.api_key) as client:
        model = client.models.list().data[0].id
        if arguments.completion:
            pieces = client.completions.create(
                model=model, prompt=arguments.prompt, max_tokens=arguments.max_tokens, temperature=0, stream=True
            )
            for piece in pieces:
                print(piece.choices[0].text, end="", flush=True)
        else:
            chunks = client.chat.completions.create(
                model=model,
                messages=[{"role": "user", "content": arguments.prompt}],
                max_tokens=arguments.max_tokens,
                temperature=0,
                stream=True,
            )
            for chunk in chunks:
                print(chunk.choices[0].delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main()
