"""One prompt for training and sampling: prompts keep the ids that they have alone, for every kind of tokenizer."""

from __future__ import annotations

import gzip
import json
import random
import re
from itertools import pairwise, product
from pathlib import Path
from types import SimpleNamespace

import pytest

from rlhf_pipeline.data.borders import decoded
from rlhf_pipeline.data.pieces import is_local, pieces_of
from rlhf_pipeline.data.preferences import ASSISTANT
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.tokenize import tokenize

ENDINGS = ("", ":", ": ", ":\n", ":\n\n", ":\n\n\n", ' "', " (", ".", ".\n \n", ":\n\n- ")
BEGINNINGS = ("wax.", " wax.", "\nwax.", "\n\nwax.", "- wax.", '"wax."', "(wax.)", ".wax.", "the wax. ")
TEXTS = [f"Answer{ending}{beginning} the answer" for ending, beginning in product(ENDINGS, BEGINNINGS)] * 3
WIDE = SimpleNamespace(prompt=99, response=99, total=198)
SMOLLM2 = Path(__file__).parents[2] / "build" / "smollm2"


def made(core, **options):
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", **options)


def byte_level():
    """Like GPT-2 and Llama 3: byte-level BPE, whose pieces are cut by a regular expression."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder, core.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core.train_from_iterator(
        TEXTS,
        trainers.BpeTrainer(
            vocab_size=400, special_tokens=["<eos>", "<unk>"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    return made(core)


def sentence_piece(model, trainer, where: str):
    """Like Llama 2 (BPE) and T5 (Unigram): a space before a text, spaces as a letter, pieces across white space."""
    from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers

    core = Tokenizer(model)
    if where == "normalizer":
        core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=where, split=False)
    strip = [] if where == "never" else [decoders.Strip(" ", 1, 0)]
    core.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), *strip])
    core.train_from_iterator(TEXTS, trainer)
    return made(core)


def sentence_piece_bpe(where: str):
    from tokenizers import models, trainers

    options = {"vocab_size": 150, "special_tokens": ["<eos>", "<unk>"], "show_progress": False}
    return sentence_piece(models.BPE(unk_token="<unk>"), trainers.BpeTrainer(**options), where)


def unigram(where: str):
    from tokenizers import models, trainers

    special = ["<eos>", "<unk>"]
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=special, unk_token="<unk>", show_progress=False)
    return sentence_piece(models.Unigram(), trainer, where)


def word_piece():
    """Like BERT: words and their rests, white space is lost."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    core = Tokenizer(models.WordPiece(unk_token="<unk>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.BertPreTokenizer(), decoders.WordPiece(cleanup=False)
    trainer = trainers.WordPieceTrainer(vocab_size=120, special_tokens=["<eos>", "<unk>"], show_progress=False)
    core.train_from_iterator(TEXTS, trainer)
    return made(core)


