"""Long-context tasks whose answers are known, over real text, for any tokenizer."""
