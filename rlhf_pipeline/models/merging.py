"""Merge adapters into weights, and measure what the rounding of the weights loses."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.models.adapters import remove_adapters, switched_off

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MOST_LOST = 0.1
"""The largest loss of a merge, as a share of the adapter's own effect."""
_ROUNDING = 1e-5  # of fp32, in nats or units of reward


@dataclass(frozen=True)
class Merged:
    """The result of a merge, on probe sequences of arbitrary tokens.

    distance: root mean square difference between the outputs of the merged model and of the adapter: next-token
    log-probabilities in nats, or scores. effect: the same between the adapter and its base. from_4_bits: the adapter
    was trained and is read on a base in 4 bits, and is merged into the base before: the distance is mostly the rounding
    of the base to 4 bits, which the adapter was trained to live with and the merged model does not have.
    """

    distance: float
    effect: float
    from_4_bits: bool = False

    @property
    def share(self) -> float:
        """The distance as a share of the effect; 0 if it is no more than rounding in fp32."""
        return 0.0 if self.distance <= _ROUNDING else self.distance / max(self.effect, 1e-12)

    @property
    def summary(self) -> str:
        """One line for the log."""
        if not math.isfinite(self.distance):
            return "outputs of the merged model are not finite: a weight is beyond the range of its number type"
        if self.from_4_bits:
            return (
                f"merged into the weights before their rounding to 4 bits: outputs are {self.distance:.2g} from those "
                f"of the adapter on 4 bits, beside an effect of {self.effect:.2g} of the adapter (root mean squares); "
                "what was measured of the adapter does not hold of the merged model: evaluate it again"
            )
        return (
            f"merged outputs are {self.distance:.2g} from those of the adapter, {self.share:.1%} of the adapter's own "
            f"effect of {self.effect:.2g} (root mean squares)"
        )

    def require(self, label: str, fix: str) -> None:
        """Check that the merge loses little.

        Raises:
            BadInput: it loses more than `MOST_LOST` of the adapter's effect, and this is not due to a base in 4 bits;
                or outputs of the merged model are not finite.
        """
        if not math.isfinite(self.distance):
            raise BadInput(f"{label}: {self.summary}; {fix}")
        if self.share > MOST_LOST and not self.from_4_bits:
            raise BadInput(f"{label}: {self.summary}; expected at most {MOST_LOST:.0%}: {fix}")


def merge_into(model: PreTrainedModel, dtype: torch.dtype, *, in_4_bits: PreTrainedModel | None = None) -> Merged:
    """Merge all adapters of a model in fp32 into its weights, and round these to `dtype`, in place.

    The merged model is read in fp32, so that only the rounding of weights counts, not that of activations.

    in_4_bits: the same adapters on the weights in 4 bits on which they were trained.
    """
    measured = model if in_4_bits is None else in_4_bits
    adapted = _outputs(measured)
    with switched_off(measured):
        base = _outputs(measured)
    remove_adapters(model, merge=True)
    module = cast(nn.Module, model)
    module.to(dtype).to(torch.float32)
    merged = _outputs(model)
    module.to(dtype)
    model.config.dtype = dtype
    return Merged(_rms(merged - adapted), _rms(adapted - base), in_4_bits is not None)


def _rms(difference: Tensor) -> float:
    return float(difference.double().square().mean().sqrt())


@torch.no_grad()
def _outputs(model: PreTrainedModel) -> Tensor:
    """Log-probabilities of next tokens, or scores, on eight sequences of sixteen arbitrary tokens."""
    embedding = cast(nn.Embedding, model.get_input_embeddings())
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(embedding.weight.shape[0], (8, 16), generator=draw).to(embedding.weight.device)
    was_training = model.training
    model.eval()
    outputs = torch.cat([model(input_ids=row[None], use_cache=False).logits.float() for row in ids])
    model.train(was_training)
    return torch.log_softmax(outputs, -1) if outputs.ndim == 3 else outputs
