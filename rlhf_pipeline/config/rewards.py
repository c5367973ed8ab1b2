"""Keys about rewards that several commands share: how reward models read responses, and a language model as a judge."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from rlhf_pipeline.config.base import Count, Keys, NonNegative, Positive, Text, option, wrong
from rlhf_pipeline.config.reward_names import LLM_PREFIX, PEOPLE_PREFIX, names_a_model
from rlhf_pipeline.errors import Fault

Tokenization = Literal["auto", "ids", "text", "chat"]

TOKENIZATION = option(
    "auto",
    "how reward models read responses. ids: the policy's token ids, if the tokenizers are the same. text, chat: the "
    "response is decoded and tokenised again by the reward model's tokenizer, as text after the prompt or through its "
    "chat template. auto: ids if the tokenizers are the same, else chat or text for a model from elsewhere; a model of "
    "the registry with another tokenizer is refused (ours)",
)
PLACES = re.compile(r"\{(prompt|first|second|response)\}")


def _endpoint(value: str) -> str:
    found = urlsplit(value)
    if found.scheme not in ("http", "https") or not found.hostname:
        raise wrong("an http or https address, such as http://127.0.0.1:8000/v1")
    if found.username is not None or found.password is not None or found.query or found.fragment:
        raise wrong("an address without a key or password in it", "name the environment variable: api_key_env")
    return value.rstrip("/")


class LlmJudge(Keys):
    """A language model behind an OpenAI-compatible endpoint that compares or rates responses."""

    endpoint: Annotated[str, AfterValidator(_endpoint)] = option(
        ...,
        "base address of the server; requests go to ENDPOINT/chat/completions",
        examples=["http://127.0.0.1:8000/v1"],
    )
    model: Text = option(..., "name of the model on the server", examples=["model"])
    template: Text | None = option(
        None,
        "text of the request. For comparisons: {prompt}, {first}, {second}, the answer holds [[A]], [[B]] or [[C]] (a "
        "tie). For rewards: {prompt}, {response}, the answer holds [[number]] (default: a text of ours)",
    )
    api_key_env: Text | None = option(
        None, "name of the environment variable with the key; the key itself is never stored (default: no key)"
    )
    parameters: dict[str, Any] = option(
        {"temperature": 0, "max_tokens": 512}, "further fields of the request, sent as they are"
    )
    concurrency: Count = option(8, "requests at one time")
    retries: Annotated[int, Field(ge=0)] = option(5, "repetitions of a request that failed for a passing reason")
    retry_seconds: NonNegative = option(1.0, "wait before the first repetition, in seconds; doubled each time")
    timeout_seconds: Positive = option(120.0, "time limit of one request, in seconds")
    pairs_per_prompt: Count = option(1, "in compare: pairs of responses that are compared for each prompt")
    label_pairs: Annotated[int, Field(ge=0)] = option(
        256, "in compare: held-out labelled pairs, in hash order, on which its agreement with the labels is measured"
    )

    @property
    def label(self) -> str:
        """The judge as the source of a reward."""
        return f"{LLM_PREFIX}{self.model}"


def with_source(values: Any, key: str) -> Any:
    """Return the values of a config whose rewards or labels come from `llm_judge`, with its label as their source."""
    judge = values.get("llm_judge") if isinstance(values, Mapping) else None
    model = judge.get("model") if isinstance(judge, Mapping) else getattr(judge, "model", None)
    if model is None or values.get(key) is not None:
        return values
    return {**values, key: f"{LLM_PREFIX}{model}"}


class RewardFunction(Keys):
    """One term of the reward."""

    source: Text = option(..., "world, a reward model, or module:function", names="reward")
    weight: float = option(1.0, "weight of this score in the sum (ours); other than 1 moves the optimum")
    llm_judge: LlmJudge | None = option(None, "language model that rates each response, instead of source")

    @model_validator(mode="before")
    @classmethod
    def _rated_by(cls, values: Any) -> Any:
        return with_source(values, "source")


def _reward_functions(value: Any) -> Any:
    if isinstance(value, str | dict):
        value = [value]
    if not isinstance(value, list | tuple):
        return value
    return [{"source": entry} if isinstance(entry, str) else entry for entry in value]


RewardFunctions = Annotated[tuple[RewardFunction, ...] | None, BeforeValidator(_reward_functions)]


def check_source(where: str, source: str, judge: LlmJudge | None) -> Iterator[Fault]:
    """Yield the fault of a source that is no source, a language model without endpoint, or another one beside it."""
    if source.startswith(PEOPLE_PREFIX):
        expected = "world, a reward model, or module:function: people only label data (rlhf data collect)"
        yield Fault(where, f"found {source!r}", expected)
    elif ":" in source and names_a_model(source):
        yield Fault(where, f"found {source!r}", "world, a reward model, or module:function")
    if judge is None and source.startswith(LLM_PREFIX):
        fix = f"llm_judge: {{endpoint: http://127.0.0.1:8000/v1, model: {source.removeprefix(LLM_PREFIX)}}}"
        yield Fault(where, f"found {source!r} without llm_judge", "the endpoint of the language model", fix)
    elif judge is not None and source != judge.label:
        yield Fault(where, f"found {source!r} beside llm_judge", "one of the two", "remove one")


def check_request(where: str, judge: LlmJudge | None, needed: tuple[str, ...]) -> Iterator[Fault]:
    """Yield the fault of a template without the places that its use fills."""
    if judge is None or judge.template is None:
        return
    missing = sorted({"prompt", *needed} - set(PLACES.findall(judge.template)))
    if missing:
        found = f"has no {', '.join(f'{{{name}}}' for name in missing)}"
        expected = " and ".join(f"{{{name}}}" for name in ("prompt", *needed))
        yield Fault(f"{where}.template", found, f"{expected} where the texts go")


PAIR_PLACES = ("first", "second")
RATING_PLACES = ("response",)
