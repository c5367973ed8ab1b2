"""Load tokenizers (with a PAD that is not EOS), train them, and compute their digests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from hashlib import sha256
from typing import TYPE_CHECKING, Any, cast

from rlhf_pipeline.errors import BadInput, ConfigError, Fault

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

EOS, PAD = "<|endoftext|>", "<|pad|>"
BYTES = 256


def load_tokenizer(
    path: str, revision: str | None = None, trust_remote_code: bool = False, *, eos_token: str | None = None
) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model directory or hub id; if PAD is missing or equals EOS, a new PAD is added.

    The new PAD may be one id beyond the model's embedding, which then needs another row.

    Args:
        eos_token: replaces the tokenizer's EOS.

    Raises:
        BadInput: there is no tokenizer, it has no EOS token, or `eos_token` is not one of its tokens.
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
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{path}: the tokenizer cannot be loaded ({reason}); expected a Hugging Face tokenizer"
        ) from error
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise ConfigError(Fault("eos_token", f"{eos_token!r} is not a token of {path}", "one of its tokens"))
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token_id is None:
        raise BadInput(f"{path}: the tokenizer has no EOS token, so no response could end; set `eos_token`")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.add_special_tokens({"pad_token": PAD})
    return tokenizer


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

    The chat template has its own digest. Truncation and padding are excluded because calls change them.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        content = {"vocabulary": tokenizer.get_vocab(), "class": type(tokenizer).__name__}
    else:
        content = json.loads(backend.to_str())
        content = {name: value for name, value in content.items() if name not in ("truncation", "padding")}
    ids = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad", "unk")}
    return _digest({"tokenizer": content, "special": ids})


def chat_template_digest(tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Return the SHA-256 of the chat template, or None if there is none."""
    template = getattr(tokenizer, "chat_template", None)
    return None if template is None else _digest(template)


def _digest(content: object) -> str:
    return sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).hexdigest()
