"""The wire's requests and the hand-written validation of what comes over it."""
from tinychat.contract.chat import (
    RESPONSE_ID_PREFIX, ChatRequest, EphemeralServer, ImageItem, Plugin, TextItem,
    parse_chat_request)
from tinychat.contract.checks import MAX_COUNT, parse_json, wrong_type
from tinychat.contract.models import (
    DownloadRequest, LoadRequest, parse_download_request, parse_load_request,
    parse_unload_request)

__all__ = ["MAX_COUNT", "RESPONSE_ID_PREFIX", "ChatRequest", "DownloadRequest", "EphemeralServer",
           "ImageItem", "LoadRequest", "Plugin", "TextItem", "parse_chat_request",
           "parse_download_request", "parse_json", "parse_load_request", "parse_unload_request",
           "wrong_type"]
