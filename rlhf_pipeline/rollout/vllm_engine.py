"""Sampling by vLLM in this process, with the weights of the trained model.

It uses `LLM`, `SamplingParams`, `LLM.generate`, `LLM.apply_model` and the workers' `reload_weights` (vLLM 0.27 to 0.30;
`make vllm` runs them). Input and output are token ids, so no tokenizer is loaded and training uses exactly the sampled
tokens.
"""

from __future__ import annotations

import contextlib
import gc
import os
import random
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from rlhf_pipeline.config.rollout_engine import vllm_on_cpu, vllm_version
from rlhf_pipeline.errors import RunFailed, first_line
from rlhf_pipeline.models.handover import differences_from_files, weights_of_files, without_adapters
from rlhf_pipeline.models.modules import ActorCritic, Policy
from rlhf_pipeline.rollout.sampler import Response

SEEDS = 2**62
INHERITED = ("LD_PRELOAD", "LD_LIBRARY_PATH", "LOCAL_WORLD_SIZE", "LOCAL_RANK", "WORLD_SIZE", "RANK")
"""Variables that vLLM and what it imports set, and that processes started later would inherit."""


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


@contextlib.contextmanager
def _our_state() -> Iterator[None]:
    """Give the process back as it was: vLLM seeds all random generators, and takes over torch's threads.

    On a CPU it replaces `torch.set_num_threads` by a function that does nothing.
    """
    python, numpy, threads = random.getstate(), np.random.get_state(), torch.get_num_threads()
    set_threads, inherited = torch.set_num_threads, {name: os.environ.get(name) for name in INHERITED}
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        torch.set_num_threads = set_threads
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
        for name, value in inherited.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


def pack_shared_weights(model: Any) -> None:
    """Let vLLM's layers that share a weight with an earlier layer, such as a tied head, prepare it for computing again.

    On a CPU each linear layer computes with a packed copy. `reload_weights` makes the copies of the layers that it
    loads, and the weight of a tied head is loaded as that of the embedding: its copy would be that of older weights.
    """
    seen: set[int] = set()
    for layer in model.modules():
        weight, method = layer._parameters.get("weight"), getattr(layer, "quant_method", None)
        if weight is None:
            continue
        if id(weight) in seen and method is not None:
            method.process_weights_after_loading(layer)
        seen.add(id(weight))


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
    """vLLM's engine in the process of the trained model, on the same GPU, or on the CPU if vLLM is built for it.

    Its weights are arbitrary until the first `load_weights`.

    Args:
        policy: the model to sample from. model: folder or hub id with its config.json. dtype: the dtype of the
            computation ("bfloat16", ...). max_length: tokens of prompt and response. memory: share of the memory of
            the GPU (or of the machine) for the engine.

    Raises:
        RunFailed: vLLM cannot be imported or started.
    """

    def __init__(
        self,
        policy: Policy | ActorCritic,
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
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it warns of each layer that shares its weight
        fix = "install a vllm that fits this torch, or use rollout_engine: native"
        with _failures("importing it", fix), _our_state():
            import vllm

            self.version = vllm_version() or getattr(vllm, "__version__", "of unknown version")
            self._parameters = vllm.SamplingParams
        fix = "lower vllm_gpu_memory_utilization, or use rollout_engine: native"
        overrides = differences_from_files(without_adapters(policy.language_model))
        with _failures(f"starting {self.version}", fix), _our_state():
            self._llm: Any = vllm.LLM(
                model=model,
                revision=revision,
                trust_remote_code=trust_remote_code,
                skip_tokenizer_init=True,
                dtype=dtype,
                load_format="dummy",  # the policy's weights follow, and may have more rows than those of the files
                hf_overrides=overrides,
                max_model_len=max_length,
                gpu_memory_utilization=memory,
                enforce_eager=vllm_on_cpu(),  # compiling takes longer there than it saves
                logprobs_mode="processed_logprobs",  # of the sampling distribution, including temperature
                enable_prefix_caching=False,  # keys and values of earlier weights would remain
                seed=seed,
            )

    def load_weights(self, policy: Policy | ActorCritic) -> None:
        """Copy the current weights of the policy into the engine; adapters are merged into those that they stand on."""
        weights = weights_of_files(without_adapters(policy.language_model))
        with _failures("loading the policy's weights", "use rollout_engine: native"), _our_state(), torch.no_grad():
            self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": iter(weights.items())})
            self._llm.apply_model(pack_shared_weights)

    def close(self) -> None:
        """End the engine and free its memory."""
        with _failures("ending it", "the model is not affected"), _our_state():
            self._llm.llm_engine.engine_core.shutdown()
            self._llm = None
            gc.collect()

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
        allowed = None if tokens is None else list(range(tokens))  # one list for all: a vocabulary has 150,000 ids
        with _failures("sampling", "use rollout_engine: native"), _our_state():
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
                    allowed_token_ids=allowed,
                )
                for seed in seeds
            ]
            outputs = self._llm.generate(asked, sampling_params=parameters, use_tqdm=False)
        found = [list(output.prompt_token_ids) for output in outputs]
        if found != [prompt["prompt_token_ids"] for prompt in asked]:
            raise RunFailed(f"rollout_engine vllm: found results for other prompts than the {len(asked)} requested")
        return [response_of(output.outputs[0], stop_ids, response_length) for output in outputs]
