"""Data: tokenizers, document sources, token shards, packing and the loader whose order is a pure function."""
