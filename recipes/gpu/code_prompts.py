"""Prompts for a coding model: ``python code_prompts.py [COUNT] > code.jsonl``; ``--openings`` prints openings.

``edits`` makes more of them around code that the model wrote itself.
"""
# ruff: noqa: E501

import json
import random
import re
import sys

SEED = 20261126
LANGUAGES = [
    "Python",
    "Python",
    "Python",
    "JavaScript",
    "JavaScript",
    "TypeScript",
    "TypeScript",
    "Java",
    "Java",
    "C++",
    "C",
    "Go",
    "Go",
    "Rust",
    "Rust",
    "C#",
    "Ruby",
    "PHP",
    "Kotlin",
    "Swift",
    "Bash",
    "SQL",
]
SUBJECTS = """parses a CSV file and returns the rows as records|reads a configuration file with defaults|merges two sorted lists
counts the words in a text|finds the longest common prefix of strings|computes the moving average of a list of numbers
groups a list of orders by customer|checks whether brackets are balanced|converts Roman numerals to integers
implements a least-recently-used cache|implements a binary search tree with insert, find and delete|implements a priority queue
implements a stack and a queue|implements a linked list|implements a hash map with chaining|implements a trie for prefix search
sorts an array with merge sort|sorts an array with quicksort|finds the k largest numbers|removes duplicates and keeps the order
downloads a web page and extracts its links|calls a REST API and handles errors|retries a request with exponential backoff
rate-limits calls with a token bucket|validates an email address|validates a password by several rules|hashes passwords safely
logs messages to a file with levels|measures how long a function takes|memoizes a function|debounces an event handler
renders a table of users|uploads a file with progress|paginates a list|filters products by price and category|implements a shopping cart
simulates a bank account with deposits and withdrawals|simulates an elevator|simulates the game of life|plays tic-tac-toe|plays hangman
solves a sudoku|solves the n-queens problem|finds the shortest path with Dijkstra's algorithm|traverses a graph breadth first|finds connected components
finds cycles in a directed graph|sorts tasks by their dependencies|computes the edit distance of two strings|compresses text with run-length encoding
encodes and decodes base64|encodes a message with the Caesar cipher|generates random passwords|generates prime numbers with a sieve
computes Fibonacci numbers|computes the greatest common divisor|multiplies two matrices|transposes a matrix|rotates an image by 90 degrees
converts temperatures|converts JSON to XML|flattens a nested dictionary|deep-copies an object|compares two versions of a document
reads command-line arguments|walks through a folder and sums the sizes of files|finds duplicate files|renames files by a pattern|watches a folder for changes
parses dates in several formats|computes the number of working days between two dates|schedules jobs|sends an email with an attachment
connects to a database and runs a query|maps rows to objects|implements a repository for users|migrates a table|implements a transaction with rollback
serves static files over HTTP|implements a to-do list API|implements authentication with tokens|implements a chat server with sockets|implements a publish-subscribe system
implements a thread pool|implements a producer and a consumer|synchronizes access to a counter|runs tasks in parallel and collects the results|cancels a task after a timeout
parses arithmetic expressions|implements a tokenizer for a small language|implements an interpreter for a stack machine|implements a state machine for an order|implements the observer pattern
implements dependency injection|implements an event emitter|implements undo and redo|implements a text editor buffer|implements a plugin system
computes statistics of a data set|fits a line to points|clusters points with k-means|normalizes features|splits data into training and test sets
draws a chart|scrapes a table|translates text with a dictionary|spell-checks a word|searches text with a regular expression|highlights matches
formats numbers as currency|pads and aligns text in columns|prints a calendar|prints a pyramid of stars|reverses the words of a sentence
manages an inventory|tracks students and their grades|books seats in a cinema|manages a library of books|manages parking spaces|assigns employees to shifts
resizes images|reads sensor data and raises alarms|computes checksums|packs and unpacks binary data|implements a ring buffer|implements a bloom filter""".replace(
    "\n", "|"
).split("|")
FORMS = [
    "Write a {l} function that {s}.",
    "Write a {l} function that {s}. Include comments.",
    "Write a {l} class that {s}.",
    "Write a {l} program that {s}.",
    "Implement the following in {l}: code that {s}.",
    "{s}. Use {l}.",
    "How do I write {l} code that {s}?",
    "Give me a short {l} example that {s}.",
    "Show two ways to write {l} code that {s}, and compare them.",
    "Write {l} code that {s}, with unit tests.",
    "Write {l} code that {s}, with error handling.",
    "In {l}, write a module that {s}, with an example of its use.",
    "i need {l} code that {s}",
    "Write a clean, documented {l} implementation that {s}.",
    "Write a {l} command-line tool that {s}.",
    "Explain step by step how to write {l} code that {s}, then give the code.",
    "Write efficient {l} code that {s}. What is its complexity?",
    "Write a {l} interface and two implementations; it {s}.",
    "Write only the code, in {l}: it {s}.",
]
THEN = [
    "Now add error handling.",
    "Now add type annotations.",
    "Write unit tests for it.",
    "Make it faster.",
    "Rewrite it without recursion.",
    "Add comments to every step.",
    "Explain the code line by line.",
    "Now do the same in {l}.",
    "Rename the variables so that they say more.",
    "Turn it into a class.",
    "Make it work with streams instead of lists.",
    "Add logging.",
    "Show how to call it.",
    "Remove the comments.",
    "Add a parameter that turns the output off.",
    "What happens with empty input? Fix it if needed.",
    "Make it asynchronous.",
    "Split it into smaller functions.",
    "Show the complete code again with these changes.",
]
EDITS = [
    "Add error handling to this code:\n\n{c}",
    "{c}\n\nAdd comments to this code.",
    "Fix any bugs in the following code.\n\n{c}",
    "Refactor this code so that it is easier to read:\n\n{c}",
    "{c}\n\nRename the variables so that they say more and show the whole code.",
    "Write unit tests for this code.\n\n{c}",
    "Explain what this code does:\n\n{c}",
    "Convert this code to {l}:\n\n{c}",
    "{c}\n\nAdd logging to this.",
    "Add type annotations or types to this code and return all of it.\n\n{c}",
    "Review the following code.\n\n{c}",
    "Make this code faster.\n\n{c}",
    "Add a parameter `verbose` to the main function below.\n\n{c}",
    "{c}\n\nReturn the same code with a docstring for every function.",
    "Turn this into a class:\n\n{c}",
    "Simplify:\n\n{c}",
    "Complete the code where something is missing:\n\n{c}",
    "Find out what is wrong here, and show the corrected code.\n\n{c}",
    "Add input validation.\n\n{c}",
    "{c}\n\nWhat is the output?",
    "Here is a file from my project:\n\n{c}\n\nAdd a function that prints a summary of the data, leave the rest as it is.",
    "Change only what is needed so that the result is sorted.\n\n{c}",
]
OPENINGS = [
    "Write a Python function",
    "Write a JavaScript function",
    "Write a TypeScript",
    "Write a Java class",
    "Write a C++ program",
    "Write a Go function",
    "Write a Rust function",
    "Write a SQL query",
    "Write a bash script",
    "Write a regular expression",
    "Write unit tests for",
    "Create a React component",
    "Create an HTML page",
    "Create a CSS",
    "Create a Dockerfile",
    "Create a REST API",
    "Implement a",
    "Implement the",
    "Refactor the following",
    "Fix the bug in this code:",
    "Why does this code",
    "Explain the difference between",
    "Explain what the following code does:",
    "How do I",
    "How can I",
    "What is the best way to",
    "What does",
    "Convert this code",
    "Optimize",
    "Add comments to",
    "Complete the function",
    "def ",
    "function ",
    "class ",
    "import ",
    "I am getting an error",
    "I have a list of",
    "I want to",
    "I'm trying to",
    "Given an array",
    "Given a string",
    "Given a table",
    "Design a",
    "Write a script that",
    "Write a program that",
    "Write a Python script",
    "Write a Python class",
    "Write a C function",
    "Write a Kotlin",
    "Write a Swift",
    "Write a Ruby",
    "Write a PHP",
    "Using pandas",
    "Using numpy",
    "In Django",
    "In Flask",
    "In Node.js",
    "In Spring Boot",
    "Show me how to",
    "Generate",
    "Here is my code:",
    "Please review",
    "Can you",
    "Could you",
    "Debug",
]


