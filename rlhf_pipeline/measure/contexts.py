"""Contexts of demonstrations: where the demonstrations come from, and the token ids that a policy reads.

The demonstrations are of a training split, one for each prompt; none of them answers a prompt of the evaluation.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from rlhf_pipeline.config.compare import EvaluateConfig, PromptsConfig
from rlhf_pipeline.config.in_context import InContext
from rlhf_pipeline.config.lengths import LENGTHS, Lengths
from rlhf_pipeline.config.load import load_config
from rlhf_pipeline.config.sft import SftConfig
from rlhf_pipeline.data.encode import SYSTEM_ROLES, encode
from rlhf_pipeline.data.examples import Example, pick, prompt_keys
from rlhf_pipeline.data.load import records_digest
from rlhf_pipeline.data.records import Record
from rlhf_pipeline.data.samples import lowest_examples
from rlhf_pipeline.data.tokenizers import text_of
from rlhf_pipeline.errors import ConfigError, Fault
from rlhf_pipeline.evaluation.sampled import Samples, SamplingPlan, draw, with_prompts
from rlhf_pipeline.measure.bench import Bench, require_room
from rlhf_pipeline.measure.trained_on import owned_by
from rlhf_pipeline.models.modules import Policy
from rlhf_pipeline.registry.lengths import limit_of
from rlhf_pipeline.registry.parents import reference_of
from rlhf_pipeline.registry.references import Resolved
from rlhf_pipeline.stages.data import StageData

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MOST = 4096
"""The most demonstrations that contexts are made of, in hash order."""

_READING = (*LENGTHS, "model_name_or_path", "model_init", "tokenizer_init", "trust_remote_code", "skip_bad_rows")
"""Keys of an SFT model's config that also apply to demonstrations from another source."""


Contexts = Mapping[str, list[int]]
"""What a policy reads in place of each prompt, by `prompt_key`: demonstrations and the prompt."""


@dataclass(frozen=True)
class Pool:
    """The demonstrations of an arm; each example has one prompt and, first of its completions, the demonstration."""

    data: StageData
    source: str
    kind: str
    examples: Sequence[Example]


def settings_of(config: PromptsConfig) -> InContext:
    """The keys of `in_context`."""
    found = config.in_context if isinstance(config, EvaluateConfig) else None
    return InContext() if found is None else found


def known_as(bench: Bench, arm: Resolved) -> list[object]:
    """What the samples of an arm depend on, besides its policy: the keys of `in_context` and the demonstrations."""
    data, _ = _data_of(bench, arm)
    digests = [records_digest(found.records) for found in data.sources("demonstration", bench.tokenizer)]
    return [settings_of(bench.config).model_dump(mode="json"), data.config.dataset_train_split, digests]


def _data_of(bench: Bench, arm: Resolved) -> tuple[StageData, str]:
    """The data of an arm's demonstrations and their source: that of `in_context`, else that of its SFT model.

    Raises:
        ConfigError: neither is known.
    """
    given, registry, policy = settings_of(bench.config).source, bench.registry, arm.policy
    sft = policy if policy.stage == "sft" else reference_of(registry, policy)
    values: dict[str, object] = {}
    if sft is not None and sft.stage == "sft":
        values = {key: value for key, value in sft.config.items() if value is not None}
    elif given is None:
        found = f"{arm.label} has no SFT model whose demonstrations could be read"
        raise ConfigError(Fault("in_context.source", found, "a source of demonstrations", "set in_context.source"))
    if given is not None:
        values = {key: values[key] for key in _READING if key in values}
        values |= {"dataset_name": given, "split_fractions": bench.config.split_fractions, "output_name": "none"}
        values |= {"skip_bad_rows": True} if bench.config.skip_bad_rows else {}
    if "model_init" not in values:
        values.setdefault("model_name_or_path", policy.label)
    config = load_config("sft", None, extra=values).of(SftConfig)
    own = owned_by(sft, values, "set in_context.source") if given is None and sft is not None else nullcontext()
    data = StageData(config, registry.home, lambda _: None)
    with own:
        data.sources("demonstration", bench.tokenizer)
    return data, given or " + ".join(entry.source for entry in config.sources())


def pool_of(bench: Bench, arm: Resolved, kind: str = "demonstration") -> Pool:
    """The first demonstration of each prompt of an arm's training split, of those that ended and that fit.

    `demonstrations` of them fit, with the longest prompt and a response, into the positions of the model.

    Raises:
        ConfigError: the source is not known, or too few demonstrations fit. DataError, UnknownReference: it cannot be
            read.
    """
    data, source = _data_of(bench, arm)
    found, _ = data.split(kind, data.config.dataset_train_split, bench.tokenizer)
    known = lowest_examples(one_per_prompt(found, {prompt.prompt_key for prompt in bench.plan.prompts}), MOST)
    wanted, (positions, told) = settings_of(bench.config).demonstrations, limit_of(arm.policy)
    longest = max((len(prompt.prompt_ids) for prompt in bench.plan.prompts), default=0)
    room = None if positions is None else (positions - longest - bench.plan.response_length) // wanted
    fitting = [one for one in known if all(one.ended) and (room is None or _size(one) <= room)]
    if len(fitting) < wanted:
        said = "" if room is None else f" and have at most {max(room, 0)} tokens"
        limit = "" if room is None else f": prompts of up to {longest}, responses of up to {bench.plan.response_length}"
        limit += "" if room is None else f" and {wanted} demonstrations within {positions}, {told} {arm.policy.label}"
        found_text = f"{len(fitting)} of {len(known)} demonstrations of {source} have ended{said}{limit}"
        fix = "lower in_context.demonstrations, or set in_context.source"
        raise ConfigError(Fault("in_context.demonstrations", found_text, f"at least {wanted}", fix))
    return Pool(data, source, kind, fitting)


