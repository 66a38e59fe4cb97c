"""The subcommands of `fedrag`: each a parser of its own, and what it runs."""
