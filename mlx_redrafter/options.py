"""Which model decodes, and how: what a command line or a request can ask for, checked before any work.

The fields have the names of the flags of ``mlx-redrafter generate``, and messages name these.
"""

import json
import math
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat import Message, encode_messages, refusal, render
from .decoding.sampling import Sampling
from .decoding.state import DraftShape
from .engine.engine import CHUNK, Request
from .loading.find import drafter_folder
from .model import SpeculativeModel, load
from .models.bundle import parse_config, read_config
from .text import check_shape

USUAL = DraftShape(2, 4)  # where some of its numbers are asked for, and not the others
CHOICES = {"kv_bits": (2, 3, 4, 5, 6, 8), "kv_group_size": (32, 64, 128)}  # of a quantized cache
REMEDY = "give others, --ignore-chat-template, or no --system-prompt"
NUMBER = re.compile(r"^(?!temperature )[a-z -]+(?= \S+ is not usable)")  # what a message says of a flag's


@dataclass(frozen=True)
class ModelOptions:
    """Which model decodes, and what drafts for it; ``ValueError`` if a value is not usable."""

    model: str | None = None
    adapter_path: str | None = None
    trust_remote_code: bool = False
    dtype: str = "auto"
    quantize_activations: bool = False
    context_length: int | None = None
    extra_eos_token: Sequence[str] = ()
    drafter: str = "auto"
    draft_model: str | None = None

    def __post_init__(self) -> None:
        for name in ("model", "adapter_path", "drafter", "draft_model"):
            check_text(name, getattr(self, name))
        check_range("context_length", self.context_length, 1)


@dataclass(frozen=True)
class PromptOptions:
    """How messages become a prompt; ``ValueError`` if a value is not usable."""

    system_prompt: str | None = None
    prefill_response: str | None = None
    prompt_cache_file: Path | None = None
    ignore_chat_template: bool = False
    chat_template_config: str | None = None

    def __post_init__(self) -> None:
        for name in ("system_prompt", "prefill_response"):
            check_text(name, getattr(self, name), empty=True)
        given = self.chat_template_config
        try:
            options = json.loads(given or "{}")
        except (ValueError, RecursionError) as error:
            raise ValueError(f"--chat-template-config is not JSON ({error}): give an object.") from error
        if not isinstance(options, dict):
            raise ValueError(f"--chat-template-config {given} is no JSON object: give one.")

    def is_raw(self, tokenizer: TokenizerWrapper) -> bool:
        """Whether the model is given what is said as it is."""
        return bool(self.ignore_chat_template or not tokenizer.has_chat_template)

    def encode(self, messages: list[Message], tokenizer: TokenizerWrapper) -> list[int]:
        """Token ids of a conversation up to where the model goes on; with a prompt cache, only of its end.

        Raises:
            ValueError: the chat template refuses the conversation, or nothing is left to say.
        """
        text = None if self.is_raw(tokenizer) else self.render(messages, tokenizer)
        return encode_messages(messages, tokenizer, text)

    def render(self, messages: list[Message], tokenizer: TokenizerWrapper) -> str:
        """The same as the chat template's text; ``ValueError`` if it refuses the conversation."""
        begun = self.prefill_response is not None
        system = [{"role": "system", "content": self.system_prompt}] * (self.system_prompt is not None)
        answer = [{"role": "assistant", "content": self.prefill_response}] * begun
        options = {"continue_final_message": begun, "add_generation_prompt": not begun}
        options |= json.loads(self.chat_template_config or "{}")
        try:
            text = render(tokenizer, [*system, *messages, *answer], **options)
            if self.prompt_cache_file is not None:
                query = {"role": "user", "content": "<query>"}
                text = text[render(tokenizer, [*system, query, *answer], **options).index("<query>") :]
        except Exception as error:
            raise refusal(messages, error, REMEDY) from error
        return text


