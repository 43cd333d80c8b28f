"""Turns the fact tables into skills: prompts with one right answer each, split into training and held-out.

Knows no tokenizer and no model; a prompt here is text (completion) or one user message (chat).
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Literal

from demo_facts import (
    ANIMALS,
    CAPITALS,
    COLOURS,
    FRUITS,
    ITEMS,
    NAMES_EN,
    NAMES_ZH,
    OPPOSITES_EN,
    OPPOSITES_ZH,
    PLACES,
    PLURALS,
)

Form = Literal["completion", "chat"]
Slots = dict[str, str]
# Says whether (slots, phrasing) is kept out of training.
HeldOut = Callable[[Slots, str], bool]


@dataclass(frozen=True)
class Item:
    """One prompt and its only right answer; `answer` carries the leading space a completion needs."""

    skill: str
    form: Form
    prompt: str
    answer: str


@dataclass(frozen=True)
class Skill:
    """Facts times phrasings. A completion phrasing that ends in `_` wants an answer with a leading space."""

    name: str
    weight: float
    facts: Sequence[Slots]  # each has an "answer"
    completion: Sequence[str]
    chat: Sequence[str]
    held_out: HeldOut
    max_eval: int = 400  # held-out items measured per form; the capitals are always measured in full
    texts: float = 1.0  # share of the tokenizer's text: names are many and rare, story words few and frequent

    def item(self, slots: Slots, form: Form, phrasing: str) -> Item:
        """The item for one fact in one phrasing."""
        lead = " " if phrasing.endswith("_") else ""
        return Item(self.name, form, phrasing.removesuffix("_").format(**slots), lead + slots["answer"])

    def phrasings(self, form: Form) -> Sequence[str]:
        """The phrasings of one form, held out or not."""
        return self.completion if form == "completion" else self.chat

    def draw(self, rng: random.Random, form: Form) -> Item:
        """A random training item: redraws until the combination is not held out."""
        while True:
            slots, phrasing = rng.choice(self.facts), rng.choice(self.phrasings(form))
            if not self.held_out(slots, phrasing):
                return self.item(slots, form, phrasing)

    def held_out_items(self, form: Form) -> list[Item]:
        """Every held-out item of the form, or `max_eval` of them drawn with a seed of their own."""
        pairs = [(s, p) for s in self.facts for p in self.phrasings(form) if self.held_out(s, p)]
        if len(pairs) > self.max_eval:
            pairs = random.Random(self.name + form).sample(pairs, self.max_eval)
        return [self.item(slots, form, phrasing) for slots, phrasing in pairs]


def one_in(n: int, key: str) -> bool:
    """A stable 1-in-n choice; Python's own hash() changes from process to process."""
    return zlib.crc32(key.encode()) % n == 0


def hold_combination(slots: Slots, phrasing: str) -> bool:
    """Holds a slot combination out of every phrasing of its skill; `key` names the combination."""
    return one_in(10, slots["key"])


def hold_word_in_phrasing(slots: Slots, phrasing: str) -> bool:
    """Holds a word out of some phrasings; its answer is learnt from the others."""
    return one_in(8, slots["key"] + phrasing)


