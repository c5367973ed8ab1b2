"""Models that are told where the trees of a flat batch are: what they compute, and that nothing else changes."""

from __future__ import annotations

import copy

import pytest
import torch

from rlhf_pipeline.algorithms import attention
from rlhf_pipeline.data import world
from rlhf_pipeline.data.batch import pack
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.models.forward import Reader, completion_logprobs
from rlhf_pipeline.models.loading import save_model
from rlhf_pipeline.models.modules import Policy, assert_independent, make_actor_critic
from rlhf_pipeline.models.selfcheck import inspect_model, inspect_reward_model, read_reward_model
from rlhf_pipeline.models.tree_attention import NAME, TreeMask, use_sdpa, use_tree_attention

CLOSE = {"rtol": 0, "atol": 1e-5}
FLAT, ROWS = Reader("flat"), Reader("rows")
LONG = {"max_position_embeddings": 512}
WINDOW = 40
NAMES = {
    "llama": LONG,
    "gpt2": {"n_positions": 512},
    "gpt_neox": LONG,
    "mistral": {**LONG, "sliding_window": WINDOW},
    "qwen2-sliding": {**LONG, "sliding_window": WINDOW},
    "gemma3_text": {**LONG, "sliding_window": WINDOW},
}


@pytest.fixture(scope="module")
def long_examples() -> list[Example]:
    """Trees below and above what is scored whole, longer than the window, of 1 to 9 completions."""
    shapes = [(150, (60, 90)), (30, (25, 5, 33)), (10, (250,)), (3, (1,) * 9), (70, (20,) * 9), (1, (45, 1))]
    sizes = [prompt + sum(rest) for prompt, rest in shapes]
    assert min(sizes) < WINDOW < 70 and sorted(sizes)[2] < attention.WHOLE < sorted(sizes)[3]
    draw = torch.Generator().manual_seed(4)

    def tokens(count: int) -> list[int]:
        return torch.randint(2, 32, (count,), generator=draw).tolist()

    return [
        Example(tokens(prompt), [tokens(n) for n in rest], [True] * len(rest), prompt_key=str(n), where=f"row {n}")
        for n, (prompt, rest) in enumerate(shapes)
    ]


@torch.no_grad()
def plain(model, examples) -> torch.Tensor:
    """(N,) log-probabilities by the model's own forward pass, one sequence at a time, no padding, no mask."""
    pieces = []
    for example in examples:
        for completion in example.completions:
            ids = torch.tensor([example.prompt_ids + completion])
            table = torch.log_softmax(model(input_ids=ids, use_cache=False).logits[0, :-1].double(), -1)
            pieces.append(table.gather(-1, ids[0, 1:, None])[len(example.prompt_ids) - 1 :, 0])
    return torch.cat(pieces).float()


def tree_mask(batch, window: int | None = None, dtype: torch.dtype = torch.float32) -> TreeMask:
    return TreeMask.of(batch.trees, window, dtype, torch.device("cpu"))


def gradients(model, reader, examples) -> torch.Tensor:
    batch = pack(examples, layout=reader.layout, flat_from=0)
    assert batch.layout == reader.layout
    model.zero_grad()
    completion_logprobs(model, reader, batch)[0].square().sum().backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def assert_close(found: torch.Tensor, expected: torch.Tensor, name: str) -> None:
    """In float64, but Llama and its descendants compute their norms in fp32 in any case."""
    limit = 1e-10 if name.startswith("gpt") else 1e-5
    assert found.dtype == torch.float64
    assert (found - expected).abs().max() <= limit * expected.abs().max()


@pytest.mark.parametrize("name", NAMES)
def test_long_flat_batches_agree_with_plain_sequences(make_model, long_examples, name):
    model = make_model(name, dtype=torch.float64, **NAMES[name])
    expected = plain(model, long_examples)
    if "sliding_window" in NAMES[name]:
        wide = make_model(name, dtype=torch.float64, **{**NAMES[name], "sliding_window": 512})
        assert (plain(wide, long_examples) - expected).abs().max() > 0.1  # the window makes a difference
    assert inspect_model(model) == FLAT
    batch = pack(long_examples, layout="flat")
    assert batch.layout == "flat"
    with torch.no_grad():
        found = completion_logprobs(model, FLAT, batch)[0]
    torch.testing.assert_close(found.float(), expected, **CLOSE)


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "mistral", "gemma3_text"])
def test_gradients_of_long_flat_batches_agree_with_rows(make_model, long_examples, name):
    model = make_model(name, dtype=torch.float64, **NAMES[name])
    expected = gradients(model, ROWS, long_examples)
    assert inspect_model(model) == FLAT
    assert_close(gradients(model, FLAT, long_examples), expected, name)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("name", ["gpt2", "gemma3_text"])
