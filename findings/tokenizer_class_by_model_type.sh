#!/usr/bin/env bash
# transformers 5.23.0: a tokenizer saved beside a Qwen2 config is loaded as another tokenizer, with other ids, in silence.
#
# `save_pretrained` writes tokenizer.json and the class of the tokenizer ("TokenizersBackend") into tokenizer_config.json.
# `AutoTokenizer.from_pretrained` follows that class for most model types. For some (qwen2 among them), whose folders on the
# hub name a wrong class, it always takes the class registered for the model type. That class takes the vocabulary from
# tokenizer.json, but brings its own model, normaliser and pre-tokenizer. A word-level tokenizer then gives no ids at all.
#
# What one would expect: the ids that the tokenizer gave before it was saved, or a warning. Where the saved class is the general
# one, `PreTrainedTokenizerFast.from_pretrained` reads tokenizer.json as it is.
#
# Output seen:
#   before it was saved:              [1, 2, 3]
#   AutoTokenizer beside llama:       TokenizersBackend [1, 2, 3]
#   AutoTokenizer beside qwen2:       Qwen2Tokenizer []
#   PreTrainedTokenizerFast, qwen2:   TokenizersBackend [1, 2, 3]
#
# Exit code 0: the behaviour is as described. Another one: it has changed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/env"
"$folder/env/bin/python" -m pip install --quiet --disable-pip-version-check transformers==5.23.0
cd "$folder"
"$folder/env/bin/python" - <<'PY'
import json
import tempfile
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

core = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "plot": 2, "was": 3}, unk_token="<eos>"))
core.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")
folder, text = Path(tempfile.mkdtemp()), "the plot was"
tokenizer.save_pretrained(folder)
seen = {"before": tokenizer(text).input_ids}
print("before it was saved:             ", seen["before"])
for model_type in ("llama", "qwen2"):
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    loaded = AutoTokenizer.from_pretrained(folder)
    seen[model_type] = loaded(text).input_ids
    print(f"AutoTokenizer beside {model_type}:      ", type(loaded).__name__, seen[model_type])
general = PreTrainedTokenizerFast.from_pretrained(folder)
seen["general"] = general(text).input_ids
print("PreTrainedTokenizerFast, qwen2:  ", type(general).__name__, seen["general"])
assert seen["before"] == seen["llama"] == seen["general"] == [1, 2, 3], f"changed: {seen}"
assert seen["qwen2"] == [], f"changed: {seen['qwen2']}"
PY
echo "as described"
