"""How long a text is in tokens, without tokenizing more of it than needs be.

A tokenizer cuts a text into words (pre-tokens) from its beginning on, and where a word ends it begins anew. So the
words of a piece are the whole text's words, too, but for the last few, which what follows may change, and the first,
which some tokenizers treat differently at the beginning of a text. Those are not counted, and the next piece begins at
the first of the last ones.
"""

from bisect import bisect_left, bisect_right

from tokenizers import Tokenizer

PIECE_CHARACTERS = 1 << 16
"""Tokenizing so many takes tens of milliseconds and a few megabytes."""
LAST_WORDS = 64
"""Words at the end of a piece that what follows may change: a special token that the piece ends in is a few of them."""


def at_least(
    tokenizer: Tokenizer, text: str, enough: int, piece_characters: int = PIECE_CHARACTERS, last_words: int = LAST_WORDS
) -> int:
    """So many tokens ``text`` has at least.

    Counted from its beginning on, a piece at a time, up to the first piece with which there are ``enough``. All but a
    word in each piece is counted where there are fewer. A text with no words to cut it at is tokenized whole.
    """
    counted, start, size = 0, 0, piece_characters
    while counted < enough and start < len(text):
        # A batch of one: unlike a single text it is tokenized without holding the interpreter's lock.
        piece = tokenizer.encode_batch([text[start : start + size]], add_special_tokens=False)[0]
        words = [word for word in piece.word_ids if word is not None]
        first = bisect_right(words, words[0]) if start and words else 0
        if start + size >= len(text):
            return counted + len(words) - first
        tokens = bisect_left(words, words[-1] - last_words) if words else 0
        place = piece.token_to_chars(tokens) if tokens > first else None
        if place is None or place[0] == 0:
            size *= 4
            continue
        counted += tokens - first
        start, size = start + place[0], piece_characters
    return counted