@dataclass(frozen=True)
class DecodingOptions:
    """How tokens are picked and drafted, and when to stop; ``ValueError`` if a value is not usable."""

    max_tokens: int = 100
    temp: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    top_k: int = 0
    min_tokens_to_keep: int = 1
    xtc_probability: float = 0.0
    xtc_threshold: float = 0.0
    seed: int | None = None
    stop: Sequence[str] = ()
    prefill_step_size: int = CHUNK
    max_kv_size: int | None = None
    kv_bits: int | None = None
    kv_group_size: int = 64
    quantized_kv_start: int = 5000
    no_draft: bool = False
    beam_width: int | str = "auto"
    beam_length: int | None = None
    max_nodes: int | None = None
    lookup: int | None = None
    num_draft_tokens: int = 3

    def __post_init__(self) -> None:
        for text in self.stop:
            check_text("stop", text)
        check_range("lookup", self.lookup, 0)
        check_range("max_kv_size", self.max_kv_size, 1)
        check_range("quantized_kv_start", self.quantized_kv_start, 0)
        check_range("num_draft_tokens", self.num_draft_tokens, 1)
        check_range("prefill_step_size", self.prefill_step_size, 1)
        if self.max_tokens < 1 and self.max_tokens != -1:
            raise ValueError(
                f"--max-tokens {self.max_tokens} is not usable: give 1 or more, or -1: no limit."
            )
        for name, usable in CHOICES.items():
            if (value := getattr(self, name)) not in (None, *usable):
                raise ValueError(f"{flag(name)} {value} is not usable: choose one of {usable}.")
        try:
            _ = self.sampling
            if self.seed is not None:
                Request((0,), seed=self.seed)  # knows which can be used
        except ValueError as error:
            raise ValueError(NUMBER.sub(lambda found: flag(found[0]), str(error))) from error
        _ = self.shape

    @property
    def filters(self) -> dict[str, Any]:
        """What changes sampling besides the temperature, in our words and mlx-lm's."""
        names = ("top_p", "top_k", "min_p", "min_tokens_to_keep", "xtc_probability", "xtc_threshold")
        return {name: getattr(self, name) for name in names}

    @property
    def sampling(self) -> Sampling:
        """The sampling that is asked for."""
        return Sampling(self.temp, **self.filters)

    @property
    def shape(self) -> DraftShape | None:
        """The draft shape that is asked for; None leaves it to the package."""
        if self.beam_width == "auto" and self.beam_length is None and self.max_nodes is None:
            return None
        width = USUAL.width if self.beam_width == "auto" else int(self.beam_width)
        length = USUAL.length if self.beam_length is None else self.beam_length
        return DraftShape(width, length, self.max_nodes, self.lookup or 0)

    @property
    def for_mlx_lm(self) -> dict[str, Any]:
        """What ``mlx_lm.stream_generate`` has options of the same name for."""
        names = ["prefill_step_size", "max_kv_size", "num_draft_tokens"]
        names += ["kv_bits", "kv_group_size", "quantized_kv_start"]
        return {name: getattr(self, name) for name in names}

    def for_stream_generate(self, tokenizer: TokenizerWrapper) -> dict[str, Any]:
        """All of it as options of ``stream_generate``."""
        return {
            **self.for_mlx_lm,
            "max_tokens": self.max_tokens,
            "sampling": replace(self.sampling, xtc_special_tokens=tuple(never_dropped(tokenizer))),
            "seed": self.seed,
            "stop": self.stop,
            "draft": not self.no_draft,
            "shape": self.shape,
            "lookup": self.lookup,
        }


def never_dropped(tokenizer: TokenizerWrapper) -> list[int]:
    """Token ids that XTC sampling never drops, as in mlx-lm."""
    return [*tokenizer.encode("\n"), *tokenizer.eos_token_ids]


def choose_drafter(options: ModelOptions, decoding: DecodingOptions) -> str | Path | None:
    """What ``load`` is to be told of the drafter, having checked it and the shape as far as is possible."""
    drafter: str | Path | None = None if decoding.no_draft or options.drafter == "none" else options.drafter
    known = None
    if drafter not in (None, "auto"):
        drafter = drafter_folder(options.drafter)
        known = parse_config(drafter, read_config(drafter)).head_outputs
    if decoding.shape is not None:
        check_shape(decoding.shape, known)
    return drafter


