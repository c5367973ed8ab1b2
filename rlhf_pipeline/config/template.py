"""The keys of chat templates, which every command that renders messages has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

from rlhf_pipeline.config.base import option
from rlhf_pipeline.errors import Fault, did_you_mean

TEMPLATES = ("alpaca", "chatml", "zephyr")
"""Names of the built-in templates, which data/templates.py has."""

CHAT_TEMPLATE = option(
    None,
    f"chat template instead of the tokenizer's: {', '.join(TEMPLATES)}, or Jinja text; it is saved with the model "
    "(default: the tokenizer's)",
)
CHAT_TEMPLATE_PATH = option(
    None, "file with a chat template in Jinja, or a directory or hub id of a tokenizer that has one (TRL)"
)
CHAT_TEMPLATE_KWARGS = option(
    None,
    "values that the chat template reads, for example {enable_thinking: false}; they are saved in the model's template "
    "(default: none)",
)
EOS_TOKEN = option(
    None, "token that ends a response: one of the tokenizer's, which then is its EOS (default: the tokenizer's EOS)"
)

GIVEN = {
    "add_generation_prompt": "remove it: prompts have it, and whole conversations do not",
    "continue_final_message": "remove it: prompts that end in an assistant's turn are continued",
    "documents": "remove it",
    "messages": "remove it: they are the rows",
    "tools": "write a column `tools` into the data",
}
"""Variables that every chat template gets, and what to do in place of a value for them."""


class HasTemplate(Protocol):
    """A config with the keys of chat templates and of the tokens that end a response."""

    @property
    def chat_template(self) -> str | None: ...
    @property
    def chat_template_path(self) -> str | None: ...
    @property
    def chat_template_kwargs(self) -> dict[str, Any] | None: ...
    @property
    def eos_token(self) -> str | None: ...
    @property
    def stop_token(self) -> str | None: ...


def check_template(config: HasTemplate) -> Iterator[Fault]:
    """Yield the faults of two chat templates, an unknown name of one, or values that Jinja cannot set."""
    named = config.chat_template
    if named is not None and config.chat_template_path is not None:
        yield Fault("chat_template_path", "chat_template is also given", "one of the two", "remove one")
    if named is not None and "{" not in named and named not in TEMPLATES:
        fix = did_you_mean(named, TEMPLATES) or "write a file's or a tokenizer's path into chat_template_path"
        yield Fault("chat_template", f"found {named!r}", f"{', '.join(TEMPLATES)}, or Jinja text", fix)
    for name in config.chat_template_kwargs or ():
        if name in GIVEN:
            found = "a variable that is always given to a chat template, so this value would have no effect"
            yield Fault(f"chat_template_kwargs.{name}", found, "another variable", GIVEN.get(name, "remove it"))
        elif not name.isidentifier():
            yield Fault(f"chat_template_kwargs.{name}", "not the name of a variable", "letters, digits and _")
