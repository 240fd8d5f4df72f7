"""Single tokens as texts and bytes, for log-probabilities."""

import re

from mlx_lm.tokenizer_utils import BPEStreamingDetokenizer, TokenizerWrapper
from transformers.convert_slow_tokenizer import bytes_to_unicode

BYTES = {character: byte for byte, character in bytes_to_unicode().items()}
BYTE = re.compile(r"<0x([0-9A-F]{2})>")


def token_bytes(tokenizer: TokenizerWrapper, token: int) -> bytes:
    """A token's bytes, which may be a part of a character."""
    known = tokenizer.convert_ids_to_tokens(token)
    if known is None:
        return b""
    if found := BYTE.fullmatch(known):
        return bytes([int(found[1], 16)])
    is_byte_level = isinstance(tokenizer.detokenizer, BPEStreamingDetokenizer)
    if is_byte_level and token not in tokenizer.all_special_ids and all(c in BYTES for c in known):
        return bytes(BYTES[c] for c in known)
    return str(tokenizer.decode([token])).encode()


def token_text(tokenizer: TokenizerWrapper, token: int) -> str:
    """A token's text, with replacement characters for a part of a character."""
    return token_bytes(tokenizer, token).decode("utf-8", "replace")
