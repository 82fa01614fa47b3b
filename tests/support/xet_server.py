"""The Hub of `hub_server` with Xet: files arrive as chunks in xorbs and are named by shards, as hf_xet sends them.

    with serving(XetHandler) as hub:
        hub.xet.xorbs                  # hash -> serialized chunks, as they arrived
        hub.xet.files                  # Xet's hash of a file -> its terms (xorb, first chunk, end, bytes)

A shard is accepted if its files, put together again from the chunks of the xorbs, have the SHA-256 that it states. What
is served is the documented protocol of version 1 (huggingface.co/docs/xet): tokens, xorbs, shards, deduplication,
reconstruction. Requests of later protocols (`/v1/xorb-grants`, `/v2/...`) get a 404, upon which hf_xet uses this one.
Keyed BLAKE3, the hash of chunks, is not computed here; hf_xet computes it and asks for files and chunks by it.
"""

import hashlib
import json
import re
import struct
import time
from dataclasses import dataclass, field

import pyarrow as pa

from .hub_server import REPO, ROUTES, Handler

HEAD, ENTRY = 48, 48
END = b"\xff" * 32 + bytes(16)
VERIFIED, WITH_SHA = 1 << 31, 1 << 30


def text(digest):
    """A hash as Xet writes it: four little-endian numbers."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", digest))


def chunks_of(xorb):
    """(offset, end, content) of every chunk of a serialized xorb."""
    found, at = [], 0
    while at < len(xorb):
        version, kind, size = xorb[at], xorb[at + 4], int.from_bytes(xorb[at + 5 : at + 8], "little")
        end = at + 8 + int.from_bytes(xorb[at + 1 : at + 4], "little")
        assert version == 0 and end <= len(xorb), "not a xorb"
        data = xorb[at + 8 : end]
        if kind:
            data = bytes(pa.Codec("lz4").decompress(data, size))
        found.append((at, end, ungrouped(data) if kind == 2 else data))
        at = end
    return found


def ungrouped(data):
    """Bytes that were grouped by their position within four, in their order."""
    out, at = bytearray(len(data)), 0
    for i in range(4):
        count = len(out[i::4])
        out[i::4] = data[at : at + count]
        at += count
    return bytes(out)


def read_shard(shard):
    """Files, as {hash: (terms, SHA-256)}, and blocks, as {hash of a xorb: (bytes of the block, hashes of chunks)}."""
    files, blocks, at = {}, {}, HEAD
    while shard[at : at + ENTRY] != END:
        flags, count = struct.unpack_from("<2I", shard, at + 32)
        assert flags & VERIFIED and flags & WITH_SHA, "a file without its hashes"
        terms = []
        for i in range(1, count + 1):
            start = at + i * ENTRY
            _, size, first, end = struct.unpack_from("<4I", shard, start + 32)
            terms.append((text(shard[start : start + 32]), first, end, size))
        told = at + (1 + 2 * count) * ENTRY
        files[text(shard[at : at + 32])] = (terms, text(shard[told : told + 32]))
        at = told + ENTRY
    at += ENTRY
    while shard[at : at + ENTRY] != END:
        (count,) = struct.unpack_from("<I", shard, at + 36)
        end = at + (1 + count) * ENTRY
        hashes = [text(shard[i : i + 32]) for i in range(at + ENTRY, end, ENTRY)]
        blocks[text(shard[at : at + 32])] = (shard[at:end], hashes)
        at = end
    return files, blocks


@dataclass
class Store:
    xorbs: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)
    blocks: dict = field(default_factory=dict)
    granted: dict = field(default_factory=dict)  # grant -> bytes
    placed: dict = field(default_factory=dict)  # grant -> content
    hashes: dict = field(default_factory=dict)  # SHA-256 of a file -> Xet's hash
    head: bytes = b""

    def content(self, terms):
        """A file, from the chunks of its terms."""
        parts = []
        for xorb, first, end, size in terms:
            part = b"".join(data for _, _, data in chunks_of(self.xorbs[xorb])[first:end])
            assert len(part) == size, "a term that is not as long as it states"
            parts.append(part)
        return b"".join(parts)

    def accept(self, shard):
        """Takes a shard in; returns {SHA-256: content} of its files."""
        files, blocks = read_shard(shard)
        found = {}
        for name, (terms, sha) in files.items():
            content = self.content(terms)
            digest = hashlib.sha256(content).hexdigest()
            assert digest == sha, "a file that is not as its hash states"
            found[digest], self.files[name], self.hashes[digest] = content, terms, name
        self.blocks |= blocks
        self.head = shard[:40]
        return found

    def about(self, chunk):
        """A shard that tells where a chunk lies, or None."""
        known = [block for block, hashes in self.blocks.values() if chunk in hashes]
        if not known:
            return None
        body = self.head + struct.pack("<Q", 200) + END + b"".join(known) + END
        now = int(time.time())
        sections = struct.pack("<3Q", 1, HEAD, HEAD + ENTRY) + bytes(48) + bytes(32)
        return body + sections + struct.pack("<2Q", now, now + 3600) + bytes(72) + struct.pack("<Q", len(body))

    def plan(self, terms, first, last, url):
        """How bytes `first` to `last` of a file are fetched: the answer to a query of a reconstruction."""
        kept, fetched, at, skipped = [], {}, 0, 0
        for xorb, start, end, size in terms:
            if at + size > first and at <= last:
                skipped = max(0, first - at) if not kept else skipped
                chunks = chunks_of(self.xorbs[xorb])
                kept.append({"hash": xorb, "unpacked_length": size, "range": {"start": start, "end": end}})
                where = {"start": chunks[start][0], "end": chunks[end - 1][1] - 1}
                entry = {"range": {"start": start, "end": end}, "url": f"{url}/_xorb/{xorb}", "url_range": where}
                fetched.setdefault(xorb, []).append(entry)
            at += size
        return {"offset_into_first_range": skipped, "terms": kept, "fetch_info": fetched}


class XetHandler(Handler):
    def setup(self):
        super().setup()
        if not hasattr(self.server, "xet"):
            self.server.xet = Store()

    def token(self, body, kind, repo, scope, revision):
        where = {"casUrl": self.server.url, "accessToken": f"xet-{scope}", "exp": int(time.time()) + 3600}
        names = zip(("Cas-Url", "Access-Token", "Token-Expiration"), where.values(), strict=True)
        self.answer(200, where, {f"X-Xet-{name}": str(value) for name, value in names})

    def may(self, scope):
        """Whether the request has a token of this scope; if not, it is answered."""
        told = self.headers.get("Authorization")
        if told in (f"Bearer xet-{scope}", "Bearer xet-write"):
            return True
        self.answer(401 if told is None else 403, {"error": f"no token to {scope}"})
        return False

    def grant(self, body, name):
        """A place to put a xorb, or the news that it is here."""
        if not self.may("write"):
            return
        if name in self.server.xet.xorbs:
            self.answer(200, {})
            return
        self.server.xet.granted[name] = json.loads(body)["length"]
        place = {"id": name, "method": "PUT", "url": f"{self.server.url}/_grant/{name}", "headers": {}}
        self.answer(201, place)

    def put(self, body, name):
        """A xorb that comes to its place, without a token; it counts when it is committed."""
        self.server.xet.placed[name] = body
        self.answer(200, b"")

    def committed(self, body, name, grant):
        if self.may("write"):
            content = self.server.xet.placed.pop(grant, None)
            if content is None or len(content) != self.server.xet.granted[grant]:
                self.answer(404, {"error": "nothing came"})
                return
            self.xorb(content, name)

    def xorb(self, body, name):
        if self.may("write"):
            chunks_of(body)
            is_new = name not in self.server.xet.xorbs
            self.server.xet.xorbs[name] = body
            self.answer(200, {"was_inserted": is_new})

    def shard(self, body):
        if self.may("write"):
            try:
                self.server.objects |= self.server.xet.accept(body)
            except (AssertionError, KeyError) as error:
                self.answer(400, {"error": str(error)})
                return
            self.answer(200, {"result": 1})

    def chunk(self, body, name):
        if self.may("read"):
            found = self.server.xet.about(name)
            self.answer(200 if found else 404, found or {"error": "unknown chunk"})

    def reconstruction(self, body, name):
        if not self.may("read"):
            return
        terms = self.server.xet.files.get(name)
        if terms is None:
            self.answer(404, {"error": "unknown file"})
            return
        total = sum(size for *_, size in terms)
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "bytes=0-")
        first, last = int(wanted[1]), int(wanted[2] or total)
        if first >= total:
            self.answer(416, {"error": "past the end"})
            return
        self.answer(200, self.server.xet.plan(terms, first, last, self.server.url))

    def fetch(self, body, name):
        content = self.server.xet.xorbs[name]
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers["Range"])
        first, last = int(wanted[1]), int(wanted[2])
        self.answer(206, content[first : last + 1], {"Content-Range": f"bytes {first}-{last}/{len(content)}"})

    def discuss(self, body, kind, repo):
        """Opens a pull request, to which files are committed later."""
        asked, (found, branch) = json.loads(body), self.files(kind, repo, "main")
        number = sum(name.startswith("refs/pr/") for name in found.branches) + 1
        found.branches[f"refs/pr/{number}"] = dict(found.branches[branch])
        self.discussion(body, kind, repo, str(number), asked["title"])

    def discussion(self, body, kind, repo, number, title="a change"):
        about = {"title": title, "num": int(number), "status": "draft", "isPullRequest": True, "events": []}
        where = {"repo": {"name": repo, "type": kind[:-1]}, "changes": {"base": "main"}, "filesWithConflicts": []}
        self.answer(200, {**about, **where, "createdAt": "2026-01-01T00:00:00.000Z", "author": {"name": "me"}})

    def telemetry(self, body):
        self.answer(200, {})

    def stored(self, kind, repo, revision, content):
        """Of a file that came by Xet: where its chunks are asked for."""
        name = self.server.xet.hashes.get(hashlib.sha256(content).hexdigest())
        if name is None:
            return {}
        link = f'<{self.server.url}/api/{kind}/{repo}/xet-read-token/{revision}>; rel="xet-auth"'
        return {"X-Xet-Hash": name, "Link": link, "X-Linked-Size": str(len(content))}

    routes = (
        (rf"{REPO}/xet-(?P<scope>read|write)-token/(?P<revision>[^/]+)", "token"),
        (rf"{REPO}/discussions", "discuss"),
        (rf"{REPO}/discussions/(?P<number>\d+)", "discussion"),
        (r"/v1/xorbs/default/(?P<name>\w{64})", "xorb"),
        (r"/v1/xorb-grants/default/(?P<name>\w{64})", "grant"),
        (r"/_grant/(?P<name>\w{64})", "put"),
        (r"/v1/xorb-commits/default/(?P<name>\w{64})/grant/(?P<grant>\w+)", "committed"),
        (r"/v1/shards", "shard"),
        (r"/v1/chunks/default(?:-merkledb)?/(?P<name>\w{64})", "chunk"),
        (r"/v1/reconstructions/(?P<name>\w{64})", "reconstruction"),
        (r"/v1/telemetry", "telemetry"),
        (r"/_xorb/(?P<name>\w{64})", "fetch"),
        *ROUTES,
    )
