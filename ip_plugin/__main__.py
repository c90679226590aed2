"""Entry point of the command `ip-plugin`: names missing packages, or runs `ip_plugin.cli`."""

from __future__ import annotations

import sys
from importlib.util import find_spec

NEEDED = ("filelock", "jinja2", "matplotlib", "pandas", "pydantic", "scipy", "sklearn", "typer")


def main() -> None:
    """Run the command."""
    if sys.argv[1:2] == ["run"]:  # by itself: it starts other people's scripts, and must start fast
        from ip_plugin.launcher.command import main as run_script

        run_script(sys.argv[2:])
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        sys.exit(f"ip-plugin: {', '.join(missing)} not installed; run: pip install 'ip-plugin[compare]'")
    from ip_plugin.cli import run

    run()


if __name__ == "__main__":
    main()
