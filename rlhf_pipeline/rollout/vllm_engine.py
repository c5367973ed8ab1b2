"""Sampling by vLLM in this process, with the weights of the trained model.

Written from vLLM's documentation and TRL 1.16's use of it (vLLM 0.22 to 0.31); not yet run with vLLM itself. It uses
only `LLM`, `SamplingParams`, `LLM.generate`, `LLM.apply_model` and a model's `load_weights`. Input and output are token
ids, so no tokenizer is loaded and training uses exactly the sampled tokens.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_pipeline.errors import RunFailed, first_line
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.rollout.sampler import Response

SEEDS = 2**62


@contextlib.contextmanager
def _failures(doing: str, fix: str) -> Iterator[None]:
    """Convert errors of vLLM to one line; its output goes to stderr, because stdout is for the command's result."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except RunFailed:
        raise
    except Exception as error:
        raise RunFailed(f"rollout_engine vllm, {doing}: {type(error).__name__}: {first_line(error)}; {fix}") from error


def actor_weights(policy: Policy | ActorCritic) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's parameters under their Hugging Face names, tied ones once, without a critic."""
    for name, parameter in policy.language_model.named_parameters():
        yield name, parameter.detach()


def response_of(output: Any, stop_ids: Sequence[int], response_length: int) -> Response:
    """Convert one completion of vLLM to a response.

    The last token decides whether it ended, because versions report a stop token at the last position differently.

    Args:
        output: has token_ids, finish_reason and, for every token, a dict {token id: object with .logprob}.

    Raises:
        RunFailed: the tokens do not fit the request.
    """
    ids = [int(token) for token in output.token_ids]
    ended = bool(ids) and ids[-1] in stop_ids
    place = next((number for number, token in enumerate(ids) if token in stop_ids), len(ids) - 1)
    whole = 0 < len(ids) <= response_length and place == len(ids) - 1 and (ended or len(ids) == response_length)
    if not whole or output.finish_reason not in ("stop", "length"):
        raise RunFailed(
            f"rollout_engine vllm: found a response of {len(ids)} tokens that {'ends' if ended else 'does not end'} in "
            f"a stop token {list(stop_ids)} (finish_reason {output.finish_reason!r}); expected one up to its first "
            f"stop token, or {response_length} tokens without; use rollout_engine: native"
        )
    if output.logprobs is None or len(output.logprobs) != len(ids):
        found = "none" if output.logprobs is None else str(len(output.logprobs))
        raise RunFailed(f"rollout_engine vllm: expected {len(ids)} log-probabilities, found {found}")
    logprobs = [float(at[token].logprob) for at, token in zip(output.logprobs, ids, strict=True)]
    return Response(ids, ended, logprobs)


class VllmEngine:
    """vLLM's engine on the same GPU as the trained model.

    Args:
        model: folder or hub id of the initial policy. dtype: the dtype of the computation ("bfloat16", ...).
        max_length: tokens of prompt and response. memory: share of the GPU's memory for the engine.

    Raises:
        RunFailed: vLLM cannot be imported or started.
    """

    def __init__(
        self,
        model: str,
        *,
        dtype: str,
        max_length: int,
        memory: float,
        seed: int,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ):
        # One process, so that the weights are passed in memory and the order of the work is fixed.
        os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
        with _failures("importing it", "install a vllm that fits this torch, or use rollout_engine: native"):
            import vllm

            self.version = getattr(vllm, "__version__", "of unknown version")
            self._parameters = vllm.SamplingParams
        fix = "lower vllm_gpu_memory_utilization, or use rollout_engine: native"
        with _failures(f"starting {self.version}", fix):
            self._llm = vllm.LLM(
                model=model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                skip_tokenizer_init=True,
                dtype=dtype,
                max_model_len=max_length,
                gpu_memory_utilization=memory,
                logprobs_mode="processed_logprobs",  # of the sampling distribution, including temperature
                enable_prefix_caching=False,  # keys and values of earlier weights would remain
                seed=seed,
            )

    def load_weights(self, policy: Policy | ActorCritic) -> None:
        """Copy the current weights of the policy into the engine."""

        def load(model: Any) -> None:  # vllm's own implementation of the model
            model.load_weights(actor_weights(policy))

        with _failures("loading the policy's weights", "use rollout_engine: native"), torch.no_grad():
            self._llm.apply_model(load)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        response_length: int,
        stop_ids: Sequence[int],
        generator: torch.Generator,
        temperature: float = 1.0,
        tokens: int | None = None,
    ) -> list[Response]:
        """Sample `samples` responses for each prompt, in the order of the prompts.

        Each response has its own seed from the generator, which depends only on the generator's seed and the response's
        number. vLLM reproduces the tokens only on the same hardware and version.

        Args:
            prompts: token ids. stop_ids: each ends a response and is a part of it; no other token does.
            tokens: the number of ids that are tokens; later outputs are never sampled.

        Raises:
            RunFailed: vLLM fails, or its result does not fit the request.
        """
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts for _ in range(samples)]
        seeds = torch.randint(SEEDS, (len(asked),), generator=generator).tolist()
        with _failures("sampling", "use rollout_engine: native"):
            parameters = [
                self._parameters(
                    n=1,
                    temperature=temperature,
                    top_p=1.0,
                    top_k=0,
                    min_p=0.0,
                    seed=seed,
                    max_tokens=response_length,
                    stop_token_ids=list(stop_ids),
                    ignore_eos=True,
                    logprobs=0,  # of the sampled token only
                    detokenize=False,
                    allowed_token_ids=None if tokens is None else list(range(tokens)),
                )
                for seed in seeds
            ]
            outputs = self._llm.generate(asked, sampling_params=parameters, use_tqdm=False)
        found = [list(output.prompt_token_ids) for output in outputs]
        if found != [prompt["prompt_token_ids"] for prompt in asked]:
            raise RunFailed(f"rollout_engine vllm: found results for other prompts than the {len(asked)} requested")
        return [response_of(output.outputs[0], stop_ids, response_length) for output in outputs]
