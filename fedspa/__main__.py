"""`python -m fedspa` is the command line."""

from fedspa.cli import main

main()