def load_model(
    options: ModelOptions, drafter: str | Path | None, tokenizer_config: Any = None, ranks: Any = None
) -> tuple[SpeculativeModel, TokenizerWrapper]:
    """The model with its drafter and tokenizer, for all ``ranks``; warns of a drafter that was not found."""
    model, tokenizer = load(
        options.model,
        tokenizer_config,
        drafter=drafter,
        dtype=options.dtype,
        model_config={"quantize_activations": True} if options.quantize_activations else None,
        adapter_path=options.adapter_path,
        trust_remote_code=options.trust_remote_code,
        ranks=ranks,
    )
    model.context_length = options.context_length or model.context_length
    tokenizer.model_max_length = sys.maxsize  # the context is checked, transformers need not warn
    for token in options.extra_eos_token:
        tokenizer.eos_token_ids.add(_token_id(token, tokenizer))
    if model.drafter is None and drafter is not None:
        warnings.warn(
            f"no drafter ships for {options.model}, and none was found: name one with --drafter.",
            stacklevel=1,
        )
    return model, tokenizer


def _token_id(token: str, tokenizer: TokenizerWrapper) -> int:
    """The id of a token that is given as an id or as text."""
    known = tokenizer.get_vocab()
    ids = [int(token)] if token.isdecimal() else [known[token]] if token in known else []
    ids = ids or [i for i in tokenizer.encode(token, add_special_tokens=False) if i != tokenizer.unk_token_id]
    if len(ids) == 1 and ids[0] in known.values():
        return ids[0]
    raise ValueError(f"--extra-eos-token {token!r} is not one token of this model: name one, or use --stop.")


def warn_of_idle(
    model: ModelOptions, prompt: PromptOptions, decoding: DecodingOptions, tokenizer: TokenizerWrapper
) -> None:
    """Say which flags were given and do nothing."""
    usual = vars(ModelOptions()) | vars(PromptOptions()) | vars(DecodingOptions())
    given = vars(model) | vars(prompt) | vars(decoding)
    d, cached, none = decoding, prompt.prompt_cache_file is not None, model.drafter == "none"
    beams, template = ("beam_width", "beam_length"), ("system_prompt", "prefill_response")
    for idle, why, names in (
        (d.temp == 0, "with --temp 0, which is greedy", ("top_p", "top_k", "min_p", "xtc_probability")),
        (d.min_p == 0, "without --min-p", ("min_tokens_to_keep",)),
        (d.xtc_probability == 0, "without --xtc-probability", ("xtc_threshold",)),
        (d.kv_bits is None and not cached, "without --kv-bits", ("kv_group_size",)),
        (d.kv_bits is None, "without --kv-bits", ("quantized_kv_start",)),
        (model.draft_model is None, "without --draft-model", ("num_draft_tokens",)),
        (d.no_draft and model.draft_model, "with --draft-model", ("drafter", *beams, "lookup")),
        (none, "with --drafter none", beams),
        (prompt.is_raw(tokenizer), "without a chat template", (*template, "chat_template_config")),
        (cached, "with --prompt-cache-file: the cache decides", ("system_prompt", "max_kv_size")),
    ):
        for name in names if idle else ():
            if given[name] not in (None, 0, "none", usual[name]):
                warnings.warn(f"{flag(name)} does nothing {why}.", stacklevel=1)


def flag(name: str) -> str:
    """A field's name, or its words, as a flag."""
    return "--" + re.sub("[ _]", "-", name)


def check_text(name: str, value: str | None, empty: bool = False) -> None:
    """Raise ``ValueError`` if a flag's text is not whole, or is ``empty`` where it may not be."""
    if value == "" and not empty:
        raise ValueError(f"{flag(name)} '' names nothing: leave it out, or give a value.")
    if value and any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        raise ValueError(f"{flag(name)} {value!r} is not text in UTF-8: check the terminal's encoding.")


def check_range(name: str, value: float | None, least: float, most: float = math.inf) -> None:
    """Raise ``ValueError`` if a flag's number is given and out of range, or infinite."""
    if value is not None and not (least <= value <= most and value < math.inf):
        usable = f"{least} or more" if most == math.inf else f"{least} to {most}"
        raise ValueError(f"{flag(name)} {value} is not usable: give {usable}.")
