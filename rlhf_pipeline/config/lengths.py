"""Lengths: the longest prompt, response and sum of both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple, dataclass
from typing import ClassVar

from rlhf_pipeline.config.base import CommandConfig, option
from rlhf_pipeline.errors import ConfigError, Fault

DEFAULT_MAX_LENGTH = 1024
LENGTHS = ("max_prompt_length", "response_length", "max_length")
MAX_LENGTH = option(None, "maximum length of prompt and response together, in tokens (TRL: 1024)")


@dataclass(frozen=True)
class Lengths:
    """The longest prompt, response (its EOS included) and sum of both, in tokens."""

    prompt: int
    response: int
    total: int


def resolve_lengths(prompt: int | None, response: int | None, total: int | None, *, samples: bool = False) -> Lengths:
    """Return all three lengths, in tokens, from those that are given.

    Two lengths determine the third. `total` alone limits the sum, and leaves each part at least one token. A response
    that is sampled needs a limit of its own: then `total` alone is halved, and the prompt gets an odd token. With only
    `prompt`, only `response` or none, `total` is TRL's default of 1024.

    Args:
        samples: whether responses are sampled.

    Raises:
        ConfigError: the three disagree, or leave no token for the prompt or the response.
    """
    if prompt is not None and response is not None:
        if total is not None and prompt + response != total:
            raise ConfigError(
                Fault(
                    "max_length",
                    f"max_prompt_length {prompt} + response_length {response} is not max_length {total}",
                    f"max_length {prompt + response}",
                    "give two of the three lengths; they determine the third",
                )
            )
        total = prompt + response
    source = "the default max_length" if total is None else "max_length"
    named = "response_length" if response is not None else "max_prompt_length"
    where, fix = ("max_length", "raise max_length") if total is not None else (named, "lower it, or set max_length")
    total = DEFAULT_MAX_LENGTH if total is None else total
    if prompt is None and response is None and not samples:
        prompt = response = total - 1
    if response is None:
        response = total - prompt if prompt is not None else total // 2
    if prompt is None:
        prompt = total - response
    if prompt < 1 or response < 1:
        raise ConfigError(
            Fault(
                where,
                f"{source} {total} leaves {prompt} tokens for the prompt and {response} for the response",
                "at least 1 for each",
                fix,
            )
        )
    return Lengths(prompt, response, total)


class WithLengths(CommandConfig):
    """A config with the keys LENGTHS; `samples`: whether its stage samples the responses that it trains on."""

    samples: ClassVar[bool] = False

    def lengths(self) -> Lengths:
        """Return the longest prompt, response and sum of the stage's data, in tokens; see `resolve_lengths`."""
        return resolve_lengths(*(getattr(self, key) for key in LENGTHS), samples=self.samples)

    def sampled_lengths(self) -> Lengths:
        """Return the longest prompt, response and sum where responses are sampled, in tokens."""
        return resolve_lengths(*(getattr(self, key) for key in LENGTHS), samples=True)


def remark_on_halves(config: WithLengths) -> Iterator[str]:
    """Note that `max_length` alone is halved in a stage that samples."""
    if [key for key in LENGTHS if getattr(config, key) is not None] == ["max_length"]:
        found = config.lengths()
        yield (
            f"max_length {found.total} alone: responses are sampled up to {found.response} tokens and prompts cut to "
            f"{found.prompt}; response_length sets another border"
        )


def describe_lengths(config: WithLengths) -> tuple[str, str]:
    """Return the name of a config's only length (else max_length), and all three lengths with their origin."""
    given = [key for key in LENGTHS if getattr(config, key) is not None]
    both = {"max_prompt_length", "response_length"} <= set(given)
    told = []
    for key, value in zip(LENGTHS, astuple(config.lengths()), strict=True):
        by_default = key == "max_length" and not both
        told.append(f"{key} {value}" + ("" if key in given else ", the default" if by_default else ", which follows"))
    return given[0] if len(given) == 1 else "max_length", "; ".join(told)


def check_lengths(config: WithLengths) -> Iterator[Fault]:
    """Yield the fault of lengths that contradict each other."""
    try:
        config.lengths()
    except ConfigError as error:
        yield from error.faults
