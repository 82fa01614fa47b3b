"""`python -m hf_xent.cli`: the command line where the package is not installed."""

from . import main

if __name__ == "__main__":  # not in the processes that it starts
    main()
