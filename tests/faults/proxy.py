"""An HTTP proxy between the real Cloud Storage client and fake-gcs-server.

It does two things. It gives the fake the semantics that Cloud Storage documents and the fake lacks:
``ifGenerationMatch`` on resumable uploads, copies and removals, questions for the state of a
resumable upload, bytes that are sent twice, and answers about a finished upload. And it injects
faults: drawn from a seeded generator, counted by kind.
"""

from __future__ import annotations

import http.client
import json
import random
import re
import select
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

QUANTUM = 256 * 1024
BLOCK = 64 * 1024
ANY, UPLOAD, DOWNLOAD, LISTING = "any", "upload", "download", "listing"

# What each kind of fault can happen to
KINDS = {
    "503": (UPLOAD, DOWNLOAD, LISTING, ANY),
    "429": (UPLOAD, DOWNLOAD, LISTING, ANY),
    "reset in mid-upload": (UPLOAD,),
    "answer lost": (UPLOAD, ANY),
    "stalled upload": (UPLOAD,),
    "stalled download": (DOWNLOAD,),
    "truncated download": (DOWNLOAD,),
    "short download": (DOWNLOAD,),
    "stale listing": (LISTING,),
}


class Faults:
    """Which request meets which fault: seeded, `rate` likely, drawn `limit` times at most.

    Of the requests only those that do something in `only` are considered.
    """

    def __init__(
        self,
        seed: int,
        rate: float,
        *,
        kinds: tuple[str, ...] = tuple(KINDS),
        only: tuple[str, ...] = (UPLOAD, DOWNLOAD, LISTING, ANY),
        limit: int | None = None,
    ) -> None:
        self.counts: Counter[str] = Counter()
        self._random = random.Random(seed)
        self._rate, self._kinds, self._limit = rate, kinds, limit
        self._only, self._drawn = only, 0
        self._lock = threading.Lock()

    def draw(self, happening: str) -> str | None:
        """The fault for a request, if one is due."""
        with self._lock:
            fitting = [kind for kind in self._kinds if happening in KINDS[kind]]
            if happening not in self._only:
                return None
            spent = self._limit is not None and self._drawn >= self._limit
            if not fitting or spent or self._random.random() >= self._rate:
                return None
            self._drawn += 1
            return self._random.choice(fitting)

    def count(self, kind: str) -> None:
        """Note a fault that really happened."""
        with self._lock:
            self.counts[kind] += 1

    def portion(self) -> float:
        """How far a transfer gets before it breaks."""
        with self._lock:
            return self._random.random()


@dataclass
class _Upload:
    """A resumable upload as Cloud Storage would know it."""

    bucket: str
    name: str
    if_generation_match: str | None
    held: int = 0
    answer: tuple[int, dict[str, str], bytes] | None = None
    lock: threading.Lock = field(default_factory=threading.Lock)


