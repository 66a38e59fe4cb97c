"""The command line `fedrag`: one module per subcommand, with its parser and its code."""
