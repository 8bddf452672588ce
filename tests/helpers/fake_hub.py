"""A hub on this machine that serves a few files by the protocol of the real one."""

import hashlib
import http.server
import json
import threading
import urllib.parse

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class FakeHub(http.server.ThreadingHTTPServer):
    """Models by id, each with its files; `fetched` lists the files whose content was asked for.

    A model in `gated` is refused to whoever brings no token, and one that is not there is not found.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.models, self.gated, self.fetched = {}, set(), []
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = urllib.parse.unquote(urllib.parse.urlparse(self.path).path).strip("/").split("/")
        model = "/".join(parts[2:4] if parts[0] == "api" else parts[:2])
        files = self.server.models.get(model)
        if files is None:
            return self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        revision = parts[5] if parts[0] == "api" else parts[3]
        if revision not in ("main", COMMIT):
            return self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        if parts[0] == "api":
            return self._api(model, files, parts[4])
        name = "/".join(parts[4:])
        if model in self.server.gated and not self.headers.get("Authorization"):
            return self._send(401, b"{}", {"X-Error-Code": "GatedRepo"})
        if name not in files:
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
        if self.command == "GET":
            self.server.fetched.append(name)
        return self._send(200, files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{_oid(files[name])}"'})

    def _api(self, model, files, kind):
        if kind == "revision":
            answer = {"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}
        else:
            answer = [
                {"type": "file", "path": name, "size": len(content), "oid": _oid(content)}
                for name, content in files.items()
            ]
        return self._send(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _send(self, status, content, headers):
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _oid(content):
    return hashlib.sha1(content).hexdigest()
