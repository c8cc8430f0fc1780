"""Grammars that constrain outputs, compiled by llguidance (https://github.com/guidance-ai/llguidance)."""
