"""The page in the browser. May import everything below the command line."""
