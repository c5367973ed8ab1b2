"""Chat templates: the built-in ones, and those that a config gives a tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_pipeline.config.template import HasTemplate
from rlhf_pipeline.errors import ConfigError, Fault, first_line

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

BUILT_IN = {
    "alpaca": (
        "{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n"
        "{% elif m.role == 'user' %}### Instruction:\n{{ m.content }}\n\n"
        "{% else %}### Response:\n{{ m.content }}{{ eos_token }}\n\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}### Response:\n{% endif %}"
    ),
    "chatml": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{{ eos_token }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    "zephyr": (
        "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}{{ eos_token }}{{ '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
}
"""Every turn ends with the tokenizer's EOS, which is `<|im_end|>` in ChatML proper: a base model knows it already."""


def template_of(tokenizer: PreTrainedTokenizerBase | None) -> str | None:
    """Return the chat template of a tokenizer as text; None if it has none."""
    template = getattr(tokenizer, "chat_template", None)
    return str(template) if template else None


def apply_template_keys(tokenizer: PreTrainedTokenizerBase, config: HasTemplate) -> PreTrainedTokenizerBase:
    """Give a tokenizer the chat template and its values of a config; they are then saved with it.

    Raises:
        ConfigError: there is no template at the path, or none that the values belong to.
    """
    values = config.chat_template_kwargs
    if config.chat_template is not None:
        tokenizer.chat_template = BUILT_IN.get(config.chat_template, config.chat_template)
    elif config.chat_template_path is not None:
        tokenizer.chat_template = _at(config.chat_template_path)
    if values:
        if not (template := tokenizer.chat_template):
            found = "values, but the tokenizer has no chat template"
            raise ConfigError(Fault("chat_template_kwargs", found, "a chat template", "set chat_template as well"))
        several = isinstance(template, dict)
        tokenizer.chat_template = (
            {name: with_values(text, values) for name, text in template.items()}
            if several
            else with_values(template, values)
        )
    return tokenizer


def with_values(template: str, values: Mapping[str, Any]) -> str:
    """Return a template that has `values` for the variables that its caller does not set."""
    defaults = "".join(
        f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif +%}}"
        for name, value in sorted(values.items())
    )
    return defaults + template


def _literal(value: Any) -> str:
    """Return a value of YAML as Jinja writes it."""
    if value is None:
        return "none"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(_literal, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{_literal(key)}: {_literal(item)}' for key, item in value.items())}}}"
    return json.dumps(value, ensure_ascii=False)  # Jinja would read an escaped pair of surrogates as two characters


def _at(path: str) -> str:
    """Return the template of a file, or of a tokenizer in a directory or on the hub."""
    if Path(path).is_file():
        return Path(path).read_text(encoding="utf-8")
    if path.endswith((".jinja", ".j2")):
        raise ConfigError(Fault("chat_template_path", f"{path!r} cannot be read (no such file)", "a Jinja file"))
    from transformers import AutoTokenizer

    try:
        template = AutoTokenizer.from_pretrained(path).chat_template
    except Exception as error:  # missing files, an unreachable hub, bad JSON: many types of error
        raise ConfigError(
            Fault("chat_template_path", f"{path!r} cannot be read ({first_line(error)})", "a Jinja file or a tokenizer")
        ) from error
    if not isinstance(template, str):
        raise ConfigError(Fault("chat_template_path", f"the tokenizer {path!r} has no chat template", "one that has"))
    return template
