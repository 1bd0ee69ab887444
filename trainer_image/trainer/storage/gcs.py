"""``gs://`` locations: resumable uploads, ranged downloads, retries and conditional writes.

Everything goes through the public interface of google-cloud-storage, except the chunks of an
upload, which follow the documented protocol of resumable uploads
(https://cloud.google.com/storage/docs/performing-resumable-uploads). After a fault `_Session` asks
the server how much it holds and goes on from there; the client's own upload repeats the whole
chunk, and gives up if part of it had arrived.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import datetime
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from trainer.runtime.errors import LiquidError, StorageError, UsageError
from trainer.runtime.log import log
from trainer.runtime.messages import one_line
from trainer.storage.base import (
    CLAIM,
    KIB,
    Entry,
    Sightings,
    StorageMissingError,
    TransferPolicy,
    check_name,
    conflict,
    describe_writer,
    too_large,
    too_many,
    usable_names,
    usable_paths,
)
from trainer.storage.files import (
    atomic_write,
    crc32c_of,
    crc32c_of_bytes,
    open_regular,
    os_errors,
)

try:
    import requests
    from google.api_core import exceptions, retry
    from google.auth import exceptions as auth_exceptions
    from google.cloud import storage
    from urllib3.exceptions import HTTPError
except ImportError:
    raise UsageError(
        "gs:// paths need google-cloud-storage, which is not installed:"
        " pip install 'liquid-annealing[cloud]'"
    ) from None

Result = TypeVar("Result")

# Up to this size one request is enough, and a lost one costs little
_SINGLE_REQUEST = 256 * KIB

# Of one location, kept for the next request
_CONNECTIONS = 32

# Whole transfers begun anew: the server forgot the session, or the object changed meanwhile
_RESTARTS = 5

# A copy that arrives damaged this often is damaged at its source
_DAMAGED = 3

_BUCKET = re.compile(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]")


class _Transient(Exception):
    """A fault of the connection that the client does not know as one."""


class _SessionLost(Exception):
    """The server no longer knows a resumable upload."""


class _Damaged(Exception):
    """Bytes arrived other than they were sent."""


_PASSING = (
    exceptions.TooManyRequests,
    exceptions.InternalServerError,
    exceptions.BadGateway,
    exceptions.ServiceUnavailable,
    exceptions.GatewayTimeout,
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
    requests.exceptions.JSONDecodeError,
    HTTPException,
    HTTPError,
    ConnectionError,
    _Transient,
)


class BucketLocation:
    """The objects directly below ``gs://bucket/prefix``. See `trainer.storage.base.Location`.

    Every object carries its writer and a number unique to the write as custom metadata. They tell
    a retried write that its first attempt arrived, its answer being lost, from another job's.
    """

    def __init__(self, uri: str, policy: TransferPolicy) -> None:
        bucket, _, prefix = uri.removeprefix("gs://").strip("/").partition("/")
        if not _BUCKET.fullmatch(bucket):
            raise UsageError(f"{uri!r}: {bucket!r} is not the name of a bucket")
        if prefix and any(part in ("", ".", "..") for part in prefix.split("/")):
            raise UsageError(f"{uri!r}: a path in a bucket has no empty, '.' or '..' parts")
        self._bucket_name = bucket
        self._prefix = f"{prefix}/" if prefix else ""
        self._uri = f"gs://{bucket}/{prefix}".rstrip("/")
        self._policy = policy
        self._timeout = (policy.connect_timeout, policy.read_timeout)
        self._sightings = Sightings()
        self._id = secrets.token_hex(8)
        self._claimed = False
        self._former = self._id
        """Who had claimed the location before; its last writes may be replaced."""
        self._answered = False
        self._connecting = threading.Lock()
        self._connected: storage.Client | None = None

    @property
    def uri(self) -> str:
        """The prefix, without a slash at the end."""
        return self._uri

    def child(self, name: str) -> str:
        """The full URI of a name."""
        return f"{self._uri}/{name}"

    def walk(self, *, most: int) -> list[Entry]:
        """See `Location.walk`."""
        found = self._listed(max_results=most + 1)
        if len(found) > most:
            raise too_many(self._uri, most)
        names = sorted(name for name in found if name and not name.endswith("/"))
        return [_entry(name, found[name]) for name in usable_paths(names, self._uri)]

    def list(self) -> list[Entry]:
        """See `Location.list`."""
        found = self._listed(delimiter="/")
        # A "directory" made by a file browser is an object named like the prefix itself
        found.pop("", None)
        entries = [_entry(name, found[name]) for name in usable_names(sorted(found), self._uri)]
        claims = [_entry(CLAIM, found[CLAIM])] if CLAIM in found else []
        self._sightings.first_listing([*claims, *entries])
        return entries

    def _listed(self, **options: Any) -> dict[str, Any]:
        """The objects of a listing, by their names without the prefix."""

        def pages() -> dict[str, Any]:
            found = self._client().list_blobs(
                self._bucket_name,
                prefix=self._prefix,
                fields="items(name,size,crc32c,generation,updated),nextPageToken",
                retry=None,
                timeout=self._timeout,
                **options,
            )
            return {blob.name[len(self._prefix) :]: blob for blob in found}

        try:
            return self._retrying("listing", self._uri, pages)
        except exceptions.NotFound:
            raise self._no_bucket() from None

    def stat(self, name: str, *, checksum: bool = False) -> Entry:
        """See `Location.stat`; Cloud Storage always knows the checksum."""
        entry = _entry(name, self._look(check_name(name)))
        self._sightings.look(entry)
        return entry

    def read_bytes(self, name: str, *, limit: int) -> bytes:
        """See `Location.read_bytes`."""

        def whole(entry: Entry) -> bytes:
            if entry.size > limit:
                raise too_large(self.child(name), entry.size, limit)
            buffer = bytearray(entry.size)

            def write_at(data: bytes, offset: int) -> None:
                buffer[offset : offset + len(data)] = data

            self._download(entry, write_at)
            if crc32c_of_bytes(bytes(buffer)) != entry.crc32c:
                raise _Damaged
            return bytes(buffer)

        return self._reading(name, whole)[1]

    def get(self, name: str, destination: Path, *, limit: int | None = None) -> Entry:
        """See `Location.get`."""

        def to_file(entry: Entry) -> None:
            if limit is not None and entry.size > limit:
                raise too_large(self.child(name), entry.size, limit)
            with atomic_write(destination) as file:
                file.truncate(entry.size)
                handle = file.fileno()

                def write_at(data: bytes, offset: int) -> None:
                    while data:
                        written = os.pwrite(handle, data, offset)
                        data, offset = data[written:], offset + written

                self._download(entry, write_at)
                if crc32c_of(file) != entry.crc32c:
                    raise _Damaged

        return self._reading(name, to_file)[0]

    def read_range(self, entry: Entry, start: int, size: int) -> bytes:
        """See `Location.read_range`; one request."""
        buffer = bytearray(size)

        def write_at(data: bytes, offset: int) -> None:
            buffer[offset - start : offset - start + len(data)] = data

        part, uri = _Range(write_at, start, start + size), self.child(entry.name)
        try:
            request = partial(self._fetch, entry, part)
            self._retrying("downloading", uri, request, lambda: part.position)
        except exceptions.NotFound:
            raise StorageMissingError(
                f"{uri} is gone, or is another object by now than it was at first"
            ) from None
        return bytes(buffer)

    def put(self, path: Path, name: str) -> Entry:
        """See `Location.put`."""
        return self.adopt(path, name, crc32c_of(path))

    def put_bytes(self, data: bytes, name: str) -> Entry:
        """See `Location.put_bytes`."""
        return self._write(io.BytesIO(data), len(data), crc32c_of_bytes(data), check_name(name))

    def adopt(self, path: Path, name: str, crc32c: str) -> Entry:
        """See `Location.adopt`; the file is uploaded, and stays."""
        with os_errors("reading", path):
            file = open_regular(path)
        with file:
            size = os.fstat(file.fileno()).st_size
            return self._write(file, size, crc32c, check_name(name))

    def copy(self, original: Entry, name: str) -> Entry:
        """See `Location.copy`; the server copies, under the same conditions as an upload."""
        assert original.crc32c is not None
        source = self._blob(original.name)

        def rewrite(blob: storage.Blob, expected: int) -> Entry:
            blob.content_type = "application/octet-stream"
            copied = partial(
                blob.rewrite,
                source,
                if_generation_match=expected,
                if_source_generation_match=original.generation,
                retry=None,
                timeout=self._timeout,
            )
            token = None
            while True:  # across storage classes a large object takes several requests
                request = partial(copied, token=token)
                token, _, _ = self._retrying("copying to", self.child(name), request)
                if token is None:
                    return _entry(name, blob)

        return self._create(check_name(name), original.size, original.crc32c, rewrite, original)

    def delete(self, name: str) -> None:
        """See `Location.delete`."""
        self._remove(check_name(name))

    def claim(self) -> None:
        """See `Location.claim`."""
        if not self._claimed:
            with contextlib.suppress(StorageMissingError):
                self._former = (self._look(CLAIM).metadata or {}).get("location", self._id)
        self._write(io.BytesIO(), 0, crc32c_of_bytes(b""), CLAIM)
        self._claimed = True

    def check_writable(self) -> None:
        """Write, replace and remove a small object: bucket, network and each right are tried.

        An account that may only create objects leaves the probe there, which no listing shows.
        """
        probe = f".probe-{self._id}"
        for data in (b"1", b"2"):
            self._write(io.BytesIO(data), len(data), crc32c_of_bytes(data), probe)
        self._remove(probe)

    # Writing

    def _write(self, file: BinaryIO, size: int, crc32c: str, name: str) -> Entry:
        def send(blob: storage.Blob, expected: int) -> Entry:
            # The server compares and refuses
            blob.crc32c = crc32c
            return self._send(name, blob, file, size, expected)

        return self._create(name, size, crc32c, send)

    def _create(
        self,
        name: str,
        size: int,
        crc32c: str,
        send: Callable[[storage.Blob, int], Entry],
        original: Entry | None = None,
    ) -> Entry:
        """Make an object, unless somebody else changed what has its name.

        Args:
            name: of the object.
            size: of its content.
            crc32c: of its content.
            send: one try, given the object and the generation that it may replace.
            original: what the content is copied from, where it is not sent.
        """
        write_id = secrets.token_hex(8)
        for attempt in range(1, _RESTARTS + 1):
            expected = self._sightings.expected(name)
            blob = self._blob(name)
            blob.metadata = {"writer": describe_writer(), "location": self._id, "write": write_id}
            try:
                entry = send(blob, expected)
            except exceptions.PreconditionFailed:
                arrived = self._arrived(name, write_id, crc32c)
                if arrived is None:
                    self._check_there(original)
                    continue
                entry = arrived
            except _SessionLost:
                log.warning("%s: the server lost the upload; starting anew", self.child(name))
                continue
            except _Damaged:
                self._arrived_damaged(name, attempt)
                continue
            except exceptions.NotFound:
                self._check_there(original)
                raise self._no_bucket() from None
            self._sightings.wrote(name, entry.generation)
            if (entry.size, entry.crc32c) == (size, crc32c):
                return entry
            self.delete(name)
            self._arrived_damaged(name, attempt)
        raise StorageError(f"uploading {self.child(name)} failed {_RESTARTS} times from its start")

    def _check_there(self, original: Entry | None) -> None:
        """Raise `StorageMissingError` if what is to be copied is gone, or another one by now."""
        if original is None:
            return
        if int(self._look(original.name).generation) != original.generation:
            uri = self.child(original.name)
            raise StorageMissingError(f"{uri} is another object by now than the one to copy")

    def _send(
        self, name: str, blob: storage.Blob, file: BinaryIO, size: int, expected: int
    ) -> Entry:
        uri = self.child(name)
        if size <= _SINGLE_REQUEST:
            file.seek(0)
            data = file.read(size)

            def send() -> storage.Blob:
                blob.upload_from_string(
                    data,
                    content_type="application/octet-stream",
                    if_generation_match=expected,
                    checksum=None,
                    retry=None,
                    timeout=self._timeout,
                )
                return blob

            return _entry(name, self._retrying("uploading", uri, send))
        url = self._begin(blob, size, expected)
        with requests.Session() as http:
            session = _Session(http, url, file, size, self._policy)
            # However long the file takes: what ends it is a silence, or answers without progress
            done = self._retrying("uploading", uri, session.finish, lambda: session.furthest)
        return _entry_of_resource(name, done)

    def _begin(self, blob: storage.Blob, size: int, expected: int) -> str:
        """The URL of a new resumable upload; the URL alone entitles to send its chunks."""
        begin = partial(
            blob.create_resumable_upload_session,
            content_type="application/octet-stream",
            size=size,
            if_generation_match=expected,
            checksum=None,
            retry=None,
            timeout=self._timeout,
        )
        return self._retrying("uploading", f"gs://{self._bucket_name}/{blob.name}", begin)

    def _arrived(self, name: str, write_id: str, crc32c: str) -> Entry | None:
        """After a refusal: the object, if it is this very write; None to try again."""
        try:
            blob = self._look(name)
        except StorageMissingError:
            self._sightings.wrote(name, 0)  # removed by somebody; nothing would be overwritten
            return None
        entry = _entry(name, blob)
        if (blob.metadata or {}).get("write") == write_id and entry.crc32c == crc32c:
            return entry
        self._refuse_foreign(name, blob)
        return None

    def _refuse_foreign(self, name: str, blob: storage.Blob) -> None:
        """Raise unless the object is an earlier write of this location whose answer was lost.

        Or one of the job that has lost the location to this one.
        """
        metadata = blob.metadata or {}
        if metadata.get("location") not in (self._id, self._id if name == CLAIM else self._former):
            writer = metadata.get("writer", "a program that left no name")
            raise conflict(self.child(name), writer, blob.updated.timestamp())
        self._sightings.wrote(name, blob.generation)

    def _remove(self, name: str) -> None:
        for _ in range(_RESTARTS):
            try:
                blob = self._look(name)
            except StorageMissingError:
                self._sightings.wrote(name, 0)
                return
            entry = _entry(name, blob)
            self._sightings.look(entry)
            if entry.generation != self._sightings.expected(name):
                self._refuse_foreign(name, blob)
            remove = partial(
                self._blob(name).delete,
                if_generation_match=entry.generation,
                retry=None,
                timeout=self._timeout,
            )
            try:
                self._retrying("removing", self.child(name), remove)
            except (exceptions.NotFound, exceptions.PreconditionFailed):
                continue  # an answer was lost or somebody was faster; the next look tells
            self._sightings.wrote(name, 0)
            return
        raise StorageError(f"removing {self.child(name)} failed: it changes all the time")

    def _arrived_damaged(self, name: str, attempt: int) -> None:
        if attempt >= _DAMAGED:
            raise StorageError(
                f"{self.child(name)} arrived damaged {attempt} times, its CRC32C another than that"
                " of what was sent; is the local file being changed?"
            )
        log.warning("%s arrived damaged; uploading it again", self.child(name))

    # Reading

    def _reading(self, name: str, read: Callable[[Entry], Result]) -> tuple[Entry, Result]:
        """Read one generation of an object, anew if it is replaced or arrives damaged."""
        damaged = 0
        for _ in range(_RESTARTS):
            entry = self.stat(name)
            try:
                return entry, read(entry)
            except exceptions.NotFound:
                log.info("%s was replaced while being read; reading it anew", self.child(name))
            except _Damaged:
                damaged += 1
                log.warning("%s arrived damaged; reading it anew", self.child(name))
                if damaged == _DAMAGED:
                    raise StorageError(
                        f"{self.child(name)} arrived damaged {damaged} times: its content does"
                        f" not have the CRC32C {entry.crc32c} that Cloud Storage gives for it"
                    ) from None
        raise StorageError(f"reading {self.child(name)} failed: it changes all the time")

    def _download(self, entry: Entry, write_at: Callable[[bytes, int], None]) -> None:
        step = self._policy.range_bytes
        ranges = [
            _Range(write_at, start, min(start + step, entry.size))
            for start in range(0, entry.size, step)
        ]
        uri = self.child(entry.name)

        def fetch(part: _Range) -> None:
            request = partial(self._fetch, entry, part)
            self._retrying("downloading", uri, request, lambda: part.position)

        if len(ranges) <= 1:
            for part in ranges:
                fetch(part)
            return
        with ThreadPoolExecutor(min(self._policy.threads, len(ranges)), "download") as pool:
            futures = [pool.submit(fetch, part) for part in ranges]
            try:
                for future in futures:
                    future.result()
            finally:
                pool.shutdown(cancel_futures=True)

    def _fetch(self, entry: Entry, part: _Range) -> None:
        """Fetch what a range still lacks, from the generation that was looked at."""
        if part.position == part.end:
            return  # the fault before this try came after the last byte
        blob = self._bucket().blob(self._prefix + entry.name, generation=entry.generation)
        blob.download_to_file(
            part,
            start=part.position,
            end=part.end - 1,
            raw_download=True,
            checksum=None,
            retry=None,
            timeout=self._timeout,
        )
        if part.position < part.end:
            raise _Transient(f"the answer ended {part.end - part.position} bytes early")

    # Requests

    def _client(self) -> storage.Client:
        with self._connecting:
            if self._connected is None:
                # No request needs a project, so that its absence is no reason to fail
                project = os.environ.get("GOOGLE_CLOUD_PROJECT")
                self._connected = storage.Client(project=project)
                # By default it keeps 10 connections, and begins a new one for each further thread
                for scheme in ("https://", "http://"):
                    adapter = requests.adapters.HTTPAdapter(pool_maxsize=_CONNECTIONS)
                    self._connected._http.mount(scheme, adapter)
            return self._connected

    def _bucket(self) -> storage.Bucket:
        return self._client().bucket(self._bucket_name)

    def _blob(self, name: str) -> storage.Blob:
        with self._translated("reaching", self._uri):
            return self._bucket().blob(self._prefix + name)

    def _look(self, name: str) -> storage.Blob:
        """The object's current metadata.

        Raises:
            StorageMissingError: there is no such object, or no such bucket.
        """

        def reload() -> storage.Blob:
            blob = self._bucket().blob(self._prefix + name)
            blob.reload(retry=None, timeout=self._timeout)
            return blob

        try:
            return self._retrying("reading", self.child(name), reload)
        except exceptions.NotFound as error:
            if "specified bucket" in _server_message(error):
                raise self._no_bucket() from None
            raise StorageMissingError(f"{self.child(name)} does not exist") from None

    def _no_bucket(self) -> StorageMissingError:
        return StorageMissingError(
            f"the bucket gs://{self._bucket_name} does not exist; check the name or create it"
        )

    def _retrying(
        self,
        action: str,
        uri: str,
        request: Callable[[], Result],
        position: Callable[[], int] = int,
    ) -> Result:
        """The result of a request, repeated after passing faults with growing waits.

        Args:
            action: what is being done to `uri`, for messages.
            uri: the object or location.
            request: one try; it goes on from where the one before it got.
            position: how far the tries have got, in bytes. Whenever it has grown, waits and
                deadline start anew.

        Raises:
            StorageError: it made no progress before the deadline, or cannot succeed.
            google.api_core.exceptions.NotFound: left to the caller, who knows what is missing.
            google.api_core.exceptions.PreconditionFailed: left to the caller.
            _Damaged: the server found another CRC32C than it was told.
        """
        policy = self._policy
        deadline = policy.deadline if self._answered else policy.first_deadline
        reached = -1
        with self._translated(action, uri):
            while True:
                try:
                    result = request()
                    break
                except Exception as error:  # `_is_passing` tells which are tried again
                    if not _is_passing(error):
                        raise
                    if position() > reached:
                        reached, since = position(), time.monotonic()
                        waits = retry.exponential_sleep_generator(
                            policy.first_delay, policy.longest_delay
                        )
                    wait = next(waits)
                    if time.monotonic() + wait > since + deadline:
                        raise StorageError(
                            f"{action} {uri} was given up after repeated tries: {_one_line(error)}"
                        ) from None
                    log.warning("%s %s: %s; trying again", action, uri, _one_line(error))
                    time.sleep(wait)
        self._answered = True
        return result

    @contextmanager
    def _translated(self, action: str, uri: str) -> Iterator[None]:
        try:
            yield
        except (exceptions.NotFound, exceptions.PreconditionFailed):
            self._answered = True
            raise
        except exceptions.BadRequest as error:
            # Provided CRC32C "…" doesn't match calculated CRC32C "…"
            if "doesn't match calculated" in _server_message(error):
                raise _Damaged from None
            raise _explained(action, uri, error) from None
        except (
            exceptions.GoogleAPIError,
            auth_exceptions.GoogleAuthError,
            requests.RequestException,
        ) as error:
            raise _explained(action, uri, error) from None


class _Session:
    """One resumable upload, sent chunk by chunk from where the server stands."""

    def __init__(
        self, http: requests.Session, url: str, file: BinaryIO, size: int, policy: TransferPolicy
    ) -> None:
        self._http, self._url, self._file, self._size = http, url, file, size
        self._chunk = policy.chunk_bytes
        self._timeout = (policy.connect_timeout, policy.read_timeout)
        self._offset = 0
        self._offset_known = True
        self.furthest = 0
        """bytes that the server has said to hold, at most"""

    def finish(self) -> dict[str, Any]:
        """Send what the server lacks; the object's resource. Called again, it goes on.

        Raises:
            _Transient: the server took nothing of a chunk.
            _SessionLost: the server does not know the upload any more.
            google.api_core.exceptions.GoogleAPICallError: any other refusal.
        """
        while True:
            was_chunk = self._offset_known
            done = self._advance()
            if done is not None:
                return done
            if was_chunk and self._offset <= self.furthest:
                raise _Transient(f"the server took nothing beyond byte {self.furthest}")
            self.furthest = max(self.furthest, self._offset)

    def _advance(self) -> dict[str, Any] | None:
        """One request, a chunk or the question where the server stands; the end's resource."""
        if self._offset_known:
            end = min(self._offset + self._chunk, self._size)
            content_range = f"bytes {self._offset}-{end - 1}/{self._size}"
            body: _Span | bytes = _Span(self._file, self._offset, end)
        else:
            content_range, body = f"bytes */{self._size}", b""
        # Whatever goes wrong from here on, part of the chunk may have arrived
        self._offset_known = False
        response = self._http.put(
            self._url,
            data=body,
            headers={"Content-Range": content_range},
            timeout=self._timeout,
            allow_redirects=False,
        )
        if response.status_code in (200, 201):
            return response.json()
        if response.status_code in (404, 410):
            raise _SessionLost
        if response.status_code != 308:
            raise exceptions.from_http_response(response)
        self._offset = _bytes_held(response)
        self._offset_known = True
        return None


