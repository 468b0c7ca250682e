"""The HTTP side: the listener, the routes, and HTTP itself."""
from tinychat.server.listener import Server, make_server

__all__ = ["Server", "make_server"]
