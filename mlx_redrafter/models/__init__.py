"""The language model and the drafter, as decoding needs them."""
