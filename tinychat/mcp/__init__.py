"""The MCP client: tools of servers that speak over HTTP or are processes of this machine.

    client.py     a conversation; the only thing that chat and mcp.json need
    greeting.py   the first words: which era of the protocol     listing.py, results.py  pure
    streamable.py, old_sse.py, stdio.py   the three transports, behind transport.Transport
    http.py       one request and its answer, over wire.py, addresses.py, url.py, headers.py
    jsonrpc.py, era.py, errors.py, watch.py, limits.py   what all of them share
"""
