"""``python -m kssm``, and where the command ``kssm`` enters."""

from kssm.cli import main

__all__ = ["main"]

if __name__ == "__main__":
    raise SystemExit(main())
