"""Answer many prompts at once from one's own program: completions, then chats; no server is needed.

python examples/offline.py --tp 2
python examples/offline.py --model /path/to/model "Once upon a time" "The capital of France is"
"""

from __future__ import annotations

import argparse

from nanoengine import LLM, SamplingParams

PROMPTS = ["中国的首都是", "The capital of France is", "12+30="]
QUESTIONS = ["日本的首都是哪里？", "What is the capital of Italy?"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("prompts", nargs="*", default=PROMPTS, help="texts to continue")
    parser.add_argument("--model", default="demo", help="a name in the registry, or a model directory")
    parser.add_argument("--tp", type=int, default=1, help="processes that share the model")
    parser.add_argument("--max-tokens", type=int, default=16)
    parser.add_argument("--temperature", type=float, default=0.0)
    arguments = parser.parse_args()
    params = SamplingParams(temperature=arguments.temperature, max_tokens=arguments.max_tokens)

    # The engine lives in processes of its own, which end with the block.
    with LLM(arguments.model, tensor_parallel_size=arguments.tp) as llm:
        print("completions:")
        for output in llm.generate(arguments.prompts, params):
            answer = output.outputs[0]
            print(f"  {output.prompt!r} -> {answer.text!r} ({answer.finish_reason}, {len(answer.token_ids)} tokens)")
        print("chats:")
        conversations = [[{"role": "user", "content": question}] for question in QUESTIONS]
        for question, output in zip(QUESTIONS, llm.chat(conversations, params), strict=True):
            print(f"  {question!r} -> {output.outputs[0].text!r}")


if __name__ == "__main__":
    main()
