"""Recorded agent work, sent again to any endpoint of OpenAI's form, at its own pace."""
