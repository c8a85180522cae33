"""`python -m catseg_fast`: the command line."""

from catseg_fast.cli.main import main

if __name__ == "__main__":
    main()
