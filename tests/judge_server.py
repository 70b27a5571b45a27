"""A stand-in for a hosted judge: it speaks OpenAI's chat API over real HTTP, takes its time, and writes down
what it was asked and when.

The package reaches it like any paid judge, through Inspect's `openai-api` provider: nothing of the library is
replaced, only the address. Each process under test gets an address of its own (`/<run>/<process>/v1`), so
that every call is known by who made it. A reply names the request that it answers (`Ref`), so that the
package's store of replies can be compared with what was asked.
"""

import hashlib
import json
import re
import sqlite3
import threading
import time
from collections import Counter, defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

JUDGE = "openai-api/standin/judge"
KEY = "sk-standin-0000"


def reference(body: bytes) -> str:
    "Identity of a request: all that was sent."
    return hashlib.sha256(json.dumps(json.loads(body), sort_keys=True).encode()).hexdigest()[:24]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        pass

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        judge, ref, who = self.server.judge, reference(body), tuple(self.path.strip("/").split("/")[:2])
        judge.asked[who].append(ref)
        # some replies take thrice as long as others
        time.sleep(judge.latency * (0.5 + int(ref[:4], 16) / 65536))
        if judge.body is not None:
            return self.send_bytes(200, judge.body)
        if judge.refusal:
            return self.send(*judge.refusal)
        grade = "C" if int(ref[-1], 16) % 2 else "I"
        text = f"Ref {ref}.\n\nGRADE: {grade}" if judge.text is None else judge.text
        message = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
        self.send(
            200,
            {
                "id": f"chatcmpl-{ref}",
                "object": "chat.completion",
                "created": 1,
                "model": "judge",
                "choices": [message],
                "usage": {"prompt_tokens": 9, "completion_tokens": 5, "total_tokens": 14},
            },
        )
        judge.answered[who].append(ref)

    def send(self, status, content):
        self.send_bytes(status, json.dumps(content).encode())

    def send_bytes(self, status, text):
        try:
            self.send_response(status)
            common = {"Content-Type": "application/json", "Content-Length": str(len(text))}
            for name, value in (common | self.server.judge.headers).items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(text)
        except OSError:
            self.close_connection = True  # the caller was killed


class Server(ThreadingHTTPServer):
    daemon_threads, request_queue_size = True, 256

    def handle_error(self, request, address):
        pass  # callers are killed on purpose


class PaidJudge:
    "The server and its book: `asked` and `answered` hold, for each (run, process), the requests in order."

    def __init__(
        self,
        latency: float = 0.03,  # seconds a call
        refusal: tuple[int, dict] | None = None,  # status and JSON of every answer
        body: bytes | None = None,  # of every answer, with status 200
        text: str | None = None,  # what it says to every question
        headers: dict[str, str] | None = None,  # sent with every answer
    ):
        self.body, self.text, self.headers = body, text, headers or {}
        self.latency, self.refusal, self.asked, self.answered = (
            latency,
            refusal,
            defaultdict(list),
            defaultdict(list),
        )

    def __enter__(self):
        self.server = Server(("127.0.0.1", 0), Handler)
        self.server.judge = self
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, run: object = "run", process: object = 0) -> dict[str, str]:
        "What a process needs to reach it."
        return {
            "STANDIN_API_KEY": KEY,
            "STANDIN_BASE_URL": f"http://127.0.0.1:{self.server.server_port}/{run}/{process}/v1",
        }

    def calls(self, run: object, process: object) -> Counter:
        return Counter(self.asked[str(run), str(process)])


def kept_replies(file: Path) -> set[str]:
    "The requests whose reply the package has kept, read from its store as a killed process left it."
    if not file.is_file():
        return set()
    connection = sqlite3.connect(file)
    try:
        rows = connection.execute("SELECT output FROM replies").fetchall()
    except sqlite3.OperationalError:
        return set()  # killed before the table was made
    finally:
        connection.close()
    return {ref for (output,) in rows for ref in re.findall(r"Ref (\w{24})\.", output)}
