"""A stand-in for vLLM: the part of its interface that is used, over a plain Hugging Face model.

Like vLLM it begins with arbitrary weights, keeps those that it is not handed, and takes over the random state and the
threads of the process. As on a CPU, it computes with a packed copy of a tied head, which it does not make
again when weights are reloaded. `SamplingParams` and `LLM` take the names that vLLM has and no others. `make vllm` runs
vLLM itself.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import torch


class VLLMValidationError(Exception):
    """No ValueError. Like the real one it names the parameter in its text."""

    def __init__(self, message: str, parameter: str, value: Any):
        super().__init__(f"{message} (parameter={parameter}, value={value})")


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

    def __post_init__(self) -> None:
        if self.temperature < 0:
            said = f"temperature must be non-negative, got {self.temperature}."
            raise VLLMValidationError(said, "temperature", self.temperature)
        if self.temperature > 2:
            said = f"temperature must be in [0, 2], got {self.temperature}."
            raise VLLMValidationError(said, "temperature", self.temperature)
        if self.temperature > 0:  # 0 asks for the likeliest token
            self.temperature = max(self.temperature, 0.01)


class Layer:
    """A layer of the worker's model; `quant_method` is its own."""

    def __init__(self, weight: torch.Tensor, pack: Callable[[torch.Tensor], None]):
        self._parameters = {"weight": weight}
        self.quant_method = self
        self.pack = pack

    def process_weights_after_loading(self, layer: Layer) -> None:
        assert layer is self
        self.pack(self._parameters["weight"])


class Model:
    """The model inside of a worker."""

    def __init__(self, model: Any):
        self.model = model
        self.packed = self.head.clone()

    @property
    def head(self) -> torch.Tensor:
        return self.model.get_output_embeddings().weight.detach()

    @property
    def tied(self) -> bool:
        return self.model.get_output_embeddings().weight is self.model.get_input_embeddings().weight

    def modules(self) -> Iterator[Any]:
        def pack(weight: torch.Tensor) -> None:
            self.packed = weight.detach().clone()

        yield SimpleNamespace(_parameters={})
        yield Layer(self.model.get_input_embeddings().weight, lambda weight: None)
        yield Layer(self.model.get_output_embeddings().weight, pack)

    def load(self, weights: Iterable[tuple[str, torch.Tensor]]) -> None:
        own = self.model.state_dict()
        for name, weight in weights:
            assert own[name].shape == weight.shape, name
            own[name].copy_(weight)
        if not self.tied:
            self.packed = self.head.clone()

    def logits(self, ids: list[int]) -> torch.Tensor:
        hidden = self.model.base_model(input_ids=torch.tensor([ids])).last_hidden_state[0, -1]
        return (hidden @ self.packed.T).float()


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
        seed: int = 0,
        gpu_memory_utilization: float = 0.92,
        max_model_len: int,
        enable_prefix_caching: bool = True,
        enforce_eager: bool = False,
        load_format: str = "auto",
        hf_overrides: dict[str, Any],
        logprobs_mode: str = "raw_logprobs",
    ):
        from transformers import AutoConfig, AutoModelForCausalLM

        print("vLLM prints when it starts")
        self.take_over(seed)
        self.options = {"dtype": dtype, "memory": gpu_memory_utilization, "max_model_len": max_model_len}
        self.processed = logprobs_mode == "processed_logprobs"
        self.cached = enable_prefix_caching
        config = AutoConfig.from_pretrained(model)
        assert load_format == "dummy", "the files may have fewer rows than the overrides say"
        for key, value in hf_overrides.items():
            setattr(config, key, value)
        made = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            for parameter in made.parameters():
                parameter.uniform_(-1e-3, 1e-3)
        self.model = Model(made)
        self.asked: list[tuple[list[int], SamplingParams]] = []
        self.synced = self.closed = 0
        self.llm_engine = SimpleNamespace(engine_core=SimpleNamespace(shutdown=self.shutdown))
        LLM.made.append(self)

    @staticmethod
    def take_over(seed: int) -> None:
        """What happens to the process in which it runs."""
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)
        torch.set_num_threads(2)
        torch.set_num_threads = lambda count: None

    def shutdown(self) -> None:
        self.closed += 1

    @torch.no_grad()
    def collective_rpc(self, method: str, kwargs: dict[str, Any]) -> list[Any]:
        assert method == "reload_weights" and list(kwargs) == ["weights_iterator"]
        assert not self.cached, "keys and values of the old weights would be read"
        self.synced += 1
        return [self.model.load(kwargs["weights_iterator"])]

    def apply_model(self, function: Callable[[Model], Any]) -> list[Any]:
        return [function(self.model)]

    @torch.no_grad()
    def generate(
        self, prompts: Sequence[dict[str, list[int]]], sampling_params: Sequence[SamplingParams], use_tqdm: bool = True
    ) -> list[Any]:
        torch.rand(1)  # a draw from the state of the process
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
        assert parameters.temperature > 0
        generator = torch.Generator().manual_seed(parameters.seed)
        stops = set(parameters.stop_token_ids)
        if not parameters.ignore_eos:
            stops.add(self.model.model.config.eos_token_id)
        tokens, logprobs, reason = [], [], "length"
        for _ in range(parameters.max_tokens):
            logits = self.model.logits(prompt + tokens)
            scaled = logits / parameters.temperature
            if parameters.allowed_token_ids is not None:
                allowed = torch.zeros(len(scaled), dtype=torch.bool)
                allowed[parameters.allowed_token_ids] = True
                scaled = scaled.masked_fill(~allowed, -torch.inf)
            token = int(torch.multinomial(scaled.softmax(-1), 1, generator=generator))
            said = (scaled if self.processed else logits).log_softmax(-1)[token].item()
            tokens.append(token)
            logprobs.append({token: SimpleNamespace(logprob=said, rank=1, decoded_token=None)})
            if token in stops:
                reason = "stop"
                break
            if len(prompt) + len(tokens) >= self.options["max_model_len"]:
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