class _Span:
    """Part of a file as a request body that is read in small blocks.

    Sent as one piece of memory, a chunk would have to pass within a single socket timeout.
    """

    def __init__(self, file: BinaryIO, start: int, end: int) -> None:
        self._file, self._left = file, end - start
        self._size = end - start
        file.seek(start)

    def __len__(self) -> int:
        return self._size

    def __iter__(self) -> Iterator[bytes]:
        while block := self.read(64 * KIB):
            yield block

    def read(self, amount: int = -1) -> bytes:
        """The next bytes, at most `amount` of them."""
        block = self._file.read(min(self._left, amount) if amount >= 0 else self._left)
        if not block and self._left:
            raise StorageError("the file got shorter while it was being uploaded")
        self._left -= len(block)
        return block


class _Range:
    """Where one ranged download puts its bytes: `position` up to `end`, never beyond."""

    def __init__(self, write_at: Callable[[bytes, int], None], start: int, end: int) -> None:
        self._write_at = write_at
        self.position, self.end = start, end

    def write(self, data: bytes) -> int:
        """Take the next bytes of an answer."""
        if self.position + len(data) > self.end:
            raise _Transient("the answer has more bytes than were asked for")
        self._write_at(data, self.position)
        self.position += len(data)
        return len(data)


def _entry(name: str, blob: storage.Blob) -> Entry:
    updated = blob.updated.timestamp()
    return Entry(name, int(blob.size), blob.crc32c, int(blob.generation), updated)


