"""A web server that keeps what is posted to it."""

from __future__ import annotations

import http.server
import json
import threading
from typing import Any


class Receiver:
    """Listens on loopback; its address ends in a secret."""

    def __init__(self, status: int = 200):
        posted: list[dict[str, Any]] = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                self.send_response(status)
                self.end_headers()

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.posted = posted
        self.server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}/hook/secret-token"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
