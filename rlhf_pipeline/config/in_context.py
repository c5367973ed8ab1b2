"""Keys of arms that answer with demonstrations in their context, without training: `few_shot:REF` and `icdpo:REF`."""

from __future__ import annotations

import re
from typing import Literal, cast

from rlhf_pipeline.config.base import Count, Keys, Text, option

Method = Literal["few_shot", "icdpo"]
"""How a policy answers with demonstrations before the prompt."""

_ARM = re.compile(r"(few_shot|icdpo):(.+)")


def split_arm(text: str) -> tuple[Method | None, str]:
    """Return the method and the policy that an arm names: ("few_shot", "a") for few_shot:a, (None, "a") for a."""
    found = _ARM.fullmatch(text)
    return (None, text) if found is None else (cast(Method, found[1]), found[2])


def name_arm(method: Method | None, policy: str) -> str:
    """Return the text that `split_arm` reads."""
    return policy if method is None else f"{method}:{policy}"


class InContext(Keys):
    """How arms answer with demonstrations in their context."""

    demonstrations: Count = option(2, "number of demonstrations in the context")
    source: Text | None = option(
        None, "source of the demonstrations: its training split (default: the data of the SFT model)", names="data"
    )
    prefixes: Count = option(4, "few_shot: sets of demonstrations that are tried; the best one is used for all prompts")
    validation_split: Text = option(
        "validation", "few_shot: split of the demonstrations on whose prompts the set is chosen"
    )
    retrieval: Literal["bm25", "embeddings"] = option(
        "bm25",
        "icdpo: how the demonstrations of a prompt are found: by the words of their prompts, or by the cosine of the "
        "prompts' embeddings, the mean of the policy's last hidden states",
    )
    candidates: Count = option(3, "icdpo: responses that are sampled for each one that is returned")
    score: Literal["one_sided", "two_sided"] = option(
        "one_sided",
        "icdpo: what is subtracted from log pi(y | demonstrations, x): log pi(y | x); two_sided: the same behind the "
        "rejected responses of a source of pairs",
    )
