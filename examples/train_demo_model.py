"""Trains the embedded demo model from nothing: makes its text, tokenizer, weights and model card.

    python examples/train_demo_model.py --out configs/demo_model     # about 20 minutes on 2 CPU cores

Knows nothing of the serving engine: it needs torch, transformers and tokenizers only. The same seed, number of
steps, threads and kind of CPU give the same weights.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import random
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_card import FORMS, Score, evaluate, evaluate_saved, write_card
from demo_data import Form, Skill, all_skills
from demo_facts import SYSTEM_PROMPTS
from demo_tokenizer import END_OF_TEXT, MAX_POSITIONS, TURN_END, Encoded, Encoder, as_pretrained, train_tokenizer
from tokenizers import Tokenizer
from transformers import GenerationConfig, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
from transformers.modeling_outputs import BaseModelOutputWithPast


@dataclass(frozen=True)
class Recipe:
    """Every number of the model and its training."""

    vocab_size: int = 2048
    hidden_size: int = 256
    intermediate_size: int = 512
    num_layers: int = 4
    steps: int = 2500
    batch_tokens: int = 2048
    row_length: int = 256
    long_row_length: int = 1024
    long_every: int = 8  # one step in so many trains on long conversations
    learning_rate: float = 3e-3
    warmup: int = 50
    tokenizer_items: int = 1000  # drawn per skill and form, times the skill's share
    eval_limit: int | None = None  # held-out items of each skill and form in the card
    eval_skills: int | None = None  # skills in the card, from the first
    compile: bool = True


SMOKE = Recipe(vocab_size=1024, hidden_size=64, intermediate_size=64, num_layers=1, steps=3, batch_tokens=1024,
               warmup=1, tokenizer_items=200, eval_limit=2, eval_skills=3, compile=False)  # fmt: skip


class ConversationSource:
    """An endless, seeded stream of training conversations."""

    def __init__(self, skills: Sequence[Skill], encoder: Encoder, seed: int) -> None:
        self._rng = random.Random(seed)
        self._encoder = encoder
        self._skills = {form: [s for s in skills if s.phrasings(form)] for form in FORMS}

    def draw(self, room: int, fill: bool) -> Encoded | None:
        """A conversation of at most `room` tokens, as long as fits if `fill`; None if the drawn one is longer."""
        if self._rng.random() < 0.5:
            return self._lines(room, fill)
        return self._turns(room, fill)

    def _skill(self, form: Form) -> Skill:
        skills = self._skills[form]
        return self._rng.choices(skills, [skill.weight for skill in skills])[0]

    def _turns(self, room: int, fill: bool) -> Encoded | None:
        system = self._rng.choice(SYSTEM_PROMPTS) if self._rng.random() < 0.4 else None
        turns: list[tuple[str, str]] = []
        encoded = None
        for _ in range(room if fill else self._rng.choice((1, 1, 1, 2, 3))):
            item = self._skill("chat").draw(self._rng, "chat")
            turns.append((item.prompt, item.answer))
            longer = self._encoder.chat(system, turns)
            if len(longer.ids) > room:
                break
            encoded = longer
        return encoded

    def _lines(self, room: int, fill: bool) -> Encoded | None:
        # A bare sum takes eight tokens; a few to a row is the cheapest way to see many.
        target = room if fill else self._rng.choice((0, 0, 48, 96))
        skill = self._skill("completion")
        lines: list[tuple[str, str]] = []
        encoded = None
        while True:
            item = skill.draw(self._rng, "completion")
            lines.append((item.prompt, item.answer))
            longer = self._encoder.completion(lines)
            if len(longer.ids) > room:
                return encoded
            encoded = longer
            if len(longer.ids) >= target:
                return encoded
            if fill:
                skill = self._skill("completion")


@dataclass
class Batch:
    """Packed rows: conversations side by side that do not see each other. All (rows, length)."""

    ids: torch.Tensor
    weights: torch.Tensor
    positions: torch.Tensor
    segments: torch.Tensor

    @property
    def mask(self) -> torch.Tensor:
        """Causal inside a conversation: True where a query may look. (rows, 1, length, length)"""
        same = self.segments[:, None, :, None] == self.segments[:, None, None, :]
        return same.tril()


def make_batch(source: ConversationSource, rows: int, length: int, fill: bool) -> Batch:
    """Packs conversations into rows until nothing drawn fits in what is left."""
    ids, weights, positions, segments = [], [], [], []
    for _ in range(rows):
        row = Encoded([], [])
        place: list[int] = []
        segment: list[int] = []
        misses = 0
        while misses < 3 and length - len(row.ids) > 8:
            drawn = source.draw(length - len(row.ids), fill)
            if drawn is None:
                misses += 1
                continue
            segment += [len(place)] * len(drawn.ids)
            place += range(len(drawn.ids))
            row.ids += drawn.ids
            row.weights += drawn.weights
        gap = length - len(row.ids)
        ids.append(row.ids + [0] * gap)
        weights.append(row.weights + [0.0] * gap)
        positions.append(place + [0] * gap)
        segments.append(segment + [-1] * gap)
    return Batch(torch.tensor(ids), torch.tensor(weights), torch.tensor(positions), torch.tensor(segments))


def batches(source: ConversationSource, recipe: Recipe) -> Iterator[Batch]:
    """The training batches, all of the same number of tokens."""
    step = 0
    while True:
        long = step % recipe.long_every == recipe.long_every - 1
        length = recipe.long_row_length if long else recipe.row_length
        yield make_batch(source, recipe.batch_tokens // length, length, fill=long)
        step += 1


def make_tokenizer(skills: Sequence[Skill], recipe: Recipe, seed: int) -> Tokenizer:
    """The tokenizer, from training items alone."""
    rng = random.Random(seed)
    texts = [*SYSTEM_PROMPTS, "system\nuser\nassistant\n"]
    for skill in skills:
        for form in FORMS:
            count = int(recipe.tokenizer_items * skill.texts) if skill.phrasings(form) else 0
            for item in (skill.draw(rng, form) for _ in range(count)):
                texts += [item.prompt, item.answer]
    tokenizer = train_tokenizer(texts, recipe.vocab_size)
    if tokenizer.get_vocab_size() != recipe.vocab_size:
        raise SystemExit(f"the text yields only {tokenizer.get_vocab_size()} tokens of {recipe.vocab_size}")
    return tokenizer


def build_model(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """A fresh float32 model with the tokenizer's ids in its configuration."""
    ends = [int(str(tokenizer.convert_tokens_to_ids(token))) for token in (TURN_END, END_OF_TEXT)]
    config = Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=ends,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model


