"""``python -m kd_plugins``: the command ``kd-plugins``."""

from .cli import main

if __name__ == "__main__":
    main()
