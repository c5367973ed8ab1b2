"""Sampling by vLLM in this process, with the weights of the model that trains.

Written against vLLM's documentation and TRL 1.16's use of it (vLLM 0.22 to 0.31); never run with vLLM itself. Nothing
but `LLM`, `SamplingParams`, `LLM.generate`, `LLM.apply_model` and a model's `load_weights` is used. Token ids go in and
come out, so that no tokenizer is loaded and no text stands between what is sampled and what is trained on.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from rlhf_pipeline.errors import RunFailed
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.rollout.sampler import Response

SEEDS = 2**62


@contextlib.contextmanager
def _failures(doing: str, fix: str) -> Iterator[None]:
    """Tell what vLLM has raised in one line; what it prints goes to stderr, stdout carries a command's result."""
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except RunFailed:
        raise
    except Exception as error:
        told = (str(error).splitlines() or [""])[0]
        raise RunFailed(f"rollout_engine vllm, {doing}: {type(error).__name__}: {told}; {fix}") from error


def actor_weights(policy: Policy | ActorCritic) -> Iterator[tuple[str, torch.Tensor]]:
    """The language model's parameters under their Hugging Face names, tied ones once; nothing of a critic."""
    for name, parameter in policy.language_model.named_parameters():
        yield name, parameter.detach()


def response_of(output: Any, stop_id: int, response_length: int) -> Response:
    """One completion of vLLM as a response.

    Whether it ended is read from its last token: versions differ in what they call a stop token at the last place.

    Args:
        output: has token_ids, finish_reason and, for every token, a dict {token id: has .logprob}.

    Raises:
        RunFailed: where the tokens cannot be what was asked for.
    """
    ids = [int(token) for token in output.token_ids]
    ended = bool(ids) and ids[-1] == stop_id
    place = next((number for number, token in enumerate(ids) if token == stop_id), len(ids) - 1)
    whole = 0 < len(ids) <= response_length and place == len(ids) - 1 and (ended or len(ids) == response_length)
    if not whole or output.finish_reason not in ("stop", "length"):
        raise RunFailed(
            f"rollout_engine vllm: found a response of {len(ids)} tokens that {'ends' if ended else 'does not end'} in "
            f"the stop token {stop_id} (finish_reason {output.finish_reason!r}); expected one up to its first stop "
            f"token, or {response_length} tokens without; use rollout_engine: native"
        )
    if output.logprobs is None or len(output.logprobs) != len(ids):
        found = "none" if output.logprobs is None else str(len(output.logprobs))
        raise RunFailed(f"rollout_engine vllm: expected {len(ids)} log-probabilities, found {found}")
    logprobs = [float(at[token].logprob) for at, token in zip(output.logprobs, ids, strict=True)]
    return Response(ids, ended, logprobs)


class VllmEngine:
    """vLLM's engine beside the model that trains, on the same GPU.

    Args:
        model: folder or hub id of the policy at its start. dtype: what it computes in ("bfloat16", ...).
        max_length: prompt and response, in tokens. memory: share of the GPU's memory that it takes.

    Raises:
        RunFailed: when vLLM cannot be imported or started.
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
        # One process: the weights are handed over in memory, and the order of the work is the same every time.
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
                logprobs_mode="processed_logprobs",  # of the distribution that is sampled from, temperature included
                enable_prefix_caching=False,  # keys and values of the weights before would outlive them
                seed=seed,
            )

    def load_weights(self, policy: Policy | ActorCritic) -> None:
        """Give the engine the weights that the policy has now."""

        def load(model: Any) -> None:  # vllm's own form of the model
            model.load_weights(actor_weights(policy))

        with _failures("taking over the policy's weights", "use rollout_engine: native"), torch.no_grad():
            self._llm.apply_model(load)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        samples: int,
        response_length: int,
        stop_id: int,
        generator: torch.Generator,
        temperature: float = 1.0,
    ) -> list[Response]:
        """Sample `samples` responses for each prompt, in the order of the prompts.

        Each response has a seed of its own, drawn from the generator: a function of the generator's seed and of the
        response's number. vLLM promises the same tokens again on the same hardware and version only.

        Args:
            prompts: token ids. stop_id: ends a response and belongs to it; the model's own EOS is no other end.

        Raises:
            RunFailed: when vLLM fails, or answers with something else than was asked for.
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
                    stop_token_ids=[stop_id],
                    ignore_eos=True,
                    logprobs=0,  # of the sampled token alone
                    detokenize=False,
                )
                for seed in seeds
            ]
            outputs = self._llm.generate(asked, sampling_params=parameters, use_tqdm=False)
        found = [list(output.prompt_token_ids) for output in outputs]
        if found != [prompt["prompt_token_ids"] for prompt in asked]:
            raise RunFailed(f"rollout_engine vllm: {len(asked)} prompts went in, and others came back")
        return [response_of(output.outputs[0], stop_id, response_length) for output in outputs]
