"""The Hugging Face hub, or whatever speaks its protocol: address, token, what a repository holds.

    GET {endpoint}/api/models/{repo}/revision/{revision}?blobs=true
        {"sha": commit, "siblings": [{"rfilename", "size", "lfs": {"sha256", "size"}}]}
    GET {endpoint}/api/models/{repo}/tree/{revision}?recursive=true   where that is not to be had
        [{"type": "file", "path", "size", "lfs": {"oid", "size"}}], more by Link: <…>; rel="next"
    GET {endpoint}/{repo}/resolve/{revision}/{path}                   a file, often by a redirect
"""
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

from tinychat.errors import ModelNotFound, TinychatError
from tinychat.library.fetch.links import Link, is_harmless_path
from tinychat.library.fetch.web import SHA256, Web, WebError, origin

PUBLIC = "https://huggingface.co"
TOKEN = re.compile(r"[\x21-\x7e]{1,500}")
COMMIT = re.compile(r"[0-9a-f]{40}")
NEXT = re.compile(r'<([^<>]+)>\s*;\s*rel="?next"?')
MAX_PAGES = 50
MAX_FILE_BYTES = 1 << 50
MAX_TOKEN_FILE_BYTES = 4096
REFUSED = (401, 403, 404)                    # no such repository, or not for everybody
NO_SUCH_CALL = (400, 404, 405, 410, 422, 501)


@dataclass(frozen=True)
class RemoteFile:
    """A GGUF file of a repository; sha256: None where the listing has none."""

    path: str
    size: int
    sha256: str | None

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]


@dataclass(frozen=True)
class Listing:
    """revision: a commit where the hub tells it, else what was asked for."""

    repo: str
    revision: str
    files: tuple[RemoteFile, ...]

    @property
    def is_pinned(self) -> bool:
        """Does the revision always mean the same files?"""
        return COMMIT.fullmatch(self.revision) is not None


@dataclass(frozen=True)
class Hub:
    endpoint: str
    token: str | None = field(repr=False)

    @classmethod
    def from_environment(cls) -> "Hub":
        """HF_ENDPOINT; HF_TOKEN, HUGGING_FACE_HUB_TOKEN, or the file that logging in has left.

        Raises: TinychatError for values that cannot be meant.
        """
        endpoint = (os.environ.get("HF_ENDPOINT") or PUBLIC).strip().rstrip("/")
        try:
            scheme, host, _ = origin(endpoint)
        except ValueError:
            scheme = host = ""
        if scheme not in ("http", "https") or not host or "@" in urlsplit(endpoint).netloc:
            raise TinychatError("HF_ENDPOINT: expected an address like https://huggingface.co")
        return cls(endpoint, _token())

    def listing(self, web: Web, link: Link) -> Listing:
        """The GGUF files of a repository. Raises: ModelNotFound, WebError, TinychatError."""
        base, revision = f"{self.endpoint}/api/models/{link.repo}", quote(link.revision, safe="")
        commit = link.revision
        try:
            body, _ = web.json(f"{base}/revision/{revision}?blobs=true")
            if isinstance(body, dict) and COMMIT.fullmatch(str(body.get("sha"))):
                commit = body["sha"]
            files = _siblings(body)
            if files is not None:
                return Listing(link.repo, commit, files)
        except WebError as error:
            if error.status not in NO_SUCH_CALL:
                raise self.explained(error, link.repo) from error
        try:
            files = self._tree(web, f"{base}/tree/{quote(commit, safe='')}?recursive=true")
        except WebError as error:
            raise self.explained(error, link.repo) from error
        return Listing(link.repo, commit, files)

    def file_url(self, listing: Listing, file: RemoteFile) -> str:
        return f"{self.endpoint}/{listing.repo}/resolve/{listing.revision}/{quote(file.path)}"

    def explained(self, error: WebError, repo: str) -> TinychatError:
        """What to tell people: a refusal may mean that there is nothing, or nothing for them."""
        if error.status not in REFUSED:
            return error
        host = urlsplit(self.endpoint).hostname
        why = ("it does not exist, or the token (HF_TOKEN) may not read it: some repositories want "
               "their terms accepted on their page first" if self.token else
               "it does not exist, or is not for everybody: HF_TOKEN may hold a token that may "
               "read it")
        return ModelNotFound(f"{host} does not give out {repo} (HTTP {error.status}): {why}",
                             param="model")

    def _tree(self, web: Web, url: str) -> tuple[RemoteFile, ...]:
        found: list[RemoteFile] = []
        for _ in range(MAX_PAGES):
            body, links = web.json(url)
            if not isinstance(body, list):
                raise TinychatError(f"{url.partition('?')[0]}: expected a list of files")
            files = [item for item in body
                     if isinstance(item, dict) and item.get("type") == "file"]
            found += _remote_files(files, "path")
            following = NEXT.search(links)
            if not following:
                return tuple(found)
            url = urljoin(url, following[1])
            if origin(url) != origin(self.endpoint):
                raise TinychatError(f"{urlsplit(self.endpoint).hostname}: its listing goes on at "
                                    "another address")
        raise TinychatError(f"{url.partition('?')[0]}: more than {MAX_PAGES} pages of files")


def _siblings(body: Any) -> tuple[RemoteFile, ...] | None:
    """The files of the first call's answer; None where it does not say how large they are."""
    items = body.get("siblings") if isinstance(body, dict) else None
    if not isinstance(items, list):
        return None
    items = [item for item in items if isinstance(item, dict) and _is_ours(item.get("rfilename"))]
    files = _remote_files(items, "rfilename")
    return tuple(files) if len(files) == len(items) else None


def _remote_files(items: list[dict], name_key: str) -> list[RemoteFile]:
    """Those that are GGUF files under a harmless name, and of a known size."""
    found = []
    for item in items:
        path, lfs = item.get(name_key), item.get("lfs")
        lfs = lfs if isinstance(lfs, dict) else {}
        size = next((n for n in (lfs.get("size"), item.get("size"))
                     if type(n) is int and 0 < n <= MAX_FILE_BYTES), None)
        if _is_ours(path) and size is not None:
            found.append(RemoteFile(path, size, _sha256(lfs.get("sha256") or lfs.get("oid"))))
    return found


def _is_ours(path: Any) -> bool:
    return isinstance(path, str) and path.endswith(".gguf") and is_harmless_path(path)


def _sha256(value: Any) -> str | None:
    text = str(value).lower().removeprefix("sha256:")
    return text if SHA256.fullmatch(text) else None


def _token() -> str | None:
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        if token := os.environ.get(name, "").strip():
            return _checked(token, name)
    home = os.environ.get("HF_HOME") or Path.home() / ".cache" / "huggingface"
    path = Path(home).expanduser() / "token"
    try:
        with open(path, encoding="utf-8") as file:
            token = file.read(MAX_TOKEN_FILE_BYTES).strip()
    except (OSError, ValueError):
        return None
    return _checked(token, str(path)) if token else None


def _checked(token: str, where: str) -> str:
    """Raises: TinychatError that does not show it: it would end in a log."""
    if not TOKEN.fullmatch(token):
        raise TinychatError(f"{where}: expected a token, one word of printable ASCII")
    return token
