"""The embedded demo: a closed little clinic world, its corpus, its tokenizer and the checker of its answers."""
