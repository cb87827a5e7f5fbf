"""The default model, its tokenizer, and what its layers hand to a policy: as the core's tests have them."""

import pytest

from model import Llama
from test_gvote import llama, real_layers, tiny_llama, tokenizer  # noqa: F401


@pytest.fixture(scope="session")
def small() -> Llama:
    """A model that reads the default model's tokens, with random weights."""
    return tiny_llama(vocab_size=49152)
