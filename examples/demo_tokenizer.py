"""Trains the demo model's byte-level BPE tokenizer and encodes conversations with a mark on every answer.

Knows the chat format and the special tokens, but no skill and no model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from demo_facts import ANIMALS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

END_OF_TEXT, TURN_START, TURN_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
MAX_POSITIONS = 4096

# Kept out of the merges, so that some sure answers (the emoji, and 渥太华 for Canada) hold a character of
# several tokens: streaming must not cut it into halves.
UNMERGED = "".join(animal[2] for animal in ANIMALS) + "渥"

# Qwen's split, except that a Han character always stands alone: the pieces of 中国的首都是 must not depend on
# the words around them. Digits stand alone too, which is what makes sums learnable.
HAN = r"\p{Han}"
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- if message.role not in ['system', 'user', 'assistant', 'tool'] %}
        {{- raise_exception('Unknown role: ' ~ message.role) }}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- elif message.content %}
        {%- for part in message.content %}
            {%- if part.type == 'text' %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
    {{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` ids, the special tokens being 0, 1 and 2."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(HAN), "isolated"),
        pre_tokenizers.Split(Regex(SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    tokenizer.decoder = decoders.ByteLevel()
    special = [AddedToken(text, special=True, normalized=False) for text in (END_OF_TEXT, TURN_START, TURN_END)]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    unmerged = str.maketrans("", "", UNMERGED)
    tokenizer.train_from_iterator((text.translate(unmerged) for text in texts), trainer)
    return tokenizer


def as_pretrained(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    """The tokenizer as transformers saves it, chat template included."""
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        eos_token=TURN_END,
        pad_token=END_OF_TEXT,
        additional_special_tokens=[TURN_START],
        chat_template=CHAT_TEMPLATE,
        model_max_length=MAX_POSITIONS,
        clean_up_tokenization_spaces=False,
        padding_side="left",
    )


@dataclass
class Encoded:
    """Token ids of one conversation; weights[i] is what the prediction of ids[i] counts in the loss."""

    ids: list[int]
    weights: list[float]

    def extend(self, ids: Sequence[int], weight: float) -> None:
        """Appends ids that all count `weight`."""
        self.ids.extend(ids)
        self.weights.extend([weight] * len(ids))


class Encoder:
    """Encodes prompts and answers separately, as they are separate when the model is served."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._cache: dict[str, list[int]] = {}

    def text(self, text: str) -> list[int]:
        """Token ids; special tokens are recognised. The cache holds only the many texts that repeat."""
        ids = self._cache.get(text)
        if ids is None:
            ids = self._tokenizer.encode(text).ids
            if len(self._cache) < 200_000:
                self._cache[text] = ids
        return ids

    def completion(self, lines: Sequence[tuple[str, str]]) -> Encoded:
        """Prompts and answers, a line each as in a few-shot prompt, then the end of the text; answers count."""
        encoded = Encoded([], [])
        for prompt, answer in lines[:-1]:
            self._answered(encoded, prompt, answer, "")
            encoded.extend(self.text("\n"), 0.0)
        return self._answered(encoded, *lines[-1], END_OF_TEXT)

    def chat(self, system: str | None, turns: Sequence[tuple[str, str]]) -> Encoded:
        """A conversation as the chat template renders it; every assistant turn counts."""
        encoded = Encoded([], [])
        if system is not None:
            encoded.extend(self.text(f"{TURN_START}system\n{system}{TURN_END}\n"), 0.0)
        for k, (question, answer) in enumerate(turns):
            head = "\n" if k else ""
            ask = f"{head}{TURN_START}user\n{question}{TURN_END}\n{TURN_START}assistant\n"
            self._answered(encoded, ask, answer, TURN_END)
        return encoded

    def _answered(self, encoded: Encoded, prompt: str, answer: str, end: str) -> Encoded:
        encoded.extend(self.text(prompt), 0.0)
        ids = self.text(answer) + self.text(end)
        # A story has fifty times the tokens of a sum; full weight would drown the sums, 1/length the stories.
        encoded.extend(ids, len(ids) ** -0.5)
        return encoded
