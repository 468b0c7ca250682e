"""`POST /api/v1/models/load`, `/unload` and `/download`: what they take."""
from dataclasses import dataclass
from typing import Any

from tinychat.contract.checks import Fields, boolean, integer, text


@dataclass(frozen=True)
class LoadRequest:
    """One explicit load; None means that the request does not say.

    `num_experts`, `flash_attention` and `offload_kv_cache_to_gpu` are checked and then forgotten:
    the contract takes them wherever they do not apply, and in this build none applies.
    """

    model: str
    context_length: int | None = None
    eval_batch_size: int | None = None
    echo_load_config: bool = False
    ttl: int | None = None


@dataclass(frozen=True)
class DownloadRequest:
    """model: an id of the catalogue, or a link to a repository of the hub."""

    model: str
    quantization: str | None = None


def parse_load_request(value: Any) -> LoadRequest:
    """Raises: InvalidRequest with code and param of the first violation."""
    body = Fields("", value)
    model = body.required("model", text())
    context_length = body.optional("context_length", integer(1))
    eval_batch_size = body.optional("eval_batch_size", integer(1))
    body.optional("flash_attention", boolean)
    body.optional("num_experts", integer(1))
    body.optional("offload_kv_cache_to_gpu", boolean)
    echo = body.optional("echo_load_config", boolean, False)
    ttl = body.optional("ttl", integer(1))
    body.finish()
    return LoadRequest(model, context_length, eval_batch_size, echo, ttl)


def parse_unload_request(value: Any) -> str:
    """The instance's id, or a name for its model. Raises: InvalidRequest."""
    body = Fields("", value)
    instance_id = body.required("instance_id", text())
    body.finish()
    return instance_id


def parse_download_request(value: Any) -> DownloadRequest:
    """Raises: InvalidRequest with code and param of the first violation."""
    body = Fields("", value)
    request = DownloadRequest(body.required("model", text()),
                              body.optional("quantization", text()))
    body.finish()
    return request
