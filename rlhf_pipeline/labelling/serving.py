"""An address on this machine, and the labelling page at it."""

from __future__ import annotations

import socket
from collections.abc import Callable

from rlhf_pipeline.errors import BadInput
from rlhf_pipeline.labelling.markdown import NEEDS_LABEL
from rlhf_pipeline.labelling.security import EVERY, allowed_names, is_loopback, own_number
from rlhf_pipeline.labelling.server import make_app
from rlhf_pipeline.labelling.store import LabelStore

try:
    import uvicorn
except ImportError as error:
    raise BadInput(NEEDS_LABEL) from error


def address(host: str, port: int, token: str | None) -> str:
    """The address to open. The token stands behind its #, so that no server or log on the way sees it."""
    shown = own_number(host) if host in EVERY else host or "127.0.0.1"
    name = f"[{shown}]" if ":" in shown else shown
    return f"http://{name}:{port}/{f'#token={token}' if token else ''}"


def bound(host: str, port: int) -> socket.socket:
    """A socket that holds an address for `serve`; nobody can connect before that.

    Args:
        port: 0 takes a free one.

    Raises:
        BadInput: the address cannot be had.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
    except (OSError, TypeError, ValueError) as error:  # the latter two: the host is no name at all
        listener.close()
        raise _taken(host, port, error) from error
    return listener


def _taken(host: str, port: int, error: Exception) -> BadInput:
    why = getattr(error, "strerror", None) or error
    return BadInput(f"{host}:{port}: {why}; expected a free address; give another host or port")


def serve(
    store: LabelStore, listener: socket.socket, *, host: str, token: str | None, ready: Callable[[str], None]
) -> None:
    """Serve the page until the process is interrupted; closes the socket.

    Args:
        listener: `bound` to the host.
        ready: called once with the address to open, when a browser can open it.

    Raises:
        BadInput: other machines reach this address and there is no token, or another process has got it meanwhile.
    """
    if token is None and not is_loopback(host):
        found = f"host: found {host!r} without a token; expected a token where other machines reach the page"
        raise BadInput(f"{found}; set token, or leave host at 127.0.0.1")
    app = make_app(store, token=token, hosts=allowed_names(host))
    settings = uvicorn.Config(
        app,
        http="h11",  # limits the headers; httptools, which other packages bring along, does not
        log_level="error",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ws="none",
        lifespan="off",
        timeout_keep_alive=60,
        timeout_graceful_shutdown=3,
        limit_concurrency=1000,
        h11_max_incomplete_event_size=16 * 1024,
    )
    with listener:
        port = listener.getsockname()[1]
        try:
            listener.listen(1024)
        except OSError as error:
            raise _taken(host, port, error) from error
        ready(address(host, port, token))
        uvicorn.Server(settings).run(sockets=[listener])
