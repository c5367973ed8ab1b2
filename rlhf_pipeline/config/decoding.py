"""How `rlhf generate`, `evaluate` and `compare` make responses. Training always samples the policy itself."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field, field_validator

from rlhf_pipeline.config.base import Count, Fraction, Keys, Positive, option, wrong

TEMPERATURE = option(1.0, "temperature of sampling and of the exact figures; 1: the policy itself")

KL_OF = "KL, entropy and frontier are those of the policy's own samples, not of the decoder"
"""What a comparison says if it has a decoder."""

Share = Annotated[float, Field(gt=0, le=1)]


class Decoding(Keys):
    """A decoder in the names and meanings of transformers' `GenerationConfig`; by default the policy itself."""

    do_sample: bool = option(
        True, "sample tokens; false: greedy decoding, or beam search with num_beams (transformers: false)"
    )
    temperature: Positive = TEMPERATURE
    top_k: Annotated[int, Field(ge=0)] = option(
        0, "sample among this number of the likeliest tokens; 0: among all (transformers: 50)"
    )
    top_p: Share = option(
        1.0, "sample among the fewest likeliest tokens that together have this probability; 1: among all (transformers)"
    )
    min_p: Fraction = option(
        0.0, "sample among tokens with at least this multiple of the likeliest token's probability (transformers: none)"
    )
    typical_p: Share = option(
        1.0,
        "sample among the tokens whose surprise is closest to the entropy and that together have this probability; "
        "1: among all (transformers)",
    )
    repetition_penalty: Positive = option(
        1.0,
        "above 1, lower the logits of tokens that the prompt or the response has already: divide positive ones by it, "
        "multiply negative ones (transformers)",
    )
    num_beams: Count = option(1, "beams of beam search; above 1, do_sample must be false (transformers)")
    length_penalty: Annotated[float, Field(ge=-10, le=10)] = option(
        1.0, "power of the length by which beam search divides a response's log-probability (transformers)"
    )

    @field_validator("temperature", mode="before")
    @classmethod
    def _not_0(cls, value: Any) -> Any:
        if value == 0 and not isinstance(value, bool):
            raise wrong("a number > 0", "for greedy decoding, set do_sample: false")
        return value

    @property
    def plain(self) -> Decoding:
        """Sampling at this temperature, without anything else."""
        return Decoding(temperature=self.temperature)

    @property
    def is_plain(self) -> bool:
        """Whether responses are samples of the policy itself, at the temperature."""
        return not changed(self) - {"temperature"}

    @property
    def text(self) -> str:
        """The decoder in words: `sampling, temperature 0.7, top_p 0.9`."""
        name = "sampling" if self.do_sample else "greedy" if self.num_beams == 1 else "beam search"
        settings = [key for key in Decoding.model_fields if key in changed(self) - {"do_sample"}]
        return ", ".join([name, *(f"{key} {getattr(self, key):g}" for key in settings)])


def changed(config: Any) -> set[str]:
    """Return the keys of `Decoding` whose values are not the defaults."""
    return {name for name, field in Decoding.model_fields.items() if getattr(config, name) != field.default}
