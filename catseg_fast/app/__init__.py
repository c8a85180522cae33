"""The page in the browser. It may import everything below the command line."""
