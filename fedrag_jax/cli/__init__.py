"""`fedrag`, the command line: each subcommand a parser of its own, and what it runs."""
