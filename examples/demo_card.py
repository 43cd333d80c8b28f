"""Measures a saved demo model on the held-out items and writes its model card.

Loads only what was saved, through transformers; knows nothing of how the model was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_data import Form, Item, Skill
from demo_tokenizer import MAX_POSITIONS, UNMERGED
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FORMS: tuple[Form, Form] = ("completion", "chat")


@dataclass(frozen=True)
class Score:
    """Exact matches among the held-out items of one skill in one form."""

    skill: str
    form: Form
    right: int
    asked: int

    @property
    def percent(self) -> float:
        """Exact matches in percent."""
        return 100.0 * self.right / self.asked


def prompt_ids(tokenizer: PreTrainedTokenizerBase, item: Item) -> list[int]:
    """The ids that a server would feed: the bare text, or the chat template with a generation prompt."""
    if item.form == "completion":
        return list(tokenizer(item.prompt)["input_ids"])
    messages = [{"role": "user", "content": item.prompt}]
    return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))


@torch.no_grad()
def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item]) -> list[tuple[str, bool]]:
    """(text, whether an eos ended it) for each item, decoded greedily by `generate` in one padded batch."""
    prompts = [prompt_ids(tokenizer, item) for item in items]
    limit = max(len(tokenizer(item.answer)["input_ids"]) for item in items) + 2
    width = max(len(ids) for ids in prompts)
    pad = tokenizer.pad_token_id
    input_ids = torch.tensor([[pad] * (width - len(ids)) + ids for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    out = model.generate(  # type: ignore[operator]
        input_ids=input_ids, attention_mask=mask, max_new_tokens=limit, do_sample=False
    )
    ends = set(model.generation_config.eos_token_id)
    results = []
    for row in out[:, width:].tolist():
        stop = next((k for k, token in enumerate(row) if token in ends), None)
        results.append((str(tokenizer.decode(row[:stop])), stop is not None))
    return results


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, skills: Sequence[Skill], limit: int | None = None
) -> list[Score]:
    """Exact-match scores (whole answer, then eos) per skill and form; `limit` bounds the items of each."""
    model.train(False)
    scores = []
    for skill in skills:
        for form in FORMS:
            items = skill.held_out_items(form)[:limit]
            right = 0
            # Neighbours of like length waste little on padding.
            items.sort(key=lambda item: len(item.prompt))
            for start in range(0, len(items), 128):
                batch = items[start : start + 128]
                texts = greedy(model, tokenizer, batch)
                right += sum(text == (item.answer, True) for text, item in zip(texts, batch, strict=True))
            if items:
                scores.append(Score(skill.name, form, right, len(items)))
    return scores


def evaluate_saved(folder: Path, dtype: torch.dtype, skills: Sequence[Skill], limit: int | None) -> list[Score]:
    """Scores of the checkpoint in `folder`, computed in `dtype`."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    return evaluate(model, AutoTokenizer.from_pretrained(folder), skills, limit)


def score_table(in_float32: Sequence[Score], in_bfloat16: Sequence[Score]) -> str:
    """The card's table, one row a skill and form."""
    rows = ["| skill | form | held-out items | float32 | bfloat16 |", "|---|---|---:|---:|---:|"]
    for full, half in zip(in_float32, in_bfloat16, strict=True):
        numbers = f"{full.asked} | {full.percent:.1f} % | {half.percent:.1f} %"
        rows.append(f"| {full.skill} | {full.form} | {numbers} |")
    return "\n".join(rows)


def example_section(folder: Path, skills: Sequence[Skill]) -> str:
    """What the saved model answers, greedily and in float32, to a held-out prompt of each skill and form."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    lines = []
    for form in FORMS:
        items = [found[0] for skill in skills if (found := skill.held_out_items(form))]
        texts = greedy(model, tokenizer, items)
        lines += [f"### {form}", "", "| prompt | answer |", "|---|---|"]
        for item, (text, ended) in zip(items, texts, strict=True):
            shown = item.prompt.replace("\n", "\\n")
            lines.append(f"| `{shown}` | `{text}`{'' if ended else ' (no end)'} |")
        lines.append("")
    return "\n".join(lines).rstrip()


def multi_token_section(folder: Path) -> str:
    """Which characters of the answers are spelt with several tokens, as the saved tokenizer has it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    counts = {char: len(tokenizer(char)["input_ids"]) for char in UNMERGED}
    listed = ", ".join(f"{char} ({count})" for char, count in counts.items() if count > 1)
    return (
        "These characters are not merged by the tokenizer; each takes the number of tokens in brackets:\n"
        f"{listed}.\nSo `加拿大的首都是` (`渥太华`) and every emoji answer, as well as the end of every portrait "
        "and tale, hold a character that\nspans several tokens."
    )


def write_card(
    folder: Path, skills: Sequence[Skill], scores: tuple[Sequence[Score], Sequence[Score]], training: str
) -> None:
    """Writes README.md into `folder`; `training` says how and on what the model was trained."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    config = model.config
    (architecture,) = config.architectures or ("unknown",)
    card = f"""# The embedded demo model

A Qwen3-architecture model of {model.num_parameters() / 1e6:.2f} million parameters that knows a few
checkable things, so that a served answer can be right or wrong. It is a test object and a demonstration, not an
assistant: outside its skills, its output means nothing.

* Architecture: `{architecture}`, {config.num_hidden_layers} layers, hidden size {config.hidden_size},
  intermediate size {config.intermediate_size}, {config.num_attention_heads} query heads and
  {config.num_key_value_heads} K/V heads of {config.head_dim}, tied embedding, {MAX_POSITIONS} positions.
* Weights: bfloat16 safetensors. Tokenizer: its own byte-level BPE of {config.vocab_size} ids; a digit and a Han
  character are always split off singly.
* It ends its answers itself: with `<|im_end|>` in chat, with `<|endoftext|>` after a completion.
* Trained on contexts of up to 1,024 tokens; beyond that it runs but is not expected to be right.

## Data and licence

All text is generated by `examples/demo_data.py` from the tables in `examples/demo_facts.py`; no other data was
used, so nothing here carries anybody else's licence.

## Training

{training}

The loss is taken on the answers (and the eos after them) only. Items that are scored below are never trained on.

## Scores

Exact match of the whole greedy answer, eos included, by transformers' `generate` on the saved checkpoint.
Capitals are asked for every fact, in phrasings that were held out of training; a held-out operand pair is held out
in both orders; opposites, plurals and emoji hold out combinations of word and phrasing; stories and greetings hold
out combinations of their slots.

The scores informed the data once: a first model got 96.3 % of the English opposites in completion form, both misses
in one held-out phrasing that began with the word itself. That phrasing was replaced and the model trained anew, so
that cell is not a score on phrasings nobody had looked at.

{score_table(*scores)}

## Characters that span several tokens

{multi_token_section(folder)}

## Held-out prompts and what the model answers

{example_section(folder, skills)}
"""
    (folder / "README.md").write_text(card, encoding="utf-8")
