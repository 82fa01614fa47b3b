"""Private and gated repositories, organizations and tokens: each refusal is one line that says what to do."""

import os

import pytest
from typer.testing import CliRunner

from hf_xent import cli, hub
from support.access_server import GuardedHandler, login
from support.hub_process import elsewhere
from support.hub_server import Repo
from support.models import tiny, tiny_tokenizer

pytestmark = pytest.mark.slow  # a process of its own
HEAD = "---\nlicense: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags: [hf_xent]\n---\n# Model\n"
SCOPES = {"acme": ["repo.content.read", "repo.write"], "readers": ["repo.content.read"]}
LOGINS = {
    "hf_me": login("me", orgs={"acme": "write", "readers": "read"}),
    "hf_reads": login("me", role="read", orgs={"acme": "write"}),
    "hf_fine": login("me", role="fineGrained", orgs={"acme": "write", "readers": "write"}, scopes=SCOPES),
    "hf_stranger": login("stranger"),
}


@pytest.fixture(scope="module", name="elsewhere")
def _elsewhere(tmp_path_factory):
    with elsewhere(tmp_path_factory.mktemp("home"), GuardedHandler, token=None) as found:
        found.hub.logins, found.hub.gated = (
            dict(LOGINS),
            {f"{kind}/acme/gated": {"me"} for kind in ("models", "datasets")},
        )
        files = {"config.json": b'{"model_type": "gpt2"}', "README.md": HEAD.encode(), "rows.jsonl": b'{"text": "a"}\n'}
        for kind in ("models", "datasets"):
            found.hub.repos[f"{kind}/acme/gated"] = Repo({"main": dict(files)})
            found.hub.repos[f"{kind}/acme/hidden"] = Repo({"main": dict(files)}, settings={"private": True})
        found.hub.repos["datasets/swj0419/WikiMIA"] = Repo({"main": dict(files)})
        found.hub.gated["datasets/swj0419/WikiMIA"] = set()
        yield found


def with_token(token, function, *arguments, **options):
    """The result of a function under a login, or the line that the command line prints of its error."""
    from hf_xent.cli.app import describe

    os.environ.pop("HF_TOKEN", None)
    if token:
        os.environ["HF_TOKEN"] = token
    try:
        return globals()[function](*arguments, **options)
    except Exception as error:
        return f"{type(error).__name__}: {describe(error)}"


def load_model(repo):
    from hf_xent.models import loading

    return loading.load(repo)


def load_tokenizer(repo):
    from hf_xent.models import loading

    return loading.tokenizer_of(repo)


def load_ln_free(repo):
    from hf_xent import ln_free

    return ln_free.load(repo)


def load_classifier(repo):
    from hf_xent.models.classifiers import stored_loss

    return stored_loss(repo)


def load_centers(repo):
    from hf_xent.models.zero_shot import ZeroShot

    return ZeroShot.from_pretrained(repo, None)


def load_texts(repo):
    from hf_xent import data

    return data.load_text(repo)


def count_texts(repo):
    from hf_xent.detection.counts import CountedText

    return list(CountedText(repo).open().rows())


