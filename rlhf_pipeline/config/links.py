"""Values of a stage's config that name another stage of the experiment."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping

from rlhf_pipeline.config.draft import Draft
from rlhf_pipeline.config.mentions import DATA_SUFFIXES, Mention, raw_mentions
from rlhf_pipeline.config.stages import SCHEMAS
from rlhf_pipeline.errors import did_you_mean

_PRODUCERS = {"policy": ("sft", "ppo", "dpo"), "reward": ("train-rm",), "data": ("collect",)}
_MEANT = {"policy": "a policy", "reward": "a reward model", "data": "data"}


class Links:
    """Finds the values that name an earlier stage, and refuses names of no stage, a later one or a wrong one."""

    def __init__(self, commands: Mapping[str, str], known_models: Collection[str]):
        self._commands, self._known = commands, set(known_models)
        self._earlier: set[str] = set()

    def done(self, name: str) -> None:
        """Record that this stage comes before the stages that are read from now on."""
        self._earlier.add(name)

    def find(self, name: str, draft: Draft) -> set[str]:
        """Return the earlier stages that a draft names; names of other stages are faults."""
        links: set[str] = set()
        for mention in raw_mentions(draft.values, SCHEMAS[draft.stage]):
            if mention.text not in self._commands:
                self._check_outside(draft, mention)
            elif mention.text not in self._earlier:
                when = "this stage itself" if mention.text == name else "a later stage"
                expected, fix = self._expected(mention.role), "change the order of the stages"
                draft.fault(mention.path, f"{mention.text!r} is {when}", expected, fix)
            elif self._commands[mention.text] not in _PRODUCERS[mention.role]:
                command, meant = self._commands[mention.text], _MEANT[mention.role]
                found = f"the stage {mention.text!r} is a {command} stage, which does not make {meant}"
                draft.fault(mention.path, found, self._expected(mention.role))
            else:
                links.add(mention.text)
        return links

    def _expected(self, role: str) -> str:
        producers = _PRODUCERS[role]
        fitting = [name for name, command in self._commands.items() if command in producers]
        fitting = [name for name in fitting if name in self._earlier]
        text = f"an earlier stage of kind {' or '.join(producers)}"
        return f"{text} ({', '.join(fitting)})" if fitting else text

    def _check_outside(self, draft: Draft, mention: Mention) -> None:
        """Refuse a bare name that does not exist; paths and hub ids are checked when they are loaded."""
        text = mention.text
        bare = re.split("[@#]", text, maxsplit=1)[0]
        if "/" in text or text.startswith((".", "~")) or os.path.exists(text):
            return
        if mention.role == "data":
            near = did_you_mean(text, self._commands)
            if near and ":" not in text and not text.endswith(DATA_SUFFIXES):
                draft.fault(mention.path, f"{text!r} names no stage", self._expected("data"), near)
        elif bare not in self._known:
            near = did_you_mean(bare, [*self._commands, *sorted(self._known)])
            if bare in self._commands:
                near = f"write {bare} for the output of the stage"
            found = f"{text!r} names no stage of the experiment and no model of the registry"
            draft.fault(mention.path, found, self._expected(mention.role), near)
