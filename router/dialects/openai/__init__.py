"""What OpenAI's dialects have in common: fields, errors, usage and the frame of a stream."""
