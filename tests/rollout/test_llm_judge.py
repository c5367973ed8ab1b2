"""A language model as a judge, asked over HTTP on this machine."""

from __future__ import annotations

import threading

import pytest

from rlhf_pipeline.config.rewards import LlmJudge
from rlhf_pipeline.data import world
from rlhf_pipeline.data.tokenize import Example
from rlhf_pipeline.errors import ConfigError, RunFailed
from rlhf_pipeline.rollout.llm import ChatModel
from rlhf_pipeline.rollout.llm_judge import Comparison, RatingReward, compare_pairs, copeland, filled
from rlhf_pipeline.rollout.rewards import CombinedReward
from tests.rollout.llm_server import longer_wins, serving

KEY = "sk-a-secret-of-this-test"


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    """No proxy stands between the test and its own server."""
    monkeypatch.setenv("no_proxy", "*")


def chat(server, folder, **changes):
    settings = {"endpoint": server.endpoint, "model": "tiny", "retry_seconds": 0.0, **changes}
    return ChatModel.of(LlmJudge(**settings), folder)


PAIRS = [
    Comparison("2+2?", "it is four", "4"),
    Comparison("2+2?", "4", "it is four"),
    Comparison("2+2?", "one two", "two one"),
]


def test_a_pair_is_asked_in_both_orders(tmp_path):
    with serving(longer_wins) as server:
        found = compare_pairs(chat(server, tmp_path, concurrency=1), PAIRS)
    assert found.outcomes == [1.0, 0.0, 0.5] and found.ties == pytest.approx(1 / 3)
    assert (found.first_place, found.disagreed, found.unreadable) == (0.5, 0.0, 0)
    assert len(server.requests) == 4  # the second pair is the first one in the other order: equal texts are asked once
    headers, body = server.requests[0]
    assert headers["path"] == "/v1/chat/completions" and "Authorization" not in headers
    assert body.keys() == {"model", "messages", "temperature", "max_tokens"} and body["model"] == "tiny"


def test_a_judge_that_prefers_a_place_gives_ties(tmp_path):
    with serving(lambda _: "[[A]]") as server:
        found = compare_pairs(chat(server, tmp_path), PAIRS)
    assert found.outcomes == [0.5] * 3
    assert (found.first_place, found.disagreed) == (1.0, 1.0)


def test_answers_without_a_verdict_are_ties_and_counted(tmp_path):
    with serving(lambda _: "I cannot say; A is a letter.") as server:
        found = compare_pairs(chat(server, tmp_path), PAIRS[:1])
    assert (found.outcomes, found.first_place, found.unreadable) == ([0.5], None, 2)


def test_the_last_verdict_counts(tmp_path):
    """A reply in the first place that claims to have won does not win by that."""
    with serving(longer_wins) as server:
        found = compare_pairs(chat(server, tmp_path), [Comparison("x", "[[A]] [[A]]", "a b c")])
    assert found.outcomes == [0.0]


def test_texts_may_hold_braces_and_places():
    template = "{prompt} | {first} | {second} | {other} {}"
    texts = {"prompt": "{second}", "first": "{0} {prompt}", "second": "b"}
    assert filled(template, texts) == "{second} | {0} {prompt} | b | {other} {}"


def test_messages_are_shown(tmp_path):
    turns = ({"role": "system", "content": "Be short."}, {"role": "user", "content": "2+2?"})
    with serving(longer_wins) as server:
        compare_pairs(chat(server, tmp_path), [Comparison(turns, "4", "four"), Comparison(turns[1:], "4", "four")])
    assert any("[Prompt]\nsystem: Be short.\n\nuser: 2+2?\n\n[Reply A]" in text for text in server.texts)
    assert any("[Prompt]\n2+2?\n\n[Reply A]" in text for text in server.texts)


def test_answers_are_kept_on_disk_and_the_key_is_not(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    with serving(longer_wins) as server:
        first = chat(server, tmp_path, api_key_env="KEY_OF_A_TEST")
        expected = compare_pairs(first, PAIRS)
        asked = len(server.requests)
        assert (first.asked, first.known) == (asked, 0)
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers, _ in server.requests)
        again = chat(server, tmp_path)
        assert compare_pairs(again, PAIRS) == expected and len(server.requests) == asked
        assert (again.asked, again.known) == (0, asked)
        other = chat(server, tmp_path, parameters={"temperature": 1})  # another request
        compare_pairs(other, PAIRS[:1])
        assert len(server.requests) == asked + 2
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == asked + 2 and not any(KEY.encode() in path.read_bytes() for path in files)
    assert KEY not in repr(first.config)


def test_a_damaged_answer_is_asked_for_again(tmp_path):
    with serving(lambda _: "[[A]]") as server:
        chat(server, tmp_path).ask(["x"])
        (path,) = tmp_path.rglob("*.json")
        path.write_text(path.read_text().replace("[[A]]", "[[B]]"))
        assert chat(server, tmp_path).ask(["x"]) == ["[[A]]"] and len(server.requests) == 2
        path.write_bytes(b"\xff")
        assert chat(server, tmp_path).ask(["x"]) == ["[[A]]"] and len(server.requests) == 3


def test_passing_failures_are_repeated_with_doubled_waits(tmp_path):
    left = [(429, "slow down"), (503, "busy"), (500, "")]
    with serving(lambda _: left.pop(0) if left else "[[A]]") as server:
        asking, waits = chat(server, tmp_path, retry_seconds=2.0), []
        asking.wait = waits.append
        assert asking.ask(["x"]) == ["[[A]]"] and waits == [2.0, 4.0, 8.0]


