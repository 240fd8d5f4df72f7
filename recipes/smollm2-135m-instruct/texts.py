"""Prompts about texts that the model wrote itself: summaries, questions, rewriting, extraction, translation.

    python texts.py FOLDER [COUNT] > texts.jsonl

The texts are the paragraphs and sentences of the answers in the folder's shards (``data/NAME.npz``).
"""
# ruff: noqa: E501

import json
import random
import re
import sys
from collections.abc import Iterator
from itertools import cycle, groupby
from pathlib import Path

from mlx_redrafter import load
from mlx_redrafter.train.data import read_shard

SEED = 20261124
SPECIAL = 17  # SmolLM2's first token ids are no text


def lines(text: str) -> list[str]:
    return text.strip().split("\n")


summarize = lines("""
Summarize the following text:
Summarize this text in one sentence.
Give a short summary of the passage below.
Summarize the main points of this text as bullet points.
TL;DR of this:
What is the main idea of the following paragraph?
Write a headline for this text, then a two-sentence summary.
Shorten this text to half its length.
Summarise this in plain language for a child.
What are the key takeaways from this passage?
In two or three sentences, what does this text say?
Write an abstract of this text.
""")
rewrite = lines("""
Rewrite this text in a more formal style.
Rewrite the following in simpler words.
Paraphrase this paragraph.
Turn this into a friendly email.
Make this text more persuasive.
Rewrite this text in the past tense.
Correct any mistakes in this text.
Turn the following text into a dialogue between two friends.
Continue this text with one more paragraph.
Rewrite this as a numbered list.
Write a critical response to this text.
Write a poem about the content of this text.
""")
extract = lines("""
List all nouns in this text.
Extract the most important keywords from this text.
List every name, place and date in the following text.
Classify the tone of this text and explain why.
Extract the facts from this passage as JSON.
What topic does this text belong to? Choose from science, history, health, business, technology, arts, other. Explain.
Write three questions that this text answers, with the answers.
Make a table of the main terms in this text and what they mean.
Which claims in this text are opinions and which are facts?
""")
questions = lines("""
What is this text about?
Who or what is mentioned first, and what is said about it?
Why does it matter, according to the text?
What does the author suggest?
What problem is described, and what solution?
What happens at the end?
Which example is given?
What can a reader learn from this?
Is the text positive or negative about its subject?
What are the causes and effects mentioned?
How does the text explain it?
What would be a good title, and why?
""")
introductions = lines("""
Answer the question using the text below.
Read the passage and answer the question.
Use only the following context to answer.
Context and question follow. Answer in one or two sentences.
Here is a passage. Answer the question after it.
""")
languages = [
    "French",
    "Spanish",
    "German",
    "Italian",
    "Portuguese",
    "Dutch",
    "French",
    "Spanish",
    "German",
    "Italian",
    "Swedish",
    "Polish",
    "Russian",
    "Japanese",
    "Chinese",
    "Latin",
]
translations = [
    "Translate into {language}: {text}",
    'Translate the following sentence to {language}: "{text}"',
    "How do you say this in {language}? {text}",
    "Translate to {language}: {text}",
    "Please translate this into {language}.\n\n{text}",
    "{text}\n\nGive the {language} translation.",
    "English: {text}\n{language}:",
]


def answers(folder: Path) -> Iterator[str]:
    _, tokenizer = load(drafter=None)
    for path in sorted((folder / "data").glob("*.npz")):
        for row in read_shard(path):
            for own, run in groupby(zip(row.tokens, row.trained, strict=True), key=lambda pair: pair[1]):
                if own:
                    yield tokenizer.decode([int(t) for t, _ in run if t >= SPECIAL]).strip()


def texts(folder: Path) -> tuple[list[str], list[str]]:
    """Paragraphs of 35 to 110 words and sentences of 5 to 22."""
    paragraphs, sentences = set(), set()
    for answer in answers(folder):
        for part in map(str.strip, re.split(r"\n\n+", answer)):
            if not re.fullmatch(r"[A-Z][^\n`]*[.!?]", part):
                continue
            if 35 <= len(part.split()) <= 110:
                paragraphs.add(part)
            for sentence in re.split(r"(?<=[.!?]) ", part):
                if 5 <= len(sentence.split()) <= 22 and re.fullmatch(r"[A-Z][^:*\[\]]*[.!?]", sentence):
                    sentences.add(sentence)
    return sorted(paragraphs), sorted(sentences)


def turn(chance: random.Random, text: str) -> str | None:
    """One about a paragraph; None in one case of seven, which is for translations."""
    kind = chance.random()
    if kind < 0.3:
        task = chance.choice(summarize)
        return chance.choice([f"{task}\n\n{text}", f"{task} {text}", f"{text}\n\n{task}"])
    if kind < 0.6:
        asked, task = chance.choice(questions), chance.choice(introductions)
        forms = [
            f"{task}\n\n{text}\n\n{asked}",
            f"{text}\n\nQuestion: {asked}\nAnswer:",
            f"{text}\n\n{asked}",
        ]
        return chance.choice([*forms, f"Context: {text}\n\nQuestion: {asked}"])
    if kind < 0.86:
        return f"{chance.choice(rewrite if kind < 0.72 else extract)}\n\n{text}"
    return None


def conversations(folder: Path, count: int) -> Iterator[list[str]]:
    chance = random.Random(SEED)
    paragraphs, sentences = texts(folder)
    chance.shuffle(paragraphs)
    chance.shuffle(sentences)
    paragraph, sentence = cycle(paragraphs), cycle(sentences)
    for _ in range(count):
        turns = [turn(chance, next(paragraph)) for _ in range(3)]
        if turns[0] is None:
            turns = [
                chance.choice(translations).format(language=chance.choice(languages), text=next(sentence))
                for _ in range(8)
            ]
        yield [text for text in turns if text]


if __name__ == "__main__":
    for turns in conversations(Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else 16000):
        print(json.dumps({"turns": turns}))