def _entry_of_resource(name: str, resource: dict[str, Any]) -> Entry:
    updated = datetime.fromisoformat(resource["updated"].replace("Z", "+00:00")).timestamp()
    size, generation = int(resource["size"]), int(resource["generation"])
    return Entry(name, size, resource.get("crc32c"), generation, updated)


def _bytes_held(response: requests.Response) -> int:
    """How much of an upload the server has, from the answer to a chunk or a question."""
    held = response.headers.get("Range")
    if held is None:
        return 0
    match = re.fullmatch(r"bytes=0-(\d+)", held)
    if match is None:
        raise _Transient(f"the answer has the range {held!r}")
    return int(match[1]) + 1


def _is_passing(error: Exception) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, auth_exceptions.GoogleAuthError):
        return bool(error.retryable)
    if isinstance(error, exceptions.GoogleAPICallError) and error.code == 408:
        return True
    return isinstance(error, _PASSING)


def _one_line(error: BaseException) -> str:
    """The heart of an error, without the layers that the libraries wrap around it."""
    if isinstance(error, exceptions.GoogleAPICallError):
        return f"HTTP {error.code}: {_server_message(error)}"
    if isinstance(error, requests.RequestException) and error.args:
        reason = getattr(error.args[0], "reason", None) or error.args[0]
        if isinstance(reason, HTTPError) and isinstance(reason.args[-1], Exception):
            reason = reason.args[-1]
        host = urlsplit(getattr(error.request, "url", "") or "").netloc
        return f"no answer from {host or 'the server'}: {str(reason).rsplit(': ', 1)[-1]}"
    return one_line(error)


