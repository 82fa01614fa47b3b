"""A teacher behind an OpenAI-compatible completions server: the log-probabilities of prompts that are the documents.

It works during training, a request for each document of each batch, and as the source of a cache, which asks once.
vLLM's form and the classic one are understood (`hf_xent.teachers.protocols`); the server has to have the student's
vocabulary, since prompts are sent as token ids. Nothing is said about what follows a document's last token.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from ..losses.targets import TAILS, TopK
from ..options.ranges import check_count
from .assembling import assembled
from .documents import Document, documents_of
from .forms import LARGEST_K, remaining
from .protocols import PROTOCOLS, answered, candidates, request, words_of
from .server import Refused, Server, Unusable

NOT_UNDERSTOOD = (400, 422)
"""The statuses of a request that has a field that the server does not take."""


class ServedTeacher:
    """The k most probable tokens at each position, from a server.

    Args:
        url: Its address, as 'http://localhost:8000/v1'; '/v1' is added to one without a path.
        model: The name of its model; None for the only one that it has.
        k: How many tokens to ask for, 1 to 1024; vLLM gives up to its option `--max-logprobs`.
        tokenizer: The tokenizer of both models, for servers that answer with the texts of tokens.
        tail: What is assumed about all other tokens, a name of `hf_xent.losses.targets.TAILS`.
        concurrency: How many requests are made at a time.
        **connection: `api_key` (by default that of the environment variable OPENAI_API_KEY), `retries`, `backoff` and
            `timeout` of `hf_xent.teachers.server.Server`.

    Raises:
        ValueError: An option is out of its range.
        RuntimeError: `model` is None and the server cannot be asked, or has several.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        k: int = 64,
        tokenizer: Any = None,
        tail: str = "class",
        concurrency: int = 4,
        **connection: Any,
    ):
        for name, value in (("k", k), ("concurrency", concurrency)):
            check_count(name, value, 1)
        if k > LARGEST_K:
            raise ValueError(f"k is {k}: choose a whole number from 1 to {LARGEST_K}")
        if tail not in TAILS:
            raise ValueError(f"tail is {tail!r}: choose {', '.join(TAILS)}")
        connection.setdefault("api_key", os.environ.get("OPENAI_API_KEY"))
        self.server = Server(_base(url), **connection)
        self.k, self.tail, self.concurrency, self.tokenizer = k, tail, concurrency, tokenizer
        self.model = self.server.ask("/models", None, self._only) if model is None else model
        self.protocol: str | None = None  # the first one that the server understands
        self._words: Any = None

    @property
    def name(self) -> str:
        """The model's name; its server may have another address when a cache is continued."""
        return self.model

    def targets(self, batch: Mapping[str, Any]) -> TopK:
        """The k most probable tokens behind each token of the batch's documents.

        Raises:
            RuntimeError: The server does not answer, or not with what was asked for.
        """
        ids = batch["input_ids"]
        documents = [*documents_of(batch)]
        shape = tuple(ids.shape)
        columns = {
            "ids": np.zeros((*shape, self.k), np.int32),
            "logp": np.zeros((*shape, self.k), np.float32),
            "rest": np.full(shape, np.nan, np.float32),
        }
        for document, values in zip(documents, self._all(documents), strict=True):
            for name, x in values.items():
                columns[name][document.row, document.columns.start : document.columns.stop - 1] = x
        return assembled(columns, ids.device, self.tail, 1.0)

    def _all(self, documents: list[Document]) -> list[dict[str, np.ndarray]]:
        """What the server says about each, in order; the first one alone, since it finds out the protocol."""
        first = [self._values(document) for document in documents[:1]]
        with ThreadPoolExecutor(self.concurrency) as pool:
            try:
                return [*first, *pool.map(self._values, documents[1:])]
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _values(self, document: Document) -> dict[str, np.ndarray]:
        """The columns of a document but for its last token, NaN in `rest` where they are not known."""
        best = self._best(document.ids.tolist())
        known = np.array([entry is not None for entry in best])
        filled = np.array([entry or [(i, 0.0) for i in range(self.k)] for entry in best])
        logp = filled[..., 1].astype(np.float32)
        return {
            "ids": filled[..., 0].astype(np.int32),
            "logp": logp,
            "rest": np.where(known, remaining(logp), np.nan).astype(np.float32),
        }

    def _best(self, ids: list[int]) -> list[list[tuple[int, float]] | None]:
        """The most probable tokens, by the first protocol that the server understands."""
        tried = [*PROTOCOLS] if self.protocol is None else [self.protocol]
        refused: Refused | None = None
        for protocol in tried:

            def read(answer: Any, protocol: str = protocol) -> list[list[tuple[int, float]] | None] | None:
                if not answered(protocol, answer) and protocol != tried[-1]:
                    return None
                return candidates(protocol, answer, ids, self.k, self._token_of)

            try:
                found = self.server.ask("/completions", request(protocol, self.model, ids, self.k), read)
            except Refused as error:
                if error.status not in NOT_UNDERSTOOD or protocol == tried[-1]:
                    raise refused or error from error
                refused = refused or error
                continue
            if found is not None:
                self.protocol = protocol
                return found
        raise AssertionError("the last protocol returns or raises")

    @property
    def _token_of(self) -> Any:
        if self._words is None and self.tokenizer is not None:
            self._words = words_of(self.tokenizer)
        return self._words

    def _only(self, answer: Any) -> str:
        try:
            names = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError) as error:
            raise Unusable("no list of models (pass model)") from error
        if len(names) != 1:
            raise Refused(f"{self.server.url} has the models {', '.join(names) or 'none'}: pass one as model", 0)
        return names[0]


def _base(url: str) -> str:
    """The address of a server's version 1."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ValueError(f"url is {url!r}: write it as 'http://localhost:8000/v1'")
    path = parts.path.rstrip("/").removesuffix("/completions")
    return f"{parts.scheme}://{parts.netloc}{path or '/v1'}"