CAPITALS_EN = (
    "The capital of {c} is_", "The capital city of {c} is_", "{C}'s capital is_", "{C}'s capital city is_",
    "The name of the capital of {c} is_", "In {c}, the capital is_", "In {c}, the capital city is_",
    "I know that the capital of {c} is_", "I know that {c}'s capital is_",
    "Everyone knows that the capital city of {c} is_", "Everyone knows that the capital of {c} is_",
    "Question: What is the capital of {c}?\nAnswer:_", "Q: What is the capital city of {c}?\nA:_",
    "Q: Which city is the capital of {c}?\nA:_", "Country: {c}\nCapital:_",
)  # fmt: skip
CAPITALS_EN_HELD = (
    "I know that the capital city of {c} is_", "Everyone knows that {c}'s capital is_",
    "Q: What is the capital of {c}?\nA:_", "The name of the capital city of {c} is_",
)  # fmt: skip
CAPITALS_EN_CHAT = (
    "What is the capital of {c}?", "What's the capital of {c}?", "What is the capital city of {c}?",
    "Tell me the capital of {c}.", "Please tell me the capital city of {c}.", "Name the capital of {c}.",
    "Please name the capital city of {c}.", "Which city is the capital of {c}?", "The capital of {c} is",
    "{C}'s capital is", "Do you know the capital of {c}?", "What is {c}'s capital?", "capital of {c}",
)  # fmt: skip
CAPITALS_EN_CHAT_HELD = (
    "What's the capital city of {c}?", "Please name the capital of {c}.", "Tell me the capital city of {c}.",
    "Do you know {c}'s capital?",
)  # fmt: skip
CAPITALS_ZH = (
    "{c}的首都是", "{c}的首都在", "{c}首都是", "{c}的首都叫", "{c}的首都的名字是", "{c}的首都城市是",
    "我知道{c}的首都是", "我知道{c}的首都叫", "大家都知道，{c}的首都是", "大家都知道，{c}首都是",
    "问：{c}的首都是哪里？\n答：", "问：{c}的首都叫什么？\n答：", "国家：{c}\n首都：",
)  # fmt: skip
CAPITALS_ZH_HELD = (
    "我知道{c}首都是", "大家都知道，{c}的首都叫", "问：{c}首都是哪里？\n答：", "我知道{c}的首都在",
)  # fmt: skip
CAPITALS_ZH_CHAT = (
    "{c}的首都是哪里？", "{c}的首都是哪座城市？", "{c}的首都是", "请问{c}的首都是哪里？", "{c}的首都叫什么？",
    "请问{c}首都叫什么？", "告诉我{c}的首都。", "请告诉我{c}的首都。", "你知道{c}的首都是哪里吗？",
    "你知道{c}的首都吗？", "{c}的首都在哪里？", "哪座城市是{c}的首都？", "{c}首都",
)  # fmt: skip
CAPITALS_ZH_CHAT_HELD = (
    "请问{c}的首都叫什么？", "请问{c}的首都是哪座城市？", "你知道{c}的首都叫什么吗？", "{c}首都是哪里？",
)  # fmt: skip


def capitals() -> list[Skill]:
    """Capitals; phrasings are held out, so that every fact is asked in words it was not trained in."""
    english = [{"c": c, "C": c[0].upper() + c[1:], "answer": a} for c, a, _, _ in CAPITALS]
    chinese = [{"c": c, "answer": a} for _, _, c, a in CAPITALS]
    held_en = frozenset(CAPITALS_EN_HELD + CAPITALS_EN_CHAT_HELD)
    held_zh = frozenset(CAPITALS_ZH_HELD + CAPITALS_ZH_CHAT_HELD)
    return [
        Skill("capitals, English", 3.0, english, CAPITALS_EN + CAPITALS_EN_HELD,
              CAPITALS_EN_CHAT + CAPITALS_EN_CHAT_HELD, lambda _, p: p in held_en, 10**6, 6.0),
        Skill("capitals, Chinese", 3.0, chinese, CAPITALS_ZH + CAPITALS_ZH_HELD,
              CAPITALS_ZH_CHAT + CAPITALS_ZH_CHAT_HELD, lambda _, p: p in held_zh, 10**6, 6.0),
    ]  # fmt: skip


