"""Train with other parties: each keeps its documents and sends only trained parameters.

  fedrag federate init FOLDER            certificates, keys, and three parties with documents
  fedrag federate run FOLDER             the server: waits for the parties, and trains with them
  fedrag federate link FOLDER            the server, for those who start runs with `flwr run`
  fedrag federate join PARTY             a party, on its own machine: trains when the server asks
  fedrag federate tuned PARTY --to NEW   saves the party's system with the trained parameters
  fedrag federate search FOLDER TEXT     finds passages at the parties that share theirs

After a kill, the same command restarts the server after its last finished round. Parties may leave and
return. The server and the parties run on separate machines, or all on one.
"""

import argparse
import pathlib
import signal
import sys

from fedrag_jax.cli.common import printable, require_least

PORT = 9092


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments of `fedrag federate`."""
    commands = parser.add_subparsers(dest="what", required=True, metavar="COMMAND")

    init = commands.add_parser("init", help="make a federation with generated documents")
    init.add_argument("folder", type=pathlib.Path, help="new folder of the federation")
    init.add_argument(
        "--host",
        nargs="+",
        default=["127.0.0.1", "localhost"],
        help="names or addresses of the server, for its certificate; parties connect to the first "
        "(default: 127.0.0.1 localhost)",
    )
    init.add_argument(
        "--port", type=int, default=PORT, help=f"port of the server (default: {PORT})"
    )
    init.add_argument(
        "--parties",
        nargs="+",
        default=["hospital_north", "hospital_south", "library"],
        metavar="NAME",
        help="names of the parties (default: hospital_north hospital_south library)",
    )
    init.add_argument(
        "--passages",
        type=int,
        default=60,
        help="number of passages to generate per party (default: 60)",
    )
    init.add_argument(
        "--seed", type=int, default=0, help="random seed of the generated world (default: 0)"
    )

    join = commands.add_parser("join", help="take part as a party")
    join.add_argument("party", type=pathlib.Path, help="folder of the party")
    join.add_argument(
        "--local-port",
        type=int,
        help="local port for the party's own programs; parties on one machine need different ports "
        "(default: 9094 and the party's number)",
    )

    join.add_argument(
        "--share-passages",
        action="store_true",
        help="answer the server's searches: the passages nearest to its questions leave this machine "
        "(default: nothing but trained parameters leaves it)",
    )

    run = commands.add_parser("run", help="start the server and train")
    run.add_argument("folder", type=pathlib.Path, help="folder of the federation")
    run.add_argument(
        "--listen",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="address on which the server listens; 0.0.0.0 for all addresses (default: 127.0.0.1)",
    )
    run.add_argument(
        "--set",
        nargs="+",
        default=(),
        metavar="KEY=VALUE",
        help="settings that override pyproject.toml, such as rounds=10 algorithm='\"fedadam\"'",
    )

    link = commands.add_parser("link", help="start the server and wait for `flwr run`")
    link.add_argument("folder", type=pathlib.Path, help="folder of the federation")
    link.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS", help="as for fedrag federate run"
    )

    search = commands.add_parser("search", help="find passages at the parties that share theirs")
    search.add_argument("folder", type=pathlib.Path, help="folder of the federation")
    search.add_argument("questions", nargs="+", metavar="QUESTION", help="a question")
    search.add_argument(
        "--top-k", type=int, default=5, help="number of passages per question (default: 5)"
    )
    search.add_argument(
        "--patience",
        type=int,
        default=600,
        metavar="SECONDS",
        help="seconds to wait until all parties are connected, and for their answers (default: 600)",
    )
    search.add_argument(
        "--listen", default="127.0.0.1", metavar="ADDRESS", help="as for fedrag federate run"
    )

    tuned = commands.add_parser("tuned", help="save a party's system with the trained parameters")
    tuned.add_argument("party", type=pathlib.Path, help="folder of the party")
    tuned.add_argument(
        "--to", type=pathlib.Path, required=True, help="new folder of the tuned system"
    )


def run(args: argparse.Namespace) -> int:
    """Runs `fedrag federate`."""
    from fedrag_jax.errors import ConfigError

    for name, most in (("port", 65534), ("local_port", 65535)):  # the server has the next port, too
        port = getattr(args, name, None)
        if port is not None and not 1 <= port <= most:
            flag = f"--{name.replace('_', '-')}"
            raise ConfigError(f"{flag} must be between 1 and {most}, got {port}")
    from fedrag_jax.integrations.flower import federation

    if args.what == "init":
        require_least(args, seed=0)
        federation.make(args.folder, args.host, args.port, args.parties, args.passages, args.seed)
        print(f"{args.folder}: read {args.folder / 'README.md'}")
        return 0
    if args.what in ("join", "link", "run", "search"):
        # What it has started ends with it, whoever ends it.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    if args.what == "join":
        return federation.join(args.party, args.local_port, args.share_passages)
    if args.what == "run":
        return federation.serve(args.folder, args.set, args.listen)
    if args.what == "link":
        return federation.wait_for_runs(args.folder, args.listen)
    if args.what == "search":
        how = args.top_k, args.patience, args.listen
        tell(federation.search(args.folder, args.questions, *how))
        return 0
    from fedrag_jax.integrations.flower.systems import tuned
    from fedrag_jax.rag_folder import require_new

    require_new(args.to)
    tuned(args.party).save(args.to)
    print(f"{args.to}: ask it with fedrag ask")
    return 0


def tell(searched: dict) -> None:
    """Prints the passages of a search, who answered, and bytes."""
    for one in searched["found"]:
        print(one["question"])
        for passage in one["passages"]:
            who = ", ".join(map(str, passage["parties"]))
            text = printable(f"{passage['title']}: {passage['text']}")
            print(f"  {passage['score']:.3f}  party {who}  {text}")
    for who, why in searched["refused"].items():
        print(f"{who}: {printable(why)}", file=sys.stderr)
    print(
        f"parties {searched['answered']} answered; {searched['bytes_down']:,} bytes down, "
        f"{searched['bytes_up']:,} bytes up"
    )
