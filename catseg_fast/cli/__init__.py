"""The command line, one file per command. May import everything; nothing imports it but `__main__`."""