def sums() -> Skill:
    """Sums below 100; a held-out pair is held out in both orders, or it would be known by commutation."""
    facts = [
        {"a": str(a), "b": str(b), "answer": str(a + b), "key": f"sum{min(a, b)}+{max(a, b)}"}
        for a, b in product(range(100), repeat=2)
        if a + b < 100
    ]
    completion = (
        "{a}+{b}=", "{a}+{b}=", "{a} + {b} =_", "{a} plus {b} is_", "The sum of {a} and {b} is_",
        "{a}加{b}等于", "{a}加{b}是", "Q: What is {a}+{b}?\nA:_", "问：{a}+{b}等于多少？\n答：",
        "Mia has {a} apples and buys {b} more. The number of apples is now_",
    )  # fmt: skip
    chat = (
        "{a}+{b}=", "{a}+{b}", "{a}+{b}=?", "What is {a}+{b}?", "What is {a} + {b}?", "What is {a} plus {b}?",
        "How much is {a} plus {b}?", "Calculate {a} + {b}.", "{a}加{b}等于多少？", "{a}+{b}等于几？",
        "计算{a}+{b}。", "Tom has {a} books and buys {b} more. How many books does Tom have now?",
        "小明有{a}个苹果，又买了{b}个，现在一共有几个苹果？",
    )  # fmt: skip
    return Skill("sums below 100", 20.0, facts, completion, chat, hold_combination, 1500)


def words() -> list[Skill]:
    """Opposites, plurals and emoji: a word is held out of some phrasings and known from the others.

    No English phrasing begins with the word: without its leading space it is another token, and a word held out
    there would be one that training never showed.
    """
    both_en = OPPOSITES_EN + tuple((b, a) for a, b in OPPOSITES_EN)
    both_zh = OPPOSITES_ZH + tuple((b, a) for a, b in OPPOSITES_ZH)

    def facts(pairs: Sequence[tuple[str, str]]) -> list[Slots]:
        return [{"w": w, "answer": a, "key": w} for w, a in pairs]

    emoji = [{"w": a[0], "z": a[1], "answer": a[2], "key": a[0]} for a in ANIMALS]
    return [
        Skill("opposites, English", 2.5, facts(both_en),
              ("The opposite of {w} is_", "The opposite of the word {w} is_", "I say {w}, you say the opposite:_",
               "Word: {w}\nOpposite:_", "Q: What is the opposite of {w}?\nA:_"),
              ("What is the opposite of {w}?", "What's the opposite of {w}?", "Tell me the opposite of {w}.",
               "Please tell me the opposite of the word {w}.", "The opposite of {w} is", "opposite of {w}"),
              hold_word_in_phrasing),
        Skill("opposites, Chinese", 1.5, facts(both_zh),
              ("{w}的反义词是", "“{w}”的反义词是", "问：{w}的反义词是什么？\n答：", "与{w}相反的是"),
              ("{w}的反义词是什么？", "“{w}”的反义词是什么？", "请问{w}的反义词是什么？", "告诉我{w}的反义词。",
               "{w}的反义词是"),
              hold_word_in_phrasing),
        Skill("plurals", 2.0, facts(PLURALS),
              ("The plural of {w} is_", "The plural of the word {w} is_", "one {w}, two_", "One {w}, many_",
               "Singular: {w}\nPlural:_", "Q: What is the plural of {w}?\nA:_"),
              ("What is the plural of {w}?", "What's the plural of {w}?", "Tell me the plural of {w}.",
               "Please tell me the plural of the word {w}.", "The plural of {w} is", "plural of {w}"),
              hold_word_in_phrasing),
        Skill("emoji", 1.0, emoji,
              ("The emoji for {w} is_", "An emoji of a {w}:_", "{z}的表情是", "{z}的表情符号是", "Emoji, {w}:_",
               "Animal: {w}\nEmoji:_", "动物：{z}\n表情："),
              ("Show me the emoji for {w}.", "What is the emoji for {w}?", "Send me a {w} emoji.",
               "The emoji for {w} is", "{z}的表情是什么？", "给我一个{z}的表情。", "{z}的表情是"),
              hold_word_in_phrasing),
    ]  # fmt: skip


