"""The HTTP side: the listener, the routes, and HTTP itself."""
from tinychat.server.listener import Server, check_settings, make_server

__all__ = ["Server", "check_settings", "make_server"]
