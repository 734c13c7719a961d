"""How does `python -m behrt` start? Exactly as the `behrt` command does."""

from behrt.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
