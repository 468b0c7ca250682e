"""Names of model repositories as people and programs write them, and which names are harmless."""
import re
from dataclasses import dataclass
from urllib.parse import unquote, urlsplit

from tinychat.errors import ModelNotFound

DEFAULT_REVISION = "main"
HOSTS = ("huggingface.co", "www.huggingface.co", "hf.co")
NO_OWNERS = ("api", "collections", "datasets", "docs", "models", "papers", "spaces")
REPO_PART = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
QUANTIZATION = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,39}")
USER = re.compile(r"//[^/]*@")  # what a link says of who asks: nothing for a message
MAX_NAME_BYTES = 200
NO_FILE = re.compile(r'[\x00-\x1f\x7f<>:"/\\|?*]')  # in no name on Windows, and none we want
DEVICES = re.compile(r"(con|prn|aux|nul|com\d|lpt\d)(\..*)?", re.IGNORECASE)


@dataclass(frozen=True)
class Link:
    """A repository of the hub, or one file in it."""

    repo: str  # owner/name
    revision: str = DEFAULT_REVISION
    file: str | None = None

    @property
    def owner(self) -> str:
        return self.repo.partition("/")[0]

    @property
    def name(self) -> str:
        return self.repo.partition("/")[2]


def is_harmless(name: str) -> bool:
    """Can it name a file or folder on every system, and not a hidden one?"""
    try:
        n_bytes = len(name.encode())
    except UnicodeEncodeError:  # half a surrogate pair
        return False
    return (0 < n_bytes <= MAX_NAME_BYTES and not name.startswith((".", " "))
            and not name.endswith((".", " ")) and not NO_FILE.search(name)
            and not DEVICES.fullmatch(name))


def is_harmless_path(path: str) -> bool:
    """The same of each part of a path that uses slashes: no way up, no root, nothing hidden."""
    return all(is_harmless(part) for part in path.split("/"))


def parse_link(text: str, endpoint: str) -> Link | None:
    """The repository that a link names, None for what is no link.

    endpoint: the hub's own address; its links count beside those of the public hub.
    Raises: ModelNotFound for a link to elsewhere, or to no model repository.
    """
    if "://" not in text and text.partition("/")[0].lower() not in HOSTS:
        return None
    shown = repr(USER.sub("//", text)[:200])
    try:
        path = _path_on_hub(text if "://" in text else f"https://{text}", endpoint)
    except ValueError:  # no address at all
        path = None
    if path is None:
        raise ModelNotFound(f"{shown} is no link to the hub; expected "
                            "https://huggingface.co/owner/name", param="model")
    link = _link_of([unquote(part) for part in path.strip("/").split("/")])
    if link is None:
        raise ModelNotFound(f"{shown} is no model repository; expected "
                            "https://huggingface.co/owner/name", param="model")
    return link


def _path_on_hub(url: str, endpoint: str) -> str | None:
    parts, home = urlsplit(url), urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or "@" in parts.netloc:
        return None
    prefix = home.path.rstrip("/") + "/"
    if (parts.hostname, parts.port) == (home.hostname, home.port) and parts.path.startswith(prefix):
        return parts.path[len(prefix):]
    return parts.path if parts.hostname in HOSTS and parts.port in (None, 80, 443) else None


def _link_of(parts: list[str]) -> Link | None:
    """owner, name, then nothing, or tree REVISION, or blob|resolve|raw REVISION FILE…"""
    repo = repo_of("/".join(parts[:2]))
    if repo is None:
        return None
    if len(parts) == 2:
        return Link(repo)
    kind, revision, file = parts[2], parts[3] if len(parts) > 3 else "", "/".join(parts[4:])
    if not REVISION.fullmatch(revision):
        return None
    if kind == "tree":
        return Link(repo, revision)
    if kind in ("blob", "resolve", "raw") and is_harmless_path(file):
        return Link(repo, revision, file)
    return None


def repo_of(text: str) -> str | None:
    """`owner/name` if it may be a repository's, and a folder's on every system."""
    parts = text.split("/")
    good = len(parts) == 2 and parts[0].lower() not in NO_OWNERS and all(
        REPO_PART.fullmatch(part) and ".." not in part and is_harmless(part) for part in parts)
    return text if good else None


def split_quantization(text: str) -> tuple[str, str | None]:
    """`owner/name:Q4_K_M` -> `owner/name`, `Q4_K_M`; a link's port is not one."""
    name, colon, quantization = text.rpartition(":")
    if colon and name and QUANTIZATION.fullmatch(quantization):
        return name, quantization
    return text, None