def turns(chance: random.Random) -> list[str]:
    language, subject = chance.choice(LANGUAGES), chance.choice(SUBJECTS)
    first = chance.choice(FORMS).format(l=language, s=subject)
    return [
        first[0].upper() + first[1:],
        *(t.format(l=chance.choice(LANGUAGES)) for t in chance.sample(THEN, 3)),
    ]


def code_blocks(text: str) -> list[str]:
    """Fenced code of 6 to 60 lines."""
    blocks = re.findall(r"```[a-z+#]*\n.*?\n```", text, re.DOTALL)
    return [block for block in blocks if 6 <= block.count("\n") <= 60]


def edits(chance: random.Random, blocks: list[str]) -> list[str]:
    """The user's turns of a conversation about some code."""
    first = chance.choice(EDITS).format(c=chance.choice(blocks), l=chance.choice(LANGUAGES))
    return [first, *(t.format(l=chance.choice(LANGUAGES)) for t in chance.sample(THEN, 3))]


def files(chance: random.Random, blocks: list[str], size: int) -> list[str]:
    """As ``edits``, about several files of ``size`` characters together."""
    parts: list[str] = []
    while sum(map(len, parts)) < size:
        name = f"{chance.choice(['src', 'lib', 'app'])}/{chance.choice(['main', 'util', 'model', 'service', 'parser', 'store', 'view', 'test'])}{len(parts)}"
        parts.append(f"File {name}:\n{chance.choice(blocks)}")
    number = chance.randrange(len(parts))
    name = parts[number].split(":\n")[0]
    task = chance.choice(EDITS).replace("{c}", "").strip().format(l=chance.choice(LANGUAGES))
    body = "\n\n".join(parts)
    asked = [
        f"{name} of these: {task}",
        *(
            f"{parts[chance.randrange(len(parts))].split(':')[0]}: {t.format(l='Python')}"
            for t in chance.sample(THEN, 5)
        ),
    ]
    return [chance.choice([f"{body}\n\n{asked[0]}", f"{asked[0]}\n\n{body}"]), *asked[1:]]


if __name__ == "__main__":
    if "--openings" in sys.argv:
        print("\n".join(OPENINGS))
    else:
        chance = random.Random(SEED)
        for _ in range(int(sys.argv[1]) if len(sys.argv) > 1 else 12000):
            print(json.dumps({"turns": turns(chance)}))
