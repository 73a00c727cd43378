"""Models come from the hub verified, or not at all: `python tests/acceptance/hub.py`.

A hub on this machine serves a tiny model and misbehaves in every way of `CASES`. Each case is tried
in a process of its own with an empty cache, and must end soon with a folder that is equal to the
byte, or with one sentence that says what to do; then the hub is well again, and a second try with
the same cache must succeed. In offline mode an audit hook sees that no connection is tried.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]

import hub_server  # noqa: E402
from hub_server import REPOSITORY, drop, endless, lie, on, stall, status, times  # noqa: E402

ROOT = Path(__file__).resolve().parents[2]
UNET = "unet/diffusion_pytorch_model.safetensors"
HTML = b"<!DOCTYPE html><html><title>Sign in</title></html>"
MOST_SECONDS = 60.0  # of one try, with the time limits below
LIMITS = {"HF_HUB_DOWNLOAD_TIMEOUT": "1", "HF_HUB_ETAG_TIMEOUT": "1"}
FOLDER = None  # what a case ends with, if not with an error of these words


def swapped(content):
    """Other bytes, as many: a file that was replaced by another of the same shapes."""
    return content[:-1000] + bytes(1000)


def halves(request, name):
    """The first half of the file, and after the cut the second half of another one."""
    content = request.hub.files[name]
    begin = request.begin()
    if begin == 0:
        return drop(len(content) // 2)(request, name)
    place = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
    request.answer(206, swapped(content)[begin:], place)


def ignore_ranges(request, name):
    """The whole file, whatever part is asked for."""
    request.answer(200, request.hub.files[name])


def wrong_part(request, name):
    """The beginning of the file, called the part that was asked for."""
    content, begin = request.hub.files[name], request.begin()
    place = {"Content-Range": f"bytes {begin}-{len(content) - 1}/{len(content)}"}
    request.answer(206, content[: len(content) - begin], place)


def cases(files):
    """(what the hub does, its faults, words of the error or FOLDER) of each case."""
    unet = files[UNET]
    third = len(unet) // 3
    reachable = "cannot be reached, or stopped answering"
    return [
        ("is well", [], FOLDER),
        ("cuts the line once", [times(1, on(UNET, drop(third)))], FOLDER),
        ("cuts the line again and again", [times(3, on(UNET, drop(third // 2)))], FOLDER),
        ("cuts the line at once, always", [on(UNET, drop(0))], reachable),
        ("cuts the listing", [times(1, on("api", drop(10)))], FOLDER),
        ("cuts the listing, always", [on("api", drop(10))], reachable),
        ("stalls once", [times(1, on(UNET, stall(third)))], FOLDER),
        ("stalls, always", [on(UNET, stall(0))], reachable),
        ("stalls before the listing", [on("api", stall(0))], reachable),
        ("tells a length too large", [on(UNET, lie(unet, len(unet) + 99))], FOLDER),
        ("tells a length too small once", [times(1, on(UNET, lie(unet, 5000)))], FOLDER),
        ("tells a length too small", [on(UNET, lie(unet[:5000]))], "5,000 of .* bytes"),
        ("sends too much", [on(UNET, lie(unet + bytes(9000)))], FOLDER),
        ("sends without end", [on(UNET, endless)], "damaged"),
        (
            "ignores ranges",
            [times(1, on(UNET, drop(third))), on(UNET, ignore_ranges)],
            FOLDER,
        ),
        (
            "sends a wrong part once",
            [times(1, on(UNET, drop(third))), times(1, on(UNET, wrong_part))],
            FOLDER,
        ),
        ("swaps the file", [on(UNET, lie(swapped(unet)))], "digest"),
        ("swaps the file once", [times(1, on(UNET, lie(swapped(unet))))], FOLDER),
        ("swaps the file in the middle", [on(UNET, halves)], "digest"),
        ("sends a page for the weights", [on(UNET, lie(HTML))], "web page"),
        ("sends a page for a config", [on("unet/config.json", lie(HTML))], "web page"),
        ("sends a page for the listing", [on("api", lie(HTML))], "does not answer as a hub"),
        ("401: unknown or private", [on("api", status(401, "RepoNotFound"))], "HF_TOKEN"),
        ("401: no such token", [on("api", status(401))], "HF_TOKEN"),
        ("403: gated", [on("resolve", status(403, "GatedRepo"))], "Accept its terms.*HF_TOKEN"),
        ("403: forbidden", [on("resolve", status(403))], "HF_TOKEN"),
        ("404: no repository", [on("api", status(404, "RepoNotFound"))], "Check the name"),
        ("404: no revision", [on("api", status(404, "RevisionNotFound"))], "behind the '@'"),
        ("404: no file", [on(UNET, status(404, "EntryNotFound"))], "has lost a file"),
        ("429 once", [times(1, on("api", status(429, Retry_After="1")))], FOLDER),
        ("429 for a file", [times(1, on(UNET, status(429, Retry_After="1")))], FOLDER),
        ("429, always", [on("api", status(429, Retry_After="1"))], "too many requests.*1 seconds"),
        ("429 for an hour", [on("api", status(429, Retry_After="3600"))], "wait 3,600 seconds"),
        ("500 once", [times(1, on("api", status(500)))], FOLDER),
        ("500 once for a file", [times(1, on(UNET, status(500)))], FOLDER),
        ("503, always", [on("api", status(503))], "the hub fails"),
        ("503 for a file, always", [on(UNET, status(503))], "the hub fails"),
    ]


# A tiny file would be one part of those that the transfer keeps when the line is cut.
CHILD = """
import json, sys, time, warnings
seen = []
sys.addaudithook(lambda event, arguments: seen.append(f"{event} {arguments[1:]}")
                 if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto") else None)
from huggingface_hub import constants
constants.DOWNLOAD_CHUNK_SIZE = 4096
import resource
if len(sys.argv) > 2:
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
from kdiffusion.weights.hub import fetch
began, result = time.monotonic(), {}
with warnings.catch_warnings(record=True) as told:
    warnings.simplefilter("always")
    try:
        result["path"] = str(fetch(sys.argv[1]).path)
    except ValueError as error:
        result["error"] = str(error)
result |= {"seconds": time.monotonic() - began, "connections": len(seen)}
print(json.dumps(result | {"told": [str(item.message) for item in told]}))
"""


class Visitor:
    """Fetches in fresh processes, all with one cache, and remembers what was wrong."""

    def __init__(self, address, home, files):
        self.address, self.home, self.files = address, Path(home), files
        self.problems = []

    def start(self, *arguments, **variables):
        environment = os.environ | LIMITS | variables
        environment |= {"HF_ENDPOINT": self.address, "HF_HOME": str(self.home)}
        environment |= {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", CHILD, REPOSITORY, *arguments]
        return subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    def finish(self, process, words):
        """Judges what came of a try: a folder, or an error of these words."""
        output, complaint = process.communicate(timeout=10 * MOST_SECONDS)
        if process.returncode:
            self.problems.append(f"the process died: {complaint[-500:]}")
            return {}
        result = json.loads(output.splitlines()[-1])
        if result["seconds"] > MOST_SECONDS:
            self.problems.append(f"took {result['seconds']:.0f} s")
        error = result.get("error", "")
        if words is FOLDER and error:
            self.problems.append(f"ended with {error!r}")
        if words is not FOLDER and not re.search(words, error):
            self.problems.append(f"ended with {error or 'a folder'!r}")
        if words is FOLDER and not error and content(Path(result["path"])) != self.files:
            self.problems.append("the folder is not equal to the hub's files")
        self.look_at_cache()
        return result

    def visit(self, words, *arguments, **variables):
        return self.finish(self.start(*arguments, **variables), words)

    def look_at_cache(self):
        """No file may have a name in a snapshot and other bytes than the hub's."""
        for snapshot in self.home.glob("hub/*/snapshots/*"):
            for name, found in content(snapshot).items():
                if found != self.files[name]:
                    self.problems.append(f"the cache holds a wrong {name}")


def content(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def main():
    files = tiny_model()
    failures = []
    others = [offline, vanished, killed, damaged, two_at_once, full_disk, told_once, secret_kept]
    jobs = [(name, misbehaving(faults, words)) for name, faults, words in cases(files)]
    jobs += [(other.__doc__.split(":")[0], other) for other in others]
    for name, job in jobs:
        with hub_server.serving(files) as server, tempfile.TemporaryDirectory() as home:
            visitor = Visitor(server.address, home, files)
            began = time.monotonic()
            ending = job(server, visitor)
            mark = "FAILED" if visitor.problems else "ok"
            print(f"{mark:6s} {name}: {ending} ({time.monotonic() - began:.1f} s)", flush=True)
        failures += [f"{name}: {problem}" for problem in visitor.problems]
    for failure in failures:
        print(f"FAILED {failure}")
    print(f"{len(jobs)} cases, {len(failures)} failures")
    return bool(failures)


def tiny_model():
    """The files of a model that our own writer made, with its README and licence."""
    from kdiffusion import StableDiffusion

    with tempfile.TemporaryDirectory() as work:
        folder = Path(work, "tiny")
        StableDiffusion.from_preset("random-tiny").save(folder)
        (folder / "README.md").write_text(f"---\nlicense: {hub_server.LICENCE}\n---\nA toy.\n")
        (folder / "LICENSE").write_text("The terms.\n")
        return content(folder)


def misbehaving(faults, words):
    def job(server, visitor):
        server.faults = faults
        result = visitor.visit(words)
        server.faults = []
        visitor.visit(FOLDER)
        return result.get("error") or "a folder"

    return job


def offline(server, visitor):
    """offline: nobody is asked, with an empty, a complete and an incomplete cache"""
    results = [visitor.visit("HF_HUB_OFFLINE", HF_HUB_OFFLINE="1")]
    path = Path(visitor.visit(FOLDER)["path"])
    results.append(visitor.visit(FOLDER, HF_HUB_OFFLINE="1"))
    (path / UNET).unlink()
    results.append(visitor.visit("unet/.*HF_HUB_OFFLINE", HF_HUB_OFFLINE="1"))
    connections = sum(result["connections"] for result in results)
    if connections:
        visitor.problems.append(f"{connections} connections were tried")
    return f"{connections} connections in {len(results)} tries"


def vanished(server, visitor):
    """no hub: an error, and with a complete cache its copy with a warning"""
    address, visitor.address = visitor.address, "http://127.0.0.1:9"
    error = visitor.visit("cannot be reached.*Check the network")["error"]
    visitor.address = address
    visitor.visit(FOLDER)
    visitor.address = "http://127.0.0.1:9"
    told = visitor.visit(FOLDER)["told"]
    if not any("The copy in the cache is used" in line for line in told):
        visitor.problems.append("nobody was told that the cache is used")
    return error


def killed(server, visitor):
    """killed: another process goes on where the first was killed"""
    size = len(visitor.files[UNET])
    server.faults = [times(1, on(UNET, stall(size // 2)))]
    process = visitor.start(HF_HUB_DOWNLOAD_TIMEOUT="60")
    deadline = time.monotonic() + MOST_SECONDS
    while server.sent < size // 2 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(1)
    process.kill()
    process.communicate()
    server.faults = []
    visitor.visit(FOLDER)
    begins = [begin for _, name, begin, _ in server.requests if name == UNET and begin]
    if not begins:
        visitor.problems.append("the second process began anew")
    return f"went on at {begins[0] if begins else 'the beginning'} of {size}"


def damaged(server, visitor):
    """damage in the cache: a file that was cut there is fetched again"""
    path = Path(visitor.visit(FOLDER)["path"])
    (path / UNET).resolve().write_bytes(b"cut")
    visitor.visit(FOLDER)
    return "a folder"


def two_at_once(server, visitor):
    """two at once: both have the folder, and each file was fetched once"""
    processes = [visitor.start() for _ in range(2)]
    for process in processes:
        visitor.finish(process, FOLDER)
    count = server.asked("cdn").count(UNET)
    if count > 1:
        visitor.problems.append(f"the weights were fetched {count} times")
    return "two folders"


def full_disk(server, visitor):
    """full disk: no file may have more than 20,000 bytes"""
    error = visitor.visit("does not fit.*Make room", "20000")["error"]
    visitor.visit(FOLDER)
    return error


def told_once(server, visitor):
    """licence: told once, and kept beside the files; then only the listing is asked for"""
    first, second = visitor.visit(FOLDER), visitor.visit(FOLDER)
    if not any(hub_server.LICENCE in line for line in first["told"]) or second["told"]:
        visitor.problems.append(f"told {first['told']}, then {second['told']}")
    if server.asked()[-1:] != server.asked("api")[-1:]:
        visitor.problems.append("a file was asked for again")
    return first["told"][0]


def secret_kept(server, visitor):
    """token: sent to the hub, never told"""
    server.faults = [on(UNET, status(403))]
    result = visitor.visit("HF_TOKEN", HF_TOKEN="hf_secret")
    if "Bearer hf_secret" not in {authorization for *_, authorization in server.requests}:
        visitor.problems.append("the token was not sent")
    if "hf_secret" in json.dumps(result):
        visitor.problems.append("the token was told")
    return "not told"


if __name__ == "__main__":
    sys.exit(main())
