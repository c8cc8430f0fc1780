"""What pytest needs to know before it looks for tests."""

pytest_plugins = ["stoker.testing.pytest_plugin"]  # --stoker-speed, and what a check was about if it crashes
