"""A model as files: where it comes from, its config, its tokenizer and its chat template. No torch."""
