"""`python -m twostage` is the `twostage` command."""

from .cli import main

raise SystemExit(main())
