"""`python -m dsv4_ascend`: the `dsv4-ascend` command, as launchers of processes start it."""

from dsv4_ascend.cli.main import main

if __name__ == "__main__":
    main()
