"""The model card of a trained drafter: README.md with Hugging Face's front matter.

It says only what it is told; what is not known is left out.
"""

import json
import platform
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata

from ..engine import backend
from ..loading.files import shell_word
from .evaluate import Measured

PAPER = "https://arxiv.org/abs/2403.09919"
SPECIAL = re.compile(r"([\\`*_\[\]<>|~$])")  # what Markdown would not show as it is
REPOSITORY = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass(frozen=True)
class Facts:
    """What is known of a trained drafter; None and empty values are left out of its card."""

    base: str  # the base model as the user named it
    drafter: str = ""  # the drafter's folder or repository, for the usage snippet
    identity: str = ""  # of the base model, for people (str(BaseIdentity))
    tags: Sequence[str] = ()  # further ones, by which it is found
    license: str = ""  # of the drafter, as Hugging Face abbreviates it
    license_note: str = ""  # where the licence comes from, or what else binds the user
    commands: Sequence[str] = ()  # the command lines that made it
    sizes: dict[str, object] = field(default_factory=dict)  # of the network, by name
    parameters: int | None = None  # how many
    bytes_per_step: int | None = None  # read from memory for one drafted token
    conversations: int | None = None  # that were trained on
    tokens: int | None = None  # of theirs
    trained_tokens: int | None = None  # those of the model's answers
    duplicates: int | None = None  # conversations dropped because they came before
    loops: int | None = None  # conversations dropped for repetition
    held_out: int | None = None  # conversations kept for the losses below
    sources: Sequence[str] = ()  # where the conversations come from
    seeds: dict[str, int] = field(default_factory=dict)  # by what they are for
    versions: dict[str, str] = field(default_factory=dict)  # of software and machine, see ``environment``
    steps: int | None = None  # of the optimizer
    epochs: float | None = None  # passes over the data
    seconds: float | None = None  # of training
    loss: Sequence[float] = ()  # on held-out conversations, for each depth
    top1: Sequence[float] = ()  # share of the held-out tokens that were its first choice, for each depth
    measured: Mapping[str, Sequence[Measured]] = field(default_factory=dict)  # for each set of prompts
    pictures: Sequence[str] = ()  # files beside the card: its learning curve
    notes: Sequence[str] = ()  # further remarks, in Markdown


def environment() -> dict[str, str]:
    """Versions of what computes, and the machine."""
    packages = {name: metadata.version(name) for name in ("mlx-redrafter", "mlx", "mlx-lm")}
    machine = {"platform": platform.platform(), "chip": backend.chip()}
    return {**packages, "python": platform.python_version(), **machine}


def model_card(facts: Facts) -> str:
    """The text of README.md."""
    parts = [
        _front_matter(facts),
        f"# A recurrent drafter for {escape(facts.base)}",
        f"It makes {escape(facts.base)} generate faster without changing what it says: it drafts tokens that "
        f"the model then verifies ([ReDrafter]({PAPER})). It is of no use without that model.",
        _section("Use", _usage(facts)),
        _section("Network", _network(facts)),
        _section("Data", _data(facts)),
        _section("Training", _training(facts)),
        _section("Held-out conversations", _losses(facts)),
        _section("Measured by real decoding", _evaluation(facts)),
        *facts.notes,
        _section("License", _joined([escape(facts.license), escape(facts.license_note)])),
    ]
    return _joined(parts) + "\n"


def evaluation_table(measured: Iterable[Measured]) -> str:
    """A Markdown table with one line per draft shape and temperature."""
    rows = [
        [
            shape_text(m),
            f"{m.temperature:g}",
            f"{m.prompts:,}",
            f"{m.tokens:,}",
            f"**{m.tokens_per_step:.2f}** ({m.low:.2f}–{m.high:.2f})",
            " ".join(f"{share:.2f}" for share in m.acceptance),
        ]
        for m in measured
    ]
    head = ["width × length, nodes", "temperature", "prompts", "tokens", "tokens per step"]
    return _table([*head, "acceptance by depth"], rows)


def category_table(measured: Iterable[Measured]) -> str:
    """A Markdown table of tokens per step in each category; empty if there are none."""
    measured = list(measured)
    names = list(dict.fromkeys(name for m in measured for name in m.by_category))
    rows = [
        [f"{shape_text(m)} at {m.temperature:g}"]
        + [f"{m.by_category[name]:.2f}" if name in m.by_category else "" for name in names]
        for m in measured
    ]
    return _table(["tokens per step", *map(escape, names)], rows) if names else ""


def shape_text(measured: Measured) -> str:
    """The draft shape in a table."""
    shape = measured.shape
    copied = f" + {shape.lookup} copied" if shape.lookup else ""
    return f"{shape.width} × {shape.length}{copied}, {shape.size}"


