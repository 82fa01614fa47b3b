"""Pushes through Xet: hf_xet cuts files into chunks, and a Hub on this machine puts them together again."""

import json
import os
import re

import pytest
from typer.testing import CliRunner

from hf_xent import cli, hub
from support import xet_server
from support.hub_process import elsewhere

pytestmark = pytest.mark.slow  # a process of its own
HEAD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [hf_xent]\n---\n# Model\n"
SETTINGS = {
    "HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1",
    "HF_XET_CLIENT_RETRY_BASE_DELAY": "10ms",
    "HF_XET_FIXED_UPLOAD_CONCURRENCY": "1",  # one block after another
}


@pytest.fixture(scope="module", name="elsewhere")
def _elsewhere(tmp_path_factory):
    pytest.importorskip("hf_xet", reason="huggingface_hub brings it on common platforms only")
    with elsewhere(tmp_path_factory.mktemp("home"), xet_server.XetHandler, xet=True, **SETTINGS) as found:
        yield found


@pytest.fixture
def folder(tmp_path):
    """Files of which each is compressed in another way."""
    made = tmp_path / "model"
    made.mkdir()
    (made / "README.md").write_text(HEAD)
    (made / "config.json").write_text("{}")
    (made / "model.safetensors").write_bytes(os.urandom(300_001))
    (made / "rows.parquet").write_bytes(b"the quick brown fox " * 20_000)
    (made / "numbers.bin").write_bytes(b"".join(i.to_bytes(3, "little") + b"\x3f" for i in range(50_001)))
    return made


def push(*arguments, **options):
    """The address, or the error's text."""
    try:
        return hub.push(*arguments, **options)
    except RuntimeError as error:
        return str(error)


def download(repo, folder):
    """Fetches a repository; the error's text if it is broken."""
    from huggingface_hub import snapshot_download

    try:
        snapshot_download(repo, local_dir=folder)
    except Exception as error:
        return str(error)


def published(folder):
    return {name: file.read_bytes() for name, file in hub.files(folder).items()}


@pytest.fixture(autouse=True)
def healthy(elsewhere):
    """No failure of one test is left for the next."""
    yield
    elsewhere.hub.faults.clear()


def requests(server, start=0):
    """The requests to the storage, without the hashes."""
    found = [(method, re.sub(r"/\w{64}", "", path)) for method, path in server.log[start:]]
    return [f"{method} {path}" for method, path in found if path.startswith(("/v", "/_"))]


def test_a_push_goes_in_chunks_and_comes_back(elsewhere, folder, tmp_path):
    server = elsewhere.hub
    assert elsewhere.run(push, folder, "me/chunked").startswith(server.url)
    assert elsewhere.files("me/chunked") == published(folder)
    assert kinds(server) == {"stored", "lz4", "grouped"}
    assert "PUT /_lfs" not in requests(server), "no file went past Xet"
    start = len(server.log)
    assert elsewhere.run(download, "me/chunked", tmp_path / "back") is None
    assert {name: (tmp_path / "back" / name).read_bytes() for name in published(folder)} == published(folder)
    assert requests(server, start).count("GET /v1/reconstructions") == 3 and "GET /_xorb" in requests(server, start)


def kinds(server):
    """Which compressions the chunks have that arrived."""
    xorbs = server.xet.xorbs.values()
    found = {xorb[start + 4] for xorb in xorbs for start, _, _ in xet_server.chunks_of(xorb)}
    return {("stored", "lz4", "grouped")[i] for i in found}


def publish(*arguments):
    """What `hf-xent publish` prints."""
    result = CliRunner().invoke(cli.app, ["publish", *map(str, arguments), "--json"], catch_exceptions=False)
    return json.loads(result.stdout)


def test_the_command_goes_through_xet(elsewhere, folder):
    found = elsewhere.run(publish, folder, "--repo-id", "me/command")
    assert found["address"].startswith(elsewhere.hub.url) and elsewhere.files("me/command") == published(folder)
    assert "POST /v1/shards" in requests(elsewhere.hub) and set(found["files"]) == set(published(folder))


