"""Save what a run publishes beside the weights before training: what cannot be saved must not end a run after it."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_pipeline.errors import BadInput, first_line
from rlhf_pipeline.models.refusals import refuse_to_hide

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def mend_generation(model: PreTrainedModel) -> str | None:
    """Mend a generation config that transformers loads but refuses to save; returns what was changed, in words.

    A published policy is one to sample from: settings of sampling in a config without it (`do_sample: false` beside
    `temperature`) get `do_sample: true`. If that does not suffice, only the special ids are kept.
    """
    from transformers import GenerationConfig

    config = getattr(model, "generation_config", None)
    if config is None or (fault := _fault_of(config)) is None:
        return None
    config.do_sample = True
    mended = "it gets do_sample: true"
    if _fault_of(config) is not None:
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        model.generation_config = GenerationConfig(**ids)
        mended = "only its special ids are kept"
    return f"generation_config.json: transformers cannot save it ({fault}); {mended}"


def _fault_of(config: object) -> str | None:
    try:
        config.validate(strict=True)  # type: ignore[attr-defined]  # of a GenerationConfig
    except ValueError as error:
        return " ".join(str(error).split())[:200]
    return None


def require_saving(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Save configs and tokenizer to a folder that is removed again.

    Raises:
        BadInput: one of them cannot be saved; the message names it.
    """
    parts = {"config": model.config, "generation config": getattr(model, "generation_config", None)}
    for name, part in {**parts, "tokenizer": tokenizer}.items():
        if part is None:
            continue
        try:
            with tempfile.TemporaryDirectory() as folder:
                part.save_pretrained(Path(folder))
        except Exception as error:  # each class has its own checks
            refuse_to_hide(error)
            raise BadInput(
                f"the {name} of the model cannot be saved ({first_line(error)}), so the trained model could not be "
                "registered; expected one that transformers' save_pretrained accepts; correct it in the model's folder"
            ) from error
