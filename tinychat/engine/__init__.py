"""Sequences, KV pages, scheduler, sampler and the step loop: token ids in, token ids out."""
from tinychat.engine.engine import Engine, Stats
from tinychat.engine.images import PlacedImage
from tinychat.engine.sampler import SamplingParams
from tinychat.engine.sequence import (
    Finished, PromptDone, PromptProgress, PromptStarted, Sequence, Token, Update)

__all__ = ["Engine", "Finished", "PlacedImage", "PromptDone", "PromptProgress", "PromptStarted",
           "SamplingParams", "Sequence", "Stats", "Token", "Update"]