def command(*arguments):
    result = CliRunner().invoke(cli.app, [str(a) for a in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def push(*arguments, **options):
    return hub.push(*arguments, **options)


READERS = {
    "load_model": "model",
    "load_tokenizer": "model",
    "load_ln_free": "model",
    "load_classifier": "model",
    "load_centers": "model",
    "load_texts": "dataset",
    "count_texts": "dataset",
}
ANSWERS = {
    (None, "acme/hidden"): (
        "acme/hidden does not exist, or is private",
        "log in with `hf auth login`, or set HF_TOKEN",
    ),
    (None, "acme/gated"): ("acme/gated is gated", "ask for access at {url}", "log in with `hf auth login`"),
    ("hf_stranger", "acme/hidden"): ("acme/hidden does not exist, or this login may not see it", "token of a member"),
    ("hf_stranger", "acme/gated"): ("acme/gated is gated, and this login has no access", "ask for it at {url}"),
    ("hf_typo", "acme/hidden"): ("the token is not valid", "acme/hidden", "renew HF_TOKEN"),
}


@pytest.mark.parametrize(("token", "repo"), ANSWERS)
@pytest.mark.parametrize("reader", READERS)
def test_what_may_not_be_read_is_said_in_one_line(elsewhere, reader, token, repo):
    kind = READERS[reader]
    line = elsewhere.run(with_token, token, reader, repo)
    page = f"{elsewhere.hub.url}/{'datasets/' if kind == 'dataset' else ''}{repo}"
    assert isinstance(line, str) and line.startswith("ValueError: "), line
    for part in ANSWERS[token, repo]:
        assert part.format(url=page) in line, line
    assert "\n" not in line and f"{kind} {repo}" in line and "Request ID" not in line


COMMANDS = {
    "train on a gated model": ("train", "--model", "acme/gated", "--dataset", "{rows}", "--steps", "1"),
    "train on a gated dataset": ("train", "--model", "{model}", "--dataset", "acme/gated", "--steps", "1"),
    "detect with a gated model": ("detect", "members", "{rows}", "--model", "acme/gated"),
    "export of a registered dataset": ("data", "export", "wikimia", "{out}"),
    "publish to an organization": ("publish", "{model}", "--repo-id", "readers/model"),
}


@pytest.mark.parametrize("what", COMMANDS)
def test_commands_say_it_too(elsewhere, tmp_path, what):
    (tmp_path / "rows.jsonl").write_text('{"text": "the quick brown fox", "label": 0}\n' * 8)
    tiny().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text(HEAD)
    places = {"rows": tmp_path / "rows.jsonl", "model": tmp_path / "model", "out": tmp_path / "out"}
    arguments = [argument.format(**places) for argument in COMMANDS[what]]
    is_publish = arguments[0] == "publish"
    line = elsewhere.run(with_token, "hf_me" if is_publish else "hf_stranger", "command", *arguments)
    assert "\n" not in line and "Error: " in line, line
    expected = "me may only read in readers: ask its admins" if is_publish else "is gated, and this login has no access"
    assert expected in line, line


# --- pushes


def sent(server, start):
    """The requests that would change something."""
    return [path for method, path in server.log[start:] if method != "GET" and "/validate-yaml" not in path]


REFUSED = {
    ("hf_reads", "me/model"): ("the token 'me-read' of me has the role 'read'", "log in with one that may write"),
    ("hf_reads", "acme/model"): ("has the role 'read'",),
    ("hf_me", "readers/model"): ("me may only read in readers", "ask its admins", "create_pr"),
    ("hf_me", "others/model"): (
        "me is no member of others: choose a repo_id under acme, me, readers, or set create_pr",
    ),
    ("hf_fine", "me/model"): ("the fine-grained token 'me-fineGrained' may write to acme, not to me",),
    ("hf_fine", "readers/model"): ("may write to acme, not to readers", "or choose another repo_id"),
    ("hf_typo", "me/model"): ("the token is not valid: renew HF_TOKEN, or `hf auth login --force`",),
    (None, "me/model"): ("there is no token", "log in with `hf auth login`, or set HF_TOKEN"),
}


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "README.md").write_text(HEAD)
    (tmp_path / "model.safetensors").write_bytes(os.urandom(100))
    return tmp_path


@pytest.mark.parametrize(("token", "repo"), REFUSED)
def test_a_push_that_may_not_be_is_refused_before_files_are_sent(elsewhere, folder, token, repo):
    start = len(elsewhere.hub.log)
    line = elsewhere.run(with_token, token, "push", folder, repo)
    assert line.startswith(f"RuntimeError: {repo} is not published: ") and "\n" not in line, line
    for part in REFUSED[token, repo]:
        assert part in line, line
    assert sent(elsewhere.hub, start) == [], "nothing left this machine"


@pytest.mark.parametrize(("token", "repo"), [("hf_me", "me/ours"), ("hf_me", "acme/ours"), ("hf_fine", "acme/fine")])
def test_a_push_that_may_be_arrives(elsewhere, folder, token, repo):
    address = elsewhere.run(with_token, token, "push", folder, repo, private=True)
    assert address.startswith(elsewhere.hub.url), address
    assert elsewhere.files(repo) == {name: file.read_bytes() for name, file in hub.files(folder).items()}
    assert elsewhere.hub.repos[f"models/{repo}"].private


def test_what_the_hub_does_not_tell_is_left_to_it(elsewhere, folder):
    """Too many questions about the login; and a login that is no token, whose rights are not listed."""
    elsewhere.hub.fail("GET", "/api/whoami-v2", status=429)
    assert elsewhere.run(with_token, "hf_me", "push", folder, "acme/busy").startswith(elsewhere.hub.url)
    hub.rights.check_write({"name": "me", "auth": {"type": "oauth"}}, "anybody/model")
    hub.rights.check_token({"name": "me"})
    told = elsewhere.run(with_token, "hf_stranger", "push", folder, "stranger/fine")
    assert told.startswith(elsewhere.hub.url)
    elsewhere.hub.fail("GET", "/api/whoami-v2", status=429)
    told = elsewhere.run(with_token, "hf_stranger", "push", folder, "acme/busy")
    assert "is not published" in told and "must use a write token" in told, "and its answer is told"