def test_what_somebody_has_sent_is_not_sent_again(elsewhere, folder, tmp_path):
    """The chunks of another model, with new ones at the end."""
    elsewhere.run(push, folder, "me/first")
    weights, start = folder / "model.safetensors", len(elsewhere.hub.log)
    before = sum(map(len, elsewhere.hub.xet.xorbs.values()))
    weights.write_bytes(weights.read_bytes() + os.urandom(5000))
    assert elsewhere.run(push, folder, "me/second").startswith(elsewhere.hub.url)
    assert elsewhere.files("me/second") == published(folder)
    sent = sum(map(len, elsewhere.hub.xet.xorbs.values())) - before
    assert 5000 < sent < 5000 + 2 * 131_072, "the last chunk of before, and what is new"
    assert requests(elsewhere.hub, start).count("PUT /_grant") == 1


def test_the_same_command_goes_on_where_it_was_cut(elsewhere, folder):
    """The chunks have arrived, the list of files has not."""
    server = elsewhere.hub
    for path in ("/v1/shards", "/v2/shards"):
        server.fail("POST", path, times=9, cut=True)
    told = elsewhere.run(push, folder, "me/cut")
    assert told.startswith("me/cut is not published: ") and told.endswith("push again to resume") and "\n" not in told
    assert elsewhere.files("me/cut") == {}
    assert requests(server)[-1] == "POST /v2/shards" and server.xet.xorbs
    server.faults.clear()
    start = len(server.log)
    assert elsewhere.run(push, folder, "me/cut").startswith(server.url)
    assert not [line for line in requests(server, start) if line.startswith("PUT")], "no chunk was sent again"
    assert elsewhere.files("me/cut") == published(folder)


def test_a_large_push_resumes_at_its_second_block(elsewhere, folder):
    """More than 64 MB go in two blocks, of which one was cut."""
    (folder / "model.safetensors").write_bytes(os.urandom(70_000_000))
    server, before = elsewhere.hub, set(elsewhere.hub.xet.xorbs)
    real = xet_server.XetHandler.do

    def cut(self):
        """Of every block after the first, a part is read."""
        if set(server.xet.xorbs) - before and int(self.headers.get("Content-Length") or 0) > 2**20:
            self.rfile.read(2**20)
            self.close_connection = True
        else:
            real(self)

    for method in ("do_PUT", "do_POST"):
        setattr(xet_server.XetHandler, method, cut)
    try:
        told = elsewhere.run(push, folder, "me/large")
    finally:
        for method in ("do_PUT", "do_POST"):
            setattr(xet_server.XetHandler, method, real)
    assert "push again to resume" in told and elsewhere.files("me/large") == {}
    arrived, start = set(server.xet.xorbs) - before, len(server.log)
    assert len(arrived) == 1
    assert elsewhere.run(push, folder, "me/large").startswith(server.url)
    puts = [path for method, path in server.log[start:] if method == "PUT"]
    assert len(puts) == 1 and not arrived & {path.rsplit("/", 1)[1] for path in puts}
    assert elsewhere.files("me/large") == published(folder)


def test_without_grants_the_older_protocol_is_spoken(elsewhere, folder):
    elsewhere.hub.fail("POST", "/v1/xorb-grants/", times=9, status=404)
    start = len(elsewhere.hub.log)
    assert elsewhere.run(push, folder, "me/older").startswith(elsewhere.hub.url)
    assert not [line for line in requests(elsewhere.hub, start) if line.startswith("PUT")]
    assert "POST /v1/xorbs/default" in requests(elsewhere.hub, start)
    assert elsewhere.files("me/older") == published(folder)


def test_a_pull_request_goes_through_xet_too(elsewhere, folder):
    elsewhere.run(push, folder, "me/proposed")
    before = dict(elsewhere.files("me/proposed"))
    (folder / "model.safetensors").write_bytes(os.urandom(9000))
    address = elsewhere.run(push, folder, "me/proposed", create_pr=True)
    assert address.endswith("/me/proposed/discussions/1")
    assert elsewhere.files("me/proposed", branch="refs/pr/1") == published(folder)
    assert elsewhere.files("me/proposed") == before
