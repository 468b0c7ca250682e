"""Text in and out of a model: tokenizers, chat templates, splitting what was generated."""