class FaultProxy:
    """Serves on a free loopback port until `close`; `faults` may be exchanged at any time.

    Args:
        backend: URL of fake-gcs-server.
        faults: what to inject; nothing by default.
        bandwidth: bytes a second each way, over all connections; unlimited by default.
    """

    def __init__(
        self, backend: str, faults: Faults | None = None, bandwidth: float | None = None
    ) -> None:
        self.backend = urlsplit(backend).netloc
        self.faults = faults
        self.bandwidth = bandwidth
        # (status, message) that every request gets
        self.refusal: tuple[int, str] | None = None
        # What every chunk of a resumable upload is answered with, nothing of it being kept
        self.chunk_status: int | None = None
        # Copies are answered as unfinished the first time, as large ones may be
        self.copies_in_parts = False
        # Requests wait while this is clear
        self.gate = threading.Event()
        self.gate.set()
        self.requests: list[tuple[str, str]] = []
        # (first byte, end) of every part of a resumable upload that the server has kept
        self.kept: list[tuple[int, int]] = []
        # Bytes of resumable uploads that came although the server had them
        self.repeated = 0
        self.uploads: dict[str, _Upload] = {}
        self.listings: dict[str, list[bytes]] = {}
        # Condition and change are one step, as in Cloud Storage
        self.commit = threading.RLock()
        self._wire = threading.Lock()
        self._free_at = 0.0
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.02,), daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        self._server.stopping.set()
        self.gate.set()
        self._server.shutdown()
        self._server.server_close()

    def __enter__(self) -> FaultProxy:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def injecting(self, faults: Faults) -> Iterator[Faults]:
        """These faults for the length of a block."""
        before, self.faults = self.faults, faults
        try:
            yield faults
        finally:
            self.faults = before

    def draw(self, happening: str) -> str | None:
        return self.faults.draw(happening) if self.faults else None

    def count(self, kind: str) -> None:
        if self.faults:
            self.faults.count(kind)

    def pace(self, amount: int) -> None:
        """Wait as long as the slow link needs for that many bytes."""
        if not self.bandwidth:
            return
        with self._wire:
            now = time.monotonic()
            self._free_at = max(self._free_at, now) + amount / self.bandwidth
            wait = self._free_at - now
        self._server.stopping.wait(wait)

    def ask(
        self, method: str, path: str, body: bytes, headers: dict[str, str]
    ) -> tuple[int, dict[str, str], bytes]:
        """One request to the fake."""
        connection = http.client.HTTPConnection(self.backend, timeout=60)
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, dict(response.getheaders()), response.read()
        finally:
            connection.close()

    def generation(self, bucket: str, name: str) -> str:
        """The generation of an object; "0" if there is none."""
        path = f"/storage/v1/b/{bucket}/o/{quote(name, safe='')}"
        status, _, body = self.ask("GET", path, b"", {})
        return json.loads(body)["generation"] if status == 200 else "0"


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64
    proxy: FaultProxy

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.stopping = threading.Event()

    def shutdown_request(self, request: object) -> None:
        # Without the usual shutdown(), so that a lingering socket is reset and not just closed
        self.close_request(request)  # type: ignore[arg-type]

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients give up in the middle of answers here; that is the purpose."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def do_DELETE(self) -> None:
        self._serve()

    def _serve(self) -> None:
        self.proxy = self.server.proxy
        url = urlsplit(self.path)
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.where = url.path
        self.proxy.requests.append((self.command, self.path))
        self.proxy.gate.wait()
        happening = self._happening()
        self.fault = self.proxy.draw(happening)
        length = int(self.headers.get("Content-Length") or 0)
        if happening == UPLOAD and self.fault in ("reset in mid-upload", "stalled upload"):
            self._break_upload(length)
            return
        body = self._receive(length)
        if self.proxy.refusal is not None:
            code, message = self.proxy.refusal
            answer = json.dumps({"error": {"code": code, "message": message}}).encode()
            self._answer(code, {"Content-Type": "application/json"}, answer)
            return
        if self.fault in ("503", "429"):
            self.proxy.count(self.fault)
            self._answer(int(self.fault), {}, b'{"error": {"message": "injected"}}')
            return
        status, headers, answer = self._carry_out(body)
        if self.fault == "answer lost":
            self.proxy.count(self.fault)
            self._reset()
        elif (
            happening == DOWNLOAD
            and status in (200, 206)
            and self._break_download(status, headers, answer)
        ):
            return
        else:
            if happening == LISTING and status == 200:
                answer = self._maybe_stale(answer)
            self._answer(status, headers, answer)

    def _happening(self) -> str:
        if self.where.startswith("/upload/") or "upload_id" in self.query:
            return UPLOAD if self.command in ("PUT", "POST") else ANY
        if self.query.get("alt") == "media" or self.where.startswith("/download/"):
            return DOWNLOAD
        if self.command == "GET" and re.fullmatch(r"/storage/v1/b/[^/]+/o/?", self.where):
            return LISTING
        return ANY

    # What Cloud Storage does

    def _carry_out(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        if "upload_id" in self.query and self.command == "PUT":
            return self._chunk(body)
        if self.command == "POST" and self.query.get("uploadType") == "resumable":
            return self._begin(body)
        if self.command == "DELETE" and "ifGenerationMatch" in self.query:
            parts = self.where.split("/")
            with self.proxy.commit:
                there = self.proxy.generation(parts[4], unquote(parts[6]))
                if there not in ("0", self.query["ifGenerationMatch"]):
                    return self._refusal()
                return self._forward(body)
        if self.command == "POST" and "/rewriteTo/" in self.where:
            return self._copy(body)
        if self.command == "POST":
            with self.proxy.commit:
                return self._forward(body)
        return self._forward(body)

    def _copy(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """A copy on the server, which the fake makes without looking at conditions."""
        parts = [unquote(part) for part in self.where.split("/")]
        conditions = {
            "ifSourceGenerationMatch": (parts[4], parts[6]),
            "ifGenerationMatch": (parts[9], parts[11]),
        }
        with self.proxy.commit:
            for key, (bucket, name) in conditions.items():
                there = self.proxy.generation(bucket, name)
                if key == "ifSourceGenerationMatch" and there == "0":
                    return 404, {"Content-Type": "application/json"}, b'{"error": {"code": 404}}'
                if self.query.get(key, there) != there:
                    return self._refusal()
            if self.proxy.copies_in_parts and "rewriteToken" not in self.query:
                answer = {"done": False, "totalBytesRewritten": "0", "objectSize": "1"}
                answer["rewriteToken"] = "go on"
                return 200, {"Content-Type": "application/json"}, json.dumps(answer).encode()
            return self._forward(body)

    def _begin(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        bucket = self.where.split("/")[5]
        name = json.loads(body or b"{}").get("name") or self.query["name"]
        wanted = self.query.get("ifGenerationMatch")
        if wanted is not None and self.proxy.generation(bucket, name) != wanted:
            return self._refusal()
        status, headers, answer = self._forward(body)
        location = next((v for k, v in headers.items() if k.lower() == "location"), None)
        if status == 200 and location:
            url = urlsplit(location)
            headers = {k: v for k, v in headers.items() if k.lower() != "location"}
            headers["Location"] = f"{self.proxy.url}{url.path}?{url.query}"
            upload_id = parse_qs(url.query)["upload_id"][0]
            self.proxy.uploads[upload_id] = _Upload(bucket, name, wanted)
        return status, headers, answer

    def _chunk(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        upload = self.proxy.uploads.get(self.query["upload_id"])
        if upload is None:
            return 404, {}, b""
        with upload.lock:
            if upload.answer is not None:
                self.proxy.repeated += len(body)
                return upload.answer
            match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers["Content-Range"])
            if match is None or self.proxy.chunk_status == 308:
                return self._progress(upload)
            if self.proxy.chunk_status is not None:
                return self.proxy.chunk_status, {}, b""
            first, total = int(match[1]), int(match[3])
            if first > upload.held:
                return 503, {}, b""
            self.proxy.repeated += min(len(body), upload.held - first)
            return self._keep(upload, body[upload.held - first :], total)

    def _keep(self, upload: _Upload, data: bytes, total: int) -> tuple[int, dict[str, str], bytes]:
        """Pass on bytes that the fake does not have yet."""
        end = upload.held + len(data)
        if end < total:
            data = data[: len(data) // QUANTUM * QUANTUM]
            if not data:
                return self._progress(upload)
            end = upload.held + len(data)
        headers = {"Content-Range": f"bytes {upload.held}-{end - 1}/{total}"}
        with self.proxy.commit:
            if end == total and not self._condition_holds(upload):
                upload.answer = self._refusal()
                return upload.answer
            answer = self.proxy.ask("PUT", self.path, data, headers)
        self.proxy.kept.append((upload.held, end))
        upload.held = end
        if end == total:
            upload.answer = answer
            return answer
        return self._progress(upload)

    def _condition_holds(self, upload: _Upload) -> bool:
        wanted = upload.if_generation_match
        return wanted is None or self.proxy.generation(upload.bucket, upload.name) == wanted

    def _progress(self, upload: _Upload) -> tuple[int, dict[str, str], bytes]:
        return 308, {"Range": f"bytes=0-{upload.held - 1}"} if upload.held else {}, b""

    def _refusal(self) -> tuple[int, dict[str, str], bytes]:
        message = {"error": {"code": 412, "message": "conditionNotMet"}}
        return 412, {"Content-Type": "application/json"}, json.dumps(message).encode()

    def _forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        dropped = ("host", "connection", "content-length", "transfer-encoding")
        headers = {k: v for k, v in self.headers.items() if k.lower() not in dropped}
        return self.proxy.ask(self.command, self.path, body, headers)

    # What goes wrong

    def _break_upload(self, length: int) -> None:
        """Take part of the body; of a chunk the whole quanta are kept, as Cloud Storage does."""
        if self.fault is None or self.proxy.faults is None:
            return
        received = self._receive(int(length * self.proxy.faults.portion()))
        self.proxy.count(self.fault)
        upload = self.proxy.uploads.get(self.query.get("upload_id", ""))
        match = re.fullmatch(r"bytes (\d+)-(\d+)/(\d+)", self.headers.get("Content-Range", ""))
        if upload is not None and match is not None and upload.answer is None:
            with upload.lock:
                fresh = received[max(0, upload.held - int(match[1])) :]
                whole = fresh[: len(fresh) // QUANTUM * QUANTUM]
                if int(match[1]) <= upload.held and whole:
                    self._keep(upload, whole, int(match[3]))
        if self.fault == "stalled upload":
            self._stall()
        self._reset()

    def _break_download(self, status: int, headers: dict[str, str], answer: bytes) -> bool:
        kinds = ("stalled download", "truncated download", "short download")
        if self.fault not in kinds or not answer or self.proxy.faults is None:
            return False
        part = answer[: int(len(answer) * self.proxy.faults.portion())]
        self.proxy.count(self.fault)
        if self.fault == "short download":
            # An intermediary that lost the end and made the length fit
            self._answer(status, headers, part)
            return True
        self._answer(status, headers, part, length=len(answer))
        if self.fault == "stalled download":
            self._stall()
        self.close_connection = True
        return True

    def _maybe_stale(self, answer: bytes) -> bytes:
        seen = self.proxy.listings.setdefault(self.path, [])
        if not seen or seen[-1] != answer:
            seen.append(answer)
        if self.fault == "stale listing" and len(seen) > 1:
            self.proxy.count(self.fault)
            return seen[-2]
        return answer

    def _stall(self, longest: float = 60.0) -> None:
        """Say nothing until the other side gives up."""
        began = time.monotonic()
        while time.monotonic() - began < longest and not self.server.stopping.is_set():
            readable, _, _ = select.select([self.connection], [], [], 0.05)
            if readable and not self._drained():
                return

    def _drained(self) -> bool:
        """Whether the other side is still there; a stalled server takes no more of its bytes."""
        try:
            if not self.connection.recv(1, socket.MSG_PEEK):
                return False
        except OSError:
            return False
        # Unread bytes hide a hang-up; the kernel still tells it apart
        poll = select.poll()
        poll.register(self.connection, select.POLLRDHUP | select.POLLHUP | select.POLLERR)
        return not poll.poll(50)

    def _reset(self) -> None:
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True

    # The wire

    def _receive(self, length: int) -> bytes:
        parts = []
        while length > 0:
            part = self.rfile.read(min(BLOCK, length))
            if not part:
                raise ConnectionResetError("the client is gone")
            self.proxy.pace(len(part))
            parts.append(part)
            length -= len(part)
        return b"".join(parts)

    def _answer(
        self, status: int, headers: dict[str, str], body: bytes, length: int | None = None
    ) -> None:
        self.send_response_only(status)
        dropped = ("content-length", "transfer-encoding", "connection")
        for name, value in headers.items():
            if name.lower() not in dropped:
                self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        for start in range(0, len(body), BLOCK):
            part = body[start : start + BLOCK]
            self.proxy.pace(len(part))
            self.wfile.write(part)
        self.wfile.flush()
