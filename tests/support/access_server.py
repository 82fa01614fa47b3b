"""The Hub of `hub_server` with logins: private and gated repositories, organizations, and tokens with roles and scopes.

    with serving(GuardedHandler) as hub:
        hub.logins["hf_reads"] = login("me", role="read")
        hub.gated["models/acme/closed"] = {"you"}          # who has access to its files

Statuses, headers and texts are those of the Hub: 401 for everything that a request without a login may not see, whether
it exists or not, 404 for a login that may not see it, 403 for files of a gated repository and for writing without the
right to. Information about a gated repository is public, its files are not.
"""

import json

from .hub_server import Handler


def login(name, role="write", orgs=None, scopes=None):
    """What the Hub says of a token: its user, the roles in organizations, and for fine-grained tokens the scopes."""
    token = {"displayName": f"{name}-{role}", "role": role}
    if scopes is not None:
        entries = [{"entity": {"_id": "1", "type": "org", "name": n}, "permissions": p} for n, p in scopes.items()]
        token["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": entries}
    members = [{"type": "org", "name": org, "fullname": org, "roleInOrg": kind} for org, kind in (orgs or {}).items()]
    return {"type": "user", "name": name, "fullname": name, "orgs": members, "auth": {
        "type": "access_token", "accessToken": token}}  # fmt: skip


class GuardedHandler(Handler):
    def setup(self):
        super().setup()
        if not hasattr(self.server, "logins"):
            self.server.logins, self.server.gated = {}, {}

    def who(self):
        """The login of a request, None without one; 'invalid' for a token that nobody has."""
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        return self.server.logins.get(token, "invalid") if token else None

    def refuse(self, status, code, message):
        self.answer(
            status, {"error": message}, {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
        )

    def whoami(self, body):
        who = self.who()
        if isinstance(who, dict):
            self.answer(200, who)
        else:
            self.refuse(401, None, "Invalid credentials in Authorization header")

    def may_write(self, who, owner):
        if not isinstance(who, dict) or who["auth"]["accessToken"]["role"] == "read":
            return False
        scoped = who["auth"]["accessToken"].get("fineGrained", {}).get("scoped")
        if scoped is not None and not any(
            entry["entity"]["name"] == owner and "repo.write" in entry["permissions"] for entry in scoped
        ):
            return False
        roles = {org["name"]: org["roleInOrg"] for org in who["orgs"]} | {who["name"]: "admin"}
        return roles.get(owner) in ("admin", "write", "contributor")

    def create(self, body):
        asked, who = json.loads(body), self.who()
        owner = asked.get("organization") or (isinstance(who, dict) and who["name"])
        if not isinstance(who, dict):
            self.refuse(401, None, "Invalid username or password.")
        elif not self.may_write(who, owner):
            self.refuse(403, None, f'You don\'t have the rights to create a model under the namespace "{owner}"')
        else:
            super().create(body)

    def files(self, kind, repo, revision):
        who, known = self.who(), self.server.repos.get(f"{kind}/{repo}")
        owner, members = repo.split("/")[0], set()
        if isinstance(who, dict):
            members = {who["name"], *(org["name"] for org in who["orgs"])}
        if who == "invalid":
            self.refuse(401, None, "Invalid credentials in Authorization header")
        elif known is None or (known.private and owner not in members):
            status = 401 if who is None else 404
            told = "Invalid username or password." if who is None else "Repository not found"
            self.refuse(status, "RepoNotFound", told)
        elif self.command == "POST" and "/paths-info/" not in self.path and not self.may_write(who, owner):
            self.refuse(403, None, "Forbidden: you must use a write token to upload to a repository.")
        elif "/resolve/" in self.path and not self.shown(f"{kind}/{repo}", members):
            told = f"Access to {kind[:-1]} {repo} is restricted"
            if who is None:
                self.refuse(401, "GatedRepo", f"{told}. You must have access to it and be authenticated.")
            else:
                place = f"Visit {self.server.url}/{repo} to ask for access."
                self.refuse(403, "GatedRepo", f"{told} and you are not in the authorized list. {place}")
        else:
            return super().files(kind, repo, revision)
        return None

    def shown(self, repo, members):
        """Whether one of these names has access to the files."""
        return repo not in self.server.gated or bool(self.server.gated[repo] & members)
