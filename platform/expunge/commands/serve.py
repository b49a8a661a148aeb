"""`expunge serve`: take requests over HTTP."""

from typing import Annotated

import typer

from expunge.commands.common import open_platform

Host = Annotated[str, typer.Option("--host", metavar="ADDRESS", help="The address to listen on.")]
Port = Annotated[int, typer.Option("--port", min=0, max=65535, help="The port; 0: any that is free.")]
Docs = Annotated[bool, typer.Option("--docs", help="Also serve /openapi.json, /docs and /redoc.")]
PrintOpenapi = Annotated[bool, typer.Option("--print-openapi", help="Print the OpenAPI document and stop.")]


def serve(host: Host = "127.0.0.1", port: Port = 8470, docs: Docs = False, print_openapi: PrintOpenapi = False) -> None:
    """Take removal requests over HTTP, from callers with a token of `expunge tokens create`."""
    from expunge.errors import UnavailableError

    try:
        from expunge.service.app import create_app
        from expunge.service.serving import serve as run
    except ImportError as error:
        hint = "install the extra: pip install 'expunge[serve]'"
        raise UnavailableError(f"the service needs {error.name}", hint=hint) from None
    opened = open_platform()
    if print_openapi:
        import json

        app = create_app(opened.settings, opened.store, opened.blobs)
        typer.echo(json.dumps(app.openapi(), indent=2))
        return
    run(opened.settings, opened.store, opened.blobs, host=host, port=port, docs=docs)
