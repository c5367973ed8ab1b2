#!/usr/bin/env bash
# argilla 2.8.0: an exported ranking does not say who was ranked first, nor an exported answer whether it was submitted.
#
# Argilla's server keeps a ranking answer as a list of {value, rank}, in the order of the question's options; equal ranks
# are ties. When the client makes a record of it (`dataset.records`), it keeps the values and drops the ranks. So
# `to_list`, `to_json`, `to_disk`, `to_datasets` and `to_hub` write the same list for a > b > c, for c > b > a and for a
# three-way tie. `to_json` and `to_disk` drop the status, too: a discarded answer looks like a submitted one. Written back
# (`from_disk`), all are drafts without ranks.
#
# What one would expect: the ranks, or a list with the best first; the status; or a warning.
# What helps: the server's own answer (GET /api/v1/datasets/ID/records?include=responses), or argilla 1.x, which keeps
# both. In a file that is written by hand, {value, rank} and a status pass `from_disk` unchanged.
#
# Output seen:
#   a > b > c, submitted: [{'value': ['a', 'b', 'c']}]
#   c > b > a, submitted: [{'value': ['a', 'b', 'c']}]
#   all tied, discarded:  [{'value': ['a', 'b', 'c']}]
#   written back:         draft [{'value': 'a'}, {'value': 'b'}, {'value': 'c'}]
#   by hand:              submitted [{'value': 'a', 'rank': 3}, {'value': 'b', 'rank': 2}, {'value': 'c', 'rank': 1}]
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check argilla==2.8.0 requests  # which it imports
cd "$folder"
"$folder/env/bin/python" - <<'PY'
from types import SimpleNamespace
from unittest.mock import MagicMock
from uuid import UUID

import argilla as rg
from argilla._models import RecordModel

USER = UUID(int=1)
question = rg.RankingQuestion(name="ranking", values=["a", "b", "c"], client=MagicMock())
settings = SimpleNamespace(questions={"ranking": question}, schema={"prompt": SimpleNamespace(type="text")})
dataset = SimpleNamespace(settings=settings, _client=None)


def exported(ranks, status):
    """The answers of a record, as the server sends it, in what the client exports."""
    value = [{"value": name, "rank": rank} for name, rank in ranks.items()]
    answer = {"values": {"ranking": {"value": value}}, "status": status, "user_id": USER}
    sent = RecordModel(id=UUID(int=2), fields={"prompt": "p"}, metadata=[], vectors=[], responses=[answer], suggestions=[])
    answers = rg.Record.from_model(sent, dataset=dataset).to_dict()["responses"]["ranking"]
    return [{key: value for key, value in one.items() if key != "user_id"} for one in answers]


def written_back(answer):
    """The answer that goes to the server from a file with this one."""
    answer = {**answer, "user_id": str(USER)}
    record = rg.Record.from_dict({"id": "x", "fields": {"prompt": "p"}, "responses": {"ranking": [answer]}})
    record.dataset = dataset
    (sent,) = record.responses.api_models()
    return sent.status.value, sent.values["ranking"]["value"]


first = exported({"a": 1, "b": 2, "c": 3}, "submitted")
second = exported({"a": 3, "b": 2, "c": 1}, "submitted")
tied = exported({"a": 1, "b": 1, "c": 1}, "discarded")
back = written_back(first[0])
ranked = [{"value": name, "rank": rank} for name, rank in {"a": 3, "b": 2, "c": 1}.items()]
by_hand = written_back({"value": ranked, "status": "submitted"})
print("a > b > c, submitted:", first)
print("c > b > a, submitted:", second)
print("all tied, discarded: ", tied)
print("written back:        ", *back)
print("by hand:             ", *by_hand)
assert first == second == tied == [{"value": ["a", "b", "c"]}], "changed"
assert back == ("draft", [{"value": name} for name in "abc"]) and by_hand == ("submitted", ranked), "changed"
PY
echo "as described"
