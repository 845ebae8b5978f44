"""What prefill and decode share: residency of sequences, the iteration loop, pull and publish of KV blocks."""
