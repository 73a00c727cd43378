"""A small Hugging Face hub on this machine, which behaves as badly as it is told to."""

import contextlib
import hashlib
import json
import sys
import threading
import time
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

REPOSITORY = "someone/tiny"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = (".safetensors", ".bin")
LICENCE = "creativeml-openrail-m"


class Hub:
    """Serves the files of one repository as the hub does: listing, redirects, digests, ranges.

    Args:
        files: bytes by name.

    Attributes:
        files: what is served; may be changed while it is.
        faults: functions of a request that answer it in their own way and return True; the first
            that does is taken. "api", "resolve" or "cdn" and the file's name tell what is asked.
        requests: what was asked so far, as (kind, name, Range header or None, Authorization).
        sent: bytes of files that were sent.
        commit: what the main branch is.
        address: where it is served.
    """

    def __init__(self, files):
        self.files = dict(files)
        self.listed = dict(files)
        self.faults = []
        self.requests = []
        self.sent = 0
        self.commit = COMMIT
        self.address = ""

    def digest(self, content, name):
        if name.endswith(LARGE):
            return hashlib.sha256(content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def listing(self):
        siblings = []
        for name, content in self.listed.items():
            digest = self.digest(content, name)
            entry = {"rfilename": name, "size": len(content), "blobId": digest[:40]}
            if name.endswith(LARGE):
                entry["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return {
            "id": REPOSITORY,
            "modelId": REPOSITORY,
            "sha": self.commit,
            "siblings": siblings,
            "cardData": {"license": LICENCE},
            "tags": [f"license:{LICENCE}"],
        }

    def asked(self, kind=None):
        return [name for found, name, *_ in self.requests if kind in (None, found)]


@contextlib.contextmanager
def serving(files):
    """Runs a hub in a thread."""
    hub = Hub(files)

    class Handler(_Handler):
        pass

    Handler.hub = hub
    server = _Server(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request, client_address):
        if not isinstance(sys.exception(), ConnectionError):  # a visitor may leave at any time
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *arguments):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        kind, name = self.what()
        authorization = self.headers.get("Authorization")
        self.hub.requests.append((kind, name, self.headers.get("Range"), authorization))
        try:
            if not any(fault(self, kind, name) for fault in list(self.hub.faults)):
                getattr(self, kind)(name)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True

    def what(self):
        """Return the kind of this request, and the file."""
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        if path.startswith("/cdn/"):
            return "cdn", path.removeprefix("/cdn/")
        if path.startswith(f"/{REPOSITORY}/resolve/"):
            return "resolve", path.removeprefix(f"/{REPOSITORY}/resolve/").partition("/")[2]
        return "api", path

    def api(self, path):
        place = f"/api/models/{REPOSITORY}"
        if path != place and not path.startswith(f"{place}/revision/"):
            return self.error(401, "RepoNotFound")
        if path.partition("/revision/")[2] not in ("", "main", "v1", self.hub.commit):
            return self.error(404, "RevisionNotFound")
        self.answer(200, json.dumps(self.hub.listing()).encode(), {"Content-Type": "text/json"})

    def resolve(self, name):
        content = self.hub.files.get(name)
        if content is None:
            return self.error(404, "EntryNotFound")
        digest = self.hub.digest(content, name)
        if not name.endswith(LARGE):
            return self.send_file(content, {"ETag": f'"{digest}"', "X-Repo-Commit": COMMIT})
        headers = {
            "Location": f"/cdn/{urllib.parse.quote(name)}",
            "X-Repo-Commit": self.hub.commit,
            "X-Linked-Size": str(len(content)),
            "X-Linked-Etag": f'"{digest}"',
        }
        self.answer(302, b"", headers)

    def cdn(self, name):
        self.send_file(self.hub.files[name], {})

    def send_file(self, content, headers):
        begin = self.begin()
        if begin >= len(content) > 0:
            return self.answer(416, b"", {"Content-Range": f"bytes */{len(content)}"})
        if begin:
            place = f"bytes {begin}-{len(content) - 1}/{len(content)}"
            headers = headers | {"Content-Range": place}
        self.answer(206 if begin else 200, content[begin:], headers)

    def begin(self):
        """The first byte that is asked for."""
        return int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").partition("-")[0])

    def answer(self, status, content=b"", headers=None, length=None, send=None):
        """Answers; with a `length` that may be a lie, and `send` bytes before the line is cut."""
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.write(content[:send])
        if send is not None or length is not None:
            self.close_connection = True

    def write(self, content):
        self.hub.sent += len(content)
        self.wfile.write(content)
        self.wfile.flush()

    def error(self, status, code=None, headers=None):
        self.answer(status, b"", ({"X-Error-Code": code} if code else {}) | (headers or {}))


# ── faults ──


def times(count, fault):
    """A fault that ends by itself."""
    left = [count]

    def limited(request, kind, name):
        if left[0] and fault(request, kind, name):
            left[0] -= 1
            return True
        return False

    return limited


def on(wanted, act):
    """A fault of every request of a kind ("api"), or of every transfer of one file."""

    def fault(request, kind, name):
        is_transfer = name == wanted and (kind == "cdn" or not name.endswith(LARGE))
        if kind != wanted and not is_transfer:
            return False
        act(request, name)
        return True

    return fault


def status(code, error=None, **headers):
    headers = {key.replace("_", "-"): value for key, value in headers.items()}
    return lambda request, name: request.error(code, error, headers)


def drop(after):
    """Sends some of the bytes that are asked for, then cuts the line."""

    def act(request, name):
        content, begin = request.hub.files.get(name, b"{" * 1000), request.begin()
        rest = content[begin:]
        place = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
        request.answer(206 if begin else 200, rest, place if begin else {}, send=after)

    return act


def stall(after, seconds=30):
    """Sends some of the bytes, then nothing, and holds the line."""

    def act(request, name):
        drop(after)(request, name)
        time.sleep(seconds)

    return act


def lie(content, length=None):
    """Sends other bytes than the file's, or their number wrong."""

    def act(request, name):
        request.answer(200, content, {"Content-Type": "text/html"}, length=length)

    return act


def endless(request, name):
    """Sends for ever, in chunks without a length."""
    request.send_response(200)
    request.send_header("Transfer-Encoding", "chunked")
    request.end_headers()
    chunk = b"%x\r\n%s\r\n" % (1 << 20, bytes(1 << 20))
    for _ in range(10_000):
        request.write(chunk)
