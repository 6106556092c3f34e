"""python -m memnet_fast.cli: the command `memnet` where no script is installed."""

from memnet_fast.cli import main

if __name__ == "__main__":
    main()