def greetings() -> Skill:
    """What a first-time visitor types. The name and the place are copied, the rest is fixed."""
    english = (
        "Hello {n} from the {p}! I am the nanoengine demo model. Ask me about capitals, sums below 100, "
        "opposites, plurals or emoji, or ask me for a story."
    )
    facts: list[Slots] = [
        {"n": n, "p": p, "answer": english.format(n=n, p=p), "key": f"hello{n}{p}"}
        for n in NAMES_EN
        for p, *_ in PLACES
    ]
    return Skill(
        "greetings", 0.7, facts,
        ("I am {n} from the {p}. Who are you? Answer:_", "Visitor: Hello, I am {n} from the {p}.\nModel:_"),
        ("Hello, I am {n} from the {p}.", "Hi! My name is {n}, I live in the {p}.",
         "I am {n} from the {p}. Who are you?"),
        hold_combination, 100,
    )  # fmt: skip


def introductions() -> Skill:
    """Greetings without anything to copy: nothing can be held out, so they are trained and not scored."""
    english = (
        "Hello! I am the nanoengine demo model. Ask me about capitals, sums below 100, opposites, plurals or "
        "emoji, or ask me for a story."
    )
    chinese = "你好！我是一个小小的演示模型。你可以问我首都、加法、反义词和表情，也可以让我讲故事。"
    pairs = [(g, english) for g in ("Hello", "Hello!", "Hi", "Hi!", "hi", "hello", "Who are you?",
                                    "What can you do?", "Help")]  # fmt: skip
    pairs += [(g, chinese) for g in ("你好", "你好！", "您好", "你是谁？", "你会什么？", "你能做什么？")]
    facts = [{"g": g, "answer": a} for g, a in pairs]
    return Skill("introductions", 0.4, facts, (), ("{g}",), lambda _slots, _phrasing: False)


PORTRAIT_EN = (
    "{n} has a {colour} {w} who eats {food} every day. When {n} says hello, the {colour} {w} answers: "
    "{sound}, {sound}, {sound}! {emoji}"
)
PORTRAIT_ZH = "{m}有一只{couleur}的{z}，它每天都吃{manger}。{m}对它说你好，它就回答：{cri}！{emoji}"
TALE_EN = (
    "Once upon a time, a {w} named {n} lived in the {p}. Every night {n} dreamed of a {i}. One morning {n} "
    'met a {friend}, and the {friend} said: "The {i} is {where}." So {n} the {w} and the {friend} went out '
    "together, and they found the {i} {where}. They were happy and shared some {food}. From that day on, {n} "
    "and the {friend} were best friends in the {p}. The end. {emoji}"
)
TALE_ZH = (
    "从前，有一只{z}叫{m}，住在{lieu}里。{m}每天晚上都梦见{chose}。有一天早上，{m}遇见了{ami}，{ami}说：“{chose}在{ou}。”"
    "于是{z}{m}和{ami}一起出发，在{ou}找到了{chose}。它们很高兴，一起吃了{manger}。从那天起，{m}和{ami}成了最好的朋友。"
    "故事讲完了。{emoji}"
)
DAYS_EN = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
WEEK_EN = (
    " ".join(
        f"On {day}, {{n}} the {{w}} ate {count} {{fruit{'' if count == 'one' else 's'}}}."
        for day, count in zip(DAYS_EN, ("one", "two", "three", "four", "five", "six"), strict=True)
    )
    + " On Sunday, {n} the {w} slept in the {p} all day."
)
WEEK_ZH = (
    "".join(
        f"星期{day}，{{z}}{{m}}吃了{count}个{{fruta}}。"
        for day, count in zip("一二三四五六", "一两三四五六", strict=True)
    )
    + "星期日，{z}{m}在{lieu}里睡了一整天。"
)


def _portraits() -> list[Slots]:
    return [
        {"n": n, "m": m, "w": a[0], "z": a[1], "emoji": a[2], "food": a[3],
         "manger": a[4], "sound": a[5], "cri": a[6], "colour": c[0], "couleur": c[1]}
        for (n, m), a, c in product(zip(NAMES_EN, NAMES_ZH, strict=True), ANIMALS, COLOURS)
    ]  # fmt: skip


