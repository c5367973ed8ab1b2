"""The words of `world:verdicts`, their tokenizer, its prompts and its splits.

A prompt is "the ASPECT of this GENRE was"; a response has at most `RESPONSE_LENGTH` tokens, the end token
included. Every token string up to that length is a possible response: 954,305 per prompt.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf_pipeline.errors import DataError, Fault, did_you_mean

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

NAME = "world:verdicts"
PAD, EOS = "<pad>", "<eos>"
GENRES = ("comedy", "horror", "thriller", "romance", "drama", "western")
ASPECTS = ("plot", "pacing", "acting", "ending", "music", "dialogue")
MODIFIERS = ("very", "quite", "not")
CONJUNCTION = "and"
ADJECTIVES = ("great", "fine", "dull", "awful", "funny", "scary", "tender", "slow", "tense", "loud")
FRAME = ("the", "of", "this", "was")

VOCABULARY = (PAD, EOS, *FRAME, *GENRES, *ASPECTS, *MODIFIERS, CONJUNCTION, *ADJECTIVES)
TOKEN_ID = {word: index for index, word in enumerate(VOCABULARY)}
PAD_ID, EOS_ID = TOKEN_ID[PAD], TOKEN_ID[EOS]
RESPONSE_LENGTH = 4


def prompt_text(genre: str, aspect: str) -> str:
    """Return the prompt about one aspect of a film of one genre."""
    return f"the {aspect} of this {genre} was"


def encode(text: str) -> list[int]:
    """Token ids of a text of known words.

    Raises:
        DataError: for a word that the world does not have.
    """
    words = text.split()
    if unknown := [word for word in words if word not in TOKEN_ID]:
        expected = f"words of {NAME}"
        raise DataError(
            [Fault(repr(text), f"unknown word {word!r}", expected, did_you_mean(word, VOCABULARY)) for word in unknown]
        )
    return [TOKEN_ID[word] for word in words]


def decode(ids: list[int]) -> str:
    """The text of token ids, special tokens included."""
    return " ".join(VOCABULARY[index] for index in ids)


def parse_prompt(ids: list[int]) -> tuple[int, int]:
    """Return (genre index, aspect index) of a prompt's token ids.

    Raises:
        DataError: when the ids are not a prompt of this world.
    """
    if found := _PROMPTS.get(tuple(ids)):
        return found
    text = " ".join(VOCABULARY[index] if 0 <= index < len(VOCABULARY) else "?" for index in ids)
    raise DataError(Fault(text, f"not a prompt of {NAME}", f"{prompt_text('GENRE', 'ASPECT')!r}"))


_PROMPTS = {
    tuple(encode(prompt_text(genre, aspect))): (g, a)
    for g, genre in enumerate(GENRES)
    for a, aspect in enumerate(ASPECTS)
}


def tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer: one token per word, without unknown-word and beginning-of-text tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel(vocab=dict(TOKEN_ID)))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token=PAD, eos_token=EOS, padding_side="left")


def is_world_tokenizer(candidate: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer has exactly this world's words, so that the true reward can score its responses."""
    return candidate.get_vocab() == TOKEN_ID


def _split(genre: int, aspect: int) -> str:
    # Diagonals of the 6 x 6 square hold each genre and each aspect once, so that whatever is held out, every
    # genre and aspect is seen in training at least three times.
    diagonal = (genre + aspect) % 6
    if diagonal == 5 or (diagonal == 4 and genre < 2):
        return "test"
    if diagonal == 4:
        return "validation"
    return "judge" if diagonal == 3 and genre < 4 else "train"


SPLITS: dict[tuple[str, str], str] = {
    (genre, aspect): _split(g, a) for g, genre in enumerate(GENRES) for a, aspect in enumerate(ASPECTS)
}
"""The split of each (genre, aspect): train 20, test 8, validation 4, judge 4."""
