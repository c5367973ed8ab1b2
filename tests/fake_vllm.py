"""A stand-in for vLLM: the part of its interface that is used, over a plain Hugging Face model.

It samples with the weights that it was handed and, like vLLM, begins with those of the folder that it was started on.
`SamplingParams` and `LLM` take the names that vLLM has and no others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import torch


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int | None = None
    stop_token_ids: list[int] = field(default_factory=list)
    allowed_token_ids: list[int] | None = None
    ignore_eos: bool = False
    max_tokens: int = 16
    logprobs: int | None = None
    detokenize: bool = True


class Model:
    """The model inside of a worker."""

    def __init__(self, model: Any):
        self.model = model

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        own, loaded = dict(self.model.named_parameters()), set()
        for name, weight in weights:
            own[name].data.copy_(weight)
            loaded.add(name)
        return loaded


class LLM:
    made: ClassVar[list[LLM]] = []
    answer: ClassVar[Callable[[Any], Any] | None] = None  # changes what comes out

    def __init__(
        self,
        model: str,
        *,
        skip_tokenizer_init: bool = False,
        trust_remote_code: bool = False,
        dtype: str = "auto",
        revision: str | None = None,
        seed: int | None = None,
        gpu_memory_utilization: float = 0.9,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        logprobs_mode: str = "raw_logprobs",
    ):
        from transformers import AutoModelForCausalLM

        print("vLLM prints when it starts")
        torch.manual_seed(seed)  # in one process vLLM sets the state of its caller
        self.options = {"dtype": dtype, "memory": gpu_memory_utilization, "max_model_len": max_model_len}
        self.processed = logprobs_mode == "processed_logprobs"
        self.cached = enable_prefix_caching
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=dtype).eval()
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.synced = 0
        LLM.made.append(self)

    def apply_model(self, function: Callable[[Model], Any]) -> list[Any]:
        self.synced += 1
        assert not self.cached, "keys and values of the old weights would be read"
        return [function(Model(self.model))]

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[dict[str, list[int]]], sampling_params: Sequence[SamplingParams], use_tqdm: bool = True
    ) -> list[Any]:
        found = []
        for prompt, parameters in zip(prompts, sampling_params, strict=True):
            ids = prompt["prompt_token_ids"]
            self.asked.append((ids, parameters))
            output = self.sample(ids, parameters)
            answer = type(self).answer
            found.append(SimpleNamespace(prompt_token_ids=ids, outputs=[answer(output) if answer else output]))
        return found

    def sample(self, prompt: list[int], parameters: SamplingParams) -> Any:
        assert (parameters.top_p, parameters.top_k, parameters.min_p, parameters.n) == (1.0, 0, 0.0, 1)
        generator = torch.Generator().manual_seed(parameters.seed)
        stops = set(parameters.stop_token_ids)
        if not parameters.ignore_eos:
            stops.add(self.model.config.eos_token_id)
        tokens, logprobs, reason = [], [], "length"
        for _ in range(parameters.max_tokens):
            logits = self.model(input_ids=torch.tensor([prompt + tokens])).logits[0, -1].float()
            scaled = logits / parameters.temperature
            token = int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
            said = (scaled if self.processed else logits).log_softmax(-1)[token].item()
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=said, rank=1, decoded_token=None)})
            if token in stops:
                reason = "stop"
                break
        told = logprobs if parameters.logprobs is not None else None
        return SimpleNamespace(token_ids=tokens, logprobs=told, finish_reason=reason)


def module() -> ModuleType:
    """A module `vllm` for sys.modules."""
    made = ModuleType("vllm")
    made.__spec__ = ModuleSpec("vllm", None, origin="a test")
    made.__version__ = "0.0.fake"
    LLM.made, LLM.answer = [], None
    made.LLM, made.SamplingParams = LLM, SamplingParams
    return made
