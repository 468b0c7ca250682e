"""From messages and tools to the prompt: the model's own chat template, and what it can do."""
