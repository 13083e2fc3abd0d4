"""`python -m rankfold` is the command `rankfold`."""

from rankfold.cli import main

main()