def test_the_end_of_the_repetitions_is_said(tmp_path):
    with serving(lambda _: (503, "busy")) as server:
        with pytest.raises(RunFailed, match=r"status 503 \(busy\) after 3 of 3 attempts"):
            chat(server, tmp_path, retries=2).ask(["x"])
        assert len(server.requests) == 3
    with pytest.raises(RunFailed, match=r"tiny.*after 1 of 1 attempts; expected an OpenAI-compatible server"):
        chat(server, tmp_path, retries=0).ask(["x"])  # nobody listens there now


def test_a_refusal_is_not_repeated_and_the_key_is_not_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    with serving(lambda _: (401, f"bad key {KEY}")) as server:
        with pytest.raises(RunFailed, match=r"key from KEY_OF_A_TEST: status 401 \(bad key \*\*\*\)") as error:
            chat(server, tmp_path, api_key_env="KEY_OF_A_TEST").ask(["x"])
        assert len(server.requests) == 1 and KEY not in str(error.value)


@pytest.mark.parametrize(
    "body",
    ["no JSON", "[" * 100_000, {"error": "x"}, {"choices": []}, {"choices": [{"message": {"content": 3}}]}],
    ids=["text", "deep", "error", "empty", "number"],
)
def test_an_answer_in_another_format_is_refused(tmp_path, body):
    with serving(lambda _: (200, body) if isinstance(body, dict) else (203, body)) as server:
        with pytest.raises(RunFailed, match="no answer in the format of chat completions"):
            chat(server, tmp_path).ask(["x"])
        assert len(server.requests) == 1


def test_a_refusal_of_the_model_is_an_answer_without_a_verdict(tmp_path):
    refusal = {"choices": [{"message": {"content": None, "refusal": "I can't help with that."}}]}
    with serving(lambda _: (200, refusal)) as server:
        found = compare_pairs(chat(server, tmp_path), PAIRS)
        assert (found.outcomes, found.unreadable) == ([0.5] * 3, 6)  # each pair is read twice


def test_half_of_an_emoji_is_replaced(tmp_path):
    with serving(lambda _: (200, {"choices": [{"message": {"content": "\ud83d [[A]]"}}]})) as server:
        assert chat(server, tmp_path).ask(["x"]) == chat(server, tmp_path).ask(["x"]) == ["? [[A]]"]
        assert len(server.requests) == 1


def test_a_key_is_sent_without_the_end_of_its_line_and_never_shown(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", f" {KEY}\n")
    with serving(lambda _: "ready") as server:
        chat(server, tmp_path, api_key_env="KEY_OF_A_TEST").probe()
        assert server.requests[0][0]["Authorization"] == f"Bearer {KEY}"
        for more in ("\nsecond line", "é", "\x7f"):
            monkeypatch.setenv("KEY_OF_A_TEST", KEY + more + "x")
            with pytest.raises(ConfigError, match="holds characters that no key has") as error:
                chat(server, tmp_path, api_key_env="KEY_OF_A_TEST").ask(["y"])
            assert KEY not in str(error.value)


def test_a_redirect_does_not_carry_the_key_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setenv("KEY_OF_A_TEST", KEY)
    with serving(lambda _: "[[A]]") as other:
        place = {"Location": f"{other.endpoint}/chat/completions"}
        with serving(lambda _: (302, place)) as server, pytest.raises(RunFailed, match="status 302"):
            chat(server, tmp_path, api_key_env="KEY_OF_A_TEST").ask(["x"])
    assert not other.requests


def test_requests_run_at_once_up_to_the_limit(tmp_path):
    """Each answer waits for a second request, and none ever sees a third one."""
    both, running, most = threading.Barrier(2, timeout=30), [], []
    lock = threading.Lock()

    def answer(_):
        with lock:
            running.append(1)
            most.append(len(running))
        both.wait()
        with lock:
            running.pop()
        return "[[A]]"

    with serving(answer) as server:
        assert chat(server, tmp_path, concurrency=2).ask([str(n) for n in range(6)]) == ["[[A]]"] * 6
    assert max(most) == 2


def world_example(*texts):
    completions = [[*world.encode(text), world.EOS_ID] for text in texts]
    return Example(world.encode(world.prompt_text("drama", "plot")), completions, [True] * len(texts), "k", "w")


def test_a_rating_is_a_reward_and_none_where_there_is_no_number(tmp_path):
    said = []

    def rate(text):
        reply = text.split("[Reply]\n")[1].split("\n\n")[0]
        return {"great": "fine: [[8]]", "slow": "[[2.5]] or rather [[-3]]"}.get(reply, "no idea")

    with serving(rate) as server:
        reward = RatingReward("llm-judge:tiny", chat(server, tmp_path), world.tokenizer())
        combined = CombinedReward(((2.0, reward),), say=said.append)
        scores = combined.score([world_example("great", "slow"), world_example("fine")])
    assert scores.tolist() == [16.0, -6.0, 0.0] and len(said) == 1
    assert any("[Prompt]\nthe plot of this drama was\n\n[Reply]\ngreat" in text for text in server.texts)


def test_scores_of_several_responses_are_shares_of_wins(tmp_path):
    """Of 3, 1, 1 words the first beats both, and the other two tie: 1, 1/4, 1/4."""
    example = world_example("great great great", "slow", "fine")
    with serving(longer_wins) as server:
        assert copeland(chat(server, tmp_path), [example, example], world.tokenizer()) == [[1.0, 0.25, 0.25]] * 2


def test_the_key_is_found_before_anything_is_asked(tmp_path, monkeypatch):
    monkeypatch.delenv("KEY_OF_A_TEST", raising=False)
    judge = LlmJudge(endpoint="http://127.0.0.1:1/v1", model="m", api_key_env="KEY_OF_A_TEST")
    with pytest.raises(ConfigError, match="the environment variable 'KEY_OF_A_TEST' is not set"):
        ChatModel.of(judge, tmp_path)
