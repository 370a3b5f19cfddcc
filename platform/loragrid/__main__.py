"""`python -m loragrid`: the same as the command `loragrid`."""

from loragrid.cli.main import main

if __name__ == "__main__":
    main()
