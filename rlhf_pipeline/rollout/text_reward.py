"""Reward models from elsewhere: responses as text, tokenised by the reward model's own tokenizer and chat template."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from rlhf_pipeline.data.batch import PackedBatch
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import RunFailed, first_line
from rlhf_pipeline.rollout.texts import Answer, answers, as_text

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

Form = Literal["chat", "pair", "plain"]
Encoding = dict[str, list[int]]
MOST_ROWS = 64
"""Rows of one forward pass; a row shorter than 3/4 of the longest one starts another pass."""


@dataclass
class TextReward:
    """A sequence classifier with one label, read by its own forward pass: plain transformers' score of the text.

    form: how prompt and response become one input.
        chat: the conversation through the classifier's chat template, without further special tokens.
        pair: two segments, as encoders read them: tokenizer(prompt, response).
        plain: prompt + response as one text with the tokenizer's own special tokens, and EOS if the response ended.
    policy_tokenizer: decodes the responses. longest: tokens that the classifier can read; the beginning of a longer
    input is cut, which is logged once. count: receives the lengths of the rows of each pass, for the cost.
    """

    label: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    policy_tokenizer: PreTrainedTokenizerBase
    form: Form
    device: torch.device | str = "cpu"
    longest: int | None = None
    say: Callable[[str], None] = lambda text: None
    count: Callable[[Sequence[int]], None] = lambda lengths: None
    skips: ClassVar[bool] = False
    _said: bool = False

    @property
    def reads(self) -> str:
        """One line for the log: what the reward model reads."""
        how = {
            "chat": "through its own chat template",
            "pair": "as two segments, prompt and response",
            "plain": "as text after the prompt, with its EOS where a response ended",
        }
        return f"{self.label} reads decoded responses, tokenised by its own tokenizer {how[self.form]}"

    @torch.no_grad()
    def score(self, examples: Sequence[Example], packed: PackedBatch | None = None) -> Tensor:
        rows = [self.encode(answer) for answer in answers(examples, self.policy_tokenizer, rereading=True)]
        scores = torch.zeros(len(rows))
        for places in _alike([len(row["input_ids"]) for row in rows]):
            scores[places] = self._forward([rows[place] for place in places]).float().cpu()
        return scores - float(getattr(self.model.config, "reward_shift", 0.0) or 0.0)

    def encode(self, answer: Answer) -> Encoding:
        """The input for one response: input_ids, and for some encoders token_type_ids."""
        if self.form == "chat":
            turns = [*answer.turns, {"role": "assistant", "content": answer.response.strip()}]
            try:
                text = self.tokenizer.apply_chat_template(turns, tokenize=False)
            except Exception as error:  # a template is a program and may raise any error
                raise RunFailed(
                    f"reward model {self.label}: its chat template refuses the conversation ({first_line(error)}); "
                    "expected turns that it accepts, or reward_tokenization: text"
                ) from error
            return self._cut({"input_ids": self.tokenizer(text, add_special_tokens=False)["input_ids"]})
        prompt = as_text(answer.prompt)
        if self.form == "pair":
            return self._pair(prompt, answer.response.strip())
        prompt += "" if len(answer.turns) == 1 else "\n\nassistant: "
        ids, eos = list(self.tokenizer(prompt + answer.response)["input_ids"]), self.tokenizer.eos_token_id
        if answer.ended and eos is not None and ids[-1:] != [eos]:
            ids.append(eos)
        return self._cut({"input_ids": ids})

    def _pair(self, prompt: str, response: str) -> Encoding:
        found = dict(self.tokenizer(prompt, response, return_attention_mask=False))
        if self.longest is None or len(found["input_ids"]) <= self.longest:
            return found
        self._say_cut(len(found["input_ids"]))
        options: dict[str, Any] = {"truncation": "longest_first", "max_length": self.longest}
        return dict(self.tokenizer(prompt, response, return_attention_mask=False, **options))

    def _cut(self, row: Encoding) -> Encoding:
        if self.longest is None or len(row["input_ids"]) <= self.longest:
            return row
        self._say_cut(len(row["input_ids"]))
        return {name: values[-self.longest :] for name, values in row.items()}

    def _say_cut(self, found: int) -> None:
        if not self._said:
            self._said = True
            self.say(f"note: {self.label} reads at most {self.longest} tokens; longer inputs ({found}) are cut")

    def _forward(self, rows: Sequence[Encoding]) -> Tensor:
        """Scores (R,) of rows, padded on the right.

        Decoders of transformers read the last token that is not `pad_token_id`. A model without one (or with -1, which
        means the same) gets an id that no row holds, so that its last token is read, as in a batch of one.
        """
        width = max(len(row["input_ids"]) for row in rows)
        config = self.model.config.get_text_config()
        own = config.pad_token_id
        pad = _unused(rows) if own is None or own < 0 else own

        def padded(name: str, filler: int) -> Tensor:
            return torch.tensor([row[name] + [filler] * (width - len(row[name])) for row in rows], device=self.device)

        inputs = {name: padded(name, pad if name == "input_ids" else 0) for name in rows[0]}
        lengths = torch.tensor([len(row["input_ids"]) for row in rows], device=self.device)
        inputs["attention_mask"] = (torch.arange(width, device=self.device) < lengths[:, None]).long()
        self.count(lengths.tolist())
        config.pad_token_id = pad
        try:
            return self.model(**inputs).logits.squeeze(-1)
        finally:
            config.pad_token_id = own


def _unused(rows: Sequence[Encoding]) -> int:
    """The lowest id that no row holds."""
    held = {token for row in rows for token in row["input_ids"]}
    return next(token for token in range(len(held) + 1) if token not in held)


def _alike(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Places of rows of similar length, the longest first."""
    group: list[int] = []
    for place in sorted(range(len(lengths)), key=lambda place: -lengths[place]):
        if group and (len(group) == MOST_ROWS or 4 * lengths[place] < 3 * lengths[group[0]]):
            yield group
            group = []
        group.append(place)
    if group:
        yield group
