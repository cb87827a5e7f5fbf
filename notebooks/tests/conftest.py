"""The default model, its tokenizer, and what its layers hand to a policy: as the core's tests have them."""

from test_gvote import llama, real_layers, tokenizer  # noqa: F401