def _server_message(error: exceptions.GoogleAPICallError) -> str:
    """What the server said; the client puts the request's method and URL before it."""
    try:
        return str(error.response.json()["error"]["message"])
    except (AttributeError, ValueError, KeyError, TypeError, RuntimeError):
        text = " ".join(str(error.message).split())
        return re.sub(r"^[A-Z]+ \S+: |: \('Request failed with .*", "", text)


def _explained(action: str, uri: str, error: Exception) -> LiquidError:
    """A lasting failure as one line with the way out."""
    line = _one_line(error)
    no_credentials = auth_exceptions.DefaultCredentialsError
    refused = (auth_exceptions.GoogleAuthError, exceptions.Unauthorized)
    if isinstance(error, no_credentials) and not isinstance(
        error, auth_exceptions.InvalidOperation
    ):
        return StorageError(
            f"{action} {uri} failed: there are no Google credentials; run `gcloud auth"
            " application-default login` or set GOOGLE_APPLICATION_CREDENTIALS"
        )
    if isinstance(error, refused):
        return StorageError(
            f"{action} {uri} failed: the Google credentials are not accepted ({line}); renew them"
            " with `gcloud auth application-default login`"
        )
    if isinstance(error, exceptions.Forbidden):
        return StorageError(
            f"{action} {uri} failed: permission denied ({line}); grant this account the role"
            " Storage Object User on the bucket"
        )
    return StorageError(f"{action} {uri} failed: {line}")
