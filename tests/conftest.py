"""For every test: no network, no deprecation reported by transformers, no clock, no luck."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Read by huggingface_hub when it is imported, so set before any test module is.
os.environ["HF_HUB_OFFLINE"] = "1"

# A busy machine must not fail a property for its time, nor one run find what the next one does not.
settings.register_profile("house", deadline=None, derandomize=True)
settings.load_profile("house")


class _Deprecations(logging.Handler):
    """Keeps what the loggers of transformers say about deprecated names."""

    def __init__(self) -> None:
        super().__init__()
        self.messages: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        message = record.getMessage()
        if "deprecated" in message.lower():
            self.messages.append(f"{record.name}: {message}")


# transformers logs a deprecation once per process: listening starts here, before the test modules
# are imported, and a message of the import or of a shared fixture fails the test that comes next.
_deprecations = _Deprecations()
logging.getLogger("transformers").addHandler(_deprecations)


@pytest.fixture(autouse=True)
def no_deprecated_transformers() -> Iterator[None]:
    """Fail the test during or before which transformers logged a deprecation."""
    yield
    messages, _deprecations.messages = _deprecations.messages, []
    if messages:
        pytest.fail("transformers logged a deprecation:\n" + "\n".join(messages), pytrace=False)
