"""llama.cpp on the same file, in a process of its own, if llama_cpp or xllamacpp is there."""
import json
import subprocess
from dataclasses import asdict
from pathlib import Path

from tinychat.errors import TinychatError

SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
TIMEOUT_S = 1800


def measure_llama_cpp(python: str, model: Path, plan, n_threads: int) -> dict:
    """The figures of `decoding.measure_decoding`, load_seconds, version and peak_memory_bytes.

    plan: a bench.Plan. xllamacpp decodes one stream without context only.

    Raises: TinychatError when `python` has neither package, or the run fails.
    """
    command = [python, str(SCRIPT), str(model), json.dumps({**asdict(plan),
                                                            "n_threads": n_threads})]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=TIMEOUT_S)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        said = [str(error)]
    raise TinychatError(f"llama.cpp could not be measured: {said[0]}")
