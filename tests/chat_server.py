"""A chat server on the loopback, whose answers a test sets."""

import json
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class StandIn:
    """A chat server whose answers a test sets: a function from (body, number of the request) to (status, answer)."""

    def __init__(self):
        self.requests, self.keys, self.answer = [], [], lambda body, number: (200, says("A"))
        lock, own = threading.Lock(), self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    own.requests.append(body)
                    own.keys.append(self.headers.get("Authorization"))
                    status, answer = own.answer(body, len(own.requests))
                text = json.dumps(answer).encode() if isinstance(answer, dict) else answer.encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(text)))
                self.send_header("Retry-After", "0")
                self.end_headers()
                with suppress(OSError):  # the client has left
                    self.wfile.write(text)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"


def says(text, logprobs=None):
    choice = {"message": {"content": text}}
    if logprobs:
        top = [{"token": token, "logprob": p} for token, p in logprobs.items()]
        choice["logprobs"] = {"content": [{"top_logprobs": top}]}
    return {"choices": [choice], "usage": {"prompt_tokens": 10, "completion_tokens": 1}}
