"""`python -m mlpipe` is the command `mlpipe`."""
from .cli import main

if __name__ == "__main__":
    main()
