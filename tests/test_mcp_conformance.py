"""The official conformance suite's scenarios for clients, at every revision that they know of; its verdict counts.

conformance_client.py is the client that it tests. Two versions of the suite: 0.1.16 is of the time of
2025-11-25, 0.2.0-alpha.12 knows 2026-07-28.
"""
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from helpers_peers_http import end
from peers import npm_packages

pytestmark = pytest.mark.skipif(os.name == "nt", reason="paths of POSIX")
CLIENT = Path(__file__).with_name("conformance_client.py")
CLIENT_S, SUITE_S = 30, 60

PACKAGES = ("conformance-2025@npm:@modelcontextprotocol/conformance@0.1.16",
            "conformance-2026@npm:@modelcontextprotocol/conformance@0.2.0-alpha.12",
            "node@22.23.3")  # the suite wants 22, and older ones are about

HANDSHAKE = [("initialize", "2025-06-18"), ("initialize", "2025-11-25"),
             ("tools_call", "2025-06-18"), ("tools_call", "2025-11-25"),
             ("sse-retry", "2025-11-25")]
RUNS = [("conformance-2025", *run) for run in HANDSHAKE] + [
    ("conformance-2026", *run) for run in [
        *HANDSHAKE,
        ("json-schema-2020-12-preservation", "2025-11-25"),
        ("json-schema-2020-12-preservation", "2026-07-28"),
        ("tools_call", "2026-07-28"),
        ("request-metadata", "2026-07-28"),
        ("http-standard-headers", "2026-07-28"),
        ("http-custom-headers", "2026-07-28"),
        ("http-invalid-tool-headers", "2026-07-28"),
        ("json-schema-ref-no-deref", "2026-07-28"),
        ("sep-2322-client-request-state", "2026-07-28")]]

# Checks of these scenarios that fail; the suite says so too when one of them does not any more.
_ANSWERS = ("client-request-state-echoed", "client-jsonrpc-id-different", "client-no-state-omitted")
FAIL = {"sep-2322-client-request-state":  # its tools go on when an elicitation was answered
        [f"sep-2322-{check}" for check in _ANSWERS]}

LEFT_OUT = {"auth/": "tinychat runs no OAuth: credentials go into `headers`",
            "elicitation-": "tinychat is no user who could be asked, and says so",
            "sep-2640-": "skills are resources, and tinychat uses tools alone"}


@pytest.fixture(scope="session")
def suite(test_cache):
    """Version -> the suite's command."""
    modules = npm_packages(test_cache, "conformance", *PACKAGES)
    if not (modules / ".bin" / "node").exists():
        pytest.skip("the package of Node 22 brought no program along")

    def command(version: str) -> list[str]:
        return [str(modules / ".bin" / "node"), str(modules / version / "dist" / "index.js")]
    return command


@pytest.mark.parametrize("version, scenario, revision", RUNS)
def test_a_client_scenario_passes(suite, tmp_path, version, scenario, revision):
    """M-011 M-013 M-015 M-030 M-036 M-037 M-066 M-067"""
    argv = [*suite(version), "client", "--scenario", scenario, "--spec-version", revision,
            "--command", f"{shlex.quote(sys.executable)} {shlex.quote(str(CLIENT))}",
            "--timeout", str(1000 * CLIENT_S), "--output-dir", str(tmp_path)]
    if known := FAIL.get(scenario):
        baseline = tmp_path / "known.yml"
        baseline.write_text("client:\n" + "".join(f"  - {scenario}:{check}\n" for check in known))
        argv += ["--expected-failures", str(baseline)]
    status, said = run(argv)
    assert status == 0, said
    checks = [check for file in tmp_path.glob("*/checks.json") for check in json.loads(file.read_text())]
    by_status = {kind: [check["id"] for check in checks if check["status"] == kind]
                 for kind in ("SUCCESS", "FAILURE", "WARNING", "SKIPPED")}
    print(f"{version} {scenario} {revision}:", *(f"{len(ids)} {kind}" for kind, ids in by_status.items()))
    assert by_status["SUCCESS"] and not by_status["WARNING"]
    assert sorted(by_status["FAILURE"]) == sorted(FAIL.get(scenario, []))


@pytest.mark.parametrize("version", ["conformance-2025", "conformance-2026"])
def test_every_client_scenario_is_run_or_left_out_for_a_reason(suite, version):
    status, said = run([*suite(version), "list", "--client"])
    assert status == 0, said
    listed = {(name, revision) for name, revisions in
              (line.strip(" -").split(" ", 1) for line in said.splitlines() if line.startswith("  - "))
              for revision in revisions.strip("[]").split(",")}
    ours = {(scenario, revision) for its, scenario, revision in RUNS if its == version}
    rest = listed - ours
    assert ours <= listed
    assert [name for name, _ in rest if not name.startswith(tuple(LEFT_OUT))] == []


def run(argv: list[str]) -> tuple[int, str]:
    """Status and output; nothing that it started runs afterwards."""
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT, text=True, start_new_session=True)
    try:
        said, _ = process.communicate(timeout=SUITE_S)
        return process.returncode, said
    finally:
        end(process)
        process.stdout.close()
