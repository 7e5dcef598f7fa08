"""`python -m softnpu` is the command `softnpu`."""

from softnpu.command import main

main()
