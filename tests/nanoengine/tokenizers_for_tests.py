"""Tiny tokenizers of both byte forms, and one of neither, written to a directory as a model would bring them."""

from __future__ import annotations

import json
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

TEXTS = [
    "The capital of France is Paris. The capital of China is Beijing.",
    "中国的首都是北京。日本的首都是东京。法国的首都是巴黎。",
    "héllo wörld, naïve café; emoji 😀 and 👩‍👩‍👧 too",
    "def f(x):\n    return x + 1\n",
] * 3
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TEMPLATE = (
    "{% for message in messages %}\n"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}\n{{ '<|im_start|>assistant\\n' }}\n{% endif %}"
)


def write_byte_level(directory: Path, **config: object) -> Path:
    """A byte-level BPE like GPT-2's, with the special tokens last and a chat template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=340, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.add_tokens([AddedToken("two words", special=False)])
    return _write(
        tokenizer,
        directory,
        {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": TEMPLATE} | config,
    )


def write_byte_fallback(directory: Path, **config: object) -> Path:
    """A BPE with byte fallback and the decoder of Llama 2: a leading space is added in front and stripped again."""
    vocab = {"<unk>": 0, "<s>": 1, "</s>": 2} | {f"<0x{byte:02X}>": 3 + byte for byte in range(256)}
    for piece in [*"▁abcdefghijklmnopqrstuvwxyz中国的首都是.,", "▁t", "he", "▁the", "▁▁"]:
        vocab.setdefault(piece, len(vocab))
    merges = [("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return _write(tokenizer, directory, {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True} | config)


def write_metaspace(directory: Path, **config: object) -> Path:
    """Words with a decoder that is of no byte form, so that the window decodes it."""
    vocab = {"<unk>": 0, "▁": 1, "▁the": 2, "▁cat": 3, "s": 4, "▁sat": 5, "首": 6, "<eos>": 7}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.add_special_tokens(["<eos>"])
    return _write(tokenizer, directory, {"eos_token": "<eos>"} | config)


def _write(tokenizer: Tokenizer, directory: Path, config: dict[str, object]) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    full = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (directory / "tokenizer_config.json").write_text(json.dumps(full, ensure_ascii=False), encoding="utf-8")
    return directory