def test_gradient_checkpointing_changes_no_gradient(make_model, long_examples, name, reentrant, monkeypatch):
    model = make_model(name, dtype=torch.float64, **NAMES[name]).train()
    assert inspect_model(model) == FLAT
    calls = []
    original = attention._TreeAttention.forward
    monkeypatch.setattr(attention._TreeAttention, "forward", lambda *given: calls.append(1) or original(*given))
    expected = gradients(model, FLAT, long_examples)
    assert len(calls) == 2  # one a layer
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    model.get_input_embeddings().requires_grad_()
    assert_close(gradients(model, FLAT, long_examples), expected, name)
    assert len(calls) == 2 + 4  # each once more


@pytest.mark.parametrize("scorer", [False, True])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3_text"])
def test_a_saved_model_has_no_trace_of_it(make_model, examples, tmp_path, name, scorer):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    model = make_model(name, scorer=scorer)
    assert (inspect_reward_model if scorer else inspect_model)(model).layout == "flat"
    assert model.config._attn_implementation == NAME
    save_model(model, world.tokenizer(), tmp_path / "saved")
    for path in (tmp_path / "saved").glob("*.json"):
        assert NAME not in path.read_text(), path.name
    kind = AutoModelForSequenceClassification if scorer else AutoModelForCausalLM
    loaded = kind.from_pretrained(tmp_path / "saved").eval()
    assert loaded.config._attn_implementation == "sdpa"
    ids = torch.tensor([examples[0].prompt_ids])
    with torch.no_grad():
        for other in (model, make_model(name, scorer=scorer)):
            torch.testing.assert_close(loaded(input_ids=ids).logits, other(input_ids=ids).logits, **CLOSE)


@pytest.mark.parametrize("init", ["sft", "reward_model", "shared"])
def test_a_critic_of_a_copied_trunk_reads_flat_batches(make_model, examples, init):
    actor, scorer = make_model("llama"), read_reward_model(make_model("mistral", scorer=True, seed=5))
    module = make_actor_critic(actor, inspect_model(actor), init, reward_model=scorer)
    assert module.reader.layout == "flat"
    if module.critic is not None:
        assert_independent(actor if init == "sft" else scorer, module.critic)
        use_sdpa(actor if init == "sft" else scorer.model)  # of the original, not of the copy
        assert module.critic.config._attn_implementation == NAME
        assert use_tree_attention(actor)
    torch.nn.init.normal_(module.value_head.weight)
    with torch.no_grad():
        found = module(pack(examples, layout="flat", flat_from=0))
        expected = module(pack(examples, layout="rows"))
    assert expected.values.std() > 0.1
    torch.testing.assert_close(found.values, expected.values, **CLOSE)
    torch.testing.assert_close(found.logprobs, expected.logprobs, **CLOSE)


def test_a_copied_model_computes_with_weights_of_its_own(make_model, examples):
    model = make_model("llama")
    assert use_tree_attention(model)
    batch = pack(examples, layout="flat", flat_from=0)
    copied = copy.deepcopy(model)
    with torch.no_grad():
        before = completion_logprobs(copied, FLAT, batch)[0]
        for parameter in model.parameters():
            parameter.mul_(1.5)
        assert torch.equal(completion_logprobs(copied, FLAT, batch)[0], before)
        assert (completion_logprobs(model, FLAT, batch)[0] - before).abs().max() > 0.1


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma3_text", "gpt2", "gpt_neox"])
def test_decoding_with_a_cache_gives_the_plain_logits(make_model, examples, name):
    """Left-padded, token by token, past the sliding windows of 3."""
    from transformers import DynamicCache

    model = make_model(name)
    rows = [example.prompt_ids + example.completions[0] for example in examples]
    with torch.no_grad():
        expected = [model(input_ids=torch.tensor([row])).logits[0] for row in rows]
        assert inspect_model(model) == FLAT  # and with it `decodes`
        width, steps = max(map(len, rows)), min(map(len, rows))
        ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
        positions = (mask.cumsum(-1) - 1).clamp_min(0)
        cache, start = DynamicCache(config=model.config), 0
        for end in range(width - steps + 1, width + 1):
            place = slice(start, end)
            logits = model(
                input_ids=ids[:, place], attention_mask=mask[:, :end], position_ids=positions[:, place],
                past_key_values=cache, use_cache=True,
            ).logits[:, -1]  # fmt: skip
            for row, found in zip(expected, logits):
                torch.testing.assert_close(found, row[len(row) - 1 - (width - end)], **CLOSE)
            start = end


