"""llama.cpp on the same file, in a process of its own, if llama_cpp or xllamacpp is there."""
import json
import subprocess
from pathlib import Path

from tinychat.errors import TinychatError

SCRIPT = Path(__file__).with_name("llama_cpp_script.py")
TIMEOUT_S = 600


def measure_llama_cpp(python: str, model: Path, n_prompt: int, n_generate: int,
                      n_threads: int) -> dict:
    """The figures of `bench.measure`, and version and peak_memory_bytes.

    Raises: TinychatError when `python` has neither package, or the run fails.
    """
    command = [python, str(SCRIPT), str(model), str(n_prompt), str(n_generate), str(n_threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace",
                              timeout=TIMEOUT_S)
        if done.returncode == 0:
            return json.loads(done.stdout.splitlines()[-1])
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
    except (OSError, subprocess.TimeoutExpired, ValueError, IndexError) as error:
        said = [str(error)]
    raise TinychatError(f"llama.cpp could not be measured: {said[0]}")
