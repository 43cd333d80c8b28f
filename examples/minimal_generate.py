"""The least it takes: one model, one prompt, one answer on standard output.

python examples/minimal_generate.py --prompt 中国的首都是
"""

from __future__ import annotations

import argparse

from nanoengine import LLM, SamplingParams


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model-name", default="demo", help="a name in the registry, or a model directory")
    parser.add_argument("--prompt", default="中国的首都是")
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    arguments = parser.parse_args()
    with LLM(arguments.model_name, device=arguments.device) as llm:
        params = SamplingParams(temperature=0, max_tokens=arguments.max_new_tokens)
        print(llm.generate(arguments.prompt, params, use_tqdm=False)[0].outputs[0].text)


if __name__ == "__main__":
    main()