def test_generation_by_transformers_is_the_same(make_model, examples):
    model, ids = make_model("mistral"), torch.tensor([examples[3].prompt_ids])
    options = {"do_sample": False, "max_new_tokens": 20, "eos_token_id": None, "pad_token_id": 0}
    expected = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    assert use_tree_attention(model)
    assert torch.equal(model.generate(ids, attention_mask=torch.ones_like(ids), **options), expected)


def test_it_can_be_undone_and_done_again(make_model):
    model = make_model("llama")
    for _ in range(2):
        assert use_tree_attention(model) and use_tree_attention(model)
        assert model.config._attn_implementation == model.model.config._attn_implementation == NAME
        use_sdpa(model)
        assert model.config._attn_implementation == model.model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_what_was_asked_for_is_left_alone(make_model, name):
    model = make_model(name, attn_implementation="eager")
    assert not use_tree_attention(model)
    use_sdpa(model)
    assert model.config._attn_implementation == "eager"


def test_dropped_attention_is_read_in_trees(make_model, examples):
    """Trees know no dropout, so that a model which trains with it is not told of them."""
    model = make_model("gpt2", attn_pdrop=0.1)
    reader = inspect_model(model)
    assert reader.layout == "trees" and model.config._attn_implementation == "sdpa"
    policy = Policy(model, reader).train()
    batch = pack(examples, layout=reader.layout, flat_from=0)
    assert not torch.equal(policy(batch).logprobs, policy(batch).logprobs)
    assert inspect_model(make_model("gpt2", resid_pdrop=0.1)).layout == "flat"


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_model_that_was_not_told_cannot_read_a_flat_batch(make_model, examples, implementation):
    model = make_model("llama", attn_implementation=implementation)
    with pytest.raises(RuntimeError, match="size"):
        completion_logprobs(model, FLAT, pack(examples, layout="flat", flat_from=0))


@pytest.mark.parametrize("option", [{"softcap": 5.0}, {"s_aux": torch.ones(1)}, {"dropout": 0.1}])
def test_what_an_architecture_adds_to_its_scores_is_refused(make_model, examples, option):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    use_tree_attention(make_model("llama"))
    mask = tree_mask(pack(examples[:1], layout="flat", flat_from=0))
    states = torch.zeros(1, 2, 21, 4)
    function = ALL_ATTENTION_FUNCTIONS[NAME]
    assert function(None, states, states, states, mask)[0].shape == (1, 21, 2, 4)
    with pytest.raises(ValueError, match=f"tree attention does not support {next(iter(option))}"):
        function(None, states, states, states, mask, **option)


@pytest.mark.parametrize("window", [1, 3, 15, 16, 17, 18, None])
def test_a_window_limits_what_is_seen_up_to_the_longest_sequence(examples, window):
    batch = pack(examples, layout="flat", flat_from=0)
    assert batch.position_ids.max() == 16
    plan = tree_mask(batch, window, torch.bfloat16).plan
    assert all(block.bias.dtype == torch.float32 for block in plan)
    seen = sum(int((block.bias == 0).sum()) for block in plan)
    assert seen == (batch.position_ids + 1).clamp_max(window or 100).sum()


def test_scores_are_scaled_as_the_model_says(make_model, examples):
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    use_tree_attention(make_model("llama"))
    mask = tree_mask(pack(examples[1:2], layout="flat", flat_from=0))
    states, values = torch.zeros(1, 1, 4, 4), torch.tensor([[[[0.0], [0.0], [0.0], [1.0]]]])
    states[..., -1, :] = 1.0  # the last query and key: a score of 4 before the scale, 0 with the others
    for scaling, scale in ((None, 0.5), (0.25, 0.25)):
        found = ALL_ATTENTION_FUNCTIONS[NAME](None, states, states, values, mask, scaling=scaling)[0]
        odds = torch.tensor(4 * scale).exp().item()
        assert found.flatten().tolist() == pytest.approx([0, 0, 0, odds / (3 + odds)], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(make_model, examples, dtype):
    model = make_model("llama", dtype=dtype)
    assert inspect_model(model) == FLAT
    with torch.no_grad():
        found, expected = (
            completion_logprobs(model, Reader(layout), pack(examples, layout=layout, flat_from=0))[0]
            for layout in ("flat", "rows")
        )
    assert (found - expected).abs().max() < 2e-2 * expected.abs().max()


def test_autocast(make_model, examples):
    model = make_model("llama")
    assert use_tree_attention(model)
    found = []
    for reader in (FLAT, ROWS):
        with torch.autocast("cpu", torch.bfloat16):
            found.append(gradients(model, reader, examples))
    assert (found[0] - found[1]).abs().max() < 5e-2 * found[1].abs().max()
