"""What a text or a conversation is in tokens, in vLLM's form."""
