"""From generated text to reasoning, messages and calls, in the format that a template shows."""
