"""MCP servers that others wrote, installed once into the tests' cache: npm packages, and a Python of their own.

They stay out of our environment, whose packages they might want in other versions. What cannot be
installed skips its tests with the reason.
"""
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

NPM = ("@modelcontextprotocol/server-everything@2026.8.31",
       "@modelcontextprotocol/server-filesystem@2026.8.31")
PYPI = ("mcp==2.3.0", "mcp-server-time==2026.10.19", "tzdata")
INSTALL_S = 300


def npm_peer(cache: Path, name: str) -> str:
    """The path of a command of the npm packages, like mcp-server-everything."""
    return str(npm_folder(cache) / "node_modules" / ".bin" / name)


def npm_folder(cache: Path) -> Path:
    """A folder for `npx --prefix`, with all the npm packages."""
    return npm_packages(cache, "npm", *NPM).parent


def npm_packages(cache: Path, kind: str, *packages: str) -> Path:
    """The node_modules with these packages."""
    if not shutil.which("npm") or not shutil.which("node"):
        pytest.skip("needs npm and node")

    def install(folder: Path) -> None:
        _run("npm", "install", "--prefix", str(folder), "--no-audit", "--no-fund", *packages)
    return _installed(cache, kind, packages, install) / "node_modules"


def python_peer(cache: Path) -> str:
    """The path of a Python that has the PyPI packages; run them with -m."""
    return python_with(cache, "python", *PYPI)


def python_with(cache: Path, kind: str, *packages: str) -> str:
    """The path of a Python with these packages."""
    def install(folder: Path) -> None:
        _run(sys.executable, "-m", "venv", str(folder))
        _run(str(_python_in(folder)), "-m", "pip", "install", "--quiet", *packages)
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    return str(_python_in(_installed(cache, kind, (version, *packages), install)))


def _python_in(folder: Path) -> Path:
    return folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _installed(cache: Path, kind: str, packages: tuple[str, ...], install: Callable[[Path], None]) -> Path:
    """The folder with these very packages; two test runs at once do not meet in it."""
    digest = hashlib.sha256("\n".join(packages).encode()).hexdigest()[:12]
    folder = cache / "peers" / f"{kind}-{digest}"
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(dir=folder.parent, prefix="new-"))
    try:
        install(new)
        new.rename(folder)  # fails if another run was quicker
    except OSError:
        assert folder.is_dir()
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return folder


def _run(*argv: str) -> None:
    try:
        done = subprocess.run(argv, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{argv[0]} did not install the peers within {INSTALL_S} s")
    if done.returncode:
        last = (done.stderr or done.stdout).strip().split("\n")[-1]
        pytest.skip(f"the peers could not be installed: {last[:300]}")