def one_per_prompt(examples: Sequence[Example], without: Collection[str] = ()) -> Sequence[Example]:
    """The first example of each prompt, in their order; `without`: keys of prompts that are left out."""
    first: dict[str, int] = {}
    for number, key in enumerate(prompt_keys(examples)):
        first.setdefault(key, number)
    return pick(examples, [number for key, number in first.items() if key not in without])


def _size(example: Example) -> int:
    """The tokens of an example's prompt and of its longest completion."""
    return len(example.prompt_ids) + max(map(len, example.completions))


def contexts_of(
    bench: Bench, arm: Resolved, prompts: Sequence[Example], chosen: Sequence[Sequence[Example]], side: int = 0
) -> Contexts:
    """What the policy of an arm reads: each prompt behind its demonstrations; see `with_demonstrations`.

    Raises:
        ConfigError: they need more positions than the model has.
    """
    found = {
        prompt.prompt_key: with_demonstrations(prompt, demonstrations, bench.tokenizer, side)
        for prompt, demonstrations in zip(prompts, chosen, strict=True)
    }
    longest, response = max(map(len, found.values()), default=0), bench.plan.response_length
    require_room(bench.config, arm.policy, Lengths(longest, response, longest + response))
    return found


def draw_in_context(
    policy: Policy, plan: SamplingPlan, contexts: Contexts, seeds: Sequence[int] | None = None
) -> Samples:
    """`draw` from a policy that reads the contexts; the examples of the result have the prompts of the plan."""
    samples = draw(policy, replace(plan, prompts=with_prompts(plan.prompts, contexts)), seeds)
    plain = {prompt.prompt_key: prompt.prompt_ids for prompt in plan.prompts}
    samples.examples = with_prompts(samples.examples, plain)
    return samples


def add_tokens(samples: Samples, contexts: Contexts) -> None:
    """Add `context_tokens` and `tokens_read` of each response, for a policy that reads its context once."""
    each = [len(example.completions) for example in samples.examples]
    read = np.repeat([len(contexts[example.prompt_key]) for example in samples.examples], each)
    prompt = np.repeat([len(example.prompt_ids) for example in samples.examples], each)
    samples.values["context_tokens"] = (read - prompt).astype(np.float64)
    samples.values["tokens_read"] = read + samples.values["length"]


def with_demonstrations(
    prompt: Example, demonstrations: Sequence[Example], tokenizer: PreTrainedTokenizerBase, side: int = 0
) -> list[int]:
    """The token ids of a prompt behind demonstrations: x_1 y_1 ... x_k y_k x, each response with its end token.

    For a chat model the demonstrations are earlier turns of the conversation, if its template gives the prompt alone
    the ids that the prompt has.

    Args:
        side: which completion of a demonstration is its response.
    """
    turns = _as_turns(prompt, demonstrations, tokenizer, side)
    if turns is not None:
        return turns
    ids: list[int] = []
    for part in (*(one.prompt_ids + one.completions[side] for one in demonstrations), prompt.prompt_ids):
        begun = bool(ids) and part[0] == tokenizer.bos_token_id  # the text begins once
        ids += part[1:] if begun else part
    return ids


def _as_turns(
    prompt: Example, demonstrations: Sequence[Example], tokenizer: PreTrainedTokenizerBase, side: int
) -> list[int] | None:
    """The ids of a conversation: the prompt's system turn, the demonstrations, the prompt; None if it is no chat."""

    def ids_of(turns: Iterable[dict[str, str]]) -> list[int] | None:
        return next(encode([Record("prompt", tuple(turns))], tokenizer, False)).prompt_ids

    own = prompt.messages
    if own is None or any(one.messages is None for one in demonstrations) or ids_of(own) != prompt.prompt_ids:
        return None
    said: list[dict[str, str]] = []
    for one in demonstrations:
        said += [turn for turn in one.messages or () if turn["role"] not in SYSTEM_ROLES]
        ids = one.completions[side][: len(one.completions[side]) - int(one.ended[side])]
        said.append({"role": "assistant", "content": text_of(tokenizer, ids, skip_special_tokens=True).strip()})
    system = [turn for turn in own if turn["role"] in SYSTEM_ROLES]
    rest = [turn for turn in own if turn["role"] not in SYSTEM_ROLES]
    return ids_of([*system, *said, *rest])
