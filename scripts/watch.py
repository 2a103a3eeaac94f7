"""Shows a run while it trains: a page that reads the run's folder again and again.

    moesaic watch runs/v31_nano
    moesaic watch runs/v31_nano --port 8001 --host 0.0.0.0

Nothing is loaded from elsewhere, and nothing in the folder is changed. Ctrl-C ends it.
"""

from pathlib import Path

from configs.checks import UserError, require
from evals.live_page import make_server
from scripts import command


def main(argv: list[str]) -> None:
    parser = command.parser(__doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (%(default)s)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one (%(default)s)")
    arguments = parser.parse_args(argv)
    require(
        (arguments.run / "config.json").exists(),
        f"{arguments.run} is no run's folder: it has no config.json",
    )
    require(0 <= arguments.port < 65536, f"--port {arguments.port} must be from 0 to 65535")
    try:
        server = make_server(arguments.run, arguments.host, arguments.port)
    except OSError as error:
        raise UserError(
            f"{arguments.host}:{arguments.port} can't be listened on: {error.strerror}: choose "
            "another --port"
        ) from error
    with server:
        host, port = server.server_address[:2]
        print(f"{arguments.run}: http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
        server.serve_forever()


if __name__ == "__main__":
    command.execute(main)
