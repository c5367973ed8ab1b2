"""A language model behind an OpenAI-compatible endpoint: requests, repetitions, and a cache on disk."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from hashlib import sha256
from http.client import HTTPException
from pathlib import Path
from typing import Any

from rlhf_pipeline.config.rewards import LlmJudge
from rlhf_pipeline.disk.sealed import seal, unseal
from rlhf_pipeline.disk.storage import replace_text
from rlhf_pipeline.errors import ConfigError, Fault, RunFailed

PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
"""Statuses after which the same request may succeed."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to another server."""

    def redirect_request(self, *_: Any) -> None:
        return None


@dataclass
class ChatModel:
    """Asks a model; an answer is kept in `cache` under the digest of its request, without the key.

    wait: pauses for some seconds. asked, known: answers of the server and of the cache so far.
    """

    config: LlmJudge
    cache: Path
    key: str | None = None
    wait: Callable[[float], None] = time.sleep
    asked: int = 0
    known: int = 0
    _opener: urllib.request.OpenerDirector = field(
        default_factory=lambda: urllib.request.build_opener(_NoRedirect), repr=False
    )

    def probe(self) -> None:
        """Ask for one word, so that an endpoint that does not answer is found before any work.

        Raises:
            RunFailed: it does not answer.
        """
        self.ask(["Answer with the word ready."])

    @classmethod
    def of(cls, config: LlmJudge, home: Path) -> ChatModel:
        """The model of a config, with the key from its environment variable.

        Raises:
            ConfigError: the environment variable is not set, or holds more than a key.
        """
        key = os.environ.get(config.api_key_env, "").strip() if config.api_key_env else None  # a file's line has an end
        if config.api_key_env and not key:
            found = f"the environment variable {config.api_key_env!r} is not set"
            raise ConfigError(Fault("api_key_env", found, "a variable with the key of the endpoint"))
        if key and not (key.isascii() and key.isprintable()):
            found = f"the environment variable {config.api_key_env!r} holds characters that no key has"
            raise ConfigError(Fault("api_key_env", found, "the key alone: one line of ASCII characters"))
        return cls(config, home / "cache" / "llm", key)

    def ask(self, texts: Sequence[str]) -> list[str]:
        """The answer to each text, as one user's message each; equal texts are asked once.

        Raises:
            RunFailed: the endpoint refuses a request, or does not answer after all repetitions.
        """
        wanted = list(dict.fromkeys(texts))
        with ThreadPoolExecutor(max_workers=self.config.concurrency) as pool:
            found = dict(zip(wanted, pool.map(self._answer, wanted), strict=True))
        known = sum(kept for _, kept in found.values())
        self.known, self.asked = self.known + known, self.asked + len(found) - known
        return [found[text][0] for text in texts]

    def _answer(self, text: str) -> tuple[str, bool]:
        """The answer to a text, and whether the cache had it."""
        parameters = self.config.parameters
        body = {"model": self.config.model, "messages": [{"role": "user", "content": text}], **parameters}
        request = json.dumps(body, ensure_ascii=True, sort_keys=True)
        digest = sha256(f"{self.config.endpoint} {request}".encode()).hexdigest()
        path = self.cache / digest[:2] / f"{digest}.json"
        if (kept := _read(path)) is not None:
            return kept, True
        answer = self._request(request.encode())
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_text(path, seal({"answer": answer}))
        return answer, False

    def _request(self, body: bytes) -> str:
        config, failure = self.config, ""
        for attempt in range(config.retries + 1):
            if attempt:
                self.wait(config.retry_seconds * 2 ** (attempt - 1))
            try:
                return self._post(body)
            except urllib.error.HTTPError as error:
                with error:
                    said = error.read(500).decode(errors="replace").strip().splitlines()
                failure = f"status {error.code}" + (f" ({said[0][:200]})" if said else "")
                if error.code not in PASSING:
                    break
            except (OSError, HTTPException) as error:  # unreachable, cut off, too slow
                failure = str(getattr(error, "reason", None) or error) or type(error).__name__
            except (ValueError, LookupError, TypeError, RecursionError) as error:  # another format, or no text in it
                failure = f"no answer in the format of chat completions ({type(error).__name__}: {error})"
                break
        key = "" if self.key is None else f", key from {config.api_key_env}"
        raise RunFailed(
            f"{config.endpoint}: model {config.model!r}{key}: {self._hidden(failure)} after {attempt + 1} of "
            f"{config.retries + 1} attempts; expected an OpenAI-compatible server; answers so far are kept in the cache"
        )

    def _post(self, body: bytes) -> str:
        headers = {"Content-Type": "application/json"}
        if self.key is not None:
            headers["Authorization"] = f"Bearer {self.key}"
        request = urllib.request.Request(f"{self.config.endpoint}/chat/completions", body, headers)
        with self._opener.open(request, timeout=self.config.timeout_seconds) as response:
            answer = json.loads(response.read())["choices"][0]["message"]["content"]
        if answer is None:  # refused, or no token was left after the reasoning: an answer without a verdict
            return ""
        if not isinstance(answer, str):
            raise TypeError(f"content is {type(answer).__name__}")
        return answer.encode(errors="replace").decode()  # half of a surrogate pair can be neither stored nor shown

    def _hidden(self, text: str) -> str:
        """The text without the key, which a server may repeat in an error."""
        return text.replace(self.key, "***") if self.key else text


def _read(path: Path) -> str | None:
    """The answer in a file of the cache; None if it is missing or damaged, so that it is asked for again."""
    try:
        answer = unseal(path.read_text(encoding="utf-8")).get("answer")
    except (OSError, ValueError):
        return None
    return answer if isinstance(answer, str) else None
