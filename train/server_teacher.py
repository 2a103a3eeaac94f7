"""A teacher behind an OpenAI-compatible server: its best tokens and their log-probabilities at each
place of a text that it is given (/v1/completions with echo and logprobs).

A row's documents are asked about one by one, since a server's prompt is one document. What the
server names by a text that several tokens have, or none, is left to the tail.

B rows, L length, J teacher tokens kept.
"""

import hashlib
import json
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from jax.sharding import Mesh
from tokenizers import Tokenizer

from checkpoint.provenance import ModelOrigin
from configs.base import RunConfig
from configs.checks import UserError, require
from train.divergences import TAIL_FLOOR
from train.loop import to_devices
from train.teachers import Batch, View

TRIES, SECONDS = 4, 120.0
"""Requests before a server is given up, and how long each may take."""
AT_ONCE = 8
TOKEN_ID = "token_id:"
"""Before a token's number, where a server is asked to name tokens so (vLLM does)."""


class ServerTeacher:
    """A model of a server, by its address: http://host:port/v1, or with #MODEL behind it."""

    def __init__(
        self, address: str, tokenizer: Tokenizer, vocab_size: int, api_key: str | None = None
    ) -> None:
        """
        Args:
          tokenizer: the student's, which the server's model must have, too.
        Raises:
          UserError: nobody answers, or the answers have no log-probabilities of a prompt.
        """
        url, _, model = address.partition("#")
        self.url, self._key = url.rstrip("/"), api_key
        self.model = model or self._only_model()
        self._ids_by_text = _ids_by_text(tokenizer, vocab_size)
        self._vocab_size = vocab_size
        self._options: dict[str, Any] = {}
        self._probe(tokenizer)

    @property
    def origin(self) -> ModelOrigin:
        """By name: the weights behind a server can't be seen."""
        name = f"{self.url}#{self.model}"
        return ModelOrigin(name=name, weights=hashlib.sha256(name.encode()).hexdigest())

    def best_tokens(
        self, prompts: Sequence[Sequence[int]], top_k: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each prompt of n tokens, the ids, int32 [n, J], -1 where fewer are known, and the
        log-probabilities, float32 [n, J], of the next token after each of its own."""
        body = {"prompt": [list(map(int, p)) for p in prompts], "logprobs": top_k, **self._options}
        body |= {"model": self.model, "echo": True, "max_tokens": 1, "temperature": 0}
        choices = self._post("/completions", body).get("choices", [])
        choices = sorted(choices, key=lambda choice: choice.get("index", 0))
        require(
            len(choices) == len(prompts),
            f"{self.url} gave {len(choices)} answers to {len(prompts)} prompts: it must take lists "
            "of token ids",
        )
        pairs = zip(choices, prompts, strict=True)
        return [self._read(choice, len(prompt), top_k) for choice, prompt in pairs]

    def _read(
        self, choice: dict[str, Any], length: int, top_k: int
    ) -> tuple[np.ndarray, np.ndarray]:
        top = (choice.get("logprobs") or {}).get("top_logprobs") or []
        require(
            len(top) >= length + 1,
            f"{self.url} gave log-probabilities of {len(top)} tokens for a prompt of {length} and "
            "one more: it must support echo with logprobs",
        )
        ids_NJ = np.full((length, top_k), -1, np.int32)
        logs_NJ = np.zeros((length, top_k), np.float32)
        for place, named in enumerate(top[1 : length + 1]):
            pairs = [(self._id_of(text), value) for text, value in (named or {}).items()]
            known = [(token, value) for token, value in pairs if token is not None]
            known.sort(key=lambda pair: -pair[1])
            for j, (token, value) in enumerate(known[:top_k]):
                ids_NJ[place, j], logs_NJ[place, j] = token, value
        return ids_NJ, logs_NJ

    def _id_of(self, text: str) -> int | None:
        if text.startswith(TOKEN_ID) and text.removeprefix(TOKEN_ID).isdigit():
            token = int(text.removeprefix(TOKEN_ID))
            return token if token < self._vocab_size else None
        return self._ids_by_text.get(text)

    def _only_model(self) -> str:
        names = [x.get("id") for x in self._get("/models").get("data", [])]
        require(
            len(names) == 1,
            f"{self.url} serves {', '.join(map(str, names)) or 'no model'}: name one as "
            f"{self.url}#MODEL",
        )
        return str(names[0])

    def _probe(self, tokenizer: Tokenizer) -> None:
        """Asks for tokens by number, where the server can say them so, and compares what it calls
        the tokens of a short text with what the tokenizer does."""
        ids = tokenizer.encode("def parse(x):\n    return x + 1").ids
        body = {"model": self.model, "prompt": [ids], "logprobs": 1, "echo": True}
        body |= {"max_tokens": 1, "temperature": 0}
        try:
            answer = self._post("/completions", {**body, "return_tokens_as_token_ids": True}, 1)
            self._options = {"return_tokens_as_token_ids": True}
        except UserError:
            answer = self._post("/completions", body)
        choices = answer.get("choices") or [{}]
        said = ((choices[0].get("logprobs") or {}).get("tokens") or [])[: len(ids)]
        expected = [tokenizer.decode([i], skip_special_tokens=False) for i in ids]
        same = [
            self._id_of(text) == i or text == own
            for text, i, own in zip(said, ids, expected, strict=False)
        ]
        require(
            len(said) == len(ids) and all(same),
            f"{self.url} calls the tokens {expected} {said}: it must number tokens as the student "
            "does, and answer with echo and logprobs",
        )

    def _get(self, path: str) -> dict[str, Any]:
        return self._request(urllib.request.Request(self.url + path, headers=self._headers()))

    def _post(self, path: str, body: dict[str, Any], tries: int = TRIES) -> dict[str, Any]:
        data = json.dumps(body).encode()
        made = urllib.request.Request(self.url + path, data=data, headers=self._headers())
        return self._request(made, tries)

    def _headers(self) -> dict[str, str]:
        key = {"Authorization": f"Bearer {self._key}"} if self._key else {}
        return {"Content-Type": "application/json", **key}

    def _request(self, made: urllib.request.Request, tries: int = TRIES) -> dict[str, Any]:
        """
        Raises:
          UserError: no answer after so many tries, a refusal, or no JSON.
        """
        reason = ""
        for attempt in range(tries):
            try:
                with urllib.request.urlopen(made, timeout=SECONDS) as answer:
                    return json.load(answer)
            except urllib.error.HTTPError as error:
                reason = f"{error.code} {error.read(300).decode(errors='replace')}"
                if error.code < 500 and error.code != 429:
                    break
            except (urllib.error.URLError, OSError) as error:
                reason = str(error)
            except ValueError as error:
                reason = f"no JSON ({error})"
                break
            if attempt + 1 < tries:
                time.sleep(2.0**attempt)
        raise UserError(f"the teacher's server {made.full_url} can't be used: {reason}")


def _ids_by_text(tokenizer: Tokenizer, vocab_size: int) -> dict[str, int]:
    """Tokens by their text, of texts that a single token has."""
    found: dict[str, int | None] = {}
    for i in range(min(tokenizer.get_vocab_size(), vocab_size)):
        text = tokenizer.decode([i], skip_special_tokens=False)
        found[text] = None if text in found else i
    return {text: i for text, i in found.items() if i is not None and text}


def documents(positions_L: np.ndarray) -> list[slice]:
    """The places of each document of a row, padding left out."""
    is_start_L = np.diff(positions_L, prepend=positions_L[0] - 2) != 1
    starts = np.flatnonzero(is_start_L & (positions_L >= 0))
    ends = [np.flatnonzero(is_start_L | (positions_L < 0)), [len(positions_L)]]
    every = np.concatenate(ends)
    return [slice(int(s), int(every[np.searchsorted(every, s, side="right")])) for s in starts]


def server_view(run: RunConfig, teacher: ServerTeacher, mesh: Mesh) -> View:
    """Adds what the server says of a batch's rows: "teacher_ids", "teacher_log_probs" and
    "teacher_tail".

    Raises:
      UserError: a run without distill.top_k, or with a temperature that no server knows.
    """
    config = run.distill
    if config is None or config.top_k is None or config.temperature != 1:
        raise UserError(
            "a teacher behind a server tells its best tokens as they are: set distill.top_k, and "
            "leave distill.temperature at 1"
        )
    require(
        not config.matching,
        "distill.losses compare layers, which no server shows: leave them out",
    )
    top_k = config.top_k

    def view(batch: Batch) -> Batch:
        tokens_BL, positions_BL = np.asarray(batch["tokens"]), np.asarray(batch["positions"])
        shape = (*tokens_BL.shape, top_k)
        ids_BLJ, logs_BLJ = np.full(shape, -1, np.int32), np.zeros(shape, np.float32)

        def ask(row: int) -> None:
            places = documents(positions_BL[row])
            answers = teacher.best_tokens([tokens_BL[row, own].tolist() for own in places], top_k)
            for own, (ids, logs) in zip(places, answers, strict=True):
                ids_BLJ[row, own], logs_BLJ[row, own] = ids, logs

        with ThreadPoolExecutor(AT_ONCE) as pool:
            list(pool.map(ask, range(len(tokens_BL))))
        kept_BL = np.where(ids_BLJ >= 0, np.exp(logs_BLJ), 0).sum(axis=-1)
        tail_BL = np.log(np.maximum(1 - kept_BL, TAIL_FLOOR)).astype(np.float32)
        seen = {"teacher_ids": ids_BLJ, "teacher_log_probs": logs_BLJ, "teacher_tail": tail_BL}
        return {**batch, **to_devices(seen, mesh)}

    return view
