"""Token ids of texts from those of their pieces, which are encoded once however often they occur.

A piece begins at a space between a printable ASCII character and an ASCII letter. Most tokenizers cut a text there, and
encode what is on each side of a cut by itself; `is_local` says which. Words repeat, so almost every piece is known, and
a completion is encoded from the last cut in front of it on.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from hashlib import sha256
from itertools import chain
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.data.borders import token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

KNOWN = 200_000  # pieces whose ids are kept
LONGEST = 64  # characters of a piece that is kept
_PIECE = re.compile(r" ?[^ ]*(?:(?: (?![A-Za-z])|(?<![!-~]) )[^ ]*)*")
_CUT_IN = re.compile(r"[!-~] (?:[A-Za-z]|\Z)")
pieces_of = _PIECE.findall
"""Return the pieces of a text; an empty one is the last."""

_NORMALIZERS = ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "BertNormalizer")
_PRE_TOKENIZERS = (
    *("ByteLevel", "Digits", "Punctuation", "Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts"),
    "Split",
)
_WORDS = (
    "the",
    "It",
    "x",
    "don't",
    "ÉTÉ",
    "3rd",
    "naïve",
    "漢字",
    "we'll",
    "I",
    "123456",
    "a_b",
    "(so",
    "end)",
    '"no"',
)
_ENDS = ("", ".", ",", ":", "?!", "'", "'s", ")", '"', "...", "-", "_", "1", "12345", "é", "字", "’", "|", "~", "/*")


_LOCAL: dict[bytes, bool] = {}  # by the tokenizer's content: the probes take longer than the texts of a small stage


def is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a tokenizer encodes every piece of a text by itself.

    Known by its parts: it cuts a text by a regular expression or at white space before the model sees it, and neither
    its normaliser nor a token reaches across a cut (SuperBPE has tokens of several words). Then tried on probes.
    """
    if not tokenizer.is_fast:
        return False
    described = str(tokenizer.backend_tokenizer.to_str()), *map(str, tokenizer.all_special_tokens)
    key = sha256("\0".join(described).encode()).digest()
    if key not in _LOCAL:
        _LOCAL[key] = _is_local(tokenizer)
    return _LOCAL[key]


def _is_local(tokenizer: PreTrainedTokenizerBase) -> bool:
    backend: Any = tokenizer.backend_tokenizer
    cuts = _parts(backend.pre_tokenizer, "pretokenizers")
    cutting = [part for part in cuts if part["type"] not in ("Digits", "UnicodeScripts")]
    whole = any(part["type"] == "ByteLevel" and not part.get("use_regex", True) for part in cutting[:1])
    known = all(part["type"] in _PRE_TOKENIZERS for part in cuts) and bool(cutting) and not whole
    known &= all(part["type"] in _NORMALIZERS for part in _parts(backend.normalizer, "normalizers"))
    known &= not getattr(backend.model, "dropout", None)
    known &= not any(_CUT_IN.search(token.replace("Ġ", " ")) for token in backend.get_vocab(with_added_tokens=False))
    for token in tokenizer.added_tokens_decoder.values():
        known &= not (token.rstrip or token.single_word or _CUT_IN.search(token.content))
        known &= not (token.lstrip and token.content[:1].isalpha())
    return known and _agrees(tokenizer)


def _parts(part: Any, several: str) -> list[dict[str, Any]]:
    """The parts of a normaliser or pre-tokeniser, as the library describes them."""
    if part is None:
        return []
    described = json.loads(part.__getstate__())
    inner = described.get(several, [described])
    return [one for item in inner for one in item.get(several, [item])]


def _agrees(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether probes have the same ids as a whole and piece by piece."""
    special = [str(token) for token in tokenizer.all_special_tokens]
    words = [word + end for word in (*_WORDS, *special) for end in _ENDS]
    texts = [
        f"{first}{between}{second}{between}{first}"
        for first, second in zip(words, [*words[7:], *words[:7]])
        for between in (" ", "  ", "\n\n", " \n ")
    ]
    wholes = token_ids(tokenizer, texts)
    pieces = [pieces_of(text) for text in texts]
    names = list(dict.fromkeys(chain.from_iterable(pieces)))
    known = dict(zip(names, token_ids(tokenizer, names)))
    return all(whole == _joined(part, known) for whole, part in zip(wholes, pieces))


def _joined(pieces: Iterable[str], known: dict[str, list[int] | None]) -> list[int] | None:
    """The ids of pieces in a row; None if one has none."""
    found = [known[piece] for piece in pieces]
    return None if None in found else list(chain.from_iterable(found))  # type: ignore[arg-type]


class Pieces:
    """The ids of the pieces that a tokenizer has met; `tokenizer` must be local."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._known: dict[str, list[int] | None] = {}
        self._passing: list[str] = []  # known until the next call of `learn`

    def learn(self, pieces: Iterable[str]) -> None:
        """Encode the pieces that are new; `ids` knows all of them until the next call."""
        for piece in self._passing:
            del self._known[piece]
        new = [piece for piece in set(pieces) if piece not in self._known]
        room = KNOWN - len(self._known)
        self._known.update(zip(new, token_ids(self.tokenizer, new)))
        self._passing = [piece for number, piece in enumerate(new) if number >= room or len(piece) > LONGEST]

    def ids(self, pieces: Iterable[str]) -> list[int] | None:
        """The ids of a text by its pieces; None if the tokenizer has no token for part of it."""
        return _joined(pieces, self._known)
