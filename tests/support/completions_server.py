"""An OpenAI-compatible completions server on this machine, in front of a tiny model, that misbehaves when asked to.

    with serving(model, form="vllm") as server:            # server.url is what a teacher is given
        server.faults = [429, "cut", "short"]              # how the next requests for completions are answered
        server.bodies                                      # those that arrived

Forms: 'vllm' knows `prompt_logprobs`; 'ids' is classic, with vLLM's names of tokens; 'text' has their texts; 'strict'
is 'text' that answers 400 to fields that OpenAI's reference does not have.
"""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch

CLASSIC = {"model", "prompt", "max_tokens", "temperature", "echo", "logprobs"}


class Completions(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, model, form, tokenizer=None, names=("tiny",)):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/v1"
        self.model, self.form, self.tokenizer, self.names = model, form, tokenizer, names
        self.bodies, self.faults, self.lock = [], [], threading.Lock()

    def handle_error(self, request, client_address):
        """A client that went away is no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *args):
        """Tests are quiet."""

    def answer(self, status, content, headers=None):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self):
        self.answer(200, {"object": "list", "data": [{"id": name} for name in self.server.names]})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.answer(fault, {"error": {"message": "not now"}}, {"Retry-After": "0.01"} if fault == 429 else None)
        elif fault == "cut":
            self.send_response(200)
            self.send_header("Content-Length", "1000")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
        elif fault == "hang up":
            self.close_connection = True
        elif fault == "no JSON":
            self.answer(200, b"<html>")
        elif server.form == "strict" and not body.keys() <= CLASSIC:
            self.answer(400, {"error": {"message": f"unknown field {sorted(body.keys() - CLASSIC)[0]}"}})
        else:
            self.answer(200, {"choices": [self.choice(body, fault)]})

    def choice(self, body, fault):
        """What the form says about a prompt; 'short' has a token less, 'few' fewer candidates, 'other' other tokens."""
        ids, form = body["prompt"], self.server.form
        with torch.no_grad():
            logp = self.server.model(input_ids=torch.tensor([ids])).logits.double().log_softmax(-1)[0]
        if fault == "other":
            ids = [(i + 1) % logp.shape[-1] for i in ids]
        fewer = (1 if form == "vllm" else 2) if fault == "few" else 0  # the own token is one more, without a rank there
        k = body.get("prompt_logprobs", body.get("logprobs", 0)) - fewer
        entries = [None]
        for row, own in zip(logp, ids[1:], strict=False):
            top = {int(i): float(row[i]) for i in row.topk(k).indices}
            entries.append({own: float(row[own]), **top})  # the prompt's token goes first, as vLLM has it
        entries = entries[:-1] if fault == "short" else entries
        if form == "vllm":
            if "prompt_logprobs" not in body:
                return {"text": "", "logprobs": None}
            given = [
                e and {str(i): {"logprob": x, "rank": int((row >= x).sum()), "decoded_token": ""} for i, x in e.items()}
                for e, row in zip(entries, [None, *logp], strict=False)
            ]
            return {"text": "", "logprobs": None, "prompt_logprobs": given}
        if not body.get("echo"):
            return {"text": "", "logprobs": None}
        by_id = form == "ids" and body.get("return_tokens_as_token_ids")
        word = (lambda i: f"token_id:{i}") if by_id else (lambda i: self.server.tokenizer.decode([i]))
        top = [e and {word(i): x for i, x in e.items()} for e in entries]
        tokens = [word(i) for i in ids[: len(entries)]]
        if body["max_tokens"] and fault != "short":  # it has generated a token behind the prompt
            tokens, top = [*tokens, word(5)], [*top, {word(5): -0.1}]
        return {
            "text": "",
            "logprobs": {"tokens": tokens, "top_logprobs": top, "token_logprobs": [], "text_offset": []},
        }


@contextmanager
def serving(model, form="vllm", **options):
    """A running server."""
    server = Completions(model, form, **options)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
