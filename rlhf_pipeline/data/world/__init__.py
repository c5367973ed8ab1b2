"""`world:verdicts`: a world of one-line film verdicts, small enough to be enumerated, with a known reward."""

from __future__ import annotations

from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.world.grammar import demonstrations
from rlhf_pipeline.data.world.reward import Verdicts, true_reward, verdicts
from rlhf_pipeline.data.world.vocabulary import (
    ASPECTS,
    EOS_ID,
    GENRES,
    NAME,
    PAD_ID,
    RESPONSE_LENGTH,
    SPLITS,
    VOCABULARY,
    decode,
    encode,
    is_world_tokenizer,
    parse_prompt,
    prompt_text,
    tokenizer,
)
from rlhf_pipeline.errors import ConfigError, Fault

CONFIGS = ("demonstrations", "prompts")


def records(config: str | None = None) -> list[Record]:
    """All rows of one part of the world, each with its split and exact token ids.

    Args:
        config: "demonstrations" (default) or "prompts".

    Raises:
        ConfigError: for another name.
    """
    config = config or "demonstrations"
    if config not in CONFIGS:
        raise ConfigError(Fault(f"dataset_config: {config}", f"{NAME} has no such part", " or ".join(CONFIGS)))
    rows: list[Record] = []
    for (genre, aspect), split in SPLITS.items():
        text = prompt_text(genre, aspect)
        prompt = tuple(encode(text))
        if config == "prompts":
            rows.append(Record("prompt", text, (), (), f"{NAME}:{len(rows) + 1}", split, prompt, ()))
            continue
        for ids, ended in demonstrations(genre, aspect):
            words, where = decode(ids[:-1] if ended else ids), f"{NAME}:{len(rows) + 1}"
            rows.append(Record("demonstration", text, (words,), (ended,), where, split, prompt, (tuple(ids),)))
    return rows
