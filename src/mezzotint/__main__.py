"""`python -m mezzotint`: the same as the `mezzotint` command, for launchers such as torchrun."""

from mezzotint.cli.main import main

if __name__ == "__main__":
    main()
