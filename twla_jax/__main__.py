"""Starts the command line, for `twla` and for `python -m twla_jax`."""

from twla_jax.cli import interrupts


def main() -> None:
    """Run the command line; from the first import to the last clean-up, Ctrl-C ends it with exit status 130."""
    interrupts.end_at_once()
    try:
        from twla_jax.cli.main import main as run

        run()
    finally:
        interrupts.end_at_once()


if __name__ == "__main__":
    main()