def loss_of(model: Qwen3ForCausalLM, body: Callable[..., BaseModelOutputWithPast], batch: Batch) -> torch.Tensor:
    """The weighted cross-entropy of the answer tokens; logits are computed for those positions alone.

    `body` is `model.model`, or its compiled form.
    """
    with torch.autocast("cpu", torch.bfloat16):
        hidden = body(
            input_ids=batch.ids, attention_mask=batch.mask, position_ids=batch.positions, use_cache=False
        ).last_hidden_state
        assert hidden is not None
        weights = batch.weights[:, 1:]
        chosen = weights > 0
        logits = model.lm_head(hidden[:, :-1][chosen])  # (answer tokens, vocabulary)
    losses = torch.nn.functional.cross_entropy(logits.float(), batch.ids[:, 1:][chosen], reduction="none")
    weights = weights[chosen]
    return (losses * weights).sum() / weights.sum()


def make_optimizers(model: Qwen3ForCausalLM, rate: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices, which learns facts in a third of AdamW's steps; AdamW for embedding and norms."""
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        (matrices if parameter.dim() == 2 and "embed" not in name else others).append(parameter)
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def rate_at(progress: float, step: int, recipe: Recipe) -> float:
    """Learning rate: a linear warm-up, then a cosine down to nothing at progress 1."""
    warm = min(1.0, (step + 1) / recipe.warmup)
    return recipe.learning_rate * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def train(
    model: Qwen3ForCausalLM,
    stream: Iterator[Batch],
    recipe: Recipe,
    minutes: float | None,
    report: Callable[[int, float], None],
) -> int:
    """Trains until the steps, or the minutes if given, are used up; returns the steps done."""
    # The compiler fuses the small operations, where a CPU spends most of its time; without one it is only slower.
    body = torch.compile(model.model, dynamic=False) if recipe.compile and shutil.which("g++") else model.model
    optimizers = make_optimizers(model, recipe.learning_rate)
    start = time.monotonic()
    for step in range(recipe.steps):
        progress = step / recipe.steps
        if minutes is not None:
            progress = max(progress, (time.monotonic() - start) / (60 * minutes))
        if progress >= 1:
            return step
        model.train()
        loss = loss_of(model, body, next(stream))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate_at(progress, step, recipe)
            optimizer.step()
            optimizer.zero_grad()
        report(step, float(loss.detach()))
    return recipe.steps


class Reporter:
    """Prints the loss, and now and then the scores of a few held-out items, so a bad recipe shows early."""

    def __init__(self, model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, skills: Sequence[Skill]) -> None:
        self._model, self._tokenizer, self._skills = model, tokenizer, skills
        self._start = time.monotonic()
        self._mean = 0.0

    def __call__(self, step: int, loss: float) -> None:
        self._mean = loss if step == 0 else 0.98 * self._mean + 0.02 * loss
        if step % 50 == 49:
            print(f"step {step + 1}: loss {self._mean:.4f}, {time.monotonic() - self._start:.0f} s", flush=True)
        if step % 500 == 499:
            scores = evaluate(self._model, self._tokenizer, self._skills, limit=16)
            print("  " + ", ".join(f"{s.skill} {s.form} {s.percent:.0f}" for s in scores), flush=True)


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Writes the bfloat16 checkpoint and the tokenizer."""
    model.to(dtype=torch.bfloat16).save_pretrained(folder)  # type: ignore[call-arg]
    tokenizer.save_pretrained(folder)


def describe_training(arguments: argparse.Namespace, steps: int, recipe: Recipe, seconds: float) -> str:
    """The card's account of the training, with the command that produced the files."""
    command = f"python examples/train_demo_model.py --seed {arguments.seed} --steps {recipe.steps}"
    if arguments.minutes is not None:
        command += f" --minutes {arguments.minutes:g}"
    if arguments.smoke:
        command += " --smoke"
    return (
        f"    {command} --out configs/demo_model\n\n"
        f"{steps} steps of {recipe.batch_tokens} tokens in {seconds / 60:.1f} minutes, measured on a shared machine, "
        f"with {torch.get_num_threads()} threads\n({cpu_name()}, bfloat16 autocast over float32 weights, "
        f"torch {torch.__version__.split('+')[0]})."
    )


def cpu_name() -> str:
    """The processor's name as the system tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Train nanoengine's embedded demo model.")
    parser.add_argument("--out", type=Path, required=True, help="folder for the checkpoint and its model card")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, help=f"training steps (default {Recipe.steps})")
    parser.add_argument("--minutes", type=float, help="end within this time; the result then depends on the machine")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default 2)")
    parser.add_argument("--smoke", action="store_true", help="a tiny model in seconds, to try the script")
    return parser.parse_args()


def main() -> None:
    """Makes tokenizer and model, measures the saved files, and moves them into place in one go."""
    arguments = parse_arguments()
    recipe = SMOKE if arguments.smoke else Recipe()
    if arguments.steps is not None:
        recipe = Recipe(**{**vars(recipe), "steps": arguments.steps})
    torch.manual_seed(arguments.seed)
    torch.set_num_threads(arguments.threads)
    skills = all_skills()
    backend = make_tokenizer(skills, recipe, arguments.seed)
    tokenizer = as_pretrained(backend)
    model = build_model(recipe, tokenizer)
    stream = batches(ConversationSource(skills, Encoder(backend), arguments.seed), recipe)
    start = time.monotonic()
    steps = train(model, stream, recipe, arguments.minutes, Reporter(model, tokenizer, skills))
    training = describe_training(arguments, steps, recipe, time.monotonic() - start)
    arguments.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=arguments.out.parent, prefix=".demo-model-") as temporary:
        folder = Path(temporary)
        save(model, tokenizer, folder)
        measured = skills[: recipe.eval_skills]
        in_float32 = evaluate_saved(folder, torch.float32, measured, recipe.eval_limit)
        in_bfloat16 = evaluate_saved(folder, torch.bfloat16, measured, recipe.eval_limit)
        write_card(folder, measured, (in_float32, in_bfloat16), training)
        for path in sorted(folder.iterdir()):
            path.chmod(0o644)
            os.replace(path, arguments.out / path.name)
    print_scores(in_float32)


def print_scores(scores: Sequence[Score]) -> None:
    """One line a skill and form."""
    for score in scores:
        print(f"{score.skill:22} {score.form:10} {score.percent:6.1f} % of {score.asked}")


if __name__ == "__main__":
    main()
