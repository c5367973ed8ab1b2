"""Measurements of models, kept in `cache/` under the digest of everything that they depend on.

A comparison that was stopped, or that has a model in common with an earlier one, measures nothing twice, and several
processes can share its work: each makes what no other one has made or is making.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Mapping
from hashlib import sha256

import torch
import transformers

from rlhf_pipeline.config.compare import PromptsConfig
from rlhf_pipeline.config.reward_names import WORLD_NAMES, names_a_model
from rlhf_pipeline.data.tokenizers import tokenizer_digest
from rlhf_pipeline.disk.kept import Busy, kept
from rlhf_pipeline.measure.bench import Bench
from rlhf_pipeline.registry.provenance import source_digest

_code = functools.cache(source_digest)
_tokenizer = functools.lru_cache(maxsize=8)(tokenizer_digest)

NAMED_BY_IDENTITY = {"reward_model", "reference"}
"""Keys of the config whose models are known by their identities; the others can only be the same by name."""


def identity_of(bench: Bench, source: str | None) -> str | None:
    """What a reward source is known by: the digest of all weights of a model; None for a function and a hub model."""
    if source is None:
        return "none"
    if source in WORLD_NAMES:
        return "world"
    return bench.registry.resolve(source).identity if names_a_model(source) else None


def keep(
    bench: Bench,
    what: str,
    models: Mapping[str, str | None],
    make: Callable[[], object],
    *,
    wait: bool = True,
    **more: object,
) -> object:
    """Return a measurement on a bench as JSON has it: from the cache, else made now and kept.

    It is known by the code, the libraries, the config, the prompts, the length and ends of responses, the tokenizer,
    the device, the models and `more`. The number of threads is not part of it: it changes the last bits at most.

    Args:
        models: the identity of each model and reward source; if one is not known (None), nothing is kept.
        wait: whether to wait for another process that makes it.

    Raises:
        Busy: another process makes it, or it cannot be kept, and `wait` is False.
    """
    if None in models.values():
        if not wait:
            raise Busy(what)
        return make()
    plan, config = bench.plan, bench.config
    prompts = [[one.prompt_ids, one.prompt_key, one.prompt_text, one.messages] for one in plan.prompts]
    content = {
        "what": what,
        "code": _code(),
        "libraries": [torch.__version__, transformers.__version__],
        "config": config.model_dump(mode="json", include=set(PromptsConfig.model_fields) - NAMED_BY_IDENTITY),
        "prompts": sha256(json.dumps(prompts, default=str).encode()).hexdigest(),
        "responses": [plan.response_length, list(plan.stop_ids)],
        "tokenizer": [_tokenizer(bench.tokenizer), bench.tokenizer.chat_template],
        "device": str(bench.device),
        "truth": bench.knows_truth,
        "models": dict(models),
        **more,
    }
    name = sha256(json.dumps(content, sort_keys=True, default=str).encode()).hexdigest()
    return kept(bench.registry.home / "cache" / f"measured-{name[:32]}.json", make, wait=wait)
