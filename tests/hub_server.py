"""A Hugging Face hub of the folders OWNER/NAME below a root; python hub_server.py ROOT tells its port.

Of a model whose name has `broken` in it, connections break off in the middle of large files.
"""

import hashlib
import http.server
import json
import pathlib
import sys
import urllib.parse

ROOT, COMMIT = pathlib.Path(sys.argv[1]), "0123456789abcdef0123456789abcdef01234567"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/")
        if path.startswith("api/models/"):
            return self._about(*path.split("/")[2:4], tree="/tree/" in path)
        model, _, rest = path.partition("/resolve/")
        file = rest.partition("/")[2]  # after a commit, or a branch's name
        if not (ROOT / model / file).is_file():
            return self._answer(b"", status=404)
        body = (ROOT / model / file).read_bytes()
        etag = hashlib.sha1(body).hexdigest()
        self._answer(body, "broken" in model and len(body) > 10_000, ETag=f'"{etag}"')

    do_HEAD = do_GET

    def _about(self, owner, name, tree):
        folder = ROOT / owner / name
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        if tree:
            told = [
                {
                    "type": "file",
                    "path": p.relative_to(folder).as_posix(),
                    "size": p.stat().st_size,
                    "oid": hashlib.sha1(p.read_bytes()).hexdigest(),
                }
                for p in files
            ]
        else:
            named = [{"rfilename": p.relative_to(folder).as_posix()} for p in files]
            told = {"id": f"{owner}/{name}", "sha": COMMIT, "siblings": named}
        self._answer(json.dumps(told).encode())

    def _answer(self, body, broken=False, status=200, **headers):
        self.send_response(status)
        for name, value in ({"X-Repo-Commit": COMMIT} | headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if broken else body)
            self.close_connection = broken


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
