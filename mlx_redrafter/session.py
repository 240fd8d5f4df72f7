"""A conversation whose every turn goes on from what the model remembers of the turns before."""

import contextlib
from collections.abc import Iterator
from typing import Any

from mlx_lm.tokenizer_utils import TokenizerWrapper

from .chat import Continuing, Message, encode_messages
from .engine.prefixes import Prefixes
from .model import SpeculativeModel
from .options import PromptOptions
from .text import Response, stream_generate


class Session:
    """A conversation with a model.

    Each turn's prompt is the whole conversation in the chat template, of which only what the model has not
    read or said yet is read (all of it where mlx-lm decodes, or keys and values are quantized). Answers are
    in it with the tokens that they were said with. Copies come from the whole conversation.

    Args:
        model, tokenizer: from ``load``; another model may take the place in mid-conversation.
        prompting: how messages become a prompt; may be replaced too.
        prefixes: texts kept for reuse, of this model.

    Attributes:
        messages: the conversation without the system's message.
        prompt_tokens: of the last turn's prompt.
        cached_tokens: how many of them did not have to be read.
    """

    def __init__(
        self,
        model: SpeculativeModel,
        tokenizer: TokenizerWrapper,
        prompting: PromptOptions | None = None,
        prefixes: Prefixes | None = None,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.prompting = prompting or PromptOptions()
        self.prefixes = Prefixes() if prefixes is None else prefixes
        self.messages: list[Message] = []
        self.prompt_tokens = self.cached_tokens = 0
        self._runner = model.prepare()  # of the model to which the prefixes belong
        self._text, self._tokens = "", [0]  # what it has read and said: "" if that is not known

    def encode(self) -> list[int]:
        """Token ids of the conversation.

        Raises:
            ValueError: the chat template refuses it.
        """
        return self._encode(self._render())

    def _encode(self, text: str | None) -> list[int]:
        ids = encode_messages(self.messages, self.tokenizer, text)
        if text and self._text and text.startswith(self._text):
            new = list(self.tokenizer.encode(text[len(self._text) :], add_special_tokens=False))
            if new and ids[-len(new) :] == new:  # the text may be cut there
                return self._tokens + new
        return ids

    def say(self, text: str, **options: Any) -> Iterator[Response]:
        """The answer to what the user says; what there is of it is kept, also if it is broken off.

        Args:
            text: the user's message.
            **options: as of ``stream_generate``.

        Raises:
            ValueError: as ``stream_generate``; the conversation is as it was then.
        """
        told, answer, tokens = options.pop("prompt_progress_callback", None), "", []

        def progress(done: int, total: int) -> None:
            if self.prompt_tokens != total:
                self.prompt_tokens, self.cached_tokens = total, done  # the first call tells what is known
            if told is not None:
                told(done, total)

        if (runner := self.model.prepare()) is not self._runner:
            self.prefixes.clear()
            self._runner, self._text = runner, ""
        self.messages.append({"role": "user", "content": text})
        try:
            rendered = self._render()
            ids = self._encode(rendered)
            tokenizer = Continuing(self.tokenizer) if rendered is None else self.tokenizer
            self.prompt_tokens = self.cached_tokens = 0
            responses: Any = stream_generate(
                self.model,
                tokenizer,
                ids,
                prompt_progress_callback=progress,
                prefixes=self.prefixes,
                **options,
            )
            with contextlib.closing(responses):
                for response in responses:
                    answer += response.text
                    tokens.append(response.token)
                    yield response
            ended = tokens[-1] in self.tokenizer.eos_token_ids
            is_whole = ended or response.finish_reason == "length"  # no stop text has cut it short
            self._text = rendered + answer if rendered and is_whole else ""
            self._tokens = ids + tokens[: len(tokens) - ended]
        finally:
            if answer:
                self.messages.append({"role": "assistant", "content": answer})
            else:
                self.messages.pop()

    def _render(self) -> str | None:
        """The conversation's text; None if the model is given it as it is."""
        raw = self.prompting.is_raw(self.tokenizer)
        return None if raw else self.prompting.render(self.messages, self.tokenizer)