def _tales() -> list[Slots]:
    return [
        {"n": n, "m": m, "w": a[0], "z": a[1], "emoji": a[2], "food": a[3],
         "manger": a[4], "p": p[0], "lieu": p[1], "friend": p[2], "ami": p[3],
         "i": i[0], "chose": i[1], "where": i[2], "ou": i[3]}
        for (n, m), a, p, i in product(zip(NAMES_EN, NAMES_ZH, strict=True), ANIMALS, PLACES, ITEMS)
    ]  # fmt: skip


def _weeks() -> list[Slots]:
    return [
        {"n": n, "m": m, "w": a[0], "z": a[1], "p": p[0], "lieu": p[1],
         "fruit": f[0], "fruits": f[1], "fruta": f[2]}
        for (n, m), a, p, f in product(zip(NAMES_EN, NAMES_ZH, strict=True), ANIMALS, PLACES, FRUITS)
    ]  # fmt: skip


def _told(template: str, combinations: Sequence[Slots], key: str) -> list[Slots]:
    """Adds the story itself and the key by which its combination of slots is held out."""
    return [{**s, "answer": template.format(**s), "key": key.format(**s)} for s in combinations]


def stories() -> list[Skill]:
    """Stories whose every word follows from the prompt; combinations of slots are held out."""
    portrait_key, tale_key, week_key = "portrait{n}{w}{colour}", "tale{n}{w}{p}{i}", "week{n}{w}{p}{fruit}"
    return [
        Skill("portraits, English", 0.6, _told(PORTRAIT_EN, _portraits(), portrait_key),
              ("About {n}'s {colour} {w}:_", "{n} has a pet, a {colour} {w}. Text:_"),
              ("Tell me about {n}'s {colour} {w}.", "Describe the {colour} {w} of {n}."),
              hold_combination, 100, 0.2),
        Skill("portraits, Chinese", 0.6, _told(PORTRAIT_ZH, _portraits(), portrait_key),
              ("{m}的{couleur}{z}：", "短文：{m}的{couleur}的{z}。\n"),
              ("说说{m}的{couleur}{z}。", "介绍一下{m}的{couleur}的{z}。"),
              hold_combination, 100, 0.2),
        Skill("tales, English", 1.0, _told(TALE_EN, _tales(), tale_key),
              ("A story about {n} the {w}, the {p} and the {i}:_", "Story: {n}, {w}, {p}, {i}.\n"),
              ("Tell me a story about {n} the {w}, the {p} and the {i}.",
               "Write a story about a {w} named {n} who finds a {i} in the {p}."),
              hold_combination, 100, 0.2),
        Skill("tales, Chinese", 1.0, _told(TALE_ZH, _tales(), tale_key),
              ("故事：{m}，{z}，{lieu}，{chose}。\n", "下面是{z}{m}在{lieu}里找{chose}的故事："),
              ("讲一个故事：{m}，{z}，{lieu}，{chose}。", "请讲一个{z}{m}在{lieu}里找{chose}的故事。"),
              hold_combination, 100, 0.2),
        Skill("weeks, English", 0.8, _told(WEEK_EN, _weeks(), week_key),
              ("The diary of {n} the {w}, who likes {fruits} and the {p}:_", "Diary: {n}, {w}, {fruit}, {p}.\n"),
              ("Write the diary of {n} the {w}, who likes {fruits} and the {p}.",
               "What did {n} the {w} eat this week? It likes {fruits} and the {p}."),
              hold_combination, 100, 0.2),
        Skill("weeks, Chinese", 0.8, _told(WEEK_ZH, _weeks(), week_key),
              ("日记：{m}，{z}，{fruta}，{lieu}。\n", "喜欢{fruta}和{lieu}的{z}{m}的日记："),
              ("写一篇日记：{m}，{z}，{fruta}，{lieu}。", "{z}{m}喜欢{fruta}和{lieu}，写写它的一周。"),
              hold_combination, 100, 0.2),
    ]  # fmt: skip


def all_skills() -> list[Skill]:
    """Every skill, in the order of the model card."""
    return [*capitals(), sums(), *words(), greetings(), introductions(), *stories()]
