"""`hf`, the command of huggingface_hub, beside `hf-xent` on one Hub: one login, one cache, the same files."""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from hf_xent import hub
from support.access_server import GuardedHandler, login
from support.hub_process import environment
from support.hub_server import serving
from support.models import tiny, tiny_tokenizer

pytestmark = pytest.mark.slow  # each command is a process of its own
HF = Path(sys.executable).with_name("hf")
HEAD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [hf_xent]\n---\n# Model\n"
OURS = "import sys; from hf_xent.cli import main; main()"


@dataclass
class Shell:
    """A Hub, a home, and commands that know them."""

    server: object
    home: Path
    folder: Path

    def run(self, *command, code=0, **variables):
        """What a command prints; its exit code has to be `code`."""
        unset = ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_DISABLE_XET", "HF_XENT_CACHE")
        known = {name: value for name, value in os.environ.items() if name not in unset}
        known |= environment(self.server, self.home / "huggingface", token=None)
        known |= {"XDG_CACHE_HOME": str(self.home), "NO_COLOR": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", **variables}
        start = [str(HF)] if command[0] == "hf" else [sys.executable, "-c", OURS]
        arguments = [*start, *map(str, command[1:])]
        done = subprocess.run(arguments, env=known, capture_output=True, text=True, check=False, cwd=self.home)
        assert done.returncode == code, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def files(self, repo):
        return self.server.repos[f"models/{repo}"].branches["main"]


@pytest.fixture(scope="module")
def shell(tmp_path_factory):
    """After `hf auth login` and `hf-xent publish`."""
    if not HF.exists():
        pytest.skip("huggingface_hub's command is not beside this Python")
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("run")
    tiny().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "README.md").write_text(HEAD)
    (folder / "checkpoint-3").mkdir()
    for private in (folder / "checkpoint-3" / "optimizer.pt", folder / "training_args.bin"):
        private.write_bytes(b"not for others")
    with serving(GuardedHandler) as server:
        server.logins, server.gated = {"hf_me": login("me"), "hf_reads": login("me", role="read")}, {}
        found = Shell(server, home, folder)
        assert "publish --repo-id" not in found.run("hf-xent", "publish", folder, "--repo-id", "me/run", code=1)
        found.run("hf", "auth", "login", "--token", "hf_me")
        found.run("hf-xent", "publish", folder, "--repo-id", "me/run")
        yield found


def published(folder):
    return {name: file.read_bytes() for name, file in hub.files(folder).items()}


def test_publish_uses_the_login_of_hf(shell):
    assert "me" in shell.run("hf", "auth", "whoami")
    assert shell.files("me/run") == published(shell.folder)


def test_what_was_published_is_downloaded_and_verified_by_hf(shell, tmp_path):
    shell.run("hf", "download", "me/run", "--local-dir", tmp_path)
    assert published(tmp_path) == published(shell.folder)
    shell.run("hf", "cache", "verify", "me/run", "--local-dir", tmp_path, "--fail-on-missing-files")
    (tmp_path / "config.json").write_text("{}")
    assert "config.json" in shell.run("hf", "cache", "verify", "me/run", "--local-dir", tmp_path, code=1)


def test_hf_upload_sends_the_same_without_the_checks(shell):
    left_out = ["checkpoint-*/*", "training_args.bin"]
    shell.run("hf", "upload", "me/uploaded", shell.folder, ".", *[w for name in left_out for w in ("--exclude", name)])
    assert shell.files("me/uploaded") == {**shell.files("me/run"), "README.md": shell.files("me/uploaded")["README.md"]}
    (shell.folder / "README.md").write_text("# No front matter\n")
    shell.run("hf", "upload", "me/unchecked", shell.folder / "README.md", "README.md")
    line = shell.run("hf-xent", "publish", shell.folder, "--repo-id", "me/unchecked", code=1)
    (shell.folder / "README.md").write_text(HEAD)
    assert "license is missing" in line and "Traceback" not in line


def test_our_cache_lies_beside_that_of_hf(shell):
    ours = shell.home / "hf_xent" / "smollm2-135m-instruct" / "config.json"
    ours.parent.mkdir(parents=True)
    ours.write_text("{}")
    shell.run("hf", "download", "me/run")
    listed = shell.run("hf", "cache", "ls")
    assert "me/run" in listed and "hf_xent" not in listed and "corrupt" not in listed.lower()
    shell.run("hf", "cache", "prune", "--yes")
    shell.run("hf", "cache", "rm", "model/me/run", "--yes")
    assert ours.read_text() == "{}"
    assert "me/run" not in shell.run("hf", "cache", "ls")


def test_the_variables_of_the_hub_count(shell, tmp_path):
    """HF_TOKEN before the login, HF_HOME with its cache and its login, HF_HUB_OFFLINE."""
    publish = ("hf-xent", "publish", shell.folder, "--repo-id", "me/again")
    assert "has the role 'read'" in shell.run(*publish, code=1, HF_TOKEN="hf_reads")
    assert "there is no token: log in with `hf auth login`" in shell.run(*publish, code=1, HF_HOME=str(tmp_path))
    offline = shell.run(*publish, code=1, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE is set" in offline and len(offline.strip().splitlines()) == 1
    assert "models/me/again" not in shell.server.repos
    absent = shell.run("hf-xent", "data", "export", "wikimia", tmp_path / "absent", code=1, HF_HUB_OFFLINE="1")
    assert "does not load: HF_HUB_OFFLINE is set, and it is not in the cache" in absent
    shell.run("hf", "download", "me/run")
    detect = ("hf-xent", "detect", "members", tmp_path / "rows.txt", "--model", "me/run", "--scores", "loss", "--json")
    (tmp_path / "rows.txt").write_text("the quick brown fox jumps\nover the lazy dog again\n")
    start = len(shell.server.log)
    detected = shell.run(*detect, "--output", tmp_path / "scores.jsonl", HF_HUB_OFFLINE="1")
    assert "loss" in detected and len(shell.server.log) == start, "from the cache that hf filled"


def test_after_hf_auth_logout_nothing_is_published(shell):
    shell.run("hf", "auth", "logout")
    line = shell.run("hf-xent", "publish", shell.folder, "--repo-id", "me/late", code=1)
    assert "me/late is not published: there is no token: log in with `hf auth login`, or set HF_TOKEN" in line
    assert len(line.strip().splitlines()) == 1
