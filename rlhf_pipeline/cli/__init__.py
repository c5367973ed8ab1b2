"""The command line: parse -> validate -> run. Nothing heavy is imported before a command runs."""
