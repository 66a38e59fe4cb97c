"""Rules that make one update of many of which some are hostile or broken, a file for each family."""
