"""Named chat templates of LLaMA-Factory and axolotl: the texts they make of a conversation."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from rlhf_pipeline.foreign.table import Translation

EOS = "{{ eos_token }}"


def _template(
    system: str, user: str, opening: str, end: str, *, default: str = "", bos: bool = False, trim: bool = False
) -> str:
    """Return the Jinja text of a template whose turns have these texts, with `{}` for the content.

    opening, end: the text before and after an answer. default: the system message of a conversation without one.
    trim: content without white space at its ends.
    """
    content = f"{{{{ m['content']{' | trim' if trim else ''} }}}}"
    parts = {
        "system": system.replace("{}", content),
        "user": user.replace("{}", content),
        "assistant": f"{opening}{content}{end}",
    }
    turns = "".join(
        f"{{% {'elif' if place else 'if'} m['role'] == '{role}' %}}{text}"
        for place, (role, text) in enumerate(parts.items())
    )
    missing = system.replace("{}", default)
    return (
        ("{{ bos_token }}" if bos else "")
        + (f"{{% if messages[0]['role'] != 'system' %}}{missing}{{% endif %}}" if default else "")
        + f"{{% for m in messages %}}{turns}"
        + "{% else %}{{ raise_exception('a role other than system, user and assistant') }}{% endif %}{% endfor %}"
        + f"{{% if add_generation_prompt %}}{opening}{{% endif %}}"
    )


def _chatml(default: str = "") -> str:
    role, end = "<|im_start|>{}\n", "<|im_end|>\n"
    system, user, opening = (role.replace("{}", name) for name in ("system", "user", "assistant"))
    return _template(f"{system}{{}}{end}", f"{user}{{}}{end}", opening, end, default=default)


def _llama3(trim: bool) -> str:
    system, user, opening = (
        f"<|start_header_id|>{name}<|end_header_id|>\n\n" for name in ("system", "user", "assistant")
    )
    end = "<|eot_id|>"
    return _template(f"{system}{{}}{end}", f"{user}{{}}{end}", opening, end, bos=True, trim=trim)


@dataclass(frozen=True)
class Named:
    """A named template.

    text: `chat_template`, a built-in name or Jinja text; "": there is none. end: the token that ends a turn, if it is
    not the tokenizer's EOS. own: models whose own template makes the same text, as a pattern of their names.
    """

    text: str = ""
    end: str = ""
    own: str = ""


QWEN = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
CHATML = Named("chatml", "<|im_end|>")
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
)
_LLAMA3_OWN, _QWEN_OWN = r"llama-3-[^/]*instruct", r"qwen2\.5-[^/]*instruct"
GEMMA, GEMMA3 = r"gemma-(2-)?\d+b-it", r"gemma-3-[^/]*-it"

LLAMAFACTORY = {
    "alpaca": Named(
        _template("{}", "### Instruction:\n{}\n\n", "### Response:\n", f"{EOS}\n\n", default=_ALPACA),
    ),
    "chatml": CHATML,
    "default": Named(_template(f"System: {{}}{EOS}\n", f"Human: {{}}{EOS}\n", "Assistant:", f"{EOS}\n")),
    "gemma": Named(own=f"{GEMMA}|{GEMMA3}"),
    "gemma2": Named(own=GEMMA),
    "gemma3": Named(own=GEMMA3),
    "llama3": Named(_llama3(trim=False), "<|eot_id|>", _LLAMA3_OWN),
    "qwen": Named(_chatml(QWEN), "<|im_end|>", _QWEN_OWN),
    "qwen3_nothink": Named("chatml", "<|im_end|>", r"qwen3-[^/]*instruct-2507"),
    "smollm": CHATML,
    "yi": CHATML,
    "zephyr": Named(
        _template(
            f"<|system|>\n{{}}{EOS}",
            f"<|user|>\n{{}}{EOS}",
            "<|assistant|>\n",
            EOS,
            default="You are Zephyr, a helpful assistant.",
        ),
    ),
}
"""By `template` (its data/template.py); a model's own template is as TRL keeps it, but for white space at the ends."""
AXOLOTL = {
    "alpaca": Named(_template("{}\n\n", "### Instruction:\n{}\n\n", "### Response:\n", f"{EOS}\n\n", bos=True)),
    "chatml": CHATML,
    "gemma": Named(own=GEMMA),
    "gemma3": Named(own=GEMMA3),
    "llama3": Named(_llama3(trim=True), "<|eot_id|>", _LLAMA3_OWN),
    "qwen_25": Named(_chatml(QWEN), "<|im_end|>", _QWEN_OWN),
    "qwen3": Named(own=r"qwen3-\d+(\.\d+)?b(-a\d+b)?$"),
}
"""By `chat_template` (its utils/chat_templates/templates)."""


def put_template(result: Translation, key: str, name: str, known: Mapping[str, Named], model: str) -> None:
    """Translate a named template: nothing if it is the model's own, else its text, with the token that ends a turn."""
    found = known.get(name, Named())
    if found.own and re.search(found.own, model.lower()):
        result.lose(key, name, "the model's own chat template, which is the same, is used", changes=False)
    elif found.text:
        end = result.config.get("eos_token", found.end)
        result.put("chat_template", _chatml() if found.text == "chatml" and end != found.end else found.text, key)
        if end and "eos_token" not in result.config:
            result.put("eos_token", end, key)
            result.notes.append(f"eos_token {end}: the token that ends a turn; the tokenizer must have it")
    else:
        why = "it is not in the table: write it as Jinja text into chat_template, or its file into chat_template_path"
        result.lose(key, name, why)