def word_level():
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    core = Tokenizer(models.WordLevel(unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.train_from_iterator(TEXTS, trainers.WordLevelTrainer(special_tokens=["<eos>", "<unk>"], show_progress=False))
    return made(core)


EXACT = {
    "byte-level BPE": byte_level,
    "BPE, space by normalizer": lambda: sentence_piece_bpe("normalizer"),
    "BPE, space always": lambda: sentence_piece_bpe("always"),
    "BPE, space first": lambda: sentence_piece_bpe("first"),
    "BPE, no space": lambda: sentence_piece_bpe("never"),
    "Unigram, space always": lambda: unigram("always"),
    "Unigram, space first": lambda: unigram("first"),
    "Unigram, no space": lambda: unigram("never"),
}
WITHOUT_WHITE_SPACE = {"WordPiece": word_piece, "WordLevel": word_level}


def check_all(name: str, tokenizer, same) -> int:
    """Check every ending with every beginning, and all beginnings as one ranking; return how many tokens were cut."""
    cut = 0
    for ending in ENDINGS:
        prompt = f"Answer{ending}"
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        rows = [Record("demonstration", prompt, (reply,), (False,)) for reply in BEGINNINGS]
        rows += [Record("pair", prompt, pair, (False, False)) for pair in pairwise(BEGINNINGS)]
        rows += [Record("prompt", prompt)]
        examples, counts = tokenize(rows, tokenizer, WIDE)
        left_out = counts.dropped["identical_pair"]  # white space is lost
        assert len(examples) + left_out == len(rows), (name, prompt, counts)
        cut += counts.truncated["token_across_border"]
        for example in examples:
            assert example.prompt_ids == alone, (name, prompt, example.completion_texts)
            for text, ids in zip(example.completion_texts, example.completions):
                assert same(decoded(tokenizer, alone + ids), prompt + text), (name, prompt, text)
    return cut


@pytest.mark.parametrize("name", EXACT)
def test_a_prompt_keeps_its_ids_and_the_text_is_kept(name):
    tokenizer = EXACT[name]()
    for text in ("Answer: wax.", "Answer:\n\n- wax."):
        assert decoded(tokenizer, tokenizer(text)["input_ids"]) == text, name
    assert check_all(name, tokenizer, lambda found, text: found == text) > 0


@pytest.mark.parametrize("name", WITHOUT_WHITE_SPACE)
def test_a_prompt_keeps_its_ids_where_white_space_is_lost(name):
    tokenizer = WITHOUT_WHITE_SPACE[name]()

    def same(found: str, text: str) -> bool:
        return "<unk>" in found or "".join(found.split()) == "".join(text.split())

    check_all(name, tokenizer, same)


@pytest.mark.check
def test_a_prompt_keeps_its_ids_with_smollm2():
    if not SMOLLM2.is_dir():
        pytest.skip("build/smollm2 is not there: scripts/smollm2.py makes it")
    from rlhf_pipeline.data.tokenizers import load_tokenizer

    assert check_all("SmolLM2", load_tokenizer(str(SMOLLM2)), lambda found, text: found == text) > 30


def test_a_prompt_of_a_blank_line_keeps_it():
    """By hand: `Answer:` and a blank line are four tokens alone; before a reply the line's two ends are two tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    vocabulary = {
        token: i for i, token in enumerate(["<eos>", "<unk>", "A", ":", "Ċ", "ĊĊ", "wax", "w", "a", "x", "wa"])
    }
    merges = [("Ċ", "Ċ"), ("w", "a"), ("wa", "x")]
    core = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = made(core)
    assert tokenizer("A:\n\nwax")["input_ids"] == [2, 3, 4, 4, 6]  # trained from before
    assert tokenizer("A:\n\n")["input_ids"] == [2, 3, 5]  # sampled from
    rows = [Record("demonstration", "A:\n\n", ("wax",), (True,), "f:1"), Record("prompt", "A:\n\n")]
    (trained, sampled), counts = tokenize(rows, tokenizer, WIDE)
    assert (trained.prompt_ids, trained.completions) == ([2, 3, 5], [[6, 0]])
    assert sampled.prompt_ids == [2, 3, 5]
    assert counts.rows == {"token_across_border": ["f:1"]}


def test_a_slow_tokenizer_keeps_the_border_too():
    """By hand: one token for each letter, and `bc` for both; it knows no offsets."""
    from transformers import PreTrainedTokenizer

    class Letters(PreTrainedTokenizer):
        tokens = ("<eos>", "<unk>", "a", "b", "c", "d", "bc")

        @property
        def vocab_size(self):
            return len(self.tokens)

        def get_vocab(self):
            return {token: number for number, token in enumerate(self.tokens)}

        def _tokenize(self, text, **_options):
            return re.findall("bc|.", text)

        def _convert_token_to_id(self, token):
            return self.tokens.index(token)

        def _convert_id_to_token(self, index):
            return self.tokens[index]

        def convert_tokens_to_string(self, tokens):
            return "".join(tokens)

    tokenizer = Letters(eos_token="<eos>", unk_token="<unk>")
    assert not tokenizer.is_fast
    rows = [Record("pair", "ab", ("cd", "dd"), (True, False))]
    (example,), counts = tokenize(rows, tokenizer, WIDE)
    assert (example.prompt_ids, example.completions) == ([2, 3], [[4, 5, 0], [5, 5]])
    assert counts.truncated == {"token_across_border": 1}


def test_words_without_an_unknown_token_keep_the_border_too():
    """By hand: `inside` is a word, and so are `in` and `side`; nothing else is, also no white space."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.WordLevel({"<eos>": 0, "in": 1, "side": 2, "inside": 3}))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
    rows = [Record("pair", "in", ("side", " side in"), (True, True)), Record("prompt", "out", where="f:2")]
    (example,), counts = tokenize(rows, tokenizer, WIDE)
    assert (example.prompt_ids, example.completions) == ([1], [[2, 0], [2, 1, 0]])
    assert [(item.reason, item.fault.where) for item in counts.faults] == [("unknown_token", "f:2")]


WORDS = (
    "wax",
    "Answer",
    "the",
    "don't",
    "it's",
    "x",
    "3",
    "1234567",
    "été",
    "漢字",
    "U.S.",
    "a_b",
    "<eos>",
    "<unk>",
    "e.g.",
)
MARKS = ("", ".", ",", ":", "?!", " (", ")", '"', "'", "...", " -", "_", "|", "/*", "’", "\t")
GAPS = (" ", " ", " ", "  ", "\n", "\n\n", " \n", "\n ", "\u00a0", "")


def text_of(numbers: random.Random, most: int) -> str:
    """Words and marks with all kinds of white space between them and at both ends."""
    parts = []
    for _ in range(numbers.randrange(most)):
        parts += [numbers.choice(GAPS), numbers.choice(WORDS), numbers.choice(MARKS)]
    return "".join([*parts, numbers.choice(GAPS)])


def alike_in_a_crowd(rows: list[Record], tokenizer) -> None:
    """Many rows, encoded piece by piece, and each of them alone, encoded as a whole, give the same examples."""
    wide = SimpleNamespace(prompt=9999, response=9999, total=19998)
    examples, counts = tokenize(rows, tokenizer, wide)
    alone = [tokenize([row], tokenizer, wide) for row in rows]
    assert examples == [example for made, _ in alone for example in made]
    for field in ("truncated", "dropped"):
        assert +getattr(counts, field) == sum((+getattr(one, field) for _, one in alone), start=type(counts.dropped)())
    assert counts.rows.get("token_across_border", []) == [
        where for _, one in alone for where in one.rows.get("token_across_border", [])
    ]
    assert counts.faults == [item for _, one in alone for item in one.faults]


@pytest.mark.parametrize("name", [*EXACT, *WITHOUT_WHITE_SPACE])
def test_pieces_have_the_ids_of_the_whole_text(name):
    """Whether a tokenizer is read piece by piece or not, no id may depend on how many rows there are."""
    tokenizer = (EXACT | WITHOUT_WHITE_SPACE)[name]()
    assert is_local(tokenizer) == (name in ("byte-level BPE", "WordPiece", "WordLevel"))
    numbers = random.Random(name)
    rows = [
        Record("pair", text_of(numbers, 9), (text_of(numbers, 6), text_of(numbers, 6)), (True, False), f"f:{line}")
        for line in range(1, 201)
    ]
    alike_in_a_crowd(rows, tokenizer)


def test_a_piece_begins_at_a_space_between_a_mark_and_a_letter():
    text = "Yes, we can.  No\n\nHuman: at 3 pm (I  think) é a b"
    assert pieces_of(text) == ["Yes,", " we", " can.  No\n\nHuman:", " at 3", " pm (I  think) é a", " b", ""]
    assert pieces_of("") == [""] and "".join(pieces_of("  a b \n")) == "  a b \n"


def test_a_token_across_a_cut_makes_a_tokenizer_read_whole_texts():
    """An added token that takes the white space behind it, or that has a space before a letter in it."""
    from tokenizers import AddedToken

    for token in (AddedToken("<x>", rstrip=True), AddedToken("<x>", single_word=True), AddedToken("to be")):
        tokenizer = byte_level()
        assert is_local(tokenizer)
        tokenizer.add_tokens([token])
        assert not is_local(tokenizer)


def test_a_tokenizer_with_tokens_of_several_words_reads_whole_texts():
    """As SuperBPE: texts are cut at line ends only, and merges reach across words that no probe has side by side."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    lines = pre_tokenizers.Split(Regex("\n"), "isolated")
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [lines, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<eos>", "<unk>"], initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator(["by and by\n"] * 9, trainer)
    tokenizer = made(core)
    assert "byĠandĠby" in tokenizer.get_vocab() and not is_local(tokenizer)
    alike_in_a_crowd([Record("demonstration", "by and", (" by and by",), (True,), "f:1")] * 64, tokenizer)


@pytest.mark.check
def test_pieces_have_the_ids_of_the_whole_text_with_smollm2(hh_file):
    if not SMOLLM2.is_dir():
        pytest.skip("build/smollm2 is not there: scripts/smollm2.py makes it")
    from rlhf_pipeline.data.tokenizers import load_tokenizer

    tokenizer = load_tokenizer(str(SMOLLM2))
    assert is_local(tokenizer)
    with gzip.open(hh_file, "rt") as file:
        given = [json.loads(line) for line in file]
    pairs = [[row[side].rpartition(ASSISTANT) for side in ("chosen", "rejected")] for row in given]
    rows = [
        Record("pair", head + mark, (chosen, other[2]), (True, True), f"f:{line}")
        for line, ((head, mark, chosen), other) in enumerate(pairs, 1)
    ]
    alike_in_a_crowd(rows, tokenizer)
    numbers = random.Random(0)
    rows = [Record("demonstration", text_of(numbers, 9), (text_of(numbers, 6),), (True,)) for _ in range(1000)]
    alike_in_a_crowd(rows, tokenizer)
