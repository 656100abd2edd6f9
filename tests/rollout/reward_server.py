"""A reward server on this machine, in a thread, for the tests of `RemoteReward`."""

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


class Judge:
    """What a server saw, and what it says: each entry of `script` answers one request, the last one all others."""

    def __init__(self, *script):
        self.script, self.requests, self.headers = list(script), [], []

    def reply(self, handler):
        asked = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        self.requests.append(asked)
        self.headers.append(dict(handler.headers))
        said = self.script.pop(0) if len(self.script) > 1 else self.script[0]
        return said(asked) if callable(said) else said


@contextmanager
def serving(judge):
    """The URL of a server; an answer is (status, body), a body alone, or a function of the handler."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self):
            said = judge.reply(self)
            if isinstance(said, SimpleNamespace):
                said.write(self)
                return
            status, body = said if isinstance(said, tuple) else (200, said)
            content = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            if status == 302:
                self.send_header("Location", "/elsewhere")
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, *_):  # a client that hung up is what some tests are about
            pass

    server = Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/score"
    finally:
        server.shutdown()
        server.server_close()