def escape(text: object) -> str:
    """Text on one line that Markdown shows as it is, in a table too."""
    return SPECIAL.sub(r"\\\1", " ".join(str(text).split()))


def _front_matter(facts: Facts) -> str:
    lines = ["---", "library_name: mlx-redrafter"]
    if facts.license:
        lines.append(f"license: {_yaml(facts.license)}")
    if REPOSITORY.fullmatch(facts.base):  # Hugging Face takes nothing else
        lines.append(f"base_model: {_yaml(facts.base)}")
    tags = [f"- {tag}" for tag in ("mlx", "redrafter", "speculative-decoding", *facts.tags)]
    return "\n".join([*lines, "tags:", *tags, "---"])


def _yaml(text: str) -> str:
    values = ("true", "false", "null", "yes", "no")  # which are no texts
    plain = re.fullmatch(r"[A-Za-z][\w./-]*", text) and text.lower() not in values
    return text if plain else json.dumps(text, ensure_ascii=False)


def _usage(facts: Facts) -> str:
    if not facts.drafter:
        return ""
    words = [shell_word(word) for word in (facts.base, facts.drafter)]
    command = 'mlx-redrafter generate --model {} --drafter {} --prompt "Hello"'.format(*words)
    python = (
        "from mlx_redrafter import generate, load\n\n"
        f"model, tokenizer = load({json.dumps(facts.base)}, drafter={json.dumps(facts.drafter)})\n"
        'messages = [{"role": "user", "content": "Hello"}]\n'
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
        "print(generate(model, tokenizer, prompt))"
    )
    return f"{_fence('bash', command)}\n\n{_fence('python', python)}"


def _network(facts: Facts) -> str:
    sizes = [(escape(name), escape(value)) for name, value in facts.sizes.items() if value is not None]
    size = "" if facts.bytes_per_step is None else f"{facts.bytes_per_step / 1e6:,.2f} MB"
    return _bullets(
        [
            ("Base model", escape(facts.identity)),
            *sizes,
            ("Parameters", _count(facts.parameters)),
            ("Read from memory per drafted token", size),
        ]
    )


def _data(facts: Facts) -> str:
    return _bullets(
        [
            ("Sources", "; ".join(escape(source) for source in facts.sources)),
            ("Conversations trained on", _count(facts.conversations)),
            ("Tokens", _count(facts.tokens)),
            ("Tokens trained on", _count(facts.trained_tokens)),
            ("Dropped as duplicates", _count(facts.duplicates)),
            ("Dropped as loops", _count(facts.loops)),
            ("Held-out conversations", _count(facts.held_out)),
        ]
    )


def _training(facts: Facts) -> str:
    rows = _bullets(
        [
            ("Steps", _count(facts.steps)),
            ("Epochs", "" if facts.epochs is None else f"{facts.epochs:.2f}"),
            ("Time", "" if facts.seconds is None else duration(facts.seconds)),
            ("Seeds", ", ".join(f"{escape(name)} {seed}" for name, seed in facts.seeds.items())),
            ("Versions", ", ".join(f"{escape(k)} {escape(v)}" for k, v in facts.versions.items())),
        ]
    )
    commands = _fence("bash", "\n".join(facts.commands)) if facts.commands else ""
    return _joined([commands, rows])


def _losses(facts: Facts) -> str:
    depths = range(max(len(facts.loss), len(facts.top1)))
    rows = [
        [name, *(f"{values[depth]:.3f}" if depth < len(values) else "" for depth in depths)]
        for name, values in (("loss (nats)", facts.loss), ("top-1", facts.top1))
        if values
    ]
    table = _table(["depth", *(str(depth + 1) for depth in depths)], rows) if rows else ""
    return _joined([table, *(f"![Learning curve]({name})" for name in facts.pictures)])


def _evaluation(facts: Facts) -> str:
    if not facts.measured:
        return ""
    parts = ["1 token per step is plain decoding; in parentheses, a 95 % bootstrap interval over prompts."]
    for prompts, rows in facts.measured.items():
        parts += [f"Prompts: {escape(prompts)}", evaluation_table(rows), category_table(rows)]
    return _joined(parts)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(filter(None, parts))


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _bullets(pairs: Iterable[tuple[str, str]]) -> str:
    return "\n".join(f"- {name}: {value}" for name, value in pairs if value)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _fence(language: str, text: str) -> str:
    """A code block whose fence is longer than any in the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"


def _count(value: int | None) -> str:
    return "" if value is None else f"{value:,}"


def duration(seconds: float) -> str:
    """For people, such as 1 h 30 min."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
