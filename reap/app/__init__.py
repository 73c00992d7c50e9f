"""The command line: commands, their console, the demo."""
