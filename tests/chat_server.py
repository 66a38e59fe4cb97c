"""A real HTTP server that answers chat completions as a test wants."""

import http.server
import json
import threading


class Server:
    """Chat completions as `answer(body, number of the try)` has them: `(status, body or None)`."""

    def __init__(self, answer):
        self.bodies, self.headers, self.tries, self.under_way, self.most = [], [], {}, 0, 0
        lock, server = threading.Lock(), self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    asked = body["messages"][-1]["content"]
                    server.tries[asked] = server.tries.get(asked, 0) + 1
                    server.bodies.append((self.path, body))
                    server.headers.append({k.lower(): v for k, v in self.headers.items()})
                    server.under_way += 1
                    server.most = max(server.most, server.under_way)
                try:
                    status, found = answer(body, server.tries[asked])
                    said = json.dumps(found).encode() if not isinstance(found, bytes) else found
                    self.send_response(status)
                    self.send_header("Content-Type", "application/json")
                    self.send_header("Content-Length", str(len(said)))
                    self.send_header("Retry-After", "0")
                    self.end_headers()
                    self.wfile.write(said)
                except BrokenPipeError:
                    pass  # whoever asked has gone
                finally:
                    with lock:
                        server.under_way -= 1

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.http.shutdown()
        self.http.server_close()


def said(text, finish="stop"):
    message = {"role": "assistant", "content": text}
    choice = {"index": 0, "message": message, "finish_reason": finish}
    return {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}
