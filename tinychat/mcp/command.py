"""What to run for a plugin, and the little of our environment that it gets. No shell anywhere."""
import os
import shutil
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from tinychat.mcp.errors import NotConnected, Refused

WINDOWS = os.name == "nt"

# What a program needs to find its way about; keys and tokens of the user's are not among it.
INHERITED = ("APPDATA COMSPEC HOMEDRIVE HOMEPATH LOCALAPPDATA PATH PATHEXT PROCESSOR_ARCHITECTURE "
             "PROGRAMDATA PROGRAMFILES SYSTEMDRIVE SYSTEMROOT TEMP TMP USERNAME USERPROFILE WINDIR"
             if WINDOWS else
             "HOME LOGNAME PATH SHELL TERM USER LANG LC_ALL LC_CTYPE TMPDIR TZ").split()
INSTALL = {"npx": "install Node.js", "uvx": "install uv", "docker": "install Docker"}
MIN_SECRET = 6  # characters: shorter values of `env` are words like "true", and no secrets


@dataclass(frozen=True)
class Command:
    """env: what mcp.json adds to the environment. cwd: where the process starts, absolute."""

    label: str
    command: str
    args: tuple[str, ...] = ()
    env: Mapping[str, str] = field(default_factory=dict, repr=False)  # secrets
    cwd: Path | None = None

    @property
    def where(self) -> str:
        """For messages: arguments may hold secrets, and are left out."""
        return f"{self.label} ({os.path.basename(self.command) or self.command})"

    def hide_secrets(self, text: str) -> str:
        """Text of the process, which may repeat what `env` gave it."""
        for value in self.env.values():
            if len(value) >= MIN_SECRET:
                text = text.replace(value, "***")
        return text

    def spawn(self) -> subprocess.Popen:
        """The process, in a group of its own, with three pipes. Raises: NotConnected, Refused."""
        env = environment(self.env)
        if self.cwd is not None and not self.cwd.is_dir():
            raise NotConnected(f"{self.where}: cannot start: no folder {str(self.cwd)!r}")
        argv = [self._executable(env.get("PATH")), *self.args]
        _check_batch(argv)
        apart = ({"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP
                  | subprocess.CREATE_NO_WINDOW} if WINDOWS else {"start_new_session": True})
        try:
            return subprocess.Popen(argv, cwd=self.cwd, env=env, stdin=subprocess.PIPE,
                                    stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0,
                                    **apart)
        except (OSError, ValueError) as error:  # ValueError: a NUL
            why = getattr(error, "strerror", None) or "a NUL in it"
            raise NotConnected(f"{self.where}: cannot start {self.command!r}: {why}") from None

    def _executable(self, path: str | None) -> str:
        """Found as a shell would find it, but on the PATH that the process will have."""
        command = self.command
        if os.path.dirname(command) and self.cwd is not None:
            command = str(self.cwd / command)
        if found := shutil.which(command, path=path):
            return found
        if os.path.isfile(command) and os.path.dirname(command):
            raise NotConnected(f"{self.where}: cannot start: {self.command!r} is not executable")
        hint = f"; {INSTALL[command]}" if command in INSTALL else ""
        raise NotConnected(f"{self.where}: cannot start: no command {self.command!r}{hint}")


def environment(added: Mapping[str, str]) -> dict[str, str]:
    """A child's whole environment. Values that begin with () are functions of a shell's."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return {name: value for name, value in kept.items() if not value.startswith("()")} | dict(added)


def _check_batch(argv: list[str]) -> None:
    """Batch files get their arguments through cmd, which reads these characters as its own."""
    if WINDOWS and argv[0].lower().endswith((".cmd", ".bat")):
        if any(set(arg) & set('"%\r\n') for arg in argv[1:]):
            raise Refused(f"{argv[0]}: an argument of a batch file may have no quotes, percent "
                          "signs or line breaks")
