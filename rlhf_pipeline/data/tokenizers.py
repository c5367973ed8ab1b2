"""Load and train tokenizers, their digests, and the ids that end a response."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from rlhf_pipeline.errors import BadInput, ConfigError, Fault, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256


def load_tokenizer(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub id, with the stop ids of the model beside it; see `stop_ids`.

    Args:
        eos_token: replaces the tokenizer's EOS.

    Raises:
        BadInput: there is no tokenizer, it has no EOS token, or `eos_token` is not one of its tokens.
    """
    tokenizer = load_any_tokenizer(path, revision, trust_remote_code)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(Fault("eos_token", f"{eos_token!r} is not a token of {path}", "one of its tokens"))
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{path}: the tokenizer has no EOS token, so no response could end; set `eos_token`")
    count = token_count(tokenizer)
    tokenizer.model_stop_ids = tuple(stop for stop in _model_stop_ids(str(path), revision) if 0 <= stop < count)
    return tokenizer


def load_any_tokenizer(
    path: str, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """Load a tokenizer as it is, also one without EOS or PAD, such as an encoder's.

    Raises:
        BadInput: there is no tokenizer.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    how: dict[str, Any] = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        tokenizer = AutoTokenizer.from_pretrained(str(path), **how)
        # For some model types (qwen2) transformers takes another class than the one that saved the tokenizer, with
        # other ids for the same text (findings/tokenizer_class_by_model_type.sh).
        general = (PreTrainedTokenizerFast.__name__, "PreTrainedTokenizerFast")
        if (
            type(tokenizer).__name__ not in general
            and get_tokenizer_config(path, **how).get("tokenizer_class") in general
        ):
            tokenizer = PreTrainedTokenizerFast.from_pretrained(str(path), **how)
    except Exception as error:  # missing files, unreachable hub, bad JSON: many types of error
        raise BadInput(
            f"{path}: the tokenizer cannot be loaded ({first_line(error)}); expected a Hugging Face tokenizer"
        ) from error
    return tokenizer


def _model_stop_ids(path: str, revision: str | None) -> list[int]:
    """The ids at which transformers' `generate` stops: those of generation_config.json, else of config.json."""
    from transformers.utils import cached_file

    for name in ("generation_config.json", "config.json"):
        file = cached_file(path, name, revision=revision, _raise_exceptions_for_missing_entries=False)
        if file is None:
            continue
        try:
            content = json.loads(Path(file).read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise BadInput(f"{path}: {name} is not JSON; expected the JSON that transformers writes") from error
        if not isinstance(content, dict):
            raise BadInput(f"{path}: {name} has no keys; expected the JSON object that transformers writes")
        stops = content.get("eos_token_id")
        return [stop for stop in (stops if isinstance(stops, list) else [stops]) if type(stop) is int]
    return []


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The ids that end a response: the stop token that was set, EOS, and the stop ids of the model.

    The first one is appended to a training target that has none.
    """
    named = getattr(tokenizer, "named_stop_ids", ())
    return tuple(dict.fromkeys((*named, tokenizer.eos_token_id, *getattr(tokenizer, "model_stop_ids", ()))))


def set_stop_token(tokenizer: PreTrainedTokenizerBase, stop_token: str | None) -> None:
    """Let `stop_token` end a response too, and be the one that is appended to training targets.

    Raises:
        ConfigError: it is not one token of the tokenizer.
    """
    if stop_token is None:
        return
    found = tokenizer.get_vocab().get(stop_token)
    if found is None:
        raise ConfigError(Fault("stop_token", f"{stop_token!r} is not a token of the policy's tokenizer"))
    tokenizer.named_stop_ids = (found,)


def with_padding(tokenizer: PreTrainedTokenizerBase, *, new: bool = True) -> PreTrainedTokenizerBase:
    """The tokenizer with a PAD that cannot end a response: its own, else its unknown token, else a new token.

    new: whether there may be a new token; without one, the tokenizer stays as it is.

    transformers' sequence classifiers read the score at the last token that is not PAD, so a PAD that ends responses
    would hide that a response ended. A new PAD is one id beyond the other tokens.
    """
    stops = stop_ids(tokenizer)
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id not in stops:
        return tokenizer
    unknown = tokenizer.unk_token_id
    free = unknown is not None and unknown not in (*stops, tokenizer.bos_token_id)
    if not (free or new):
        return tokenizer
    padded = copy.deepcopy(tokenizer)
    padded.add_special_tokens({"pad_token": tokenizer.unk_token if free else PAD})
    return padded


def token_count(tokenizer: PreTrainedTokenizerBase) -> int:
    """The number of ids that tokens have: the largest id + 1."""
    return max(tokenizer.get_vocab().values()) + 1


def text_of(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], **options: Any) -> str:
    """Decode the ids of one text; special tokens are kept by default. `options` go to `decode`."""
    return cast(str, tokenizer.decode(list(ids), **options))


def train_byte_level_bpe(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE: it can encode any text, and training is deterministic.

    Raises:
        ConfigError: `vocab_size` is too small for the bytes and the two special tokens.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    least = BYTES + len((EOS, PAD))
    if vocab_size < least:
        raise ConfigError(Fault("tokenizer_init.vocab_size", f"{vocab_size}", f"at least {least}"))
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[EOS, PAD],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=EOS, pad_token=PAD, clean_up_tokenization_spaces=False
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 of everything that affects ids: vocabulary, merges, normalisation, special tokens.

    A tokenizer without a PAD of its own has the digest that it has with a new PAD, so a policy and its reward model
    have one digest. The chat template has its own. Truncation and padding are excluded because calls change them.
    """
    return _digest(_content(tokenizer))


def _content(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    lacks_pad = ids["pad"] in (None, ids["bos"], ids["eos"], ids["unk"])
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        vocabulary = tokenizer.get_vocab()
        if lacks_pad:
            ids["pad"] = vocabulary.setdefault(PAD, len(vocabulary))
        return {"tokenizer": {"vocabulary": vocabulary, "class": type(tokenizer).__name__}, "special": ids}
    if lacks_pad:
        from tokenizers import AddedToken, Tokenizer

        backend = Tokenizer.from_str(backend.to_str())
        backend.add_special_tokens([AddedToken(PAD, special=True, normalized=False)])
        ids["pad"] = backend.token_to_id(PAD)
    content = json.loads(backend.to_str())
    content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    return {"tokenizer": content, "special": ids}


def same_but_for_pad(first: PreTrainedTokenizerBase, second: PreTrainedTokenizerBase) -> bool:
    """Whether two tokenizers give the same ids to every text without a PAD in it."""
    contents = [_content(first), _content(second)]
    if contents[0] == contents[1]:
        return True
    others = {getattr(one, f"{name}_token") for one in (first, second) for name in ("bos", "eos", "unk")}
    pads = {PAD, first.pad_token, second.pad_token} - others
    for content in contents:
        del content["special"]["pad"]
        parts, vocabulary = content["tokenizer"], content["tokenizer"].get("vocabulary", {})
        parts["added_tokens"] = [token for token in parts.get("added_tokens", ()) if token["content"] not in pads]
        parts["vocabulary"] = {token: place for token, place in vocabulary.items() if token not in pads}
    return contents[0] == contents[1]


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, or None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _digest(template)


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
