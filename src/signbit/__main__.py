"""`python -m signbit` and `accelerate launch -m signbit` are the command `signbit`."""

import sys

from signbit.cli import main

sys.exit(main())
